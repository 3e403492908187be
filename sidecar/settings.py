"""The settings of `sidecar run`, and how settings are read.

- Each field of a settings class is a flag `--its-name`, an environment variable `SIDECAR_ITS_NAME`, and a key
  `its-name` (or `its_name`) of the TOML file that `--config` names. Precedence: flag, environment, file, default.
- An unknown key or an invalid value raises UsageError: one line with the key, what was expected, the nearest valid key.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import msgspec

from sidecar import flags
from sidecar.errors import UsageError
from sidecar.flags import ENGINE_KINDS, Parser, address, existing_file, flag, integer, number, one_of, size, text, url

S = TypeVar("S")
Texts = Mapping[str, str | None]

ENV_PREFIX: Final = "SIDECAR_"
# Kubernetes injects these variables for a Service named `sidecar`. They are not settings.
_SERVICE_LINK: Final = re.compile(r"^SIDECAR_(SERVICE_(HOST|PORT.*)|PORT(_.*)?)$")


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of `sidecar run`. Seconds, bytes and tokens unless the help says otherwise."""

    engine: str = flag(
        "",
        flags.engine_url,
        "Base URL of the engine, e.g. http://127.0.0.1:8000, or its socket, e.g. unix:/run/vllm.sock",
        heading="Engine and model",
    )
    engine_ca: str = flag("", flags.ca_file, "Authorities of an https engine's certificate (PEM); none: the system's")
    engine_kind: str = flag("auto", one_of(*ENGINE_KINDS), "Kind of the engine; auto: recognised by its responses")
    listen: tuple[str, int] = flag(
        ("0.0.0.0", 8080), address, "Address of the relay", heading="Addresses and processes"
    )
    tls_cert: str = flag("", existing_file, "Certificate chain of the relay's port (PEM); read again when it changes")
    tls_key: str = flag("", existing_file, "Its private key (PEM)")
    admin: tuple[str, int] = flag(("0.0.0.0", 9400), address, "Address of probes, load, metrics and the status page")
    admin_paths: str = flag(
        "refuse",
        one_of("refuse", "pass"),
        "Paths that control the engine (/sleep, /update_weights, /flush_cache, ...), on the relay's port; refuse: from "
        "other machines",
    )
    workers: int = flag(1, integer(1, 64), "Number of relay processes")
    model: str = flag(
        "",
        flags.existing_dir,
        "Model directory: config.json, preprocessor_config.json, tokenizer.json",
        heading="Engine and model",
    )
    coefficients: str = flag("", existing_file, "Coefficients file; default: a roofline of --model on its GPU")
    gpu: str = flag("", flags.gpu, "GPUs of that roofline, e.g. H100 or 2xL40S; default: as NVML reports, else an H100")
    gpus: int = flag(
        0,
        integer(0, 1024),
        "Number of the engine's GPUs, for GPU seconds and dollars; 0: from --gpu, the engine or NVML",
    )
    state_dir: str = flag(
        "/run/sidecar",
        flags.directory,
        "Directory shared with the engine's container",
        heading="Addresses and processes",
    )
    tenant_header: str = flag(
        "x-tenant-id", flags.header_name, "Request header that names the tenant", heading="Tenants and limits"
    )
    tenant_limits: str = flag(
        "", existing_file, "TOML or JSON file of model units per minute and in flight by tenant; reloaded when changed"
    )
    max_tenants: int = flag(
        50, integer(1, 10_000), "Tenants and models with labels in metrics and usage records; others are `other`"
    )
    images: str = flag(
        "auto",
        one_of("auto", "off", "inline", "shm"),
        "How prepared images reach the engine; auto: what costs least, if the model's processor is known, else off",
        heading="Images",
    )
    images_device: str = flag(
        "auto", one_of("auto", "cpu", "cuda"), "Where images are resized; auto: on a visible GPU, else on the CPU"
    )
    gpu_memory_budget: int = flag(1 << 30, size, "GPU memory limit for image work (bytes, or 1G)")
    image_workers: int = flag(0, integer(0, 64), "Number of image worker processes; 0: one per core of the CPU quota")
    image_max_bytes: int = flag(20 << 20, size, "Maximum size of an encoded image")
    image_max_pixels: int = flag(50_000_000, integer(1, 1_000_000_000), "Maximum number of pixels of an image")
    image_urls: str = flag(
        "off", flags.domains, "Domains to fetch linked images from: img.example.com,*.example.org; off: the engine does"
    )
    image_key_file: str = flag(
        "", existing_file, "Secret that all replicas share, so that an image has one name in all engines' caches (vLLM)"
    )
    image_cache_bytes: int = flag(256 << 20, size, "Size of the cache of prepared images in shared memory; 0: no cache")
    render: str = flag(
        "off",
        one_of("off", "on"),
        "Whether the relay answers vLLM's /render paths itself where it can exactly; needs --model and the extra "
        "`render`",
        heading="Engine and model",
    )
    max_body_bytes: int = flag(256 << 20, size, "Maximum size of a request body", heading="Tenants and limits")
    max_concurrent: int = flag(
        0,
        integer(0, 1_000_000),
        "Requests that the engine runs at once (vLLM: max_num_seqs); the relay sends one fewer, to keep a place for "
        "the canary, and queues the rest; 0: no limit",
    )
    silence_floor: float = flag(
        12.0,
        number(0.5, 600, "seconds"),
        "Minimum silence before the engine is suspect; 60 s before ten first tokens",
        heading="Progress and restarts",
    )
    silence_kill: float = flag(
        75.0,
        number(0.5, 86_400, "seconds"),
        "Minimum silence before liveness fails, if a canary confirms it; readiness fails earlier, at --silence-floor",
    )
    silence_cap: float = flag(
        900.0, number(1, 86_400, "seconds"), "Maximum silence allowed; 90 s more while the engine's API is silent"
    )
    kill_interval: float = flag(
        300.0,
        number(0, 86_400, "seconds"),
        "Minimum time between two kills with little service between; doubles with each, up to an hour",
    )
    useless_restarts: int = flag(
        2,
        integer(0, 100),
        "Restarts without recovery, after which an operator must act and only one an hour is tried; 0: never",
    )
    canary_interval: float = flag(7.0, number(0.5, 3600, "seconds"), "Time between canaries while the engine is idle")
    canary_model: str = flag("", text, "Model name in canaries; default: one that is loaded, or that users used last")
    engine_key: str = flag(
        "", text, "API key for the sidecar's own requests to the engine", secret=True, heading="Engine and model"
    )
    slo_seconds: float = flag(
        10.0,
        number(0.1, 3600, "seconds"),
        "Target request time; max_in_flight follows from it",
        heading="Load and objectives",
    )
    slo_ttft_seconds: float = flag(
        2.0,
        number(0.01, 3600, "seconds"),
        "Target time to first token; sets the queue and TTFT parts of the utilisation",
    )
    capacity: str = flag(
        "measured",
        one_of("measured", "coefficients"),
        "Capacity to relate load to; measured: the coefficients' capacity at the engine's own speed, once known",
    )
    usage_days: int = flag(35, integer(1, 3660), "Days to keep usage records", heading="Usage and billing")
    usage_bytes: int = flag(64 << 20, size, "Maximum size of the usage records; 0: keep none")
    usage_url: str = flag(
        "",
        flags.postgres_url,
        "PostgreSQL database for usage records by the hour (postgresql://...); none: only the state directory; needs "
        "the extra `postgres`",
        secret=True,
    )
    request_log_bytes: int = flag(
        0, size, "Maximum size of the log of requests in the state directory (JSON lines, no content); 0: no log"
    )
    dollars_per_gpu_hour: float = flag(
        0.0, number(0, 10_000, "dollars"), "Price of an hour of one GPU, for usage records and metrics; 0: unknown"
    )
    orca_grpc: tuple[str, int] | Literal[""] = flag(
        "",
        address,
        "Address of the gRPC stream of load reports (ORCA, out of band); none: off; needs the extra `orca`",
        heading="Reports and logs",
    )
    otlp_endpoint: str = flag("", url, "OTLP collector for spans; none: as OTEL_EXPORTER_OTLP_ENDPOINT says")
    drain_seconds: float = flag(
        30.0,
        number(0, 3600, "seconds"),
        "Maximum wait for open streams after SIGTERM",
        heading="Addresses and processes",
    )
    log_level: str = flag(
        "info", one_of("debug", "info", "warning", "error"), "Minimum level of log lines", heading="Reports and logs"
    )


