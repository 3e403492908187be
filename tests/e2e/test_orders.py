"""Calls that pause an engine, end to end: a call that the engine did not accept hides no hang."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any
from urllib.parse import urlsplit

import pytest
from aiohttp import web

from sidecar.tools.scripted_engine.server import ScriptedEngine

from ..waiting import PATIENCE

# SGLang's; the scripted engine is a vLLM and answers 404
UNKNOWN = ("/release_kv_cache_memory", "/pause_generation", "/update_weights_from_disk")


async def hang_up(sidecar: Any, path: str, announced: str) -> None:
    """Announce a body, send none of it, and leave."""
    url = urlsplit(sidecar.relay)
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    writer.write(f"POST {path} HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\n{announced}\r\n\r\n".encode())
    async with asyncio.timeout(PATIENCE):
        await reader.readuntil(b"\r\n\r\n")  # the relay reads
    writer.close()
    await writer.wait_closed()


async def test_orders_that_the_engine_does_not_know_hide_no_hang(engine: ScriptedEngine, start: Any) -> None:
    """Aborted calls and a 404 leave the pod ready; the hang that follows is found, never exempt."""
    sidecar = await start(engine.url)
    await sidecar.until_verdict("idle")
    for path in (*UNKNOWN, "/sleep", "/pause", "/start_profile"):
        for announced in ("content-length: 10", "transfer-encoding: chunked"):
            await hang_up(sidecar, path, announced)
    for path in UNKNOWN:
        async with sidecar.session.post(sidecar.relay + path) as answer:
            assert answer.status == 404
    assert (await sidecar.get("/readyz"))[0] == 200
    engine.faults.start("freeze")
    await sidecar.until_verdict("stalled")
    assert (await sidecar.get("/livez"))[0] == 503
    states = {v["verdict"] for v in (await sidecar.get("/verdicts"))[1]["verdicts"]}
    assert "exempt" not in states


async def test_a_weight_update_is_exempt_until_its_client_leaves(engine: ScriptedEngine, start: Any) -> None:
    """During the call the engine's silence is no hang; when the client is gone, the engine is judged again."""
    sidecar = await start(engine.url)
    await sidecar.until_verdict("idle")
    asked = asyncio.create_task(sidecar.session.post(sidecar.relay + "/update_weights?seconds=3000"))
    snapshot = await sidecar.until_verdict("exempt")
    assert snapshot["verdict"]["reason"] == "weight_update"
    asked.cancel()
    await sidecar.until_verdict("idle")
    states = {v["verdict"] for v in (await sidecar.get("/verdicts"))[1]["verdicts"]}
    assert "stalled" not in states


async def test_uploads_that_never_end_are_no_orders(engine: ScriptedEngine, start: Any) -> None:
    """Calls whose bodies are still awaited were not sent yet: the pod stays ready, and a hang meanwhile is found."""
    sidecar = await start(engine.url)
    await sidecar.until_verdict("idle")
    url, writers = urlsplit(sidecar.relay), []
    for path in ("/sleep", "/start_profile", "/update_weights"):
        reader, writer = await asyncio.open_connection(url.hostname, url.port)
        writer.write(f"POST {path} HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 10\r\n\r\n".encode())
        async with asyncio.timeout(PATIENCE):
            await reader.readuntil(b"\r\n\r\n")
        writer.write(b"half")
        await writer.drain()
        writers.append(writer)
    assert (await sidecar.get("/readyz"))[0] == 200
    engine.faults.start("freeze")
    await sidecar.until_verdict("stalled")
    assert "exempt" not in {v["verdict"] for v in (await sidecar.get("/verdicts"))[1]["verdicts"]}
    for writer in writers:
        writer.close()
        await writer.wait_closed()


@pytest.mark.slow
async def test_an_order_lasts_as_long_as_the_engine_confirms_it(engine: ScriptedEngine, start: Any) -> None:
    """Woken past the relay, the engine denies its sleep: readiness comes back, and a hang that follows is found."""
    sidecar = await start(engine.url, silence_cap="600", silence_kill="8")
    await sidecar.until_verdict("idle")
    async with sidecar.session.post(sidecar.relay + "/sleep") as answer:
        assert answer.status == 200
    assert (await sidecar.until_verdict("exempt"))["verdict"]["reason"] == "engine_sleeping"
    async with sidecar.session.post(engine.url + "/wake_up") as answer:
        assert answer.status == 200
    await sidecar.until_verdict("idle")
    engine.faults.start("freeze")
    await sidecar.until_verdict("stalled")


async def test_an_order_of_a_relay_that_was_killed_is_asked_of_the_engine(engine: ScriptedEngine, start: Any) -> None:
    """kill -9 while the engine has the call: an update that broke off is over; a sleep that took effect is reported."""
    sidecar = await start(engine.url)
    await sidecar.until_verdict("idle")
    asked = asyncio.create_task(sidecar.session.post(sidecar.relay + "/update_weights?seconds=3000"))
    await sidecar.until_verdict("exempt")
    os.kill((await sidecar.until(lambda s: bool(s["relays"])))["relays"][0]["pid"], signal.SIGKILL)
    await asyncio.wait((asked,))
    assert asked.exception() is not None
    await sidecar.until_verdict("idle")
    async with sidecar.session.post(engine.url + "/sleep") as answer:  # its answer is not seen
        assert answer.status == 200
    assert (await sidecar.until_verdict("exempt"))["verdict"]["reason"] == "engine_sleeping"


async def test_a_call_that_stops_the_engine_meets_no_canary(start: Any) -> None:
    """SGLang ends if its memory is released amid a request: the call waits for the canary that is with the engine."""
    held, free, met, canaries = asyncio.Event(), asyncio.Event(), list[int](), 0

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        nonlocal canaries
        if request.path == "/v1/models":
            return web.json_response({"data": [{"id": "m"}]})
        if request.path == "/release_memory_occupation":
            met.append(canaries)
            return web.Response()
        if request.path != "/v1/completions":
            return web.Response(status=404)
        canaries += 1
        if held.is_set():
            await free.wait()
        canaries -= 1
        usage = {"prompt_tokens": 1, "completion_tokens": 1}
        return web.json_response({"choices": [{"text": "a", "finish_reason": "length"}], "usage": usage})

    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    sidecar = await start(f"http://127.0.0.1:{runner.addresses[0][1]}", engine_kind="sglang")
    await sidecar.until_verdict("idle")
    held.set()
    async with asyncio.timeout(PATIENCE):
        while not canaries:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    asked = asyncio.create_task(sidecar.session.post(sidecar.relay + "/release_memory_occupation"))
    await asyncio.wait((asked,), timeout=0.5)
    free.set()
    assert (await asked).status == 200
    assert met == [0]
    await runner.cleanup()
