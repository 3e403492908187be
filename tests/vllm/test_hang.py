"""A real vLLM hangs because its processes are stopped: /health stays 200; the sidecar reports hang and recovery."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator

import psutil
import pytest

from . import client
from .client import Http
from .processes import Engine, Sidecar

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

PROMPT = "The tokens come one by one, and each of them is progress."


@pytest.fixture
def freeze() -> Iterator[Callable[[psutil.Process], None]]:
    """A function: stop a process of the engine. It goes on when the test ends."""
    frozen = []

    def stop(process: psutil.Process) -> None:
        frozen.append(process)
        process.send_signal(signal.SIGSTOP)

    yield stop
    for process in frozen:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGCONT)


def is_live(http: Http, sidecar: Sidecar, expected: int) -> Callable[[], object]:
    async def holds() -> bool:
        return await client.status(http, f"{sidecar.admin}/livez") == expected

    return holds


def is_idle(http: Http, sidecar: Sidecar) -> Callable[[], object]:
    async def holds() -> bool:
        return (await client.probe(http, f"{sidecar.admin}/livez"))[1] == "idle"

    return holds


@pytest.mark.parametrize("title", ["Worker", "EngineCore"])
@pytest.mark.parametrize("engine", ["text"], indirect=True)
async def test_a_silent_hang_fails_liveness_until_it_ends(
    engine: Engine, sidecar: Sidecar, http: Http, freeze: Callable[[psutil.Process], None], title: str
) -> None:
    """A stop during a stream gives 503 on /livez and a stalled file, though vLLM reports 200; resuming ends both."""
    await client.until(is_idle(http, sidecar), "idle before the hang")
    body = client.completion(PROMPT, max_tokens=3500, stream=True)
    process = engine.process(title)  # looked up before the stream, which would be over by then
    async with http.post(f"{sidecar.url}/v1/completions", json=body) as answer:
        await answer.content.readline()
        freeze(process)
        drain = asyncio.create_task(answer.read())
        try:
            await client.until(is_live(http, sidecar, 503), "/livez 503")
            assert await client.probe(http, f"{sidecar.admin}/livez") == (503, "stalled", "no_progress")
            assert await client.status(http, f"{sidecar.admin}/readyz") == 503
            assert await client.status(http, f"{engine.url}/health") == 200
            await client.until(lambda: asyncio.to_thread((sidecar.state / "stalled").exists), "the stalled file")
        finally:
            process.send_signal(signal.SIGCONT)
        await client.until(is_live(http, sidecar, 200), "/livez 200")
        rest = await asyncio.wait_for(drain, client.WAIT)
    assert b": keep-alive" in rest  # bytes came all the time, and did not pass for progress
    await client.until(is_idle(http, sidecar), "idle after the hang")
    assert await client.status(http, f"{sidecar.admin}/readyz") == 200
    await client.until(lambda: asyncio.to_thread(lambda: not (sidecar.state / "stalled").exists()), "no stalled file")


@pytest.mark.parametrize("engine", ["text"], indirect=True)
async def test_a_hang_of_an_idle_engine_is_found_by_the_canary(
    engine: Engine, sidecar: Sidecar, http: Http, freeze: Callable[[psutil.Process], None]
) -> None:
    """A stop without any requests fails liveness too, because the canaries starve."""
    await client.until(is_idle(http, sidecar), "idle before the hang")
    freeze(engine.process("EngineCore"))
    await client.until(is_live(http, sidecar, 503), "/livez 503")
    assert await client.status(http, f"{engine.url}/health") == 200
    engine.process("EngineCore").send_signal(signal.SIGCONT)
    await client.until(is_idle(http, sidecar), "idle after the hang")


@pytest.mark.parametrize("engine", ["text"], indirect=True)
async def test_startup_waits_for_a_token(
    engine: Engine, start_sidecar: Callable[..., Sidecar], http: Http, freeze: Callable[[psutil.Process], None]
) -> None:
    """/startupz is 503 next to an engine that listens and reports healthy, until a canary generates a token."""

    async def generated() -> float:
        return await client.sample(http, f"{engine.url}/metrics", "vllm:generation_tokens_total")

    before = await generated()
    freeze(engine.process("EngineCore"))
    sidecar = start_sidecar(engine.url, silence_cap="4")  # what a canary gets while the engine starts

    async def startup() -> int:
        return await client.status(http, f"{sidecar.admin}/startupz")

    async def canary_starved() -> bool:
        page = f"{sidecar.admin}/metrics"
        return await client.sample(http, page, "sidecar_canaries_total", outcome="starved") >= 1

    await client.until(canary_starved, "a starved canary")
    assert await client.status(http, f"{engine.url}/health") == 200
    assert await startup() == 503
    engine.process("EngineCore").send_signal(signal.SIGCONT)

    async def started() -> bool:
        return await startup() == 200

    await client.until(started, "/startupz 200")
    assert await generated() > before  # only the canary asked for any
