"""Settings: frozen data, and the one table of flags.

Each field of a settings class is a flag `--its-name`, an environment variable `SIDECAR_ITS_NAME` and a key `its-name` (or
`its_name`) of the TOML file given by `--config`. Precedence: flag, environment, file, default. Whatever is unknown or
invalid raises UsageError with one line that names the key, what was expected, and the nearest valid key; of a key that once
existed the line says what became of it.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import msgspec

from sidecar.errors import UsageError
from sidecar.flags import (
    ENGINE_KINDS,
    address,
    directory,
    domains,
    existing_dir,
    existing_file,
    flag,
    gpu,
    header_name,
    integer,
    number,
    one_of,
    size,
    text,
    url,
)

S = TypeVar("S")

ENV_PREFIX = "SIDECAR_"
# Kubernetes injects these for a Service that happens to be named `sidecar`; they are nobody's settings.
_SERVICE_LINK = re.compile(r"^SIDECAR_(SERVICE_(HOST|PORT.*)|PORT(_.*)?)$")


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of `sidecar run`. Seconds, bytes and tokens unless the help says otherwise."""

    engine: str = flag("", url, "Base URL of the engine, e.g. http://127.0.0.1:8000")
    engine_kind: str = flag("auto", one_of(*ENGINE_KINDS), "Which engine it is")
    listen: tuple[str, int] = flag(("0.0.0.0", 8080), address, "Where the relay listens")
    admin: tuple[str, int] = flag(("0.0.0.0", 9400), address, "Where probes, load, metrics and the page are")
    workers: int = flag(1, integer(1, 64), "Relay processes")
    model: str = flag("", existing_dir, "The model's directory (config.json, preprocessor_config.json, tokenizer.json)")
    coefficients: str = flag(
        "", existing_file, "Coefficients file of this model and hardware; default: a roofline of --model on its GPU"
    )
    gpu: str = flag(
        "", gpu, "The engine's GPUs, such as H100 or 2xL40S, for that roofline; default: what NVML sees, else an H100"
    )
    state_dir: str = flag("/run/sidecar", directory, "Directory shared with the engine's container")
    tenant_header: str = flag("x-tenant-id", header_name, "Request header that names the tenant")
    tenant_limits: str = flag(
        "",
        existing_file,
        "TOML or JSON file of limits per tenant: model units per minute and in flight; read again when it changes",
    )
    max_tenants: int = flag(50, integer(1, 10_000), "Tenants and models told apart in metrics; more are `other`")
    images: str = flag(
        "auto",
        one_of("auto", "off", "inline", "shm"),
        "Image hand-off; auto: inline where the model's processor is known, else off",
    )
    images_device: str = flag(
        "auto",
        one_of("auto", "cpu", "cuda"),
        "Where images are resized; auto: on a GPU that is visible here, else on the CPU",
    )
    gpu_memory_budget: int = flag(1 << 30, size, "GPU memory that image work may use (bytes, or 1G)")
    image_workers: int = flag(0, integer(0, 64), "Image worker processes; 0: one per core of the CPU quota")
    image_max_bytes: int = flag(20 << 20, size, "Largest encoded image")
    image_max_pixels: int = flag(50_000_000, integer(1, 1_000_000_000), "Most pixels of one image")
    image_urls: str = flag(
        "off",
        domains,
        "Domains that images behind links are fetched from, such as img.example.com,*.example.org; off: links are the engine's",
    )
    image_cache_bytes: int = flag(256 << 20, size, "Prepared images kept in shared memory; 0 keeps none")
    max_body_bytes: int = flag(256 << 20, size, "Largest request body")
    max_concurrent: int = flag(
        0,
        integer(0, 1_000_000),
        "Requests that the engine runs at once (vLLM: max_num_seqs); past it less one, which the canary finds free, requests wait "
        "in the relay; 0: no limit",
    )
    retry_stalled: float = flag(
        0.0,
        number(0, 3600, "seconds"),
        "How long a request of which nothing was answered when the engine stalled waits for its recovery, to be sent once more; "
        "0: it ends at once",
    )
    silence_floor: float = flag(
        12.0,
        number(0.5, 600, "seconds"),
        "Shortest silence that can raise suspicion; 60 s until ten first tokens were seen",
    )
    silence_cap: float = flag(
        900.0,
        number(1, 86_400, "seconds"),
        "Longest silence that is ever allowed; an API that answers nothing has 90 s more",
    )
    kill_interval: float = flag(
        300.0,
        number(0, 86_400, "seconds"),
        "Shortest time between two kills; it doubles from kill to kill, up to an hour",
    )
    useless_restarts: int = flag(
        2,
        integer(0, 100),
        "Restarts in a row that did not help, before the engine is handed over to an operator; 0: never",
    )
    canary_interval: float = flag(7.0, number(0.5, 3600, "seconds"), "Time between canaries of an idle engine")
    canary_model: str = flag("", text, "Model name for the canary; default: the first of /v1/models")
    engine_key: str = flag("", text, "API key for our own requests to the engine", secret=True)
    slo_seconds: float = flag(10.0, number(0.1, 3600, "seconds"), "Request time that max_in_flight is derived from")
    usage_days: int = flag(35, integer(1, 3660), "Days of usage records kept")
    usage_bytes: int = flag(64 << 20, size, "Largest size of the usage records; 0 keeps none")
    dollars_per_gpu_hour: float = flag(
        0.0, number(0, 10_000, "dollars"), "Price for sidecar_cost_dollars_total; 0: no such series"
    )
    orca_grpc: tuple[str, int] | Literal[""] = flag(
        "",
        address,
        "Where load reports are streamed over gRPC, for ORCA out of band; none: nowhere; needs the extra `orca`",
    )
    otlp_endpoint: str = flag("", url, "OTLP/HTTP collector for spans; empty: tracing off")
    drain_seconds: float = flag(30.0, number(0, 3600, "seconds"), "Longest wait for open streams after SIGTERM")
    log_level: str = flag("info", one_of("debug", "info", "warning", "error"), "Least severe log line")


