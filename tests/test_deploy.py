"""deploy/: what is configured for others agrees with what they take, and with what the sidecar gives.

The lists of fields are our own excerpts of the sources that the files name, with their versions.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from sidecar.events import OUTCOMES, STATES
from sidecar.health.kill_policy import ESCALATIONS, KILL_REASONS
from sidecar.health.reasons import REASON_TEXTS
from sidecar.report import load_json
from sidecar.report.metrics import METRICS
from sidecar.report.prometheus import MetricsPages
from sidecar.settings import Settings, format_key
from sidecar.tools.cel import CelSettings
from sidecar.tools.forecast import ForecastSettings
from sidecar.tools.manifests.settings import ManifestSettings

from .report.snapshots import SNAPSHOT
from .report.test_reports import full
from .tools import api_server_rules

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
FILES = sorted(p for p in DEPLOY.rglob("*") if p.is_file())
# What an API server may get; Compose, systemd and Envoy have formats of their own.
# The chart's templates become objects in tests/tools/test_charts.py, and so do the component's patches.
OTHERS = {"compose", "envoy", "helm", "kustomize", "prometheus"}
KUBERNETES = [p for p in FILES if p.suffix == ".yaml" and p.relative_to(DEPLOY).parts[0] not in OTHERS]
RELAY, ADMIN = Settings().listen[1], Settings().admin[1]
ORCA = 9401

# kedacore/keda v2.20.1: keda.sh_scaledobjects.yaml; metadata of metrics_api_scaler.go and prometheus_scaler.go
KEDA_SPEC = {
    "scaleTargetRef",
    "minReplicaCount",
    "maxReplicaCount",
    "pollingInterval",
    "cooldownPeriod",
    "fallback",
    "advanced",
    "triggers",
}
KEDA_METADATA = {
    "prometheus": {
        "serverAddress",
        "query",
        "threshold",
        "activationThreshold",
        "namespace",
        "ignoreNullValues",
        "timeout",
    },
    "metrics-api": {
        "url",
        "format",
        "valueLocation",
        "targetValue",
        "activationTargetValue",
        "aggregateFromKubeServiceEndpoints",
        "aggregationType",
        "timeout",
    },
}
# llm-d-router v0.10.0-rc.1-62-gebab68792: factories of the plugins
PICKER = {
    "metrics-data-source": {"scheme", "path", "interval"},
    "core-metrics-extractor": {"engineLabelKey", "defaultEngine", "engineConfigs"},
    "dcgm-data-source": {"scheme", "path", "port", "interval", "useNodeAddress"},
    "endpoint-attribute-scorer": {"attributeKey", "producer", "algorithm"},
    **{
        name: set()
        for name in (
            "dcgm-extractor",
            "approx-prefix-cache-producer",
            "prefix-cache-scorer",
            "max-score-picker",
            "single-profile-handler",
        )
    },
}

# What has a kind but is read from a file, by its own program, and what is no Kubernetes object at all.
SETTINGS_FILES = {"EndpointPickerConfig"}
NO_OBJECTS = {
    "endpoint-picker.yaml",
    "modelservice-values.yaml",
    "prometheus-adapter.yaml",
    "scale-to-zero-adapter.yaml",
}

# What Prometheus and its discovery add to a series.
TARGET = {"job", "instance", "namespace", "pod", "le"}
VALUES: dict[tuple[str, str], Iterable[str]] = {
    ("", "outcome"): OUTCOMES,
    ("", "verdict"): STATES,
    ("sidecar_handover", "reason"): ESCALATIONS,
    ("sidecar_kills_total", "reason"): KILL_REASONS,
    ("sidecar_doubt", "reason"): REASON_TEXTS,
    ("sidecar_mu_utilization_part_ratio", "part"): [part for part, _ in SNAPSHOT.load.parts],
}
ENGINE_FLAGS = {
    *("--host", "--port", "--enable-prompt-tokens-details", "--headless", "--nnodes", "--node-rank", "--master-addr"),
    *("--tensor-parallel-size", "--pipeline-parallel-size", "--distributed-executor-backend"),
}
# Of `docker compose up`, `systemctl enable` and pip.
OTHER_FLAGS = {"--build", "--now", "--no-cache-dir", "--help"}


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def expressions(dashboard: Any) -> Iterator[str]:
    """Every query of a dashboard, its variables filled in."""
    targets = [target for panel in dashboard["panels"] for target in panel["targets"]]
    for query in (*targets, *dashboard["annotations"]["list"]):
        yield re.sub(r"\$__rate_interval", "5m", re.sub(r"\$(job|instance)", ".*", query["expr"]))


def series() -> set[str]:
    """Every series name that a page of the sidecar can have."""
    names = {m.name for m in METRICS}
    return names | {f"{m.name}_{end}" for m in METRICS if m.kind == "histogram" for end in ("bucket", "sum", "count")}


@pytest.mark.parametrize("file", FILES, ids=lambda p: str(p.relative_to(DEPLOY)))
def test_every_series_that_is_named_exists(file: Path) -> None:
    """No rule, dashboard or mapping names a series that no page has."""
    text = re.sub(r"job:sidecar_\w+:\w+", "", file.read_text())
    assert set(re.findall(r"\b(?:sidecar_(?=[a-z])|DCGM_FI_)[a-zA-Z_]+", text)) - {"sidecar_client"} <= series()


@pytest.mark.parametrize("file", FILES, ids=lambda p: str(p.relative_to(DEPLOY)))
def test_every_label_that_is_named_exists(file: Path) -> None:
    """A query by a label or value that no page has would be silent forever."""
    labels = {m.name: {*m.labels} for m in METRICS}
    for name, inside in re.findall(r"\b(sidecar_[a-z_]+)\{([^}]*)\}", file.read_text()):
        for label, value in re.findall(r'(\w+)(?:=~|!=|=)\\?"([^"\\]*)', inside):
            assert label in TARGET | labels[re.sub("_(bucket|sum|count)$", "", name)], f"{name}: {label}"
            values = VALUES.get((name, label)) or VALUES.get(("", label))
            assert values is None or set(value.split("|")) <= set(values), f"{name}: {label}={value}"


@pytest.mark.parametrize("file", FILES, ids=lambda p: str(p.relative_to(DEPLOY)))
def test_every_flag_and_variable_that_is_named_exists(file: Path) -> None:
    """No comment names a flag, and no manifest sets a variable, that no command accepts."""
    text = file.read_text()
    flags = {
        format_key(f.name) for cls in (Settings, ManifestSettings, CelSettings, ForecastSettings) for f in fields(cls)
    }
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - ENGINE_FLAGS - OTHER_FLAGS <= flags
    variables = {format_key(f.name, "environment") for f in fields(Settings)}
    assert set(re.findall(r"\bSIDECAR_[A-Z_]+", text)) <= variables


@pytest.mark.parametrize("file", KUBERNETES, ids=lambda p: str(p.relative_to(DEPLOY)))
def test_an_api_server_takes_every_object(file: Path) -> None:
    """No object breaks a rule that an API server applies beyond its schema."""
    found = api_server_rules.objects(file.read_text())
    objects = [d for d in found if "apiVersion" in d and d["kind"] not in SETTINGS_FILES]
    assert [why for document in objects for why in api_server_rules.refusals(document)] == []
    assert objects or file.name in NO_OBJECTS


def test_every_recording_that_is_named_is_recorded() -> None:
    """Alerts and tests use recordings that are there (those of alerts: test_alerts.py)."""
    texts = [(DEPLOY / "prometheus" / name).read_text() for name in ("rules.yaml", "rules_test.yaml")]
    recorded = set(re.findall(r"record: (\S+)", texts[0]))
    assert {name for text in texts for name in re.findall(r"job:sidecar_\w+:\w+", text)} <= recorded


def test_every_alert_leads_to_its_paragraph_of_the_runbook() -> None:
    """An alert by reason leads to each of the reasons that its query can bring."""
    (rules,) = documents("prometheus/rules.yaml")
    runbook = (DEPLOY.parent / "docs" / "runbook.md").read_text()
    anchors = {re.sub(r"[`,]", "", title).lower().replace(" ", "-") for title in re.findall("^#+ (.+)$", runbook, re.M)}
    alerts = [rule for group in rules["groups"] for rule in group["rules"] if "alert" in rule]
    assert len(alerts) > 10
    for rule in alerts:
        page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
        by_reason = ESCALATIONS if "sidecar_handover" in rule["expr"] else REASON_TEXTS
        found = {*by_reason} if anchor == "{{ $labels.reason }}" else {anchor}
        assert page == "docs/runbook.md" and found <= anchors, rule["alert"]


def test_promtool_takes_rules_and_their_tests(requires: Callable[[str], Path]) -> None:
    """`promtool check rules` and `promtool test rules` find nothing."""
    for what in ("check", "test"):
        file = "rules.yaml" if what == "check" else "rules_test.yaml"
        promtool(requires, what, "rules", str(DEPLOY / "prometheus" / file))


def test_every_query_is_promql(requires: Callable[[str], Path], tmp_path: Path) -> None:
    """Queries of the dashboard, of KEDA and of the adapter parse."""
    queries = list(expressions(json.loads((DEPLOY / "grafana" / "sidecar.json").read_text())))
    assert len(queries) > 20
    queries += [d["spec"]["triggers"][0]["metadata"]["query"] for d in documents("keda/prometheus.yaml")]
    adapters = (documents("hpa/prometheus-adapter.yaml")[0], documents("hpa/scale-to-zero-adapter.yaml")[0])
    for rule in (*adapters[0]["rules"], *adapters[1]["externalRules"]):
        filled = (
            rule["metricsQuery"]
            .replace("<<.Series>>", rule["seriesQuery"].partition("{")[0])
            .replace("<<.GroupBy>>", "pod")
        )
        queries += [rule["seriesQuery"], filled.replace("<<.LabelMatchers>>", 'pod="a"')]
    rules = [{"record": f"q{i}", "expr": query} for i, query in enumerate(queries)]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    promtool(requires, "check", "rules", str(tmp_path / "rules.yaml"))


def promtool(requires: Callable[[str], Path], *arguments: str) -> None:
    done = subprocess.run([requires("promtool"), *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_query_of_the_dashboard_finds_its_series_on_a_page() -> None:
    """Each metric and label that a panel or an annotation asks for is on a recorded page of a busy sidecar."""
    dashboard = json.loads((DEPLOY / "grafana" / "sidecar.json").read_text())
    there: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(MetricsPages(full().registry).text()):
        for sample in family.samples:
            there.setdefault(sample.name, set()).update(sample.labels)
    for query in expressions(dashboard):
        for name in re.findall(r"\bsidecar_\w+", query):
            assert name in there, query
            for label in re.findall(r"{{(\w+)}}", query):
                assert label in there[name] | TARGET, query


def test_the_dashboard_begins_with_the_state_now() -> None:
    """Its first row is of numbers that say how things are; each verdict has its text and colour on the time line."""
    dashboard = json.loads((DEPLOY / "grafana" / "sidecar.json").read_text())
    row, *panels = dashboard["panels"]
    first = panels[: next(n for n, panel in enumerate(panels) if panel["type"] == "row")]
    assert row["type"] == "row" and [p["type"] for p in first] == ["stat"] * 7 + ["state-timeline"]
    for panel in (first[0], first[-1]):
        (options,) = (mapping["options"] for mapping in panel["fieldConfig"]["defaults"]["mappings"])
        codes = dict(re.findall(r'(\d+) \* sidecar_verdict{.*verdict="(\w+)"}', panel["targets"][0]["expr"]))
        assert {code: option["text"] for code, option in options.items()} == codes
        assert set(codes.values()) == set(STATES) and all(option["color"] for option in options.values())
    assert {a["name"] for a in dashboard["annotations"]["list"]} >= {"Kills", "Escalations", "XID errors"}
    assert len([p for p in panels if "thresholds" in p.get("fieldConfig", {}).get("defaults", {})]) > 8


def test_the_dashboard_can_be_imported() -> None:
    """Panels have ids of their own, a place within 24 columns, and a data source that the user chooses."""
    dashboard = json.loads((DEPLOY / "grafana" / "sidecar.json").read_text())
    panels = dashboard["panels"]
    assert (
        len({p["id"] for p in panels}) == len({(p["gridPos"]["x"], p["gridPos"]["y"]) for p in panels}) == len(panels)
    )
    assert all(p["gridPos"]["x"] + p["gridPos"]["w"] <= 24 for p in panels)
    assert {p["datasource"]["uid"] for p in panels} == {"${datasource}"}
    variables = {v["name"] for v in dashboard["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(panels))) - {"__rate_interval"} <= variables


@pytest.mark.parametrize("file", ["prometheus", "metrics-api"])
def test_keda_accepts_its_configuration(file: str) -> None:
    """Known fields only, texts as metadata, never zero pods, and no reading of nothing as 0."""
    *services, scaled = documents(f"keda/{file}.yaml")
    spec = scaled["spec"]
    assert set(spec) <= KEDA_SPEC and spec["minReplicaCount"] >= 1
    (trigger,) = spec["triggers"]
    assert trigger["type"] == file and trigger["metricType"] == "AverageValue"
    metadata = trigger["metadata"]
    assert set(metadata) <= KEDA_METADATA[file] and all(isinstance(value, str) for value in metadata.values())
    assert metadata.get("ignoreNullValues", "false") == "false"
    if file == "metrics-api":
        (service,) = services
        kubernetes_validate.validate(service, "1.30", strict=True)
        (port,) = service["spec"]["ports"]
        assert f":{port['port']}/load" in metadata["url"] and port["targetPort"] == port["port"] == ADMIN


def test_the_path_into_load_leads_to_a_number() -> None:
    """GJSON's path through a rendered /load ends at a number; no key on it has a special character."""
    (trigger,) = documents("keda/metrics-api.yaml")[1]["spec"]["triggers"]
    path = trigger["metadata"]["valueLocation"]
    assert re.fullmatch(r"[a-z_]+(\.[a-z_]+)*", path)
    value = json.loads(json.dumps(load_json.render(SNAPSHOT)))
    for key in path.split("."):
        value = value[key]
    assert value == SNAPSHOT.load.utilization


