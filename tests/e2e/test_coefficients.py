"""Coefficients of a running sidecar: their origin, their prices, and whether they still match."""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sidecar.load import cost_model
from sidecar.load.cost_model import Coefficients
from sidecar.tools.scripted_engine.server import EngineSettings, ScriptedEngine

STALE = "\nsidecar_mu_coefficients_stale 1.0"
FRESH = "\nsidecar_mu_coefficients_stale 0.0"
TOGETHER = 8  # requests open at all times
STEP = 50.0  # milliseconds, large compared to what a busy machine adds to a sleep
CO = Coefficients(k=0.001, a=0.05, b=1e-9, d=STEP / TOGETHER, f=1e-9, batch=TOGETHER, source="calibrated")


def file_of(folder: Path, co: Coefficients) -> str:
    path = folder / "co.json"
    path.write_text(cost_model.to_json(co))
    return str(path)


async def test_coefficients_of_another_model_are_stale_at_once(
    engine: ScriptedEngine, start: Any, tmp_path: Path
) -> None:
    """The gauge, the reason and wider margins in /load, one line in the log; prices and the file can be asked for."""
    sidecar = await start(engine.url, coefficients=file_of(tmp_path, replace(CO, model="another", p90=0.2)))
    await sidecar.until_metrics(STALE)
    _, load = await sidecar.get("/load")
    assert load["coefficients"]["stale"] is True
    assert load["coefficients"]["stale_reason"] == "measured on model another, but the engine serves scripted"
    assert load["coefficients"]["margin"] == pytest.approx(0.4)
    assert load["coefficients"]["shadow"] is None
    status, cost = await sidecar.get("/cost?in=3500&out=300")
    assert (status, cost["mu"]) == (200, 1.0)
    assert (await sidecar.get("/cost?in=x"))[0] == 400
    status, load = await sidecar.get("/load?in=4000&cached=3000")
    assert status == 200
    assert load["predicted"]["of"] == {"in": 4000, "cached": 3000}
    assert (await sidecar.get("/load?in=10&cached=3000"))[0] == 400
    status, kept = await sidecar.get("/coefficients")
    assert cost_model.from_json(json.dumps(kept)).model == "another"
    assert (await sidecar.get("/coefficients/shadow"))[0] == 404
    assert sum("stale" in line for line in sidecar.log) == 1


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_an_engine_that_slows_down_makes_its_coefficients_stale(start: Any, tmp_path: Path) -> None:
    """Fresh while the engine keeps its measured speed; stale some windows after it becomes four times slower."""
    async with ScriptedEngine(EngineSettings(listen=("127.0.0.1", 0), decode_step_ms=STEP)) as engine:
        sidecar = await start(engine.url, coefficients=file_of(tmp_path, CO), silence_floor="12")
        await sidecar.until_verdict("idle")
        ended = asyncio.Event()

        async def user() -> None:
            while not ended.is_set():
                async with sidecar.chat(tokens=20) as answer:
                    await answer.read()

        async with asyncio.TaskGroup() as group:
            for _ in range(TOGETHER):
                group.create_task(user())
            await sidecar.until_remembered(lambda kept: kept["drift"]["seen"] >= 3, 180)  # windows of ten seconds
            assert FRESH in (await sidecar.get("/metrics"))[1]
            engine.faults.start("slow", factor=4)
            for _ in range(4):  # each waits for up to 45 s
                with contextlib.suppress(TimeoutError):
                    await sidecar.until_metrics(STALE)
                    break
            ended.set()
        _, load = await sidecar.get("/load")
        assert "slower" in load["coefficients"]["stale_reason"]
        assert load["verdict"] in ("idle", "progressing", "quiet")