# What became of settings that once existed, of any command; the error names it and adds this sentence.
REMOVED: Final = {
    "client-stall-seconds": "it is fixed at 600",
    "images-decode": "JPEGs are always decoded at their full size, because only that is exact",
    "image-max-count": "it is fixed at 16 images of one request",
    "image-queue": "it is fixed at 64 images that wait for a worker, per relay process",
    "image-seconds": "it is fixed at 10",
    "kill-healthy": "kills and a hand-over are forgotten after an hour of health",
    "kill-interval-cap": "the time between two kills grows up to an hour, or to --kill-interval where that is longer",
    "kill-jitter": "replicas that stall at once are killed within 10 s, each at its own time",
    "kill-recovery": "a restart was useless where the engine stalls again within 10 minutes of its first token",
    "log-format": "log lines are text on a terminal, and JSON anywhere else",
    "max-queued": "it is fixed at 1000 requests that wait, per relay process",
    "orca": "an answer has the header where its request has endpoint-load-metrics-format: JSON, TEXT or BIN",
    "restart-budget": "each pod decides alone when to restart its engine, within --kill-interval",
    "restart-budget-wait": "there is no restart budget to wait for",
    "restarts-at-once": "each pod decides alone when to restart its engine, within --kill-interval",
    "shm-dir": "it is /dev/shm, for vLLM's plugin too",
    "silence-blocked": "it is 90 s, and a third of --silence-cap at most",
    "silence-margin": "it is fixed at 3",
    "silence-unlearned": "it is 60 s, and a fifth of --silence-cap at most",
    "tokenizer": "prompt tokens are counted where --model has a tokenizer.json and the extra `tokenizer` is installed",
}


