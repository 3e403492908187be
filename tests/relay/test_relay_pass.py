"""Pass-through: what is not engine work reaches the engine, and comes back, as it was sent."""

from __future__ import annotations

import asyncio
import gzip
import re
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from ..waiting import PATIENCE

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


def scripted(answer: bytes, seen: list[bytes]) -> Any:
    """An engine of bytes: notes the head and body it got, sends `answer`, hangs up."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        seen.append(head)
        if length := re.search(rb"content-length: (\d+)", head.lower()):
            seen.append(await reader.readexactly(int(length[1])))
        writer.write(answer)
        writer.close()

    return talk


@pytest.mark.parametrize(
    "target",
    ["/", "/a%2Fb//c;d?x=1&y=%20+&z=%zz", "/v1/models/../x", "/%F0%9F%98%80?q='\"<>", "/a?b?c=d&&", "//x", "/?a"],
)
async def test_odd_targets_arrive_byte_for_byte(rig: Any, serve_raw: Any, target: str) -> None:
    """Paths and queries are not normalised, decoded or quoted again."""
    seen: list[bytes] = []
    r = await rig(await serve_raw(scripted(OK, seen)))
    answer = await r.raw(f"DELETE {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
    assert answer.endswith(b"\r\n\r\nok")
    assert seen[0].startswith(f"DELETE {target} HTTP/1.1\r\n".encode())


async def test_request_headers(rig: Any, serve_raw: Any) -> None:
    """Hop-by-hop headers end at the relay, all others pass, Host becomes the engine's, x-forwarded-* record the way."""
    seen: list[bytes] = []
    url = await serve_raw(scripted(OK, seen))
    r = await rig(url)
    await r.raw(
        b"GET /h HTTP/1.1\r\nHost: example.org\r\nX-Odd_Name!: a  b\r\n"
        b'cookie: a=b; c="d"\r\nauthorization: Bearer k\r\n'
        b"connection: close, x-gone\r\nx-gone: 1\r\nkeep-alive: 5\r\nte: trailers\r\nproxy-authorization: s\r\n"
        b"x-forwarded-for: 10.0.0.1\r\ntraceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n\r\n"
    )
    lines = {line.partition(b":")[0].lower(): line.partition(b": ")[2] for line in seen[0].split(b"\r\n")[1:-2]}
    assert lines[b"host"] == url.removeprefix("http://").encode()
    assert lines[b"x-odd_name!"] == b"a  b"
    assert lines[b"cookie"] == b'a=b; c="d"'
    assert lines[b"authorization"] == b"Bearer k"
    assert lines[b"x-forwarded-for"] == b"10.0.0.1, 127.0.0.1"
    assert lines[b"x-forwarded-host"] == b"example.org"
    assert lines[b"traceparent"] == b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    assert not lines.keys() & {b"x-gone", b"keep-alive", b"te", b"proxy-authorization", b"user-agent", b"accept"}


async def test_response_headers(rig: Any, serve_raw: Any) -> None:
    """Status, reason and repeated headers come back; the engine's hop-by-hop headers do not."""
    answer = (
        b"HTTP/1.1 418 Short and stout\r\nset-cookie: a=1\r\nset-cookie: b=2\r\nconnection: close\r\nx-e: v\r\n"
        b"content-length: 3\r\ncontent-type: text/x\r\nserver: e\r\n\r\ntea"
    )
    r = await rig(await serve_raw(scripted(answer, [])))
    async with r.client.get(r.url + "/") as got:
        assert (got.status, got.reason, await got.read()) == (418, "Short and stout", b"tea")
        assert got.headers.getall("set-cookie") == ["a=1", "b=2"]
        assert (got.headers["x-e"], got.headers["content-type"], got.headers["server"]) == ("v", "text/x", "e")
        assert "connection" not in got.headers


async def test_redirects_are_the_clients(rig: Any, serve_raw: Any) -> None:
    """A redirect comes back as one and is not followed."""
    answer = b"HTTP/1.1 307 T\r\nlocation: /v1/chat/completions\r\ncontent-length: 0\r\n\r\n"
    r = await rig(await serve_raw(scripted(answer, [])))
    async with r.client.get(r.url + "/x", allow_redirects=False) as got:
        assert (got.status, got.headers["location"]) == (307, "/v1/chat/completions")


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "PUT", "PATCH", "PROPFIND"])
async def test_methods(rig: Any, serve: Any, method: str) -> None:
    """Every method passes; HEAD keeps the length and has no body."""

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(body=b"12345", headers={"x-method": request.method})

    r = await rig(await serve(engine))
    async with r.client.request(method, r.url + "/m") as got:
        assert (got.status, got.headers["x-method"], got.headers["content-length"]) == (200, method, "5")
        assert await got.read() == (b"" if method == "HEAD" else b"12345")


async def test_gzip_stays_gzip(rig: Any, serve: Any) -> None:
    """Encoded bodies pass encoded, in both directions."""
    packed = gzip.compress(b"x" * 1000, mtime=0)
    seen: list[bytes] = []

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        seen.append(await request.read())
        return web.Response(body=packed, headers={"content-encoding": "gzip"})

    r = await rig(await serve(engine, auto_decompress=False))
    for path in ("/other", "/v1/completions"):
        async with r.client.post(r.url + path, data=packed, headers={"content-encoding": "gzip"}) as got:
            assert (await got.read(), got.headers["content-encoding"]) == (packed, "gzip")
    assert seen == [packed, packed]


