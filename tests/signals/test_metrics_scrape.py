"""The engine's metrics page, read from real servers that behave and misbehave; and the sample of a process."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp
import pytest
from aiohttp import web

from sidecar.readings import Absent, EngineSample, Failed, Reading, Value
from sidecar.signals import own_process
from sidecar.signals.engine_address import EngineAddress
from sidecar.signals.engine_monitor import open_session
from sidecar.signals.metrics_scrape import MAX_PAGE_AGE_S, ScrapeSignal

from ..waiting import PATIENCE

PAGE = b"running 3\n"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Serve = Callable[[Handler], Awaitable[str]]


def parse(page: bytes) -> EngineSample:
    """The smallest parser that keeps the contract: ValueError on garbage."""
    name, value = page.decode().split()
    if name != "running":
        raise ValueError("no such page")
    return EngineSample(running=float(value))


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Start an engine whose /metrics is the handler; its page's URL."""
    runners: list[web.AppRunner] = []

    async def start(handler: Handler) -> str:
        app = web.Application()
        app.router.add_get("/metrics", handler)
        runners.append(web.AppRunner(app, shutdown_timeout=0.1))
        await runners[-1].setup()
        await web.TCPSite(runners[-1], "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{runners[-1].addresses[0][1]}/metrics"

    yield start
    for runner in runners:
        await runner.cleanup()


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as one:
        yield one


def answering(status: int = 200, body: bytes = PAGE) -> Handler:
    async def handler(_: web.Request) -> web.Response:
        return web.Response(status=status, body=body)

    return handler


def error(reading: Reading[EngineSample]) -> str:
    assert isinstance(reading, Failed), reading
    return reading.error


async def test_a_page_becomes_a_sample_with_its_cost(serve: Serve, session: aiohttp.ClientSession) -> None:
    """A scrape gives the parsed sample, when it was complete and its cost, and keeps the page's text for merging."""
    now = 5.0

    async def slow(_: web.Request) -> web.Response:
        nonlocal now
        now += 3.0
        return web.Response(body=PAGE)

    signal = ScrapeSignal(await serve(slow), parse, clock=lambda: now)
    assert isinstance(signal.read(), Absent)
    reading = await signal.poll(session)
    assert reading == Value(EngineSample(running=3.0), at=8.0, seconds=3.0)
    assert signal.read() == reading
    assert signal.page() == PAGE.decode()


@pytest.mark.parametrize("status", [200, 401, 404, 500])
async def test_an_engine_without_a_page_is_asked_whether_it_answers(
    serve: Serve, session: aiohttp.ClientSession, status: int
) -> None:
    """Without metrics the reading stays absent, and any response proves that the API runs."""
    signal = ScrapeSignal(await serve(answering(status, b"{}")), None)
    assert isinstance(await signal.poll(session), Absent)
    assert signal.page() is None and not signal.unanswered


async def never(_: web.Request) -> web.Response:
    await asyncio.Event().wait()
    return web.Response()


async def test_an_api_without_a_page_that_answers_nothing_is_seen(serve: Serve, session: aiohttp.ClientSession) -> None:
    """A blocked API is distinguished from a responding one, even if the engine has no metrics page."""
    signal = ScrapeSignal(await serve(never), None, timeout=0.5, contact_timeout=0.05)
    await signal.poll(session)
    assert signal.unanswered
    signal.url = await serve(answering())
    await signal.poll(session)
    assert not signal.unanswered


@pytest.mark.parametrize("status", [200, 404, 503])
async def test_a_page_that_hangs_alone_is_no_blocked_api(
    serve: Serve, session: aiohttp.ClientSession, status: int
) -> None:
    """A page may be slow, or hang with the engine: whatever answers elsewhere shows an API that is not blocked."""
    signal = ScrapeSignal(
        await serve(never), parse, contact=await serve(answering(status)), timeout=0.5, contact_timeout=0.05
    )
    assert "did not answer" in error(await signal.poll(session))
    assert not signal.unanswered
    signal.contact = signal.url
    await signal.poll(session)
    assert signal.unanswered and "answers nothing" in error(signal.read())


async def test_a_slow_page_is_read_and_meanwhile_the_api_asked(serve: Serve, session: aiohttp.ClientSession) -> None:
    """A page that takes longer than a contact may still gives its counters, and hides no API that blocks meanwhile."""
    free, asked = asyncio.Event(), 0

    async def slow(_: web.Request) -> web.Response:
        await free.wait()
        return web.Response(body=PAGE)

    async def contact(_: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        if asked == 2:
            await asyncio.Event().wait()
        return web.Response()

    signal = ScrapeSignal(await serve(slow), parse, contact=await serve(contact), contact_timeout=0.1)
    seen = [signal.unanswered]
    async with asyncio.timeout(PATIENCE):
        polling = asyncio.create_task(signal.poll(session))
        while asked < 4:
            if signal.unanswered != seen[-1]:
                seen.append(signal.unanswered)
            await asyncio.sleep(0.01)
        free.set()
        assert isinstance(await polling, Value)
    assert seen == [False, True, False]


async def test_a_page_too_old_is_no_reading(serve: Serve, session: aiohttp.ClientSession) -> None:
    """While the next page is outstanding the last one is evidence for a limited time, not forever."""
    now = 0.0
    signal = ScrapeSignal(await serve(answering()), parse, clock=lambda: now)
    await signal.poll(session)
    now = MAX_PAGE_AGE_S
    assert isinstance(signal.read(), Value)
    now += 0.1
    assert "has not answered for 10 s" in error(signal.read())


async def test_each_scrape_has_a_connection_of_its_own(serve: Serve) -> None:
    """Of several API processes the one that hangs does not keep the page forever."""
    peers: set[object] = set()
    thrice = asyncio.Event()

    async def handler(request: web.Request) -> web.Response:
        assert request.transport is not None
        peers.add(request.transport.get_extra_info("peername"))
        if len(peers) == 3:
            thrice.set()
        return web.Response(body=PAGE)

    signal = ScrapeSignal(await serve(handler), parse, period=0.01)
    async with open_session(EngineAddress(signal.url)) as session:
        task = asyncio.create_task(signal.run(session))
        async with asyncio.timeout(PATIENCE):
            await thrice.wait()
        task.cancel()


async def test_an_engine_that_rests_is_left_alone(serve: Serve, session: aiohttp.ClientSession) -> None:
    """A sleeping engine is not scraped, and the reading has that reason."""
    resting = "engine_sleeping"
    signal = ScrapeSignal(await serve(answering()), parse, sleep_state=lambda: resting)
    reading = await signal.poll(session)
    assert isinstance(reading, Absent) and "asleep" in reading.reason
    resting = ""
    assert isinstance(await signal.poll(session), Value)


@pytest.mark.parametrize(
    ("status", "body", "why"),
    [
        (400, PAGE, "answered 400; in llama.cpp's router mode"),
        (404, PAGE, "answered 404; start the engine with its metrics on"),
        (401, PAGE, "answered 401; set --engine-key"),
        (500, PAGE, "answered 500"),
        (302, PAGE, "answered 302"),
        (200, b"<html>", "not Prometheus text"),
        (200, b"\xff\xfe 1", "not Prometheus text"),
        (200, b"running " + b"1" * 1000, "over 100 bytes"),
    ],
)
async def test_a_bad_answer_is_failed_with_a_reason(
    serve: Serve, session: aiohttp.ClientSession, status: int, body: bytes, why: str
) -> None:
    """Status, garbage and size have reasons of their own, and none becomes a page to merge."""
    signal = ScrapeSignal(await serve(answering(status, body)), parse, max_bytes=100)
    assert why in error(await signal.poll(session))
    assert signal.page() is None


async def test_an_endless_page_is_cut_at_its_bound(serve: Serve, session: aiohttp.ClientSession) -> None:
    """A page without end is given up at the bound, and the engine is hung up on."""
    gone = asyncio.Event()

    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(b"x" * 65536)
        finally:
            gone.set()

    signal = ScrapeSignal(await serve(endless), parse, max_bytes=1 << 20)
    assert "over 1048576 bytes" in error(await signal.poll(session))
    await gone.wait()


async def test_an_engine_that_does_not_answer_is_failed_after_the_timeout(
    serve: Serve, session: aiohttp.ClientSession
) -> None:
    """A page that never comes fails the reading within the time given, while others may read on."""
    signal = ScrapeSignal(await serve(never), parse, timeout=0.05)
    assert "did not answer in 0.05 s" in error(await signal.poll(session))


async def test_a_closed_port_and_a_broken_answer_are_failed(session: aiohttp.ClientSession) -> None:
    """A closed port and a peer that disconnects are failures with reasons that contain no address."""

    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/metrics"
    signal = ScrapeSignal(url, parse)
    assert "broke off" in error(await signal.poll(session))
    server.close()
    await server.wait_closed()
    refused = error(await signal.poll(session))
    assert "refuses connections" in refused
    assert "127.0.0.1" not in refused


async def test_a_parser_that_breaks_does_not_break_the_loop(serve: Serve, session: aiohttp.ClientSession) -> None:
    """An error that no parser should raise is a failed reading like any other."""

    def broken(page: bytes) -> EngineSample:
        raise KeyError(page)

    signal = ScrapeSignal(await serve(answering()), broken)
    assert "KeyError" in error(await signal.poll(session))


async def test_a_failure_keeps_the_last_page_until_it_is_too_old(serve: Serve, session: aiohttp.ClientSession) -> None:
    """One missed scrape does not take the engine's series away; old ones are not shown as fresh."""
    now = 0.0
    up = True

    async def flaky(_: web.Request) -> web.Response:
        return web.Response(body=PAGE) if up else web.Response(status=500)

    signal = ScrapeSignal(await serve(flaky), parse, period=1.0, clock=lambda: now)
    await signal.poll(session)
    up, now = False, MAX_PAGE_AGE_S
    error(await signal.poll(session))
    assert signal.page() == PAGE.decode()
    now += 0.1
    assert signal.page() is None
    assert signal.last_page(5) == (now, PAGE.decode()[:5]), "however old, for a later diagnosis"


async def test_run_polls_again_and_again_until_it_is_cancelled(serve: Serve, session: aiohttp.ClientSession) -> None:
    """`run` goes on over failures, sends the given key, asks for plain text, and ends when cancelled."""
    seen: list[str | None] = []
    thrice = asyncio.Event()

    async def handler(request: web.Request) -> web.Response:
        seen.append(request.headers.get("Authorization"))
        assert request.headers["Accept"].startswith("text/plain")
        if len(seen) == 3:
            thrice.set()
        return web.Response(status=500) if len(seen) == 1 else web.Response(body=PAGE)

    signal = ScrapeSignal(await serve(handler), parse, period=0.01, headers={"Authorization": "Bearer k"})
    task = asyncio.create_task(signal.run(session))
    await thrice.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert seen[:3] == ["Bearer k"] * 3
    assert isinstance(signal.read(), Value)


# --- process ---


def test_the_own_process_is_sampled() -> None:
    """Resident bytes, CPU seconds and threads of a live process are positive numbers, with their cost."""
    reading = own_process.sample(os.getpid())
    assert isinstance(reading, Value)
    assert reading.value.pid == os.getpid()
    assert reading.value.rss > 1 << 20
    assert reading.value.cpu_seconds > 0
    assert reading.value.threads >= 1
    assert reading.seconds > 0


def test_a_process_that_ended_is_failed() -> None:
    """A pid that is gone is a failed reading with a reason, not a zero."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    reading = own_process.sample(child.pid)
    assert reading == Failed(f"process {child.pid} is gone")
