"""WebSockets: a handshake that passes, and bytes both ways after it, none of them changed."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import struct
from collections.abc import Awaitable, Callable

import pytest

from ...waiting import PATIENCE
from .compare import StartSides, assert_same_answer, assert_same_request, end_to_end
from .raw_engine import StartRaw
from .wire import Address, Answer, Message, ask, connected, read_answer, read_request, request

KEY = b"dGhlIHNhbXBsZSBub25jZQ=="
GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
ACCEPT = base64.b64encode(hashlib.sha1(KEY + GUID).digest())
PATH = b"/v1/realtime?model=m&x=%2F"
DEFLATE = b"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits; server_no_context_takeover"
ASKS = (b"Upgrade: websocket", b"Connection: Upgrade", b"Sec-WebSocket-Version: 13", b"Sec-WebSocket-Key: " + KEY)
SWITCHING = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: "
    + ACCEPT
    + b"\r\n\r\n"
)
MASK = b"\x01\x02\x03\x04"
SOME_BYTES = bytes(range(256)) * 4096

HANDSHAKES = {
    "plain": ASKS,
    "with deflate": (*ASKS, DEFLATE),
    "with subprotocols": (*ASKS, b"Sec-WebSocket-Protocol: realtime, openai-insecure-api-key.k", b"OpenAI-Beta: a"),
    "a browser's": (
        b"Connection: keep-alive, Upgrade",
        b"Pragma: no-cache",
        b"Cache-Control: no-cache",
        b"User-Agent: M/5.0",
        b"Upgrade: WebSocket",
        b"Origin: http://x",
        b"Sec-WebSocket-Version: 13",
        b"Accept-Encoding: gzip, br",
        b"Cookie: a=b",
        b"sec-websocket-key: " + KEY,
        DEFLATE,
    ),
    "two extension headers": (*ASKS, b"Sec-WebSocket-Extensions: x-a", b"sec-websocket-extensions: x-b; c=1"),
    "an odd version": (*ASKS[:2], b"Sec-WebSocket-Version: 8", ASKS[3]),
    "no key": ASKS[:3],
}

ACCEPTS = {
    "plain": SWITCHING,
    "with deflate": SWITCHING.replace(
        b"\r\n\r\n", b"\r\nSec-WebSocket-Extensions: permessage-deflate; server_no_context_takeover\r\n\r\n"
    ),
    "with a subprotocol": SWITCHING.replace(b"\r\n\r\n", b"\r\nsec-websocket-protocol: realtime\r\nX-Own: 1\r\n\r\n"),
    "another reason": SWITCHING.replace(b"Switching Protocols", b"Go on"),
    "a wrong key": SWITCHING.replace(ACCEPT, b"bm8="),
    "early hints before": b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n" + SWITCHING,
}

REFUSALS = {
    "403": b"HTTP/1.1 403 No Entry\r\nContent-Type: application/json\r\nX-Why: because\r\ncontent-length: 13\r\n\r\n"
    b'{"error":"x"}',
    "401": b"HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Bearer\r\ncontent-length: 0\r\n\r\n",
    "426": b"HTTP/1.1 426 Upgrade Required\r\nSec-WebSocket-Version: 13, 8\r\ncontent-length: 0\r\n\r\n",
    "a redirect": b"HTTP/1.1 307 There\r\nLocation: /elsewhere\r\ncontent-length: 5\r\n\r\nthere",
    "a redirect to another host": b"HTTP/1.1 302 F\r\nLocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n",
    "200": b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
    "404 in chunks": b"HTTP/1.1 404 Not Found\r\ntransfer-encoding: chunked\r\n\r\n2\r\nno\r\n0\r\n\r\n",
    "503": b"HTTP/1.1 503 Busy\r\nRetry-After: 7\r\ncontent-length: 4\r\n\r\nbusy",
}


def frame(first: int, data: bytes, *, masked: bool = False) -> bytes:
    """One frame with `first` as its first byte: flags and opcode."""
    size = 0 if len(data) < 126 else 2 if len(data) < 1 << 16 else 8
    code = {0: len(data), 2: 126, 8: 127}[size]
    head = bytes((first, code | (0x80 if masked else 0))) + (len(data).to_bytes(size, "big") if size else b"")
    if not masked:
        return head + data
    return head + MASK + bytes(byte ^ MASK[i % 4] for i, byte in enumerate(data))


FRAMES = {
    "text": (0x81, b"h\xc3\xa9llo"),
    "binary": (0x82, SOME_BYTES[:1000]),
    "nothing": (0x81, b""),
    "compressed": (0xC1, b"\xf2\x48\xcd\xc9\xc9\x07\x00"),
    "a fragment": (0x01, b"first"),
    "a ping": (0x89, b"are you there"),
    "an unsolicited pong": (0x8A, b"yes"),
    "large": (0x82, SOME_BYTES[:70_000]),
    "close 1000": (0x88, struct.pack(">H", 1000)),
    "close 4001": (0x88, struct.pack(">H", 4001) + b"reason"),
    "close 1011": (0x88, struct.pack(">H", 1011) + b"inner"),
    "close without a code": (0x88, b""),
    "close with a code of no one": (0x88, struct.pack(">H", 999)),
    "reserved flags": (0xF1, b"odd"),
    "a reserved opcode": (0x83, b"odd"),
    "no UTF-8": (0x81, b"\xff\xfe"),
}

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def assert_same_talk(raw: StartRaw, engine: Talk, client: Talk) -> None:
    """What `client` and `engine` read of each other after the handshake is the same, direct and relayed."""
    read: asyncio.Queue[bytes] = asyncio.Queue()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await read_request(reader):
            writer.write(SWITCHING)
            await engine(reader, writer)
            await read.put(await _read_all(reader))

    async def talk(address: Address) -> tuple[bytes, bytes]:
        async with connected(address) as (reader, writer):
            writer.write(request(b"GET %b HTTP/1.1" % PATH, *ASKS))
            assert (await read_answer(reader, b"GET")).status == 101
            await client(reader, writer)
            seen = await _read_all(reader)
        async with asyncio.timeout(PATIENCE):
            return seen, await read.get()

    direct, relayed = await raw(serve)
    assert await talk(relayed) == await talk(direct)


async def _read_all(reader: asyncio.StreamReader) -> bytes:
    """The rest; a connection that is reset ends it, too."""
    read = b""
    try:
        while piece := await reader.read(1 << 16):
            read += piece
    except ConnectionError:
        pass
    return read


async def _listen(_: asyncio.StreamReader, __: asyncio.StreamWriter) -> None:
    """Say nothing, and read until the other one ends."""


# --- handshakes ---


@pytest.mark.parametrize("headers", HANDSHAKES.values(), ids=HANDSHAKES)
@pytest.mark.parametrize("path", [PATH, b"/ws", b"/v1/chat/completions"], ids=bytes.decode)
async def test_handshakes_reach_the_engine(sides: StartSides, headers: tuple[bytes, ...], path: bytes) -> None:
    """The engine sees the client's key, version, protocols and extensions, and that it asks for a WebSocket."""
    both = await sides(REFUSALS["403"])
    compared = await both.compare(request(b"GET %b HTTP/1.1" % path, *headers))
    [direct], [relayed] = compared.asked_directly, compared.asked_by_relay
    assert relayed.value(b"upgrade").lower() == direct.value(b"upgrade").lower() == b"websocket"
    assert b"upgrade" in relayed.value(b"connection").lower()


