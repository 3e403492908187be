"""Connections that scrape the merged page again and again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from sidecar.events import MetricsPage, MetricsPageRequested
from sidecar.relay import metrics_page

from ..waiting import PATIENCE

SCRAPE = b"GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: */*\r\n\r\n"
PAGE = "a 1\n"


class Wire:
    """One connection, by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def answer(self) -> tuple[str, dict[str, str], bytes]:
        """(status line, headers, body) of the next answer."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in head[1:] if line)}
        return head[0], headers, await self.reader.readexactly(int(headers["content-length"]))

    async def scrape(self) -> tuple[str, dict[str, str], bytes]:
        self.writer.write(SCRAPE)
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
    """A relay with a fresh page, before an engine that must not be scraped."""

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        raise AssertionError("the engine was scraped")

    r = await rig(await serve(engine))
    r.relay.on_command(MetricsPage(0.0, PAGE))
    return r


async def test_every_scrape_is_answered_alike_from_one_page(r: Any) -> None:
    """On one connection the answers differ only in their ids; control and engine are not asked, and nothing is work."""
    async with wire(r) as w:
        answers = [await w.scrape() for _ in range(3)]
    assert {(status, body) for status, _, body in answers} == {("HTTP/1.1 200 OK", PAGE.encode())}
    assert len({headers.pop("x-request-id") for _, headers, _ in answers}) == 3
    assert answers[0][1] == answers[1][1] == answers[2][1]
    assert answers[0][1]["content-type"] == metrics_page.CONTENT_TYPE
    assert not r.emitted.all


async def test_an_old_page_is_asked_for_again(r: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past its second, the page comes from the control process again, also to a connection that has had it."""
    async with wire(r) as w:
        await w.scrape()
        assert not r.emitted.of(MetricsPageRequested)
        monkeypatch.setattr(metrics_page, "PAGE_FRESH_S", -1.0)
        w.writer.write(SCRAPE)
        await r.emitted.wait(MetricsPageRequested)
        r.relay.on_command(MetricsPage(0.0, "b 2\n"))
        assert (await w.answer())[2] == b"b 2\n"
        monkeypatch.undo()
        assert (await w.scrape())[2] == b"b 2\n"


async def test_a_draining_relay_does_not_scrape_on(r: Any) -> None:
    """Once it drains, a connection is no longer kept alive by its scrapes."""
    async with wire(r) as w:
        await w.scrape()
        r.relay.is_draining = True
        assert (await w.scrape())[0].split()[1] == "503"
        assert await w.reader.read() == b""
