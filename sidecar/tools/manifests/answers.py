"""Who answers what varies in the YAML: a command's settings, or expressions of Helm that ask a chart's values.

So the manifests, the chart and the patches come from one renderer.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Final, Protocol

from sidecar.engines.registry import PLUGIN_KINDS
from sidecar.tools.manifests.settings import ManifestSettings, quote, start

# name -> (whether it holds for the settings, the same in a chart)
CONDITIONS: Final[dict[str, tuple[Callable[[ManifestSettings], bool], str]]] = {
    "claim": (lambda s: bool(s.claim), ".Values.claim"),
    "gpus": (lambda s: s.gpus > 0, "gt (int .Values.gpus) 0"),
    "plugin_gpus": (
        lambda s: s.gpus > 0 and s.gpu_access == "none",
        'and (gt (int .Values.gpus) 0) (eq .Values.gpuAccess "none")',
    ),
    "dra": (
        lambda s: s.gpus > 0 and s.gpu_access == "dra",
        'and (gt (int .Values.gpus) 0) (eq .Values.gpuAccess "dra")',
    ),
    "guaranteed": (lambda s: s.qos == "guaranteed", 'eq .Values.qos "guaranteed"'),
    "surge": (lambda s: s.max_surge > 0, "gt (int .Values.maxSurge) 0"),
    "dumps": (lambda s: s.stack_dumps == "on", 'eq .Values.stackDumps "on"'),
    "plugin": (
        lambda s: s.engine_kind in PLUGIN_KINDS,
        'has .Values.engineKind (list "vllm" "sglang")',
    ),
    "reads_images": (
        lambda s: bool(s.claim) and s.engine_kind == "vllm",
        'and .Values.claim (eq .Values.engineKind "vllm")',
    ),
    "shm": (lambda s: s.images == "shm", 'eq .Values.images "shm"'),
    "safe": (lambda s: s.probe == "safe", 'eq .Values.probe "safe"'),
    "http": (lambda s: s.probe == "http", 'eq .Values.probe "http"'),
    "rules": (lambda s: s.probe == "restart-rules", 'eq .Values.probe "restart-rules"'),
    "annotations": (lambda s: s.monitor == "annotations", 'eq .Values.monitor "annotations"'),
    "podmonitor": (lambda s: s.monitor == "podmonitor", 'eq .Values.monitor "podmonitor"'),
    "servicemonitor": (lambda s: s.monitor == "servicemonitor", 'eq .Values.monitor "servicemonitor"'),
    "policy": (lambda s: s.network_policy == "on", 'eq .Values.networkPolicy "on"'),
    "env_from": (lambda s: bool(s.env_secret), ".Values.envSecret"),
    "key": (lambda s: bool(s.key_secret), ".Values.keySecret"),
}
# Settings of several items: field -> whether it is a map. A chart takes Kubernetes' own form of them.
LISTS: Final = {
    "env": False,
    "tolerations": False,
    "pull_secrets": False,
    "node_selector": True,
    "monitor_labels": True,
}


class Answers(Protocol):
    """Texts in YAML for the names of settings."""

    def value(self, name: str) -> str:
        """A setting: quoted if it is a text."""
        ...

    def bare(self, name: str) -> str:
        """A setting within a text of the YAML's own, unquoted; never one that users write freely."""
        ...

    def sum(self, name: str, more: int, divisor: int = 1) -> str:
        """A number and `more`, divided."""
        ...

    def when(self, condition: str, yes: str, no: str = "") -> str:
        """One of two blocks of lines."""
        ...

    def pick(self, condition: str, yes: str, no: str = "") -> str:
        """One of two texts within a line."""
        ...

    def items(self, name: str, yes: str = "{}\n") -> str:
        """A list's or a map's YAML in one line, in the place of `{}` in `yes`; empty if it has no items."""
        ...

    def each(self, name: str) -> str:
        """The items of a list, a line each."""
        ...

    def engine(self) -> tuple[str, str, str]:
        """Image, command and arguments of the engine."""
        ...


