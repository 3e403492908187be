"""Requests that two servers may read as different ones: each is refused, and the engine never sees what is in them."""

from __future__ import annotations

import pytest

from .compare import StartSides
from .refusals import assert_refused
from .wire import Answer, chunked, connected, read_answer, request

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
SECRET = b"smuggled"
SECOND = b"GET /smuggled HTTP/1.1\r\nhost: x\r\n\r\n"
CHUNKS = b"3\r\nabc\r\n0\r\n\r\n"
PATHS = pytest.mark.parametrize("path", [b"/x", b"/v1/chat/completions"], ids=["unread", "chat"])


def post(*lines: bytes, body: bytes = b"abc") -> bytes:
    """A request to PATH with exactly these lines after its first, and one more behind it."""
    return b"\r\n".join((b"POST PATH HTTP/1.1", b"Host: x", *lines, b"", body)) + SECOND


def in_chunks(body: bytes) -> bytes:
    return post(b"Transfer-Encoding: chunked", body=body)


# PATH stands for the path
LENGTHS = {
    "length and chunks": post(b"Content-Length: 3", b"Transfer-Encoding: chunked", body=CHUNKS),
    "chunks and length": post(b"Transfer-Encoding: chunked", b"Content-Length: 3", body=CHUNKS),
    "length 0 and chunks": post(b"Content-Length: 0", b"Transfer-Encoding: chunked", body=CHUNKS),
    "two lengths": post(b"Content-Length: 3", b"Content-Length: 30"),
    "two lengths, a short one last": post(b"Content-Length: 30", b"Content-Length: 3"),
    "two lengths that are one": post(b"Content-Length: 3", b"Content-Length: 3"),
    "two lengths in two cases": post(b"Content-Length: 3", b"content-length: 0"),
    "a list of lengths": post(b"Content-Length: 3, 30"),
    "a list of one length twice": post(b"Content-Length: 3, 3"),
    "length with a plus": post(b"Content-Length: +3"),
    "length with a minus": post(b"Content-Length: -3"),
    "minus nothing": post(b"Content-Length: -0", body=b""),
    "length in hexadecimal": post(b"Content-Length: 0x3"),
    "length with an underscore": post(b"Content-Length: 0_3"),
    "length with a point": post(b"Content-Length: 3.0"),
    "length with an exponent": post(b"Content-Length: 3e0"),
    "length with a letter": post(b"Content-Length: 3a"),
    "length of two words": post(b"Content-Length: 3 3"),
    "length in quotes": post(b'Content-Length: "3"'),
    "length in other digits": post(b"Content-Length: \xef\xbc\x93"),
    "length with a vertical tab": post(b"Content-Length: \x0b3"),
    "length beyond 64 bits": post(b"Content-Length: 18446744073709551619"),
    "length of 400 digits": post(b"Content-Length: " + b"9" * 400),
    "empty length": post(b"Content-Length:"),
}

