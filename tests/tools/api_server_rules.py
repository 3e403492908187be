"""What a Kubernetes API server refuses though the schema allows it: its own validation, as far as our objects meet it.

From the sources of Kubernetes, not from our code. Each rule names the function that it follows, in
- kubernetes/apimachinery eed236ce: pkg/util/validation/validation.go, pkg/api/validate/content/{dns,kube}.go,
  pkg/api/validation/objectmeta.go, pkg/apis/meta/v1/validation/validation.go, pkg/api/resource/quantity.go
- kubernetes/kubernetes 000f2605: pkg/apis/{core,apps,rbac,autoscaling}/validation/validation.go

What only server-side apply refuses (two items of a list with the same key) is here too. Where versions of Kubernetes
differ, the stricter one counts. Defaults are filled in where a rule asks for them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator
from decimal import Decimal
from typing import Any, Final

import yaml

Refusals = Iterator[str]

_LABEL: Final = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_WORD: Final = r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]"


# --- names ---


def dns_label(text: Any) -> bool:
    """IsDNS1123Label."""
    return isinstance(text, str) and len(text) <= 63 and bool(re.fullmatch(_LABEL, text))


def dns_subdomain(text: Any) -> bool:
    """IsDNS1123Subdomain."""
    return isinstance(text, str) and len(text) <= 253 and bool(re.fullmatch(rf"{_LABEL}(\.{_LABEL})*", text))


def dns_1035_label(text: Any) -> bool:
    """IsDNS1035Label: a Service's name before Kubernetes 1.34."""
    return dns_label(text) and text[0].isalpha()


def path_segment(text: Any) -> bool:
    """IsValidPathSegmentName: names of Roles and RoleBindings."""
    return isinstance(text, str) and text not in ("", ".", "..") and not set("/%") & set(text)


def qualified_name(text: Any) -> bool:
    """IsQualifiedName: a label's key."""
    if not isinstance(text, str):
        return False
    prefix, slash, name = text.rpartition("/")
    return (not slash or dns_subdomain(prefix)) and len(name) <= 63 and bool(re.fullmatch(_WORD, name))


def label_value(text: Any) -> bool:
    """IsValidLabelValue."""
    return isinstance(text, str) and len(text) <= 63 and bool(re.fullmatch(f"({_WORD})?", text))


def port_name(text: Any) -> bool:
    """IsValidPortName, an IANA_SVC_NAME."""
    return (
        isinstance(text, str)
        and len(text) <= 15
        and bool(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", text))
        and any(c.isalpha() for c in text)
    )


def port_number(port: Any) -> bool:
    """IsValidPortNum."""
    return type(port) is int and 1 <= port <= 65535


def port_reference(port: Any) -> bool:
    """ValidatePortNumOrName."""
    return port_number(port) or port_name(port)


def env_name(text: Any) -> bool:
    """IsEnvVarName, before it was relaxed."""
    return (
        isinstance(text, str)
        and bool(re.fullmatch(r"[-._a-zA-Z][-._a-zA-Z0-9]*", text))
        and text[:2] not in (".", "..")
    )


def quantity(value: Any) -> Decimal | None:
    """ParseQuantity: the number, or None for an invalid text."""
    number = re.fullmatch(r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))(.*)", str(value), re.ASCII)
    if type(value) not in (int, float, str) or not number:
        return None
    suffix = number[2]
    if re.fullmatch(r"[eE][+-]?[0-9]+", suffix):
        return Decimal(number[1]).scaleb(int(suffix[1:]))
    decimal = ["n", "u", "m", "", "k", "M", "G", "T", "P", "E"]
    if suffix in decimal:
        return Decimal(number[1]).scaleb(3 * (decimal.index(suffix) - 3))
    binary = ["Ki", "Mi", "Gi", "Ti", "Pi", "Ei"]
    return Decimal(number[1]) * 1024 ** (binary.index(suffix) + 1) if suffix in binary else None


