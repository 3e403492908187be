"""Whether the engine's port accepts connections.

Only a refusal counts against the engine. A connection that is slow to open means a busy machine, and an engine with a
full backlog is alive.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Final

from sidecar.signals.listening_socket import host_and_port

CONNECT_TIMEOUT_S: Final = 5.0


class PortSignal:
    """Connects once per `period` and disconnects. `refused_since` is None while connections are accepted."""

    def __init__(self, engine: str) -> None:
        self._host, self._port = host_and_port(engine)
        self.period = 1.0  # seconds; the caller may change it
        self.refused_since: float | None = None
        self.opened = asyncio.Event()  # set by the first accepted connection

    async def run(self) -> None:
        """Probe until cancelled."""
        while True:
            await self.poll()
            await asyncio.sleep(self.period)

    async def poll(self) -> None:
        """Connect once."""
        try:
            _, writer = await asyncio.wait_for(asyncio.open_connection(self._host, self._port), CONNECT_TIMEOUT_S)
        except ConnectionRefusedError:
            self.refused_since = self.refused_since or time.monotonic()
            return
        except OSError:  # TimeoutError included
            return  # unknown: neither open nor refused
        self.refused_since = None
        self.opened.set()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
