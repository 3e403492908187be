"""A hang is found, a busy engine is healthy, and the sidecar's own faults blame no engine."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import aiohttp
import pytest

from sidecar.tools.scripted_engine.server import EngineSettings, ScriptedEngine

from ..ports import free_port
from ..waiting import PATIENCE


async def test_a_silent_hang_fails_liveness_leaves_a_diagnosis_and_heals(engine: ScriptedEngine, start: Any) -> None:
    """Open requests, /health 200, no token: /livez turns 503, clients get errors, until the engine moves again."""
    sidecar = await start(engine.url)
    await sidecar.until_verdict("idle")
    assert (await sidecar.get("/startupz"))[0] == 200
    async with sidecar.chat(tokens=100_000) as stream:
        await stream.content.readany()
        await sidecar.until_verdict("progressing")
        engine.faults.start("freeze")
        snapshot = await sidecar.until_verdict("stalled")
        assert snapshot["verdict"]["evidence"]["outstanding"] == 1
        status, body = await sidecar.get("/livez")
        assert (status, body["verdict"], body["reason"]) == (503, "stalled", "no_progress")
        assert "the last canary got nothing in its time" in body["detail"]
        assert (await sidecar.get("/readyz"))[0] == 503
        await sidecar.until_file("stalled")
        async with sidecar.session.get(engine.url + "/health") as health:
            assert health.status == 200, "the engine itself says that it is fine"
        async with asyncio.timeout(PATIENCE):
            assert b'"engine_stalled"' in (await stream.read()).split(b"data: ")[-1]
    async with sidecar.chat() as refused:
        assert (refused.status, refused.headers["retry-after"]) == (503, "10")
    engine.faults.clear()
    await sidecar.until_verdict("idle")
    async with asyncio.timeout(PATIENCE):
        while (await _status(sidecar)) != 200:  # noqa: ASYNC110  the relay hears of it some milliseconds after the page
            await asyncio.sleep(0.05)
    assert (await sidecar.get("/livez"))[0] == 200
    await sidecar.until_file("stalled", there=False)
    await sidecar.until(lambda s: bool(s["diagnoses"]))
    _, listed = await sidecar.get("/diagnoses")
    _, bundle = await sidecar.get("/diagnoses/" + listed["diagnoses"][0]["id"])
    assert bundle["outstanding"][0]["route"] == "chat" and "vllm:num_requests_running" in bundle["engine_metrics"]
    assert "hello" not in str(bundle)
    states = [v["verdict"] for v in (await sidecar.get("/verdicts"))[1]["verdicts"]]
    assert states[states.index("stalled") - 1] == "idle", states


async def test_an_idle_hang_is_found_by_canaries(engine: ScriptedEngine, start: Any) -> None:
    """A hang of an idle engine is found."""
    sidecar = await start(engine.url)
    await sidecar.until_verdict("idle")
    engine.faults.start("freeze")
    await sidecar.until_verdict("stalled")
    assert (await sidecar.get("/livez"))[0] == 503


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault", ["livelock", "freeze_admission", "kv_deadlock", "first_chunk_then_silence", "core_dead"]
)
async def test_hangs_of_other_kinds_fail_readiness_or_liveness(fault: str, engine: ScriptedEngine, start: Any) -> None:
    """Whatever stops tokens while requests are outstanding withdraws the engine from service."""
    sidecar = await start(engine.url)
    await sidecar.until_verdict("idle")
    engine.faults.start(fault)
    async with asyncio.TaskGroup() as group:
        asking = [group.create_task(_ask(sidecar)) for _ in range(3)]
        await sidecar.until_verdict("suspect", "stalled")
        for task in asking:
            task.cancel()


async def _status(sidecar: Any) -> int:
    async with sidecar.chat() as answer:
        return int(answer.status)


async def _ask(sidecar: Any) -> None:
    async with sidecar.chat(tokens=200) as stream:
        async for _ in stream.content:
            pass
    await asyncio.Event().wait()


async def test_a_long_prefill_and_a_slow_health_page_are_no_hang(engine: ScriptedEngine, start: Any) -> None:
    """The engine computes for several times the floor before its first token: quiet, never suspect."""
    sidecar = await start(engine.url, silence_floor="1")
    await sidecar.until_verdict("idle")
    engine.faults.start("long_prefill", duration=4)
    engine.faults.start("slow_health")
    async with sidecar.chat(tokens=2, text="x" * 4 * 40_000) as stream:
        assert stream.status == 200
        await stream.read()
    states = [v["verdict"] for v in (await sidecar.get("/verdicts"))[1]["verdicts"]]
    assert not {"suspect", "stalled", "dead"} & set(states), states


@pytest.mark.slow
async def test_an_api_that_is_blocked_for_a_while_is_no_hang(engine: ScriptedEngine, start: Any) -> None:
    """Image work can block every HTTP response for long: the allowed silence grows by a third of --silence-cap."""
    sidecar = await start(engine.url, silence_cap="60")
    await sidecar.until_verdict("idle")
    async with sidecar.chat(tokens=100_000) as stream:
        await stream.content.readany()
        engine.faults.start("api_block", seconds=9)
        await sidecar.until(lambda s: "failed" in s["engine"])
        await sidecar.until(lambda s: "failed" not in s["engine"])
        await sidecar.until_verdict("progressing")
    states = [v["verdict"] for v in (await sidecar.get("/verdicts"))[1]["verdicts"]]
    assert not {"stalled", "dead"} & set(states), states


async def test_an_api_that_stays_blocked_is_a_hang(engine: ScriptedEngine, start: Any) -> None:
    """The engine computes, but its API stays blocked: found after the longer window."""
    sidecar = await start(engine.url)
    await sidecar.until_verdict("idle")
    async with sidecar.chat(tokens=100_000) as stream:
        await stream.content.readany()
        engine.faults.start("api_block")
        await sidecar.until_verdict("stalled")
        assert (await sidecar.get("/livez"))[0] == 503


async def test_garbage_metrics_are_a_failed_reading_and_change_no_verdict(engine: ScriptedEngine, start: Any) -> None:
    """A signal that cannot be read is failed, never 0, and kills nothing."""
    sidecar = await start(engine.url)
    await sidecar.until_verdict("idle")
    engine.faults.start("garbage_metrics")
    snapshot = await sidecar.until(lambda s: "failed" in s["engine"])
    assert snapshot["verdict"]["state"] in ("idle", "progressing", "quiet")
    async with sidecar.chat() as stream:
        assert stream.status == 200
        await stream.read()
    await sidecar.until(lambda s: s["verdict"]["state"] in ("idle", "progressing") and "failed" in s["engine"])
    await sidecar.until_metrics('sidecar_signal_up{signal="scrape"} 0.0')


async def test_an_engine_that_is_not_there_yet_is_starting(start: Any) -> None:
    """Start-up waits, says so, and ends when the engine serves."""
    port = free_port()
    sidecar = await start(f"http://127.0.0.1:{port}")
    status, body = await sidecar.get("/startupz")
    assert status == 503 and body["verdict"] == "starting"
    assert (await sidecar.get("/livez"))[0] == 200, "liveness must not kill an engine that loads"
    async with sidecar.chat() as refused:
        assert refused.status == 502
        assert (await refused.json())["error"]["code"] == "engine_unreachable"
    async with ScriptedEngine(EngineSettings(listen=("127.0.0.1", port))):
        await sidecar.until_verdict("idle")
        assert (await sidecar.get("/startupz"))[0] == 200
    assert any("not reachable yet" in line for line in sidecar.log)


async def test_a_relay_that_dies_is_restarted_and_what_it_held_is_lost(engine: ScriptedEngine, start: Any) -> None:
    """kill -9 of a relay: its streams settle as lost, a new one serves, and no probe fails the engine."""
    sidecar = await start(engine.url)
    snapshot = await sidecar.until_verdict("idle")
    pid = snapshot["relays"][0]["pid"]
    async with sidecar.chat(tokens=100_000, **{"x-tenant-id": "acme"}) as stream:
        await stream.content.readany()
        await sidecar.until(lambda s: s["load"]["requests_in_flight"] == 1)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(aiohttp.ClientError):
            while await stream.content.readany():
                pass
            raise aiohttp.ClientPayloadError("ended")
    snapshot = await sidecar.until(
        lambda s: s["relays"][0]["restarts"] == 1 and s["relays"][0]["pulse_age"] is not None
    )
    assert snapshot["load"]["requests_in_flight"] == 0
    async with sidecar.chat() as again:
        assert again.status == 200
        await again.read()
    await sidecar.until_metrics('sidecar_requests_total{model="scripted",outcome="lost",tenant="acme"} 1.0')
    states = {v["verdict"] for v in (await sidecar.get("/verdicts"))[1]["verdicts"]}
    assert not {"stalled", "dead"} & states


async def test_a_stopped_sidecar_does_not_blame_the_engine(engine: ScriptedEngine, start: Any) -> None:
    """SIGSTOP of the control process for longer than the allowed silence: unknown for a while, never stalled."""
    sidecar = await start(engine.url)
    await sidecar.until_verdict("idle")
    async with sidecar.chat(tokens=100_000) as stream:
        await stream.content.readany()
        await sidecar.until_verdict("progressing")
        control = await sidecar.control()
        os.kill(control, signal.SIGSTOP)
        await asyncio.sleep(3)  # the time itself is what is tested: longer than the floor
        os.kill(control, signal.SIGCONT)
        await sidecar.until_changed("unknown")
        await sidecar.until_verdict("progressing")
    states = {v["verdict"] for v in (await sidecar.get("/verdicts"))[1]["verdicts"]}
    assert "unknown" in states and not {"suspect", "stalled", "dead"} & states


@pytest.mark.slow
async def test_a_dead_engine_is_dead_and_its_successor_starts(start: Any) -> None:
    """The port closes for good: /livez fails; a new engine on the port is a new start."""
    settings = EngineSettings(listen=("127.0.0.1", free_port()))
    async with ScriptedEngine(settings) as engine:
        sidecar = await start(engine.url)
        await sidecar.until_verdict("idle")
        engine.faults.start("refuse")
        await sidecar.until_verdict("dead")
        assert (await sidecar.get("/livez"))[0] == 503
    async with ScriptedEngine(settings):
        await sidecar.until_verdict("idle")
        states = [v["verdict"] for v in (await sidecar.get("/verdicts"))[1]["verdicts"]]
        assert states[:3] == ["idle", "starting", "dead"]


async def test_a_sleeping_engine_is_exempt(engine: ScriptedEngine, start: Any) -> None:
    """Asleep on purpose: unready, alive."""
    sidecar = await start(engine.url)
    await sidecar.until_verdict("idle")
    engine.faults.start("sleep")
    await sidecar.until_verdict("exempt")
    assert (await sidecar.get("/livez"))[0] == 200
    assert (await sidecar.get("/readyz"))[0] == 503
    engine.faults.clear()
    await sidecar.until_verdict("idle")
