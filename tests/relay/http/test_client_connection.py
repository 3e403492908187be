"""Connections of clients, byte by byte: deadlines, bounds, and what comes in pieces."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.errors import RequestError
from sidecar.relay import client_io
from sidecar.relay.http import client, server
from sidecar.relay.http.client import Request
from sidecar.relay.http.server import Server

from ...waiting import PATIENCE

Handle = Callable[[Request], Awaitable[None]]
Start = Callable[[Handle], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


async def echo(request: Request) -> None:
    """Answers with what it read; a body that does not come whole is an error."""
    try:
        body = await client_io.read(request, 1 << 20)
    except RequestError as e:
        client_io.refuse(request, e, "")
        return
    request.reply.begin(200, b"OK", [], body=request.method.encode() + b" " + request.target + b" " + body)


@asynccontextmanager
async def serving(handle: Handle) -> AsyncIterator[Server]:
    def refuse(connection: client.ClientConnection, error: RequestError) -> None:
        client_io.refuse(Request(connection, "", b"", "1.1", client.Fields()), error, "")

    found = Server(handle, refuse)
    accepting = await asyncio.get_running_loop().create_server(found, "127.0.0.1", 0)
    found.port = accepting.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
    try:
        yield found
    finally:
        accepting.close()
        await found.close()


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """A function: handler -> a connection to a server of it."""
    async with AsyncExitStack() as stack:

        async def connect(handle: Handle) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            found = await stack.enter_async_context(serving(handle))
            reader, writer = await asyncio.open_connection("127.0.0.1", found.port)  # type: ignore[attr-defined]
            stack.callback(writer.close)
            return reader, writer

        yield connect


async def read_all(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(PATIENCE):
        return await reader.read()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines of moments."""
    monkeypatch.setattr(server, "CHECK_INTERVAL_S", 0.02)
    for name in ("HEAD_TIMEOUT_S", "BODY_TIMEOUT_S", "IDLE_TIMEOUT_S"):
        monkeypatch.setattr(client, name, 0.1)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", b""),
        (b"GET / HT", b"HTTP/1.1 408 "),
        (b"GET / HTTP/1.1\r\nhost: x\r\nx-a", b"HTTP/1.1 408 "),
        (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\nabc", b"HTTP/1.1 408 "),
        (b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n3\r\nab", b"HTTP/1.1 408 "),
        (b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", b"HTTP/1.1 200 "),
    ],
    ids=["nothing", "a line", "a head", "a body", "a chunk", "idle after an answer"],
)
async def test_every_wait_for_a_client_ends(quick: None, start: Start, sent: bytes, status: bytes) -> None:
    """What is not complete in time is a 408 and the end; a connection without a request just ends."""
    reader, writer = await start(echo)
    writer.write(sent)
    assert (await read_all(reader)).startswith(status)


async def test_a_slow_body_that_goes_on_is_served(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline of a body is that between two pieces."""
    monkeypatch.setattr(server, "CHECK_INTERVAL_S", 0.02)
    monkeypatch.setattr(client, "BODY_TIMEOUT_S", 5.0)
    reader, writer = await start(echo)
    writer.write(b"POST / HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 5\r\n\r\n")
    for byte in b"hello":
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(0)
    assert (await read_all(reader)).endswith(b"POST / hello")


async def test_a_head_has_a_bound(start: Start) -> None:
    """A head that never ends is a 431 while it comes."""
    reader, writer = await start(echo)
    writer.write(b"GET / HTTP/1.1\r\n" + b"x-a: %b\r\n" % (b"a" * 1000) * 200)
    assert (await read_all(reader)).startswith(b"HTTP/1.1 431 ")


async def test_more_clients_than_can_be_served_are_told_so(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each needs a file, and one more for the engine: over the bound the error names the limit."""
    monkeypatch.setattr(server.open_files, "max_connections", lambda limit: 0)
    reader, _ = await start(echo)
    answer = await read_all(reader)
    assert answer.startswith(b"HTTP/1.1 503 ") and b"file descriptors" in answer


async def test_an_idle_connection_makes_room_for_a_new_one(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that keep connections for later do not keep others out."""
    monkeypatch.setattr(server.open_files, "max_connections", lambda limit: 1)
    reader, writer = await start(echo)
    writer.write(b"GET /a HTTP/1.1\r\nhost: x\r\n\r\n")
    await reader.readuntil(b"GET /a ")
    other, ask = await asyncio.open_connection(*writer.get_extra_info("peername"))
    ask.write(b"GET /b HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    assert (await read_all(other)).endswith(b"GET /b ") and await read_all(reader) == b""
    ask.close()


async def test_a_body_that_drips_has_an_end(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then is no reason to hold what was announced for days."""
    monkeypatch.setattr(server, "CHECK_INTERVAL_S", 0.02)
    monkeypatch.setattr(client, "BODY_TIMEOUT_S", 0.3)
    refused = asyncio.get_running_loop().create_future()

    async def handle(request: Request) -> None:
        try:
            await client_io.read(request, 1 << 20)
        except RequestError as e:
            refused.set_result(str(e))

    _, writer = await start(handle)
    writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n")

    async def drip() -> None:
        while True:
            writer.write(b"a")
            await asyncio.sleep(0.01)

    dripping = asyncio.create_task(drip())
    async with asyncio.timeout(PATIENCE):
        assert "slower than" in await refused
    dripping.cancel()


async def test_an_answer_before_the_body_ends_reaches_its_client(start: Start) -> None:
    """A client that sends an unwanted body can read the refusal; what is left of the body is dropped."""

    async def refuse(request: Request) -> None:
        client_io.send_json(request, {}, status=413)

    reader, writer = await start(refuse)
    writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 200000\r\n\r\n" + b"a" * 100_000)
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 413 ")
    writer.write(b"a" * 100_000 + b"POST / HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
    assert b"HTTP/1.1 413 " in await read_all(reader)


async def test_requests_sent_ahead_are_answered_in_order_and_bounded(start: Start) -> None:
    """A client may send many; they are handled one after the other."""
    reader, writer = await start(echo)
    count = 3 * client.MAX_AHEAD
    for n in range(count):
        last = b"connection: close\r\n" if n == count - 1 else b""
        writer.write(b"GET /%d HTTP/1.1\r\nhost: x\r\n%b\r\n" % (n, last))
    answers = await read_all(reader)
    assert [answers.index(b"GET /%d " % n) for n in range(count)] == sorted(
        answers.index(b"GET /%d " % n) for n in range(count)
    )


async def test_thousands_of_requests_sent_ahead_take_little_memory(start: Start) -> None:
    """While the first is handled, few others are read; in the end all are answered, and in order."""
    go_on, waiting = asyncio.Event(), list[int]()

    async def handle(request: Request) -> None:
        await go_on.wait()
        waiting.append(len(request.connection._queue))
        await echo(request)

    reader, writer = await start(handle)
    count = 5000
    writer.write(b"".join(b"GET /%d HTTP/1.1\r\nhost: x\r\n\r\n" % n for n in range(count)))
    writer.write(b"GET /end HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    await asyncio.wait((asyncio.ensure_future(writer.drain()),), timeout=0.2)
    go_on.set()
    answers = await read_all(reader)
    assert re.findall(rb"GET /(\d+|end) ", answers) == [*(b"%d" % n for n in range(count)), b"end"]
    assert max(waiting) <= client.MAX_AHEAD + client.SLICE_BYTES // 20


REQUESTS = (
    b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /b HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\nabc",
    b"POST /c HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n1;x=y\r\nc\r\n0\r\nx: y\r\n\r\n",
    b"POST /d HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: h2c\r\ncontent-length: 2\r\n\r\nab",
    b"\r\nGET /e HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n",
)
SCRAPS = (
    *(b"\r\n", b"\n", b" ", b"GET", b"/", b"HTTP/1.1", b"host: x\r\n", b"content-length: 5\r\n", b"\x00", b"\xff"),
    *(b"transfer-encoding: chunked\r\n", b"0\r\n\r\n", b"5\r\nhello\r\n", b"connection: upgrade\r\n"),
    *(b"upgrade: websocket\r\n", b"expect: 100-continue\r\n"),
)
ANSWERS = (b"GET /a ", b"POST /b abc", b"POST /c abc", b"POST /d ab", b"GET /e ")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, len(REQUESTS) - 1), min_size=1, max_size=6), st.lists(st.integers(1, 40), max_size=30))
def test_pieces_change_nothing(chosen: list[int], sizes: list[int]) -> None:
    """However the bytes of several requests are cut, each is read and answered alike."""

    async def main() -> bytes:
        async with serving(echo) as found:
            reader, writer = await asyncio.open_connection("127.0.0.1", found.port)  # type: ignore[attr-defined]
            data = b"".join(REQUESTS[n] for n in chosen) + b"GET /z HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
            for size in sizes:
                writer.write(data[:size])
                await asyncio.sleep(0)
                data = data[size:]
            writer.write(data)
            answers = await read_all(reader)
            writer.close()
            return answers

    answers = asyncio.run(main())
    bodies = [part.rpartition(b"\r\n\r\n")[2] for part in answers.split(b"HTTP/1.1 200 OK\r\n")[1:]]
    assert bodies == [*(ANSWERS[n] for n in chosen), b"GET /z "]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*REQUESTS, *SCRAPS]), max_size=12))
def test_any_bytes_end_in_answers_or_a_refusal(pieces: list[bytes]) -> None:
    """No bytes raise, hang or get anything but whole answers: the rest is a 400, and the end."""

    async def main() -> bytes:
        async with serving(echo) as found:
            reader, writer = await asyncio.open_connection("127.0.0.1", found.port)  # type: ignore[attr-defined]
            writer.write(b"".join(pieces))
            writer.write_eof()
            answers = await read_all(reader)
            writer.close()
            return answers

    answers = asyncio.run(main())
    statuses = {part[:3] for part in answers.split(b"HTTP/1.1 ")[1:]}
    assert statuses <= {b"200", b"100", b"400"}
