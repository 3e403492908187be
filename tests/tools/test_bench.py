"""Useful work: arrivals, sums, and whole runs against a real scripted engine."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from sidecar.__main__ import run
from sidecar.tools.bench import report
from sidecar.tools.bench.arrivals import PROFILES, arrival_times
from sidecar.tools.bench.command import BenchSettings, bench
from sidecar.tools.bench.tally import OUTCOMES, BenchRecord, BenchRow, sum_up
from sidecar.tools.scripted_engine.server import EngineSettings, ScriptedEngine

from ..waiting import PATIENCE

ENGINE = EngineSettings(listen=("127.0.0.1", 0), decode_step_ms=10.0)
CHOSEN = BenchSettings(
    seconds=2, input_tokens=64, output_tokens=8, max_open=16, timeout=30, slo_seconds=1.2, dollars_per_gpu_hour=2.0
)


def test_arrivals_are_as_many_steady_as_in_bursts() -> None:
    """Equal seeds give equal times; a burst's requests arrive within a tenth of its time, none after the end."""
    steady, burst = (list(arrival_times(p, 50.0, 40.0, seed=3)) for p in (PROFILES[0], PROFILES[2]))
    assert steady == list(arrival_times(PROFILES[0], 50.0, 40.0, seed=3)) and steady != list(
        arrival_times(PROFILES[0], 50.0, 40.0, 4)
    )
    for times_ in (steady, burst):
        assert times_ == sorted(times_) and len(times_) == pytest.approx(2000, rel=0.1) and times_[-1] < 40
    assert all(at % 10 < 1 for at in burst) and {int(at // 10) for at in burst} == {0, 1, 2, 3}


def test_sums_count_each_request_once() -> None:
    """Quantiles, tokens and cost are of completed requests; over 1 % of others misses the SLO."""
    good = [BenchRecord("completed", 1.0 + n / 100, 0.1, 10) for n in range(100)]
    bad = [BenchRecord("dropped", 0.0), BenchRecord("stalled", 60.0, 0.2, 5)]
    found = sum_up("x", 1.0, 3600.0, [*good, *bad], slo=2.0, price=3.0)
    assert sum(getattr(found, ended) for ended in OUTCOMES) == found.requests == 102
    assert (found.p50, found.p95, found.p99) == (1.49, 1.94, 1.98) and found.tokens == 1000
    assert found.dollars_per_1k_completed == pytest.approx(30) and found.dollars_per_1m_tokens == pytest.approx(3000)
    assert not found.slo_kept and sum_up("x", 1.0, 1.0, [*good, bad[0]], 2.0, 0.0).slo_kept
    assert not sum_up("x", 1.0, 1.0, good, 1.5, 0.0).slo_kept


def test_nothing_completed_is_no_number() -> None:
    """Without requests there is no latency and no price, not 0."""
    found = sum_up("x", 1.0, 1.0, [BenchRecord("dropped", 0.0)], slo=2.0, price=3.0)
    assert found.p95 is None and found.dollars_per_1k_completed is None and not found.slo_kept
    assert report.cells(found)[8] == "-" and "0 ok, p95 - s" in report.plot([found], "t")


@pytest.mark.slow
async def test_the_shape_of_the_reference_matrix() -> None:
    """One at a time completes only a part, too late; batched completes all steady requests in time."""
    rows: list[BenchRow] = []
    async with ScriptedEngine(replace(ENGINE, decode_step_ms=40.0)) as engine:
        await bench(replace(CHOSEN, engine=engine.url, max_open=24, timeout=2.5), rows)
    by = {r.profile: r for r in rows}
    assert all(sum(getattr(r, e) for e in OUTCOMES) == r.requests and r.whole and not r.failed for r in rows)
    naive, batched = by["steady-naive"], by["steady-batched"]
    assert naive.completed < naive.requests / 2 and not naive.slo_kept
    assert batched.completed == batched.requests and batched.tokens == 8 * batched.completed
    assert by["burst-batched"].completed > 1.3 * by["burst-naive"].completed and not by["burst-naive"].slo_kept
    for _send, other in (("steady-naive", "steady-batched"), ("burst-naive", "burst-batched")):
        assert (by[_send].dollars_per_1k_completed or 0) > 1.3 * (by[other].dollars_per_1k_completed or 0)
    picture = ElementTree.fromstring(report.plot(rows, "a < b"))
    assert len(report.table(rows).splitlines()) == 5 and picture.tag.endswith("svg")


async def test_what_the_engine_refuses_is_dropped_and_what_hangs_is_stalled() -> None:
    """503 of a full engine and a timeout of a silent one are counted separately."""
    chosen = replace(CHOSEN, seconds=1, rate=40, profiles="steady-batched", timeout=0.6)
    full: list[BenchRow] = []
    silent: list[BenchRow] = []
    async with ScriptedEngine(replace(ENGINE, max_batch=1, max_waiting=1)) as engine:
        await bench(replace(chosen, engine=engine.url, timeout=PATIENCE), full)
    async with ScriptedEngine(ENGINE) as engine:

        async def freeze() -> None:
            await engine.until(lambda: engine.open > 3)  # more than there are before the run
            engine.faults.start("freeze")

        await asyncio.gather(bench(replace(chosen, engine=engine.url), silent), freeze())
    assert full[0].dropped and full[0].completed and not full[0].slo_kept
    assert silent[0].stalled and not silent[0].slo_kept


@pytest.mark.slow
async def test_a_run_that_is_ended_reports_what_there_was() -> None:
    """Open requests count as cancelled; the engine has none of them left."""
    rows: list[BenchRow] = []
    async with ScriptedEngine(replace(ENGINE, decode_step_ms=200.0)) as engine:
        chosen = replace(CHOSEN, engine=engine.url, seconds=60, rate=20, profiles="steady-batched")
        task = asyncio.create_task(bench(chosen, rows))
        await engine.until(lambda: engine.open > 5)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await engine.until(lambda: not engine.open)
    assert rows[0].cancelled > 5 and not rows[0].whole and report.cells(rows[0])[13] == "ended early"


def test_what_is_missing_is_said(tmp_path: Path, capsys: Any) -> None:
    """Each error is one line that says what to do."""
    assert run(["bench"]) == 2
    assert run(["bench", "--engine", "http://127.0.0.1:9", "--plot", str(tmp_path / "no" / "x.svg")]) == 2
    assert run(["bench", "--engine", "http://127.0.0.1:9", "--profiles", "naive"]) == 2
    assert run(["bench", "--engine", "http://127.0.0.1:9"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert (
        "--engine" in errors[0] and "--plot" in errors[1] and "steady-naive" in errors[2] and "not answer" in errors[3]
    )
