"""Requests: the engine sees what it would see without a relay, byte for byte."""

from __future__ import annotations

import asyncio
import gzip
import socket
import struct
from contextlib import suppress
from dataclasses import replace

import pytest

from ...waiting import PATIENCE
from .compare import StartSides, assert_same_answer, assert_same_request
from .raw_engine import StartRaw
from .wire import (
    Address,
    Answer,
    Message,
    ask,
    chunked,
    connected,
    read_answer,
    read_request,
    request,
)

OK = b"HTTP/1.1 200 OK\r\nServer: e\r\nDate: now\r\nContent-Type: text/x\r\nContent-Length: 2\r\n\r\nok"
CHAT = b'{ "model":"m" ,"temperature":1e400,"a":1,"a":2,"messages":[{"role":"user","content":"h\xc3\xa9"}]}\n'
CHAT_LINE = b"POST /v1/chat/completions HTTP/1.1"
GET_LINE = b"GET /x HTTP/1.1"
POST_LINE = b"POST /x HTTP/1.1"
MEGABYTE = bytes(range(256)) * 4096

METHODS = b"GET HEAD OPTIONS PUT DELETE PATCH POST PROPFIND QUERY PURGE REPORT M-SEARCH MKCOL LINK".split()

TARGETS = {
    "root": b"/",
    "question mark alone": b"/x?",
    "root with question mark": b"/?",
    "empty value": b"/x?a=&b",
    "several question marks": b"/x?a?b?c=d&&",
    "encoded slash": b"/a%2Fb//c;d?x=1&y=%20+&z=%zz",
    "encoded control characters": b"/%00%0d%0aHost:%20y",
    "encoded letters": b"/%61%62%7E/%7e",
    "encoded emoji": b"/%F0%9F%98%80",
    "dots": b"/v1/models/../x/./y",
    "encoded dots": b"/v1/%2e%2e/x",
    "two slashes": b"//x//",
    "looks like an address": b"//elsewhere:1/x",
    "address in the query": b"/x?u=http://elsewhere:1/y",
    "odd characters": b"/x?q='\"<>|\\^`{}[]",
    "semicolons": b"/x;a=1;b=2",
    "plus and at": b"/a+b@c:d,e!f$g(h)*i~",
    "long": b"/" + b"a" * 8000 + b"?" + b"b" * 8000,
    "asterisk in a path": b"/*",
}

HEADERS = {
    "Latin-1": (b"X-Name: caf\xe9 \xa0\xff",),
    "UTF-8": (b"X-Name: \xe6\x97\xa5\xe6\x9c\xac \xf0\x9f\x98\x80",),
    "two of one name in two cases": (b"X-Role: admin", b"x-role: user"),
    "many of one name": (b"x-a: 1", b"x-b: 2", b"x-a: 3", b"X-A: 4", b"x-b: 5", b"x-a: 1"),
    "two cookies": (b"cookie: a=b", b'Cookie: c="d"; e'),
    "case": (b"X-CamelCase: 1", b"x-lower: 2", b"X-UPPER: 3", b"ETag: 4", b"WWW-x: 5"),
    "empty value": (b"X-Empty:", b"X-Spaces:   ", b"x-after: 1"),
    "spaces around and within": (b"X-Spaced:  a \t b  ", b"X-Tight:v"),
    "separators in a value": (b'X-Odd: a:b;c,d="e, f"\\(g)@[]{}?', b"X-Comma: ,,"),
    "odd names": (b"!#$%&'*+-.^_`|~09: v", b"9: v", b"_: v", b"X_Under_Score: v"),
    "framing with underscores": (b"Content_Length: 3", b"Transfer_Encoding: chunked"),
    "129 headers": tuple(b"X-%d: %d" % (i, i) for i in range(128)),
    "500 headers": tuple(b"X-%d: %d" % (i % 50, i) for i in range(500)),
    "60 KB in one": (b"x-long: " + b"a" * 60_000,),
    "60 KB in sixty": tuple(b"x-long-%d: " % i + b"b" * 1000 for i in range(60)),
    "a long name": (b"x-" + b"n" * 4000 + b": v",),
    "credentials": (b"Authorization: Bearer k", b"api-key: k", b"X-API-Key: k", b"anthropic-version: 2023-06-01"),
    "a browser's": (b"User-Agent: M/5.0", b"Accept: */*", b"Accept-Language: de", b"Referer: http://x/y", b"DNT: 1"),
    "an empty user agent": (b"User-Agent:",),
    "conditions": (b'If-None-Match: W/"a"', b"Range: bytes=0-1", b"If-Modified-Since: yesterday"),
    "other proxies": (b"Via: 1.1 a", b"Forwarded: for=1.2.3.4", b"X-Real-IP: 1.2.3.4", b"Max-Forwards: 3"),
    "tracing": (b"traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", b"TraceState: a=b"),
    "codings": (b"Accept-Encoding: gzip;q=0, br, *;q=0.5",),
    "hop by hop": (b"Connection: x-gone , X-Gone-Too", b"x-gone: 1", b"X-gone-too: 2", b"TE: trailers", b"x-kept: 3"),
    "a trailing dot": (b"x.: v", b"Date: now", b"Content-Language: en"),
}

