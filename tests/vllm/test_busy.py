"""A real vLLM that is busy, full, paused or read slowly is healthy: no probe fails, with one relay and with two."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest

from . import client
from .client import Http
from .processes import Engine, Sidecar

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(400),
    pytest.mark.parametrize("engine", ["text"], indirect=True),
]

SMALL = 4096  # bytes of a slow reader's window
WATCHED = 20.0  # seconds in which slow readers are watched: longer than the silence that this test allows
WORD = "progress "
LETTER = 20  # a token of the tiny model's vocabulary, as the hundreds after it


@contextlib.asynccontextmanager
async def watched(http: Http, sidecar: Sidecar, *, ready: bool = True) -> AsyncIterator[None]:
    """Probe as kubelet does during the block: liveness, and with `ready` readiness, must never fail."""

    async def watch() -> None:
        while True:
            for path in ("/livez", "/readyz") if ready else ("/livez",):
                answer = await client.probe(http, sidecar.admin + path)
                assert answer[0] == 200, (path, answer, await client.states(http, sidecar.admin))
            await asyncio.sleep(0.2)

    watching = asyncio.create_task(watch())
    try:
        yield
        await asyncio.sleep(0.5)
    finally:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching


async def idle(http: Http, sidecar: Sidecar) -> None:
    async def holds() -> bool:
        return (await client.probe(http, f"{sidecar.admin}/livez"))[1] == "idle"

    await client.until(holds, "idle")


def small_window(info: Any) -> socket.socket:
    """A client socket that takes little at a time, so that an unread stream soon holds up its sender."""
    made = socket.socket(info[0], info[1], info[2])
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
    return made


@pytest.fixture
async def crowd() -> AsyncIterator[Http]:
    """A client with as many connections as it wants, each its own."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True, socket_factory=small_window)
    async with aiohttp.ClientSession(
        connector=connector, timeout=aiohttp.ClientTimeout(total=300), read_bufsize=SMALL
    ) as session:
        yield session


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_storm_of_slow_clients_fails_no_probe(
    engine: Engine, start_sidecar: Callable[..., Sidecar], http: Http, crowd: Http, workers: str
) -> None:
    """With 60 streams, half of them read slowly and half not at all, the engine is ready and serves others.

    Sixty prefills at once on two cores take longer than the quick floor of these tests, the first ones of an engine
    above all.
    """
    sidecar = start_sidecar(engine.url, workers=workers, silence_floor="15", silence_kill="40")
    await idle(http, sidecar)
    opened = asyncio.Semaphore(0)

    async def slow(reads: bool) -> None:
        body = client.completion(WORD, max_tokens=3500, stream=True, logprobs=5)
        async with crowd.post(f"{sidecar.url}/v1/completions", json=body) as answer:
            assert answer.status == 200, await answer.text()
            await answer.content.readany()
            opened.release()
            while reads:
                await asyncio.sleep(1)
                await answer.content.read(200)
            await asyncio.Event().wait()

    async with watched(http, sidecar):
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(slow(n % 2 == 0)) for n in range(60)]
            for _ in tasks:
                await opened.acquire()
            await asyncio.sleep(WATCHED)  # the silence that must not alarm
            assert await client.sample(http, f"{sidecar.admin}/metrics", "sidecar_requests_in_flight") == len(tasks)
            quick = await client.stream(http, f"{sidecar.url}/v1/completions", client.completion(WORD, max_tokens=8))
            assert quick[-2:] == ["data: [DONE]\n", "\n"]
            for task in tasks:
                task.cancel()
        await idle(http, sidecar)


@pytest.mark.parametrize(("workers", "length"), [("1", 3800), ("2", 1000)])
async def test_200_long_prompts_at_once_kill_nobody(
    engine: Engine,
    start_sidecar: Callable[..., Sidecar],
    http: Http,
    crowd: Http,
    took: Callable[[str, float], None],
    workers: str,
    length: int,
) -> None:
    """200 different prompts, of up to 3,800 tokens each: all are answered, and liveness never fails."""
    sidecar = start_sidecar(engine.url, workers=workers)
    await idle(http, sidecar)

    async def ask(number: int) -> int:
        body = client.completion(max_tokens=4, stream=True) | {
            "prompt": [LETTER + number % 16, LETTER + number // 16] * (length // 2)
        }
        async with crowd.post(f"{sidecar.url}/v1/completions", json=body) as answer:
            return answer.status if b"[DONE]" in await answer.read() else 0

    began = time.monotonic()
    async with watched(http, sidecar, ready=False):
        assert set(await asyncio.gather(*(ask(n) for n in range(200)))) == {200}
    took(f"200 prompts of {length} tokens, {workers} relay(s)", time.monotonic() - began)


async def test_a_canary_of_a_full_engine_waits_its_turn(
    engine: Engine, start_sidecar: Callable[..., Sidecar], http: Http, crowd: Http
) -> None:
    """A sidecar that starts next to an engine that is full with direct requests waits, and is started in the end."""

    async def ask() -> bytes:
        body = client.completion(WORD, max_tokens=200, stream=True)
        async with crowd.post(f"{engine.url}/v1/completions", json=body) as answer:
            return await answer.read()

    async def full() -> bool:
        return await client.sample(http, f"{engine.url}/metrics", "vllm:num_requests_waiting") > 0

    async with asyncio.TaskGroup() as group:
        users = [group.create_task(ask()) for _ in range(400)]
        await client.until(full, "requests that wait in the engine")
        sidecar = start_sidecar(engine.url)
        async with watched(http, sidecar, ready=False):
            await asyncio.wait(users)
            await idle(http, sidecar)
    assert await client.status(http, f"{sidecar.admin}/startupz") == 200


async def test_a_paused_engine_is_exempt(engine: Engine, start_sidecar: Callable[..., Sidecar], http: Http) -> None:
    """vLLM's own pause, sent through the relay during a stream: not ready, never killed, and served after /resume."""
    sidecar = start_sidecar(engine.url)
    await idle(http, sidecar)
    body = client.completion(WORD, max_tokens=1500, stream=True)
    async with watched(http, sidecar, ready=False), http.post(f"{sidecar.url}/v1/completions", json=body) as answer:
        await answer.content.readline()
        async with http.post(f"{sidecar.url}/pause", params={"mode": "keep"}) as paused:
            assert paused.status == 200, await paused.text()
        await asyncio.sleep(WATCHED)  # the pause itself
        async with http.post(f"{sidecar.url}/resume") as resumed:
            assert resumed.status == 200
        rest = await answer.read()
        await idle(http, sidecar)
    assert rest.rstrip().endswith(b"data: [DONE]")
    assert not {"stalled", "dead"} & set(await client.states(http, sidecar.admin))
