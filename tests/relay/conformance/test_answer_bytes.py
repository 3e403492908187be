"""Answers: the client sees what it would see without a relay, byte for byte."""

from __future__ import annotations

import asyncio
import gzip

import pytest

from .compare import StartSides, assert_same_answer
from .raw_engine import StartRaw
from .refusals import assert_refused
from .wire import Address, Answer, ask, chunked, connected, read_answer, read_request, request

CHAT = request(b"POST /v1/chat/completions HTTP/1.1", body=b'{"model":"m","messages":[]}')
UNREAD = request(b"GET /x HTTP/1.1", b"TE: trailers")
ASKED = pytest.mark.parametrize("sent", [UNREAD, CHAT], ids=["unread", "chat"])
MEGABYTE = bytes(range(256)) * 4096
PACKED = gzip.compress(b'{"usage":{"prompt_tokens":1,"completion_tokens":2}}' * 50, mtime=0)
USAGE = b'{"choices":[{}],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}'
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


def answer(line: bytes, *headers: bytes, body: bytes | None = None) -> bytes:
    """An answer with nothing in it but what is given; a `body` gets its length as the last header."""
    length = () if body is None else (b"content-length: %d" % len(body),)
    return b"\r\n".join((line, *headers, *length, b"", body or b""))


ANSWERS = {
    "no header but the length": OK,
    "no body": answer(b"HTTP/1.1 200 OK", body=b""),
    "a server's headers": answer(
        b"HTTP/1.1 200 OK",
        *(b"date: Mon, 30 Nov 2026 00:00:00 GMT", b"server: uvicorn", b"content-type: application/json"),
        body=USAGE,
    ),
    "204": answer(b"HTTP/1.1 204 No Content", b"x-a: 1"),
    "304": answer(b"HTTP/1.1 304 Not Modified", b'ETag: "a"'),
    "304 with the length of what it is": answer(b"HTTP/1.1 304 Not Modified", b"content-length: 100"),
    "205": answer(b"HTTP/1.1 205 Reset Content", body=b""),
    "206": answer(b"HTTP/1.1 206 Partial Content", b"content-range: bytes 0-1/5", body=b"ab"),
    "201 with a location": answer(b"HTTP/1.1 201 Created", b"location: /x/1", body=b""),
    "a redirect": answer(b"HTTP/1.1 307 Temporary Redirect", b"location: http://elsewhere/x", body=b""),
    "a redirect to the engine": answer(b"HTTP/1.1 308 Permanent Redirect", b"Location: /x/", body=b"moved"),
    "401": answer(b"HTTP/1.1 401 Unauthorized", b"WWW-Authenticate: Bearer", b"WWW-Authenticate: Basic", body=b"{}"),
    "404": answer(b"HTTP/1.1 404 Not Found", body=b'{"detail":"Not Found"}'),
    "418": answer(b"HTTP/1.1 418 I'm a teapot", body=b"tea"),
    "429": answer(b"HTTP/1.1 429 Too Many Requests", b"Retry-After: 3", b"retry-after-ms: 2900", body=b"{}"),
    "500": answer(b"HTTP/1.1 500 Internal Server Error", b"content-type: text/html", body=b"<h1>no</h1>"),
    "503": answer(b"HTTP/1.1 503 Service Unavailable", b"retry-after: 1", body=b""),
    "599": answer(b"HTTP/1.1 599 Network Connect Timeout", body=b"late"),
    "299": answer(b"HTTP/1.1 299 Odd", body=b"odd"),
    "an empty reason": b"HTTP/1.1 200 \r\ncontent-length: 2\r\n\r\nok",
    "a reason of its own": answer(b"HTTP/1.1 200 Tr\xe8s bien; (really): yes", body=b"ok"),
    "two cookies": answer(b"HTTP/1.1 200 OK", b"Set-Cookie: a=b; Path=/", b"set-cookie: c=d, e", body=b"ok"),
    "one name in several cases": answer(b"HTTP/1.1 200 OK", b"X-A: 1", b"x-b: 2", b"x-a: 3", b"X-a: 4", body=b"ok"),
    "names in their case": answer(b"HTTP/1.1 200 OK", b"ETag: 1", b"X-CamelCase: 2", b"x-lower: 3", body=b"ok"),
    "Latin-1": answer(b"HTTP/1.1 200 OK", b"x-name: caf\xe9 \xa0\xff", body=b"\xff"),
    "UTF-8": answer(b"HTTP/1.1 200 OK", b"X-Name: \xe6\x97\xa5", body=b"\xe6\x97\xa5"),
    "empty values": answer(b"HTTP/1.1 200 OK", b"x-empty:", b"X-Spaces:  ", body=b"ok"),
    "odd names": answer(b"HTTP/1.1 200 OK", b"!#$%&'*+-.^_`|~09: v", b"X_Y: z", body=b"ok"),
    "300 headers": answer(b"HTTP/1.1 200 OK", *(b"x-%d: %d" % (i, i) for i in range(300)), body=b"ok"),
    "60 KB in one": answer(b"HTTP/1.1 200 OK", b"x-long: " + b"a" * 60_000, body=b"ok"),
    "60 KB in sixty": answer(b"HTTP/1.1 200 OK", *(b"x-%d: " % i + b"b" * 1000 for i in range(60)), body=b"ok"),
    "other proxies": answer(b"HTTP/1.1 200 OK", b"Via: 1.1 a", b"Age: 3", b"Alt-Svc: h3", b"Vary: *", body=b"ok"),
    "hop by hop": answer(
        b"HTTP/1.1 200 OK", b"Connection: x-gone", b"x-gone: 1", b"Keep-Alive: timeout=5", b"x-kept: 2", body=b"ok"
    ),
    "timings of its own": answer(b"HTTP/1.1 200 OK", b"openai-processing-ms: 3", b"Server-Timing: a;dur=1", body=b"{}"),
    "gzip": answer(b"HTTP/1.1 200 OK", b"content-encoding: gzip", b"content-type: application/json", body=PACKED),
    "gzip in chunks": answer(b"HTTP/1.1 200 OK", b"Content-Encoding: gzip", b"transfer-encoding: chunked")
    + chunked(PACKED, 9),
    "br": answer(b"HTTP/1.1 200 OK", b"content-encoding: br", body=b"\x0b\x02\x80hello\x03"),
    "an unknown coding": answer(b"HTTP/1.1 200 OK", b"content-encoding: zz, gzip", body=b"\x00\x01"),
    "gzip that is none": answer(b"HTTP/1.1 200 OK", b"content-encoding: gzip", body=b"not packed"),
    "usage": answer(b"HTTP/1.1 200 OK", b"content-type: application/json", body=USAGE),
    "JSON in chunks": answer(b"HTTP/1.1 200 OK", b"content-type: application/json", b"transfer-encoding: chunked")
    + chunked(USAGE, 5),
    "1 MiB": answer(b"HTTP/1.1 200 OK", body=MEGABYTE),
    "4 MiB in chunks": answer(b"HTTP/1.1 200 OK", b"transfer-encoding: chunked") + chunked(MEGABYTE * 4, 99_999),
    "chunks of a byte": answer(b"HTTP/1.1 200 OK", b"transfer-encoding: chunked") + chunked(b"abc" * 300, 1),
    "odd chunk sizes": answer(b"HTTP/1.1 200 OK", b"Transfer-Encoding: Chunked")
    + b"00A\r\n0123456789\r\n0b\r\n01234567890\r\n000\r\n\r\n",
    "chunk extensions": answer(b"HTTP/1.1 200 OK", b"transfer-encoding: chunked")
    + b'3;a\r\nabc\r\n2;b=c;d="e"\r\nde\r\n0;last\r\n\r\n',
    "chunks with nothing": answer(b"HTTP/1.1 200 OK", b"transfer-encoding: chunked") + b"0\r\n\r\n",
    "trailers": answer(b"HTTP/1.1 200 OK", b"Trailer: X-Sum, x-two", b"transfer-encoding: chunked")
    + b"3\r\nabc\r\n0\r\nX-Sum: caf\xe9\r\nx-two: \r\n\r\n",
    "trailers that were not announced": answer(b"HTTP/1.1 200 OK", b"transfer-encoding: chunked")
    + b"3\r\nabc\r\n0\r\nServer-Timing: total;dur=5\r\n\r\n",
    "HTTP/1.0 that is kept": b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\ncontent-length: 2\r\n\r\nok",
    "early hints": b"HTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload\r\nlink: </b>\r\n\r\n" + OK,
    "several interim answers": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n"
    b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\nHTTP/1.1 103 More\r\n\r\n" + OK,
    "interim, then 204": b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n",
}