BODIES = {
    "with a length": request(POST_LINE, body=b"abc"),
    "empty": request(POST_LINE, body=b""),
    "none": request(POST_LINE),
    "length first": b"POST /x HTTP/1.1\r\nContent-Length: 3\r\nHost: x\r\nX-A: 1\r\n\r\nabc",
    "length with zeros": b"POST /x HTTP/1.1\r\nhost: x\r\ncontent-length: 0003\r\n\r\nabc",
    "of a GET": request(GET_LINE, body=b"abc"),
    "that reads as a request": request(GET_LINE, body=b"GET /y HTTP/1.1\r\nhost: y\r\n\r\n"),
    "of a DELETE": request(b"DELETE /x HTTP/1.1", body=b'{"a":1}'),
    "of an OPTIONS": request(b"OPTIONS /x HTTP/1.1", body=b"abc"),
    "1 MiB": request(POST_LINE, body=MEGABYTE),
    "chunked": request(POST_LINE, b"transfer-encoding: chunked") + chunked(b"abcdef", 4),
    "chunked, nothing in it": request(POST_LINE, b"transfer-encoding: chunked") + b"0\r\n\r\n",
    "chunked in odd case": request(POST_LINE, b"Transfer-Encoding: cHuNkEd") + chunked(b"abc"),
    "chunked GET": request(GET_LINE, b"transfer-encoding: chunked") + chunked(b"abc"),
    "chunked by bytes": request(POST_LINE, b"transfer-encoding: chunked") + chunked(b"abc" * 300, 1),
    "chunked, 4 MiB": request(POST_LINE, b"transfer-encoding: chunked") + chunked(MEGABYTE * 4, 77_777),
    "sizes with zeros and capitals": request(POST_LINE, b"transfer-encoding: chunked")
    + b"00A\r\n0123456789\r\n0b\r\n01234567890\r\n000\r\n\r\n",
    "extensions": request(POST_LINE, b"transfer-encoding: chunked")
    + b'3;a\r\nabc\r\n2;b=c;d="e"\r\nde\r\n0;last\r\n\r\n',
    "trailers": request(POST_LINE, b"transfer-encoding: chunked", b"trailer: x-sum, X-Two")
    + b"3\r\nabc\r\n0\r\nX-Sum: caf\xe9\r\nx-two:\r\n\r\n",
    "encoded": request(POST_LINE, b"content-encoding: gzip", body=gzip.compress(b"x" * 999, mtime=0)),
    "multipart": request(
        POST_LINE,
        b'content-type: multipart/form-data; boundary="b"',
        body=b"--b\r\ncontent-disposition: form-data; name=a\r\n\r\n\xff\r\n--b--\r\n",
    ),
    "chat": request(CHAT_LINE, body=CHAT),
    "chat in chunks": request(CHAT_LINE, b"transfer-encoding: chunked") + chunked(CHAT, 7),
    "chat with extensions": request(CHAT_LINE, b"transfer-encoding: chunked")
    + b"%x;a=b\r\n%b\r\n0;c\r\n\r\n" % (len(CHAT), CHAT),
    "chat without a body": request(CHAT_LINE, body=b""),
    "chat that is no JSON": request(CHAT_LINE, body=MEGABYTE[:1000]),
    "chat of another type": request(CHAT_LINE, b"Content-Type: text/plain", body=CHAT),
    "chat encoded": request(CHAT_LINE, b"content-encoding: gzip", body=gzip.compress(CHAT, mtime=0)),
    "chat in UTF-16": request(CHAT_LINE, body=CHAT.decode().encode("utf-16")),
    "chat behind a byte order mark": request(CHAT_LINE, body=b"\xef\xbb\xbf" + CHAT),
    "chat with a query": request(b"POST /v1/chat/completions?api-version=1&x=%2F HTTP/1.1", body=CHAT),
    "embeddings": request(b"POST /v1/embeddings HTTP/1.1", body=b'{"input":["a",  "b"],"model":"m"}'),
    "an unknown route": request(b"POST /v1/decisions HTTP/1.1", body=CHAT),
}


