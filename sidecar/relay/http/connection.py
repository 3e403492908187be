"""What both ends of the relay's connections share: writing with back-pressure, pausing, closing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast


class Connection(asyncio.Protocol):
    """A transport that may be closed at any time: what is done to a closed one does nothing.

    `is_blocked`: the other side has to read before more is written; `on_resume` is called when it has.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._drained: asyncio.Future[None] | None = None
        self._is_paused = False
        self.is_blocked = False
        self.is_closed = False
        self.on_resume: Callable[[], None] | None = None

    # --- asyncio.Protocol ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_closed, self.is_blocked = True, False
        if self._drained is not None and not self._drained.done():
            self._drained.set_exception(ConnectionResetError())

    def pause_writing(self) -> None:
        self.is_blocked = True

    def resume_writing(self) -> None:
        self.is_blocked = False
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        if self.on_resume is not None:
            self.on_resume()

    # --- what both ends do ---

    def pause(self) -> None:
        """Read nothing for now."""
        if not self._is_paused and self._transport is not None and not self.is_closed:
            self._is_paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        if self._is_paused and self._transport is not None and not self.is_closed:
            self._is_paused = False
            self._transport.resume_reading()

    def write(self, data: bytes | memoryview) -> None:
        """Send bytes."""
        if self._transport is not None and not self.is_closed:
            self._transport.write(data)

    def write_eof(self) -> None:
        """End our side."""
        if self._transport is not None and not self.is_closed and self._transport.can_write_eof():
            self._transport.write_eof()

    async def drain(self) -> None:
        """Wait until the other side has read enough. Raises ConnectionResetError if it left."""
        if self.is_closed:
            raise ConnectionResetError
        if self.is_blocked:
            self._drained = self._loop.create_future()
            try:
                await self._drained
            finally:
                self._drained = None

    def close(self, *, at_once: bool = False) -> None:
        """Close it when what was written has been sent; `at_once`: drop that."""
        if self._transport is not None and not self.is_closed:
            (self._transport.abort if at_once else self._transport.close)()