ENDED_BY_CLOSE = {
    "HTTP/1.1": b"HTTP/1.1 200 OK\r\ncontent-type: text/x\r\n\r\nto the end",
    "HTTP/1.1 that says so": b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nto the end",
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\nServer: old\r\n\r\nto the end",
    "HTTP/1.0 with a length": b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok",
    "nothing": b"HTTP/1.1 200 OK\r\nx-a: 1\r\n\r\n",
    "much": b"HTTP/1.1 200 OK\r\n\r\n" + MEGABYTE,
    "an error": b"HTTP/1.0 500 Oh no\r\n\r\nno",
    "204": b"HTTP/1.0 204 No Content\r\n\r\n",
    "with a length, closed at once": OK,
}

HEADS = {  # answers to HEAD
    "the length of what it is": b"HTTP/1.1 200 OK\r\nContent-Length: 12345\r\nETag: a\r\n\r\n",
    "no length": b"HTTP/1.1 200 OK\r\nx-a: 1\r\n\r\n",
    "no bytes": b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
    "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    "404": b"HTTP/1.1 404 Not Found\r\ncontent-length: 22\r\n\r\n",
    "304": b"HTTP/1.1 304 Not Modified\r\ncontent-length: 9\r\n\r\n",
    "gzip": b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 7\r\n\r\n",
}

