"""Records between the control process and one relay process, over a connected Unix socket.

Rules: `send` never waits and never raises; what is queued is bounded. When the other side does not read, Delivered records
are dropped first (their sums are repeated in Settled), then everything; `dropped` counts both.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from sidecar import wire
from sidecar.facts import Delivered, Fact, Order

DELIVERED_BOUND = 4 * 1024 * 1024  # bytes queued, past which Delivered records are dropped
BOUND = 64 * 1024 * 1024  # bytes queued, past which every record is dropped


class Channel(asyncio.Protocol):
    """One end. Build it with `Channel.open`."""

    def __init__(self, on_record: Callable[[Fact | Order], None], on_close: Callable[[], None]) -> None:
        self._on_record = on_record
        self._on_close = on_close
        self._buffer = bytearray()
        self._transport: asyncio.WriteTransport | None = None
        self.dropped = 0
        self.undecodable = 0

    @classmethod
    async def open(
        cls, sock: socket.socket, on_record: Callable[[Fact | Order], None], on_close: Callable[[], None]
    ) -> Channel:
        """Take over `sock`. `on_record` is called for each record in order; `on_close` once, when the other side is gone."""
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        _, channel = await loop.create_unix_connection(lambda: cls(on_record, on_close), sock=sock)
        return channel

    def send(self, record: Fact | Order) -> None:
        """Queue one record."""
        if self._transport is None or self._transport.is_closing():
            self.dropped += 1
            return
        queued = self._transport.get_write_buffer_size()
        if queued > BOUND or (queued > DELIVERED_BOUND and isinstance(record, Delivered)):
            self.dropped += 1
            return
        self._transport.write(wire.encode(record))

    def close(self) -> None:
        """Send what is queued, then hang up."""
        if self._transport is not None:
            self._transport.close()

    # --- asyncio.Protocol ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        *lines, rest = self._buffer.split(b"\n")
        self._buffer = rest if len(rest) <= wire.MAX_LINE else bytearray()
        for line in lines:
            try:
                record = wire.decode(bytes(line))
            except wire.WireError:
                self.undecodable += 1
                continue
            self._on_record(record)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._on_close()