# --- objects ---


def refusals(document: Any) -> list[str]:
    """Why an API server rejects an object, as "field: reason"; empty if it accepts it."""
    if not isinstance(document, dict) or not all(isinstance(document.get(k), str) for k in ("apiVersion", "kind")):
        return ["an object needs apiVersion and kind"]
    name, rules = KINDS.get(document["kind"], (dns_subdomain, custom))
    return [*metadata(document.get("metadata"), name), *rules(document)]


def metadata(meta: Any, name: Callable[[Any], bool], at: str = "metadata") -> Refusals:
    """ValidateObjectMeta."""
    if not isinstance(meta, dict):
        yield f"{at}: required"
        return
    if not name(meta.get("name")):
        yield f"{at}.name: {meta.get('name')!r}"
    if "namespace" in meta and not dns_label(meta["namespace"]):
        yield f"{at}.namespace: {meta['namespace']!r}"
    yield from labels(meta.get("labels"), f"{at}.labels")
    yield from annotations(meta.get("annotations"), f"{at}.annotations")


def labels(given: Any, at: str) -> Refusals:
    """ValidateLabels."""
    for key, value in (given or {}).items():
        if not qualified_name(key):
            yield f"{at}: key {key!r}"
        if not label_value(value):
            yield f"{at}: value {value!r} of {key}"


def annotations(given: Any, at: str) -> Refusals:
    """ValidateAnnotations: any text is a value, 256 KiB in all."""
    for key, value in (given or {}).items():
        if not qualified_name(key.lower() if isinstance(key, str) else key):
            yield f"{at}: key {key!r}"
        if not isinstance(value, str):
            yield f"{at}: value {value!r} of {key} is no text"
    if sum(len(str(text).encode()) for item in (given or {}).items() for text in item) > 256 * 1024:
        yield f"{at}: more than 256 KiB"


def custom(document: dict[str, Any]) -> Refusals:
    """For other kinds than Kubernetes' own, only label selectors are checked."""
    yield from selected(document.get("spec"), "spec")


