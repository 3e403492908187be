"""The relay processes, as the control process sees them: each has a connection for its events and our commands.

- A relay reports first which one it is and what is open.
- What it held when its connection ended is reported as lost once, after its last event was read: also after those that
  it had gathered and not sent when it was killed.
- A relay whose heartbeat stopped while the control process is healthy is killed: its streams are lost already.
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
from dataclasses import dataclass, field

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
from sidecar.runtime import unsent_records
from sidecar.runtime.channel import Channel
from sidecar.snapshot import RelayUse

HEARTBEAT_LOST_S = 30.0  # without a heartbeat for so long, a relay is killed

_log = logging.getLogger(__name__)


class RelayPool:
    """The `workers` relay processes of this sidecar, and the processes that only subscribe to its load."""

    def __init__(self, workers: int, on_event: Callable[[int, Event], None], on_lost: Callable[[int], None]) -> None:
        self._workers = workers
        self._on_event = on_event
        self._on_lost = on_lost
        self._published: LoadReport | None = None
        self._relays: dict[int, _RelayProcess] = {}
        self._subscribers: set[_RelayProcess] = set()
        self._path = ""

    async def run(self, joining: socket.socket) -> None:
        """Accept the connections of relays until cancelled."""
        self._path = joining.getsockname()
        server = await asyncio.get_running_loop().create_unix_server(self._accept, sock=joining)
        async with server:
            await server.serve_forever()

    def send(self, command: Command, index: int) -> None:
        """Send a command to one relay, if it is connected."""
        if relay := self._relays.get(index):
            relay.channel.send(command)

    def publish(self, load: LoadReport) -> None:
        """Send the load to all, and keep it for those that connect later."""
        self._published = load
        for relay in self._relays.values():
            relay.channel.send(load)
            relay.channel.send(SettlementsAcked(relay.settlements))
        for subscriber in self._subscribers:
            subscriber.channel.send(load)

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
        relay = self._relays.get(index) or _RelayProcess()
        heartbeat = relay.heartbeat
        if heartbeat is None:
            return RelayUse(index, relay.pid, relay.restarts, 0, 0.0, None)
        files = heartbeat.open_files, heartbeat.max_files
        return RelayUse(index, relay.pid, relay.restarts, heartbeat.open, heartbeat.lag, now - heartbeat.at, *files)

    def _accept(self) -> Channel:
        relay = _RelayProcess()
        relay.channel = Channel(lambda record: self._take(relay, record), lambda: self._leave(relay))
        return relay.channel

    def _take(self, relay: _RelayProcess, record: Event | Command) -> None:
        match record:
            case RelayConnected() if not relay.pid:
                relay.index, relay.pid, relay.restarts = record.index, record.pid, record.restarts
                relay.born = time.monotonic()
                if before := self._relays.get(record.index):  # the end of its connection was not read yet
                    self._leave(before)
                self._relays[record.index] = relay
            case LoadSubscribed() if not relay.pid:
                relay.pid = record.pid
                self._subscribers.add(relay)
            case _ if self._relays.get(relay.index) is not relay:
                return  # it did not report which one it is, or has been replaced, or only subscribes
            case _:
                if isinstance(record, Heartbeat):
                    relay.heartbeat = record
                self._on_event(relay.index, record)  # type: ignore[arg-type]  # a relay sends events only
                relay.settlements += isinstance(record, Settled)
                return
        if self._published is not None:
            relay.channel.send(self._published)

    def _leave(self, relay: _RelayProcess) -> None:
        """Its connection ended, or its successor has connected."""
        self._subscribers.discard(relay)
        if self._relays.get(relay.index) is relay:
            path = unsent_records.path(self._path, relay.pid)
            if rest := unsent_records.rest(path, relay.channel.received_bytes):
                relay.channel.data_received(rest)
            del self._relays[relay.index]
            self._on_lost(relay.index)
        relay.channel.close()


@dataclass(eq=False, slots=True)
class _RelayProcess:
    """One relay's connection; that of a load subscriber keeps the index -1. It has a `pid` once it reported."""

    channel: Channel = field(init=False)
    index: int = -1
    pid: int = 0
    restarts: int = 0
    settlements: int = 0
    born: float = 0.0
    heartbeat: Heartbeat | None = None
