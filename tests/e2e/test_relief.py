"""Client relief through the whole sidecar: a verdict's command to two relay processes, and recovery."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from sidecar.tools.scripted_engine.server import ScriptedEngine


@pytest.mark.slow
async def test_requests_outlive_a_stall_where_that_is_asked_for(engine: ScriptedEngine, start: Any) -> None:
    """With --retry-stalled, requests without any response wait during the stall and succeed after it."""
    sidecar = await start(engine.url, workers="2", retry_stalled="120")
    await sidecar.until_verdict("idle")
    engine.faults.start("freeze")

    async def ask() -> tuple[int, bytes]:
        async with sidecar.chat(tokens=5) as answer:
            return answer.status, await answer.read()

    async with asyncio.TaskGroup() as group:
        asked = [group.create_task(ask()) for _ in range(6)]
        await sidecar.until_verdict("stalled")
        snapshot = await sidecar.until(
            lambda s: s["verdict"]["state"] == "stalled" and s["load"]["requests_waiting"] == 6
        )
        assert snapshot["load"]["requests_in_flight"] == 6
        engine.faults.clear()
    assert [task.result()[0] for task in asked] == [200] * 6
    assert all(task.result()[1].endswith(b"data: [DONE]\n\n") for task in asked)
    await sidecar.until_metrics('sidecar_requests_total{model="scripted",outcome="ok",tenant="default"} 6.0')
