"""Connections of the relay without sockets: bytes in, and what it would send."""

from __future__ import annotations

import asyncio
from typing import Any

from sidecar.errors import RequestError
from sidecar.relay import client_io
from sidecar.relay.http.client import ClientConnection, Request
from sidecar.relay.http.engine import EngineConnection, EngineError, Place, Pool
from sidecar.relay.http.head import Fields
from sidecar.relay.http.server import Server

STEPS = 50  # of the event loop, for one try


class Wire(asyncio.Transport):
    """What a connection writes to; `sent` keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""
        self.is_closed = False

    def write(self, data: Any) -> None:
        self.sent += bytes(data)

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        """Our side ends."""

    def close(self) -> None:
        self.is_closed = True

    abort = close

    def pause_reading(self) -> None:
        """Nothing is read from here."""

    def resume_reading(self) -> None:
        """Nothing is read from here."""


async def _echo(request: Request) -> None:
    try:
        request.reply.begin(200, b"OK", [], body=await client_io.read(request, 1 << 20))
    except RequestError as e:
        client_io.refuse(request, e, "")


def _refuse(connection: ClientConnection, error: RequestError) -> None:
    client_io.refuse(Request(connection, "", b"", "1.1", Fields()), error, "")


async def answers_to(data: bytes) -> bytes:
    """What a client gets that sends these bytes, and ends."""
    server, wire = Server(_echo, _refuse), Wire()
    connection = server()
    connection.connection_made(wire)
    for piece in (data[: len(data) // 2], data[len(data) // 2 :]):
        connection.data_received(piece)
        for _ in range(STEPS):
            await asyncio.sleep(0)
    connection.connection_lost(None)
    assert connection.task is not None
    await asyncio.gather(connection.task, return_exceptions=True)
    await server.close()
    return wire.sent


async def answer_of(data: bytes) -> tuple[int, bytes] | None:
    """Status and body of an engine that sends these bytes, and ends; None if that is no answer."""
    connection = EngineConnection(Pool(Place("", 0)))
    connection.connection_made(Wire())
    asking = asyncio.ensure_future(connection.ask("GET", b"GET / HTTP/1.1\r\n\r\n", None))
    await asyncio.sleep(0)
    connection.data_received(data)
    connection.connection_lost(None)
    try:
        answer = await asking
        return answer.status, await answer.body.read()
    except EngineError:
        return None