@pytest.mark.parametrize("method", METHODS, ids=bytes.decode)
async def test_methods(sides: StartSides, method: bytes) -> None:
    """Every method arrives, with its answer."""
    both = await sides(OK.removesuffix(b"ok") if method == b"HEAD" else OK)
    await both.compare(request(method + b" /x HTTP/1.1"))


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
async def test_targets(sides: StartSides, target: bytes) -> None:
    """No target is decoded, normalised or quoted again."""
    both = await sides(OK)
    await both.compare(request(b"GET %b HTTP/1.1" % target))
    await both.compare(request(b"POST %b HTTP/1.1" % target, body=b"abc"))


async def test_the_server_as_a_target(sides: StartSides) -> None:
    """`OPTIONS *` asks the engine as a whole."""
    both = await sides(OK)
    await both.compare(request(b"OPTIONS * HTTP/1.1"))


@pytest.mark.parametrize(
    ("target", "path"),
    [
        (b"http://x/p?q", b"/p?q"),
        (b"http://x/v1/chat/completions", b"/v1/chat/completions"),
        (b"HTTP://X", b"/"),
        (b"http://x?q", b"/?q"),
        (b"http://x/", b"/"),
        (b"https://x//p%2F?", b"//p%2F?"),
    ],
    ids=str,
)
async def test_absolute_targets_are_asked_by_their_path(sides: StartSides, target: bytes, path: bytes) -> None:
    """A target in absolute form reaches the engine in origin form, as a gateway must send it."""
    both = await sides(OK)
    compared = await both.ask_both(request(b"POST %b HTTP/1.1" % target, body=CHAT))
    compared.assert_same_answers()
    assert [(m.target, m.body) for m in compared.asked_by_relay] == [(path, CHAT)]


@pytest.mark.parametrize("line", [GET_LINE, CHAT_LINE], ids=["unread", "chat"])
@pytest.mark.parametrize("headers", HEADERS.values(), ids=HEADERS)
async def test_headers(sides: StartSides, headers: tuple[bytes, ...], line: bytes) -> None:
    """Headers arrive in order, with their names and values as they were written, and none is invented."""
    both = await sides(OK)
    await both.compare(request(line, *headers, body=CHAT if line == CHAT_LINE else None))


async def test_two_tenants_are_not_one(sides: StartSides) -> None:
    """A second tenant header is refused, or both arrive in order."""
    both = await sides(OK)
    compared = await both.ask_both(request(CHAT_LINE, b"X-Tenant-Id: a", b"x-tenant-id: b", body=CHAT))
    if compared.relayed.status != 400:
        compared.assert_same_requests()


@pytest.mark.parametrize("sent", BODIES.values(), ids=BODIES)
async def test_bodies(sides: StartSides, sent: bytes) -> None:
    """A body arrives as it was sent, however it was framed."""
    both = await sides(OK)
    await both.compare(sent)


@pytest.mark.parametrize("name", ["trailers", "chunked by bytes", "chat", "chat in chunks", "that reads as a request"])
@pytest.mark.parametrize("size", [1, 13])
async def test_slow_clients(sides: StartSides, name: str, size: int) -> None:
    """A request that comes in small pieces is the same request."""
    both = await sides(OK)
    sent = BODIES[name]
    await both.compare(*(sent[at : at + size] for at in range(0, len(sent), size)))


async def test_empty_lines_before_a_request(sides: StartSides) -> None:
    """Empty lines before a request line are passed over, as old clients send them."""
    both = await sides(OK)
    compared = await both.ask_both(b"\r\n\r\n" + request(GET_LINE))
    assert (compared.relayed.status, [m.target for m in compared.asked_by_relay]) == (200, [b"/x"])