CODINGS = {
    "an unknown coding": post(b"Transfer-Encoding: xchunked", body=CHUNKS),
    "identity": post(b"Transfer-Encoding: identity", b"Content-Length: 3"),
    "chunked, then identity": post(b"Transfer-Encoding: chunked, identity", body=CHUNKS),
    "chunked twice in a list": post(b"Transfer-Encoding: chunked, chunked", body=CHUNKS),
    "chunked twice": post(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked", body=CHUNKS),
    "two codings": post(b"Transfer-Encoding: chunked", b"Transfer-Encoding: x", body=CHUNKS),
    "gzip alone": post(b"Transfer-Encoding: gzip", body=CHUNKS),
    "chunked with a parameter": post(b"Transfer-Encoding: chunked;q=1", body=CHUNKS),
    "chunked with a comma": post(b"Transfer-Encoding: chunked,", body=CHUNKS),
    "chunked in quotes": post(b'Transfer-Encoding: "chunked"', body=CHUNKS),
    "chunked and a word": post(b"Transfer-Encoding: chunked x", body=CHUNKS),
    "chunked with a vertical tab": post(b"Transfer-Encoding: \x0bchunked", body=CHUNKS),
    "chunked with a form feed behind": post(b"Transfer-Encoding: chunked\x0c", body=CHUNKS),
    "chunked with a NUL": post(b"Transfer-Encoding: chunked\x00", body=CHUNKS),
    "chunked with a byte beyond ASCII": post(b"Transfer-Encoding: \xa0chunked", body=CHUNKS),
    "an empty coding": post(b"Transfer-Encoding:", body=CHUNKS),
    "chunked in HTTP/1.0": post(b"Transfer-Encoding: chunked", body=CHUNKS).replace(
        b"/1.1\r\nHost", b"/1.0\r\nHost", 1
    ),
}

NAMES = {
    "a space before the colon": post(b"X-A : smuggled", b"Content-Length: 3"),
    "a space before the length's colon": post(b"Content-Length : 3"),
    "a space before the coding's colon": post(b"Transfer-Encoding : chunked", body=CHUNKS),
    "a tab before the colon": post(b"Transfer-Encoding\t: chunked", body=CHUNKS),
    "a space in a name": post(b"X A: smuggled", b"Content-Length: 3"),
    "a line without a colon": post(b"smuggled", b"Content-Length: 3"),
    "an empty name": post(b": smuggled", b"Content-Length: 3"),
    "a NUL in a name": post(b"X-\x00A: smuggled", b"Content-Length: 3"),
    "a name beyond ASCII": post(b"X-\xe9: smuggled", b"Content-Length: 3"),
    "parentheses in a name": post(b"X(A): smuggled", b"Content-Length: 3"),
    "a name in brackets": post(b"[X]: smuggled", b"Content-Length: 3"),
    "a slash in a name": post(b"X/A: smuggled", b"Content-Length: 3"),
    "a control character in a name": post(b"X\x01A: smuggled", b"Content-Length: 3"),
}

LINES = {
    "a folded value": post(b"X-A: a", b" smuggled", b"Content-Length: 3"),
    "a folded value with a tab": post(b"X-A: a", b"\tsmuggled", b"Content-Length: 3"),
    "a folded coding": post(b"Transfer-Encoding:", b" chunked", body=CHUNKS),
    "a folded length": post(b"Content-Length:", b" 3"),
    "a fold before all headers": b"POST PATH HTTP/1.1\r\n X-A: smuggled\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc"
    + SECOND,
    "a bare LF behind a header": post(b"X-A: a\nX-B: smuggled", b"Content-Length: 3"),
    "a bare LF behind the first line": b"POST PATH HTTP/1.1\nHost: x\r\nContent-Length: 3\r\n\r\nabc" + SECOND,
    "bare LFs at the end": b"POST PATH HTTP/1.1\r\nHost: x\r\nContent-Length: 3\n\nabc" + SECOND,
    "bare LFs alone": b"POST PATH HTTP/1.1\nHost: x\nContent-Length: 3\n\nabc" + SECOND,
    "a bare CR in a value": post(b"X-A: a\rX-B: smuggled", b"Content-Length: 3"),
    "a bare CR before the length": post(b"X-A: a\rContent-Length: 30", b"Content-Length: 3"),
    "a bare CR in a name": post(b"X-\rA: smuggled", b"Content-Length: 3"),
    "bare CRs alone": b"POST PATH HTTP/1.1\rHost: x\rContent-Length: 3\r\r\n\r\nabc" + SECOND,
    "a bare CR behind the first line": b"POST PATH HTTP/1.1\rX: y\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc" + SECOND,
    "two CRs": post(b"X-A: smuggled\r", b"Content-Length: 3"),
    "a NUL in a value": post(b"X-A: a\x00smuggled", b"Content-Length: 3"),
    "a control character in a value": post(b"X-A: a\x01smuggled", b"Content-Length: 3"),
    "DEL in a value": post(b"X-A: a\x7fsmuggled", b"Content-Length: 3"),
}

FIRST_LINES = {
    "two spaces": b"POST  PATH HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc" + SECOND,
    "tabs": b"POST\tPATH\tHTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc" + SECOND,
    "a space in the target": b"POST PATH smuggled HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc" + SECOND,
    "a space before the method": b" POST PATH HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc" + SECOND,
    "a space behind the version": b"POST PATH HTTP/1.1 \r\nHost: x\r\nContent-Length: 3\r\n\r\nabc" + SECOND,
    "no version": b"POST PATH\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc" + SECOND,
    "HTTP/0.9": b"GET PATH\r\n\r\n" + SECOND,
    "HTTP/2.0": b"POST PATH HTTP/2.0\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc" + SECOND,
    "the preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SECOND,
    "a version without numbers": b"POST PATH HTTP/x.y\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc" + SECOND,
    "a version of two digits": b"POST PATH HTTP/1.10\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc" + SECOND,
    "a version in small letters": b"POST PATH http/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc" + SECOND,
    "another protocol": b"POST PATH ICAP/1.0\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc" + SECOND,
    "a NUL in the target": b"POST PATH?\x00smuggled HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc" + SECOND,
    "a control character in the target": b"POST PATH?\x0bsmuggled HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc"
    + SECOND,
    "a byte beyond ASCII in the target": b"POST PATH\xc3\xa9 HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc"
    + SECOND,
    "a bare CR in the target": b"POST PATH?\rsmuggled HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc" + SECOND,
    "odd characters in the method": b"PO(ST PATH HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc" + SECOND,
    "a NUL in the method": b"PO\x00ST PATH HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc" + SECOND,
    "no target": b"POST HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc" + SECOND,
    "a target without a slash": b"POST smuggled HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc" + SECOND,
    "an asterisk to post to": b"POST * HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc" + SECOND,
    "CONNECT": b"CONNECT smuggled:80 HTTP/1.1\r\nHost: smuggled:80\r\n\r\n" + SECOND,
    "an address of another protocol": b"POST ftp://xPATH HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc" + SECOND,
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03smuggled\r\n\r\n" + SECOND,
    "no HTTP at all": b"smuggled\r\n\r\n" + SECOND,
}

HOSTS = {
    "no host": b"POST PATH HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc" + SECOND,
    "two hosts": post(b"Host: smuggled", b"Content-Length: 3"),
    "two hosts that are one": post(b"Host: x", b"Content-Length: 3"),
    "a host with a space": post(b"Content-Length: 3").replace(b"Host: x\r", b"Host: x smuggled\r", 1),
    "a host with a path": post(b"Content-Length: 3").replace(b"Host: x\r", b"Host: x/smuggled\r", 1),
    "a host with a user": post(b"Content-Length: 3").replace(b"Host: x\r", b"Host: smuggled@x\r", 1),
    "a list of hosts": post(b"Content-Length: 3").replace(b"Host: x\r", b"Host: x, smuggled\r", 1),
    "another host in the target": post(b"Content-Length: 3").replace(b"POST ", b"POST http://smuggled", 1),
    "another port in the target": post(b"Content-Length: 3").replace(b"POST ", b"POST http://x:81", 1),
    "a user in the target": post(b"Content-Length: 3").replace(b"POST ", b"POST http://smuggled@x", 1),
}

CHUNK_SIZES = {
    "a plus": in_chunks(b"+3\r\nabc\r\n0\r\n\r\n"),
    "a minus": in_chunks(b"-3\r\nabc\r\n0\r\n\r\n"),
    "0x": in_chunks(b"0x3\r\nabc\r\n0\r\n\r\n"),
    "an underscore": in_chunks(b"0_3\r\nabc\r\n0\r\n\r\n"),
    "no digit": in_chunks(b"\r\nabc\r\n0\r\n\r\n"),
    "an extension alone": in_chunks(b";a=b\r\nabc\r\n0\r\n\r\n"),
    "another letter": in_chunks(b"3g\r\nabc\r\n0\r\n\r\n"),
    "a space before": in_chunks(b" 3\r\nabc\r\n0\r\n\r\n"),
    "a space behind": in_chunks(b"3 \r\nabc\r\n0\r\n\r\n"),
    "a tab behind": in_chunks(b"3\t\r\nabc\r\n0\r\n\r\n"),
    "two words": in_chunks(b"3 3\r\nabc\r\n0\r\n\r\n"),
    "64 bits and more": in_chunks(b"10000000000000003\r\nabc\r\n0\r\n\r\n"),
    "30 digits": in_chunks(b"F" * 30 + b"\r\nabc\r\n0\r\n\r\n"),
    "a bare LF": in_chunks(b"3\nabc\n0\n\n"),
    "a bare LF behind the size": in_chunks(b"3\nabc\r\n0\r\n\r\n"),
    "a bare LF behind the data": in_chunks(b"3\r\nabc\n0\r\n\r\n"),
    "a bare CR behind the size": in_chunks(b"3\rabc\r\n0\r\n\r\n"),
    "a bare CR in an extension": in_chunks(b"3;a\rb\r\nabc\r\n0\r\n\r\n"),
    "a bare LF in an extension": in_chunks(b"3;\nabc\r\n0\r\n\r\n"),
    "a NUL in an extension": in_chunks(b"3;a\x00\r\nabc\r\n0\r\n\r\n"),
    "a wrong end of the data": in_chunks(b"3\r\nabcXX0\r\n\r\n"),
    "too much data": in_chunks(b"3\r\nabcd\r\n0\r\n\r\n"),
    "too little data": in_chunks(b"3\r\nab\r\n0\r\n\r\n"),
    "a last chunk without its end": in_chunks(b"3\r\nabc\r\n0\r\nGET /smuggled HTTP/1.1\r\nhost: x\r\n\r\n"),
    "a trailer with a space before its colon": in_chunks(b"3\r\nabc\r\n0\r\nX-A : smuggled\r\n\r\n"),
    "a trailer without a colon": in_chunks(b"3\r\nabc\r\n0\r\nsmuggled\r\n\r\n"),
    "a trailer with a NUL": in_chunks(b"3\r\nabc\r\n0\r\nX-A: a\x00\r\n\r\n"),
    "a folded trailer": in_chunks(b"3\r\nabc\r\n0\r\nX-A: a\r\n smuggled\r\n\r\n"),
    "a bare LF in the trailers": in_chunks(b"3\r\nabc\r\n0\r\nX-A: a\n\r\n"),
}

SHAPES = {
    f"{kind}: {name}": sent
    for kind, shapes in {
        "length": LENGTHS,
        "coding": CODINGS,
        "name": NAMES,
        "line": LINES,
        "first line": FIRST_LINES,
        "host": HOSTS,
        "chunk": CHUNK_SIZES,
    }.items()
    for name, sent in shapes.items()
}


async def send(sides: StartSides, sent: bytes) -> tuple[Answer, int, list[bytes]]:
    """(the first answer, the status of a second one, the targets that the engine was asked for)."""
    both = await sides(OK)
    async with connected(both.relayed) as (reader, writer):
        writer.write(sent)
        answer = await read_answer(reader, b"POST")
        if answer.status == 200:  # whoever answers the first one takes the second one for a request
            second = await read_answer(reader, b"GET")
            return answer, second.status, [message.target for message in both.engine.requests]
        assert await reader.read() == b""
        return answer, 0, [message.target for message in both.engine.requests]


@PATHS
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
async def test_what_could_be_read_in_two_ways_is_refused(sides: StartSides, shape: bytes, path: bytes) -> None:
    """It is a 400 in OpenAI's form, with an id and without a byte of the request; the connection ends, unread."""
    answer, _, asked = await send(sides, shape.replace(b"PATH", path))
    assert asked == []
    assert_refused(answer, 400, without=SECRET)


@PATHS
@pytest.mark.parametrize("body", [b"abc", CHUNKS], ids=["length", "chunks"])
async def test_what_is_clear_is_not_refused(sides: StartSides, body: bytes, path: bytes) -> None:
    """The same requests without a trick reach the engine, both of them."""
    framing = b"Transfer-Encoding: chunked" if body == CHUNKS else b"Content-Length: 3"
    answer, second, asked = await send(sides, post(framing, body=body).replace(b"PATH", path))
    assert (answer.status, second, asked) == (200, 200, [path, b"/smuggled"])


@PATHS
@pytest.mark.parametrize(
    "named",
    [b"content-length", b"Transfer-Encoding", b"host", b"content-type, Content-Length", b"x-tenant-id"],
    ids=bytes.decode,
)
async def test_a_connection_header_cannot_take_the_framing_away(sides: StartSides, named: bytes, path: bytes) -> None:
    """A client that names its framing as hop by hop is refused, or its body stays one body."""
    both = await sides(OK)
    for framing, body in (
        (b"Content-Length: %d" % len(SECOND), SECOND),
        (b"Transfer-Encoding: chunked", chunked(SECOND)),
    ):
        async with connected(both.relayed) as (reader, writer):
            writer.write(request(b"POST %b HTTP/1.1" % path, b"Connection: close, " + named, framing) + body)
            answer = await read_answer(reader, b"POST")
        assert answer.status in (200, 400)
        assert [m.body for m in both.engine.take()] == ([SECOND] if answer.status == 200 else [])


@PATHS
@pytest.mark.parametrize(
    "line",
    [b"X-Long: smuggled" + b"a" * (1 << 20), b"X-A: a" + b"\r\nX-Again: smuggled" * 50_000],
    ids=["one header", "many headers"],
)
async def test_heads_beyond_all_limits_are_refused(sides: StartSides, line: bytes, path: bytes) -> None:
    """A head of a megabyte is refused in the form of all errors, which reaches the client while that still sends."""
    answer, _, asked = await send(sides, post(line, b"Content-Length: 3").replace(b"PATH", path))
    assert asked == []
    assert answer.status in (400, 431)
    assert_refused(answer, answer.status, without=SECRET)


@PATHS
async def test_targets_beyond_all_limits_are_refused(sides: StartSides, path: bytes) -> None:
    """So is a target of a megabyte."""
    answer, _, asked = await send(sides, request(b"GET %b?smuggled%b HTTP/1.1" % (path, b"a" * (1 << 20))))
    assert asked == []
    assert answer.status in (400, 414, 431)
    assert_refused(answer, answer.status, without=SECRET)


async def test_a_body_that_is_too_large_is_not_waited_for(sides: StartSides) -> None:
    """A client that asks before it sends too large a body gets the 413 at once, and no 100."""
    both = await sides(OK, max_body_bytes=1000)
    line = b"POST /v1/chat/completions HTTP/1.1"
    async with connected(both.relayed) as (reader, writer):
        writer.write(request(line, b"Expect: 100-continue", b"Content-Length: 5000"))
        answer = await read_answer(reader, b"POST")
    assert answer.interim == ()
    assert_refused(answer, 413, without=SECRET)


async def test_h2c_is_not_spoken(sides: StartSides) -> None:
    """An upgrade to HTTP/2 is not passed on, so that no tunnel opens past the relay."""
    both = await sides(OK)
    async with connected(both.relayed) as (reader, writer):
        upgrade = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA")
        writer.write(request(b"GET /x HTTP/1.1", *upgrade))
        answer = await read_answer(reader, b"GET")
    assert answer.status == 200
    assert [m.all(b"upgrade") + m.all(b"http2-settings") for m in both.engine.requests] == [[]]
