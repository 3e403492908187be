"""The printed manifests: valid, safe, and consistent with the sidecar."""

from __future__ import annotations

import itertools
import json
import os
import resource
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from sidecar import __main__
from sidecar.control.diagnosis import MAX_BUNDLE_BYTES, MAX_BUNDLES
from sidecar.control.state_dir import StateDir
from sidecar.errors import UsageError
from sidecar.events import Verdict
from sidecar.health.probes import VERDICT_STALE_S, ProbeState
from sidecar.launch import engine_plugin
from sidecar.settings import Settings, load
from sidecar.tools.manifests import shell
from sidecar.tools.manifests.render import (
    ADMIN_PORT,
    DRAIN_S,
    ENDPOINT_REMOVAL_S,
    RELAY_PORT,
    RESTART_CODE,
    STATE_DIR,
    render,
)
from sidecar.tools.manifests.settings import KINDS, ManifestSettings

from ..waiting import PATIENCE
from . import api_server_rules

Requires = Callable[[str], Path]
VERSIONS = ("1.33", "1.34", "1.35", "1.36", "1.37")
CLAIM = {"claim": "models", "model": "/models/qwen"}


def made(**chosen: Any) -> dict[str, Any]:
    """The Deployment's pod spec."""
    deployment, *_ = yaml.safe_load_all(render(replace(ManifestSettings(), **chosen)))
    spec: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return spec


