"""The relay processes, as the control process sees them: each has a connection, on which it reports and takes orders.

Rules: a relay says first which one it is and what is open; what it held when its connection ended is reported once, after
its last fact was read; a relay whose pulse stopped while we ourselves are well is killed, because its streams are lost already.
Starting them, and starting them again, is the supervisor's.
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

HEARTBEAT_LOST_S = 30.0  # seconds without a pulse before a relay is killed

_log = logging.getLogger(__name__)

OnEvent = Callable[[int, Event], None]
OnLost = Callable[[int], None]


class RelayPool:
    """The `workers` relay processes of this sidecar."""

    def __init__(self, workers: int, on_fact: OnEvent, on_lost: OnLost) -> None:
        self._workers = workers
        self._on_fact = on_fact
        self._on_lost = on_lost
        self._published: LoadReport | None = None
        self._relays: dict[int, _RelayProcess] = {}
        self._listeners: set[_RelayProcess] = set()

    async def run(self, joining: socket.socket) -> None:
        """Take the connections of relays until cancelled."""
        loop = asyncio.get_running_loop()
        server = await loop.create_unix_server(
            lambda: _RelayProcess(self._joined, self._on_fact, self._left).channel, sock=joining
        )
        async with server:
            await server.serve_forever()

    def send(self, order: Command, index: int | None = None) -> None:
        """Send an order to one relay, or to all. The last load is kept for relays that join later."""
        if isinstance(order, LoadReport):
            self._published = order
        for relay in self._relays.values():
            if index in (None, relay.index):
                relay.channel.send(order)
                if isinstance(order, LoadReport):
                    relay.channel.send(SettlementsAcked(relay.booked))
        if isinstance(order, LoadReport):
            for listener in self._listeners:
                listener.channel.send(order)

    def use(self, now: float) -> tuple[RelayUse, ...]:
        """What each relay last said of itself; one that has not joined has no process id."""
        return tuple(self._use(i, now) for i in range(self._workers))

    def check(self, now: float) -> None:
        """Kill relays without a pulse. Call it only while our own loop is well."""
        for relay in self._relays.values():
            last = max(relay.born, relay.pulse.at if relay.pulse else 0.0)
            if now - last > HEARTBEAT_LOST_S:
                _log.error("relay %d (pid %d): no pulse for %.0f s; killing it", relay.index, relay.pid, now - last)
                relay.born = now
                with contextlib.suppress(ProcessLookupError):  # its connection is open, so the number is still its own
                    os.kill(relay.pid, signal.SIGKILL)

    def _use(self, index: int, now: float) -> RelayUse:
        relay = self._relays.get(index)
        if relay is None:
            return RelayUse(index, 0, 0, 0, 0.0, None)
        pulse = relay.pulse
        if pulse is None:
            return RelayUse(index, relay.pid, relay.restarts, 0, 0.0, None)
        return RelayUse(index, relay.pid, relay.restarts, pulse.open, pulse.lag, now - pulse.at)

    def _joined(self, relay: _RelayProcess) -> None:
        if relay.index < 0:
            self._listeners.add(relay)
            if self._published is not None:
                relay.channel.send(self._published)
            return
        before = self._relays.get(relay.index)
        if before is not None:  # the end of its connection was not read yet
            before.leave()
        self._relays[relay.index] = relay
        if self._published is not None:
            relay.channel.send(self._published)

    def _left(self, relay: _RelayProcess) -> None:
        if relay.index < 0:
            self._listeners.discard(relay)
            return
        del self._relays[relay.index]
        self._on_lost(relay.index)


class _RelayProcess:
    """One relay's connection; a listener's has the index -1."""

    def __init__(
        self, joined: Callable[[_RelayProcess], None], on_fact: OnEvent, left: Callable[[_RelayProcess], None]
    ) -> None:
        self.channel = Channel(self._take, self.leave)
        self._on_joined = joined
        self._on_fact = on_fact
        self._on_left = left
        self._here = False
        self.index = -1
        self.pid = 0
        self.restarts = 0
        self.booked = 0  # settlements
        self.born = 0.0
        self.pulse: Heartbeat | None = None

    def leave(self) -> None:
        """Its connection ended, or its successor is there."""
        if self._here:
            self._here = False
            self._on_left(self)
        self.channel.close()

    def _take(self, record: Event | Command) -> None:
        match record:
            case RelayConnected() if not self._here and self.index < 0:
                self._here = True
                self.index, self.pid, self.restarts, self.born = (
                    record.index,
                    record.pid,
                    record.restarts,
                    time.monotonic(),
                )
                self._on_joined(self)
            case LoadSubscribed() if not self._here:
                self._here = True
                self.pid = record.pid
                self._on_joined(self)
            case _ if not self._here or self.index < 0:
                pass  # it did not say who it is, or has been replaced, or only listens
            case Heartbeat():
                self.pulse = record
                self._on_fact(self.index, record)
            case _:
                self._on_fact(self.index, record)  # type: ignore[arg-type]  # a relay sends facts only
                self.booked += isinstance(record, Settled)
