"""`sidecar inject`: the sidecar in workloads that exist, and nothing else changed."""

from __future__ import annotations

import copy
import io
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from sidecar import __main__
from sidecar.errors import UsageError
from sidecar.launch import engine_plugin
from sidecar.settings import Settings, load
from sidecar.tools.manifests.inject import InjectSettings, inject
from sidecar.tools.manifests.render import DRAIN_S, ENDPOINT_REMOVAL_S

from . import api_server_rules

POD = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}}
VERSIONS = ("1.33", "1.34", "1.35", "1.36", "1.37")

DEPLOYMENT = """\
# Qwen, by the platform team
apiVersion: apps/v1
kind: Deployment
metadata:
  name: qwen  # the name
  labels: {team: a}
spec:
  replicas: 2
  selector:
    matchLabels: {app: qwen}
  template:
    metadata:
      labels: {app: qwen}
    spec:
      nodeSelector: {gpu: "true"}
      # where the GPUs are
      tolerations:
        - {key: nvidia.com/gpu, operator: Exists}
      imagePullSecrets:
        - name: own
      containers:
        # the engine
        - name: vllm
          image: vllm/vllm-openai:v0.32.0
          args: ["--model", 'Qwen/Qwen3', "--port", "8000", "--unknown-flag"]
          env:
            - name: HF_TOKEN
              valueFrom: {secretKeyRef: {name: hf, key: token}}
            - name: VLLM_API_KEY
              valueFrom: {secretKeyRef: {name: keys, key: vllm}}
          ports:
            - containerPort: 8000
              name: http
          readinessProbe:
            httpGet: {path: /health, port: http}
          resources:
            limits:
              nvidia.com/gpu: 1
        - name: logs
          image: fluent
---
apiVersion: v1
kind: Service
metadata: {name: qwen}   # untouched, with its odd indentation
spec:
    selector: {app: qwen}
    ports:
    -   port: 80
        targetPort: http
"""


def done(text: str, **chosen: Any) -> str:
    return inject(text, InjectSettings(**chosen))[0]


def only(text: str, kind: str = "Deployment") -> dict[str, Any]:
    (found,) = [d for d in yaml.safe_load_all(text) if d and d["kind"] == kind]
    result: dict[str, Any] = found
    return result


def test_the_sidecar_takes_over_the_port_and_the_rest_stays() -> None:
    """Engine on loopback, relay on its port, the key by the same reference; Secrets, nodes, others as before."""
    before, after = only(DEPLOYMENT), only(text := done(DEPLOYMENT))
    spec, was = after["spec"]["template"]["spec"], before["spec"]["template"]["spec"]
    (sidecar,) = spec["initContainers"]
    engine, logs = spec["containers"]
    assert engine["args"] == [*["--model", "Qwen/Qwen3", "--port", "18000", "--unknown-flag"], "--host=127.0.0.1"]
    env = {e["name"]: e.get("value", e.get("valueFrom")) for e in sidecar["env"]}
    assert env["SIDECAR_LISTEN"] == "0.0.0.0:8000" and env["SIDECAR_ENGINE"] == "http://127.0.0.1:18000"
    assert env["SIDECAR_ENGINE_KEY"] == {"secretKeyRef": {"name": "keys", "key": "vllm"}}
    load(Settings, {}, {k: v for k, v in env.items() if k.startswith("SIDECAR_") and isinstance(v, str)})
    assert "readinessProbe" not in engine and engine["startupProbe"]["httpGet"]["path"] == "/startupz"
    for key in ("nodeSelector", "tolerations", "imagePullSecrets"):
        assert spec[key] == was[key]
    for key in ("ports", "resources", "image"):
        assert engine[key] == was["containers"][0][key]
    path = {"name": "PYTHONPATH", "value": f"/run/sidecar/{engine_plugin.FOLDER}"}
    assert engine["env"] == [*was["containers"][0]["env"], path]
    assert logs == was["containers"][1] and spec["terminationGracePeriodSeconds"] == 170
    assert {**after, "spec": None} == {**before, "spec": None}
    assert text[text.index("---\n") :] == DEPLOYMENT[DEPLOYMENT.index("---\n") :], "not a byte of the Service changes"