def test_kubernetes_takes_the_autoscaler() -> None:
    """The HPA passes Kubernetes' own schema, and its metric is the one that the adapter serves."""
    (hpa,) = documents("hpa/hpa.yaml")
    kubernetes_validate.validate(hpa, "1.30", strict=True)
    (rule,) = documents("hpa/prometheus-adapter.yaml")[0]["rules"]
    assert hpa["spec"]["metrics"][0]["pods"]["metric"]["name"] == rule["name"]["as"] == "sidecar_mu_utilization_ratio"
    assert set(rule) == {"seriesQuery", "resources", "name", "metricsQuery"}


def test_the_hpa_to_zero_reads_metrics_that_outlive_the_pods() -> None:
    """External metrics only, each served by the adapter and found by a series of the queue before the pods."""
    (hpa,) = documents("hpa/scale-to-zero.yaml")
    kubernetes_validate.validate(hpa, "1.30", strict=True)
    assert hpa["spec"]["minReplicas"] == 0 and {m["type"] for m in hpa["spec"]["metrics"]} == {"External"}
    rules = {rule["name"]["as"]: rule for rule in documents("hpa/scale-to-zero-adapter.yaml")[0]["externalRules"]}
    assert [m["external"]["metric"]["name"] for m in hpa["spec"]["metrics"]] == list(rules)
    assert {rule["seriesQuery"].partition("{")[0] for rule in rules.values()} == {"llm_d_epp_flow_control_queue_size"}
    there = {family.name for family in text_string_to_metric_families(MetricsPages(full().registry).text())}
    assert set(re.findall(r"sidecar_\w+", rules["llm_replicas_busy"]["metricsQuery"])) <= there


