"""The live page: its rendering, and its feed over real connections."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from sidecar import events, readings, snapshot
from sidecar.report import live_page

Script = Callable[..., Any]

# --- rendering ---


def test_readings_keep_their_three_kinds(moment: Script) -> None:
    """A value, an absence and a failure are rendered differently, with their reasons."""
    data = live_page.render(
        moment(gpus=readings.Absent("no NVIDIA driver library"), engine=readings.Failed("timed out"))
    )
    assert data["gpus"] == {"absent": "no NVIDIA driver library"}
    assert data["engine"] == {"failed": "timed out"}
    assert data["own"]["value"]["rss"] == 48 << 20
    gpu = live_page.render(moment())["gpus"]["value"][0]
    assert gpu["utilization"]["value"] == 0.93
    assert gpu["temperature"] == {"absent": "not supported under MIG"}


def test_numbers_that_json_lacks_become_null(verdict: Script, moment: Script) -> None:
    """Infinite and undefined numbers become null, as browsers reject JSON with NaN."""
    odd = moment(silence_allowed=math.inf, own_lag=math.nan, verdict=verdict(evidence_of=-math.inf))
    text = json.dumps(live_page.render(odd), allow_nan=False)
    assert json.loads(text)["silence_allowed"] is None
    assert json.loads(text)["verdict"]["evidence"] == {"evidence_of": None}


def test_only_the_largest_tenants_are_sent(moment: Script) -> None:
    """Rows are bounded, the largest users are kept, and the total number is reported."""
    many = tuple(snapshot.TenantUse(f"t{n}", 0, 0.0, float(n), n, n, ()) for n in range(200))
    data = live_page.render(moment(tenants=many))
    assert [row["tenant"] for row in data["tenants"]] == [f"t{n}" for n in range(199, 199 - live_page.MAX_TENANTS, -1)]
    assert data["tenants_known"] == 200
    assert data["mu_total"] == sum(range(200))


def test_a_point_has_a_column_for_each_name(moment: Script) -> None:
    """The row of the history matches its column names, with the mean of the GPUs that could be read."""
    gpu = moment().gpus.value[0]  # type: ignore[union-attr]
    dark = replace(gpu, utilization=readings.Failed("GPU is lost"))
    both = readings.Value((gpu, replace(gpu, utilization=readings.Value(0.07, 0.0)), dark), 0.0)
    row = dict(zip(live_page.POINT_COLUMNS, live_page.point(moment(gpus=both)), strict=True))
    assert row["gpu"] == 0.5
    assert row["t"] == moment().at_wall
    assert row["state"] == "progressing"
    assert (
        dict(zip(live_page.POINT_COLUMNS, live_page.point(moment(gpus=readings.Absent("none"))), strict=True))["gpu"]
        is None
    )


def test_the_document_is_whole_and_self_contained() -> None:
    """All parts are inserted, nothing refers to another origin, and there are no inline handlers."""
    text = live_page.html().decode()
    assert "<!-- put" not in text
    assert not re.search(r"""(src|href)=["'](https?:)?//""", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
    assert not re.search(r"<[^>]+\son\w+=", text)


def test_every_state_has_a_word_a_glyph_and_a_colour() -> None:
    """The page knows all verdicts."""
    text = live_page.html().decode()
    for state in events.STATES:
        assert re.search(rf'^  {state}: \["."', text, re.MULTILINE), f"{state} has no glyph"
        assert f'[data-state="{state}"] {{ --state' in text, f"{state} has no colour"
        assert re.search(rf"RANK = {{.*\b{state}:", text), f"{state} has no height in the band"


# --- the feed, over real connections ---


@contextlib.asynccontextmanager
async def served(feed: live_page.PageFeed) -> AsyncIterator[TestClient[web.Request, web.Application]]:
    app = web.Application()
    app.router.add_get("/", live_page.index)
    app.router.add_get("/events", feed.events)
    async with TestClient(TestServer(app)) as client:
        try:
            yield client
        finally:
            feed.close()


async def next_event(response: aiohttp.ClientResponse) -> tuple[str, Any]:
    block = await response.content.readuntil(b"\n\n")
    name, data = block.decode().strip().split("\n", 1)
    return name.removeprefix("event: "), json.loads(data.removeprefix("data: "))


async def test_history_comes_first_then_the_present_then_each_snapshot(moment: Script, story: Script) -> None:
    """A page that opens late gets the history and the last snapshot at once, and then the next ones."""
    feed = live_page.PageFeed()
    for one in story(40):
        feed.publish(one)
    async with served(feed) as client, client.get("/events") as response:
        assert response.content_type == "text/event-stream"
        name, history = await next_event(response)
        assert name == "history"
        assert history["columns"] == list(live_page.POINT_COLUMNS)
        assert [row[0] for row in history["points"]] == [moment(at).at_wall for at in range(40)]
        assert (await next_event(response))[1]["at"] == 39.0
        feed.publish(moment(40.0))
        assert (await next_event(response))[1]["at"] == 40.0


async def test_history_is_bounded_in_time_and_number(moment: Script) -> None:
    """The history holds the last ten minutes, however long and often snapshots are published."""
    feed = live_page.PageFeed()
    for step in range(4000):
        feed.publish(moment(step * 0.3))
    async with served(feed) as client, client.get("/events") as response:
        points = (await next_event(response))[1]["points"]
    assert len(points) <= live_page.HISTORY_S / live_page.MIN_POINT_INTERVAL_S
    assert points[0][0] >= points[-1][0] - live_page.HISTORY_S
    assert points[-1][0] - points[0][0] > live_page.HISTORY_S - 1


async def test_older_history_is_coarse_and_keeps_each_change(moment: Script, verdict: Script) -> None:
    """Before the last ten minutes a point each 15 s is kept for hours, and one for each verdict, however short."""
    feed = live_page.PageFeed()
    short = verdict("suspect", "no_progress", since=1000.0)
    for at in range(int(live_page.OLD_S) + 3000):
        feed.publish(moment(float(at), verdict=short) if at in (5000, 5001) else moment(float(at)))
    async with served(feed) as client, client.get("/events") as response:
        history = (await next_event(response))[1]
    older = history["older"]
    times = [row[0] for row in older]
    assert times == sorted(times) and times[-1] < history["points"][0][0]
    assert history["points"][-1][0] - times[0] == pytest.approx(live_page.OLD_S, abs=live_page.OLD_INTERVAL_S)
    steps = {round(after - before) for before, after in pairwise(times)}
    assert max(steps) == live_page.OLD_INTERVAL_S and len(older) < live_page.OLD_S / live_page.OLD_INTERVAL_S + 4
    assert [row[1] for row in older].count("suspect") == 1


async def test_a_flapping_verdict_does_not_fill_memory(moment: Script, verdict: Script) -> None:
    """However often the verdict changes, the number of points is bounded."""
    feed = live_page.PageFeed()
    for at in range(live_page.MAX_OLD_POINTS + 1000):
        feed.publish(moment(float(at), verdict=verdict(("idle", "suspect")[at % 2])))
    async with served(feed) as client, client.get("/events") as response:
        assert len((await next_event(response))[1]["older"]) == live_page.MAX_OLD_POINTS


async def test_nothing_is_rendered_while_nobody_listens(monkeypatch: pytest.MonkeyPatch, moment: Script) -> None:
    """Without readers a publish costs one row of history; with three readers the snapshot is rendered once."""
    rendered: list[float] = []
    real = live_page.render
    monkeypatch.setattr(live_page, "render", lambda one: rendered.append(one.at) or real(one))
    feed = live_page.PageFeed()
    feed.publish(moment(1.0))
    assert rendered == []
    async with served(feed) as client:
        responses = [await client.get("/events") for _ in range(3)]
        rendered.clear()
        feed.publish(moment(2.0))
        assert rendered == [2.0]
        for response in responses:
            response.close()


async def test_readers_are_bounded(moment: Script) -> None:
    """Beyond the bound a page gets 503 and Retry-After; a page that leaves makes room."""
    feed = live_page.PageFeed()
    async with served(feed) as client:
        readers = [await client.get("/events") for _ in range(live_page.MAX_READERS)]
        async with client.get("/events") as refused:
            assert refused.status == 503
            assert refused.headers["Retry-After"] == "5"
        for reader in readers:
            reader.close()
        while feed.readers:
            feed.publish(moment())
            await asyncio.sleep(0)
        async with client.get("/events") as welcome:
            assert welcome.status == 200


async def test_a_slow_reader_skips_and_sees_the_present(moment: Script) -> None:
    """The queue of a reader is bounded: the oldest snapshots are dropped, the newest arrives."""
    feed = live_page.PageFeed()
    async with served(feed) as client, client.get("/events") as response:
        await next_event(response)
        for step in range(100):  # at once: the handler does not run in between
            feed.publish(moment(float(step)))
        seen = [(await next_event(response))[1]["at"] for _ in range(live_page.MAX_QUEUED_EVENTS)]
    assert seen == [97.0, 98.0, 99.0]


async def test_a_reader_that_takes_nothing_is_cut_off(verdict: Script, moment: Script) -> None:
    """A connection that is never read is aborted once it blocks for `write_timeout_s`, which makes room."""
    feed = live_page.PageFeed(write_timeout_s=0.05)
    heavy = moment(changes=tuple(verdict(detail="d" * 200, since=float(n)) for n in range(2000)))
    async with served(feed) as client:
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.setblocking(False)
            await asyncio.get_running_loop().sock_connect(deaf, ("127.0.0.1", client.port))
            await asyncio.get_running_loop().sock_sendall(deaf, b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n")
            assert await asyncio.get_running_loop().sock_recv(deaf, 15) == b"HTTP/1.1 200 OK"
            assert feed.readers == 1
            while feed.readers:
                feed.publish(heavy)
                await asyncio.sleep(0.01)
    assert feed.readers == 0


async def test_close_ends_all_streams() -> None:
    """After `close` every stream ends cleanly, and new ones are rejected, so the server need not wait."""
    feed = live_page.PageFeed()
    async with served(feed) as client, client.get("/events") as response:
        await next_event(response)
        feed.close()
        assert await response.content.read() == b""
        async with client.get("/events") as late:
            assert late.status == 503


async def test_the_policy_names_exactly_what_the_page_runs() -> None:
    """The policy of the page allows its own script and style by hash, its own origin, and nothing else."""
    async with served(live_page.PageFeed()) as client, client.get("/") as response:
        policy = response.headers["Content-Security-Policy"]
        assert response.content_type == "text/html"
        assert "default-src 'none'" in policy
        assert "connect-src 'self'" in policy
        assert "unsafe" not in policy
        assert await response.read() == live_page.html()
