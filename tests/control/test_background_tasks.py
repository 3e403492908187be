"""Background tasks of the control process: no failure is silent, and none can wedge the control loop."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, closing
from pathlib import Path

import aiohttp
import pytest

from sidecar.control import process
from sidecar.control.background_tasks import MAX_LOGGED_ERRORS, BackgroundTasks
from sidecar.control.loop import ControlLoop
from sidecar.control.state_dir import StateDir
from sidecar.engines.openai import OPENAI
from sidecar.events import Admitted, RequestSize, Settled, Usage
from sidecar.load import cost_model
from sidecar.report.usage_query import read
from sidecar.report.usage_store import USAGE_FILE
from sidecar.settings import Settings, load
from sidecar.signals.canary import CanarySignal

from ..waiting import PATIENCE


async def breaks(secret: str = "") -> None:
    raise TypeError(secret)


async def test_a_task_that_fails_is_reported_and_logged_without_its_message(caplog: pytest.LogCaptureFixture) -> None:
    """Its starter gets the error's type; the log names the place once, and never the text of the error."""
    tasks, broken = BackgroundTasks(), asyncio.Queue[str]()
    for _ in range(3):
        assert tasks.start("canary", breaks("a user's words"), broken.put_nowait)
        assert await broken.get() == "TypeError"
    (record,) = caplog.records
    assert (
        record.levelno == logging.ERROR and "canary" in record.message and "test_background_tasks.py:" in record.message
    )
    assert "words" not in caplog.text


async def test_a_task_that_others_cancel_is_reported() -> None:
    """A cancellation from elsewhere ends a task like an error does."""
    tasks, broken = BackgroundTasks(), asyncio.Queue[str]()

    async def cancelled() -> None:
        raise asyncio.CancelledError

    tasks.start("canary", cancelled(), broken.put_nowait)
    assert await broken.get() == "cancelled"


async def test_one_errand_of_a_name_at_a_time_and_none_after_the_end(caplog: pytest.LogCaptureFixture) -> None:
    """What is under way is not started again; closing ends it without a word, and nothing starts any more."""
    tasks, broken = BackgroundTasks(), list[str]()
    for expected in (True, False):
        assert tasks.start("state", asyncio.Event().wait(), broken.append) is expected  # type: ignore[arg-type]
    await tasks.close()
    assert not tasks.start("state", breaks()) and not tasks.start("other", breaks())
    assert not broken and not caplog.records


async def test_what_is_logged_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    """However many tasks break, the log gets a bounded number of lines."""
    tasks, broken = BackgroundTasks(), asyncio.Queue[str]()
    for i in range(MAX_LOGGED_ERRORS + 5):
        tasks.start(f"task {i}", breaks(), broken.put_nowait)
        await broken.get()
    assert len(caplog.records) == MAX_LOGGED_ERRORS


@pytest.fixture
async def ticker(tmp_path: Path) -> AsyncIterator[ControlLoop]:
    """A control process without relays, whose canary breaks on whatever it is asked."""
    chosen = load(Settings, {"engine": "http://127.0.0.1:9"}, {})
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        made = process.build(chosen, cost_model.Coefficients(), StateDir(str(tmp_path)), session, stack)

        async def impossible() -> bool:
            raise TypeError

        made.engine.canary = CanarySignal(session, chosen.engine, OPENAI, {}, model="model", asleep=impossible)
        yield made


async def test_a_canary_that_breaks_does_not_wedge_the_judge(ticker: ControlLoop) -> None:
    """It is booked as one that could not run, which judges nothing, and the next one is sent."""
    ticks = asyncio.create_task(ticker.run())
    async with asyncio.timeout(PATIENCE):
        ends = set[float]()
        while len(ends) < 2:  # the one after the broken one ended too
            await asyncio.sleep(0.05)
            if ticker.control.health.canaries.last is not None:
                ends.add(ticker.control.health.canaries.last.ended)
    result = ticker.control.health.canaries.last
    assert (
        result is not None and result.outcome == "rejected" and "could not run its canary (TypeError)" in result.detail
    )
    health = ticker.control.health
    assert health.canaries.since is None and health.verdict.state == "starting"
    assert time.monotonic() - ticker.ticked_at < 30
    ticks.cancel()
    await asyncio.gather(ticks, return_exceptions=True)
    await ticker.close()


async def test_usage_of_the_end_is_written_after_a_write_that_the_end_interrupts(
    ticker: ControlLoop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A write waits for the disk while ticks are cancelled again and again: its request and the next one are kept."""
    monkeypatch.setattr(process, "CANCEL_AGAIN_S", 0.01)

    def request(id: str) -> None:
        at = time.monotonic()
        ticker.on_event(0, Admitted(id, at, "t", "m", "chat", True, RequestSize(9), None, 1.0))
        ticker.on_event(0, Settled(id, at, "ok", 200, Usage(9, 1), 1, 1, at, at, 0.0))

    path = tmp_path / USAGE_FILE
    with closing(sqlite3.connect(path, isolation_level=None)) as disk:
        disk.execute("BEGIN EXCLUSIVE")
        request("1")
        ticks = asyncio.create_task(ticker.run())
        async with asyncio.timeout(PATIENCE):
            names = set[str]()
            while "records" not in names:
                await asyncio.sleep(0.05)
                names = {task.get_name() for task in asyncio.all_tasks()}
            request("2")
            asyncio.get_running_loop().call_later(20 * process.CANCEL_AGAIN_S, disk.rollback)
            await process._end([ticks])
            await ticker.close()
    assert sum(sums.requests for _, sums in read(path, 0, time.time() + 60, ())) == 2
