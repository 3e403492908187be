"""The demo's traffic: its requests, its counts, and real requests to a real server."""

from __future__ import annotations

import asyncio
import base64
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from sidecar.errors import UsageError
from sidecar.tools.demo.traffic import (
    SHAPES,
    DemoTraffic,
    TrafficPlan,
    body,
    load_pictures,
    make_pictures,
    outcome,
    plan_requests,
)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
PICTURES = ("data:image/jpeg;base64,AAAA", "data:image/png;base64,BBBB")


def test_the_same_seed_asks_the_same() -> None:
    """The requests depend on the seed alone, and another seed gives others."""
    first, again, other = (list(islice(plan_requests(seed, 4.0, 2), 200)) for seed in (7, 7, 8))
    assert first == again
    assert first != other


def test_the_mix_is_as_the_table_says() -> None:
    """Arrivals keep the rate, every shape has about its share, and sizes stay within its bounds."""
    some = list(islice(plan_requests(1, 5.0, 2), 6000))
    assert sum(a.gap for a in some) / len(some) == pytest.approx(1 / 5.0, rel=0.1)
    count, weights = Counter(a.shape.tenant for a in some), sum(s.weight for s in SHAPES)
    for shape in SHAPES:
        assert count[shape.tenant] / len(some) == pytest.approx(shape.weight / weights, rel=0.2)
    for a in some:
        assert a.shape.output[0] <= a.max_tokens <= a.shape.output[1]
        assert a.shape.words[0] <= len(a.prompt.split()) <= a.shape.words[1]
        assert len(a.pictures) == a.shape.pictures


def test_text_only_without_pictures() -> None:
    """Without pictures, no request has one."""
    assert not any(a.pictures or a.shape.pictures for a in islice(plan_requests(1, 5.0, 0), 500))


def test_bodies_are_those_of_the_api() -> None:
    """A completion has a prompt, a chat has messages, and a picture is an image_url part after the text."""
    some = list(islice(plan_requests(3, 5.0, 2), 200))
    for ask in some:
        made = body(ask, "m", PICTURES)
        assert (made["model"], made["stream"], made["max_tokens"]) == ("m", True, ask.max_tokens)
        assert ("prompt" in made) == (ask.shape.route == "completions")
        if ask.pictures:
            text, *images = made["messages"][0]["content"]
            assert text == {"type": "text", "text": ask.prompt}
            assert [i["image_url"]["url"] for i in images] == [PICTURES[k] for k in ask.pictures]


@pytest.mark.parametrize(
    ("status", "complete", "expected"),
    [
        (200, True, "ok"),
        (200, False, "broken"),
        (400, True, "rejected"),
        (413, False, "rejected"),
        (500, False, "engine_error"),
        (502, False, "unavailable"),
        (503, True, "unavailable"),
    ],
)
def test_outcome(status: int, complete: bool, expected: str) -> None:
    """Each kind of response has one outcome."""
    assert outcome(status, complete) == expected