def containers(**chosen: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(sidecar, engine) of the pod."""
    spec = made(**chosen)
    return spec["initContainers"][0], spec["containers"][0]


@pytest.mark.parametrize(
    ("kind", "probe", "monitor", "more"),
    [
        *itertools.product(KINDS, ("safe", "http"), ("annotations",), ({},)),
        ("vllm", "safe", "servicemonitor", {"monitor_labels": "release=kps", "qos": "burstable"}),
        (
            "vllm",
            "safe",
            "none",
            {"env": "A=1 B='x y'", "env_secret": "hf", "key_secret": "key", "pull_secrets": "a b"},
        ),
        ("vllm", "safe", "none", {"node_selector": "gpu=h100 a.b/c=", "tolerations": "nvidia.com/gpu:NoSchedule"}),
        ("vllm", "safe", "podmonitor", {"namespace": "models", "gpus": 8, "replicas": 3}),
        ("vllm", "safe", "none", CLAIM | {"gpus": 0, "stack_dumps": "on"}),
        ("vllm", "safe", "none", CLAIM | {"images": "shm"}),
    ],
)
@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_every_document(
    kind: str, probe: str, monitor: str, more: dict[str, Any], version: str
) -> None:
    """Each document passes the schema of each supported Kubernetes, strictly; of monitors, some fields are checked."""
    chosen = replace(ManifestSettings(), engine_kind=kind, probe=probe, monitor=monitor, image="engine:1", **more)
    for document in yaml.safe_load_all(render(chosen)):
        if document["kind"] == "PodMonitor":
            assert document["spec"]["podMetricsEndpoints"][0]["port"] == "relay"
        elif document["kind"] == "ServiceMonitor":
            assert document["spec"]["endpoints"][0]["port"] == "http"
            assert document["metadata"]["labels"] == {"release": "kps"}
        else:
            kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize(("chosen", "since"), [({"gpu_access": "dra"}, "1.34"), ({"probe": "restart-rules"}, "1.34")])
def test_newer_features_are_valid_where_they_are(chosen: dict[str, Any], since: str) -> None:
    """Valid by the schema from a version on, and not before: rules are of 1.34, and their action of 1.35."""
    for version in VERSIONS:
        try:
            for document in yaml.safe_load_all(render(replace(ManifestSettings(), **chosen))):
                kubernetes_validate.validate(document, version, strict=True)
            valid = True
        except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError):
            valid = False
        assert valid == (version >= since), version


def test_the_pod_is_guaranteed_unless_it_is_chosen_otherwise() -> None:
    """Every container's requests are its limits, for CPU and memory: Kubernetes' rule for the class."""
    for chosen, guaranteed in (
        ({}, True),
        ({"probe": "restart-rules", "gpu_access": "dra", "stack_dumps": "on"}, True),
        ({"qos": "burstable"}, False),
    ):
        spec = made(**chosen)
        resources = [c["resources"] for c in (*spec["initContainers"], *spec["containers"])]
        same = (r["requests"] == r["limits"] and {"cpu", "memory"} <= set(r["limits"]) for r in resources)
        assert all(same) is guaranteed


def test_a_shared_claim_gives_both_containers_the_gpus() -> None:
    """With --gpu-access dra there is one claim with the engine's number of GPUs, which both containers name."""
    text = render(replace(ManifestSettings(), gpu_access="dra", gpus=4))
    template = next(d for d in yaml.safe_load_all(text) if d["kind"] == "ResourceClaimTemplate")
    (request,) = template["spec"]["spec"]["devices"]["requests"]
    assert request["exactly"] == {"deviceClassName": "gpu.nvidia.com", "count": 4}
    spec = made(gpu_access="dra", gpus=4)
    (claim,) = spec["resourceClaims"]
    assert claim["resourceClaimTemplateName"] == template["metadata"]["name"]
    for container in containers(gpu_access="dra", gpus=4):
        assert container["resources"]["claims"] == [{"name": claim["name"]}]
        assert "nvidia.com/gpu" not in container["resources"]["limits"]
    assert "nvidia.com/gpu" in containers()[1]["resources"]["limits"] and "resourceClaims" not in made()


def test_a_network_policy_leaves_relay_and_metrics_reachable() -> None:
    """The relay's port from everywhere; the admin port from the namespace and the monitoring's only; no other port."""
    policy = next(d for d in yaml.safe_load_all(render(ManifestSettings())) if d["kind"] == "NetworkPolicy")
    relay, admin = policy["spec"]["ingress"]
    assert [p["port"] for p in relay["ports"]] == [RELAY_PORT] and "from" not in relay
    assert [p["port"] for p in admin["ports"]] == [ADMIN_PORT] and len(admin["from"]) == 2
    kinds = {d["kind"] for d in yaml.safe_load_all(render(replace(ManifestSettings(), network_policy="off")))}
    assert kinds == {"Deployment", "Service", "PodDisruptionBudget"}


def test_secrets_are_named_and_never_held() -> None:
    """Engine and sidecar get vLLM's key by a reference; for other engines the flag is refused."""
    sidecar, engine = containers(key_secret="keys", env_secret="hf")
    key = {"secretKeyRef": {"name": "keys", "key": "api-key"}}
    assert {"name": "SIDECAR_ENGINE_KEY", "valueFrom": key} in sidecar["env"]
    assert {"name": "VLLM_API_KEY", "valueFrom": key} in engine["env"]
    assert engine["envFrom"] == [{"secretRef": {"name": "hf"}}]
    with pytest.raises(UsageError, match="--key-secret is for vLLM"):
        made(key_secret="keys", engine_kind="scripted")


def test_lists_are_kubernetes_own() -> None:
    """Words of flags become variables, tolerations, selectors and pull secrets."""
    spec = made(env="A='x: y' B=", tolerations="a:NoSchedule b=c:NoExecute", node_selector="d=e", pull_secrets="f g")
    assert spec["containers"][0]["env"][-2:] == [{"name": "A", "value": "x: y"}, {"name": "B", "value": ""}]
    assert spec["tolerations"] == [
        {"key": "a", "operator": "Exists", "effect": "NoSchedule"},
        {"key": "b", "operator": "Equal", "value": "c", "effect": "NoExecute"},
    ]
    assert spec["nodeSelector"] == {"d": "e"} and spec["imagePullSecrets"] == [{"name": "f"}, {"name": "g"}]


MODELS = ["--claim", "models", "--model", "/models/qwen"]
MATRIX = [
    *itertools.product(KINDS, ("safe", "http"), ("annotations", "podmonitor", "none"), ([], MODELS)),
    *itertools.product(
        ("vllm", "scripted"),
        ("restart-rules",),
        ("servicemonitor", "podmonitor"),
        (["--gpu-access", "dra", "--monitor-labels", "release=kps a.b/c="], ["--qos", "burstable", *MODELS]),
    ),
    *itertools.product(
        ("vllm",),
        ("safe",),
        ("annotations",),
        (
            ["--replicas", "0", "--namespace", "n" * 53, "--name", "l" * 53],
            ["--stack-dumps", "on", "--gpus", "64", *MODELS],
            ["--images", "shm", "--stack-dumps", "on", "--gpus", "0", *MODELS],
            ["--cpus", "1", "--sidecar-cpus", "128", "--memory", "1", "--sidecar-memory", "1T", "--replicas", "10000"],
            ["--env", "A='b c' D=", "--env-secret", "hf", "--key-secret", "k.l", "--pull-secrets", "a b"],
            ["--node-selector", "gpu=h100 a.b/c=", "--tolerations", "nvidia.com/gpu:NoSchedule a=b:NoExecute"],
            ["--memory", "64000000Ki", "--sidecar-memory", "512Mi"],
            ["--max-surge", "10000", "--startup-seconds", "60"],
            ["--startup-seconds", "86400"],
            ["--memory", "64k", "--sidecar-memory", "536870912"],
            ["--engine-args", "--chat-template '{\"a\": [b]}' # %", "--model", "a: b"],
        ),
    ),
]


@pytest.mark.parametrize(("kind", "probe", "monitor", "more"), MATRIX)
def test_an_api_server_takes_whatever_is_printed(
    kind: str, probe: str, monitor: str, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """No object of any combination of flags breaks a rule that an API server applies beyond its schema."""
    argv = ["--engine-kind", kind, "--probe", probe, "--monitor", monitor, "--image", "engine:1", *more]
    assert __main__.run(["manifests", *argv]) == 0
    printed = api_server_rules.objects(capsys.readouterr().out)
    assert {"Deployment", "Service"} <= {document["kind"] for document in printed}
    assert [why for document in printed for why in api_server_rules.refusals(document)] == []


def test_prometheus_finds_the_pods_by_annotations() -> None:
    """Pods have scrape annotations, not labels; with another kind of discovery they have none."""
    for monitor, said in (
        ("annotations", {"scrape": "true", "port": str(RELAY_PORT), "path": "/metrics"}),
        ("none", None),
    ):
        deployment, *_ = yaml.safe_load_all(render(replace(ManifestSettings(), monitor=monitor)))
        pods = deployment["spec"]["template"]["metadata"]
        assert pods["labels"] == {"app.kubernetes.io/name": "llm"}
        assert pods.get("annotations") == (said and {f"prometheus.io/{key}": value for key, value in said.items()})


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("vllm", []),
        ("vllm-http-probe", ["--probe", "http"]),
        ("vllm-restart-rules", ["--probe", "restart-rules"]),
        ("vllm-dra", ["--gpu-access", "dra"]),
    ],
)
def test_what_lies_in_deploy_is_what_the_command_prints(
    name: str, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """deploy/kubernetes holds the command's own output; `make docs` writes it."""
    assert __main__.run(["manifests", *flags]) == 0
    kept = Path(__file__).resolve().parents[2] / "deploy" / "kubernetes" / f"{name}.yaml"
    assert kept.read_text() == capsys.readouterr().out


def test_the_sidecars_environment_is_valid_settings(tmp_path: Path) -> None:
    """The sidecar accepts the settings in the manifests, and its ports are those of the probes."""
    sidecar, _ = containers(**CLAIM)
    env = {e["name"]: e["value"] for e in sidecar["env"] if "value" in e}
    assert env["SIDECAR_MODEL"] == "/models/qwen"
    settings = load(Settings, {}, {**env, "SIDECAR_MODEL": str(tmp_path)})
    assert (settings.listen[1], settings.admin[1], settings.state_dir) == (RELAY_PORT, ADMIN_PORT, STATE_DIR)
    assert sidecar["restartPolicy"] == "Always" and sidecar["readinessProbe"]["httpGet"]["path"] == "/readyz"


def test_images_in_shared_memory_have_one_folder_for_both() -> None:
    """Sidecar and engine share /dev/shm; one is configured to export images there, the other to read them."""
    sidecar, engine = containers(**CLAIM, images="shm")
    shared = {"name": "engine-shm", "mountPath": "/dev/shm"}
    assert shared in sidecar["volumeMounts"] and shared in engine["volumeMounts"]
    assert {"name": "SIDECAR_IMAGES", "value": "shm"} in sidecar["env"]
    assert {"name": "VLLM_MEDIA_CONNECTOR", "value": "inference_sidecar"} in engine["env"]
    assert all(variable["name"] != "VLLM_MEDIA_CONNECTOR" for variable in containers(**CLAIM)[1]["env"])


@pytest.mark.parametrize("kind", ["vllm", "sglang", "tgi"])
def test_an_engine_without_a_models_directory_reports_steps_through_one_folder(kind: str) -> None:
    """Plug-in and sidecar meet in one folder in memory, whatever images do; other engines get neither."""
    spec = made(engine_kind=kind, image="x")
    sidecar, engine = spec["initContainers"][0], spec["containers"][0]
    shared = {"name": "engine-shm", "mountPath": "/dev/shm"}
    (volume,) = [v for v in spec["volumes"] if v["name"] == "engine-shm"]
    assert volume["emptyDir"]["medium"] == "Memory"
    loads = {"name": "PYTHONPATH", "value": f"{STATE_DIR}/{engine_plugin.FOLDER}"} in engine["env"]
    takes = kind != "tgi"
    assert (loads, shared in sidecar["volumeMounts"]) == (takes, takes)
    assert "fsGroup" not in spec["securityContext"]


def test_vllm_finds_the_plug_in_and_may_read_images() -> None:
    """Its folder is the one that the sidecar writes; the engine, which has no capability, is in the sidecar's group."""
    sidecar, engine = containers(**CLAIM)
    path = {"name": "PYTHONPATH", "value": f"{STATE_DIR}/{engine_plugin.FOLDER}"}
    assert path in engine["env"]
    security = made(**CLAIM)["securityContext"]
    assert security["fsGroup"] == sidecar["securityContext"]["runAsGroup"]
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    own = containers(**CLAIM, env="PYTHONPATH=/own")[1]["env"]
    assert own.index(path) < own.index({"name": "PYTHONPATH", "value": "/own"}), "the last one counts"
    for other in ({}, CLAIM | {"engine_kind": "sglang", "image": "x"}):
        assert "fsGroup" not in made(**other)["securityContext"]


def test_stack_dumps_are_asked_for() -> None:
    """By default the sidecar is isolated and has no capability; with --stack-dumps it has what py-spy needs."""
    assert "shareProcessNamespace" not in made()
    assert containers()[0]["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert made(stack_dumps="on")["shareProcessNamespace"] is True
    user = containers(stack_dumps="on")[0]["securityContext"]
    assert (user["runAsUser"], user["capabilities"]) == (0, {"drop": ["ALL"], "add": ["SYS_PTRACE"]})
    assert user["allowPrivilegeEscalation"] is False and "runAsNonRoot" not in user
    assert containers(stack_dumps="on")[1] == containers()[1]


def test_the_sidecar_fits_into_a_restricted_namespace() -> None:
    """Pod Security Standards, "restricted": what each container must say by itself, in anyone's pod."""
    for container in made(probe="restart-rules")["initContainers"]:
        context = container["securityContext"]
        assert context["runAsNonRoot"] is True and context["runAsUser"] > 0
        assert context["allowPrivilegeEscalation"] is False and context["capabilities"] == {"drop": ["ALL"]}
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}


def test_the_engines_probes_use_numeric_ports() -> None:
    """The engine's probes use the sidecar's port number: a name would refer to the engine's container."""
    for probe in ("safe", "http"):
        _, engine = containers(probe=probe)
        assert engine["startupProbe"]["httpGet"] == {"path": "/startupz", "port": ADMIN_PORT}
        assert not engine.get("ports")
        assert engine["livenessProbe"].get("httpGet") == (
            {"path": "/livez", "port": ADMIN_PORT} if probe == "http" else None
        )


def test_services_reach_the_sidecar_by_number() -> None:
    """A Service's target is a number: before Kubernetes 1.33, a native sidecar's port name has no endpoint."""
    printed = list(yaml.safe_load_all(render(ManifestSettings())))
    kept = yaml.safe_load_all(
        (Path(__file__).resolve().parents[2] / "deploy" / "keda" / "metrics-api.yaml").read_text()
    )
    services = [document for document in (*printed, *kept) if document["kind"] == "Service"]
    listens = {port["containerPort"] for port in containers()[0]["ports"]}
    assert len(services) == 2 and {p["targetPort"] for s in services for p in s["spec"]["ports"]} == listens


def test_a_deleted_pod_has_time_to_drain() -> None:
    """The pod's grace period covers the preStop's waiting and the sidecar's own draining after it."""
    spec = made()
    assert spec["terminationGracePeriodSeconds"] >= ENDPOINT_REMOVAL_S + DRAIN_S + Settings().drain_seconds


@pytest.mark.parametrize("chosen", [3600, 61, 86_400])
def test_a_rollout_fails_only_after_all_that_a_start_may_take(chosen: int) -> None:
    """The progress deadline is longer than an old pod's end, the sidecar's start and the engine's together."""
    deployment, *_ = yaml.safe_load_all(render(replace(ManifestSettings(), startup_seconds=chosen)))
    pod = deployment["spec"]["template"]["spec"]
    sidecar, engine = (
        c["startupProbe"]["periodSeconds"] * c["startupProbe"]["failureThreshold"]
        for c in (*pod["initContainers"], *pod["containers"])
    )
    assert engine >= chosen
    assert deployment["spec"]["progressDeadlineSeconds"] > pod["terminationGracePeriodSeconds"] + sidecar + engine


def test_a_rollout_needs_no_spare_gpu_unless_it_is_told_of_one() -> None:
    """A new pod waits for an old one's GPU; with --max-surge, the old one stays until the new one is ready."""
    for surge, unavailable in ((0, 1), (2, 0)):
        deployment, *_ = yaml.safe_load_all(render(replace(ManifestSettings(), max_surge=surge)))
        assert deployment["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": surge, "maxUnavailable": unavailable}


def test_users_text_stays_text() -> None:
    """Quotes, colons and line breaks in a model's name or an argument do not become YAML."""
    args = '--chat-template "a: b" --x \'{"y": [1]}\''
    _, engine = containers(model='m"\n- evil: true', engine_args=args)
    assert engine["args"][0] == 'm"\n- evil: true'
    assert engine["args"][-4:] == ["--chat-template", "a: b", "--x", '{"y": [1]}']


@pytest.mark.parametrize(
    "text", ["\U0001f600", "\u2028", "\x85", "\x7f", "\t", "\\ud83d\\ude00", "\u6a21\u578b", "null", "# no"]
)
def test_users_text_stays_text_in_any_script(text: str) -> None:
    """Characters beyond 16 bits, YAML's line ends and YAML's keywords survive quoting."""
    _, engine = containers(model=text, engine_args=shlex.quote(text))
    assert engine["args"][0] == engine["args"][-1] == text


@pytest.mark.parametrize("word", ["true", "null", "no", "on", "y", "n"])
def test_a_name_may_be_a_word_of_yaml(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Names that YAML would read as true, false or null stay names."""
    argv = ["--name", word, "--namespace", word, *MODELS, "--claim", word]
    for monitor in ("annotations", "podmonitor"):
        assert __main__.run(["manifests", *argv, "--monitor", monitor]) == 0
        printed = api_server_rules.objects(capsys.readouterr().out)
        assert [why for document in printed for why in api_server_rules.refusals(document)] == []
        assert all((d["metadata"]["name"], d["metadata"]["namespace"]) == (word, word) for d in printed)


def test_images_need_the_models_directory() -> None:
    """With a claim, both containers mount the models read-only, and the sidecar has SIDECAR_MODEL."""
    for container in containers(**CLAIM):
        assert {"name": "models", "mountPath": "/models", "readOnly": True} in container["volumeMounts"]
    sidecar, _ = containers()
    assert "SIDECAR_MODEL" not in {e["name"] for e in sidecar["env"]}


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"model": "/models/qwen"}, "--claim"),
        ({"images": "shm"}, "--images shm"),
        (CLAIM | {"images": "shm", "engine_kind": "scripted"}, "--images shm"),
        ({"claim": "models"}, "--claim"),
        ({"model": "/elsewhere/qwen"}, "--claim"),
        ({"engine_kind": "sglang"}, "--image"),
    ],
)
def test_settings_that_do_not_fit_are_refused(chosen: dict[str, Any], words: str) -> None:
    """One line names the flag that is missing."""
    with pytest.raises(UsageError, match=words):
        made(**chosen)


@pytest.mark.parametrize(
    "argv",
    [
        ["--name", "Not_A_Label"],
        ["--memory", "lots"],
        ["--memory", "64ki"],
        ["--memory", "64K"],
        ["--memory", "\u0663\u0662Gi"],
        ["--sidecar-memory", "511Mi"],
        ["--sidecar-memory", "512M"],
        ["--image", " engine:1"],
        ["--sidecar-image", ""],
        ["--engine-args", "'open"],
        ["--engine-kind", "auto"],
        ["--gpus", "-1"],
        ["--env", "A"],
        ["--env", "A='open"],
        ["--tolerations", "gpu"],
        ["--tolerations", "gpu:Sometimes"],
        ["--node-selector", "a=b/c"],
        ["--pull-secrets", "Not_A_Name"],
        ["--key-secret", "a b"],
    ],
)
def test_bad_values_exit_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """An invalid value is a usage error of one line, and nothing is printed that could be applied."""
    assert __main__.run(["manifests", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and argv[0] in err


# --- the shell lines, in the shells of engines' images ---

SHELLS = (["dash"], ["busybox", "sh"], ["bash"])


def sh(interpreter: list[str], line: str, path: str | None = None) -> int:
    env = {"PATH": os.environ["PATH"] if path is None else path}
    found = shutil.which(interpreter[0])
    assert found
    return subprocess.run(
        [found, *interpreter[1:], "-c", line], env=env, timeout=PATIENCE, capture_output=True
    ).returncode


@pytest.fixture(params=SHELLS, ids=lambda s: s[0])
def interpreter(request: pytest.FixtureRequest, requires: Requires) -> list[str]:
    requires(request.param[0])
    return list(request.param)


@pytest.fixture
def busybox_tools(tmp_path: Path, requires: Requires) -> str:
    """A PATH on which every tool is busybox's."""
    busybox, bin = requires("busybox"), tmp_path / "bin"
    bin.mkdir()
    for tool in ("stat", "date", "grep", "sleep"):
        (bin / tool).symlink_to(busybox)
    return str(bin)


AGES = [(None, 0), (0.0, 1), (VERDICT_STALE_S / 2, 1), (VERDICT_STALE_S + 3, 0), (3600.0, 0), (-3600.0, 0)]


@pytest.mark.parametrize(("age", "code"), AGES)
def test_the_safe_probe_fails_only_on_a_fresh_file(
    interpreter: list[str], tmp_path: Path, age: float | None, code: int
) -> None:
    """No file passes, a fresh one fails, a stale one or one from the future passes."""
    if age is not None:
        (tmp_path / "stalled").touch()
        os.utime(tmp_path / "stalled", (time.time() - age,) * 2)
    assert sh(interpreter, shell.safe_liveness(str(tmp_path))) == code


@pytest.mark.parametrize(("age", "code"), AGES)
def test_the_safe_probe_works_with_busyboxs_tools(
    tmp_path: Path, busybox_tools: str, age: float | None, code: int
) -> None:
    """The same in an image with busybox's shell, stat and date."""
    if age is not None:
        (tmp_path / "stalled").touch()
        os.utime(tmp_path / "stalled", (time.time() - age,) * 2)
    assert sh(["busybox", "sh"], shell.safe_liveness(str(tmp_path)), busybox_tools) == code


@pytest.mark.parametrize("present", [(), ("stat",)])
@pytest.mark.parametrize("name", ["dash", "bash"])
def test_the_safe_probe_passes_where_tools_are_missing(
    name: str, tmp_path: Path, present: tuple[str, ...], requires: Requires
) -> None:
    """Without stat or date, even a fresh file passes: it fails open. (busybox's shell has its own tools.)"""
    requires(name)
    for tool in present:
        (tmp_path / tool).symlink_to(shutil.which(tool) or "")
    (tmp_path / "stalled").touch()
    assert sh([name], shell.safe_liveness(str(tmp_path)), str(tmp_path)) == 0


@pytest.mark.parametrize(("age", "code"), [(0.0, 88), (None, 0), (3600.0, 0)])
def test_the_restarter_exits_only_while_the_engine_is_stalled(
    interpreter: list[str], tmp_path: Path, age: float | None, code: int
) -> None:
    """Three rounds with a fresh file end it with the code of its rule; without one it goes on until SIGTERM."""
    if age is not None:
        (tmp_path / "stalled").touch()
        os.utime(tmp_path / "stalled", (time.time() - age,) * 2)
    # `sleep` is replaced by a count, which ends the loop after ten rounds.
    line = f"r=0; sleep() {{ r=$((r+1)); [ $r -le 10 ]; }}; {shell.restart(str(tmp_path), RESTART_CODE)}"
    assert sh(interpreter, line) == code


def test_the_restarters_code_is_its_rules() -> None:
    """The container's rule names the code that its line exits with, and restarts all containers."""
    _, restarter = made(probe="restart-rules")["initContainers"]
    (rule,) = restarter["restartPolicyRules"]
    assert rule == {"action": "RestartAllContainers", "exitCodes": {"operator": "In", "values": [RESTART_CODE]}}
    assert f"exit {RESTART_CODE};" in restarter["command"][-1] and restarter["restartPolicy"] == "Always"
    engine = made(probe="restart-rules")["containers"][0]
    assert "livenessProbe" not in engine and engine["lifecycle"]["preStop"] == {
        "sleep": {"seconds": ENDPOINT_REMOVAL_S}
    }


def stand(state: Any, outstanding: int) -> ProbeState:
    return ProbeState(
        Verdict(state, "r", "", 0, 0, {"condition": "x", "outstanding": outstanding, "w": 1}), True, False
    )


def test_the_sidecars_own_files_steer_both_lines(interpreter: list[str], tmp_path: Path) -> None:
    """The lines read StateDir's files: liveness fails while stalled, draining waits for outstanding requests."""
    state = StateDir(str(tmp_path))
    liveness = shell.safe_liveness(str(tmp_path))
    # Bounded to one round; `sleep` is replaced by a mark, which shows whether it waits.
    drain = f"sleep() {{ [ $1 = 1 ] && echo waited; }}; {shell.drain(str(tmp_path), 0, 1)}"

    def waited() -> bool:
        command = [*interpreter, "-c", drain]
        return b"waited" in subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE).stdout

    state.write(stand("progressing", 12), time.time())
    assert sh(interpreter, liveness) == 0 and waited()
    state.write(stand("idle", 0), time.time())
    assert sh(interpreter, liveness) == 0 and not waited()
    state.write(stand("stalled", 12), time.time())
    assert sh(interpreter, liveness) == 1 and not waited()
    state.write(replace(stand("stalled", 12), held=True), time.time())
    assert sh(interpreter, liveness) == 0 and not waited(), (
        "held back: not killed, and not waited for when it is deleted"
    )
    state.clear()
    assert sh(interpreter, liveness) == 0


def test_a_full_disk_does_not_silence_a_stall(tmp_path: Path) -> None:
    """Where no byte can be written, the engine's liveness still fails exactly while it is stalled."""
    state = StateDir(str(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for verdict, there in (("stalled", True), ("idle", False)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
        try:
            with pytest.raises(OSError, match="too large"):
                state.write(stand(verdict, 1), time.time())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert (tmp_path / "stalled").exists() is there
        assert not list(tmp_path.glob(".*"))


def test_the_state_volume_holds_what_is_written_to_it() -> None:
    """The volume fits the usage records, twice during compaction, and all diagnoses, so the pod is not evicted."""
    volumes = {v["name"]: v for v in made()["volumes"]}
    size = int(volumes["sidecar-state"]["emptyDir"]["sizeLimit"].removesuffix("Mi")) << 20
    assert size >= 2 * Settings().usage_bytes + (MAX_BUNDLES + 1) * MAX_BUNDLE_BYTES + (8 << 20)


def test_the_verdict_file_names_what_draining_waits_for(tmp_path: Path) -> None:
    """The preStop reads a key that the sidecar writes: `outstanding`."""
    from sidecar.control.state import ControlState
    from sidecar.health.monitor import TickReadings
    from sidecar.load import cost_model
    from sidecar.readings import Absent

    control = ControlState(Settings(), cost_model.Coefficients(), 0.0, 0.0)
    absent = Absent("no")
    control.tick(TickReadings(absent, absent, absent, (), None, "vllm"), 1.0, 1.0)
    assert json.loads(json.dumps(control.health.verdict.evidence))["outstanding"] == 0
