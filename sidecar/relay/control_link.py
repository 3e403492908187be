"""A relay's connection to the control process: events go out, commands come in.

The supervisor owns the listening socket. While there is no control process, a connection succeeds and waits in the
kernel's queue for the next one. A relay that loses control therefore connects again at once, introduces itself,
replays its open requests and goes on. A request never waits for this connection.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from typing import Final

from sidecar.events import Command, Event, RelayConnected, SettlementsAcked
from sidecar.relay.replay_log import ReplayLog
from sidecar.runtime import unsent_records
from sidecar.runtime.channel import Channel

CLOSE_TIMEOUT_S: Final = 2.0  # to write the last events

_log = logging.getLogger(__name__)


class ControlLink:
    """One per relay process. `introduce` makes the first event; `on_command`, to be set, receives commands."""

    def __init__(self, path: str, introduce: Callable[[float], RelayConnected]) -> None:
        self._path = path
        self._unsent: unsent_records.UnsentRecords | None = None
        try:
            self._unsent = unsent_records.UnsentRecords(unsent_records.path(path, os.getpid()))
        except OSError as e:
            _log.warning("no file for unsent events (%s): a relay that is killed loses its last ones", e.strerror)
        self._introduce = introduce
        self.on_command: Callable[[Command], None] = lambda _: None
        self._replay_log = ReplayLog()
        self._channel: Channel | None = None
        self._lost = asyncio.Event()

    def send(self, event: Event) -> None:
        """Send an event to control, or log it for the next one. Never waits, never raises."""
        self._replay_log.note(event)
        if self._channel is not None:
            self._channel.send(event)

    async def run(self) -> None:
        """Stay connected until cancelled."""
        while True:
            self._lost.clear()
            channel = await Channel.reach(self._path, self._on_record, self._lost.set, self._unsent)
            channel.send(self._introduce(time.monotonic()))
            for event in self._replay_log.events():
                channel.send(event)
            self._channel = channel
            await self._lost.wait()
            self._channel = None
            _log.warning("the control process is gone; requests go on and will be reported to the next one")

    async def close(self) -> None:
        """Send what is queued and hang up. What is written stays readable after this process has exited."""
        if self._channel is not None:
            self._channel.close()
            await asyncio.wait((asyncio.ensure_future(self._lost.wait()),), timeout=CLOSE_TIMEOUT_S)

    def _on_record(self, record: Event | Command) -> None:
        if isinstance(record, SettlementsAcked):
            self._replay_log.ack(record.count)
        else:
            self.on_command(record)  # type: ignore[arg-type]  # the control process sends only commands
