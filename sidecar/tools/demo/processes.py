"""The demo's addresses, its temporary directory, and the two containers of its pod. Nothing is started here.

A port in use is replaced by a free one, with a note to the user. The containers inherit no SIDECAR_* variables, which
are meant for other commands.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import socket
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

from sidecar.errors import StartError
from sidecar.health.probe_policy import Kind, ProbeSpec
from sidecar.launch.preflight import IMAGE_MODULES
from sidecar.settings import ENV_PREFIX, Settings, format_key
from sidecar.tools.demo.kubelet import Container

Address = tuple[str, int]

MODEL: Final = "scripted"
PORT_RANGE: Final = (20_000, 32_000)  # below 32768, from where Linux takes ports for outgoing connections
MAX_PORTS_TRIED: Final = 100

# Shorter than the defaults of `sidecar run`, so that a stall is found within seconds instead of half a minute. The
# engine stalls on purpose every minute, so nothing holds back a kill.
QUICK_SETTINGS: Final = {
    "silence_floor": "3",
    "silence_kill": "9",
    "canary_interval": "3",
    "kill_interval": "0",
    "useless_restarts": "0",
}
# Kubernetes' defaults: 10 s, 1 s (which a laptop busy with the demo may miss), 30 s, 10 s before the second restart.
PROBE_PERIOD_S: Final = 1.0
PROBE_TIMEOUT_S: Final = 2.0
GRACE_S: Final = 5.0
BACKOFF_S: Final = 2.0
STARTUP_FAILURE_THRESHOLD: Final = 120
ENGINE_LOAD_S: Final = "2"  # long enough to show that a start-up is not mistaken for a stall

# The image processor of a Qwen2-VL: public numbers, and all that image preparation needs of a model.
# Its images are small, so that the demo's photographs lose half of their pixels; others pass.
PREPROCESSOR: Final[dict[str, object]] = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "min_pixels": 3136,
    "max_pixels": 448 * 448,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


@dataclass(frozen=True, slots=True)
class DemoProcesses:
    """Addresses and files of one demo. `directory` is temporary; `notes` are lines for the user."""

    directory: Path
    engine: Address
    relay: Address
    admin: Address
    images: bool
    notes: tuple[str, ...]

    @property
    def sidecar_log(self) -> Path:
        """All output of the sidecar."""
        return self.directory / "sidecar.log"

    @property
    def engine_log(self) -> Path:
        """All output of the engine."""
        return self.directory / "engine.log"

    def sidecar(self) -> Container:
        """The sidecar's container."""
        flags = {
            "engine": url(self.engine),
            "engine_kind": "scripted",
            "listen": format_address(self.relay),
            "admin": format_address(self.admin),
            "state_dir": str(self.directory / "state"),
            "model": str(self.directory / "model"),
            "images": "auto" if self.images else "off",
            "drain_seconds": "1",
            **QUICK_SETTINGS,
        }
        startup = ProbeSpec(f"{url(self.admin)}/healthz", 0.25, PROBE_TIMEOUT_S, 4 * STARTUP_FAILURE_THRESHOLD)
        command = _command("run", flags)
        return Container(command, {"startup": startup}, 2 * GRACE_S, env=_environment(), log=self.sidecar_log)

    def engine_container(self) -> Container:
        """The engine's container, probed through the sidecar."""

        def probe(path: str, failures: int) -> ProbeSpec:
            return ProbeSpec(f"{url(self.admin)}{path}", PROBE_PERIOD_S, PROBE_TIMEOUT_S, failures)

        command = _command("engine", {"listen": format_address(self.engine), "load_seconds": ENGINE_LOAD_S})
        probes: dict[Kind, ProbeSpec] = {
            "startup": probe("/startupz", STARTUP_FAILURE_THRESHOLD),
            "readiness": probe("/readyz", 1),
            "liveness": probe("/livez", 3),
        }
        return Container(command, probes, GRACE_S, BACKOFF_S, env=_environment(), log=self.engine_log)


def make(listen: Address, admin: Address) -> DemoProcesses:
    """Choose the addresses and write the files. The caller removes `directory`."""
    chosen, notes = {}, []
    for name, wanted in (("listen", listen), ("admin", admin)):
        chosen[name] = find_free_address(wanted)
        if wanted[1] and chosen[name] != wanted:
            instead = f"{format_key(name)} is {format_address(chosen[name])} instead"
            notes.append(f"{format_address(wanted)} is in use; {instead}")
    missing = [module for module in IMAGE_MODULES if importlib.util.find_spec(module) is None]
    if missing:
        remedy = "for photographs: pip install 'inference-sidecar[images]'"
        notes.append(f"text only: {', '.join(missing)} not installed; {remedy}")
    directory = Path(tempfile.mkdtemp(prefix="sidecar-demo-"))
    for name in ("model", "state"):
        (directory / name).mkdir()
    (directory / "model" / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    (directory / "model" / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
    engine = find_free_address(("127.0.0.1", 0))
    return DemoProcesses(directory, engine, chosen["listen"], chosen["admin"], not missing, tuple(notes))


def find_free_address(wanted: Address) -> Address:
    """The wanted address if it can be bound, otherwise the next free port of that host. Raises StartError.

    Port 0 picks a port below those for outgoing connections, which the kernel could reuse before the server binds it.
    """
    host, first = wanted[0], wanted[1] or random.randrange(*PORT_RANGE)
    for port in range(first, min(first + MAX_PORTS_TRIED, 65536)):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                trial.bind((host, port))
                return host, port
    raise StartError(f"no port from {first} on can be bound on {host}; choose another with --listen and --admin")


def url(address: Address) -> str:
    """An address as a base URL that a client on this machine can use."""
    host, port = address
    return f"http://{format_address(({'0.0.0.0': '127.0.0.1', '::': '::1'}.get(host, host), port))}"


def format_address(address: Address) -> str:
    """HOST:PORT, with brackets where the host is an IPv6 address."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def describe_quick_settings() -> str:
    """The settings in which the demo differs from `sidecar run`, as text."""
    usual = {f.name: f.default for f in fields(Settings)}
    flags = ", ".join(f"{format_key(name)} {value} (default {usual[name]:g})" for name, value in QUICK_SETTINGS.items())
    return (
        f"{flags}; probes every {PROBE_PERIOD_S:g} s (Kubernetes: 10 s), timeout {PROBE_TIMEOUT_S:g} s (1 s), "
        f"grace {GRACE_S:g} s (30 s), crash back-off from {BACKOFF_S:g} s (10 s)"
    )


def _command(name: str, values: Mapping[str, str]) -> tuple[str, ...]:
    flags = [text for key, value in values.items() for text in (format_key(key), value)]
    return (sys.executable, "-m", "sidecar", name, *flags)


def _environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(ENV_PREFIX)}
    return {**kept, "PYTHONUNBUFFERED": "1"}
