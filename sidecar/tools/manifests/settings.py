"""Settings of the manifests, and how each engine is started. Every value is validated before it is rendered."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from typing import Final

from sidecar import __version__
from sidecar.errors import UsageError
from sidecar.flags import Parser, checked, directory, flag, integer, matching, one_of, parser, text

ENGINE_PORT: Final = 8000
# The memory request of the sidecar; a lower limit is rejected.
SIDECAR_MEMORY: Final = "512Mi"

_LABEL: Final = r"[a-z]([a-z0-9-]{0,51}[a-z0-9])?"
label = matching(_LABEL, "a lower-case DNS label")
optional_label = matching(f"({_LABEL})?", "a lower-case DNS label")
reference = matching(r"\S+", "an image")
optional_reference = matching(r"\S*", "an image")


def quantity(least: str = "1") -> Parser:
    """A parser of Kubernetes quantities: 1k is 1000, 1Ki is 1024, 1K is invalid."""
    bound = f" of {least} or more" if least != "1" else ""
    return checked(lambda value: amount(value) >= amount(least), f"a quantity{bound}, such as 64Gi", "SIZE")


def amount(value: str) -> int:
    match = re.fullmatch(r"([1-9][0-9]{0,15})([kMGT]?|[KMGT]i)", value)
    if not match:
        raise ValueError
    unit: int = (1024 if match[2].endswith("i") else 1000) ** " kmgt".index(match[2][:1].lower() or " ")
    return int(match[1]) * unit


@parser("closed quotes", "TEXT")
def arguments(value: str) -> str:
    shlex.split(value)  # raises ValueError on a quote that is never closed
    return value


def quote(value: str) -> str:
    """A quoted YAML string: JSON, but with YAML's escapes beyond ASCII, as YAML has no surrogate pairs."""
    return re.sub(r"[^ -~]", lambda m: f"\\U{ord(m[0]):08x}", json.dumps(value, ensure_ascii=False))


def words(pattern: str, expected: str) -> Parser:
    """A parser of words as in a shell, each of which matches a whole pattern."""
    one = re.compile(pattern, re.S)
    return checked(lambda text: all(map(one.fullmatch, shlex.split(text))), expected, "WORDS")


_SUBDOMAIN: Final = r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?"
_KEY: Final = rf"({_SUBDOMAIN}/)?[A-Za-z0-9]([-A-Za-z0-9_.]{{0,61}}[A-Za-z0-9])?"
_VALUE: Final = r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?"
labels = words(f"{_KEY}={_VALUE}", "words KEY=VALUE, each a label")
variables = words(r"[A-Za-z_][A-Za-z0-9_]*=.*", "words NAME=VALUE, quoted as in a shell")
taints = words(f"{_KEY}(={_VALUE})?:(NoSchedule|PreferNoSchedule|NoExecute)", "words KEY[=VALUE]:EFFECT")
names = words(_SUBDOMAIN, "names of Secrets")
optional_name = matching(f"({_SUBDOMAIN})?", "a Secret's name")


@dataclass(frozen=True, slots=True)
class EngineCommand:
    """How to start an engine that only this pod can reach. `flags` may use {model}, {port} and {gpus}."""

    image: str
    command: str
    flags: str
    many_gpus: str = ""


# Only images that this project is tested with are named; the other engines need --image.
KINDS: Final[dict[str, EngineCommand]] = {
    "vllm": EngineCommand(
        "vllm/vllm-openai:v0.32.0",
        "vllm serve",
        "{model} --host=127.0.0.1 --port={port} --enable-prompt-tokens-details",
        "--tensor-parallel-size={gpus}",
    ),
    "sglang": EngineCommand(
        "",
        "python3 -m sglang.launch_server",
        "--model-path={model} --host=127.0.0.1 --port={port} --enable-metrics",
        "--tp-size={gpus}",
    ),
    "tgi": EngineCommand(
        "", "text-generation-launcher", "--model-id={model} --hostname=127.0.0.1 --port={port}", "--num-shard={gpus}"
    ),
    "llamacpp": EngineCommand("", "/app/llama-server", "--model={model} --host=127.0.0.1 --port={port} --metrics"),
    "scripted": EngineCommand(
        f"inference-sidecar:{__version__}", "sidecar engine", "--listen=127.0.0.1:{port} --served-model={model}"
    ),
}