def test_the_endpoint_picker_is_configured_correctly() -> None:
    """Plugins and parameters are known, references resolve, ports are the sidecar's, its metric has one sample."""
    (picker,) = documents("llm-d/endpoint-picker.yaml")
    plugins = {p.get("name", p["type"]): p for p in picker["plugins"]}
    for plugin in plugins.values():
        assert set(plugin.get("parameters", {})) <= PICKER[plugin["type"]]
    refs = re.findall(r"'pluginRef': '([\w-]+)'", str(picker))
    assert set(refs) <= set(plugins)
    assert plugins["sidecar-gpus"]["parameters"]["port"] == ADMIN
    (engine,) = plugins["core-metrics-extractor"]["parameters"]["engineConfigs"]
    custom = engine["customMetrics"]
    scored = {plugins[name]["parameters"]["attributeKey"] for name in ("mu-scorer", "ttft-scorer")}
    assert {metric["attributeKey"] for metric in custom} == scored
    families = {f.name: f for f in text_string_to_metric_families(MetricsPages(full().registry).text())}
    assert all(len(families[metric["metricSpec"]].samples) == 1 for metric in custom)
    assert {s.labels["gpu"] for s in families["DCGM_FI_DEV_GPU_UTIL"].samples} == {"0"}
    (pool,) = documents("llm-d/inference-pool.yaml")
    assert set(pool["spec"]) == {"selector", "targetPorts", "endpointPickerRef"}
    assert pool["spec"]["targetPorts"] == [{"number": RELAY}]


