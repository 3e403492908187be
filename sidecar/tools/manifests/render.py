"""Print Kubernetes YAML for an engine Deployment with the sidecar.

The YAML is in parts/, with the reason for every choice that may surprise; here the pieces are put together. User input
is quoted, including names, because YAML reads some words as true or null.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from textwrap import indent
from typing import Final

from sidecar.errors import UsageError
from sidecar.health.probes import VERDICT_STALE_S
from sidecar.runtime.plugin_folders import PLUGIN_FOLDER
from sidecar.tools.manifests import shell
from sidecar.tools.manifests.answers import Answers, SettingsAnswers
from sidecar.tools.manifests.parts import fill
from sidecar.tools.manifests.settings import ENGINE_PORT, ManifestSettings, quote

RELAY_PORT, ADMIN_PORT = 8080, 9400
STATE_DIR: Final = "/run/sidecar"
# Time of a rollout before the engine starts.
ROLLOUT_MARGIN_S: Final = 600
STARTUP_PERIOD_S: Final = 5
# For open requests to finish when a pod is deleted.
DRAIN_S: Final = 120
# Until no client sends requests to a deleted pod.
ENDPOINT_REMOVAL_S: Final = 10
POD_GRACE_S: Final = ENDPOINT_REMOVAL_S + DRAIN_S + 40
# Of the sidecar's image; the group of a pod's volumes where engine and sidecar share images.
SIDECAR_GROUP: Final = 65532
# What the container `restarter` exits with, as in Kubernetes' own examples.
RESTART_CODE: Final = 88

SHM_MOUNT: Final = "- {name: engine-shm, mountPath: /dev/shm}\n"
MODELS_MOUNT: Final = "- {name: models, mountPath: /models, readOnly: true}\n"
NO_MODEL_NOTE: Final = (
    "# No SIDECAR_MODEL, so images pass through unchanged: preparing them needs the model's directory (--claim).\n"
)
MONITOR_LABELS: Final = "# By which the operator's Prometheus selects monitors.\nlabels: {}\n"
CAPABILITIES: Final = 'capabilities: {drop: ["ALL"]}\n'
PTRACE: Final = 'capabilities: {drop: ["ALL"], add: ["SYS_PTRACE"]}\n'

ports = partial(fill, admin_port=str(ADMIN_PORT), relay_port=str(RELAY_PORT))


def main(settings: ManifestSettings) -> int:
    """Print the manifests, or write the files of a chart or component."""
    from sidecar.tools.manifests import chart, component, llm_d  # they use this module

    if settings.format in ("helm", "kustomize"):
        if not settings.out:
            raise UsageError(f"--out is missing; {settings.format} is several files, so name a directory")
        write(Path(settings.out), (chart if settings.format == "helm" else component).files(settings))
        return 0
    text = llm_d.render_values(settings) if settings.format == "llm-d" else render(settings)
    if settings.out:
        write(Path(settings.out), {f"{settings.name}.yaml": text})
    else:
        print(text, end="")
    return 0


def write(folder: Path, contents: Mapping[str, str]) -> None:
    """Write files below a directory, over those of the same name. Raises UsageError."""
    try:
        for name, text in contents.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, "utf-8")
    except OSError as e:
        raise UsageError(f"--out: cannot write to {folder} ({e.strerror}); name another directory") from None


def render(settings: ManifestSettings) -> str:
    """The YAML documents as text. Raises UsageError if two settings contradict each other."""
    return "---\n".join(filter(None, documents(SettingsAnswers(settings), settings.namespace).values()))


def documents(answers: Answers, namespace: str = "") -> dict[str, str]:
    """The documents by the names of their files; empty where one is not wanted."""
    labels = f"{{app.kubernetes.io/name: {answers.value('name')}}}"
    place = f", namespace: {quote(namespace)}" if namespace else ""
    metadata = f"{{name: {answers.value('name')}{place}, labels: {labels}}}"
    monitor = partial(
        fill,
        name=answers.value("name"),
        namespace=f"namespace: {quote(namespace)}\n" if namespace else "",
        monitor_labels=answers.items("monitor_labels", MONITOR_LABELS),
        labels=labels,
    )
    return {
        "deployment": deployment(answers, metadata, labels),
        "service": fill(
            "service",
            metadata=metadata,
            labels=labels,
            relay_port=str(RELAY_PORT),
        ),
        "disruption-budget": fill("disruption-budget", metadata=metadata, labels=labels),
        "network-policy": answers.when("policy", ports("network-policy", metadata=metadata, labels=labels)),
        "pod-monitor": answers.when("podmonitor", monitor("pod-monitor")),
        "service-monitor": answers.when("servicemonitor", monitor("service-monitor")),
        "claim-template": answers.when("dra", fill("claim-template", metadata=metadata, gpus=answers.value("gpus"))),
    }


def deployment(answers: Answers, metadata: str, labels: str) -> str:
    """The Deployment."""
    surge = fill("strategy-surge", max_surge=answers.value("max_surge"))
    claim = answers.when("dra", fill("scheduling-claim", name=answers.value("name")))
    return fill(
        "deployment",
        metadata=metadata,
        labels=labels,
        replicas=answers.value("replicas"),
        strategy=answers.when("surge", surge, fill("strategy-replace")),
        startup_seconds=answers.bare("startup_seconds"),
        progress_deadline=answers.sum("startup_seconds", ROLLOUT_MARGIN_S),
        annotations=answers.when("annotations", fill("annotations", relay_port=str(RELAY_PORT))),
        endpoint_removal=str(ENDPOINT_REMOVAL_S),
        drain=str(DRAIN_S),
        pod_grace=str(POD_GRACE_S),
        shared_processes=answers.when("dumps", fill("shared-processes")),
        pod_security=answers.when(
            "reads_images", fill("pod-security-group", group=str(SIDECAR_GROUP)), fill("pod-security")
        ),
        scheduling=answers.items("pull_secrets", "imagePullSecrets: {}\n")
        + answers.items("node_selector", "nodeSelector: {}\n")
        + answers.items("tolerations", "tolerations: {}\n")
        + claim,
        sidecar=sidecar(answers),
        restarter=answers.when("rules", restarter(answers)),
        engine=engine(answers),
        volumes=fill("volumes")
        + fill("volumes-engine")
        + answers.when("claim", fill("models-claim", claim=answers.value("claim")), fill("models-download")),
    )


def sidecar(answers: Answers) -> str:
    """The sidecar's container in the Deployment."""
    fixed = {
        "SIDECAR_ENGINE": quote(f"http://127.0.0.1:{ENGINE_PORT}"),
        "SIDECAR_ENGINE_KIND": answers.value("engine_kind"),
        "SIDECAR_LISTEN": quote(f"0.0.0.0:{RELAY_PORT}"),
    }
    model = answers.when("claim", _variable("SIDECAR_MODEL", answers.value("model")), NO_MODEL_NOTE)
    gpus = answers.when("gpus", _variable("SIDECAR_GPUS", f'"{answers.bare("gpus")}"'))
    images = answers.when("shm", _variable("SIDECAR_IMAGES", '"shm"'))
    key = answers.when("key", _key("SIDECAR_ENGINE_KEY", answers))
    # Of the default /dev/shm, images would have only 64 MiB.
    mounts = answers.when("claim", SHM_MOUNT + MODELS_MOUNT, plugin_mount(answers))
    env = "".join(_variable(name, value) for name, value in fixed.items())
    return container(
        answers,
        env + _admin() + model + gpus + images + key,
        own_ports=f"- {{name: relay, containerPort: {RELAY_PORT}}}\n",
        mounts=mounts,
        claims=answers.when("dra", "claims: [{name: gpus}]\n"),
    )


