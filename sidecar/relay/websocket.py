"""WebSockets (`/v1/realtime`): the handshake passes as any request does, and after the engine's 101 all bytes do.

Rules: the bytes are not changed, so extensions, close codes and refusals are the engine's. Whoever does not read lets
the other side wait. Each side's end is passed on; the tunnel is over when both have ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from sidecar.relay.http.body import Source
from sidecar.relay.http.client import Request
from sidecar.relay.http.connection import Connection
from sidecar.relay.http.engine import Answer
from sidecar.relay.http.head import Field

_END_TIMEOUT_S: Final = 2.0  # for the other side to end after one did


def is_wanted(request: Request) -> bool:
    """Whether the request asks for a WebSocket. One with a body does not: servers take it as an ordinary request."""
    return request.method == "GET" and not request.has_body and "websocket" in request.fields.tokens(b"upgrade")


Hear = Callable[[bytes], None]


async def tunnel(
    request: Request,
    answer: Answer,
    passed: list[Field],
    received: Hear,
    sent: Hear,
) -> None:
    """Pass bytes both ways until both sides have ended.

    `received` gets each piece from the engine, `sent` each from the client.
    """
    client, ended, sides = request.connection, asyncio.Event(), {"client", "engine"}
    upgraded = [(b"connection", b"upgrade"), (b"upgrade", answer.fields.get(b"upgrade").encode("latin-1"))]
    request.reply.upgrade(answer.status, answer.reason, [*passed, *upgraded])

    def pass_on(data: bytes, side: str, source: Source, sink: Connection) -> None:
        if data:
            sink.write(data)
            if sink.is_blocked:
                source.pause()
        else:
            sink.write_eof()
            sides.discard(side)
            ended.set()

    def to_client(data: bytes) -> None:
        if data:
            received(data)
        pass_on(data, "engine", answer, client)

    def to_engine(data: bytes) -> None:
        if data:
            sent(data)
        pass_on(data, "client", client, engine)

    engine = answer.tunnel(to_client)
    engine.on_resume, client.on_resume = client.resume, engine.resume
    client.take_over(to_engine)
    try:
        await ended.wait()
        ended.clear()
        if sides:
            try:
                async with asyncio.timeout(_END_TIMEOUT_S):
                    await ended.wait()
            except TimeoutError:
                pass
    finally:
        engine.on_resume = client.on_resume = None
        engine.close()
        client.close()
