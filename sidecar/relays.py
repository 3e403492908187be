"""The relay processes, as the control process sees them: started, fed with orders, watched, started again.

Rules: what a relay held when it died is reported once, after its last fact was read; a relay whose pulse stopped while we
ourselves are well is killed and started again, because its streams are lost already.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from sidecar.channel import Channel
from sidecar.children import Child
from sidecar.facts import Configure, Drain, Fact, Order, Published, Pulse
from sidecar.snapshot import RelayUse

PULSE_LOST = 30.0  # seconds without a pulse before a relay is killed

_log = logging.getLogger(__name__)

OnFact = Callable[[int, Fact], None]
OnLost = Callable[[int], None]


@dataclass(slots=True)
class _Relay:
    index: int
    child: Child
    channel: Channel | None = None
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    pulse: Pulse | None = None
    born: float = 0.0
    far_end: socket.socket | None = None
    near_end: socket.socket | None = None


class RelayPool:
    """`workers` relay processes on one listening socket."""

    def __init__(
        self,
        workers: int,
        listener: socket.socket,
        configure: Callable[[int], Configure],
        on_fact: OnFact,
        on_lost: OnLost,
    ) -> None:
        self._listener = listener
        self._configure = configure
        self._on_fact = on_fact
        self._on_lost = on_lost
        self._published: Published | None = None
        self._relays = [self._make(i) for i in range(workers)]

    async def run(self) -> None:
        """Keep all relays running until stopped."""
        async with asyncio.TaskGroup() as group:
            for relay in self._relays:
                group.create_task(self._keep(relay), name=f"relay-{relay.index}")

    def order(self, order: Order, index: int | None = None) -> None:
        """Send an order to one relay, or to all. The last load is kept for relays that start later."""
        if isinstance(order, Published):
            self._published = order
        for relay in self._relays:
            if relay.channel is not None and index in (None, relay.index):
                relay.channel.send(order)

    def use(self, now: float) -> tuple[RelayUse, ...]:
        """What each relay last said of itself."""
        return tuple(
            RelayUse(
                index=r.index,
                pid=r.child.pid,
                restarts=r.child.restarts,
                open=r.pulse.open if r.pulse else 0,
                lag=r.pulse.lag if r.pulse else 0.0,
                pulse_age=now - r.pulse.at if r.pulse else None,
            )
            for r in self._relays
        )

    def check(self, now: float) -> None:
        """Kill relays without a pulse. Call it only while our own loop is well."""
        for relay in self._relays:
            last = max(relay.born, relay.pulse.at if relay.pulse else 0.0)
            if relay.channel is not None and now - last > PULSE_LOST:
                _log.error(
                    "relay %d (pid %d): no pulse for %.0f s; killing it", relay.index, relay.child.pid, now - last
                )
                relay.born = now
                relay.child.signal(signal.SIGKILL)

    async def drain(self, seconds: float) -> None:
        """Let open streams finish, at most `seconds`, then end the processes."""
        self.order(Drain(seconds))
        async with asyncio.TaskGroup() as group:
            for relay in self._relays:
                group.create_task(relay.child.stop(seconds + 5))

    def _make(self, index: int) -> _Relay:
        def args() -> tuple[list[str], list[int]]:
            relay.near_end, relay.far_end = socket.socketpair()
            listen = os.dup(self._listener.fileno())
            control = relay.far_end.detach()
            return ["relay-process", "--control-fd", str(control), "--listen-fd", str(listen)], [control, listen]

        async def started(_: asyncio.subprocess.Process) -> None:
            await self._connect(relay)

        relay = _Relay(index, Child(f"relay {index}", args, started))
        return relay

    async def _connect(self, relay: _Relay) -> None:
        assert relay.near_end is not None
        relay.closed = asyncio.Event()
        relay.pulse, relay.born = None, time.monotonic()

        def on_record(record: Fact | Order) -> None:
            if isinstance(record, Pulse):
                relay.pulse = record
            self._on_fact(relay.index, record)  # type: ignore[arg-type]  # a relay sends facts only

        relay.channel = await Channel.open(relay.near_end, on_record, relay.closed.set)
        relay.channel.send(self._configure(relay.index))
        if self._published is not None:
            relay.channel.send(self._published)

    async def _keep(self, relay: _Relay) -> None:
        async def ended() -> None:
            await relay.closed.wait()  # its last facts are read before what it held is given up
            relay.channel = None
            self._on_lost(relay.index)

        await relay.child.run(ended)
