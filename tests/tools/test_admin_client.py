"""Reading an admin port from another process; None if it does not answer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from sidecar.tools.demo.admin_client import AdminClient, units_by_outcome

PAGE = """\
# HELP sidecar_mu Model units
# TYPE sidecar_mu counter
sidecar_mu_total{tenant="a",model="m",outcome="ok"} 1.5
sidecar_mu_total{tenant="b",model="m",outcome="ok"} 2.0
sidecar_mu_total{tenant="b",model="m",outcome="lost"} 0.25
sidecar_mu_in_flight 9
"""
CHANGES = [
    {"verdict": "stalled", "since": 30.5},
    {"verdict": "suspect", "since": 20.5},
    {"verdict": "idle", "since": 10.5},
]


@asynccontextmanager
async def answering(answers: dict[str, web.Response]) -> AsyncIterator[AdminClient]:
    async def handle(request: web.Request) -> web.Response:
        return answers[request.path]

    app = web.Application()
    app.router.add_get("/{path:.*}", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        async with AdminClient(f"http://127.0.0.1:{runner.addresses[0][1]}") as client:
            yield client
    finally:
        await runner.cleanup()


async def test_changes_since_come_oldest_first() -> None:
    """Only the changes after the given time, in the order in which they happened."""
    async with answering({"/verdicts": web.json_response({"verdicts": CHANGES})}) as client:
        assert [c["verdict"] for c in await client.changes(10.5)] == ["suspect", "stalled"]


async def test_load_and_units() -> None:
    """/load is returned unchanged, and model units are summed by outcome."""
    pages = {"/load": web.json_response({"verdict": "idle"}), "/metrics": web.Response(text=PAGE)}
    async with answering(pages) as client:
        assert await client.load() == {"verdict": "idle"}
        assert await client.model_units() == {"ok": 3.5, "lost": 0.25}


async def test_no_answer_is_none(unused_tcp_port: int) -> None:
    """A closed port, an error page and a response that is not JSON return None and raise nothing."""
    async with AdminClient(f"http://127.0.0.1:{unused_tcp_port}") as client:
        assert await client.load() is None
        assert await client.changes(0.0) == []
        assert await client.model_units() is None
    bad = {
        "/load": web.Response(text="<html>"),
        "/metrics": web.Response(status=500),
        "/verdicts": web.json_response([]),
    }
    async with answering(bad) as client:
        assert await client.load() is None
        assert await client.changes(0.0) == []
        assert await client.model_units() is None


@pytest.mark.parametrize("page", ["sidecar_mu_total{outcome=", 'sidecar_mu_total{tenant="a"} 1\n'])
def test_a_page_that_is_none(page: str) -> None:
    """An unreadable page is not mistaken for one without requests."""
    assert units_by_outcome(page) is None
