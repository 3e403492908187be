"""The connection to the client: bodies read within a bound, answers written, and whose connection broke.

Rules: a client that is gone raises ClientGone, one that does not read ClientStalled, an engine that broke EngineBroke.
aiohttp raises the same errors for both connections, so each call is wrapped by the side that it talks to.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

import aiohttp
from aiohttp import web

from sidecar.errors import BodyTooLarge
from sidecar.images.protocol import Data
from sidecar.relay.outcomes import ClientGone, ClientStalled, EngineBroke

# What reading from the engine raises when its connection breaks.
ENGINE_ERRORS: Final = (aiohttp.ClientError, OSError, TimeoutError)
# Longer than people and batch jobs pause. A connection that is not read keeps a slot of the engine's batch.
CLIENT_STALL_S: Final = 600.0
MAX_PIECE_BYTES: Final = 1 << 20  # a client must read this much within its timeout when an answer is long


async def expect(request: web.BaseRequest) -> None:
    """Send 100 Continue if the client waits for it (curl does, above 1 MiB)."""
    if request.headers.get("expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # aiohttp takes output for a begun answer


async def read(request: web.BaseRequest, limit: int, flag: str = "--max-body-bytes") -> bytes:
    """The whole body. Raises BodyTooLarge above `limit` bytes, which `flag` sets."""
    too_large = f"the request body is larger than {limit} bytes ({flag})"
    if (request.content_length or 0) > limit:
        raise BodyTooLarge(too_large)
    await expect(request)
    pieces: list[bytes] = []
    size = 0
    while piece := await request.content.readany():
        size += len(piece)
        if size > limit:
            raise BodyTooLarge(too_large)
        pieces.append(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


async def next_chunk(answer: aiohttp.ClientResponse) -> bytes:
    """The next bytes of the engine's answer; empty at its end. Raises EngineBroke if it ends early."""
    try:
        return await answer.content.readany()
    except ENGINE_ERRORS:
        raise EngineBroke("the engine's answer ended early") from None


async def send(step: Awaitable[object]) -> None:
    """Send the answer's head, a part of it, or its end."""
    try:
        await step
    except ConnectionError:
        raise ClientGone from None


async def send_long(response: web.StreamResponse, groups: Iterable[list[Data]], within: float) -> None:
    """Send an answer held in memory. Raises ClientStalled if the client reads nothing for `within` seconds."""
    try:
        for group in groups:
            data = memoryview(group[0] if len(group) == 1 else b"".join(group))
            for at in range(0, len(data), MAX_PIECE_BYTES):
                async with asyncio.timeout(within):
                    await send(response.write(data[at : at + MAX_PIECE_BYTES]))
        async with asyncio.timeout(within):
            await send(response.write_eof())
    except TimeoutError:
        raise ClientStalled from None


class BusyConnections:
    """The client connections of one relay process that have a request under way."""

    def __init__(self) -> None:
        self._busy: set[object] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._busy)

    @contextmanager
    def busy(self, connection: object) -> Iterator[None]:
        """A request is under way on `connection` for a block."""
        self._busy.add(connection)
        self._idle.clear()
        try:
            yield
        finally:
            self._busy.discard(connection)
            if not self._busy:
                self._idle.set()

    async def drain(self, server: web.Server, seconds: float) -> bool:
        """Close idle connections and wait for the busy ones, at most `seconds`. Returns whether all became idle."""
        for connection in server.connections:
            if connection not in self._busy:
                connection.close()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)
        return not self._busy


def hang_up(request: web.BaseRequest, *, at_once: bool = False) -> web.Response:
    """Close the client's connection; `at_once`: also discard what it has not read.

    aiohttp needs an answer all the same; this one is never sent.
    """
    if (transport := request.transport) is not None:
        (transport.abort if at_once else transport.close)()
    return web.Response()
