"""A body as it comes: in pieces, whole, through a sink, and what breaks it."""

from __future__ import annotations

import asyncio

import pytest

from sidecar.relay.http.body import HIGH_WATER_BYTES, Body


class Connection:
    """What a body comes from: counts the calls that stop and start it."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def pause(self) -> None:
        self.calls.append("pause")

    def resume(self) -> None:
        self.calls.append("resume")


async def test_pieces_then_the_end() -> None:
    """Each piece as it came; after the last an empty one, as often as asked."""
    body = Body()
    body.feed(b"a")
    body.feed(b"b")
    body.end()
    assert [await body.next() for _ in range(4)] == [b"a", b"b", b"", b""]


async def test_whole_and_looked_at_before() -> None:
    """What was looked at can be read again."""
    body = Body()
    body.feed(b"a")
    asyncio.get_running_loop().call_soon(body.feed, b"b")
    asyncio.get_running_loop().call_soon(body.end)
    assert (await body.peek(), await body.read(), await body.next()) == (b"ab", b"ab", b"")


async def test_a_reader_that_is_late_lets_the_connection_wait() -> None:
    """Over the bound it is paused, and goes on when half of that was read."""
    connection = Connection()
    body = Body(connection)
    for _ in range(4):
        body.feed(b"x" * (HIGH_WATER_BYTES // 3))
    assert connection.calls == ["pause"]
    for _ in range(4):
        await body.next()
    assert connection.calls[0] == "pause" and set(connection.calls[1:]) == {"resume"}


async def test_a_sink_gets_each_piece_at_once() -> None:
    """What came before, then what comes, in the very call."""
    body, got = Body(), list[bytes]()
    body.feed(b"a")
    piping = asyncio.create_task(body.pipe(got.append))
    await asyncio.sleep(0)
    body.feed(b"b")
    assert got == [b"a", b"b"]
    body.end()
    await piping


async def test_what_breaks_is_raised_after_what_came() -> None:
    """The pieces before are read; then the error, from every way of reading."""
    body = Body()
    body.feed(b"a")
    body.fail(ConnectionResetError())
    assert await body.next() == b"a"
    for read in (body.next, body.read, body.peek):
        with pytest.raises(ConnectionResetError):
            await read()


async def test_an_error_of_the_sink_is_raised_where_the_body_is_awaited() -> None:
    """The connection that feeds it is not to blame."""

    def refuse(piece: bytes) -> None:
        raise ValueError

    body = Body()
    piping = asyncio.create_task(body.pipe(refuse))
    await asyncio.sleep(0)
    body.feed(b"a")
    with pytest.raises(ValueError):
        await piping


async def test_an_end_after_an_error_is_none() -> None:
    """A sink raised, and the message then ended before anyone had read the error: it is raised all the same."""
    body = Body()

    def sink(_: bytes) -> None:
        raise ValueError("broken")

    piped = asyncio.ensure_future(body.pipe(sink))
    await asyncio.sleep(0)  # it waits for a piece
    body.feed(b"piece")
    body.end()
    with pytest.raises(ValueError, match="broken"):
        await piped


async def test_what_is_discarded_is_not_kept() -> None:
    """The rest of an unwanted body runs through."""
    connection = Connection()
    body = Body(connection)
    body.feed(b"x" * (2 * HIGH_WATER_BYTES))
    body.discard()
    body.feed(b"x" * (2 * HIGH_WATER_BYTES))
    assert body.held == 0 and connection.calls == ["pause", "resume"]
    body.end()
    assert await body.next() == b""