async def test_chunked_uploads_stream_through(rig: Any, serve: Any) -> None:
    """The engine gets the first part of an upload before the client sends the second."""
    arrived = asyncio.Event()

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        first = await request.content.readany()
        arrived.set()
        return web.Response(body=first + await request.read(), headers={"x-te": request.headers["transfer-encoding"]})

    async def upload() -> Any:
        yield b"one"
        async with asyncio.timeout(PATIENCE):
            await arrived.wait()
        yield b"two"

    r = await rig(await serve(engine))
    async with r.client.put(r.url + "/files", data=upload()) as got:
        assert (await got.read(), got.headers["x-te"]) == (b"onetwo", "chunked")


async def test_a_large_download_is_not_gathered(rig: Any, serve: Any) -> None:
    """The client has the first part of an answer while the engine still holds the second back."""
    has_first = asyncio.Event()

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-length": "6"})
        await response.prepare(request)
        await response.write(b"one")
        async with asyncio.timeout(PATIENCE):
            await has_first.wait()
        await response.write(b"two")
        return response

    r = await rig(await serve(engine))
    async with r.client.get(r.url + "/x") as got:
        assert await got.content.readany() == b"one"
        has_first.set()
        assert (await got.read(), got.headers["content-length"]) == (b"two", "6")


async def test_expect_continue_is_answered(rig: Any, serve_raw: Any) -> None:
    """A client that waits for 100 Continue gets it from the relay on every path, and the engine sees no Expect."""
    for path in ("/other", "/v1/completions"):
        seen: list[bytes] = []
        r = await rig(await serve_raw(scripted(OK, seen)))
        reader, writer = await asyncio.open_connection(r.host, r.port)
        writer.write(
            f"POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
            "content-length: 2\r\nexpect: 100-continue\r\n\r\n".encode()
        )
        async with asyncio.timeout(PATIENCE):
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(b"{}")
            assert (await reader.read()).endswith(b"ok")
        writer.close()
        assert b"expect" not in seen[0].lower()
        assert seen[1] == b"{}"


async def test_http_1_0_clients(rig: Any, serve: Any) -> None:
    """An HTTP/1.0 client gets an unchunked answer of unknown length that ends with the connection."""

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"abc")
        return response

    r = await rig(await serve(engine))
    answer = await r.raw(b"GET / HTTP/1.0\r\nhost: x\r\n\r\n")
    assert answer.endswith(b"\r\n\r\nabc")
    assert b"chunked" not in answer


async def test_absolute_targets_are_asked_by_their_path(rig: Any, serve_raw: Any) -> None:
    """The absolute form, which a server must accept, never chooses another host than the engine."""
    seen: list[bytes] = []
    r = await rig(await serve_raw(scripted(OK, seen)))
    await r.raw(b"GET http://elsewhere:1/p?q HTTP/1.1\r\nhost: elsewhere:1\r\nconnection: close\r\n\r\n")
    await r.raw(b"GET http://elsewhere?q HTTP/1.1\r\nhost: elsewhere\r\nconnection: close\r\n\r\n")
    assert [head.split(b"\r\n")[0] for head in seen] == [b"GET /p?q HTTP/1.1", b"GET /?q HTTP/1.1"]


@pytest.mark.parametrize("request_line", ["GET * HTTP/1.1", "GET x/y HTTP/1.1", "CONNECT x:1 HTTP/1.1"])
async def test_targets_that_are_no_path_are_refused(rig: Any, serve_raw: Any, request_line: str) -> None:
    """A target without a path is a 400 and does not reach the engine."""
    seen: list[bytes] = []
    r = await rig(await serve_raw(scripted(OK, seen)))
    answer = await r.raw(f"{request_line}\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
    assert answer[:13] in (b"HTTP/1.1 400 ", b"HTTP/1.0 400 ")
    assert not seen


async def test_garbage_is_answered_and_survived(rig: Any, serve_raw: Any) -> None:
    """Bytes that are no HTTP get a 400, and the next client is served."""
    r = await rig(await serve_raw(scripted(OK, [])))
    assert (await r.raw(b"\x16\x03\x01 garbage\r\n\r\n")).startswith(b"HTTP/1.1 400 ")
    async with r.client.get(r.url + "/") as got:
        assert got.status == 200


async def test_websockets_pass_both_ways(rig: Any, serve: Any) -> None:
    """Text, bytes, the subprotocol and the close code cross a WebSocket in both directions."""
    closed: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        ws = web.WebSocketResponse(protocols=("realtime",))
        await ws.prepare(request)
        async for message in ws:
            if message.type is aiohttp.WSMsgType.TEXT:
                await ws.send_str(message.data.upper() + (request.query_string))
            else:
                await ws.send_bytes(message.data)
        closed.set_result(ws.close_code)
        return ws

    r = await rig(await serve(engine))
    async with r.client.ws_connect(r.url + "/v1/realtime?model=m", protocols=("x", "realtime")) as ws:
        await ws.send_str("a")
        assert (await ws.receive_str(), ws.protocol) == ("Amodel=m", "realtime")
        await ws.send_bytes(b"\x00\xff")
        assert await ws.receive_bytes() == b"\x00\xff"
        await ws.close(code=4001)
    async with asyncio.timeout(PATIENCE):
        assert await closed == 4001


async def test_a_refused_websocket_is_refused(rig: Any, serve: Any) -> None:
    """The engine's status for a handshake it does not want is the client's."""

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(status=403)

    r = await rig(await serve(engine))
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await r.client.ws_connect(r.url + "/v1/realtime")
    assert refused.value.status == 403
