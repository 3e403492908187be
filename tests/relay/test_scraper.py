"""Connections that scrape again and again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from sidecar.events import Page, PageWanted
from sidecar.relay import metrics_page as merged_page

from ..waiting import PATIENCE

SCRAPE = b"GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: */*\r\n\r\n"
PAGE = "a 1\n"


class Wire:
    """One connection, by hand. An answer with the header `server` is aiohttp's."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def answer(self) -> tuple[str, dict[str, str], bytes]:
        """(status line, headers, body) of the next answer."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in head[1:] if line)}
        return head[0], headers, await self.reader.readexactly(int(headers["content-length"]))

    async def ask(self, *parts: bytes) -> tuple[str, dict[str, str], bytes]:
        for part in parts:
            self.writer.write(part)
            await asyncio.sleep(0.01)  # a segment of its own
        return await self.answer()


@asynccontextmanager
async def wire(r: Any) -> AsyncIterator[Wire]:
    reader, writer = await asyncio.open_connection(r.host, r.port)
    try:
        async with asyncio.timeout(PATIENCE):
            yield Wire(reader, writer)
    finally:
        writer.close()


@pytest.fixture
async def r(rig: Any, serve: Any) -> Any:
    """A relay with a fresh page, before an engine that echoes the path and body of what reaches it."""

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(text=f"{request.path} {len(await request.read())}")

    r = await rig(await serve(engine))
    r.relay.obey(Page(0.0, PAGE))
    return r


async def test_the_second_scrape_is_not_parsed(r: Any) -> None:
    """The same bytes get the same answer without aiohttp: page, type, length, and an id of its own."""
    async with wire(r) as w:
        first, again, third = [await w.ask(SCRAPE) for _ in range(3)]
    assert "server" in first[1] and "server" not in again[1] and "server" not in third[1]
    assert (first[0], first[2]) == (again[0], again[2]) == ("HTTP/1.1 200 OK", PAGE.encode())
    for name in ("content-type", "content-length"):
        assert first[1][name] == again[1][name]
    assert len({first[1]["x-request-id"], again[1]["x-request-id"], third[1]["x-request-id"]}) == 3
    assert "date" in again[1]


async def test_an_old_page_is_asked_for_anew(r: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past its second, the page comes from the control process again, to a connection that is known as well."""
    async with wire(r) as w:
        for _ in range(2):
            await w.ask(SCRAPE)
        assert not r.facts.of(PageWanted)
        monkeypatch.setattr(merged_page, "FRESH", -1.0)
        w.writer.write(SCRAPE)
        await r.facts.wait(PageWanted)
        r.relay.obey(Page(0.0, "b 2\n"))
        assert (await w.answer())[2] == b"b 2\n"
        monkeypatch.undo()
        assert (await w.ask(SCRAPE))[2] == b"b 2\n"


BODY = b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(SCRAPE)


@pytest.mark.parametrize(
    ("parts", "answers"),
    [
        ((BODY, SCRAPE), [b"/echo %d" % len(SCRAPE)]),
        ((BODY[:30], BODY[30:] + SCRAPE), [b"/echo %d" % len(SCRAPE)]),
        ((b"POST /echo HTTP/1.1\r\nX: ", SCRAPE), [b"/echo 0"]),
        ((SCRAPE + SCRAPE,), [PAGE.encode()] * 2),
        ((SCRAPE, SCRAPE + BODY, SCRAPE), [PAGE.encode(), PAGE.encode(), b"/echo %d" % len(SCRAPE)]),
        ((SCRAPE[:20], SCRAPE[20:]), [PAGE.encode()]),
    ],
    ids=["as a body", "as the rest of a body", "within a head", "two at once", "with more behind it", "in two parts"],
)  # fmt: skip
async def test_known_bytes_are_a_request_only_where_one_begins(r: Any, parts: Any, answers: list[bytes]) -> None:
    """Wherever else a known scrape's bytes come, also on a connection that scraped before, they are what HTTP says they are."""
    async with wire(r) as w:
        for _ in range(2):
            assert (await w.ask(SCRAPE))[2] == PAGE.encode()
        for part in parts:
            w.writer.write(part)
            await asyncio.sleep(0.02)  # a segment of its own
        assert [(await w.answer())[2] for _ in answers] == answers
        assert (await w.ask(SCRAPE))[2] == PAGE.encode()


@pytest.mark.parametrize(
    "more",
    [b"Connection: close\r\n", b"Content-Length: 3\r\n", b"X-Request-Id: mine\r\n", b"X: " + b"x" * 3000 + b"\r\n"],
)
async def test_what_is_more_than_a_scrape_is_always_parsed(r: Any, more: bytes) -> None:
    """A request with a body, an id, too many bytes, or the wish to end the connection is never remembered."""
    request = SCRAPE[:-2] + more + b"\r\n" + (b"abc" if b"Length" in more else b"")
    async with wire(r) as w:
        first = await w.ask(request)
        assert first[2] == PAGE.encode() and "server" in first[1]
        if b"close" in more:
            assert await w.reader.read() == b""
            return
        assert "server" in (await w.ask(request))[1]


async def test_a_scraper_that_does_not_read_is_not_answered_without_bound(r: Any) -> None:
    """What waits to be read is bounded: past the first page that does not fit, aiohttp waits for the reader."""
    r.relay.obey(Page(0.0, "a 1\n" * 500_000))
    async with wire(r) as w:
        assert len((await w.ask(SCRAPE))[2]) == 2_000_000
        for _ in range(50):
            w.writer.write(SCRAPE)
            await asyncio.sleep(0.005)
        (connection,) = r.server.connections
        # the page that did not fit, and the one with which aiohttp waits
        assert connection.transport.get_write_buffer_size() < 2 * 2_000_000 + 10_000


async def test_a_draining_relay_does_not_scrape_on(r: Any) -> None:
    """Once it drains, a known connection is no longer kept alive by its scrapes."""
    async with wire(r) as w:
        for _ in range(2):
            await w.ask(SCRAPE)
        r.relay.draining = True
        status, headers, _ = await w.ask(SCRAPE)
        assert "server" in headers and status.split()[1] in ("200", "503")
        assert await w.reader.read() == b""