def load(
    cls: type[S],
    flags: Mapping[str, str | None],
    env: Mapping[str, str],
    config: str | None = None,
    *,
    also: tuple[type, ...] = (),
) -> S:
    """Merge flags (field name -> text), environment and TOML file into `cls`. Raises UsageError.

    `also` names settings classes of other commands whose keys are accepted in the environment and the file unused, so that
    one file can serve several commands.
    """
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    others = {f.name for other in also for f in fields(other)}
    config = config or env.get(ENV_PREFIX + "CONFIG")
    merged: dict[str, Any] = {}
    for source, values in (("file", _from_file(config)), ("environment", _from_env(env)), ("flag", flags)):
        for key, value in values.items():
            name = key.replace("-", "_")
            if value is None or (name not in known and name in others):
                continue
            if name not in known:
                raise UsageError(removal(key, source) or _unknown(source, key, [*known, *others]))
            merged[name] = _parse(known[name], str(value), source)
    return cls(**merged)


def to_json(settings: Settings) -> str:
    """The settings as JSON, to hand to another process over a private pipe (it carries secrets)."""
    return msgspec.json.encode(settings).decode()


def from_json(text: str) -> Settings:
    """Inverse of to_json."""
    return msgspec.json.decode(text, type=Settings)


def spelled(name: str, source: str = "flag") -> str:
    """How a setting is written in a source."""
    if source == "environment":
        return ENV_PREFIX + name.upper().replace("-", "_")
    return "--" + name.replace("_", "-") if source == "flag" else name.replace("_", "-")


def removal(name: str, source: str = "flag") -> str | None:
    """What became of a setting that once existed, as one line; None for any other name."""
    sentence = REMOVED.get(name.lstrip("-").replace("_", "-"))
    return sentence and f"{spelled(name.lstrip('-'), source)} no longer exists: {sentence}; see docs/reference.md"


def default_of(f: Field[Any]) -> Any:
    """A field's default, or None where it has none."""
    return None if f.default is MISSING else f.default


def writable(name: str, path: str) -> None:
    """See that a file can be written, before minutes are spent on what it is to hold. Raises UsageError that names the flag."""
    file = Path(path)
    if file.is_dir():
        raise UsageError(f"--{name}: {path} is a directory; name a file")
    if not file.parent.is_dir():
        raise UsageError(f"--{name}: the directory of {path} does not exist")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise UsageError(f"--{name}: {path} may not be written; name another file")


def shown(f: Field[Any]) -> str:
    """A field's default for people, in its unit: sizes in M, "none" where there is none."""
    value = default_of(f)
    if isinstance(value, tuple):
        return f"{value[0]}:{value[1]}"
    if isinstance(value, int) and value >= 1 << 20 and value % (1 << 20) == 0:
        return f"{value >> 20}M"
    return f"{value:g}" if isinstance(value, float) else str(value) if value != "" else "none"


def _from_file(path: str | None) -> dict[str, Any]:
    if not path:
        return {}
    try:
        with Path(path).open("rb") as f:
            raw = tomllib.load(f)
    except OSError as e:
        raise UsageError(f"--config: cannot read {path}: {e.strerror}") from None
    except ValueError as e:  # a TOMLDecodeError, or bytes that are no UTF-8
        raise UsageError(f"--config: {path} is not TOML: {e}") from None
    return {k: str(v).lower() if isinstance(v, bool) else v for k, v in raw.items()}


def _from_env(env: Mapping[str, str]) -> dict[str, str]:
    return {
        key[len(ENV_PREFIX) :].lower(): value
        for key, value in env.items()
        if key.startswith(ENV_PREFIX) and key != ENV_PREFIX + "CONFIG" and not _SERVICE_LINK.match(key)
    }


def _unknown(source: str, key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key.replace("-", "_"), known, n=1, cutoff=0.0)
    return f"unknown {source} key {spelled(key, source)}; the nearest valid key is {spelled(near[0], source)}"


def _parse(f: Field[Any], value: str, source: str) -> Any:
    try:
        return f.metadata["parser"].parse(value)
    except ValueError:
        shown = "a value" if f.metadata["secret"] else repr(value[:80])
        raise UsageError(f"{spelled(f.name, source)}: {shown} is not {f.metadata['parser'].expected}") from None
