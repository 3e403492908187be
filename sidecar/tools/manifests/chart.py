"""A Helm chart: the manifests with expressions in the place of settings, and the settings as its values."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any, Final

from sidecar import __version__
from sidecar.tools.manifests.answers import LISTS, HelmAnswers, SettingsAnswers, camel, to_yaml
from sidecar.tools.manifests.parts import fill
from sidecar.tools.manifests.render import documents
from sidecar.tools.manifests.settings import KINDS, ManifestSettings, arguments_of, start

# Settings that are none of the chart's: Helm has a namespace of its own, and `args` holds the engine's arguments.
NOT_VALUES: Final = {"format", "out", "container", "port", "namespace", "engine_args"}
# What `start` refuses for settings.
CHECK: Final = """\
{{- if ne (not .Values.claim) (not (hasPrefix "/models/" .Values.model)) }}
{{- fail "claim, and a model below /models where that claim is mounted, go together" }}
{{- end }}
{{- if and (eq .Values.images "shm") (not .Values.claim) }}
{{- fail "images: shm needs the model's directory: claim, and a model below /models" }}
{{- end }}
"""
# In Kubernetes' own form.
FORMS: Final = {
    "env": "Variables of the engine, as in a container",
    "tolerations": "As in a pod",
    "pull_secrets": "imagePullSecrets, as in a pod",
    "node_selector": "As in a pod",
    "monitor_labels": "Labels of the monitor, as the Prometheus of an operator selects them",
}


def files(settings: ManifestSettings) -> dict[str, str]:
    """The chart's files by name. Raises UsageError if two settings contradict each other."""
    made = documents(HelmAnswers())
    made["deployment"] = CHECK + made["deployment"]
    return {
        "Chart.yaml": fill("chart", version=__version__),
        "values.yaml": values(settings),
        "values.schema.json": json.dumps(schema(), indent=1) + "\n",
        **{f"templates/{name}.yaml": text for name, text in made.items()},
    }


def schema() -> dict[str, Any]:
    """values.schema.json, by which helm refuses values that no setting would take: words, types, unknown names."""
    properties: dict[str, Any] = {"command": {"type": "array"}, "args": {"type": "array"}, "global": {"type": "object"}}
    for field in fields(ManifestSettings):
        if field.name in NOT_VALUES:
            continue
        choices = field.metadata["parser"].metavar
        kind = {"type": "integer", "minimum": 0} if isinstance(field.default, int) else {"type": "string"}
        if field.name in LISTS:
            kind = {"type": "object" if LISTS[field.name] else "array"}
        elif "|" in choices:
            kind["enum"] = choices.split("|")
        properties[camel(field.name)] = kind
    draft = "http://json-schema.org/draft-07/schema#"
    return {"$schema": draft, "type": "object", "properties": properties, "additionalProperties": False}


def values(settings: ManifestSettings) -> str:
    """values.yaml: each setting with its help."""
    _, command, _ = start(settings)
    image = settings.image or KINDS[settings.engine_kind].image
    args = arguments_of(settings, "{{ .Values.model }}")
    lines = ["# Values of the chart; `sidecar manifests --help` has the same settings.\n"]
    for field in fields(settings):
        if field.name in NOT_VALUES:
            continue
        value: Any = getattr(settings, field.name)
        if field.name == "image":
            value = image
        elif field.name == "name" and value == field.default:
            value = ""
        elif field.name in LISTS:
            value = SettingsAnswers(settings).list(field.name)
        text = FORMS.get(field.name, field.metadata["help"])
        choices = field.metadata["parser"].metavar
        shown = f" ({choices.replace('|', ', ')})" if "|" in choices else ""
        lines.append(f"# {text}{shown}\n{camel(field.name)}: {to_yaml(value)}\n")
        if field.name == "image":
            lines.append(f"# How the engine is started; an argument may use values\ncommand: {command}\nargs:\n")
            lines += [f"  - {json.dumps(arg)}\n" for arg in args]
    return "".join(lines)
