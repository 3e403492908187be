"""Engine and client: load.cpp, compiled at first use, so that neither is what limits a figure."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .processes import answers, cores, free_port, running, until

SOURCE = Path(__file__).with_name("load.cpp")
BUILD = Path(__file__).parents[2] / "build"
FULL_TIMEOUT_S = 30.0


def program() -> str:
    """The compiled load.cpp."""
    path = BUILD / f"load-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]}"
    if not path.exists():
        BUILD.mkdir(exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}")
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            raise SystemExit(f"{compiler} is not installed; it compiles the client and the engine")
        subprocess.run([compiler, "-std=c++17", "-O2", "-Wall", "-Wextra", "-o", str(fresh), str(SOURCE)], check=True)
        fresh.replace(path)
    return str(path)


@contextlib.contextmanager
def engine() -> Iterator[int]:
    """An engine that runs; yields its port."""
    port = free_port()
    with running(cores()[0], [program(), "engine", str(port)]) as process:
        until(lambda: answers(f"http://127.0.0.1:{port}/health"), process)
        yield port


@dataclass(frozen=True, slots=True)
class Figures:
    """What a client saw in one window of time. Times are of requests, or of chunks from their sending on."""

    seconds: float
    requests: int
    chunks: int
    errors: int
    active: int
    p50_us: float
    p99_us: float
    max_us: float
    max_gap_us: float


@dataclass(frozen=True, slots=True)
class Load:
    """Closed-loop load over `connections`. No `chunks`: one-token requests; no `pace_ms`: streams at full speed."""

    connections: int
    chunks: int = 0
    pace_ms: float = 0.0
    tenants: int = 0  # 0: requests name none

    def command(self, port: int) -> list[str]:
        if not self.chunks:
            return [program(), "requests", str(port), str(self.connections), str(self.tenants)]
        pace_us = str(round(self.pace_ms * 1000))
        return [program(), "streams", str(port), str(self.connections), str(self.chunks), pace_us]


class LoadClient:
    """A client at work."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def look(self) -> Figures:
        """What it saw since the last look."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return Figures(**json.loads(self._process.stdout.readline()))

    def until_all_answered(self, connections: int) -> None:
        """Wait until each connection has had a byte; a route that cannot bring it so far is measured as it is."""
        deadline = time.monotonic() + FULL_TIMEOUT_S
        while self.look().active < connections and time.monotonic() < deadline:
            time.sleep(0.05)


@contextlib.contextmanager
def client(port: int, load: Load) -> Iterator[LoadClient]:
    """A client at work on a port until the block ends."""
    command = ["taskset", "-c", str(cores()[0]), *load.command(port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield LoadClient(process)
