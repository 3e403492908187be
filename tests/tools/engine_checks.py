"""The visible signs of each fault of the scripted engine, one function per row."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import aiohttp
import pytest

from sidecar.engines.metrics_parser import Garbage, parse
from sidecar.engines.registry import KINDS

from ..waiting import PATIENCE
from .engine_client import Client, text

LONG = 5000  # tokens of a stream that lasts for the whole of a test
Check = Callable[[Client], Awaitable[None]]


async def freeze(client: Client) -> None:
    stream = client.start(LONG)
    await client.running()
    await client.steps(2)
    client.engine.faults.start("freeze")
    assert await client.silent(client.start(1)) and not stream.done()
    first, second = await client.sample(), await client.sample()
    assert first == second and (first.running, first.waiting) == (0, 0)
    assert (await client.json("/health"))[0] == 200


async def freeze_busy(client: Client) -> None:
    client.start(LONG)
    await client.running()
    await client.steps(2)
    client.engine.faults.start("freeze_busy")
    before = await client.sample()
    assert await client.silent(client.start(1))
    assert await client.sample() == before and before.running == 1
    assert (await client.json("/health"))[0] == 200


async def gpu_fault(client: Client) -> None:
    stream = client.start(LONG)
    await client.running()
    client.engine.faults.start("gpu_fault")
    assert await client.silent(stream, client.start(1))
    assert (await client.json("/health"))[0] == 200


async def freeze_admission(client: Client) -> None:
    old = client.start(60)
    await client.running()
    client.engine.faults.start("freeze_admission")
    new = [client.start(1), client.start(1)]
    await old
    await client.steps(3)
    sample = await client.sample()
    assert (sample.running, sample.waiting) == (0, 2) and not any(job.done() for job in new)


async def oversized_head(client: Client) -> None:
    client.engine.faults.start("oversized_head")
    huge = client.start(1, "z" * 4 * 200_000)
    await client.engine.until(lambda: client.engine.open == 1)
    small = client.start(1)
    await client.engine.until(lambda: client.engine.open == 2)
    await client.steps(3)
    sample = await client.sample()
    assert (sample.running, sample.waiting, sample.kv_capacity_tokens) == (0, 2, 131_072)
    huge.cancel()
    await small


async def kv_deadlock(client: Client) -> None:
    client.start(LONG)
    await client.running()
    client.engine.faults.start("kv_deadlock")
    before = await client.sample()
    await client.steps(5)
    after = await client.sample()
    assert after.kv_usage == 1 and after.running == 1
    assert after.generation_tokens == before.generation_tokens and after.iterations == before.iterations


async def livelock(client: Client) -> None:
    client.start(LONG)
    await client.running()
    client.engine.faults.start("livelock")
    before = await client.sample()
    await client.steps(5)
    after = await client.sample()
    assert (after.iterations or 0) >= (before.iterations or 0) + 4
    assert after.generation_tokens == before.generation_tokens


async def one_rank(client: Client) -> None:
    streams = [client.start(LONG), client.start(LONG)]
    await client.running(2)
    client.engine.faults.start("one_rank", rank=1)
    stopped = client.engine.cores[1].steps
    await client.steps(10, 0)
    assert client.engine.cores[1].steps - stopped <= 1
    assert not any(stream.done() for stream in streams)


async def freeze_decode(client: Client) -> None:
    client.engine.faults.start("freeze_decode")
    async with client.stream(LONG) as stream:
        role, first = await anext(stream), await anext(stream)
        assert role["choices"][0]["delta"]["role"] and first["choices"][0]["delta"]["content"]
        before = await client.sample()
        await client.steps(5)
        assert await client.sample() == before
        await client.chat(1, "another prefill still works")


async def transfer_stuck(client: Client) -> None:
    client.engine.faults.start("transfer_stuck")
    stream = client.start(5, "w" * 400)
    await client.running()
    await client.steps(5)
    sample = await client.sample()
    assert (sample.running, sample.generation_tokens) == (1, 0) and (sample.kv_usage or 0) > 0
    assert not stream.done()


async def stuck_near_limit(client: Client) -> None:
    client.engine.faults.start("stuck_near_limit")
    stream = client.start(5)
    running = client.engine.cores[0].scheduler.running
    await client.engine.until(lambda: any(sequence.generated == 4 for sequence in running))
    await client.steps(5)
    assert (await client.sample()).generation_tokens == 4 and not stream.done()
    client.engine.faults.start("stuck_near_limit", short=100)
    assert len(await stream) == 6, "so short a sequence is not near any limit"
    long = client.start(101)
    await client.chat(5)
    assert await client.silent(long)


async def start_hang(client: Client) -> None:
    client.engine.faults.start("start_hang")
    assert (await client.json("/health"))[0] == 503
    assert (await client.json("/v1/completions", {"prompt": "x", "max_tokens": 1}))[0] == 503


async def core_dead(client: Client) -> None:
    stream = client.start(LONG)
    await client.running()
    client.engine.faults.start("core_dead")
    assert (await client.json("/health"))[0] == 503
    assert (await client.json("/v1/completions", {"prompt": "x", "max_tokens": 1}))[0] == 500
    assert await client.silent(stream)


async def api_block(client: Client) -> None:
    stream = client.start(60)
    await client.running()
    client.engine.faults.start("api_block")
    health = client.get("/health")
    await client.engine.until(lambda: client.engine.open == 0)  # the core ends the sequence all the same
    assert await client.silent(stream, health)
    client.engine.faults.clear()
    assert len(await stream) > 1 and await health == 200


async def first_chunk_then_silence(client: Client) -> None:
    client.engine.faults.start("first_chunk_then_silence")
    async with client.stream(60) as stream:
        assert (await anext(stream))["choices"][0]["delta"]["role"]
        assert (await anext(stream))["choices"][0]["delta"]["content"]
        await client.engine.until(lambda: client.engine.open == 0)
        assert await client.silent(client._task(anext(stream)))
    assert (await client.sample()).generation_tokens == 60


async def one_stream(client: Client) -> None:
    victim = client.start(20)
    await client.running()
    client.engine.faults.start("one_stream")
    await client.steps(1)
    await client.chat(30)
    assert not victim.done()
    client.engine.faults.clear()
    await victim


async def wedge_on_abort(client: Client) -> None:
    client.engine.faults.start("wedge_on_abort")
    stream = client.start(LONG)
    await client.running()
    aborted = client.start(LONG)
    await client.running(2)
    aborted.cancel()
    await client.engine.faults.until(lambda how: not how.stepping)
    assert client.engine.faults.active == ("wedge_on_abort", "freeze_busy")
    assert await client.silent(stream)


async def hang_after_idle(client: Client) -> None:
    client.engine.faults.start("hang_after_idle", idle=0)
    first = client.start(1)
    await client.engine.faults.until(lambda how: not how.stepping)
    assert await client.silent(first)


async def slow(client: Client) -> None:
    client.engine.faults.start("slow", factor=20)
    assert len(await client.chat(3)) == 4
    planned = client.engine.cores[0].scheduler
    assert planned.plan(client.engine.faults.behaviour).seconds == pytest.approx(0.1)  # an idle step, 20 times as long


async def gibberish(client: Client) -> None:
    client.engine.faults.start("gibberish")
    assert text(await client.chat(7)) == "!" * 7


async def slow_health(client: Client) -> None:
    client.engine.faults.start("slow_health", delay=0.2)
    health = client.get("/health")
    await client.chat(5)
    assert not health.done()
    assert await health == 200


async def long_prefill(client: Client) -> None:
    client.engine.faults.start("long_prefill", duration=0.3)
    prefill = client.start(1)
    await client.running()
    before = await client.sample()
    assert await client.silent(prefill)
    assert await client.sample() == before
    await prefill


async def jit(client: Client) -> None:
    client.engine.faults.start("jit", duration=0.3)
    first = client.start(1)
    await client.running()
    assert await client.silent(first)
    await first
    await client.chat(5)


async def serial_http(client: Client) -> None:
    client.engine.faults.start("serial_http")
    stream = client.start(80)
    await client.running()
    health = client.get("/health")
    await client.steps(20)
    assert not health.done()
    await stream
    assert await health == 200


async def sleep(client: Client) -> None:
    await client.json("/sleep", {})
    assert client.engine.faults.active == ("sleep",)
    assert (await client.json("/is_sleeping"))[1] == {"is_sleeping": True}
    assert (await client.sample()).sleeping is True
    waits = client.start(1)
    assert await client.silent(waits)
    await client.json("/wake_up", {})
    await waits
    assert (await client.sample()).sleeping is False


async def pause(client: Client) -> None:
    stream = client.start(LONG)
    await client.running()
    assert await client.json("/pause", {}) == (200, {"status": "paused"})
    assert (await client.json("/is_paused"))[1] == {"is_paused": True}
    short = client.start(1)
    assert await client.silent(stream, short)
    assert await client.json("/resume", {}) == (200, {"status": "resumed"})
    await short
    assert (await client.json("/is_paused"))[1] == {"is_paused": False}


async def weight_update(client: Client) -> None:
    update = client._task(client.json("/update_weights?seconds=0.3", {}))
    await client.engine.faults.until(lambda how: not how.stepping)
    short = client.start(1)
    assert await client.silent(short)
    assert (await update)[0] == 200
    await short
    assert (await client.json("/update_weights?seconds=soon", {}))[0] == 400


async def profile(client: Client) -> None:
    assert (await client.json("/start_profile", {}))[0] == 200
    short = client.start(1)
    assert await client.silent(short)
    assert (await client.json("/stop_profile", {}))[0] == 200
    await short


async def error_500(client: Client) -> None:
    client.engine.faults.start("error_500")
    status, error = await client.json("/v1/completions", {"prompt": "x", "max_tokens": 1})
    assert status == 500 and error["error"]["code"] == 500
    assert (await client.json("/health"))[0] == 200


async def no_pnm(client: Client) -> None:
    client.engine.faults.start("no_pnm")
    for media_type, wanted in (("image/x-portable-pixmap", 500), ("image/png", 200)):
        part = {"type": "image_url", "image_url": {"url": f"data:{media_type};base64,AAAA"}}
        asked = {"messages": [{"role": "user", "content": [part]}], "max_tokens": 1}
        status, answer = await client.json("/v1/chat/completions", asked)
        assert status == wanted
        assert status == 200 or "Pnm" in answer["error"]["message"]


async def garbage_metrics(client: Client) -> None:
    client.engine.faults.start("garbage_metrics")
    async with client.session.get("/metrics") as response:
        assert response.status == 200
        with pytest.raises(Garbage):
            parse(await response.read(), KINDS["scripted"])


async def no_metrics(client: Client) -> None:
    client.engine.faults.start("no_metrics")
    assert (await client.json("/metrics"))[0] == 404


async def crash(client: Client) -> None:
    stream = client.start(LONG)
    await client.running()
    client.engine.faults.start("crash")
    with pytest.raises(aiohttp.ClientError):
        await stream
    await client.engine.until(lambda: client.engine.exit_code == 1)
    with pytest.raises(aiohttp.ClientConnectorError):
        await client.json("/health")


async def refuse(client: Client) -> None:
    stream = client.start(LONG)
    await client.running()
    await client.json("/faults", {"kind": "refuse", "seconds": 0.2})
    with pytest.raises(aiohttp.ClientError):
        await stream
    await client.engine.until(lambda: not client.engine.listening)
    with pytest.raises(aiohttp.ClientConnectorError):
        await client.json("/health")
    await client.engine.until(lambda: client.engine.listening)
    assert (await client.json("/health"))[0] == 200


async def hide(client: Client) -> None:
    client.engine.faults.start("hide", tokens=20)
    async with client.stream(40) as stream:
        assert (await anext(stream))["choices"][0]["delta"]["role"]
        piece = client._task(anext(stream))
        await client.engine.until(lambda: client.engine.cores[0].scheduler.running[0].generated >= 10)
        assert not piece.done() and (await client.sample()).generation_tokens >= 10
        assert len(text([await piece]).split()) >= 10, "all hidden tokens come at once"
    client.engine.faults.start("hide")
    assert len(await client.chat(10)) == 2, "the role, and everything else"


async def withhold_tools(client: Client) -> None:
    client.engine.faults.start("withhold_tools")
    assert len(await client.chat(5)) == 6
    assert len(await client.chat(5, tools=[{"type": "function", "function": {"name": "f"}}])) == 2


async def zombies(client: Client) -> None:
    client.engine.faults.start("zombies")
    waits = client.start(1)
    await client.steps(3)
    before = await client.sample()
    await client.steps(3)
    after = await client.sample()
    assert (after.running, after.waiting) == (64, 1) and not waits.done()
    assert (after.generation_tokens or 0) > (before.generation_tokens or 0)


async def slow_grammar(client: Client) -> None:
    client.engine.faults.start("slow_grammar", duration=2)
    waits = client.start(1, response_format={"type": "json_object"})
    await client.engine.until(lambda: client.engine.open == 1)
    await client.chat(5)
    assert not waits.done()
    await waits


async def rank_zero(client: Client) -> None:
    client.start(LONG)
    client.start(LONG)
    await client.running(2)
    for rank in (0, 1):
        await client.steps(2, rank)
    client.engine.faults.start("rank_zero", rank=1)
    assert [rank.running for rank in (await client.sample()).ranks] == [1, 0]


async def memory_released(client: Client) -> None:
    assert (await client.json("/release_memory_occupation", {}))[0] == 200
    assert (await client.json("/health"))[0] == 200 and client.engine.exit_code is None
    assert (await client.json("/resume_memory_occupation", {}))[0] == 200
    await client.chat(1)
    client.engine.faults.start("memory_released")
    with pytest.raises((aiohttp.ClientError, AssertionError)):
        await client.chat(1)
    await client.engine.until(lambda: client.engine.exit_code == 1)


async def refuse_all(client: Client) -> None:
    client.engine.faults.start("refuse_all", status=429)
    assert (await client.json("/v1/completions", {"prompt": "x", "max_tokens": 1}))[0] == 429
    assert (await client.json("/v1/rerank", {}))[0] == 429
    assert (await client.json("/health"))[0] == 200


async def worker_lost(client: Client) -> None:
    client.engine.faults.start("worker_lost")
    assert (await client.json("/v1/completions", {"prompt": "x", "max_tokens": 1}))[0] == 404
    assert (await client.json("/v1/models"))[1]["data"] == []
    assert (await client.json("/health"))[0] == 200


async def refuse_canary(client: Client) -> None:
    client.engine.faults.start("refuse_canary")
    for path in ("/v1/completions", "/v1/chat/completions"):
        asked = {"prompt": "1", "messages": [{"role": "user", "content": "1"}], "max_tokens": 1}
        assert (await client.json(path, asked))[0] == 400
    assert (await client.json("/v1/embeddings", {"input": "1"}))[0] == 404
    assert len(await client.chat(2)) == 3


async def rerank_only(client: Client) -> None:
    client.engine.faults.start("rerank_only")
    assert (await client.json("/v1/rerank", {"query": "q", "documents": ["d"]}))[1]["results"]
    assert (await client.json("/v1/completions", {"prompt": "x", "max_tokens": 1}))[0] == 404


async def embeddings_only(client: Client) -> None:
    client.engine.faults.start("embeddings_only")
    assert (await client.json("/v1/embeddings", {"input": "x"}))[1]["data"]
    assert (await client.json("/v1/completions", {"prompt": "x", "max_tokens": 1}))[0] == 404


async def audio_only(client: Client) -> None:
    client.engine.faults.start("audio_only")
    assert (await client.json("/v1/audio/transcriptions?seconds=0", {}))[1]["text"]
    assert (await client.json("/v1/completions", {"prompt": "x", "max_tokens": 1}))[0] == 500


async def images_only(client: Client) -> None:
    client.engine.faults.start("images_only")
    assert (await client.json("/v1/images/generations?seconds=0", {}))[1]["data"]
    assert (await client.json("/v1/completions", {"prompt": "x", "max_tokens": 1}))[0] == 404


async def half_deaf(client: Client) -> None:
    client.engine.faults.start("half_deaf")
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(client.engine.url, connector=connector) as fresh:

        async def ask() -> int:
            async with fresh.get("/health") as response:
                return response.status

        asked = [client._task(ask()) for _ in range(16)]
        await asyncio.wait(asked, timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED)
        done, waits = await asyncio.wait(asked, timeout=2.0)
        assert done and waits and {task.result() for task in done} == {200}
        client.engine.faults.clear()
        assert {await task for task in waits} == {200}


async def slow_metrics(client: Client) -> None:
    client.engine.faults.start("slow_metrics", delay=2)
    page = client.get("/metrics")
    assert (await client.json("/version"))[0] == 200 and not page.done()
    assert await page == 200


async def several_backends(client: Client) -> None:
    await client.chat(60)
    client.engine.faults.start("several_backends", count=3)
    pages = [await client.sample() for _ in range(6)]
    tokens = [page.generation_tokens for page in pages]
    assert tokens[:3] == tokens[3:] and sorted(tokens[:3]) == [20, 40, 60]
    assert len({page.started_wall for page in pages}) == 3


async def restart(client: Client) -> None:
    await client.chat(5)
    before = await client.sample()
    await _restarted(client, "restart")
    after = await client.sample()
    assert (before.generation_tokens, after.generation_tokens) == (5, 0)
    assert (after.started_wall or 0) > (before.started_wall or 0)


async def restart_silent(client: Client) -> None:
    await _restarted(client, "restart_silent")
    assert client.engine.faults.active == ("api_block",)
    assert await client.silent(client.get("/health"))


async def restart_loading(client: Client) -> None:
    await _restarted(client, "restart_loading")
    assert (await client.json("/health"))[0] == 503


async def _restarted(client: Client, kind: str) -> None:
    stream = client.start(LONG)
    await client.running()
    client.engine.faults.start(kind, down=2)
    with pytest.raises(aiohttp.ClientError):
        await stream
    with pytest.raises(aiohttp.ClientConnectorError):
        await client.json("/health")
    await client.engine.until(lambda: client.engine.restarts == 1 and client.engine.listening)


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        freeze,
        freeze_busy,
        gpu_fault,
        freeze_admission,
        oversized_head,
        kv_deadlock,
        livelock,
        one_rank,
        freeze_decode,
        transfer_stuck,
        stuck_near_limit,
        start_hang,
        core_dead,
        api_block,
        first_chunk_then_silence,
        one_stream,
        wedge_on_abort,
        hang_after_idle,
        slow,
        gibberish,
        slow_health,
        long_prefill,
        jit,
        serial_http,
        sleep,
        pause,
        weight_update,
        profile,
        error_500,
        no_pnm,
        garbage_metrics,
        no_metrics,
        crash,
        refuse,
        hide,
        withhold_tools,
        zombies,
        slow_grammar,
        rank_zero,
        memory_released,
        refuse_all,
        worker_lost,
        refuse_canary,
        rerank_only,
        embeddings_only,
        audio_only,
        images_only,
        half_deaf,
        slow_metrics,
        several_backends,
        restart,
        restart_silent,
        restart_loading,
    )
}
OPTIONS = {"one_rank": {"data_parallel": 2}, "rank_zero": {"data_parallel": 2}}