@dataclass(frozen=True, slots=True)
class ManifestSettings:
    """Settings of `sidecar manifests`."""

    format: str = flag(
        "yaml",
        one_of("yaml", "helm", "kustomize", "llm-d"),
        "What is printed: manifests, or values for llm-d's chart; a Helm chart and a Kustomize component are several "
        "files, in the directory --out",
        heading="Output",
    )
    out: str = flag("", directory, "Directory to write the files to; default: standard output")
    container: str = flag("engine", label, "Kustomize and llm-d: name of the engine's container, the first of its pod")
    port: int = flag(8000, integer(1, 65_535), "Kustomize and llm-d: port of the engine, which the relay takes over")

    name: str = flag("llm", label, "Name of the Deployment and its Service", heading="Deployment")
    namespace: str = flag("", optional_label, "Namespace; default: kubectl's own")
    engine_kind: str = flag(
        "vllm",
        one_of(*KINDS),
        "Which engine it is",
        expected=f"one of {', '.join(KINDS)} (auto cannot be rendered)",
        heading="Engine",
    )
    model: str = flag("Qwen/Qwen2.5-VL-7B-Instruct", text, "The model: a hub's name, or a directory below /models")
    image: str = flag("", optional_reference, "The engine's image; default: the tested one, if any")
    sidecar_image: str = flag(f"inference-sidecar:{__version__}", reference, "The sidecar's image")
    engine_args: str = flag("", arguments, "More arguments of the engine, as in a shell")
    gpus: int = flag(1, integer(0, 64), "GPUs of the engine")
    cpus: int = flag(8, integer(1, 512), "CPUs of the engine")
    memory: str = flag("64Gi", quantity(), "Memory of the engine")
    sidecar_cpus: int = flag(
        2, integer(1, 128), "CPUs of the sidecar; it prepares that many images at once", heading="Sidecar"
    )
    sidecar_memory: str = flag("4Gi", quantity(SIDECAR_MEMORY), f"Memory of the sidecar, at least {SIDECAR_MEMORY}")
    replicas: int = flag(1, integer(0, 10_000), "Pods", heading="Deployment")
    max_surge: int = flag(
        0,
        integer(0, 10_000),
        "Pods that a rollout may add, each with GPUs of its own; 0: it replaces one pod after the other",
    )
    # A cold start compiles for 10-20 minutes.
    startup_seconds: int = flag(
        3600, integer(60, 86_400, "seconds"), "Longest time until the engine serves its first token"
    )
    claim: str = flag(
        "",
        optional_label,
        "PersistentVolumeClaim with the models, mounted at /models; needed to prepare images",
        heading="Engine",
    )
    images: str = flag(
        "auto",
        one_of("auto", "shm"),
        "How the engine gets prepared images; shm: through shared memory, by the plugin in vLLM's image; needs --claim",
        heading="Sidecar",
    )
    probe: str = flag(
        "safe",
        one_of("safe", "http", "restart-rules"),
        "How a stalled engine is restarted: safe cannot kill a healthy one; for images without a shell, restart-rules "
        "cannot either (Kubernetes 1.36 or later), and http fails closed",
        heading="Probes, metrics and access",
    )
    monitor: str = flag(
        "annotations",
        one_of("annotations", "podmonitor", "servicemonitor", "none"),
        "How Prometheus finds the pods",
    )
    monitor_labels: str = flag("", labels, "Labels of the monitor, as the Prometheus of an operator selects them")
    network_policy: str = flag("on", one_of("on", "off"), "Whether only relay and metrics can be reached from outside")
    qos: str = flag(
        "guaranteed",
        one_of("guaranteed", "burstable"),
        "Class of the pod; guaranteed: all that the sidecar may use is reserved, so the engine keeps exclusive CPUs",
        heading="Deployment",
    )
    gpu_access: str = flag(
        "none",
        one_of("none", "dra"),
        "How the sidecar sees the engine's GPUs; dra: both share a claim (Kubernetes 1.34, NVIDIA's DRA driver)",
        heading="Sidecar",
    )
    env: str = flag("", variables, "Variables of the engine", heading="Engine")
    env_secret: str = flag("", optional_name, "Secret whose keys become variables of the engine, such as HF_TOKEN")
    key_secret: str = flag("", optional_name, "Secret with vLLM's API key under `api-key`, for engine and sidecar")
    pull_secrets: str = flag("", names, "Secrets to pull the images with", heading="Deployment")
    node_selector: str = flag("", labels, "Labels of the nodes")
    tolerations: str = flag("", taints, "Taints of the nodes that the pods tolerate")
    stack_dumps: str = flag(
        "off",
        one_of("off", "on"),
        "Whether the sidecar may read the engine's stacks when it hangs: it then runs as root with SYS_PTRACE",
        heading="Sidecar",
    )


def start(settings: ManifestSettings) -> tuple[str, str, str]:
    """The engine's image, command and arguments, as YAML. Raises UsageError."""
    kind = KINDS[settings.engine_kind]
    image = settings.image or kind.image
    if not image:
        raise UsageError(f"--image is missing; no image of {settings.engine_kind} is tested, so name the one you use")
    below = "/models/" if settings.claim else "/"
    if settings.model.startswith(below) != bool(settings.claim):
        raise UsageError("--claim and a --model below /models, where that claim is mounted, go together")
    if settings.images == "shm" and not (settings.claim and settings.engine_kind == "vllm"):
        raise UsageError("--images shm needs vLLM and the model's directory: --claim and a --model below /models")
    if settings.key_secret and settings.engine_kind != "vllm":
        raise UsageError("--key-secret is for vLLM; give other engines their key with --env-secret")
    lines = (f"- {quote(arg)}\n" for arg in arguments_of(settings, settings.model))
    return quote(image), json.dumps(kind.command.split()), "".join(lines)


def arguments_of(settings: ManifestSettings, model: str) -> list[str]:
    """The engine's arguments, the model as it is to be called there."""
    kind = KINDS[settings.engine_kind]
    flags = f"{kind.flags} {kind.many_gpus if settings.gpus > 1 else ''}".split()
    args = [flag.format(model=model, port=ENGINE_PORT, gpus=settings.gpus) for flag in flags]
    return [*args, *shlex.split(settings.engine_args)]