def test_comments_and_quotes_stay() -> None:
    """All comments, quotes and the order of what was there; our comments stand above what they explain."""
    text = done(DEPLOYMENT)
    kept = iter(text.splitlines())
    lines = [line for line in DEPLOYMENT.splitlines() if "readinessProbe" not in line and "/health" not in line]
    for line in lines:
        wanted = line.replace('"8000"', '"18000"').replace('"--unknown-flag"]', '"--unknown-flag", --host=127.0.0.1]')
        assert any(wanted == found for found in kept), f"missing, or out of order: {wanted}"
    rows = text[: text.index("---\n")].splitlines()
    for line, below in pairwise(rows):
        if line.lstrip().startswith("#"):
            assert len(line) - len(line.lstrip()) == len(below) - len(below.lstrip()), line


@pytest.mark.parametrize("kind", ["Deployment", "StatefulSet", "Pod"])
@pytest.mark.parametrize(
    ("probe", "version"),
    [
        (probe, version)
        for probe in ("safe", "http", "restart-rules")
        for version in VERSIONS
        if probe != "restart-rules" or version >= "1.35"  # restartPolicyRules with RestartAllContainers came with it
    ],
)
def test_kubernetes_takes_the_result(kind: str, probe: str, version: str) -> None:
    """By the schema of every supported version, strictly, and by the API server's own rules."""
    document = workload(kind, {"containers": [engine_container()]})
    made = only(done(yaml.safe_dump(document), probe=probe, pull_secrets="reg"), kind)
    kubernetes_validate.validate(made, version, strict=True)
    assert api_server_rules.refusals(made) == []


# --- any workload ---


def engine_container(**more: Any) -> dict[str, Any]:
    return {"name": "vllm", "image": "vllm/vllm-openai:v1", "args": ["--model", "m"], **more}


def workload(kind: str, pod: dict[str, Any]) -> dict[str, Any]:
    """A workload of a kind around a pod's spec."""
    template = {"metadata": {"labels": {"app": "x"}}, "spec": pod}
    spec: dict[str, Any] = {
        "Deployment": {"selector": {"matchLabels": {"app": "x"}}, "template": template},
        "StatefulSet": {"serviceName": "x", "selector": {"matchLabels": {"app": "x"}}, "template": template},
        "Pod": pod,
        "LeaderWorkerSet": {"replicas": 1, "leaderWorkerTemplate": {"size": 2, "workerTemplate": template}},
        "RayCluster": {"headGroupSpec": {"rayStartParams": {}, "template": template}, "workerGroupSpecs": []},
        "LLMInferenceServiceConfig": {"template": pod},
    }[kind]
    groups = {"Pod": "v1", "LeaderWorkerSet": "leaderworkerset.x-k8s.io/v1", "RayCluster": "ray.io/v1"}
    version = groups.get(kind, "serving.kserve.io/v1alpha1" if kind.startswith("LLM") else "apps/v1")
    return {"apiVersion": version, "kind": kind, "metadata": {"name": "x"}, "spec": spec}


KINDS = ("Deployment", "StatefulSet", "Pod", "LeaderWorkerSet", "RayCluster", "LLMInferenceServiceConfig")
WORDS = st.text("abcxyz-: #'\"{}[]!&*?|>%@`é\U0001f600\n\t", max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=8,
)
PODS = st.fixed_dictionaries(
    {
        "containers": st.permutations(["engine", "other"]).map(
            lambda order: [
                {"engine": engine_container(), "other": {"name": "logs", "image": "fluent"}}[c] for c in order
            ]
        )
    },
    optional={
        "x-unknown": VALUES,
        "initContainers": st.just([{"name": "download", "image": "d"}]),
        "volumes": st.just([{"name": "models", "emptyDir": {}}]),
        "tolerations": st.just([{"key": "gpu", "operator": "Exists"}]),
        "terminationGracePeriodSeconds": st.sampled_from([10, 600]),
        "hostNetwork": st.just(True),
    },
)
ENGINES = st.fixed_dictionaries(
    {},
    optional={
        "args": st.permutations(["--model=m", "--port=8123", "--host=0.0.0.0", "--x"]),
        "command": st.just(["vllm", "serve", "m"]),
        "env": WORDS.map(lambda text: [{"name": "A", "value": text}]),
        "lifecycle": st.just({"preStop": {"exec": {"command": ["true"]}}}),
        "livenessProbe": st.just({"httpGet": {"path": "/health", "port": 8000}}),
        "volumeMounts": st.just([{"name": "models", "mountPath": "/models"}]),
        "x-unknown": VALUES,
    },
)