def selected(value: Any, at: str) -> Refusals:
    """ValidateLabelSelector, of every matchLabels below."""
    if isinstance(value, list):
        for n, item in enumerate(value):
            yield from selected(item, f"{at}[{n}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from labels(item, f"{at}.{key}") if key == "matchLabels" else selected(item, f"{at}.{key}")


def deployment(document: dict[str, Any]) -> Refusals:
    """ValidateDeploymentSpec."""
    spec = document["spec"]
    wanted, template = spec["selector"].get("matchLabels", {}), spec["template"]
    yield from labels(wanted, "spec.selector.matchLabels")
    has = template["metadata"].get("labels") or {}
    if not wanted or not wanted.items() <= has.items():
        yield f"spec.selector: {wanted} does not match the template's labels {has}"
    if spec.get("replicas", 1) < 0:
        yield "spec.replicas: negative"
    if spec.get("progressDeadlineSeconds", 600) <= spec.get("minReadySeconds", 0):
        yield "spec.progressDeadlineSeconds: not more than minReadySeconds"
    yield from strategy(spec.get("strategy", {}))
    yield from labels(template["metadata"].get("labels"), "spec.template.metadata.labels")
    yield from annotations(template["metadata"].get("annotations"), "spec.template.metadata.annotations")
    yield from pod(template["spec"], "spec.template.spec")


def stateful_set(document: dict[str, Any]) -> Refusals:
    """ValidateStatefulSetSpec."""
    spec = document["spec"]
    wanted, template = spec["selector"].get("matchLabels", {}), spec["template"]
    has = template["metadata"].get("labels") or {}
    if not wanted or not wanted.items() <= has.items():
        yield f"spec.selector: {wanted} does not match the template's labels {has}"
    claims = [claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates", [])]
    yield from labels(has, "spec.template.metadata.labels")
    yield from annotations(template["metadata"].get("annotations"), "spec.template.metadata.annotations")
    yield from pod(template["spec"], "spec.template.spec", claims)


def bare_pod(document: dict[str, Any]) -> Refusals:
    """ValidatePod."""
    yield from pod(document["spec"], "spec", always=False)


def disruption_budget(document: dict[str, Any]) -> Refusals:
    """ValidatePodDisruptionBudgetSpec: one of two amounts."""
    spec = document["spec"]
    if len({"minAvailable", "maxUnavailable"} & set(spec)) != 1:
        yield "spec: minAvailable and maxUnavailable are mutually exclusive, and one is needed"
    yield from selected(spec, "spec")


def network_policy(document: dict[str, Any]) -> Refusals:
    """ValidateNetworkPolicySpec."""
    spec = document["spec"]
    yield from selected(spec, "spec")
    if set(spec.get("policyTypes", [])) - {"Ingress", "Egress"}:
        yield f"spec.policyTypes: {spec['policyTypes']}"
    for n, rule in enumerate(spec.get("ingress", [])):
        for port in rule.get("ports", []):
            if port.get("protocol", "TCP") not in ("TCP", "UDP", "SCTP") or not port_reference(port.get("port", 1)):
                yield f"spec.ingress[{n}].ports: {port}"
        for peer in rule.get("from", []):
            if not peer or ("ipBlock" in peer and len(peer) > 1):
                yield f"spec.ingress[{n}].from: {peer}"


def claim_template(document: dict[str, Any]) -> Refusals:
    """validateResourceClaimTemplateSpec, of pkg/apis/resource/validation."""
    for n, request in enumerate(document["spec"]["spec"]["devices"].get("requests", [])):
        at = f"spec.spec.devices.requests[{n}]"
        exactly = request.get("exactly")
        if not dns_label(request.get("name")) or len({"exactly", "firstAvailable"} & set(request)) != 1:
            yield f"{at}: {request}"
        if exactly is not None and not dns_subdomain(exactly.get("deviceClassName")):
            yield f"{at}.exactly.deviceClassName: {exactly.get('deviceClassName')!r}"
        if (
            exactly is not None
            and exactly.get("allocationMode", "ExactCount") == "ExactCount"
            and exactly.get("count", 1) < 1
        ):
            yield f"{at}.exactly.count: {exactly['count']}"


def strategy(given: dict[str, Any]) -> Refusals:
    """ValidateDeploymentStrategy."""
    rolling = given.get("rollingUpdate")
    if given.get("type", "RollingUpdate") == "Recreate" and rolling is not None:
        yield "spec.strategy.rollingUpdate: not with Recreate"
    amounts = {key: (rolling or {}).get(key, "25%") for key in ("maxSurge", "maxUnavailable")}
    for key, value in amounts.items():
        if not re.fullmatch(r"[0-9]+%" if isinstance(value, str) else "[0-9]+", str(value)):
            yield f"spec.strategy.rollingUpdate.{key}: {value!r}"
    if {str(value).removesuffix("%") for value in amounts.values()} == {"0"}:
        yield "spec.strategy.rollingUpdate: maxSurge and maxUnavailable are both 0"
    if str(amounts["maxUnavailable"]).endswith("%") and int(amounts["maxUnavailable"][:-1]) > 100:
        yield "spec.strategy.rollingUpdate.maxUnavailable: more than 100%"


def pod(spec: dict[str, Any], at: str, more_volumes: Iterable[str] = (), *, always: bool = True) -> Refusals:
    """ValidatePodTemplateSpec, and the validation of its pods."""
    volumes = spec.get("volumes", [])
    yield from scheduling(spec, at)
    yield from unique(volumes, f"{at}.volumes", "name")
    for n, volume in enumerate(volumes):
        yield from source(volume, f"{at}.volumes[{n}]", account=bool(spec.get("serviceAccountName")))
    if always and spec.get("restartPolicy", "Always") != "Always":
        yield f"{at}.restartPolicy: a Deployment's pods restart always"
    if spec.get("terminationGracePeriodSeconds", 30) < 0:
        yield f"{at}.terminationGracePeriodSeconds: negative"
    if "serviceAccountName" in spec and not dns_subdomain(spec["serviceAccountName"]):
        yield f"{at}.serviceAccountName: {spec['serviceAccountName']!r}"
    if spec.get("shareProcessNamespace") and spec.get("hostPID"):
        yield f"{at}.shareProcessNamespace: not with hostPID"
    yield from users(spec.get("securityContext", {}), f"{at}.securityContext")
    first, rest = spec.get("initContainers", []), spec.get("containers", [])
    if not rest:
        yield f"{at}.containers: required"
    yield from unique([*first, *rest], f"{at}.containers", "name")
    names = {*more_volumes, *(volume.get("name") for volume in volumes)}
    claims = {claim.get("name") for claim in spec.get("resourceClaims", [])}
    for n, c in enumerate([*first, *rest]):
        for claim in c.get("resources", {}).get("claims", []):
            if claim.get("name") not in claims:
                yield f"{at}: container {n} claims {claim.get('name')!r}, which is no resourceClaim of the pod"
    for kind, containers in (("initContainers", first), ("containers", rest)):
        for n, c in enumerate(containers):
            yield from container(c, f"{at}.{kind}[{n}]", names, init=kind == "initContainers")


def scheduling(spec: dict[str, Any], at: str) -> Refusals:
    """ValidateTolerations, validateImagePullSecrets, validatePodResourceClaims, ValidateNodeSelector's labels."""
    for n, toleration in enumerate(spec.get("tolerations", [])):
        operator, value = toleration.get("operator", "Equal"), toleration.get("value", "")
        if toleration.get("key") and not qualified_name(toleration["key"]):
            yield f"{at}.tolerations[{n}].key: {toleration['key']!r}"
        if operator == "Exists" and value:
            yield f"{at}.tolerations[{n}]: Exists with a value"
        if operator not in ("Exists", "Equal") or not label_value(value):
            yield f"{at}.tolerations[{n}]: {operator} {value!r}"
        if toleration.get("effect", "") not in ("", "NoSchedule", "PreferNoSchedule", "NoExecute"):
            yield f"{at}.tolerations[{n}].effect: {toleration['effect']!r}"
    for n, secret in enumerate(spec.get("imagePullSecrets", [])):
        if not secret.get("name"):
            yield f"{at}.imagePullSecrets[{n}]: required"
    yield from labels(spec.get("nodeSelector"), f"{at}.nodeSelector")
    yield from unique(spec.get("resourceClaims", []), f"{at}.resourceClaims", "name")
    for n, claim in enumerate(spec.get("resourceClaims", [])):
        if len({"resourceClaimName", "resourceClaimTemplateName"} & set(claim)) != 1 or not dns_label(
            claim.get("name")
        ):
            yield f"{at}.resourceClaims[{n}]: {claim}"


def restart_rules(c: dict[str, Any], at: str) -> Refusals:
    """validateContainerRestartPolicy."""
    rules = c.get("restartPolicyRules", [])
    if rules and "restartPolicy" not in c:
        yield f"{at}.restartPolicy: required with rules"
    if len(rules) > 20:
        yield f"{at}.restartPolicyRules: more than 20"
    for n, rule in enumerate(rules):
        codes = rule.get("exitCodes") or {}
        if rule.get("action") not in ("Restart", "RestartAllContainers"):
            yield f"{at}.restartPolicyRules[{n}].action: {rule.get('action')!r}"
        if codes.get("operator") not in ("In", "NotIn") or not 1 <= len(codes.get("values", [])) <= 255:
            yield f"{at}.restartPolicyRules[{n}].exitCodes: {codes}"


def source(volume: dict[str, Any], at: str, *, account: bool) -> Refusals:
    """ValidateVolumes: one source each, with its own rules."""
    if not dns_label(volume.get("name")):
        yield f"{at}.name: {volume.get('name')!r}"
    kinds = set(volume) - {"name"}
    if len(kinds) != 1:
        yield f"{at}: sources {sorted(kinds)}"
    size = (volume.get("emptyDir") or {}).get("sizeLimit", 0)
    if quantity(size) is None or quantity(size) < 0:
        yield f"{at}.emptyDir.sizeLimit: {size!r}"
    if (volume.get("emptyDir") or {}).get("medium", "") not in ("", "Memory"):
        yield f"{at}.emptyDir.medium"
    if "persistentVolumeClaim" in volume and not dns_subdomain(volume["persistentVolumeClaim"].get("claimName")):
        yield f"{at}.persistentVolumeClaim.claimName: {volume['persistentVolumeClaim'].get('claimName')!r}"
    paths = []
    for part in (volume.get("projected") or {}).get("sources", []):
        token, texts = part.get("serviceAccountToken"), part.get("configMap") or part.get("secret") or {}
        if token is not None:
            paths.append(token.get("path"))
            if not account:
                yield f"{at}.projected: a token without serviceAccountName"
            if not 600 <= token.get("expirationSeconds", 3600) <= 1 << 32:
                yield f"{at}.projected: a token for {token['expirationSeconds']} s"
        paths += [item.get("path") for item in texts.get("items", [])]
    if len(set(paths)) < len(paths) or any(not p or p.startswith("/") or ".." in p.split("/") for p in paths):
        yield f"{at}.projected: paths {paths}"


def container(c: dict[str, Any], at: str, volumes: set[Any], *, init: bool) -> Refusals:
    """validateContainerCommon, validateInitContainers, validateContainers."""
    if not dns_label(c.get("name")):
        yield f"{at}.name: {c.get('name')!r}"
    image = c.get("image")
    if not isinstance(image, str) or not image or image != image.strip():
        yield f"{at}.image: {image!r}"
    sidecar = init and c.get("restartPolicy") == "Always"
    if "restartPolicy" in c and not sidecar:
        yield f"{at}.restartPolicy: {c['restartPolicy']!r}"
    yield from restart_rules(c, at)
    for n, origin in enumerate(c.get("envFrom", [])):
        if len({"secretRef", "configMapRef"} & set(origin)) != 1:
            yield f"{at}.envFrom[{n}]: {origin}"
    yield from ports(c.get("ports", []), f"{at}.ports")
    yield from environment(c.get("env", []), f"{at}.env")
    yield from unique(c.get("volumeMounts", []), f"{at}.volumeMounts", "mountPath")
    for n, mount in enumerate(c.get("volumeMounts", [])):
        if mount.get("name") not in volumes:
            yield f"{at}.volumeMounts[{n}]: no volume {mount.get('name')!r}"
        if not mount.get("mountPath"):
            yield f"{at}.volumeMounts[{n}].mountPath: required"
    yield from resources(c.get("resources", {}), f"{at}.resources")
    yield from security(c.get("securityContext", {}), f"{at}.securityContext")
    watched = [key for key in (*PROBES, "lifecycle") if key in c]
    if init and not sidecar and watched:
        yield f"{at}: {watched} in an init container that is no sidecar"
    for key in PROBES:
        if key in c:
            yield from probe(c[key], f"{at}.{key}", key)
    for key, action in c.get("lifecycle", {}).items():
        yield from handler(action, f"{at}.lifecycle.{key}")


def ports(given: list[dict[str, Any]], at: str) -> Refusals:
    """validateContainerPorts."""
    yield from unique([p for p in given if "name" in p], at, "name")
    yield from unique(given, at, "containerPort", "protocol")
    for n, port in enumerate(given):
        if "name" in port and not port_name(port["name"]):
            yield f"{at}[{n}].name: {port['name']!r}"
        if not port_number(port.get("containerPort")):
            yield f"{at}[{n}].containerPort: {port.get('containerPort')!r}"


def environment(given: list[dict[str, Any]], at: str) -> Refusals:
    """ValidateEnv."""
    yield from unique(given, at, "name")
    for n, variable in enumerate(given):
        if not env_name(variable.get("name")):
            yield f"{at}[{n}].name: {variable.get('name')!r}"
        if not isinstance(variable.get("value", ""), str):
            yield f"{at}[{n}].value: {variable['value']!r} is no text"
        origin = variable.get("valueFrom")
        if origin is not None and (len(origin) != 1 or variable.get("value")):
            yield f"{at}[{n}]: {sorted(origin)} and value {variable.get('value')!r}"
        path = ((origin or {}).get("fieldRef") or {}).get("fieldPath", "metadata.name")
        key = re.fullmatch(r"metadata\.(?:labels|annotations)\['(.*)'\]", path)
        if path not in FIELDS and not (key and qualified_name(key[1].lower())):
            yield f"{at}[{n}].valueFrom.fieldRef: {path!r}"
        amount = (origin or {}).get("resourceFieldRef") or {"resource": "limits.cpu"}
        if not re.fullmatch(r"(limits|requests)\.(cpu|memory|ephemeral-storage)", amount.get("resource", "")):
            yield f"{at}[{n}].valueFrom.resourceFieldRef: {amount.get('resource')!r}"
        units = ("1", "1m") if "cpu" in amount.get("resource", "") else DIVISORS
        if str(amount.get("divisor", "1")) not in units:
            yield f"{at}[{n}].valueFrom.resourceFieldRef.divisor: {amount['divisor']!r}"


def probe(given: dict[str, Any], at: str, kind: str) -> Refusals:
    """validateProbe, and the rules of each kind of probe."""
    yield from handler({k: v for k, v in given.items() if k in HANDLERS}, at)
    for key in ("initialDelaySeconds", "timeoutSeconds", "periodSeconds", "successThreshold", "failureThreshold"):
        if given.get(key, 1) < 0:
            yield f"{at}.{key}: negative"
    if kind != "readinessProbe" and given.get("successThreshold", 1) != 1:
        yield f"{at}.successThreshold: must be 1"
    if given.get("terminationGracePeriodSeconds", 1) <= 0:
        yield f"{at}.terminationGracePeriodSeconds: must be more than 0"
    if kind == "readinessProbe" and "terminationGracePeriodSeconds" in given:
        yield f"{at}.terminationGracePeriodSeconds: not for readinessProbes"


def handler(given: dict[str, Any], at: str) -> Refusals:
    """validateHandler: one of them, complete."""
    if len(given) != 1 or not set(given) <= HANDLERS:
        yield f"{at}: handlers {sorted(given)}"
    if "exec" in given and not given["exec"].get("command"):
        yield f"{at}.exec.command: required"
    for key in {"httpGet", "tcpSocket", "grpc"} & set(given):
        if not (port_number if key == "grpc" else port_reference)(given[key].get("port")):
            yield f"{at}.{key}.port: {given[key].get('port')!r}"
    if "httpGet" in given:
        if given["httpGet"].get("scheme", "HTTP") not in ("HTTP", "HTTPS"):
            yield f"{at}.httpGet.scheme"
        for header in given["httpGet"].get("httpHeaders", []):
            if not re.fullmatch("[-A-Za-z0-9]+", header["name"]):
                yield f"{at}.httpGet.httpHeaders: {header['name']!r}"


def resources(given: dict[str, Any], at: str) -> Refusals:
    """ValidateContainerResourceRequirements."""
    limits, requests = given.get("limits", {}), given.get("requests", {})
    for key, amounts in (("limits", limits), ("requests", requests)):
        for name, value in amounts.items():
            amount = quantity(value)
            if not qualified_name(name) or ("/" not in name and name not in STANDARD):
                yield f"{at}.{key}: {name!r} is no resource of containers"
            if amount is None or amount < 0:
                yield f"{at}.{key}.{name}: {value!r}"
            elif name not in STANDARD and amount % 1:
                yield f"{at}.{key}.{name}: {value!r} is no whole number"
    for name, value in requests.items():
        wanted, limit = quantity(value), quantity(limits.get(name))
        if name not in STANDARD and wanted != limit:
            yield f"{at}.requests.{name}: {value!r}, its limit {limits.get(name)!r}; it cannot be overcommitted"
        elif wanted is not None and limit is not None and wanted > limit:
            yield f"{at}.requests.{name}: {value!r} is over its limit {limits[name]!r}"


def security(given: dict[str, Any], at: str) -> Refusals:
    """ValidateSecurityContext."""
    yield from users(given, at)
    added = given.get("capabilities", {}).get("add", [])
    if given.get("allowPrivilegeEscalation") is False and (
        given.get("privileged") or {"SYS_ADMIN", "CAP_SYS_ADMIN"} & {*added}
    ):
        yield f"{at}.allowPrivilegeEscalation: cannot be false with privileged or SYS_ADMIN"


def users(given: dict[str, Any], at: str) -> Refusals:
    """IsValidUserID, IsValidGroupID."""
    for key in ("runAsUser", "runAsGroup", "fsGroup"):
        if not 0 <= given.get(key, 0) < 1 << 31:
            yield f"{at}.{key}: {given[key]!r}"


def service(document: dict[str, Any]) -> Refusals:
    """ValidateService."""
    spec = document["spec"]
    yield from labels(spec.get("selector"), "spec.selector")
    given = spec.get("ports", [])
    if not given and spec.get("clusterIP") != "None":
        yield "spec.ports: required"
    yield from unique([p for p in given if "name" in p], "spec.ports", "name")
    yield from unique(given, "spec.ports", "port", "protocol")
    for n, port in enumerate(given):
        if (len(given) > 1 or "name" in port) and not dns_label(port.get("name")):
            yield f"spec.ports[{n}].name: {port.get('name')!r}"
        if not port_number(port.get("port")):
            yield f"spec.ports[{n}].port: {port.get('port')!r}"
        if not port_reference(port.get("targetPort", port.get("port"))):
            yield f"spec.ports[{n}].targetPort: {port['targetPort']!r}"


def role(document: dict[str, Any]) -> Refusals:
    """validatePolicyRule."""
    for n, rule in enumerate(document.get("rules") or []):
        missing = [key for key in ("verbs", "apiGroups", "resources") if not rule.get(key)]
        if missing:
            yield f"rules[{n}]: no {missing}"
        if rule.get("resourceNames") and len(rule.get("resources", [])) > 1:
            yield f"rules[{n}].resourceNames: not with several resources"


def role_binding(document: dict[str, Any]) -> Refusals:
    """ValidateRoleBinding."""
    ref = document["roleRef"]
    if ref.get("apiGroup") != "rbac.authorization.k8s.io" or ref.get("kind") not in ("Role", "ClusterRole"):
        yield f"roleRef: {ref}"
    if not path_segment(ref.get("name")):
        yield f"roleRef.name: {ref.get('name')!r}"
    for n, subject in enumerate(document.get("subjects", [])):
        if subject.get("kind") == "ServiceAccount" and (
            subject.get("apiGroup") or not dns_subdomain(subject.get("name"))
        ):
            yield f"subjects[{n}]: {subject}"


def autoscaler(document: dict[str, Any]) -> Refusals:
    """ValidateHorizontalPodAutoscaler."""
    spec = document["spec"]
    # To zero only by a metric that outlives the pods (HPAScaleToZero, on since Kubernetes 1.37).
    outlives = any(metric["type"] in ("External", "Object") for metric in spec.get("metrics", []))
    if not (0 if outlives else 1) <= spec.get("minReplicas", 1) <= spec["maxReplicas"]:
        yield f"spec: minReplicas {spec.get('minReplicas')}, maxReplicas {spec['maxReplicas']}"
    if not path_segment(spec["scaleTargetRef"].get("kind")) or not path_segment(spec["scaleTargetRef"].get("name")):
        yield f"spec.scaleTargetRef: {spec['scaleTargetRef']}"
    for n, metric in enumerate(spec.get("metrics", [])):
        target = next(v["target"] for k, v in metric.items() if k != "type")
        amount = quantity(target.get("averageValue", target.get("value", target.get("averageUtilization"))))
        if amount is None or amount <= 0:
            yield f"spec.metrics[{n}]: target {target}"
    for way, rules in (spec.get("behavior") or {}).items():
        if not 0 <= rules.get("stabilizationWindowSeconds", 0) <= 3600:
            yield f"spec.behavior.{way}.stabilizationWindowSeconds"
        for policy in rules.get("policies", []):
            if policy["value"] <= 0 or not 0 < policy["periodSeconds"] <= 1800:
                yield f"spec.behavior.{way}.policies: {policy}"


def unique(items: Iterable[dict[str, Any]], at: str, *keys: str) -> Refusals:
    """No two items of a list have the same key; `protocol` defaults to TCP."""
    seen: set[Hashable] = set()
    for item in items:
        key = tuple(item.get(k, "TCP" if k == "protocol" else None) for k in keys)
        if key in seen:
            yield f"{at}: {key} twice"
        seen.add(key)


PROBES: Final = ("startupProbe", "livenessProbe", "readinessProbe")
HANDLERS: Final = {"exec", "httpGet", "tcpSocket", "grpc", "sleep"}
STANDARD: Final = {"cpu", "memory", "ephemeral-storage"}
DIVISORS: Final = ("1", *(f"1{unit}{end}" for unit in "KMGTPE" for end in ("", "i") if unit + end != "K"), "1k")
FIELDS: Final = {
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "spec.nodeName",
    "spec.serviceAccountName",
    "status.hostIP",
    "status.hostIPs",
    "status.podIP",
    "status.podIPs",
}
KINDS: Final[dict[str, tuple[Callable[[Any], bool], Callable[[dict[str, Any]], Refusals]]]] = {
    "Deployment": (dns_subdomain, deployment),
    "Service": (dns_1035_label, service),
    "StatefulSet": (dns_subdomain, stateful_set),
    "Pod": (dns_subdomain, bare_pod),
    "PodDisruptionBudget": (dns_subdomain, disruption_budget),
    "NetworkPolicy": (dns_subdomain, network_policy),
    "ResourceClaimTemplate": (dns_subdomain, claim_template),
    "ServiceAccount": (dns_subdomain, custom),
    "Role": (path_segment, role),
    "RoleBinding": (path_segment, role_binding),
    "HorizontalPodAutoscaler": (dns_subdomain, autoscaler),
}


# --- text ---


class _Strict(yaml.SafeLoader):
    """YAML as decoded by kubectl and the API server: a duplicate key is an error, a bare y or n is a bool."""

    bool_values = yaml.SafeLoader.bool_values | {"y": True, "n": False}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
        if len(keys) != len(set(keys)):
            raise yaml.constructor.ConstructorError(None, None, f"a key stands twice in {keys}", node.start_mark)
        return super().construct_mapping(node, deep)


_Strict.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("[yYnN]$"), list("yYnN"))


def objects(text: str) -> list[Any]:
    """The objects of a text, without empty documents."""
    return [document for document in yaml.load_all(text, _Strict) if document is not None]