# Settings that no longer exist, of any command. The error names the setting and appends this sentence.
REMOVED: Final = {
    "client-stall-seconds": "it is fixed at 600",
    "images-decode": "JPEGs are always decoded at full size, because only that is exact",
    "image-max-count": "it is fixed at 16 images per request",
    "image-queue": "it is fixed at 64 queued images per relay process",
    "image-seconds": "it is fixed at 10",
    "kill-healthy": "ten minutes of service end an escalation, an hour one for a broken GPU",
    "kill-interval-cap": "the time between two kills grows up to an hour, or to --kill-interval if that is longer",
    "kill-jitter": "replicas that stall at the same time are killed within 10 s, each at its own time",
    "kill-recovery": "6 minutes of service pay for a kill, 10 minutes without a break for all",
    "log-format": "log lines are text on a terminal, and JSON elsewhere",
    "max-queued": "it is fixed at 1000 queued requests per relay process",
    "orca": "a response has the header if its request has endpoint-load-metrics-format: JSON, TEXT or BIN",
    "restart-budget": "each pod decides alone when to restart its engine, within --kill-interval",
    "restart-budget-wait": "there is no restart budget to wait for",
    "restarts-at-once": "each pod decides alone when to restart its engine, within --kill-interval",
    "retry-stalled": "a request fails at once when its engine stalls; clients send it again",
    "shm-dir": "it is /dev/shm, for vLLM's plugin too",
    "silence-blocked": "it is 90 s, and at most a third of --silence-cap",
    "silence-margin": "it is fixed at 3",
    "silence-unlearned": "it is 60 s, and at most a fifth of --silence-cap",
    "tokenizer": "prompt tokens are counted if --model has a tokenizer.json and the extra `tokenizer` is installed",
}


