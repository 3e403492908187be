"""A disk that cannot be written, and folders that a kill left: the sidecar serves on and ends well."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import psutil
import pytest

from sidecar.launch.process_tree import SOCKETS_PREFIX
from sidecar.tools.scripted_engine.server import ScriptedEngine

from ..waiting import PATIENCE


@pytest.mark.slow
async def test_a_state_directory_that_fails_costs_a_line_a_minute(engine: ScriptedEngine, start: Any) -> None:
    """Every write fails for many seconds: one line of each kind, probes answer, and the end is clean."""
    sidecar = await start(engine.url)
    await sidecar.until_verdict("idle")
    sidecar.state.rename(sidecar.state.with_suffix(".gone"))
    sidecar.state.write_text("in the way")  # also for root, whom no permission stops
    for _ in range(4):
        async with sidecar.chat(tokens=3) as answer:
            assert answer.status == 200
            await answer.read()
        at = (await sidecar.until(lambda s: s["load"]["requests_in_flight"] == 0))["at"]
        await sidecar.until(lambda s, at=at: s["at"] > at + 1.5)
    engine.faults.start("freeze")
    await sidecar.until_verdict("stalled")
    assert (await sidecar.get("/livez"))[0] == 503
    assert await sidecar.stop() == 0
    text = "".join(sidecar.log)
    assert text.count("cannot write to the state directory") == 1
    assert text.count("the usage is kept in memory") == 1


def socket_folders(parent: Path) -> set[Path]:
    return set(parent.glob(f"{SOCKETS_PREFIX}*"))


async def test_what_a_killed_sidecar_left_is_removed_by_the_next(
    engine: ScriptedEngine, start: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """kill -9 of the supervisor: its folder of sockets is gone after the next start, that of a living one stays."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    killed = await start(engine.url)
    [left] = socket_folders(tmp_path)
    living = await start(engine.url)
    children = psutil.Process(killed.process.pid).children(recursive=True)
    killed.process.kill()
    await killed.process.wait()
    await asyncio.to_thread(psutil.wait_procs, children, PATIENCE)
    await start(engine.url)
    assert left not in socket_folders(tmp_path) and len(socket_folders(tmp_path)) == 2
    assert (await living.get("/healthz"))[0] == 200
