"""The two real processes of these tests: a vLLM server on a tiny model, and the sidecar next to it.

Rules: loopback and free ports only; each in its own process group with its output in a file; ready means served, not
merely listening; every wait is bounded; at the end no process of a group is left, not even a stopped one.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil

from ..ports import free_port
from . import environment

ROOT = Path(__file__).resolve().parents[2]
MODEL = "tiny"  # the name it is served under
# A minute on an idle machine; four beside other tests.
START_SECONDS = 400.0
END_SECONDS = 20.0
ENGINE_ENV = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
DEVELOPMENT = {"VLLM_SERVER_DEV_MODE": "1"}  # /pause, /sleep and their signs, which production has not
# float32: bfloat16 crashes on a CPU without AMX. No prefix cache: equal requests must compute the same.
# Trusted, so that a request may set how its images are processed, which the sidecar must respect. Comments into silent
# streams, so that a hung engine sends bytes without tokens, which must not count as progress.
ENGINE_FLAGS = (
    "--dtype",
    "float32",
    "--enforce-eager",
    "--max-model-len",
    "4096",
    "--no-enable-prefix-caching",
    "--trust-request-mm-kwargs",
    "--sse-keep-alive-interval",
    "1",
)
SIDECAR_FLAGS = {
    "canary-interval": "1",
    "silence-floor": "3",
    "silence-kill": "9",
    "kill-interval": "0",  # one sidecar sees several hangs
    "silence-cap": "30",  # so 6 s before anything is learned
    "drain-seconds": "2",
    "engine-kind": "vllm",
}


class NotReady(Exception):
    """A process ended, or did not serve in time; the message holds the end of its output."""


@dataclass(frozen=True, slots=True)
class Engine:
    """A vLLM that serves `model` at `url`. `root` is the API server; the core and the worker are its descendants."""

    url: str
    model: Path
    root: psutil.Process

    def process(self, title: str) -> psutil.Process:
        """The process titled `VLLM::<title>`: "EngineCore" or "Worker"."""
        return next(p for p in self.root.children(recursive=True) if "".join(p.cmdline()[:1]) == f"VLLM::{title}")


@dataclass(frozen=True, slots=True)
class Sidecar:
    """`sidecar run` next to an engine: the relay at `url`, the admin port at `admin`."""

    url: str
    admin: str
    state: Path
    process: subprocess.Popen[bytes]


@contextlib.contextmanager
def engine(
    model: Path,
    log: Path,
    *,
    port: int = 0,
    ready: bool = True,
    environ: Mapping[str, str] = MappingProxyType({}),
    more: Sequence[str] = (),
) -> Iterator[Engine]:
    """Run vLLM on `model`, with `more` flags; with `ready`, until it has served one token. Raises NotReady."""
    port = port or free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        str(environment.python()),
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(model),
        "--served-model-name",
        MODEL,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        *ENGINE_FLAGS,
        *more,
    ]
    env = (
        {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        | ENGINE_ENV
        | dict(environ)
    )
    with running(command, log, env) as process:
        if ready:
            wait_for(lambda: _serves(url), process, log, START_SECONDS)
        yield Engine(url, model, psutil.Process(process.pid))


def with_plugin(site: Path) -> dict[str, str]:
    """Install the plugin in a separate folder, not into the shared environment; returns the engine's variables."""
    uv = [
        environment.find_uv(),
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(site),
        str(ROOT / "plugins/vllm"),
    ]
    subprocess.run([*uv, "--python", str(environment.python())], check=True, timeout=120)
    return {"PYTHONPATH": str(site), "VLLM_MEDIA_CONNECTOR": "inference_sidecar"}


@contextlib.contextmanager
def sidecar(engine_url: str, state: Path, log: Path, **flags: str) -> Iterator[Sidecar]:
    """Run the sidecar next to `engine_url` until its relay and admin port respond. `flags` override SIDECAR_FLAGS."""
    relay, admin = free_port(), free_port()
    chosen = SIDECAR_FLAGS | {name.replace("_", "-"): value for name, value in flags.items()}
    command = [
        sys.executable,
        "-m",
        "sidecar",
        "run",
        "--engine",
        engine_url,
        "--listen",
        f"127.0.0.1:{relay}",
        "--admin",
        f"127.0.0.1:{admin}",
        "--state-dir",
        str(state),
        *(word for name, value in chosen.items() for word in (f"--{name}", value)),
    ]
    env = {key: value for key, value in os.environ.items() if not key.startswith("SIDECAR_")}
    with running(command, log, env) as process:
        wait_for(lambda: http_status(f"http://127.0.0.1:{admin}/healthz") == 200, process, log, 60)
        yield Sidecar(f"http://127.0.0.1:{relay}", f"http://127.0.0.1:{admin}", state, process)


@contextlib.contextmanager
def running(
    command: Sequence[str], log: Path, env: Mapping[str, str], cwd: Path = ROOT
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command in a process group of its own; nothing of the group is left at the end."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Send SIGTERM to the first process, resume stopped ones, then send SIGKILL to the rest of its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGCONT)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(END_SECONDS)
    deadline = time.monotonic() + END_SECONDS
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)  # the first process is gone; its orphans may still be freeing gigabytes
            time.sleep(0.05)


def wait_for(ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, seconds: float) -> None:
    """Wait until it is ready. Raises NotReady."""
    deadline = time.monotonic() + seconds
    while not ready():
        if process.poll() is not None:
            raise NotReady(f"it ended with {process.returncode}:\n{_tail(log)}")
        if time.monotonic() > deadline:
            raise NotReady(f"not ready after {seconds:.0f} s:\n{_tail(log)}")
        time.sleep(0.1)


def _serves(url: str) -> bool:
    return (
        http_status(f"{url}/v1/models") == 200
        and http_status(f"{url}/v1/completions", {"model": MODEL, "prompt": "1", "max_tokens": 1}) == 200
    )


def http_status(
    url: str,
    body: dict[str, Any] | None = None,
    headers: Mapping[str, str] = MappingProxyType({}),
    trust: ssl.SSLContext | None = None,
) -> int:
    """HTTP status of a GET, or of a POST with `body`; 0 when nothing answers."""
    data = json.dumps(body).encode() if body else None
    try:
        request = urllib.request.Request(url, data, {"content-type": "application/json", **headers})
        with urllib.request.urlopen(request, timeout=30, context=trust) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as e:
        with e:
            return e.code
    except OSError:
        return 0


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-30:])
