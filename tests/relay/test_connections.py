"""Connections to the engine: one that it closes as it is used again costs no request, and none is answered twice."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest

from sidecar.events import Settled
from sidecar.relay import engine_io
from sidecar.relay.engine_io import MAX_REPEATED_BYTES, BodyPayload
from sidecar.relay.http import engine, server

from ..waiting import PATIENCE
from .work import CHAT, TOKEN, sse

EVENTS = b"".join(sse(TOKEN, b"[DONE]"))
STREAM = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    b"%x\r\n%s\r\n0\r\n\r\n" % (len(EVENTS), EVENTS)
)
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
LONG = "x" * (MAX_REPEATED_BYTES + 1)

Close = Callable[[asyncio.StreamWriter], Awaitable[None]]


async def close(writer: asyncio.StreamWriter) -> None:
    writer.close()


async def reset(writer: asyncio.StreamWriter) -> None:
    linger = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


async def begin_an_answer(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 2")
    writer.close()


class Engine:
    """An engine of bytes: answers a given number of requests per connection, and does `then` with the next one.

    `whole` are the requests that it read, `answered` those that it answered: their request line and body.
    """

    def __init__(self, then: Close, *, answers: int = 1, answer: bytes = OK, at_once: bool = False) -> None:
        self.then = then
        self.answers = answers
        self.answer = answer
        self.at_once = at_once
        self.whole: list[tuple[bytes, bytes]] = []
        self.answered: list[tuple[bytes, bytes]] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError), contextlib.closing(writer):
            for _ in range(self.answers):
                self.answered.append(await self._read(reader))
                writer.write(self.answer)
            if not self.at_once:
                await self._read(reader)
            await self.then(writer)

    async def _read(self, reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
        head = await reader.readuntil(b"\r\n\r\n")
        body = b""
        if length := re.search(rb"content-length: (\d+)", head.lower()):
            body = await reader.readexactly(int(length[1]))
        elif b"transfer-encoding: chunked" in head.lower():
            while size := int(await reader.readline(), 16):
                body += await reader.readexactly(size)
                await reader.readline()
            await reader.readline()
        request = head.partition(b"\r\n")[0], body
        self.whole.append(request)
        return request


async def get(r: Any, path: str = "/x") -> int:
    async with r.client.get(r.url + path) as got:
        await got.read()
        return int(got.status)


@pytest.mark.parametrize(
    ("then", "at_once"),
    [(close, False), (reset, False), (close, True)],
    ids=["closed at its use", "reset at its use", "closed when its answer was sent"],
)
async def test_streams_through_an_engine_that_closes_kept_connections(
    rig: Any, serve_raw: Any, then: Close, at_once: bool
) -> None:
    """Many streams all arrive whole, one by one and four at a time; each is answered once and settles once, as good."""
    engine = Engine(then, answer=STREAM, at_once=at_once)
    r = await rig(await serve_raw(engine))

    async def ask() -> None:
        async with r.client.post(r.url + "/v1/chat/completions", json={**CHAT, "stream": True}) as got:
            assert (got.status, await got.read()) == (200, EVENTS)

    for _ in range(40):
        await ask()
    for _ in range(10):
        await asyncio.gather(*(ask() for _ in range(4)))
    settled = await r.emitted.wait(Settled, 80)
    assert [event.outcome for event in settled] == ["ok"] * 80
    assert len(engine.answered) == 80


async def test_streams_through_an_engine_that_closes_a_little_later(rig: Any, serve_raw: Any) -> None:
    """llama.cpp closes a connection 0.1 s after a stream, whatever has come on it by then."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, TimeoutError), contextlib.closing(writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(STREAM)
            async with asyncio.timeout(0.1):
                await reader.read()

    r = await rig(await serve_raw(talk))

    async def ask() -> None:
        async with r.client.post(r.url + "/v1/chat/completions", json={**CHAT, "stream": True}) as got:
            assert (got.status, await got.read()) == (200, EVENTS)

    await asyncio.gather(*(ask() for _ in range(4)))
    for _ in range(40):
        await ask()
    assert {event.outcome for event in await r.emitted.wait(Settled, 44)} == {"ok"}


@pytest.mark.parametrize("then", [close, reset])
@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/x", b""),
        ("DELETE", "/x", b""),
        ("POST", "/v1/load_lora_adapter", b'{"lora_name": "a"}'),
        ("POST", "/wake_up", b'{"tags": ["kv_cache"]}'),
        ("POST", "/sleep", b""),
        ("POST", "/v1/completions", b'{"prompt": "x"}'),
        ("POST", "/v1/responses", b'{"input": "x"}'),
    ],
)
async def test_any_request_is_sent_once_more(
    rig: Any, serve_raw: Any, then: Close, method: str, path: str, body: bytes
) -> None:
    """Whatever its method, as work or passed through: the fresh connection gets the same bytes."""
    engine = Engine(then)
    r = await rig(await serve_raw(engine))
    await get(r)
    async with r.client.request(method, r.url + path, data=body or None) as got:
        assert (got.status, await got.read()) == (200, b"ok")
    line = f"{method} {path} HTTP/1.1".encode()
    assert engine.whole[1:] == [(line, body), (line, body)]
    assert len(engine.answered) == 2


@pytest.mark.parametrize("path", ["/files", "/v1/completions"])
@pytest.mark.parametrize("announced", [True, False])
async def test_a_body_that_is_not_kept_meets_no_kept_connection(
    rig: Any, serve_raw: Any, path: str, announced: bool
) -> None:
    """A long body, or one that streams through, is sent once, on a fresh connection."""
    engine = Engine(close)
    r = await rig(await serve_raw(engine))
    await get(r)
    body = f'{{"prompt": "{LONG}"}}'.encode()

    async def upload() -> Any:
        yield body

    async with r.client.post(r.url + path, data=body if announced else upload()) as got:
        assert (got.status, await got.read()) == (200, b"ok")
    assert engine.whole[1:] == [(f"POST {path} HTTP/1.1".encode(), body)]


