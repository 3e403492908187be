"""Engines that close kept connections: none of their clients' requests is lost to that, and none is sent twice."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import Counter
from collections.abc import Callable

import pytest

from .raw_engine import StartRaw
from .refusals import assert_refused
from .wire import Address, Answer, Message, ask, chunked, connected, read_answer, read_request, request

REQUESTS = 200
CLIENTS = 40
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n" + chunked(
    b'data: {"choices":[{"delta":{"content":"x"}}]}\n\ndata: [DONE]\n\n'
)
SHORT = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
CLOSES_AFTER_S = 0.1  # llama.cpp, after a stream


def post(path: bytes, number: int) -> bytes:
    return request(b"POST %b?%d HTTP/1.1" % (path, number), body=b'{"stream":true,"prompt":"%d"}' % number)


def reset(writer: asyncio.StreamWriter) -> None:
    linger = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


def close(writer: asyncio.StreamWriter) -> None:
    writer.close()


class Closing:
    """An engine that answers one request on each connection, and closes that `after` seconds later."""

    def __init__(self, answer: bytes, after: float) -> None:
        self._answer = answer
        self._after = after
        self.answered: Counter[bytes] = Counter()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if message := await read_request(reader):
            self.answered[message.target] += 1
            writer.write(self._answer)
            await asyncio.sleep(self._after)


class ClosingAtUse:
    """An engine that answers `answers` requests on each connection, and ends that when the next one has come."""

    def __init__(self, answer: bytes, end: Callable[[asyncio.StreamWriter], None], answers: int = 1) -> None:
        self._answer = answer
        self._end = end
        self._answers = answers
        self.answered: Counter[bytes] = Counter()
        self.read: list[Message] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(self._answers):
            if (message := await read_request(reader)) is None:
                return
            self.answered[message.target] += 1
            self.read.append(message)
            writer.write(self._answer)
        if (message := await read_request(reader)) is not None:
            self.read.append(message)
            self._end(writer)


@pytest.mark.parametrize(
    ("path", "answer", "after"),
    [
        (b"/v1/completions", STREAM, CLOSES_AFTER_S),
        (b"/v1/completions", SHORT, 0.0),
        (b"/x", SHORT, CLOSES_AFTER_S),
        (b"/x", STREAM, 0.0),
    ],
    ids=["work, a stream", "work, at once", "unread", "unread, a stream, at once"],
)
async def test_connections_that_close_after_an_answer(raw: StartRaw, path: bytes, answer: bytes, after: float) -> None:
    """All of 200 POSTs that come around the time of closing are answered, each once."""
    engine = Closing(answer, after)
    _, relayed = await raw(engine)

    async def client(first: int) -> list[int]:
        found = []
        for number in range(first, REQUESTS, CLIENTS):
            found.append((await ask(relayed, post(path, number))).status)
            # from one tenth before the engine closes to one tenth after it
            await asyncio.sleep(after * (0.9 + 0.2 * number / REQUESTS))
        return found

    statuses = await asyncio.gather(*(client(first) for first in range(CLIENTS)))
    assert Counter(status for found in statuses for status in found) == {200: REQUESTS}
    assert set(engine.answered.values()) == {1} and len(engine.answered) == REQUESTS


@pytest.mark.parametrize("path", [b"/x", b"/v1/completions"], ids=bytes.decode)
@pytest.mark.parametrize("end", [close, reset])
async def test_connections_that_close_at_their_use(
    raw: StartRaw, path: bytes, end: Callable[[asyncio.StreamWriter], None]
) -> None:
    """All of 200 POSTs are answered, though each second one breaks on a kept connection without a byte."""
    engine = ClosingAtUse(SHORT, end)
    _, relayed = await raw(engine)
    async with connected(relayed) as (reader, writer):
        for number in range(REQUESTS):
            writer.write(post(path, number))
            assert (await read_answer(reader, b"POST")).status == 200
    assert set(engine.answered.values()) == {1} and len(engine.answered) == REQUESTS


@pytest.mark.parametrize("path", [b"/x", b"/v1/completions"], ids=bytes.decode)
async def test_a_large_body_on_a_stale_connection(raw: StartRaw, path: bytes) -> None:
    """A body of megabytes breaks on no stale connection, either."""
    engine = ClosingAtUse(SHORT, reset)
    _, relayed = await raw(engine)
    body = b'{"prompt":"%b"}' % (b"a" * (4 << 20))
    for number in range(4):
        sent = request(b"POST %b?%d HTTP/1.1" % (path, number), body=body)
        assert (await ask(relayed, sent)).status == 200
    assert set(engine.answered.values()) == {1} and len(engine.answered) == 4


async def test_a_request_is_not_sent_to_a_third_connection(raw: StartRaw) -> None:
    """What breaks on a fresh connection, too, is an error."""
    served = 0

    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal served
        if served == 0 and await read_request(reader):
            served += 1
            writer.write(SHORT)
        if await read_request(reader):
            served += 1

    _, relayed = await raw(engine)
    assert (await ask(relayed, post(b"/x", 0))).status == 200
    assert_refused(await ask(relayed, post(b"/x", 1)), 502, without=b"prompt")
    assert served == 3


async def _half_answered(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: list[bytes]) -> None:
    """Answers the first request of a connection, and begins to answer the second."""
    for answer in (SHORT, b"HTTP/1.1 2"):
        if message := await read_request(reader):
            asked.append(message.target)
            writer.write(answer)


@pytest.mark.parametrize("path", [b"/x", b"/v1/completions"], ids=bytes.decode)
async def test_what_was_answered_in_part_is_not_sent_again(raw: StartRaw, path: bytes) -> None:
    """A request of whose answer one byte came is not repeated: the engine may have done the work."""
    asked: list[bytes] = []
    _, relayed = await raw(lambda reader, writer: _half_answered(reader, writer, asked))
    answers: list[Answer] = []
    async with connected(relayed) as (reader, writer):
        for number in range(2):
            writer.write(post(path, number))
            answers.append(await read_answer(reader, b"POST"))
    assert answers[0].status == 200
    assert_refused(answers[1], 502, without=b"prompt")
    assert asked == [b"%b?%d" % (path, number) for number in range(2)]


async def test_answers_are_not_mixed(raw: StartRaw) -> None:
    """Many clients at once over the same kept connections each get what is theirs, to the byte."""

    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while message := await read_request(reader):
            writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunked(message.body * 50, 333))
            await asyncio.sleep(0)

    _, relayed = await raw(engine)

    async def client(number: int) -> None:
        async with connected(relayed) as (reader, writer):
            for turn in range(5):
                body = b"%d.%d;" % (number, turn)
                writer.write(request(b"POST /v1/completions HTTP/1.1", body=body))
                answer = await read_answer(reader, b"POST")
                assert answer.final and answer.final.body == body * 50

    await asyncio.gather(*(client(number) for number in range(CLIENTS)))


async def test_an_engine_that_says_close_is_believed(raw: StartRaw) -> None:
    """A connection of which the engine said that it closes it is not used again, though it stays open."""
    asked: list[int] = []

    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        count = 0
        while await read_request(reader):
            asked.append(count)
            count += 1
            writer.write(SHORT.replace(b"OK\r\n", b"OK\r\nConnection: close\r\n"))

    _, relayed = await raw(engine)
    for number in range(5):
        assert (await ask(relayed, post(b"/x", number))).status == 200
    assert asked == [0] * 5


async def test_clients_keep_their_connection(raw: StartRaw) -> None:
    """What an engine closes is not what its client has: one connection serves all of its requests."""
    _, relayed = await raw(Closing(SHORT.replace(b"OK\r\n", b"OK\r\nConnection: close\r\n"), 0.0))
    async with connected(relayed) as (reader, writer):
        for number in range(20):
            writer.write(post(b"/v1/completions", number))
            answer = await read_answer(reader, b"POST")
            assert answer.final and not answer.final.is_last
            assert answer.status == 200


async def test_a_client_that_says_close_is_believed(raw: StartRaw) -> None:
    """Its connection ends with the answer, which says so; the engine's may be kept."""

    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await read_request(reader):
            writer.write(SHORT)

    async def closing(address: Address) -> bytes:
        async with connected(address) as (reader, writer):
            writer.write(request(b"POST /v1/completions HTTP/1.1", b"Connection: Close", body=b"{}"))
            answer = await read_answer(reader, b"POST")
            assert answer.final and answer.final.is_last
            return await reader.read()

    _, relayed = await raw(engine)
    assert [await closing(relayed) for _ in range(3)] == [b"", b"", b""]
