"""Kills stop if they do not help, and a restart of the sidecar loses nothing that matters."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from sidecar.tools.scripted_engine.server import EngineSettings, ScriptedEngine

from ..ports import free_port
from ..waiting import PATIENCE

pytestmark = pytest.mark.slow


async def serving(stack: AsyncExitStack, port: int) -> ScriptedEngine:
    settings = EngineSettings(listen=("127.0.0.1", port), decode_step_ms=5.0)
    return await stack.enter_async_context(ScriptedEngine(settings))


async def test_two_restarts_that_do_not_help_hand_the_engine_over(start: Any) -> None:
    """Stalled a third time: unready, not killed at once; verdict, files, metric and log say what to do."""
    port = free_port()
    async with AsyncExitStack() as first:
        engine = await serving(first, port)
        sidecar = await start(engine.url)
        await sidecar.until_verdict("idle")
        engine.faults.start("freeze")
        await sidecar.until_verdict("stalled")
        assert (await sidecar.get("/livez"))[0] == 503
    async with AsyncExitStack() as second:
        await sidecar.until_verdict("starting")
        engine = await serving(second, port)
        await sidecar.until_verdict("idle")
        engine.faults.start("freeze")
        snapshot = await sidecar.until_verdict("stalled")
        assert (await sidecar.get("/livez"))[0] == 503 and snapshot["kills"] == 2
    async with AsyncExitStack() as third:
        await sidecar.until_verdict("starting")
        engine = await serving(third, port)
        await sidecar.until_verdict("idle")
        engine.faults.start("freeze")
        snapshot = await sidecar.until_verdict("stalled")
        assert (snapshot["kills"], snapshot["handover"]) == (2, "restart_useless")
        status, body = await sidecar.get("/livez")
        assert (status, body["reason"], body["evidence"]["held"]) == (200, "restart_useless", "restart_useless")
        assert (await sidecar.get("/readyz"))[0] == 503
        await sidecar.until_file("stalled", there=False)
        changes = (await sidecar.get("/verdicts"))[1]["verdicts"]
        assert changes[0]["reason"] == "restart_useless" and changes[0]["evidence"]["cause"]
        kills = dict(snapshot["kills_by_reason"])
        assert sum(kills.values()) == 2 and "other" not in kills
        counted = (f'sidecar_kills_total{{reason="{reason}"}} {count}.0' for reason, count in kills.items())
        await sidecar.until_metrics('sidecar_handover{reason="restart_useless"} 1.0', *counted)
        assert [
            line for line in sidecar.log if "escalated to an operator (restart_useless)" in line and "resume" in line
        ]
        (sidecar.state / "resume").touch()
        await sidecar.until(lambda s: s["kills"] == 3 and not s["handover"])
        assert (await sidecar.get("/livez"))[0] == 503


async def test_a_restarted_sidecar_knows_what_it_had_learned(
    engine: ScriptedEngine, start: Any, tmp_path: Path
) -> None:
    """kill -9 of the sidecar of a working engine: start-up stays done, and the engine's gaps stay known."""
    sidecar = await start(engine.url, state="kept")
    await sidecar.until_verdict("idle")
    for _ in range(20):
        async with sidecar.chat(tokens=2) as answer:
            await answer.read()
    await sidecar.until(lambda s: s["verdict"]["evidence"]["learned"])
    await sidecar.until_remembered(lambda kept: kept["learned"]["first_tokens"] >= 20)
    sidecar.process.kill()
    await sidecar.process.wait()
    again = await start(engine.url, state="kept")
    assert (await again.get("/startupz"))[0] == 200
    snapshot = await again.until_verdict("idle")
    assert snapshot["verdict"]["evidence"]["learned"]
    assert any("the engine process is the same" in line for line in again.log)
    states = [v["verdict"] for v in (await again.get("/verdicts"))[1]["verdicts"]]
    assert set(states) <= {"idle", "unknown", "progressing"}, states


async def test_a_control_process_that_dies_is_followed_by_one_that_knows(engine: ScriptedEngine, start: Any) -> None:
    """kill -9 of the control process alone during a stream: its successor never reports the engine as starting."""
    sidecar = await start(engine.url)
    await sidecar.until_verdict("idle")
    await sidecar.until_remembered(lambda kept: kept["served"])
    pid = (await sidecar.get("/healthz"))[1]["pid"]
    async with sidecar.chat(tokens=100_000) as stream:
        await stream.content.readany()
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(PATIENCE):
            while True:
                with contextlib.suppress(aiohttp.ClientError):
                    if (await sidecar.get("/healthz"))[1]["pid"] != pid:
                        break
                await asyncio.sleep(0.05)
        assert (await sidecar.get("/startupz"))[0] == 200
        await sidecar.until_verdict("progressing")
    states = {v["verdict"] for v in (await sidecar.get("/verdicts"))[1]["verdicts"]}
    assert states <= {"unknown", "idle", "quiet", "progressing"}, states


async def test_a_stall_outlives_the_sidecar_only_once_it_is_found_anew(engine: ScriptedEngine, start: Any) -> None:
    """kill -9 of the sidecar of a hung engine: alive and unready at first, stalled after a new canary."""
    sidecar = await start(engine.url, state="kept")
    await sidecar.until_verdict("idle")
    engine.faults.start("freeze")
    await sidecar.until_verdict("stalled")
    await sidecar.until_remembered(lambda kept: kept["stalled"] and sum(n for _, n in kept["fleet"]["kills"]) == 1)
    sidecar.process.kill()
    await sidecar.process.wait()
    again = await start(engine.url, state="kept")
    status, body = await again.get("/livez")
    assert status == 200 and body["verdict"] == "unknown" and body["reason"] == "sidecar_restarted"
    assert (await again.get("/readyz"))[0] == 503
    snapshot = await again.until_verdict("stalled")
    assert snapshot["kills"] == 1, "the order of before still stands"
    async with asyncio.timeout(PATIENCE):
        while (await again.get("/livez"))[0] != 503:  # noqa: ASYNC110  a probe has no event
            await asyncio.sleep(0.1)