async def test_a_websocket_meets_no_kept_connection(rig: Any, serve_raw: Any) -> None:
    """Its handshake goes out on a fresh connection; here the engine refuses it, which is an answer."""
    engine = Engine(close)
    r = await rig(await serve_raw(engine))
    await get(r)
    engine.answer = b"HTTP/1.1 403 No\r\ncontent-length: 0\r\n\r\n"
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await r.client.ws_connect(r.url + "/v1/realtime")
    assert refused.value.status == 403
    assert len(engine.whole) == 2


@pytest.mark.parametrize(("method", "path"), [("GET", "/x"), ("POST", "/x"), ("POST", "/v1/completions")])
@pytest.mark.parametrize("then", [close, reset])
async def test_a_failure_on_a_fresh_connection_stays_one(
    rig: Any, serve_raw: Any, then: Close, method: str, path: str
) -> None:
    """An engine that hangs up on each request gets each one once."""
    engine = Engine(then, answers=0)
    r = await rig(await serve_raw(engine))
    for count in (1, 2):
        async with r.client.request(method, r.url + path, data=b"{}" if method == "POST" else None) as got:
            assert (got.status, (await got.json())["error"]["code"]) == (502, "engine_unreachable")
        assert len(engine.whole) == count


async def test_connections_that_are_not_used_are_closed(
    rig: Any, serve_raw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that keeps connections forever is not left with those of the last burst."""
    monkeypatch.setattr(server, "CHECK_INTERVAL_S", 0.02)
    monkeypatch.setattr(engine, "KEEPALIVE_S", 0.0)
    left = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK)
        await reader.read()
        left.set()
        writer.close()

    r = await rig(await serve_raw(talk))
    assert await get(r) == 200
    async with asyncio.timeout(PATIENCE):
        await left.wait()


async def test_it_is_sent_only_once_more(rig: Any, serve_raw: Any) -> None:
    """Where the fresh connection breaks too, the client gets the error."""
    engine = Engine(close)
    r = await rig(await serve_raw(engine))
    await get(r)
    engine.answers = 0
    async with r.client.post(r.url + "/v1/completions", json={}) as got:
        assert got.status == 502
    assert len(engine.whole) == 3
    assert [event.outcome for event in r.emitted.of(Settled)] == ["engine_error"]


@pytest.mark.parametrize(("method", "path"), [("GET", "/x"), ("POST", "/v1/completions")])
async def test_what_the_engine_began_to_answer_is_not_sent_again(
    rig: Any, serve_raw: Any, method: str, path: str
) -> None:
    """A connection that breaks within the head of an answer was no stale one: the engine had the request."""
    engine = Engine(begin_an_answer)
    r = await rig(await serve_raw(engine))
    await get(r)
    async with r.client.request(method, r.url + path, data=b"{}" if method == "POST" else None) as got:
        assert got.status == 502
    assert len(engine.whole) == 2


async def test_an_engine_that_is_gone(rig: Any) -> None:
    """Its kept connection breaks and no fresh one is taken: the error states that it does not accept connections."""
    server: asyncio.Server | None = None

    async def leave(writer: asyncio.StreamWriter) -> None:
        assert server is not None
        server.close()
        writer.close()

    server = await asyncio.start_server(Engine(leave), "127.0.0.1", 0)
    r = await rig(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    await get(r)
    async with r.client.post(r.url + "/v1/completions", json={}) as got:
        assert got.status == 502
        assert "does not accept connections" in (await got.json())["error"]["message"]
    assert [event.outcome for event in r.emitted.of(Settled)] == ["engine_error"]
    await server.wait_closed()


def test_a_body_is_kept_for_as_long_as_it_may_be_sent_again() -> None:
    """A short one until its answer begins; a long one is not repeatable."""
    short, long = BodyPayload([b"x"], lambda: None), BodyPayload([LONG.encode()], lambda: None)
    assert (short.is_repeatable, long.is_repeatable) == (True, False)
    short.drop()
    assert list(short.pieces) == []


async def test_what_breaks_later_may_have_been_worked_on(
    rig: Any, serve_raw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kept connection that breaks long after the request was sent costs the request: it is not sent again."""
    monkeypatch.setattr(engine_io, "MAX_STALE_S", 0.0)
    engine = Engine(close)
    r = await rig(await serve_raw(engine))
    assert [await get(r), await get(r)] == [200, 502]
    assert len(engine.whole) == 2


async def test_what_a_busy_engine_closed_unread_is_sent_again(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An event loop that stood still closes the idle connection before it looks at what came on it meanwhile."""
    monkeypatch.setattr(engine_io, "MAX_STALE_S", 0.0)
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)

        async def serve() -> None:
            for ends in (True, False):
                connection, _ = await loop.sock_accept(listener)
                with connection:
                    await loop.sock_recv(connection, 4096)
                    await loop.sock_sendall(connection, OK)
                    if ends:
                        came = asyncio.Event()
                        loop.add_reader(connection, came.set)
                        await came.wait()
                        loop.remove_reader(connection)
                    else:
                        await asyncio.Event().wait()

        serving = asyncio.ensure_future(serve())
        r = await rig(f"http://127.0.0.1:{listener.getsockname()[1]}")
        assert [await get(r), await get(r)] == [200, 200]
        serving.cancel()
        await asyncio.wait((serving,))
