"""Whether the engine's port takes connections at all.

Only a refusal counts against the engine: a connection that is slow to open is a busy machine, and an engine whose kernel
backlog is full still lives.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from urllib.parse import urlsplit


class PortSignal:
    """Connects once per `period` and hangs up. `refused_since` is None while connections are taken."""

    def __init__(
        self, engine: str, *, period: float = 1.0, timeout: float = 5.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        parts = urlsplit(engine)
        self._host = parts.hostname or "127.0.0.1"
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self.period = period  # may be changed while it runs
        self._timeout = timeout
        self._clock = clock
        self.refused_since: float | None = None
        self.opened = asyncio.Event()  # set once a connection was taken

    async def run(self) -> None:
        """Probe for ever."""
        while True:
            await self.poll()
            await asyncio.sleep(self.period)

    async def poll(self) -> None:
        """One connection."""
        try:
            async with asyncio.timeout(self._timeout):
                _, writer = await asyncio.open_connection(self._host, self._port)
        except ConnectionRefusedError:
            if self.refused_since is None:
                self.refused_since = self._clock()
            return
        except (OSError, TimeoutError):
            return  # unknown: neither open nor refused
        self.refused_since = None
        self.opened.set()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