def test_the_gateway_limits_by_the_computed_cost() -> None:
    """The limit reads the key that the cost is written to; the expression itself is tests/tools/test_cel.py's."""
    route, policy = documents("envoy-ai-gateway/milli-mu.yaml")
    (cost,) = route["spec"]["llmRequestCosts"]
    assert set(cost) == {"metadataKey", "type", "cel"} and cost["type"] == "CEL" and cost["cel"].startswith("uint(")
    (rule,) = policy["spec"]["rateLimit"]["global"]["rules"]
    assert rule["cost"]["response"]["metadata"] == {"namespace": "io.envoy.ai_gateway", "key": cost["metadataKey"]}
    assert rule["clientSelectors"][0]["headers"][0]["name"] == Settings().tenant_header


@pytest.mark.parametrize("name", ["header", "stream"])
def test_envoy_takes_its_configuration(name: str, requires: Callable[[str], Path]) -> None:
    """A real Envoy validates the file; its ports are the sidecar's."""
    binary = requires("python:envoy").parent / "_bin" / "envoy"
    file = DEPLOY / "envoy" / f"{name}.yaml"
    done = subprocess.run([binary, "--mode", "validate", "-c", file], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (cluster,) = documents(f"envoy/{name}.yaml")[0]["static_resources"]["clusters"]
    assert f"'port_value': {RELAY}" in str(cluster["load_assignment"])
    assert (f"'port_value': {ORCA}" in str(cluster["load_balancing_policy"])) == (name == "stream")
