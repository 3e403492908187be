"""The relay in front of engines that are behind TLS or a Unix socket."""

from __future__ import annotations

import gc
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from ..certificates import Authority

# asyncio's servers, those of these tests, forget to close a connection whose handshake failed.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture(autouse=True)
def forget_connections() -> Iterator[None]:
    """What this module's servers left open is collected while its warnings are off."""
    yield
    gc.collect()


@asynccontextmanager
async def engine(socket: str = "", tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """An engine that answers posts with their bodies, and echoes messages of WebSockets; its URL."""

    async def answer(request: web.Request) -> web.StreamResponse:
        if request.headers.get("upgrade") != "websocket":
            return web.Response(body=await request.read())
        ws = web.WebSocketResponse()
        await ws.prepare(request)
        async for message in ws:
            await ws.send_str(message.data)
        return ws

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        if socket:
            await web.UnixSite(runner, socket).start()
            yield f"unix:{socket}"
        else:
            await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
            yield f"https://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def exchange(client: aiohttp.ClientSession, url: str) -> None:
    body = b'{"model": "m", "prompt": "x", "max_tokens": 1}'
    for _ in range(2):  # the second over a kept connection
        async with client.post(f"{url}/v1/completions", data=body) as answer:
            assert (answer.status, await answer.read()) == (200, body)
    async with client.ws_connect(f"{url}/v1/realtime") as ws:
        await ws.send_str("hello")
        assert await ws.receive_str() == "hello"


async def test_requests_and_websockets_reach_a_unix_socket(rig: Any, tmp_path: Path) -> None:
    """Over kept connections and fresh ones."""
    async with engine(str(tmp_path / "engine.sock")) as url:
        relay = await rig(url)
        await exchange(relay.client, relay.url)


async def test_requests_and_websockets_reach_an_engine_of_a_private_authority(rig: Any, tmp_path: Path) -> None:
    """Over kept connections and fresh ones."""
    authority = Authority(tmp_path)
    async with engine(tls=authority.context()) as url:
        relay = await rig(url, engine_ca=str(authority.pem))
        await exchange(relay.client, relay.url)


async def test_a_certificate_that_is_not_trusted_is_no_start(rig: Any, tmp_path: Path) -> None:
    """The error does not claim that an engine that runs is starting."""
    async with engine(tls=Authority(tmp_path).context()) as url:
        relay = await rig(url)
        async with relay.client.post(f"{relay.url}/v1/completions", data=b"{}") as answer:
            text = await answer.text()
    assert answer.status == 502 and "over TLS" in text and "starting" not in text