BROKEN = {  # what an engine that dies leaves behind
    "in a chunk": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nabcde\r\na\r\nabc",
    "between chunks": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nabcde\r\n",
    "before the last chunk's end": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\n",
    "within an event": b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    b"9\r\ndata: a\n\n\r\n6\r\ndata: \r\n",
    "in a long body": b"HTTP/1.1 200 OK\r\ncontent-length: 9000000\r\n\r\n" + MEGABYTE,
    "bad chunk size": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nabcde\r\nzz\r\nabc\r\n",
    "chunk longer than its size": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nabcdefgh\r\n0\r\n\r\n",
}


@ASKED
@pytest.mark.parametrize("sent_back", ANSWERS.values(), ids=ANSWERS)
async def test_answers(sides: StartSides, sent_back: bytes, sent: bytes) -> None:
    """Interim answers, status, reason, headers, body and trailers come as they were sent; nothing is invented."""
    both = await sides(sent_back)
    await both.compare(sent)


@ASKED
@pytest.mark.parametrize("sent_back", ENDED_BY_CLOSE.values(), ids=ENDED_BY_CLOSE)
async def test_answers_ended_by_their_connection(sides: StartSides, sent_back: bytes, sent: bytes) -> None:
    """A body that ends with the engine's connection is whole for the client."""
    both = await sides(sent_back, closes=True)
    compared = await both.compare(sent)
    assert compared.relayed.final and compared.relayed.final.is_whole


