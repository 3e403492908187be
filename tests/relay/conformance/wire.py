"""HTTP/1.1 messages as bytes, taken apart without a library, so that nothing between two sides is mended or hidden."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace

from ...waiting import PATIENCE

Address = tuple[str, int]
Headers = tuple[tuple[bytes, bytes], ...]  # names as they were written, values without the spaces around them

MAX_HEAD_BYTES = 1 << 24
# asked after an answer: whether the next message begins where this one ended
END = b"GET /end HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
END_ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\nconnection: close\r\n\r\nend"


@dataclass(frozen=True, slots=True)
class Message:
    """One request or answer; `is_whole`: it ended where its framing says."""

    start: bytes
    headers: Headers
    body: bytes = b""
    trailers: Headers = ()
    is_whole: bool = True

    def all(self, name: bytes) -> list[bytes]:
        return [value for given, value in self.headers if given.lower() == name]

    def value(self, name: bytes) -> bytes:
        """All values of a header as one list."""
        return b", ".join(self.all(name))

    @property
    def is_chunked(self) -> bool:
        return self.value(b"transfer-encoding").lower().endswith(b"chunked")

    @property
    def is_last(self) -> bool:
        """Whether its sender closes the connection after it."""
        options = self.value(b"connection").lower()
        return b"close" in options or (b"HTTP/1.0" in self.start and b"keep-alive" not in options)

    @property
    def method(self) -> bytes:
        return self.start.partition(b" ")[0]

    @property
    def target(self) -> bytes:
        return self.start.split(b" ")[1]

    @property
    def status(self) -> int:
        return int(self.start.split(b" ")[1])


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for one request. `final` is None if the connection ended before it.

    `rest` is what came after it; with `is_in_sync` it is nothing, or the answer to END.
    """

    interim: tuple[Message, ...]
    final: Message | None
    rest: bytes = b""

    @property
    def status(self) -> int:
        return self.final.status if self.final else 0

    @property
    def is_in_sync(self) -> bool:
        return not self.rest or (self.rest.startswith(b"HTTP/1.1 200 ") and self.rest.endswith(b"\r\n\r\nend"))


def request(line: bytes, *headers: bytes, body: bytes | None = None) -> bytes:
    """A request with `host: x` as its first header; a `body` gets its content-length as the last one."""
    length = () if body is None else (b"Content-Length: %d" % len(body),)
    return b"\r\n".join((line, b"host: x", *headers, *length, b"", body or b""))


def chunked(body: bytes, size: int = 1 << 20) -> bytes:
    """A body in chunks of at most `size` bytes."""
    pieces = (body[at : at + size] for at in range(0, len(body), size))
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


class PatientReader(asyncio.StreamReader):
    """A reader to which a reset is an end, so that what came before it can be read."""

    def set_exception(self, exc: BaseException) -> None:
        self.feed_eof()


@asynccontextmanager
async def connected(address: Address) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection for a block that may not last longer than the patience of tests."""
    loop = asyncio.get_running_loop()
    reader = PatientReader(MAX_HEAD_BYTES, loop)
    protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
    transport, _ = await loop.create_connection(lambda: protocol, *address)
    writer = asyncio.StreamWriter(transport, protocol, reader, loop)
    try:
        async with asyncio.timeout(PATIENCE):
            yield reader, writer
    finally:
        transport.abort()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def ask(address: Address, *pieces: bytes, ends: bytes = b"") -> Answer:
    """The answer to one request, sent in pieces with a pause after each, on a connection of its own.

    If that is kept, `ends` follows on it, and all that comes then is the answer's rest.
    """
    async with connected(address) as (reader, writer):
        sending = asyncio.create_task(_send(writer, pieces))
        answer = await read_answer(reader, pieces[0].partition(b" ")[0])
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        return replace(answer, rest=await _rest(reader, writer, answer, ends))


async def _send(writer: asyncio.StreamWriter, pieces: tuple[bytes, ...]) -> None:
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(0)  # other tasks read it


async def _rest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answer: Answer, ends: bytes) -> bytes:
    is_kept = answer.final and answer.final.is_whole and not answer.final.is_last
    if is_kept and not ends:
        return b""
    if is_kept:
        writer.write(ends)
    return await reader.read()


async def read_answer(reader: asyncio.StreamReader, method: bytes) -> Answer:
    """The next answer, after the interim ones before it."""
    interim: list[Message] = []
    while (head := await _read_head(reader)) is not None:
        if 100 <= head.status < 200 and head.status != 101:
            interim.append(head)
            continue
        is_empty = method == b"HEAD" or head.status in (101, 204, 304)
        return Answer(tuple(interim), head if is_empty else await _read_body(reader, head, until_close=True))
    return Answer(tuple(interim), None)


async def read_request(
    reader: asyncio.StreamReader, on_head: Callable[[Message], object] = lambda head: None
) -> Message | None:
    """The next request; None if the connection ended before it did. `on_head` gets its head before its body comes."""
    if (head := await _read_head(reader)) is not None:
        on_head(head)
    message = head and await _read_body(reader, head, until_close=False)
    return message if message and message.is_whole else None


async def _read_head(reader: asyncio.StreamReader) -> Message | None:
    try:
        block = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    start, *lines = block[:-4].split(b"\r\n")
    return Message(start, _parse_headers(lines))


def _parse_headers(lines: list[bytes]) -> Headers:
    return tuple((name, value.strip(b" \t")) for name, _, value in (line.partition(b":") for line in lines))


async def _read_body(reader: asyncio.StreamReader, head: Message, *, until_close: bool) -> Message:
    body = bytearray()
    trailers: list[bytes] = []
    try:
        if head.is_chunked:
            while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
                body += await reader.readexactly(size)
                await reader.readexactly(2)
            while line := (await reader.readuntil(b"\r\n"))[:-2]:
                trailers.append(line)
        elif length := head.value(b"content-length"):
            body += await reader.readexactly(int(length))
        elif until_close:
            body += await reader.read()
    except asyncio.IncompleteReadError as e:
        body += e.partial
        return replace(head, body=bytes(body), is_whole=False)
    except (ConnectionError, ValueError):
        return replace(head, body=bytes(body), is_whole=False)
    return replace(head, body=bytes(body), trailers=_parse_headers(trailers))
