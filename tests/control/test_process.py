"""The end of the control process."""

from __future__ import annotations

import asyncio

import pytest

from sidecar.control import process


async def test_a_part_that_loses_a_cancellation_ends_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As asyncio.wait_for can before Python 3.12: the part is cancelled again, and the process does not hang."""
    monkeypatch.setattr(process, "CANCEL_AGAIN_S", 0.01)
    lost: list[str] = []

    async def deaf() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            lost.append("once")
        await asyncio.Event().wait()

    async def plain() -> None:
        await asyncio.Event().wait()

    tasks = [asyncio.create_task(deaf()), asyncio.create_task(plain())]
    await asyncio.sleep(0)
    async with asyncio.timeout(30):
        await process._end(tasks)
    assert lost == ["once"] and all(task.cancelled() for task in tasks)