@pytest.mark.parametrize("sent_back", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("path", [b"/x", b"/v1/models"], ids=bytes.decode)
async def test_answers_to_head(sides: StartSides, sent_back: bytes, path: bytes) -> None:
    """The answer to HEAD has the headers of the answer to GET, and no body."""
    both = await sides(sent_back)
    await both.compare(request(b"HEAD %b HTTP/1.1" % path))


@ASKED
@pytest.mark.parametrize(
    "name", ["early hints", "trailers", "odd chunk sizes", "two cookies", "no header but the length"]
)
async def test_answers_in_small_pieces(sides: StartSides, name: str, sent: bytes) -> None:
    """An answer that comes byte by byte is the same answer."""
    whole = ANSWERS[name]
    both = await sides(tuple(whole[at : at + 1] for at in range(len(whole))))
    await both.compare(sent)


@ASKED
@pytest.mark.parametrize("left", BROKEN.values(), ids=BROKEN)
async def test_broken_answers_stay_broken(sides: StartSides, left: bytes, sent: bytes) -> None:
    """A client cannot take a part for the whole: its body breaks where the engine's broke, or it gets a 502 instead."""
    both = await sides(left, closes=True)
    compared = await both.ask_both(sent)
    direct, relayed = compared.direct.final, compared.relayed.final
    assert direct and relayed and not direct.is_whole
    if relayed.status == 502:
        assert_refused(compared.relayed, 502, without=b"abcde")
    else:
        assert not relayed.is_whole and direct.body.startswith(relayed.body)


@ASKED
@pytest.mark.parametrize(
    "left", [b"", b"HTTP/1.1 2", b"HTTP/1.1 200 OK\r\nx-leak", b"HTTP/1.1 103 Early\r\n\r\n"], ids=str
)
async def test_no_answer_is_an_error(sides: StartSides, left: bytes, sent: bytes) -> None:
    """An engine that closes its connection instead of answering is named by a 502, without its bytes."""
    both = await sides(left, closes=True)
    assert_refused(await ask(both.relayed, sent), 502, without=b"leak")


@ASKED
async def test_an_answer_has_one_id(sides: StartSides, sent: bytes) -> None:
    """The client's id is the one that the engine saw, though the engine answers with its own."""
    both = await sides(answer(b"HTTP/1.1 200 OK", b"X-Request-Id: theirs", b"x-request-id: again", body=b"ok"))
    compared = await both.ask_both(sent)
    assert compared.relayed.final is not None
    [id] = compared.relayed.final.all(b"x-request-id")
    assert compared.asked_by_relay[0].all(b"x-request-id") == [id]


@pytest.mark.parametrize("path", [b"/x", b"/v1/chat/completions"], ids=bytes.decode)
@pytest.mark.parametrize("framing", ["length", "chunks"])
async def test_answers_before_the_body(raw: StartRaw, path: bytes, framing: str) -> None:
    """An engine that refuses a body without reading it is understood, though the body is still on its way."""
    body = MEGABYTE * 8
    refusal = b"HTTP/1.1 413 Too Large\r\nconnection: close\r\ncontent-length: 4\r\n\r\nlong"

    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(refusal)
        writer.write_eof()
        while await reader.read(1 << 20):
            pass

    line = b"POST %b HTTP/1.1" % path
    sent = (
        request(line, body=body)
        if framing == "length"
        else request(line, b"transfer-encoding: chunked") + chunked(body, 1 << 16)
    )
    direct, relayed = await raw(engine)
    assert_same_answer(await ask(direct, sent), await ask(relayed, sent))


@ASKED
async def test_the_first_part_of_an_answer_does_not_wait_for_the_second(raw: StartRaw, sent: bytes) -> None:
    """Each part of an answer is with the client while the engine still holds the next one back."""
    events = [asyncio.Event() for _ in range(3)]

    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 103 Early Hints\r\n\r\n")
        await events[0].wait()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        await events[1].wait()
        writer.write(b"9\r\ndata: 1\n\n\r\n")
        await events[2].wait()
        writer.write(b"9\r\ndata: 2\n\n\r\n0\r\n\r\n")

    async def parts(address: Address) -> Answer:
        for event in events:
            event.clear()
        async with connected(address) as (reader, writer):
            writer.write(sent)
            early = await reader.readuntil(b"\r\n\r\n")
            events[0].set()
            head = await reader.readuntil(b"\r\n\r\n")
            events[1].set()
            first = await reader.readuntil(b"data: 1\n\n\r\n")
            events[2].set()
            rest = asyncio.StreamReader()
            rest.feed_data(early + head + first + await reader.readuntil(b"0\r\n\r\n"))
            rest.feed_eof()
            return await read_answer(rest, b"GET")

    direct, relayed = await raw(engine)
    assert_same_answer(await parts(direct), await parts(relayed))
