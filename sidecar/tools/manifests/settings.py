"""Settings of the manifests, and how each engine is started. Every value is validated before it is rendered."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from typing import Final

from sidecar import __version__
from sidecar.errors import UsageError
from sidecar.flags import Parse, flag, integer, one_of, text

ENGINE_PORT: Final = 8000
# The memory request of the sidecar; a lower limit is rejected.
SIDECAR_MEMORY: Final = "512Mi"


def label(value: str) -> str:
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,51}[a-z0-9])?", value):
        raise ValueError
    return value


def optional_label(value: str) -> str:
    return label(value) if value else ""


def reference(value: str) -> str:
    if not re.fullmatch(r"\S+", value):
        raise ValueError
    return value


def optional_reference(value: str) -> str:
    return reference(value) if value else ""


def quantity(least: str = "1") -> Parse:
    """A parser of Kubernetes quantities: 1k is 1000, 1Ki is 1024, 1K is invalid."""

    def parse(value: str) -> str:
        if amount(value) < amount(least):
            raise ValueError
        return value

    return parse


def amount(value: str) -> int:
    match = re.fullmatch(r"([1-9][0-9]{0,15})([kMGT]?|[KMGT]i)", value)
    if not match:
        raise ValueError
    unit: int = (1024 if match[2].endswith("i") else 1000) ** " kmgt".index(match[2][:1].lower() or " ")
    return int(match[1]) * unit


def arguments(value: str) -> str:
    shlex.split(value)  # raises ValueError on a quote that is never closed
    return value


def quote(value: str) -> str:
    """A quoted YAML string: JSON, but with YAML's escapes beyond ASCII, as YAML has no surrogate pairs."""
    return re.sub(r"[^ -~]", lambda m: f"\\U{ord(m[0]):08x}", json.dumps(value, ensure_ascii=False))


@dataclass(frozen=True, slots=True)
class EngineCommand:
    """How to start an engine that only this pod can reach. `flags` may use {model} and {gpus}."""

    image: str
    command: tuple[str, ...]
    flags: tuple[str, ...]
    many_gpus: tuple[str, ...] = ()


# Only images that this project is tested with are named; the other engines need --image.
KINDS: Final[dict[str, EngineCommand]] = {
    "vllm": EngineCommand(
        "vllm/vllm-openai:v0.32.0",
        ("vllm", "serve"),
        ("{model}", "--host=127.0.0.1", f"--port={ENGINE_PORT}", "--enable-prompt-tokens-details"),
        ("--tensor-parallel-size={gpus}",),
    ),
    "sglang": EngineCommand(
        "",
        ("python3", "-m", "sglang.launch_server"),
        ("--model-path={model}", "--host=127.0.0.1", f"--port={ENGINE_PORT}", "--enable-metrics"),
        ("--tp-size={gpus}",),
    ),
    "tgi": EngineCommand(
        "",
        ("text-generation-launcher",),
        ("--model-id={model}", "--hostname=127.0.0.1", f"--port={ENGINE_PORT}"),
        ("--num-shard={gpus}",),
    ),
    "llamacpp": EngineCommand(
        "",
        ("/app/llama-server",),
        ("--model={model}", "--host=127.0.0.1", f"--port={ENGINE_PORT}", "--metrics"),
    ),
    "scripted": EngineCommand(
        f"inference-sidecar:{__version__}",
        ("sidecar", "engine"),
        (f"--listen=127.0.0.1:{ENGINE_PORT}", "--served-model={model}"),
    ),
}


