"""The rules of tests/tools/api_server_rules.py reject what they are for, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from decimal import Decimal
from typing import Any

import pytest
import yaml

from . import api_server_rules as rules

POD: dict[str, Any] = {
    "serviceAccountName": "llm",
    "initContainers": [
        {
            "name": "sidecar",
            "image": "s:1",
            "restartPolicy": "Always",
            "readinessProbe": {"httpGet": {"path": "/", "port": 1}},
        }
    ],
    "containers": [
        {
            "name": "engine",
            "image": "e:1",
            "ports": [{"name": "http", "containerPort": 80}],
            "env": [
                {"name": "A", "value": "1"},
                {"name": "B", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu", "divisor": "1"}}},
                {"name": "C", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['a.b/C']"}}},
            ],
            "livenessProbe": {"exec": {"command": ["true"]}, "terminationGracePeriodSeconds": 5},
            "startupProbe": {"tcpSocket": {"port": "http"}},
            "lifecycle": {"preStop": {"exec": {"command": ["true"]}}},
            "resources": {
                "requests": {"cpu": "500m", "nvidia.com/gpu": "1"},
                "limits": {"cpu": 1, "memory": "1.5Gi", "nvidia.com/gpu": 1},
            },
            "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"add": ["SYS_PTRACE"]}},
            "volumeMounts": [{"name": "v", "mountPath": "/v"}],
        }
    ],
    "volumes": [
        {"name": "v", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}},
        {"name": "t", "projected": {"sources": [{"serviceAccountToken": {"path": "token", "expirationSeconds": 600}}]}},
    ],
}
DEPLOYMENT: dict[str, Any] = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {
        "name": "a.b",
        "namespace": "n",
        "labels": {"x.io/Y": "", "b": "A_b.c-1"},
        "annotations": {"X.io/p": "/m"},
    },
    "spec": {
        "selector": {"matchLabels": {"a": "b"}},
        "strategy": {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}},
        "template": {"metadata": {"labels": {"a": "b", "c": "d"}}, "spec": POD},
    },
}
SERVICE: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "llm"},
    "spec": {"selector": {"a": "b"}, "ports": [{"port": 80, "targetPort": "http"}]},
}
ROLE: dict[str, Any] = {
    "apiVersion": "rbac.authorization.k8s.io/v1",
    "kind": "Role",
    "metadata": {"name": "system:a"},
    "rules": [{"verbs": ["get"], "apiGroups": [""], "resources": ["pods"], "resourceNames": ["a"]}],
}
BINDING: dict[str, Any] = {
    "apiVersion": "rbac.authorization.k8s.io/v1",
    "kind": "RoleBinding",
    "metadata": {"name": "b"},
    "subjects": [{"kind": "ServiceAccount", "name": "llm"}],
    "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "system:a"},
}
AUTOSCALER: dict[str, Any] = {
    "apiVersion": "autoscaling/v2",
    "kind": "HorizontalPodAutoscaler",
    "metadata": {"name": "h"},
    "spec": {
        "scaleTargetRef": {"kind": "Deployment", "name": "llm"},
        "maxReplicas": 2,
        "metrics": [{"type": "Pods", "pods": {"target": {"averageValue": "700m"}}}],
        "behavior": {"scaleUp": {"policies": [{"type": "Pods", "value": 1, "periodSeconds": 60}]}},
    },
}
MONITOR: dict[str, Any] = {
    "apiVersion": "monitoring.coreos.com/v1",
    "kind": "PodMonitor",
    "metadata": {"name": "m"},
    "spec": {"selector": {"matchLabels": {"a": "b"}}},
}
GOOD = (DEPLOYMENT, SERVICE, ROLE, BINDING, AUTOSCALER, MONITOR)

TEMPLATE = "spec.template.metadata"
ENGINE = "spec.template.spec.containers.0"
SIDECAR = "spec.template.spec.initContainers.0"
VOLUMES = "spec.template.spec.volumes"
PORT = {"name": "a", "containerPort": 1}

REFUSED: list[tuple[dict[str, Any], str, Any]] = [
    (DEPLOYMENT, "metadata", None),
    (DEPLOYMENT, "metadata.name", "A"),
    (DEPLOYMENT, "metadata.name", True),
    (DEPLOYMENT, "metadata.name", "a" * 254),
    (DEPLOYMENT, "metadata.name", "a\n"),
    (DEPLOYMENT, "metadata.namespace", "a.b"),
    (DEPLOYMENT, f"{TEMPLATE}.labels", {"a": "b", "prometheus.io/path": "/metrics"}),
    (DEPLOYMENT, f"{TEMPLATE}.labels", {"a": "b", "c": True}),
    (DEPLOYMENT, f"{TEMPLATE}.labels", {"a": "b", "c": "x" * 64}),
    (DEPLOYMENT, f"{TEMPLATE}.labels", {"a": "b", "-c": ""}),
    (DEPLOYMENT, f"{TEMPLATE}.labels", {"a": "b", "UP.io/c": ""}),
    (DEPLOYMENT, f"{TEMPLATE}.labels", {"a": "b", "x.io/y/z": ""}),
    (DEPLOYMENT, f"{TEMPLATE}.labels", {"c": "d"}),
    (DEPLOYMENT, f"{TEMPLATE}.annotations", {"a b": ""}),
    (DEPLOYMENT, f"{TEMPLATE}.annotations", {"a": 8080}),
    (DEPLOYMENT, f"{TEMPLATE}.annotations", {"a": "ü" * (128 * 1024)}),
    (DEPLOYMENT, "spec.selector.matchLabels", {}),
    (DEPLOYMENT, "spec.replicas", -1),
    (DEPLOYMENT, "spec.progressDeadlineSeconds", 0),
    (DEPLOYMENT, "spec.strategy.rollingUpdate.maxUnavailable", 0),
    (DEPLOYMENT, "spec.strategy.rollingUpdate.maxUnavailable", "0%"),
    (DEPLOYMENT, "spec.strategy.rollingUpdate.maxUnavailable", "101%"),
    (DEPLOYMENT, "spec.strategy.rollingUpdate.maxSurge", -1),
    (DEPLOYMENT, "spec.strategy.type", "Recreate"),
    (DEPLOYMENT, "spec.template.spec.containers", []),
    (DEPLOYMENT, "spec.template.spec.restartPolicy", "Never"),
    (DEPLOYMENT, "spec.template.spec.terminationGracePeriodSeconds", -1),
    (DEPLOYMENT, "spec.template.spec.serviceAccountName", "A"),
    (DEPLOYMENT, "spec.template.spec.serviceAccountName", ""),
    (DEPLOYMENT, "spec.template.spec.securityContext", {"runAsUser": 1 << 31}),
    (DEPLOYMENT, f"{ENGINE}.name", "sidecar"),
    (DEPLOYMENT, f"{ENGINE}.name", "a.b"),
    (DEPLOYMENT, f"{ENGINE}.image", ""),
    (DEPLOYMENT, f"{ENGINE}.image", "e:1 "),
    (DEPLOYMENT, f"{ENGINE}.restartPolicy", "Always"),
    (DEPLOYMENT, f"{SIDECAR}.restartPolicy", "Never"),
    (DEPLOYMENT, f"{ENGINE}.ports", [PORT, PORT | {"containerPort": 2}]),
    (DEPLOYMENT, f"{ENGINE}.ports", [PORT, PORT | {"name": "b"}]),
    (DEPLOYMENT, f"{ENGINE}.ports.0.name", "sixteen-letters-"),
    (DEPLOYMENT, f"{ENGINE}.ports.0.name", "a--b"),
    (DEPLOYMENT, f"{ENGINE}.ports.0.name", "8080"),
    (DEPLOYMENT, f"{ENGINE}.ports.0.containerPort", 65536),
    (DEPLOYMENT, f"{ENGINE}.env.0.name", "1A"),
    (DEPLOYMENT, f"{ENGINE}.env.0.name", "..A"),
    (DEPLOYMENT, f"{ENGINE}.env.0.name", "B"),
    (DEPLOYMENT, f"{ENGINE}.env.0.value", 1),
    (DEPLOYMENT, f"{ENGINE}.env.1.value", "1"),
    (DEPLOYMENT, f"{ENGINE}.env.1.valueFrom.resourceFieldRef.resource", "limits.gpu"),
    (DEPLOYMENT, f"{ENGINE}.env.1.valueFrom.resourceFieldRef.divisor", "1k"),
    (DEPLOYMENT, f"{ENGINE}.env.2.valueFrom.fieldRef.fieldPath", "status.phase"),
    (DEPLOYMENT, f"{ENGINE}.volumeMounts.0.name", "w"),
    (DEPLOYMENT, f"{ENGINE}.volumeMounts.0.mountPath", ""),
    (DEPLOYMENT, f"{ENGINE}.volumeMounts", [{"name": "v", "mountPath": "/v"}, {"name": "t", "mountPath": "/v"}]),
    (DEPLOYMENT, f"{ENGINE}.livenessProbe.successThreshold", 2),
    (DEPLOYMENT, f"{ENGINE}.startupProbe.successThreshold", 2),
    (DEPLOYMENT, f"{ENGINE}.livenessProbe.terminationGracePeriodSeconds", 0),
    (DEPLOYMENT, f"{SIDECAR}.readinessProbe.terminationGracePeriodSeconds", 5),
    (DEPLOYMENT, f"{SIDECAR}.readinessProbe.periodSeconds", -1),
    (DEPLOYMENT, f"{SIDECAR}.readinessProbe.httpGet.port", 0),
    (DEPLOYMENT, f"{SIDECAR}.readinessProbe.httpGet.scheme", "http"),
    (DEPLOYMENT, f"{SIDECAR}.readinessProbe.tcpSocket", {"port": 1}),
    (DEPLOYMENT, f"{ENGINE}.livenessProbe.exec.command", []),
    (DEPLOYMENT, f"{ENGINE}.lifecycle.preStop", {}),
    (DEPLOYMENT, f"{ENGINE}.resources.requests.cpu", "1001m"),
    (DEPLOYMENT, f"{ENGINE}.resources.requests.memory", "2Gi"),
    (DEPLOYMENT, f"{ENGINE}.resources.requests", {"nvidia.com/gpu": 2}),
    (DEPLOYMENT, f"{ENGINE}.resources.requests", {"amd.com/gpu": 1}),
    (DEPLOYMENT, f"{ENGINE}.resources.requests", {"gpu": 1}),
    (DEPLOYMENT, f"{ENGINE}.resources.limits", {"amd.com/gpu": "500m"}),
    (DEPLOYMENT, f"{ENGINE}.resources.limits.memory", "64ki"),
    (DEPLOYMENT, f"{ENGINE}.resources.limits.memory", "-1"),
    (DEPLOYMENT, f"{ENGINE}.securityContext.capabilities.add", ["SYS_ADMIN"]),
    (DEPLOYMENT, f"{ENGINE}.securityContext.privileged", True),
    (DEPLOYMENT, f"{VOLUMES}.0.name", "t"),
    (DEPLOYMENT, f"{VOLUMES}.0.name", "v.v"),
    (DEPLOYMENT, f"{VOLUMES}.0.hostPath", {"path": "/"}),
    (DEPLOYMENT, f"{VOLUMES}.0.emptyDir.sizeLimit", "1gb"),
    (DEPLOYMENT, f"{VOLUMES}.0.emptyDir.medium", "memory"),
    (DEPLOYMENT, f"{VOLUMES}.1.projected.sources.0.serviceAccountToken.expirationSeconds", 599),
    (DEPLOYMENT, f"{VOLUMES}.1.projected.sources.0.serviceAccountToken.path", "../token"),
    (SERVICE, "metadata.name", "1llm"),
    (SERVICE, "spec.selector", {"a": "/"}),
    (SERVICE, "spec.ports", []),
    (SERVICE, "spec.ports", [{"port": 1}, {"port": 2}]),
    (SERVICE, "spec.ports", [{"name": "a", "port": 1}, {"name": "b", "port": 1}]),
    (SERVICE, "spec.ports.0.targetPort", "a-name-that-is-too-long"),
    (SERVICE, "spec.ports.0.port", "http"),
    (ROLE, "metadata.name", "a/b"),
    (ROLE, "rules.0.verbs", []),
    (ROLE, "rules.0.resources", ["pods", "leases"]),
    (BINDING, "roleRef.apiGroup", ""),
    (BINDING, "roleRef.name", ""),
    (BINDING, "subjects.0.apiGroup", "rbac.authorization.k8s.io"),
    (AUTOSCALER, "spec.minReplicas", 3),
    (AUTOSCALER, "spec.minReplicas", 0),
    (AUTOSCALER, "spec.metrics.0.pods.target.averageValue", "0"),
    (AUTOSCALER, "spec.behavior.scaleUp.stabilizationWindowSeconds", 3601),
    (AUTOSCALER, "spec.behavior.scaleUp.policies.0.periodSeconds", 1801),
    (MONITOR, "metadata.labels", {"a": "b c"}),
    (MONITOR, "spec.selector.matchLabels", {"a": "b c"}),
    (MONITOR, "kind", None),
]


@pytest.mark.parametrize("document", GOOD, ids=lambda d: d["kind"])
def test_what_is_right_is_taken(document: dict[str, Any]) -> None:
    """Each kind of object passes with unusual but valid values: dots, underscores, upper case, empty values."""
    assert rules.refusals(document) == []


@pytest.mark.parametrize(
    ("document", "path", "value"), REFUSED, ids=lambda v: v if isinstance(v, str) and len(v) < 99 else ""
)
def test_each_fault_is_refused(document: dict[str, Any], path: str, value: Any) -> None:
    """One invalid field of a valid object is rejected."""
    changed = deepcopy(document)
    *way, last = path.split(".")
    place: Any = changed
    for step in way:
        place = place[int(step)] if isinstance(place, list) else place[step]
    place[int(last) if isinstance(place, list) else last] = value
    assert rules.refusals(changed)


@pytest.mark.parametrize(
    ("check", "yes", "no"),
    [
        (
            rules.qualified_name,
            ["simple", "1.2.3.4/5", "A_b.c-d", "x" * 253 + "/a", "a" * 63],
            ["", "/", "a/", "x" * 254 + "/a", "a" * 64, "nospecialchars%^=@"],
        ),
        (rules.label_value, ["", "Now-With.dashes_1", "1"], ["-a", "a-", "a b", "a/b", "ü", "a\n"]),
        (rules.port_name, ["a", "8o8o", "with-hyphens"], ["", "-", "a-", "80", "A", "more-than-16-char"]),
    ],
    ids=["key", "value", "port"],
)
def test_names_as_in_the_sources_own_tests(check: Callable[[Any], bool], yes: list[str], no: list[str]) -> None:
    """Names from Kubernetes' validation_test.go pass or fail here as there."""
    assert [name for name in yes if not check(name)] == [] and [name for name in no if check(name)] == []


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("64Gi", 64 << 30),
        ("1k", 1000),
        ("100m", Decimal("0.1")),
        ("1e3", 1000),
        ("1E", 10**18),
        (".5", Decimal("0.5")),
        (2, 2),
        ("64ki", None),
        ("1K", None),
        ("1GB", None),
        ("", None),
        ("1 Gi", None),
        ("١", None),
        (True, None),
    ],
)
def test_quantities_are_read_as_kubernetes_does(text: Any, number: Any) -> None:
    """Suffixes have one spelling, numbers have Western digits."""
    assert rules.quantity(text) == number


def test_a_key_that_stands_twice_and_a_lone_y_are_seen() -> None:
    """YAML is parsed like in kubectl: strictly, and y and n are no strings."""
    with pytest.raises(yaml.YAMLError, match="twice"):
        rules.objects("a: 1\nb: {c: 1, c: 2}\n")
    assert rules.objects("a: y\n---\n---\nb: [n, 'y']\n") == [{"a": True}, {"b": [False, "y"]}]
