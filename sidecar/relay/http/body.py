"""The body of a message as it comes, with back-pressure on the connection that it comes from.

It is read piece by piece, whole, or through a sink that is called at once for each piece: the shortest way from one
connection to the other.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

from sidecar.relay.http.head import Field

# Bytes that wait for their reader before the connection is paused.
HIGH_WATER_BYTES: Final = 256 << 10


class Source(Protocol):
    """The connection that a body comes from."""

    def pause(self) -> None: ...
    def resume(self) -> None: ...


class Body:
    """One body. `ended`: all of it has come; `error`: why the rest never will."""

    __slots__ = (
        "_pieces",
        "_sink",
        "_source",
        "_waiter",
        "ended",
        "error",
        "held",
        "received",
        "trailers",
        "waited",
        "wanted",
    )

    def __init__(self, source: Source | None = None) -> None:
        self._source = source
        self._pieces: deque[bytes] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._sink: Callable[[bytes], None] | None = None
        self.held = 0
        self.ended = False
        self.wanted = False  # a reader waits for the next piece
        self.waited = 0.0  # seconds of that, as far as its connection counts them
        self.received = 0  # bytes so far
        self.error: BaseException | None = None
        self.trailers: list[Field] = []

    # --- from the connection ---

    def feed(self, data: bytes) -> None:
        """The next piece came."""
        self.received += len(data)
        if self._sink is not None:
            try:
                self._sink(data)
            except BaseException as e:  # noqa: BLE001  # raised where the body is awaited
                self._sink = None
                self.fail(e)
            return
        self._pieces.append(data)
        self.held += len(data)
        if self.held > HIGH_WATER_BYTES and self._source is not None:
            self._source.pause()
        self._wake()

    def end(self) -> None:
        """All of it has come; too late, if it is broken already."""
        if self.error is None:
            self.ended = True
            self._wake()

    def fail(self, error: BaseException) -> None:
        """The rest will not come. What came before can still be read."""
        if not self.ended and self.error is None:
            self.error = error
            self._wake()

    # --- for the reader ---

    async def next(self) -> bytes:
        """The next piece; empty at the end. Raises what broke it."""
        while not self._pieces:
            if self.ended:
                return b""
            await self._more()
        return self._take()

    async def read(self) -> bytes:
        """All that is left."""
        while not self.ended:
            self._resume()
            await self._more()
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        self.held = 0
        return data

    async def peek(self) -> bytes:
        """All that is left, which can be read again."""
        data = await self.read()
        self._pieces.append(data)
        return data

    async def pipe(self, sink: Callable[[bytes], None]) -> None:
        """Call `sink` with each piece as it comes, until the end. Raises what broke the body, or what `sink` raised."""
        while self._pieces:
            sink(self._take())
        self._sink = sink
        try:
            while not self.ended:
                await self._more()
        finally:
            self._sink = None

    def discard(self) -> None:
        """Drop what came and what comes."""
        self._pieces.clear()
        self.held = 0
        self._sink = lambda _: None
        self._resume()

    def _take(self) -> bytes:
        piece = self._pieces.popleft()
        self.held -= len(piece)
        if self.held <= HIGH_WATER_BYTES // 2:
            self._resume()
        return piece

    def _resume(self) -> None:
        if self._source is not None:
            self._source.resume()

    async def _more(self) -> None:
        if self.error is not None:
            raise self.error
        self.wanted = True
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter, self.wanted = None, False

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


async def read_within(body: Body, limit: int) -> bytes | None:
    """All of a body; None once it is longer than `limit` bytes."""
    pieces: list[bytes] = []
    size = 0
    while piece := await body.next():
        size += len(piece)
        if size > limit:
            return None
        pieces.append(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