@dataclass(frozen=True, slots=True)
class ManifestSettings:
    """Settings of `sidecar manifests`."""

    name: str = flag("llm", label, "Name of the Deployment and its Service", expected="a lower-case DNS label")
    namespace: str = flag("", optional_label, "Namespace; default: kubectl's own", expected="a lower-case DNS label")
    engine_kind: str = flag(
        "vllm",
        one_of(*KINDS),
        "Which engine it is",
        expected="one of " + ", ".join(KINDS) + " (auto cannot be rendered)",
    )
    model: str = flag(
        "Qwen/Qwen2.5-VL-7B-Instruct", text, "The model: a hub's name, or a directory below /models", expected="a name"
    )
    image: str = flag(
        "", optional_reference, "The engine's image; default: the tested one, if any", expected="an image"
    )
    sidecar_image: str = flag(f"inference-sidecar:{__version__}", reference, "The sidecar's image", expected="an image")
    engine_args: str = flag("", arguments, "More arguments of the engine, as in a shell", expected="closed quotes")
    gpus: int = flag(1, integer(0, 64), "GPUs of the engine", expected="a whole number from 0 to 64")
    cpus: int = flag(8, integer(1, 512), "CPUs of the engine", expected="a whole number from 1 to 512")
    memory: str = flag("64Gi", quantity(), "Memory of the engine", expected="a quantity such as 64Gi")
    sidecar_cpus: int = flag(
        2,
        integer(1, 128),
        "CPUs of the sidecar; it prepares that many images at once",
        expected="a whole number from 1",
    )
    sidecar_memory: str = flag(
        "4Gi",
        quantity(SIDECAR_MEMORY),
        f"Memory of the sidecar, at least {SIDECAR_MEMORY}",
        expected=f"a quantity of {SIDECAR_MEMORY} or more, such as 4Gi",
    )
    replicas: int = flag(1, integer(0, 10_000), "Pods", expected="a whole number from 0 to 10000")
    max_surge: int = flag(
        0,
        integer(0, 10_000),
        "Pods that a rollout may add, each with GPUs of its own; 0: it replaces one pod after the other",
        expected="a whole number from 0 to 10000",
    )
    startup_seconds: int = flag(
        3600,  # a cold start compiles for 10-20 minutes
        integer(60, 86_400),
        "Longest time until the engine serves its first token",
        expected="seconds from 60 to 86400",
    )
    claim: str = flag(
        "",
        optional_label,
        "PersistentVolumeClaim with the models, mounted at /models; needed to prepare images",
        expected="a lower-case DNS label",
    )
    images: str = flag(
        "auto",
        one_of("auto", "shm"),
        "How the engine gets prepared images; shm: through shared memory, by the plugin in vLLM's image; needs --claim",
        expected="one of auto, shm",
    )
    probe: str = flag(
        "safe",
        one_of("safe", "http"),
        "The engine's livenessProbe: safe cannot kill a healthy engine, http fails closed",
        expected="one of safe, http",
    )
    monitor: str = flag(
        "annotations",
        one_of("annotations", "podmonitor", "none"),
        "How Prometheus finds the pods",
        expected="one of annotations, podmonitor, none",
    )
    stack_dumps: str = flag(
        "off",
        one_of("off", "on"),
        "Whether the sidecar may read the engine's stacks when it hangs: it then runs as root with SYS_PTRACE",
        expected="one of off, on",
    )


def start(settings: ManifestSettings) -> tuple[str, str, str]:
    """The engine's image, command and arguments, as YAML. Raises UsageError."""
    kind = KINDS[settings.engine_kind]
    image = settings.image or kind.image
    if not image:
        raise UsageError(f"--image is missing; no image of {settings.engine_kind} is tested, so name the one you use")
    if settings.model.startswith("/models/") != bool(settings.claim) or (
        settings.model.startswith("/") and not settings.claim
    ):
        raise UsageError("--claim and a --model below /models, where that claim is mounted, go together")
    if settings.images == "shm" and not (settings.claim and settings.engine_kind == "vllm"):
        raise UsageError("--images shm needs vLLM and the model's directory: --claim and a --model below /models")
    flags = (*kind.flags, *(kind.many_gpus if settings.gpus > 1 else ()))
    args = [f.format(model=settings.model, gpus=settings.gpus) for f in flags] + shlex.split(settings.engine_args)
    return quote(image), json.dumps(kind.command), "".join(f"- {quote(arg)}\n" for arg in args)