@given(st.sampled_from(KINDS), PODS, ENGINES, VALUES, st.booleans(), st.booleans(), st.integers(1, 3))
@settings(max_examples=25, phases=[Phase.explicit, Phase.reuse, Phase.generate])
def test_any_workload_gets_the_sidecar_once_and_keeps_the_rest(
    kind: str, pod: dict[str, Any], engine: dict[str, Any], unknown: Any, flow: bool, listed: bool, count: int
) -> None:
    """Injecting twice is injecting once, byte for byte; without what was added, all is as it was."""
    pod = copy.deepcopy(pod)
    for c in pod["containers"]:
        c.update(copy.deepcopy(engine) if c["name"] == "vllm" else {})
    objects = [copy.deepcopy(workload(kind, pod) | {"x-unknown": unknown}) for _ in range(count)]
    objects = [{"apiVersion": "v1", "kind": "List", "items": objects}] if listed else objects
    text = yaml.safe_dump_all(objects, default_flow_style=flow or None, allow_unicode=True, sort_keys=False)
    once = done(text)
    assert done(once) == once
    after = list(yaml.safe_load_all(once))
    for found, was in zip(items(after), items(list(yaml.safe_load_all(text))), strict=True):
        assert stripped(found, kind) == bare(was, kind)


def items(documents: list[Any]) -> list[dict[str, Any]]:
    return [item for d in documents for item in (d["items"] if d["kind"] == "List" else [d])]


def spec_of(document: dict[str, Any], kind: str) -> dict[str, Any]:
    """Where the sidecar is expected, found independently of the code."""
    spec = document["spec"]
    found: dict[str, Any] = {
        "Pod": lambda: spec,
        "LeaderWorkerSet": lambda: spec["leaderWorkerTemplate"]["leaderTemplate"]["spec"],
        "RayCluster": lambda: spec["headGroupSpec"]["template"]["spec"],
        "LLMInferenceServiceConfig": lambda: spec["template"],
    }.get(kind, lambda: spec["template"]["spec"])()
    return found


def bare(document: dict[str, Any], kind: str) -> dict[str, Any]:
    """A workload as it was, without what the sidecar replaces."""
    document = copy.deepcopy(document)
    if kind == "LeaderWorkerSet":
        template = document["spec"]["leaderWorkerTemplate"]
        template["leaderTemplate"] = copy.deepcopy(template["workerTemplate"])
    pod = spec_of(document, kind)
    pod.pop("terminationGracePeriodSeconds", None)
    (engine,) = [c for c in pod["containers"] if c["name"] == "vllm"]
    for key in ("livenessProbe", "readinessProbe", "startupProbe"):
        engine.pop(key, None)
    for key in ("args", "command"):
        engine[key] = [w for w in engine.get(key, []) if not re.match("--(port|host)", w)]
    return document


def stripped(document: dict[str, Any], kind: str) -> dict[str, Any]:
    """A workload with the sidecar, without what was added; also checks that it was."""
    pod = spec_of(document, kind)
    assert pod["terminationGracePeriodSeconds"] in (170, 600)
    (sidecar,) = [c for c in pod["initContainers"] if c["name"] == "sidecar"]
    env = {e["name"]: e.get("value") for e in sidecar["env"]}
    (engine,) = [c for c in pod["containers"] if c["name"] == "vllm"]
    line = " ".join([*engine.get("command", []), *engine.get("args", [])])
    port = re.findall(r"--port[= ](\d+)", line)[-1]
    assert env["SIDECAR_ENGINE"] == f"http://127.0.0.1:{port}" and "--host=127.0.0.1" in line
    assert env["SIDECAR_LISTEN"] == f"0.0.0.0:{int(port) - 10_000}"
    pod["initContainers"] = [c for c in pod["initContainers"] if c["name"] != "sidecar"]
    pod["volumes"] = [v for v in pod["volumes"] if not v["name"].startswith(("sidecar-", "engine-shm"))]
    engine["volumeMounts"] = [m for m in engine["volumeMounts"] if m["name"] not in ("sidecar-state", "engine-shm")]
    engine["env"] = [variable for variable in engine["env"] if variable["name"] != "PYTHONPATH"]
    if engine["lifecycle"]["preStop"]["exec"]["command"] != ["true"]:
        del engine["lifecycle"]
    for parent, key in ((pod, "initContainers"), (pod, "volumes"), (engine, "volumeMounts"), (engine, "env")):
        if not parent[key]:
            del parent[key]
    return bare_added(document, kind)


