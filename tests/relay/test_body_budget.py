"""All bodies of a relay together have a bound, and each is given back."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp import web

from sidecar.errors import BodiesFull
from sidecar.events import Settled
from sidecar.relay.client_io import BodyBudget

from ..waiting import PATIENCE


def test_one_that_is_over_the_bound_waits_for_the_others_and_alone_it_passes() -> None:
    """A bound on the sum must not make a body impossible that is allowed by itself."""
    budget = BodyBudget(100)
    with budget.reading() as first:
        first.grow(150)
        with budget.reading() as second, pytest.raises(BodiesFull):
            second.grow(1)
        first.release()
        with budget.reading() as third:
            third.grow(60)
            third.grow(40)
            assert budget.held == 60
    assert budget.held == 0


@pytest.mark.parametrize("path", ["/v1/completions", "/wake_up"])
async def test_bodies_beyond_the_memory_are_refused_and_settle(rig: Any, serve: Any, path: str) -> None:
    """Unfinished uploads hold what they announced; the next client gets a 429 that says when to come again."""

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(body=await request.read())

    r = await rig(await serve(engine))
    r.relay._budget.limit = 1000
    reader, writer = await asyncio.open_connection(r.host, r.port)
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 900\r\n\r\n"
    writer.write(head.encode())
    async with asyncio.timeout(PATIENCE):
        await reader.readuntil(b"\r\n\r\n")  # the relay reads
    async with r.client.post(r.url + path, data=b"a" * 200) as got:
        assert (got.status, got.headers["retry-after"]) == (429, "1")
        assert (await got.json())["error"]["code"] == "bodies_full"
    writer.write(b"a" * 900)
    async with asyncio.timeout(PATIENCE):
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
    writer.close()
    async with r.client.post(r.url + path, data=b"a" * 200) as got:
        assert got.status == 200
    if path.startswith("/v1"):
        assert sorted(event.outcome for event in await r.emitted.wait(Settled, 3)) == ["ok", "ok", "rejected"]
