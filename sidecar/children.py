"""Child processes that are started again when they end: the relay processes and the image server.

Rules: a child that ends is reported before it is started again; restarts back off; ending them is bounded, by pid.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable

from sidecar.errors import StartError

BACKOFF_FIRST, BACKOFF_MOST = 0.2, 10.0  # seconds between restarts of a child that keeps ending
STEADY = 30.0  # seconds of life after which the back-off starts anew

_log = logging.getLogger(__name__)

Started = Callable[[asyncio.subprocess.Process], Awaitable[None]]


class Child:
    """One supervised process, run as `python -m sidecar ARGS` with the given file descriptors inherited."""

    def __init__(self, name: str, args: Callable[[], tuple[list[str], list[int]]], started: Started) -> None:
        self.name = name
        self._args = args
        self._started = started
        self.process: asyncio.subprocess.Process | None = None
        self.restarts = 0
        self._stopping = False

    @property
    def pid(self) -> int:
        """Its process id; 0 while there is none."""
        return self.process.pid if self.process else 0

    async def run(self, ended: Callable[[], Awaitable[None]]) -> None:
        """Start it, await its end, report, start it again; until stopped."""
        pause = BACKOFF_FIRST
        while True:
            born = time.monotonic()
            await self._spawn()
            assert self.process is not None
            code = await self.process.wait()
            await ended()
            if self._stopping:
                return
            pause = BACKOFF_FIRST if time.monotonic() - born > STEADY else min(pause * 2, BACKOFF_MOST)
            self.restarts += 1
            _log.error("%s (pid %d) ended with %s; starting it again", self.name, self.pid, _how(code))
            await asyncio.sleep(pause)

    async def _spawn(self) -> None:
        args, fds = self._args()
        try:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "sidecar", *args, pass_fds=fds, stdin=asyncio.subprocess.PIPE
            )
        except OSError as e:
            raise StartError(f"cannot start {self.name}: {e.strerror}") from None
        finally:
            for fd in fds:
                with contextlib.suppress(OSError):
                    os.close(fd)
        await self._started(self.process)

    async def stop(self, grace: float) -> None:
        """SIGTERM, at most `grace` seconds, then SIGKILL."""
        self._stopping = True
        if self.process is None or self.process.returncode is not None:
            return
        self.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace):
                await self.process.wait()
        except TimeoutError:
            _log.warning("%s (pid %d) did not end in %.0f s; killing it", self.name, self.pid, grace)
            self.signal(signal.SIGKILL)
            await self.process.wait()

    def signal(self, number: int) -> None:
        """Send a signal, if it still lives."""
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)


def _how(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