async def test_pipelined_requests(sides: StartSides) -> None:
    """Requests that are sent at once are answered one after the other, each with its own answer."""
    sent = [
        request(b"GET /1 HTTP/1.1"),
        request(b"POST /2 HTTP/1.1", body=b"GET /no HTTP/1.1\r\n\r\n"),
        request(b"HEAD /3 HTTP/1.1"),
        request(CHAT_LINE, body=CHAT),
        request(b"POST /5 HTTP/1.1", b"transfer-encoding: chunked") + chunked(b"abc", 2),
        request(b"GET /6 HTTP/1.1", b"connection: close"),
    ]

    def script(message: Message) -> bytes:
        body = b"" if message.method == b"HEAD" else message.target
        return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(message.target), body)

    async def all_answers(address: Address) -> list[Answer]:
        async with connected(address) as (reader, writer):
            writer.write(b"".join(sent))
            answers = [await read_answer(reader, piece.partition(b" ")[0]) for piece in sent]
            assert await reader.read() == b""
        return answers

    both = await sides(script)
    direct, asked = await all_answers(both.direct), both.engine.take()
    relayed, asked_by_relay = await all_answers(both.relayed), both.engine.take()
    for one, other in zip(direct, relayed, strict=True):
        assert_same_answer(one, other)
    for message, other_message in zip(asked, asked_by_relay, strict=True):
        assert_same_request(message, other_message)


# --- HTTP/1.0 ---

STREAM = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    b"6\r\ndata: \r\n5\r\nx\n\ny\n\r\n0\r\n\r\n"
)


@pytest.mark.parametrize("line", [b"GET /x HTTP/1.0", b"POST /v1/chat/completions HTTP/1.0"])
@pytest.mark.parametrize("host", [b"", b"host: x\r\n"], ids=["without a host", "with a host"])
async def test_http_1_0_ends_with_its_answer(sides: StartSides, line: bytes, host: bytes) -> None:
    """A client of HTTP/1.0 gets the answer, and the connection ends."""
    both = await sides(OK)
    async with connected(both.relayed) as (reader, writer):
        writer.write(line + b"\r\n" + host + b"content-length: %d\r\n\r\n%b" % (len(CHAT), CHAT))
        answer = await read_answer(reader, b"POST")
        assert answer.final and (answer.status, answer.final.body) == (200, b"ok")
        assert await reader.read() == b""


@pytest.mark.parametrize("line", [b"POST /x HTTP/1.0", b"POST /v1/chat/completions HTTP/1.0"])
async def test_http_1_0_gets_no_chunks(sides: StartSides, line: bytes) -> None:
    """What the engine sends in chunks ends by the end of the connection, even if the client would keep it."""
    both = await sides(STREAM)
    async with connected(both.relayed) as (reader, writer):
        writer.write(line + b"\r\nconnection: keep-alive\r\ncontent-length: %d\r\n\r\n%b" % (len(CHAT), CHAT))
        answer = await read_answer(reader, b"POST")
        assert answer.final and not answer.final.is_chunked
        assert answer.final.body == b"data: x\n\ny\n"
        assert await reader.read() == b""


async def test_http_1_0_is_kept_if_asked(sides: StartSides) -> None:
    """A client of HTTP/1.0 that asks for it may send a second request, and the answer says so."""
    both = await sides(OK)
    async with connected(both.relayed) as (reader, writer):
        for _ in range(2):
            writer.write(b"GET /x HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n")
            answer = await read_answer(reader, b"GET")
            assert answer.final and answer.final.body == b"ok"
            assert answer.final.value(b"connection").lower() == b"keep-alive"


async def test_http_1_0_gets_no_interim_answers(sides: StartSides) -> None:
    """A client that does not know interim answers gets the final one alone."""
    both = await sides(b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n" + OK)
    answer = await ask(both.relayed, b"GET /x HTTP/1.0\r\n\r\n")
    assert (answer.interim, answer.status) == ((), 200)


# --- clients that wait, half-close, or leave ---


@pytest.mark.parametrize("line", [POST_LINE, CHAT_LINE], ids=["unread", "chat"])
async def test_expect_continue_may_be_refused(raw: StartRaw, line: bytes) -> None:
    """A client that waits, and is refused by the head of its request alone, gets that answer, whenever it sends."""

    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 401 No\r\nConnection: close\r\nContent-Length: 2\r\n\r\nno")
        writer.write_eof()
        await reader.read()

    _, relayed = await raw(engine)
    async with connected(relayed) as (reader, writer):
        writer.write(request(line, b"Expect: 100-continue", b"Content-Length: %d" % len(CHAT)))
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"HTTP/1.1 100 "):
            writer.write(CHAT)
            head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 401 No\r\n")


