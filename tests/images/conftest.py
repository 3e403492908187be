"""A real image server for every test here that needs one, and pictures of every kind.

The server is started once (a start takes a while); a test that breaks it on purpose starts one of its own.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from sidecar import settings as options
from sidecar.images.service import ImageService
from sidecar.kernels import families
from sidecar.kernels.grid import ProcessorSpec
from sidecar.settings import Settings
from tests.waiting import PATIENCE

from .published import settings

# Qwen2-VL with small images, so that small photographs lose more than half of their pixels, and are prepared inline
QWEN2_VL = settings("Qwen2VLImageProcessor", max_pixels=224 * 224)


def children(pid: int) -> list[int]:
    """Process ids of a process's children."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


class Server:
    """A running image server. `pid` is the fork server's."""

    def __init__(self, folder: Path, chosen: Settings, env: dict[str, str] | None = None) -> None:
        self.path = str(folder / "images.sock")
        self.settings = chosen
        self.env = env or {}
        self.listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listening.bind(self.path)
        self.listening.listen(64)
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        fd = self.listening.fileno()
        command = [sys.executable, "-m", "sidecar", "image-server", "--listen-fd", str(fd)]
        process = subprocess.Popen(command, pass_fds=[fd], stdin=subprocess.PIPE, env={**os.environ, **self.env})
        stdin = process.stdin
        assert stdin is not None
        _tell(stdin, self.settings)
        return process

    @property
    def pid(self) -> int:
        return self.process.pid

    def workers(self) -> list[int]:
        """Process ids of the workers that are alive."""
        return children(self.pid)

    def restart(self) -> None:
        """Kill the server and start another one on the same socket."""
        self.process.kill()
        self.process.wait()
        self.process = self._start()

    def stop(self) -> int:
        """End it as its parent would; returns its exit status."""
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(PATIENCE)
        self.listening.close()
        return status


def _tell(stdin: IO[bytes], chosen: Settings) -> None:
    stdin.write(options.to_json(chosen).encode() + b"\n")
    stdin.close()


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines that run tests are busy: give a starting server more time than users should wait."""
    monkeypatch.setattr("sidecar.images.worker_queue.QUEUE_TIMEOUT_S", 90.0)
    monkeypatch.setattr("sidecar.images.worker_queue.INLINE_WAIT_S", 90.0)


@pytest.fixture(scope="session")
def spec() -> ProcessorSpec:
    """Qwen2-VL's processor, with small images."""
    found = families.from_config(QWEN2_VL)
    assert found is not None
    return found


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """A function: settings -> a running server, ended with the session at the latest."""
    started: list[Server] = []

    def start(env: dict[str, str] | None = None, **chosen: object) -> Server:
        few: dict[str, Any] = {"image_workers": 2, "images_device": "cpu", **chosen}
        started.append(Server(tmp_path_factory.mktemp("images"), Settings(**few), env))
        return started[-1]

    yield start
    for server in started:  # all at once: each takes a while
        server.process.terminate()
    for server in started:
        server.process.wait(PATIENCE)
        server.listening.close()


@pytest.fixture(scope="session")
def server(start_server: Callable[..., Server]) -> Server:
    """The shared server: two workers, limits as by default but smaller."""
    return start_server(image_max_pixels=20_000_000)


@pytest.fixture
async def images(server: Server, spec: ProcessorSpec) -> ImageService:
    """A client of the shared server."""
    return ImageService(server.path, server.settings, spec)
