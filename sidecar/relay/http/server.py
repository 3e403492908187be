"""The listening side: all connections of clients, their deadlines, and their end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from itertools import islice
from typing import Final

from sidecar.errors import RequestError
from sidecar.relay.http.client import ClientConnection, Request
from sidecar.runtime import open_files

CHECK_INTERVAL_S: Final = 1.0
MAX_LOOKED_AT: Final = 256  # connections, for one that is idle

Handle = Callable[[Request], Awaitable[None]]
Refuse = Callable[[ClientConnection, RequestError], None]


class Server:
    """`handle` answers each request; `refuse` answers what is none, `on_check` is called each second.

    `now`: monotonic seconds, a second old at most. `max_connections`: what the limit of open files allows to serve.
    """

    def __init__(self, handle: Handle, refuse: Refuse, on_check: Callable[[float], None] = lambda now: None) -> None:
        self.handle = handle
        self.refuse = refuse
        self._on_check = on_check
        self.connections: set[ClientConnection] = set()
        self.now = time.monotonic()
        self.interval = CHECK_INTERVAL_S
        self.max_connections = open_files.max_connections(open_files.limit())
        self.is_closing = False
        self._idle: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._check()

    def __call__(self) -> ClientConnection:
        return ClientConnection(self)

    async def drain(self, seconds: float) -> bool:
        """Close idle connections and wait for the busy ones, at most `seconds`. Returns whether all became idle."""
        self.is_closing = True
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._close_idle():
                    self._idle = self._loop.create_future()
                    await self._idle
        return not self._close_idle()

    def has_room(self) -> bool:
        """Whether a connection that was accepted can be served; an idle one is closed for it."""
        if len(self.connections) <= self.max_connections:
            return True
        idle = next((one for one in islice(self.connections, MAX_LOOKED_AT) if one.is_idle), None)
        if idle is not None:
            idle.close()
        return idle is not None

    def on_idle(self) -> None:
        """A connection has ended a request."""
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    def _close_idle(self) -> bool:
        """Close the connections without a request. Returns whether others are left."""
        busy = False
        for connection in list(self.connections):
            if connection.is_busy:
                busy = True
            else:
                connection.close()
        return busy

    async def close(self) -> None:
        """Close all connections at once."""
        self.is_closing = True
        if self._timer is not None:
            self._timer.cancel()
        tasks = [connection.task for connection in self.connections if connection.task is not None]
        for connection in list(self.connections):
            connection.close(at_once=True)
        with suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await asyncio.gather(*tasks, return_exceptions=True)

    def _check(self) -> None:
        self.now = time.monotonic()
        for connection in list(self.connections):
            connection.check(self.now)
        self._on_check(self.now)
        self._timer = self._loop.call_later(CHECK_INTERVAL_S, self._check)