@pytest.mark.parametrize("line", [POST_LINE, CHAT_LINE], ids=["unread", "chat"])
@pytest.mark.parametrize("framing", ["length", "chunks"])
async def test_expect_continue(raw: StartRaw, line: bytes, framing: str) -> None:
    """A client that waits for 100 Continue before a large body gets it once, and the engine gets all of the body."""
    body = MEGABYTE * 4
    bodies: list[bytes] = []

    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def go_on(head: Message) -> None:
            if b"100-continue" in head.value(b"expect").lower():
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")

        if message := await read_request(reader, go_on):
            bodies.append(message.body)
            writer.write(OK)

    async def expecting(address: Address) -> Answer:
        async with connected(address) as (reader, writer):
            length = b"content-length: %d" % len(body) if framing == "length" else b"transfer-encoding: chunked"
            writer.write(request(line, b"Expect: 100-Continue", length))
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
            writer.write(body if framing == "length" else chunked(body, 99_999))
            return await read_answer(reader, b"POST")

    direct, relayed = await raw(engine)
    assert_same_answer(await expecting(direct), await expecting(relayed))
    assert bodies == [body, body]


# Clients that half-close and clients that leave send the same at first: the end of their side. An engine to which it is
# passed on can do as it would without a relay.


@pytest.mark.parametrize("sent", [BODIES["of a GET"], BODIES["chunked"], BODIES["chat"]], ids=["GET", "chunks", "chat"])
@pytest.mark.parametrize("answer", [OK, STREAM], ids=["short", "stream"])
async def test_half_closed_clients_get_their_answer(raw: StartRaw, sent: bytes, answer: bytes) -> None:
    """A client that sends nothing after its request, and says so, gets the answer that the engine begins later."""

    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await read_request(reader):
            # by now the end of what the client sends has been seen, by whoever stands next to it
            for _ in range(20):
                await asyncio.sleep(0.001)
            writer.write(answer)

    async def half_closed(address: Address) -> Answer:
        async with connected(address) as (reader, writer):
            writer.write(sent)
            writer.write_eof()
            # where the engine takes long, a relay asks with "100 Continue" whether the client is still there
            return replace(await read_answer(reader, b"POST"), interim=())

    direct, relayed = await raw(engine)
    assert_same_answer(await half_closed(direct), await half_closed(relayed))


@pytest.mark.parametrize("line", [POST_LINE, CHAT_LINE], ids=["unread", "chat"])
@pytest.mark.parametrize("way", ["closed", "reset"])
@pytest.mark.parametrize("begun", [False, True], ids=["before the answer", "within the answer"])
async def test_the_engine_sees_clients_leave(raw: StartRaw, line: bytes, way: str, begun: bool) -> None:
    """A client that closes its connection ends that to the engine, which may stop its work."""
    asked, left = asyncio.Event(), asyncio.Event()

    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        if begun:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
            writer.write(b"9\r\ndata: x\n\n\r\n")
        asked.set()
        with suppress(ConnectionError):
            await reader.read()
        left.set()

    _, relayed = await raw(engine)
    async with connected(relayed) as (reader, writer):
        writer.write(request(line, body=b'{"stream":true}'))
        await asked.wait()
        if begun:
            await reader.readuntil(b"data: x\n\n")
        if way == "reset":
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.close()
    async with asyncio.timeout(PATIENCE):
        await left.wait()


async def test_uploads_that_break_off_never_arrive_whole(sides: StartSides) -> None:
    """A body of which the client sent a part is not ended by the relay."""
    both = await sides(OK)
    part = b"%x\r\n%b\r\n" % (len(MEGABYTE), MEGABYTE)
    for sent in (
        request(POST_LINE, b"transfer-encoding: chunked") + part,
        request(POST_LINE, b"content-length: 9000000") + MEGABYTE,
        request(CHAT_LINE, b"transfer-encoding: chunked") + part,
        request(CHAT_LINE, b"content-length: 9000000") + MEGABYTE,
    ):
        async with connected(both.relayed) as (_, writer):
            writer.write(sent)
            await writer.drain()
    assert (await ask(both.relayed, request(b"GET /after HTTP/1.1"))).status == 200
    assert [message.target for message in both.engine.requests] == [b"/after"]