def bare_added(document: dict[str, Any], kind: str) -> dict[str, Any]:
    """`bare`, for a document that has its leader already."""
    found = copy.deepcopy(document)
    pod = spec_of(found, kind)
    pod.pop("terminationGracePeriodSeconds", None)
    (engine,) = [c for c in pod["containers"] if c["name"] == "vllm"]
    for key in ("livenessProbe", "startupProbe"):
        engine.pop(key)
    for key in ("args", "command"):
        engine[key] = [w for w in engine.get(key, []) if not re.match("--(port|host)", w)]
    return found


# --- engines, and how they are started ---


@pytest.mark.parametrize(
    ("container", "relay", "line"),
    [
        ({"image": "vllm/vllm-openai", "args": ["--model=m"]}, 8000, "--model=m --port=18000 --host=127.0.0.1"),
        ({"image": "own", "command": ["vllm", "serve", "m"]}, 8000, "vllm serve m --port=18000 --host=127.0.0.1"),
        (
            {"image": "own", "command": ["python3", "-m", "sglang.launch_server", "--host", "0.0.0.0"]},
            30000,
            "python3 -m sglang.launch_server --host 127.0.0.1 --port=40000",
        ),
        (
            {
                "image": "ghcr.io/huggingface/text-generation-inference:3",
                "args": ["--hostname=::"],
                "env": [{"name": "PORT", "value": "3000"}],
            },
            3000,
            "--hostname=127.0.0.1 --port=13000",
        ),
        (
            {"image": "ghcr.io/ggml-org/llama.cpp:server", "args": ["-m", "/m.gguf", "--port", "60000"]},
            60000,
            "-m /m.gguf --port 50000 --host=127.0.0.1",
        ),
        (
            {
                "image": "own",
                "command": ["sh", "-c"],
                "args": ["ray start --head && exec vllm serve m --host 0.0.0.0 --port 8000 --tp 8"],
            },
            8000,
            "sh -c ray start --head && exec vllm serve m --host 127.0.0.1 --port 18000 --tp 8",
        ),
    ],
)
def test_an_engine_is_moved_by_its_own_flags(container: dict[str, Any], relay: int, line: str) -> None:
    """Its kind is known by its command line or image; the relay has its port; flags are replaced where they stand."""
    made = only(done(yaml.safe_dump(workload("Pod", {"containers": [{"name": "e", **container}]}))), "Pod")
    (engine,) = made["spec"]["containers"]
    assert " ".join([*engine.get("command", []), *engine.get("args", [])]) == line
    env = {e["name"]: e.get("value") for e in made["spec"]["initContainers"][0]["env"]}
    assert env["SIDECAR_LISTEN"] == f"0.0.0.0:{relay}"


def test_a_script_in_a_block_stays_a_block() -> None:
    """A literal block of a shell's script is changed in place."""
    text = """\
apiVersion: v1
kind: Pod
metadata: {name: x}
spec:
  containers:
  - name: engine
    image: own
    command:
    - bash
    - -c
    - |
      set -e  # stop
      vllm serve m \\
        --port 8000 \\
        --max-num-seqs 8
"""
    changed = done(text)
    assert "    - |\n      set -e  # stop\n      vllm serve m \\\n        --host 127.0.0.1 --port 18000 \\\n" in changed
    assert done(changed) == changed


def test_a_leader_gets_a_template_of_its_own() -> None:
    """Only the leader of a group has the sidecar; workers keep their command line."""
    made = only(
        done(yaml.safe_dump(workload("LeaderWorkerSet", {"containers": [engine_container()]}))), "LeaderWorkerSet"
    )
    template = made["spec"]["leaderWorkerTemplate"]
    assert "initContainers" not in template["workerTemplate"]["spec"]
    assert template["workerTemplate"]["spec"]["containers"][0]["args"] == ["--model", "m"]
    assert template["leaderTemplate"]["spec"]["initContainers"][0]["name"] == "sidecar"