def load(
    cls: type[S], flags: Texts, env: Mapping[str, str], config: str | None = None, *, also: tuple[type, ...] = ()
) -> S:
    """Merge flags (field name -> text), environment and TOML file into `cls`. Raises UsageError.

    Keys of the settings classes in `also`, those of other commands, are ignored: one file can serve several commands.
    """
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    others = {f.name for other in also for f in fields(other)}
    config = config or env.get(ENV_PREFIX + "CONFIG")
    merged: dict[str, Any] = {}
    for source, values in (("file", _read_file(config)), ("environment", _read_env(env)), ("flag", flags)):
        for key, value in values.items():
            name = key.replace("-", "_")
            name = f"{name}_" if f"{name}_" in known else name  # of a field that would be a Python keyword: from_
            if value is None or (name not in known and name in others):
                continue
            if name not in known:
                raise UsageError(explain_removed(key, source) or _explain_unknown(source, key, [*known, *others]))
            merged[name] = _parse(known[name], str(value), source)
    return cls(**merged)


def to_json(settings: Settings) -> str:
    """Encode settings for another process. The JSON holds secrets: send it through a private pipe only."""
    return msgspec.json.encode(settings).decode()


def from_json(text: str) -> Settings:
    return msgspec.json.decode(text, type=Settings)


def format_key(name: str, source: str = "flag") -> str:
    """How a setting is written in a source: flag, environment or file."""
    name = name.rstrip("_")
    if source == "environment":
        return ENV_PREFIX + name.upper().replace("-", "_")
    return "--" + name.replace("_", "-") if source == "flag" else name.replace("_", "-")


def explain_removed(name: str, source: str = "flag") -> str | None:
    """The error for a setting that no longer exists; None for any other name."""
    name = name.lstrip("-")
    why = REMOVED.get(name.replace("_", "-"))
    return why and f"{format_key(name, source)} no longer exists: {why}; see docs/reference.md"


def require_writable(name: str, path: str) -> None:
    """Check that a file can be written, before its content is measured for minutes. Raises UsageError."""
    file = Path(path)
    if file.is_dir():
        raise UsageError(f"--{name}: {path} is a directory; name a file")
    if not file.parent.is_dir():
        raise UsageError(f"--{name}: the directory of {path} does not exist")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise UsageError(f"--{name}: no permission to write {path}; name another file")


def format_default(setting: Field[Any]) -> str:
    """A field's default for users: sizes in M, "none" for an empty one."""
    value = setting.default
    if isinstance(value, tuple):
        return f"{value[0]}:{value[1]}"
    if isinstance(value, int) and value >= 1 << 20 and value % (1 << 20) == 0:
        return f"{value >> 20}M"
    return f"{value:g}" if isinstance(value, float) else str(value) if value != "" else "none"


def _read_file(path: str | None) -> dict[str, Any]:
    if not path:
        return {}
    try:
        with Path(path).open("rb") as f:
            raw = tomllib.load(f)
    except OSError as e:
        raise UsageError(f"--config: cannot read {path}: {e.strerror}") from None
    except ValueError as e:  # a TOMLDecodeError, or bytes that are not UTF-8
        raise UsageError(f"--config: {path} is not TOML: {e}") from None
    return {k: str(v).lower() if isinstance(v, bool) else v for k, v in raw.items()}


def _read_env(env: Mapping[str, str]) -> dict[str, str]:
    return {
        key[len(ENV_PREFIX) :].lower(): value
        for key, value in env.items()
        if key.startswith(ENV_PREFIX) and key != ENV_PREFIX + "CONFIG" and not _SERVICE_LINK.match(key)
    }


def _explain_unknown(source: str, key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key.replace("-", "_"), known, n=1, cutoff=0.0)
    return f"unknown {source} key {format_key(key, source)}; the nearest valid key is {format_key(near[0], source)}"


def _parse(setting: Field[Any], value: str, source: str) -> Any:
    parser: Parser = setting.metadata["parser"]
    try:
        return parser.parse(value)
    except ValueError:
        shown = "a value" if setting.metadata["secret"] else repr(value[:80])
        raise UsageError(f"{format_key(setting.name, source)}: {shown} is not {parser.expected}") from None