class SettingsAnswers:
    """Of a command's settings."""

    def __init__(self, settings: ManifestSettings) -> None:
        self._settings = settings

    def value(self, name: str) -> str:
        value = getattr(self._settings, name)
        return quote(value) if isinstance(value, str) else str(value)

    def bare(self, name: str) -> str:
        return str(getattr(self._settings, name))

    def sum(self, name: str, more: int, divisor: int = 1) -> str:
        return str((getattr(self._settings, name) + more) // divisor)

    def when(self, condition: str, yes: str, no: str = "") -> str:
        return yes if CONDITIONS[condition][0](self._settings) else no

    pick = when

    def items(self, name: str, yes: str = "{}\n") -> str:
        found = self.list(name)
        return yes.replace("{}", to_yaml(found)) if found else ""

    def each(self, name: str) -> str:
        return "".join(f"- {to_yaml(item)}\n" for item in self.list(name))

    def engine(self) -> tuple[str, str, str]:
        return start(self._settings)

    def list(self, name: str) -> Any:
        """The items as Kubernetes takes them."""
        words = shlex.split(getattr(self._settings, name))
        if name == "tolerations":
            return [_toleration(word) for word in words]
        if name == "pull_secrets":
            return [{"name": word} for word in words]
        pairs = [word.partition("=")[::2] for word in words]
        return dict(pairs) if LISTS[name] else [{"name": key, "value": value} for key, value in pairs]


def _toleration(word: str) -> dict[str, str]:
    """KEY:EFFECT or KEY=VALUE:EFFECT, as `kubectl taint` writes taints."""
    taint, _, effect = word.rpartition(":")
    key, equal, value = taint.partition("=")
    rule = {"operator": "Equal", "value": value} if equal else {"operator": "Exists"}
    return {"key": key, **rule, "effect": effect}


class HelmAnswers:
    """Of a chart's values: expressions of Helm's templates."""

    def value(self, name: str) -> str:
        if name == "name":
            return "{{ .Values.name | default .Release.Name | quote }}"
        default = next(field.default for field in fields(ManifestSettings) if field.name == name)
        return f"{{{{ .Values.{camel(name)} | quote }}}}" if isinstance(default, str) else self.bare(name)

    def bare(self, name: str) -> str:
        return f"{{{{ .Values.{camel(name)} }}}}"

    def sum(self, name: str, more: int, divisor: int = 1) -> str:
        total = f"add .Values.{camel(name)} {more}"
        return f"{{{{ div ({total}) {divisor} }}}}" if divisor > 1 else f"{{{{ {total} }}}}"

    def when(self, condition: str, yes: str, no: str = "") -> str:
        otherwise = f"{{{{- else }}}}\n{no}" if no else ""
        return f"{{{{- if {CONDITIONS[condition][1]} }}}}\n{yes}{otherwise}{{{{- end }}}}\n"

    def pick(self, condition: str, yes: str, no: str = "") -> str:
        otherwise = f"{{{{ else }}}}{no}" if no else ""
        return f"{{{{ if {CONDITIONS[condition][1]} }}}}{yes}{otherwise}{{{{ end }}}}"

    def items(self, name: str, yes: str = "{}\n") -> str:
        return f"{{{{- with .Values.{camel(name)} }}}}\n{yes.replace('{}', '{{ toJson . }}')}{{{{- end }}}}\n"

    def each(self, name: str) -> str:
        return f"{{{{- range .Values.{camel(name)} }}}}\n- {{{{ toJson . }}}}\n{{{{- end }}}}\n"

    def engine(self) -> tuple[str, str, str]:
        args = "{{- range .Values.args }}\n- {{ tpl . $ | quote }}\n{{- end }}\n"
        return self.value("image"), "{{ toJson .Values.command }}", args


def camel(name: str) -> str:
    """A setting's name among a chart's values."""
    first, *rest = name.split("_")
    return first + "".join(word.title() for word in rest)


def to_yaml(value: Any) -> str:
    """A value in one line: JSON is YAML, quoted as the texts of users are."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{quote(key)}: {to_yaml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(to_yaml, value)) + "]"
    return quote(value) if isinstance(value, str) else json.dumps(value)
