"""Records between the control process and one relay process, over a connected Unix socket.

- `send` never waits and never raises; the queue is bounded.
- If the other side does not read, Delivered records are dropped first (their sums are repeated in Settled), then all.
- Records are gathered for GATHER_INTERVAL_S and written at once: a system call for each of a short request's three
  would cost more than all of the request's own work.
- What is gathered is kept in `UnsentRecords`, too, where a killed process must not take it along.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import cast

from sidecar.events import Command, Delivered, Event
from sidecar.runtime import codec
from sidecar.runtime.unsent_records import UnsentRecords

# Queued bytes beyond which Delivered records are dropped, and beyond which every record is.
MAX_QUEUED_DELIVERED_BYTES = 4 * 1024 * 1024
MAX_QUEUED_BYTES = 64 * 1024 * 1024
# Events carry their own times, and nothing made of them is finer.
GATHER_INTERVAL_S = 0.01
MAX_GATHERED = 256  # records beyond which they are written at once
RECONNECT_INTERVAL_S = 0.2


class Channel(asyncio.Protocol):
    """One end. Build it with `Channel.open` or `Channel.reach`."""

    def __init__(
        self,
        on_record: Callable[[Event | Command], None],
        on_close: Callable[[], None],
        unsent: UnsentRecords | None = None,
    ) -> None:
        self._on_record = on_record
        self._on_close = on_close
        self._unsent = unsent
        self._buffer = bytearray()
        self.received_bytes = 0
        self._written_bytes = 0
        self._transport: asyncio.WriteTransport | None = None
        self._gathered: list[bytes] = []
        self._timer: asyncio.TimerHandle | None = None

    @classmethod
    async def open(
        cls,
        sock: socket.socket,
        on_record: Callable[[Event | Command], None],
        on_close: Callable[[], None],
        unsent: UnsentRecords | None = None,
    ) -> Channel:
        """Take over `sock`. `on_record` is called for each record in order; `on_close` once the other side is gone."""
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        _, channel = await loop.create_unix_connection(lambda: cls(on_record, on_close, unsent), sock=sock)
        return channel

    @classmethod
    async def reach(
        cls,
        path: str,
        on_record: Callable[[Event | Command], None],
        on_close: Callable[[], None],
        unsent: UnsentRecords | None = None,
    ) -> Channel:
        """As `open`, by the Unix socket `path` of the supervisor, as soon as it accepts a connection."""
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.setblocking(False)
            try:
                await asyncio.get_running_loop().sock_connect(sock, path)
                return await cls.open(sock, on_record, on_close, unsent)
            except BaseException as e:
                sock.close()
                if not isinstance(e, OSError):
                    raise
            await asyncio.sleep(RECONNECT_INTERVAL_S)

    def send(self, record: Event | Command) -> None:
        """Queue one record; one that cannot be encoded is skipped."""
        if self._transport is None or self._transport.is_closing():
            return
        queued = self._transport.get_write_buffer_size()
        if queued > MAX_QUEUED_DELIVERED_BYTES and (queued > MAX_QUEUED_BYTES or isinstance(record, Delivered)):
            return
        try:
            line = codec.encode(record)
        except UnicodeEncodeError:
            return
        self._gathered.append(line)
        kept = self._unsent is None or self._unsent.keep(line)
        if len(self._gathered) >= MAX_GATHERED or not kept:
            self._write()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(GATHER_INTERVAL_S, self._write)

    def close(self) -> None:
        """Send what is queued, then close."""
        self._write()
        if self._transport is not None:
            self._transport.close()

    def _write(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        lines, self._gathered = b"".join(self._gathered), []
        if not lines or self._transport is None or self._transport.is_closing():
            return
        self._transport.write(lines)
        self._written_bytes += len(lines)
        if self._unsent is not None and not self._transport.get_write_buffer_size():
            self._unsent.forget(self._written_bytes)

    # --- asyncio.Protocol ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)  # uvloop's is one without being a subclass
        if self._unsent is not None:
            self._unsent.begin()

    def data_received(self, data: bytes) -> None:
        self.received_bytes += len(data)
        if (end := data.rfind(b"\n") + 1) == 0:
            self._buffer += data
            if len(self._buffer) > codec.MAX_LINE_BYTES:
                self._buffer.clear()
            return
        lines = b"".join((self._buffer, data[:end]))
        self._buffer = bytearray(data[end:])
        for record in codec.decode_all(lines):
            self._on_record(record)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._on_close()
