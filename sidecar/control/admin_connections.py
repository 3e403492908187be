"""The connections to the admin port: few, none held for nothing, and the newest always comes in.

Rules: over a bound one is closed, of the client with most of them: the one that has been idle for longest, or if none
has been for a second, the one whose request has been under way for longest. So whoever holds many closes their own, and
a probe, which takes a millisecond, is the last to go. A head must be whole, and a kept connection be used again, within
a time.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import Final

from aiohttp import web

from sidecar.errors import place_of
from sidecar.runtime import open_files
from sidecar.runtime.limited_log import LimitedLog

MAX_CONNECTIONS: Final = 256
MAX_PER_CLIENT: Final = 64
FRESH_S: Final = 1.0  # a connection that came just now has no request yet
HEAD_TIMEOUT_S: Final = 10.0  # from the connection to its first whole head
IDLE_TIMEOUT_S: Final = 75.0  # Prometheus and kubelet ask every minute or more often
CHECK_INTERVAL_S: Final = 1.0
RETRY_S: Final = 0.1  # after an accept that failed

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class AdminConnection:
    """One connection; `since`: when it came, or when its last request began or ended."""

    client: str
    since: float
    transport: asyncio.Transport | None = None  # None: it is being set up
    requests: int = 0
    is_busy: bool = False

    @property
    def is_closed(self) -> bool:
        return self.transport is not None and self.transport.is_closing()

    def close(self) -> None:
        """End it, whatever is under way."""
        if self.transport is not None:
            self.transport.abort()

    def is_overdue(self, now: float) -> bool:
        """Whether it has been idle for too long."""
        allowed = IDLE_TIMEOUT_S if self.requests else HEAD_TIMEOUT_S
        return not self.is_busy and now - self.since >= allowed


@dataclass(frozen=True, slots=True)
class AdminLimits:
    """How many connections there may be, in all and of one client."""

    all: int
    per_client: int


def admin_limits(nofile_limit: int) -> AdminLimits:
    """At most a quarter of the files that a process may open; the rest is for its own work."""
    most = max(4, min(MAX_CONNECTIONS, nofile_limit // 4))
    return AdminLimits(most, max(1, min(MAX_PER_CLIENT, most // 4)))


def to_close(
    open_: Collection[AdminConnection], client: str, limits: AdminLimits, now: float
) -> AdminConnection | None:
    """The connection that makes room for a new one of `client`; None if there is room."""
    counts = Counter(connection.client for connection in open_)
    if counts[client] >= limits.per_client:
        of = client
    elif open_ and len(open_) >= limits.all:
        of = counts.most_common(1)[0][0]
    else:
        return None
    return min(
        (connection for connection in open_ if connection.client == of),
        key=lambda connection: (connection.is_busy or now - connection.since < FRESH_S, connection.since),
        default=None,
    )


class AdminConnections:
    """Accepts connections for one aiohttp application, `track` being its middleware."""

    def __init__(self, limits: AdminLimits) -> None:
        self._limits = limits
        self._open: dict[object, AdminConnection] = {}  # by aiohttp's protocol
        self._log = LimitedLog(_log)

    def __len__(self) -> int:
        self._forget_closed()
        return len(self._open)

    @web.middleware
    async def track(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Note that a connection has a request under way."""
        connection = self._open.get(request.protocol)
        if connection is None:  # it was closed for another one just now
            return await handler(request)
        connection.requests += 1
        connection.is_busy, connection.since = True, time.monotonic()
        try:
            return await handler(request)
        finally:
            connection.is_busy, connection.since = False, time.monotonic()

    async def run(self, server: web.Server, listener: socket.socket) -> None:
        """Accept connections until cancelled."""
        checking = asyncio.create_task(self._close_overdue())
        try:
            while True:
                try:
                    await self._accept(server, listener)
                except Exception as e:  # noqa: BLE001  whatever fails, the port stays open
                    self._report(e)
                    await asyncio.sleep(RETRY_S)
        finally:
            checking.cancel()

    async def _accept(self, server: web.Server, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        sock, address = await loop.sock_accept(listener)
        connection, protocol = AdminConnection(str(address[0]), time.monotonic()), server()
        self._make_room(connection.client, self._limits)
        self._open[protocol] = connection  # before its first request can come
        try:
            connection.transport, _ = await loop.connect_accepted_socket(lambda: protocol, sock)
        except OSError:  # it left again
            del self._open[protocol]
            sock.close()

    def _report(self, error: Exception) -> None:
        if open_files.is_exhausted(error):
            self._make_room("", AdminLimits(0, 1))
            self._log.error("files", "the admin port accepts no connection: %s", open_files.EXHAUSTED_TEXT)
        elif not isinstance(error, ConnectionError):  # that one left while it waited
            text = "the admin port could not accept a connection: %s at %s"
            self._log.error("accept", text, type(error).__name__, place_of(error))

    def _make_room(self, client: str, limits: AdminLimits) -> None:
        self._forget_closed()
        if (old := to_close(self._open.values(), client, limits, time.monotonic())) is not None:
            old.close()

    async def _close_overdue(self) -> None:
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            now = time.monotonic()
            for connection in self._open.values():
                if connection.is_overdue(now):
                    connection.close()
            self._forget_closed()

    def _forget_closed(self) -> None:
        for protocol in [protocol for protocol, connection in self._open.items() if connection.is_closed]:
            del self._open[protocol]
