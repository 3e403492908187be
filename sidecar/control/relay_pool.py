"""The relay processes, as the control process sees them: each has a connection, on which it reports and receives
commands.

Rules:
- A relay reports first which one it is and what is open.
- What it held when its connection ended is reported as lost once, after its last event was read.
- A relay whose heartbeat stopped while the control process is healthy is killed: its streams are lost already.
- The supervisor starts and restarts the relays.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Callable

from sidecar.events import (
    Command,
    Event,
    Heartbeat,
    LoadReport,
    LoadSubscribed,
    RelayConnected,
    Settled,
    SettlementsAcked,
)
from sidecar.runtime.channel import Channel
from sidecar.snapshot import RelayUse

# Without a heartbeat for so long, a relay is killed.
HEARTBEAT_LOST_S = 30.0

_log = logging.getLogger(__name__)

OnEvent = Callable[[int, Event], None]
OnLost = Callable[[int], None]


class RelayPool:
    """The `workers` relay processes of this sidecar."""

    def __init__(self, workers: int, on_event: OnEvent, on_lost: OnLost) -> None:
        self._workers = workers
        self._on_event = on_event
        self._on_lost = on_lost
        self._published: LoadReport | None = None
        self._relays: dict[int, _RelayProcess] = {}
        self._subscribers: set[_RelayProcess] = set()

    async def run(self, joining: socket.socket) -> None:
        """Accept the connections of relays until cancelled."""
        loop = asyncio.get_running_loop()
        server = await loop.create_unix_server(
            lambda: _RelayProcess(self._on_connected, self._on_event, self._on_disconnected).channel, sock=joining
        )
        async with server:
            await server.serve_forever()

    def send(self, command: Command, index: int | None = None) -> None:
        """Send a command to one relay, or to all. The last load is kept for relays that connect later."""
        if isinstance(command, LoadReport):
            self._published = command
        for relay in self._relays.values():
            if index in (None, relay.index):
                relay.channel.send(command)
                if isinstance(command, LoadReport):
                    relay.channel.send(SettlementsAcked(relay.settlements))
        if isinstance(command, LoadReport):
            for subscriber in self._subscribers:
                subscriber.channel.send(command)

    def use(self, now: float) -> tuple[RelayUse, ...]:
        """What each relay last reported; one that has not connected has no process id."""
        return tuple(self._use(i, now) for i in range(self._workers))

    def check(self, now: float) -> None:
        """Kill relays without a heartbeat. Call it only while the control loop is healthy."""
        for relay in self._relays.values():
            last = max(relay.born, relay.heartbeat.at if relay.heartbeat else 0.0)
            if now - last > HEARTBEAT_LOST_S:
                _log.error("relay %d (pid %d): no heartbeat for %.0f s; killing it", relay.index, relay.pid, now - last)
                relay.born = now
                # Its connection is open, so the process id is still its own.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(relay.pid, signal.SIGKILL)

    def _use(self, index: int, now: float) -> RelayUse:
        relay = self._relays.get(index)
        if relay is None:
            return RelayUse(index, 0, 0, 0, 0.0, None)
        heartbeat = relay.heartbeat
        if heartbeat is None:
            return RelayUse(index, relay.pid, relay.restarts, 0, 0.0, None)
        return RelayUse(index, relay.pid, relay.restarts, heartbeat.open, heartbeat.lag, now - heartbeat.at)

    def _on_connected(self, relay: _RelayProcess) -> None:
        if relay.index < 0:
            self._subscribers.add(relay)
            if self._published is not None:
                relay.channel.send(self._published)
            return
        before = self._relays.get(relay.index)
        if before is not None:  # the end of its connection was not read yet
            before.leave()
        self._relays[relay.index] = relay
        if self._published is not None:
            relay.channel.send(self._published)

    def _on_disconnected(self, relay: _RelayProcess) -> None:
        if relay.index < 0:
            self._subscribers.discard(relay)
            return
        del self._relays[relay.index]
        self._on_lost(relay.index)


class _RelayProcess:
    """One relay's connection; that of a load subscriber has the index -1."""

    def __init__(
        self,
        on_connected: Callable[[_RelayProcess], None],
        on_event: OnEvent,
        on_disconnected: Callable[[_RelayProcess], None],
    ) -> None:
        self.channel = Channel(self._take, self.leave)
        self._connected = on_connected
        self._on_event = on_event
        self._disconnected = on_disconnected
        self._is_connected = False
        self.index = -1
        self.pid = 0
        self.restarts = 0
        self.settlements = 0
        self.born = 0.0
        self.heartbeat: Heartbeat | None = None

    def leave(self) -> None:
        """Its connection ended, or its successor has connected."""
        if self._is_connected:
            self._is_connected = False
            self._disconnected(self)
        self.channel.close()

    def _take(self, record: Event | Command) -> None:
        match record:
            case RelayConnected() if not self._is_connected and self.index < 0:
                self._is_connected = True
                self.index, self.pid, self.restarts = record.index, record.pid, record.restarts
                self.born = time.monotonic()
                self._connected(self)
            case LoadSubscribed() if not self._is_connected:
                self._is_connected = True
                self.pid = record.pid
                self._connected(self)
            case _ if not self._is_connected or self.index < 0:
                pass  # it did not report which one it is, or has been replaced, or only subscribes
            case Heartbeat():
                self.heartbeat = record
                self._on_event(self.index, record)
            case _:
                self._on_event(self.index, record)  # type: ignore[arg-type]  # a relay sends events only
                self.settlements += isinstance(record, Settled)