@pytest.mark.parametrize("accepts", ACCEPTS.values(), ids=ACCEPTS)
async def test_accepted_handshakes_reach_the_client(sides: StartSides, accepts: bytes) -> None:
    """The client sees the engine's 101 with its key, protocol and extensions, and judges itself whether they fit."""
    both = await sides(accepts, closes=True)
    compared = await both.ask_both(request(b"GET %b HTTP/1.1" % PATH, *ASKS, DEFLATE))
    direct, relayed = compared.direct, compared.relayed
    assert direct.final and relayed.final
    assert (relayed.status, end_to_end(relayed.final)) == (101, end_to_end(direct.final))
    assert relayed.final.start.split(b" ", 2)[2] == direct.final.start.split(b" ", 2)[2]
    assert relayed.final.value(b"upgrade").lower() == b"websocket"
    assert relayed.final.value(b"connection").lower() == b"upgrade"
    assert [m.status for m in relayed.interim] == [m.status for m in direct.interim]
    assert relayed.rest == direct.rest == b""


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
async def test_refused_handshakes_reach_the_client(sides: StartSides, refusal: bytes) -> None:
    """Status, headers and body are the engine's, a redirect is not followed, and the connection serves more."""
    both = await sides(refusal)
    await both.compare(request(b"GET %b HTTP/1.1" % PATH, *ASKS))


async def test_handshakes_without_an_answer(sides: StartSides) -> None:
    """An engine that closes instead of answering is named by a 502."""
    both = await sides(b"", closes=True)
    answer = await ask(both.relayed, request(b"GET %b HTTP/1.1" % PATH, *ASKS))
    assert answer.final and answer.status == 502
    assert answer.final.value(b"x-request-id") and b'"error"' in answer.final.body


async def test_a_post_is_no_handshake(sides: StartSides) -> None:
    """Only a GET opens a WebSocket: the body of anything else is one."""
    both = await sides(REFUSALS["200"])
    sent = request(b"POST /v1/chat/completions HTTP/1.1", *ASKS, body=b"{}")
    compared = await both.ask_both(sent)
    assert_same_answer(compared.direct, compared.relayed)
    [direct], [relayed] = compared.asked_directly, compared.asked_by_relay
    assert_same_request(direct, relayed)
    assert not relayed.all(b"upgrade")


