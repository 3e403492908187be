"""Real processes that listen on a port and do one thing, for tests that look at processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_PROGRAM = """
import socket, sys, threading, time
SECRET = "a prompt of a user"
listener = socket.create_server(("127.0.0.1", 0))
def spin_here(prompt):
    print(listener.getsockname()[1], flush=True)
    while True: pass
def sleep_here(prompt):
    print(listener.getsockname()[1], flush=True)
    time.sleep(1000)
globals()[sys.argv[1]](SECRET)
"""


@dataclass
class Victim:
    """One such process."""

    process: subprocess.Popen[str]
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self.process.pid


@contextmanager
def victim(
    does: str = "sleep_here",
    program: str = _PROGRAM,
    command: tuple[str, ...] = (),
    python: str = sys.executable,
    user: int | None = None,
) -> Iterator[Victim]:
    """A process that does `sleep_here` or `spin_here`, or another program or command that prints its port first."""
    argv = command or (python, "-c", program, does, "--api-key=sk-secret")
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, user=user) as process:
        try:
            assert process.stdout is not None
            yield Victim(process, int(process.stdout.readline()))
        finally:
            process.kill()