def container(answers: Answers, env: str, *, own_ports: str = "", mounts: str = "", claims: str = "") -> str:
    """The sidecar's container in any pod. The others are lists in YAML, in addition to what it always has."""
    amounts = {name: answers.bare(name) for name in ("sidecar_cpus", "sidecar_memory")}
    resources = (fill(f"sidecar-resources-{qos}", **amounts) for qos in ("guaranteed", "burstable"))
    return fill(
        "sidecar",
        sidecar_image=answers.value("sidecar_image"),
        sidecar_env=env,
        sidecar_ports=own_ports,
        admin_port=str(ADMIN_PORT),
        sidecar_resources=answers.when("guaranteed", *resources) + claims,
        sidecar_user=answers.when("dumps", fill("user-root"), fill("user-sidecar")),
        sidecar_capabilities=answers.when("dumps", PTRACE, CAPABILITIES),
        state_dir=STATE_DIR,
        sidecar_mounts=mounts,
    )


def plugin_variable(answers: Answers) -> str:
    """The variable by which vLLM and SGLang load the plug-in; nothing for other engines."""
    return answers.when("plugin", fill("plugin", state_dir=STATE_DIR, plugin_folder=PLUGIN_FOLDER))


def plugin_mount(answers: Answers) -> str:
    """The folder in memory through which the plug-in reports, in both containers; nothing for other engines."""
    return answers.when("plugin", SHM_MOUNT)