@asynccontextmanager
async def served(handler: Handler) -> AsyncIterator[str]:
    app = web.Application(client_max_size=64 << 20)
    app.router.add_post("/v1/{route:.*}", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def sse(request: web.Request, *events: str) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for event in events:
        await response.write(f"data: {event}\n\n".encode())
    return response


async def test_requests_reach_the_relay() -> None:
    """Requests have a tenant and a body, and each that ends properly counts as ok with its pictures."""
    got: list[tuple[str, str, dict[str, Any]]] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        got.append((request.path, request.headers["x-tenant-id"], await request.json()))
        return await sse(request, '{"choices":[]}', "[DONE]")

    async with served(answer) as url:
        traffic = DemoTraffic(TrafficPlan(url, rate=500, in_flight=64, seed=5, model="scripted", pictures=PICTURES))
        await traffic.run(40)
    assert traffic.tally.outcomes == {"ok": 40}
    assert traffic.tally.last_ok > 0
    asked = list(islice(plan_requests(5, 500, 2), 40))
    assert Counter(tenant for _, tenant, _ in got) == Counter(a.shape.tenant for a in asked)
    assert traffic.tally.pictures == sum(len(a.pictures) for a in asked) > 0
    assert all(path == f"/v1/{'completions' if 'prompt' in made else 'chat/completions'}" for path, _, made in got)


async def test_bad_endings_are_told_apart() -> None:
    """Incomplete streams, errors in a stream, broken connections and error statuses each have an outcome."""

    async def cut(request: web.Request) -> web.StreamResponse:
        response = await sse(request, '{"choices":[]}')
        assert request.transport
        request.transport.abort()
        return response

    async def status(request: web.Request, code: int) -> web.StreamResponse:
        return web.json_response({"error": {}}, status=code)

    endings: list[tuple[Handler, str]] = [
        (lambda r: sse(r, '{"choices":[]}'), "broken"),
        (lambda r: sse(r, '{"error":{"message":"stalled"}}', "[DONE]"), "broken"),
        (cut, "broken"),
        (lambda r: status(r, 400), "rejected"),
        (lambda r: status(r, 500), "engine_error"),
        (lambda r: status(r, 503), "unavailable"),
    ]
    todo = iter(endings)

    async def answer(request: web.Request) -> web.StreamResponse:
        await request.read()
        return await next(todo)[0](request)

    async with served(answer) as url:
        traffic = DemoTraffic(TrafficPlan(url, rate=500, in_flight=64, seed=1, model="m"))
        await traffic.run(len(endings))
    assert traffic.tally.outcomes == Counter(name for _, name in endings)


async def test_closed_port_is_unavailable(unused_tcp_port: int) -> None:
    """Requests to a closed port end as unavailable and do not stop the traffic."""
    traffic = DemoTraffic(TrafficPlan(f"http://127.0.0.1:{unused_tcp_port}", rate=500, in_flight=8, seed=1, model="m"))
    await traffic.run(5)
    assert sum(traffic.tally.outcomes.values()) == 5
    assert set(traffic.tally.outcomes) <= {"unavailable", "skipped"}


async def test_a_stuck_server_bounds_the_requests_under_way() -> None:
    """Above the limit, requests are skipped, not queued; after cancellation the others count as open."""
    stuck, three = asyncio.Event(), asyncio.Event()
    waiting: list[int] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        waiting.append(1)
        if len(waiting) == 3:
            three.set()
        await stuck.wait()
        return web.Response()

    async with served(answer) as url:
        traffic = DemoTraffic(TrafficPlan(url, rate=500, in_flight=3, seed=1, model="m"))
        running = asyncio.create_task(traffic.run())
        await three.wait()
        while not traffic.tally.outcomes["skipped"]:  # noqa: ASYNC110 - the tally is plain data
            await asyncio.sleep(0.001)
        assert traffic.tally.open == 3
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert traffic.tally.open == 0
        assert traffic.tally.outcomes["open"] == 3
        assert len(waiting) == 3
        stuck.set()


def test_pictures_of_a_directory(tmp_path: Path) -> None:
    """Only pictures are taken, by name, as data URLs of their type; a directory without any is a usage error."""
    with pytest.raises(UsageError, match=r"--images: .* contains no \.jpg"):
        load_pictures(tmp_path)
    for name, data in (("b.PNG", b"png"), ("a.jpg", b"jpg"), ("notes.txt", b"no"), ("empty.jpg", b"")):
        (tmp_path / name).write_bytes(data)
    (tmp_path / "dir.jpg").mkdir()
    assert load_pictures(tmp_path) == [
        f"data:image/jpeg;base64,{base64.b64encode(b'jpg').decode()}",
        f"data:image/png;base64,{base64.b64encode(b'png').decode()}",
    ]


def test_made_pictures_are_photographs(requires: Callable[[str], Path]) -> None:
    """Synthetic pictures are JPEGs with the entropy of photographs, equal for equal seeds."""
    requires("python:PIL")
    made = make_pictures(3)
    assert made == make_pictures(3)
    for url in made:
        media, _, text = url.partition(",")
        data = base64.b64decode(text)
        assert media == "data:image/jpeg;base64"
        assert data[:3] == b"\xff\xd8\xff"
        assert 30_000 < len(data) < 1_500_000
