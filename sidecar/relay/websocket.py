"""WebSockets (`/v1/realtime`), passed on message by message. Not admitted: the size of their work is unknown."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

import aiohttp
from aiohttp import web
from yarl import URL

from sidecar.errors import EngineUnreachable
from sidecar.relay.headers import Headers

MAX_MESSAGE_BYTES: Final = 16 << 20
_CLOSE_TIMEOUT_S: Final = 2.0

Socket = web.WebSocketResponse | aiohttp.ClientWebSocketResponse


def is_wanted(request: web.BaseRequest) -> bool:
    """Whether the request asks for a WebSocket."""
    return request.headers.get("upgrade", "").lower() == "websocket" and request.method == "GET"


async def relay(
    request: web.BaseRequest, session: aiohttp.ClientSession, url: URL, passed: Headers
) -> web.StreamResponse:
    """Pass messages both ways until one side closes. The client gets the engine's refusal of a handshake."""
    offered = [name.strip() for name in request.headers.get("sec-websocket-protocol", "").split(",") if name.strip()]
    kept = [(name, value) for name, value in passed.items() if not name.lower().startswith("sec-websocket-")]
    try:
        engine = await session.ws_connect(
            url,
            headers=kept,
            protocols=offered,
            autoping=False,
            max_msg_size=MAX_MESSAGE_BYTES,
            timeout=aiohttp.ClientWSTimeout(ws_close=_CLOSE_TIMEOUT_S),
        )
    except aiohttp.WSServerHandshakeError as e:
        return web.Response(status=e.status if e.status >= 400 else 502)
    except (aiohttp.ClientError, OSError, TimeoutError):
        raise EngineUnreachable("the engine did not accept the WebSocket") from None
    async with engine:
        client = web.WebSocketResponse(
            protocols=[engine.protocol] if engine.protocol else (),
            autoping=False,
            compress=False,
            max_msg_size=MAX_MESSAGE_BYTES,
            timeout=_CLOSE_TIMEOUT_S,
        )
        await client.prepare(request)
        await _both_ways(client, engine)
        return client


async def _both_ways(client: web.WebSocketResponse, engine: aiohttp.ClientWebSocketResponse) -> None:
    directions = {asyncio.create_task(_pass(client, engine)), asyncio.create_task(_pass(engine, client))}
    try:
        await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for direction in directions:
            direction.cancel()
        await asyncio.gather(*directions, return_exceptions=True)
        await engine.close(code=_close_code(client))
        await client.close(code=_close_code(engine))


async def _pass(source: Socket, sink: Socket) -> None:
    kinds = aiohttp.WSMsgType
    send: dict[aiohttp.WSMsgType, Callable[[Any], Awaitable[None]]]
    send = {kinds.TEXT: sink.send_str, kinds.BINARY: sink.send_bytes, kinds.PING: sink.ping, kinds.PONG: sink.pong}
    async for message in source:
        if message.type in send:
            await send[message.type](message.data)


def _close_code(closed: Socket) -> int:
    """The close code to pass on; 1005 and 1006 mean that there was none, and may not be sent."""
    code = closed.close_code
    return code if code is not None and code not in (1005, 1006) else 1000