def added_plugin(answers: Answers) -> dict[str, str]:
    """What a container and its pod need for the plug-in, by the place in a part that adds the sidecar to them."""
    return {
        "engine_env": answers.when("plugin", "env:\n" + indent(plugin_variable(answers), "  ")),
        "engine_mounts": plugin_mount(answers),
        "volumes": fill("volumes") + answers.when("plugin", fill("volumes-engine")),
    }


def restarter(answers: Answers) -> str:
    """The container whose exit code restarts all others."""
    return fill(
        "restarter",
        sidecar_image=answers.value("sidecar_image"),
        restart_code=str(RESTART_CODE),
        restart_line=quote(shell.restart(STATE_DIR, RESTART_CODE)),
        state_dir=STATE_DIR,
    )


def engine(answers: Answers) -> str:
    """The engine's container."""
    image, command, args = answers.engine()
    gpus = answers.pick("plugin_gpus", f', nvidia.com/gpu: "{answers.bare("gpus")}"')
    return fill(
        "engine",
        engine_image=image,
        engine_command=command,
        engine_args=args,
        # a variable of the user's comes after, and counts
        engine_env=plugin_variable(answers)
        + answers.when("shm", fill("connector"))
        + answers.each("env")
        + answers.when("key", _key("VLLM_API_KEY", answers)),
        engine_env_from=answers.when(
            "env_from", f"envFrom: [{{secretRef: {{name: {answers.value('env_secret')}}}}}]\n"
        ),
        engine_probes=probes(answers),
        engine_size=f'{{cpu: "{answers.bare("cpus")}", memory: {answers.bare("memory")}{gpus}}}',
        engine_claims=answers.when("dra", "claims: [{name: gpus}]\n"),
        state_dir=STATE_DIR,
        engine_mounts=answers.when("claim", MODELS_MOUNT, "- {name: models, mountPath: /root/.cache/huggingface}\n"),
    )


def probes(answers: Answers, replace: str = "") -> str:
    """The engine's probes and preStop. `replace`: a line for patches, which would merge probes otherwise."""
    stale, line = f"{VERDICT_STALE_S:.0f}", quote(shell.safe_liveness(STATE_DIR))
    safe = fill("liveness-safe", stale=stale, liveness_line=line, replace=replace)
    http = fill("liveness-http", admin_port=str(ADMIN_PORT), replace=replace)
    drain = quote(shell.drain(STATE_DIR, ENDPOINT_REMOVAL_S, DRAIN_S))
    return fill(
        "engine-probes",
        startup_seconds=answers.bare("startup_seconds"),
        admin_port=str(ADMIN_PORT),
        startup_period=str(STARTUP_PERIOD_S),
        startup_tries=answers.sum("startup_seconds", STARTUP_PERIOD_S - 1, STARTUP_PERIOD_S),
        liveness=answers.when("safe", safe)
        + answers.when("http", http)
        + answers.when("rules", fill("liveness-none") + ("livenessProbe: null\n" if replace else "")),
        pre_stop=answers.when(
            "safe",
            fill("pre-stop-drain", drain_line=drain),
            fill("pre-stop-sleep", endpoint_removal=str(ENDPOINT_REMOVAL_S)),
        ),
    )


def added_env(engine_kind: str, port: int, engine_port: int) -> str:
    """The variables of a sidecar that takes over the port of an engine that exists."""
    values = {
        "SIDECAR_ENGINE": f"http://127.0.0.1:{engine_port}",
        "SIDECAR_ENGINE_KIND": engine_kind,
        "SIDECAR_LISTEN": f"0.0.0.0:{port}",
    }
    return "".join(_variable(name, quote(value)) for name, value in values.items()) + _admin()


def _admin() -> str:
    return _variable("SIDECAR_ADMIN", quote(f"0.0.0.0:{ADMIN_PORT}")) + _variable("SIDECAR_STATE_DIR", quote(STATE_DIR))


def _variable(name: str, value: str) -> str:
    return f"- {{name: {name}, value: {value}}}\n"


def _key(name: str, answers: Answers) -> str:
    """The engine's API key, which its container and the sidecar's get from one Secret."""
    source = f"{{secretKeyRef: {{name: {answers.value('key_secret')}, key: api-key}}}}"
    return f"- {{name: {name}, valueFrom: {source}}}\n"
