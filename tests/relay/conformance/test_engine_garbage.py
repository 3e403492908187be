"""Engines that speak no HTTP, or more of it than they were asked for."""

from __future__ import annotations

import asyncio

import pytest

from .compare import StartSides
from .raw_engine import StartRaw
from .refusals import assert_refused
from .wire import END, Message, ask, connected, read_answer, read_request, request

ASKED = pytest.mark.parametrize(
    "sent",
    [request(b"GET /x HTTP/1.1"), request(b"POST /v1/chat/completions HTTP/1.1", body=b"{}")],
    ids=["unread", "chat"],
)

GARBAGE = {
    "no HTTP": b"SSH-2.0-leak\r\n\r\n",
    "JSON": b'{"leak":1}\r\n\r\n',
    "no status": b"HTTP/1.1 leak OK\r\ncontent-length: 0\r\n\r\n",
    "a status of two digits": b"HTTP/1.1 20 leak\r\ncontent-length: 0\r\n\r\n",
    "another version": b"HTTP/3.0 200 leak\r\ncontent-length: 0\r\n\r\n",
    "a header without a colon": b"HTTP/1.1 200 OK\r\nleak\r\ncontent-length: 0\r\n\r\n",
    "a space before a colon": b"HTTP/1.1 200 OK\r\nx-a : leak\r\ncontent-length: 0\r\n\r\n",
    "a NUL in a value": b"HTTP/1.1 200 OK\r\nx-a: \x00leak\r\ncontent-length: 0\r\n\r\n",
    "a bare CR in a value": b"HTTP/1.1 200 OK\r\nx-a: a\rx-b: leak\r\ncontent-length: 0\r\n\r\n",
    "a space in a name": b"HTTP/1.1 200 OK\r\nx a: leak\r\ncontent-length: 0\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\ncontent-length: 5\r\n\r\nleak!",
    "a negative length": b"HTTP/1.1 200 OK\r\ncontent-length: -4\r\n\r\nleak",
    "a length that is no number": b"HTTP/1.1 200 OK\r\ncontent-length: leak\r\n\r\nleak",
    "a length beyond 64 bits": b"HTTP/1.1 200 OK\r\ncontent-length: 18446744073709551620\r\n\r\nleak",
    "an upgrade that was not asked for": b"HTTP/1.1 101 leak\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\nleak",
    "a head that does not end": b"HTTP/1.1 200 OK\r\nx-leak: 1\r\n",
    "a head of 20 MB": b"HTTP/1.1 200 OK\r\n" + b"x-leak: %b\r\n" % (b"a" * 1000) * 20_000 + b"\r\n",
}


@ASKED
@pytest.mark.parametrize("said", GARBAGE.values(), ids=GARBAGE)
async def test_garbage_is_a_502(sides: StartSides, said: bytes, sent: bytes) -> None:
    """The client gets an error in OpenAI's form, without the engine's bytes, and may ask again."""
    both = await sides(said, closes=True)
    answer = await ask(both.relayed, sent, ends=END)
    assert_refused(answer, 502, without=b"leak")
    assert answer.is_in_sync


@ASKED
@pytest.mark.parametrize(
    "more", [b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nleak", b"leak", b"\r\n"], ids=bytes.decode
)
@pytest.mark.parametrize("method", [b"GET", b"HEAD"], ids=bytes.decode)
async def test_more_than_one_answer_reaches_nobody(raw: StartRaw, more: bytes, sent: bytes, method: bytes) -> None:
    """What an engine sends beyond its answer is given to no one: the next client gets its own answer."""

    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while message := await read_request(reader):
            writer.write(_answer(message) + more)

    _, relayed = await raw(engine)
    for _ in range(3):
        async with connected(relayed) as (reader, writer):
            writer.write(request(method + b" /head HTTP/1.1"))
            assert (await read_answer(reader, method)).status == 200
            writer.write(sent)
            answer = await read_answer(reader, sent.partition(b" ")[0])
            assert answer.final and answer.final.body == b"own"
            # the answer of another: the rest of this connection belongs to its client


def _answer(message: Message) -> bytes:
    body = b"" if message.method == b"HEAD" else b"own"
    return b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n" + body


@ASKED
async def test_a_body_where_none_may_be(raw: StartRaw, sent: bytes) -> None:
    """The body of a 204 is not taken for the next answer."""

    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await read_request(reader):
            writer.write(b"HTTP/1.1 204 No Content\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nleak")

    _, relayed = await raw(engine)
    for _ in range(3):
        async with connected(relayed) as (reader, writer):
            writer.write(sent)
            assert (await read_answer(reader, b"GET")).status == 204


@ASKED
@pytest.mark.parametrize("length", [b"3", b"300"], ids=["short", "long"])
async def test_an_answer_with_two_framings(raw: StartRaw, sent: bytes, length: bytes) -> None:
    """An answer in chunks that has a length, too, reaches its client in chunks, or as an error, never with both."""

    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await read_request(reader):
            framing = b"content-length: %b\r\ntransfer-encoding: chunked\r\n" % length
            writer.write(b"HTTP/1.1 200 OK\r\n" + framing + b"\r\n5\r\nhello\r\n0\r\n\r\n")

    _, relayed = await raw(engine)
    answer = await ask(relayed, sent)
    assert answer.final and answer.final.is_whole
    if answer.status == 200:
        assert answer.final.body == b"hello"
        assert not (answer.final.is_chunked and answer.final.all(b"content-length"))
    else:
        assert_refused(answer, 502, without=b"hello")