# --- frames ---


@pytest.mark.parametrize("name", FRAMES)
async def test_frames_to_the_client(raw: StartRaw, name: str) -> None:
    """A frame of the engine is the client's, to its flags, and so is the end of the connection behind it."""

    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(frame(*FRAMES[name]))
        writer.write_eof()

    await assert_same_talk(raw, engine, _listen)


@pytest.mark.parametrize("name", FRAMES)
async def test_frames_to_the_engine(raw: StartRaw, name: str) -> None:
    """A frame of the client is the engine's, with its mask."""

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(frame(*FRAMES[name], masked=True))
        writer.write_eof()

    await assert_same_talk(raw, _listen, client)


async def test_frames_both_ways(raw: StartRaw) -> None:
    """Each answers what the other has sent, with fragments and pings between, until the client closes with 4001."""
    parts = [(0x01, b"a"), (0x89, b"p"), (0x00, b"b"), (0x80, b"c"), (0xC2, b"\x00\x01"), (0x88, b"\x0f\xa1bye")]

    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for part in parts:
            sent = await reader.readexactly(len(frame(*part, masked=True)))
            assert sent == frame(*part, masked=True)
            writer.write(frame(*part))
        writer.write_eof()

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(frame(*part, masked=True))
            assert await reader.readexactly(len(frame(*part))) == frame(*part)
        writer.write_eof()

    await assert_same_talk(raw, engine, client)


async def test_much_both_ways(raw: StartRaw) -> None:
    """Megabytes pass in both directions at once; one that has sent all of its own still gets the other's."""

    async def send(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(4):
            writer.write(frame(0x82, SOME_BYTES))
        writer.write_eof()

    await assert_same_talk(raw, send, send)


async def test_frames_behind_the_handshake(raw: StartRaw) -> None:
    """What comes in the same packet as the handshake, on either side, is not lost."""
    received: asyncio.Queue[bytes] = asyncio.Queue()
    early, reply = frame(0x81, b"early", masked=True), frame(0x81, b"reply")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await read_request(reader):
            writer.write(SWITCHING + reply)
            await received.put(await reader.readexactly(len(early)))

    async def talk(address: Address) -> tuple[Answer, bytes, bytes]:
        async with connected(address) as (reader, writer):
            writer.write(request(b"GET %b HTTP/1.1" % PATH, *ASKS) + early)
            answer = await read_answer(reader, b"GET")
            return answer, await reader.readexactly(len(reply)), await received.get()

    direct, relayed = await raw(serve)
    (_, *seen_directly), (answer, *seen) = await talk(direct), await talk(relayed)
    assert answer.status == 101
    assert seen == seen_directly == [reply, early]


async def test_an_engine_that_dies_is_not_a_normal_end(raw: StartRaw) -> None:
    """Without a close frame of the engine the client gets none: its library then says 1006."""

    async def dies(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(frame(0x81, b"last words"))
        await writer.drain()
        writer.close()

    async def waits(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(len(frame(0x81, b"last words")))

    await assert_same_talk(raw, dies, waits)


@pytest.mark.parametrize("way", ["closed", "reset"])
async def test_the_engine_sees_clients_leave(raw: StartRaw, way: str) -> None:
    """A client that is gone ends the engine's side, without a close frame that it did not send."""
    left: asyncio.Queue[bytes] = asyncio.Queue()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await read_request(reader):
            writer.write(SWITCHING)
            await left.put(await _read_all(reader))

    _, relayed = await raw(serve)
    async with connected(relayed) as (reader, writer):
        writer.write(request(b"GET %b HTTP/1.1" % PATH, *ASKS))
        assert (await read_answer(reader, b"GET")).status == 101
        if way == "reset":
            writer.transport.abort()
        writer.close()
    async with asyncio.timeout(PATIENCE):
        assert await left.get() == b""


async def test_idle_websockets_stay(raw: StartRaw) -> None:
    """A WebSocket on which nothing happens while others come and go still carries what comes later."""
    opened: list[Message] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while message := await read_request(reader):
            if message.target != PATH:
                writer.write(REFUSALS["200"])
                continue
            opened.append(message)
            writer.write(SWITCHING)
            writer.write(await reader.readexactly(11))
            return

    _, relayed = await raw(serve)
    async with connected(relayed) as (reader, writer):
        writer.write(request(b"GET %b HTTP/1.1" % PATH, *ASKS))
        assert (await read_answer(reader, b"GET")).status == 101
        for _ in range(20):
            assert (await ask(relayed, request(b"GET /x HTTP/1.1"))).status == 200
        writer.write(frame(0x81, b"later", masked=True))
        assert await reader.readexactly(11) == frame(0x81, b"later", masked=True)
    assert len(opened) == 1
