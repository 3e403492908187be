"""The Helm chart and the Kustomize component, rendered by real helm and kubectl (make test-charts)."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import fields
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from sidecar import __main__
from sidecar.errors import UsageError
from sidecar.tools.manifests import chart, component, llm_d, render
from sidecar.tools.manifests.answers import camel
from sidecar.tools.manifests.settings import ManifestSettings

from . import api_server_rules, kubernetes_tools

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
MODELS = {"claim": "models", "model": "/models/qwen"}


def run(tool: str, *arguments: str) -> list[dict[str, Any]]:
    """The objects that a tool prints."""
    binary = kubernetes_tools.tool(tool)
    assert binary is not None, "make test-charts installs it"
    done = subprocess.run([binary, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return api_server_rules.objects(done.stdout)


def by_kind(objects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {document["kind"]: document for document in objects}


def helm_value(value: str | int) -> str:
    return str(value).replace(",", r"\,")


CHOICES: list[dict[str, Any]] = [
    {},
    {"probe": "http", "monitor": "podmonitor", "qos": "burstable", "network_policy": "off", "gpus": 0},
    {"probe": "restart-rules", "monitor": "servicemonitor", "gpu_access": "dra", "gpus": 4, "startup_seconds": 61},
    {**MODELS, "images": "shm", "stack_dumps": "on", "max_surge": 2, "replicas": 3, "monitor": "none"},
    {"key_secret": "key", "env_secret": "hf", "name": "true", "sidecar_cpus": 3, "sidecar_memory": "5Gi"},
]


@pytest.mark.charts
@pytest.mark.parametrize("chosen", CHOICES, ids=lambda c: ",".join(c) or "defaults")
@pytest.mark.parametrize("way", ["its own values", "values that are set"])
def test_helm_renders_what_the_command_prints(chosen: dict[str, Any], way: str, tmp_path: Path) -> None:
    """By the values of the chart, and by values given to a chart with other ones."""
    settings = ManifestSettings(**chosen)
    arguments = ["template", "llm", str(tmp_path)]
    if way == "its own values":
        render.write(tmp_path, chart.files(settings))
    else:
        # The number of GPUs is in the engine's arguments, too.
        render.write(tmp_path, chart.files(ManifestSettings(gpus=settings.gpus)))
        for name, value in chosen.items():
            arguments += ["--set-string" if isinstance(value, str) else "--set", f"{camel(name)}={helm_value(value)}"]
    printed = api_server_rules.objects(render.render(settings))
    assert by_kind(run("helm", *arguments)) == by_kind(printed)


@pytest.mark.charts
def test_helm_takes_kubernetes_own_forms_of_lists(tmp_path: Path) -> None:
    """Tolerations, variables, selectors and pull secrets as in a pod; helm's linter finds nothing."""
    values = {
        "env": [
            {"name": "A", "value": "x: {{ y }}"},
            {"name": "B", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
        ],
        "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "nodeSelector": {"gpu": "h100"},
        "pullSecrets": [{"name": "reg"}],
        "monitor": "podmonitor",
        "monitorLabels": {"release": "kps"},
    }
    render.write(tmp_path, chart.files(ManifestSettings()))
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    made = by_kind(run("helm", "template", "llm", str(tmp_path), "-f", str(tmp_path / "mine.yaml")))
    assert [why for document in made.values() for why in api_server_rules.refusals(document)] == []
    pod = made["Deployment"]["spec"]["template"]["spec"]
    names = [variable["name"] for variable in pod["containers"][0]["env"]]
    after = names.index("PYTHONPATH") + 1  # the plug-in's: one of the user's counts, as it comes after
    assert pod["containers"][0]["env"][after : after + 2] == values["env"]
    assert (pod["tolerations"], pod["nodeSelector"]) == (values["tolerations"], values["nodeSelector"])
    assert pod["imagePullSecrets"] == values["pullSecrets"]
    assert made["PodMonitor"]["metadata"]["labels"] == {"release": "kps"}
    binary = kubernetes_tools.tool("helm")
    assert binary is not None
    linted = subprocess.run([binary, "lint", "--strict", str(tmp_path)], capture_output=True, text=True, check=False)
    assert linted.returncode == 0, linted.stdout


@pytest.mark.charts
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("probe=sfae", "/probe"),
        ("gpu=2", "additional properties 'gpu'"),
        ("gpus=two", "/gpus"),
        ("claim=models", "go together"),
        ("images=shm", "shm needs the model's directory"),
    ],
)
def test_helm_refuses_what_the_command_refuses(given: str, words: str, tmp_path: Path) -> None:
    """A word that is none, an unknown name, values that contradict each other."""
    render.write(tmp_path, chart.files(ManifestSettings()))
    binary = kubernetes_tools.tool("helm")
    assert binary is not None
    command = [binary, "template", "llm", str(tmp_path), "--set", given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0 and done.stdout == "" and words in done.stderr


WORKLOAD = """\
apiVersion: apps/v1
kind: {kind}
metadata: {{name: q, labels: {{inference-sidecar/inject: "true"}}}}
spec:
  serviceName: q
  selector: {{matchLabels: {{a: b}}}}
  template:
    metadata: {{labels: {{a: b}}}}
    spec:
      initContainers: [{{name: download, image: d}}]
      containers:
        - name: vllm
          image: v
          args: [--model=x, --port=8000]
          ports: [{{containerPort: 8000, name: http}}]
          livenessProbe: {{httpGet: {{path: /health, port: http}}}}
          readinessProbe: {{httpGet: {{path: /health, port: http}}}}
          volumeMounts: [{{name: models, mountPath: /models}}]
      volumes: [{{name: models, emptyDir: {{}}}}]
"""


@pytest.mark.charts
@pytest.mark.parametrize("kind", ["Deployment", "StatefulSet"])
@pytest.mark.parametrize("probe", ["safe", "http", "restart-rules"])
def test_kustomize_adds_the_sidecar(kind: str, probe: str, tmp_path: Path) -> None:
    """To labelled workloads only: probes replaced, the engine moved, everything else kept; Kubernetes takes it."""
    text = WORKLOAD.format(kind=kind).replace("  serviceName: q\n" if kind == "Deployment" else "", "")
    other = text.replace("name: q,", "name: other,").replace("inference-sidecar/inject", "mine")
    render.write(tmp_path / "component", component.files(ManifestSettings(container="vllm", probe=probe)))
    files = {"kustomization.yaml": "resources: [q.yaml, other.yaml]\ncomponents: [component]\n"}
    render.write(tmp_path, files | {"q.yaml": text, "other.yaml": other})
    made = {d["metadata"]["name"]: d for d in run("kubectl", "kustomize", str(tmp_path))}
    assert made["other"] == yaml.safe_load(other)
    kubernetes_validate.validate(made["q"], "1.37", strict=True)
    assert api_server_rules.refusals(made["q"]) == []
    pod = made["q"]["spec"]["template"]["spec"]
    (engine,) = pod["containers"]
    assert engine["args"] == ["--model=x", "--port=8000", "--host=127.0.0.1", "--port=18000"]
    assert "readinessProbe" not in engine and engine["startupProbe"]["httpGet"]["path"] == "/startupz"
    handlers = {"safe": {"exec"}, "http": {"httpGet"}, "restart-rules": set()}
    assert {"exec", "httpGet"} & set(engine.get("livenessProbe", {})) == handlers[probe]
    assert {v["name"] for v in pod["volumes"]} == {"models", "sidecar-state", "sidecar-tmp", "engine-shm"}
    started = {c["name"] for c in pod["initContainers"]}
    assert started == {"download", "sidecar"} | ({"restarter"} if probe == "restart-rules" else set())
    env = {e["name"]: e.get("value") for c in pod["initContainers"] if c["name"] == "sidecar" for e in c["env"]}
    assert (env["SIDECAR_LISTEN"], env["SIDECAR_ENGINE"]) == ("0.0.0.0:8000", "http://127.0.0.1:18000")


# --- without the tools ---


@pytest.mark.parametrize("kind", ["vllm", "sglang", "llamacpp"])
def test_what_is_added_to_a_pod_is_kubernetes_own_form(kind: str) -> None:
    """The containers and volumes of the component's patch and of llm-d's values pass the schema, strictly."""
    settings = ManifestSettings(engine_kind=kind, image="engine:1")
    patch = yaml.safe_load(component.files(settings)["sidecar.yaml"])["spec"]["template"]["spec"]
    values = (
        [yaml.safe_load(llm_d.render_values(settings))["decode"]] if kind == "vllm" else []
    )  # llm-d's only engine here
    for added in (patch, *values):
        spec = {"containers": [{"name": "e", "image": "e"}], **{k: added[k] for k in ("initContainers", "volumes")}}
        kubernetes_validate.validate(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": spec}, "1.37", strict=True
        )


def test_every_value_of_the_chart_is_used_and_there() -> None:
    """Templates ask for values that are in values.yaml, and for each of them."""
    files = chart.files(ManifestSettings())
    values = yaml.safe_load(files["values.yaml"])
    asked = set(re.findall(r"\.Values\.(\w+)", "".join(files.values())))
    allowed = json.loads(files["values.schema.json"])
    jsonschema.validate(values, allowed)
    assert set(allowed["properties"]) == asked | {"global"}
    assert asked == set(values) and {"command", "args"} < asked
    left = {"format", "out", "container", "port", "namespace", "engine_args"}
    assert {camel(f.name) for f in fields(ManifestSettings) if f.name not in left} == asked - {"command", "args"}


@pytest.mark.parametrize(("folder", "made"), [("helm", chart.files), ("kustomize", component.files)])
def test_what_lies_in_deploy_is_what_the_command_writes(folder: str, made: Any, tmp_path: Path) -> None:
    """deploy/helm and deploy/kustomize hold the command's own output; `make docs` writes it."""
    argv = ["manifests", "--format", folder, "--out", str(tmp_path)]
    assert __main__.run(argv) == 0
    for root in (tmp_path, DEPLOY / folder):
        found = {str(p.relative_to(root)): p.read_text() for p in root.rglob("*") if p.is_file()}
        assert found == made(ManifestSettings())


def test_files_need_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A chart without --out, or in a place that cannot be written, is refused in one line."""
    (tmp_path / "file").touch()
    for argv in (["--format", "helm"], ["--format", "kustomize", "--out", str(tmp_path / "file")]):
        assert __main__.run(["manifests", *argv]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and "--out" in err
    with pytest.raises(UsageError, match="--image"):
        chart.files(ManifestSettings(engine_kind="sglang"))