def test_what_an_alias_shares_changes_in_one_place_only() -> None:
    """Lists that workers or other containers share by an alias stay theirs."""
    text = """\
kind: LeaderWorkerSet
spec:
  leaderWorkerTemplate:
    workerTemplate: &all
      spec:
        containers:
        - name: vllm
          image: vllm
          args: &line [--model=m]
          volumeMounts: &mounts []
        - {name: other, image: x, args: *line, volumeMounts: *mounts}
    leaderTemplate: *all
"""
    changed = done(text)
    assert done(changed) == changed
    template = only(changed, "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]
    worker, leader = (template[f"{who}Template"]["spec"]["containers"] for who in ("worker", "leader"))
    assert [c["args"] for c in (*worker, leader[1])] == [["--model=m"]] * 3
    assert len(leader[0]["args"]) == 3 and leader[1]["volumeMounts"] == []


def test_the_group_in_deploy_has_the_sidecar_in_its_leader() -> None:
    """deploy/lws holds what the command prints (`make docs` writes it); workers wait while the leader drains."""
    folder = Path(__file__).resolve().parents[2] / "deploy" / "lws"
    before, after = ((folder / name).read_text() for name in ("group.yaml", "group-with-sidecar.yaml"))
    assert done(before) == after
    was, template = (only(text, "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"] for text in (before, after))
    assert template["workerTemplate"] == was["workerTemplate"]
    leader, worker = (template[f"{who}Template"]["spec"] for who in ("leader", "worker"))
    for spec in (leader, worker):
        assert [*api_server_rules.pod(spec, "spec")] == []
        kubernetes_validate.validate({**POD, "spec": spec}, "1.37", strict=True)
    assert leader["initContainers"][0]["name"] == "sidecar"
    assert worker["terminationGracePeriodSeconds"] == leader["terminationGracePeriodSeconds"]
    (engine,) = worker["containers"]
    assert engine["lifecycle"]["preStop"]["sleep"]["seconds"] >= DRAIN_S + ENDPOINT_REMOVAL_S


def test_an_engines_port_may_be_kept() -> None:
    """--keep-port leaves the command line alone; the relay has a port of its own."""
    made = only(done(DEPLOYMENT, keep_port=8000))
    spec = made["spec"]["template"]["spec"]
    assert spec["containers"][0]["args"] == only(DEPLOYMENT)["spec"]["template"]["spec"]["containers"][0]["args"]
    (sidecar,) = spec["initContainers"]
    assert {"name": "relay", "containerPort": 8080} in sidecar["ports"]
    assert {"name": "SIDECAR_ENGINE", "value": "http://127.0.0.1:8000"} in sidecar["env"]


def test_workloads_without_an_engine_are_left_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a chart prints has a router, too: its text stays, and one line on standard error names it."""
    router = pod_text({"name": "router", "image": "vllm/vllm-router:v1", "args": ["--port", "8000"]})
    (tmp_path / "all.yaml").write_text(f"{DEPLOYMENT}---\n{router}")
    assert __main__.run(["inject", "-f", str(tmp_path / "all.yaml")]) == 0
    out, err = capsys.readouterr()
    assert out == f"{done(DEPLOYMENT)}---\n{router}"
    assert err == "sidecar: no engine is recognised in Pod x: left as it is\n"


def pod_text(*containers: dict[str, Any], **more: Any) -> str:
    return yaml.safe_dump(workload("Pod", {"containers": list(containers), **more}))


SCRIPT = {"name": "e", "image": "vllm", "command": ["sh", "-c", "vllm serve m"]}


@pytest.mark.parametrize(
    ("text", "chosen", "words"),
    [
        ("kind: [", {}, "document 1 is not YAML"),
        ("a: 1\n---\na: b: c\n", {}, "document 2 is not YAML: .*, line"),
        ("kind: Service\n", {}, "no workload found; expected one of Pod, Deployment"),
        ("", {}, "no workload found"),
        ("kind: Deployment\nmetadata: {name: x}\n", {}, "Deployment x: no containers at spec.template.spec"),
        ("kind: LeaderWorkerSet\n", {}, "no workerTemplate"),
        (pod_text({"name": "a", "image": "vllm"}, {"name": "b", "image": "sglang"}), {}, "which container .*of a, b"),
        (pod_text({"name": "a", "image": "x"}), {}, "no engine is recognised in Pod x; name its --container"),
        (pod_text(engine_container()), {"container": "b"}, "no engine is recognised in Pod x"),
        (pod_text({"name": "a", "image": "x"}), {"container": "a"}, "not recognised; give --engine-kind"),
        (
            pod_text({"name": "e", "image": "vllm", "command": ["bash -c '/vllm-entrypoint.sh & echo'"]}),
            {},
            "its command starts vllm elsewhere; give the engine's port by --keep-port",
        ),
        (pod_text(SCRIPT), {}, "no single --port in its script; give the engine's port by --keep-port"),
        (pod_text(engine_container(args=["--port", "$(PORT)"])), {}, "not a number; give the engine's port"),
        (pod_text(engine_container(ports=[{"containerPort": 9400}])), {}, "port 9400 is in use"),
        (pod_text(engine_container(args=["m", "--ssl-keyfile=k"])), {}, "does not speak plain HTTP .--ssl-keyfile"),
        (pod_text(engine_container(args=["m", "--uds", "/s"])), {}, "does not speak plain HTTP .--uds"),
        (pod_text(engine_container(args=["m", "--headless"])), {}, "no engine is recognised in Pod x"),
        (pod_text(engine_container()), {"engine_port": 8000}, "choose another with --engine-port"),
        (pod_text(engine_container(), {"name": "sidecar", "image": "istio"}), {}, "is named 'sidecar'; rename it"),
        (pod_text(engine_container(), volumes=[{"name": "sidecar-tmp"}]), {}, "is named 'sidecar-tmp'; rename it"),
        (pod_text(engine_container()), {"keep_port": 8080}, "is the relay's"),
    ],
)
def test_what_cannot_be_changed_is_refused_in_one_line(text: str, chosen: dict[str, Any], words: str) -> None:
    """What is wrong, where, and what to do; never a half of the result."""
    with pytest.raises(UsageError, match=words) as refused:
        done(text, **chosen)
    assert "\n" not in str(refused.value)


def test_the_command_reads_a_file_or_standard_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """-f FILE and -f -; a missing file is exit code 2 and one line, and nothing on standard output."""
    file = tmp_path / "d.yaml"
    file.write_text(DEPLOYMENT)
    assert __main__.run(["inject", "-f", str(file)]) == 0
    first = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(first.encode())))
    assert __main__.run(["inject", "-f", "-"]) == 0
    assert capsys.readouterr().out == first == done(DEPLOYMENT)
    for argv, words in (
        (["-f", str(tmp_path / "none")], "cannot read"),
        ([], "-f is missing"),
        (["-f", "/dev/zero"], "MiB"),
    ):
        assert __main__.run(["inject", *argv]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and words in err


MODELS = """\
          volumeMounts:
            - {name: home, mountPath: /root}
            - {name: models, mountPath: /models, subPath: llms}
          resources:
            limits:
"""
VOLUMES = """\
          image: fluent
      volumes:
        - {name: home, emptyDir: {}}
        - {name: dshm, emptyDir: {medium: Memory}}
        - {name: models, persistentVolumeClaim: {claimName: models}}
"""
WITH_MODELS = DEPLOYMENT.replace("          resources:\n            limits:\n", MODELS, 1)
WITH_MODELS = WITH_MODELS.replace("          image: fluent\n", VOLUMES, 1)


def variables(container: dict[str, Any]) -> dict[str, Any]:
    return {variable["name"]: variable.get("value") for variable in container["env"]}


def test_a_models_directory_brings_what_images_need() -> None:
    """The sidecar mounts the model's volume; vLLM gets the plug-in, one folder at /dev/shm, and the volumes' group."""
    text = done(WITH_MODELS, model="/models/qwen")
    spec = only(text)["spec"]["template"]["spec"]
    (sidecar,), engine = spec["initContainers"], spec["containers"][0]
    assert variables(sidecar)["SIDECAR_MODEL"] == "/models/qwen"
    assert {"name": "models", "mountPath": "/models", "subPath": "llms", "readOnly": True} in sidecar["volumeMounts"]
    shared = {"name": "engine-shm", "mountPath": "/dev/shm"}
    assert shared in sidecar["volumeMounts"] and shared in engine["volumeMounts"]
    assert any(volume["name"] == "engine-shm" and "Memory" in str(volume) for volume in spec["volumes"])
    (state,) = [mount["mountPath"] for mount in engine["volumeMounts"] if mount["name"] == "sidecar-state"]
    assert variables(engine)["PYTHONPATH"] == f"{state}/{engine_plugin.FOLDER}"
    assert spec["securityContext"]["fsGroup"] == sidecar["securityContext"]["runAsGroup"]
    for version in VERSIONS:
        kubernetes_validate.validate(only(text), version, strict=True)
    assert api_server_rules.refusals(only(text)) == []
    assert done(text, model="/models/qwen") == text


def test_vllm_without_a_model_gets_the_plug_in_and_its_folder_alone() -> None:
    """Its core's steps need the plug-in and one folder in memory for both, but no group; other engines need none."""
    spec = only(done(WITH_MODELS))["spec"]["template"]["spec"]
    (sidecar,), engine = spec["initContainers"], spec["containers"][0]
    shared = {"name": "engine-shm", "mountPath": "/dev/shm"}
    assert shared in sidecar["volumeMounts"] and shared in engine["volumeMounts"]
    assert variables(engine)["PYTHONPATH"] == f"/run/sidecar/{engine_plugin.FOLDER}"
    assert "securityContext" not in spec
    other = only(done(WITH_MODELS, engine_kind="tgi"))["spec"]["template"]["spec"]
    assert "engine-shm" not in str(other) and "PYTHONPATH" not in str(other)


def test_what_a_pod_has_already_stays() -> None:
    """Its own folder at /dev/shm, its own group, its own PYTHONPATH after the plug-in's; an alias changes one place."""
    own = WITH_MODELS.replace(
        "            - {name: home, mountPath: /root}\n",
        "            - {name: home, mountPath: /root}\n            - {name: dshm, mountPath: /dev/shm}\n",
    ).replace("          env:\n", "          env:\n            - {name: PYTHONPATH, value: /opt/own}\n", 1)
    own = own.replace(
        "      nodeSelector:", "      securityContext: {fsGroup: 2000, runAsUser: 1000}\n      nodeSelector:", 1
    )
    spec = only(done(own, model="/models/qwen"))["spec"]["template"]["spec"]
    assert {"name": "dshm", "mountPath": "/dev/shm"} in spec["initContainers"][0]["volumeMounts"]
    assert "engine-shm" not in str(spec)
    assert variables(spec["containers"][0])["PYTHONPATH"] == f"/run/sidecar/{engine_plugin.FOLDER}:/opt/own"
    assert spec["securityContext"] == {"fsGroup": 2000, "runAsUser": 1000}


@pytest.mark.parametrize(
    ("change", "model", "said"),
    [
        (("", ""), "/elsewhere/qwen", "no volume of the engine's container"),
        (("", ""), "/modelsx", "no volume of the engine's container"),
        (("", ""), "models/qwen", "no volume of the engine's container"),
        (("HF_TOKEN", "PYTHONPATH"), "/models/qwen", "PYTHONPATH comes from elsewhere"),
    ],
)
def test_a_model_that_cannot_be_shared_is_refused(change: tuple[str, str], model: str, said: str) -> None:
    """One line says what is missing, and nothing is printed."""
    with pytest.raises(UsageError, match=said):
        done(WITH_MODELS.replace(*change), model=model)


def test_other_engines_get_the_model_alone() -> None:
    """Only vLLM takes images: no group is shared with another engine, and no plug-in loaded into one without steps."""
    text = WITH_MODELS.replace("vllm/vllm-openai:v0.32.0", "lmsysorg/sglang").replace(
        "          args: [", '          command: ["python3", "-m", "sglang.launch_server"]\n          args: ['
    )
    spec = only(done(text, model="/models/qwen"))["spec"]["template"]["spec"]
    assert variables(spec["initContainers"][0])["SIDECAR_MODEL"] == "/models/qwen"
    assert "securityContext" not in spec
    tgi = only(done(WITH_MODELS, model="/models/qwen", engine_kind="tgi"))["spec"]["template"]["spec"]
    assert "PYTHONPATH" not in str(tgi) and "engine-shm" not in str(tgi)
