"""Calibration: the fit, its accuracy, and the whole command against a real scripted engine."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from sidecar.__main__ import run
from sidecar.errors import UsageError
from sidecar.events import RequestSize
from sidecar.load import cost_model
from sidecar.load.cost_model import Coefficients
from sidecar.tools.calibrate import capabilities, capacity_search, command, contention, fit, report, traffic
from sidecar.tools.calibrate.checkpoint import Checkpoint, CheckpointEntry, GridPlan, SearchStep
from sidecar.tools.calibrate.command import CalibrateSettings, calibrate
from sidecar.tools.calibrate.fit import Measured
from sidecar.tools.calibrate.prompts import PromptTarget
from sidecar.tools.calibrate.shapes import (
    MIN_LENGTH_TOKENS,
    PHOTO_SIDES_PX,
    GridShape,
    min_length,
    plan_shapes,
    reference_shape,
    shuffle_turn,
)
from sidecar.tools.calibrate.traffic import EngineRefused
from sidecar.tools.scripted_engine.server import EngineSettings, ScriptedEngine

from ..engines.engine_faces import OnDemand

TRUE = Coefficients(k=5.0, a=0.2, b=2e-5, d=3.0, f=4e-4)
TOKENS = {side: (side // 28) ** 2 * 3 // 4 for side in PHOTO_SIDES_PX}


def measured(shapes: list[GridShape], noise: float = 0.0, seed: int = 1) -> list[Measured]:
    rng = random.Random(seed)
    works = [work(s) for s in shapes]
    return [Measured(w, cost_model.gpu_ms(w, TRUE) * (1 + rng.uniform(-noise, noise))) for w in works]


def work(s: GridShape) -> RequestSize:
    each = TOKENS.get(s.side, 0)
    return RequestSize(
        s.uncached + s.images * each, s.cached, s.output, s.images * each, s.images, image_squares=s.images * each**2
    )


def split(noise: float = 0.0) -> tuple[list[Measured], list[Measured]]:
    shapes = plan_shapes(8192, cached=True)
    return measured([s for s in shapes if not s.held_out], noise), measured([s for s in shapes if s.held_out], noise, 2)


def test_known_coefficients_are_found_again() -> None:
    """From costs without noise, held-out shapes are predicted within 1 %, and far better than by a line."""
    fitted, held_out = split()
    co = fit.fit(fitted)
    assert fit.accuracy(held_out, co).mape < 0.01
    assert fit.line_accuracy(held_out, fit.fit_line(fitted)).mape > 5 * fit.accuracy(held_out, co).mape
    assert fit.variation([*fitted, *held_out], co) < 0.05


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), noise=st.floats(0, 0.3))
def test_noise_gives_no_negative_and_no_wild_coefficient(seed: int, noise: float) -> None:
    """With any noise, coefficients are finite and at least 0, with errors of about its size."""
    shapes = plan_shapes(4096, cached=False)
    fitted = measured([s for s in shapes if not s.held_out], noise, seed)
    co = fit.fit(fitted)
    assert all(0 <= getattr(co, name) < 1e6 for name in cost_model.TERMS)
    assert fit.accuracy(fitted, co).mape < 0.02 + noise


def test_a_term_that_no_shape_shows_keeps_the_priors_share() -> None:
    """Without images their price is the prior's, scaled to this machine, not 0."""
    fitted, _ = split()
    co = fit.fit(fitted)
    scale = fit._scale(fitted, Coefficients())
    assert co.g == pytest.approx(Coefficients().g * scale) and co.h == pytest.approx(Coefficients().h * scale)


def test_too_few_measurements_are_said() -> None:
    """Three costs cannot determine seven coefficients."""
    with pytest.raises(ValueError, match="at least four"):
        fit.fit(split()[0][:3])


def test_a_term_that_is_many_times_the_priors_is_found() -> None:
    """A prior from another machine pulls within bounds: attention of a hundred times its share is predicted."""
    steep = Coefficients(k=5.0, a=0.03, b=4e-5, d=0.4, f=1.5e-4)
    shapes = [s for s in plan_shapes(8192, cached=True) if not s.held_out]
    works = [RequestSize(s.uncached, s.cached, s.output) for s in shapes]
    co = fit.fit([Measured(w, cost_model.gpu_ms(w, steep)) for w in works])
    assert co.b == pytest.approx(steep.b, rel=0.1)


def test_a_sliding_window_is_the_priors() -> None:
    """With the window from config.json, the same coefficients explain the costs of a model with sliding windows."""
    true = replace(TRUE, window=1024.0, windowed=0.75)
    works = [m.work for m in measured([s for s in plan_shapes(8192, cached=True) if not s.held_out])]
    costs = [Measured(w, cost_model.gpu_ms(w, true)) for w in works]
    co = fit.fit(costs, Coefficients(window=1024.0, windowed=0.75))
    assert (co.window, co.windowed) == (1024.0, 0.75) and co.f == pytest.approx(true.f, rel=0.1)
    assert fit.accuracy(costs, co).mape < 0.01


TOWER = Coefficients(k=3.0, a=0.013, b=4e-5, d=0.8, f=2e-4, g=0.06, h=3.0, q=2e-4)  # about vLLM's with the tiny model


@pytest.mark.parametrize("length", [2048, 8192])
def test_prices_of_images_are_found(length: int) -> None:
    """Photos of three sizes separate the costs of encoder tokens, their square, and prompt tokens."""
    shapes = plan_shapes(length, cached=True, tokens=TOKENS)
    co = fit.fit([Measured(work(s), cost_model.gpu_ms(work(s), TOWER)) for s in shapes if not s.held_out])
    assert (co.g, co.q) == pytest.approx((TOWER.g, TOWER.q), rel=0.15)
    assert {s.side for s in shapes if s.held_out} == {0, *PHOTO_SIDES_PX}


@pytest.mark.parametrize("q", [0.0, TOWER.q])
def test_images_are_predicted_whether_or_not_their_cost_grows_with_the_square(q: float) -> None:
    """Despite noise, held-out photos are within 10 %; with attention, coefficients linear in tokens are far off."""
    true, rng = replace(TOWER, q=q), random.Random(5)
    shapes = plan_shapes(2048, cached=True, tokens=TOKENS)
    rows = [(s, Measured(work(s), cost_model.gpu_ms(work(s), true) * rng.lognormvariate(0, 0.05))) for s in shapes]
    photos, fitted = [m for s, m in rows if s.held_out and s.images], [m for s, m in rows if not s.held_out]
    flat = fit.fit([replace(m, work=structs.replace(m.work, image_squares=0)) for m in fitted])
    ours, linear = (fit.accuracy(photos, co).mape for co in (fit.fit(fitted), replace(flat, q=0.0)))
    assert ours < 0.1 and (linear > 2 * ours) is (q > 0)


def test_what_others_took_is_left_out() -> None:
    """The lower quartile of a shape's turns counts: one disturbed turn of five changes nothing."""
    shape = GridShape(8, 0, 1)
    (row,) = fit.merge_turns((shape, Measured(RequestSize(8, output=1), ms)) for ms in (10.0, 10.0, 10.0, 10.0, 90.0))
    assert row.ms == 10 and row.spread == 0


@pytest.mark.parametrize("length", [MIN_LENGTH_TOKENS, 512, 4096, 16_384])
@pytest.mark.parametrize("cached", [True, False])
def test_a_plan_fits_the_length(length: int, cached: bool) -> None:
    """Every request fits; shapes differ; some are held out; each turn is another order of the same."""
    shapes = plan_shapes(length, cached=cached, tokens=TOKENS)
    assert all(s.uncached + s.cached + s.images * TOKENS.get(s.side, 0) + s.output <= length for s in shapes)
    assert any(s.held_out for s in shapes) and sum(not s.held_out for s in shapes) >= 8
    assert any(s.cached for s in shapes) is cached and len(set(shapes)) == len(shapes)
    assert sorted(map(repr, shapes)) == sorted(map(repr, shuffle_turn(shapes, 1))) and shuffle_turn(
        shapes, 1
    ) != shuffle_turn(shapes, 2)
    assert reference_shape(length).uncached + reference_shape(length).output <= length


def test_a_short_plan_has_photos() -> None:
    """Even with little time, photos of each size are fitted and some held out, unless the context is too short."""
    shapes = plan_shapes(min_length(8192, TOKENS), cached=True, tokens=TOKENS)
    assert {s.side for s in shapes if s.images and not s.held_out} == set(PHOTO_SIDES_PX)
    assert any(s.held_out and s.images for s in shapes)
    assert min_length(300, TOKENS) == 300 and min_length(8192, {}) == MIN_LENGTH_TOKENS


def test_one_image_at_most_is_kept_to() -> None:
    """An engine that accepts one image per request gets no second one."""
    assert {s.images for s in plan_shapes(4096, cached=True, tokens=TOKENS, max_images=1)} == {0, 1}


def test_open_requests_at_the_slo() -> None:
    """Interpolated between the steps below and above the SLO; none if it was never exceeded."""
    steps = tuple(SearchStep(n, p95, 1.0, RequestSize(8, output=1)) for n, p95 in ((1, 1.0), (2, 2.0), (4, 6.0)))
    assert capacity_search.find_concurrency_at_slo(steps, 4.0) == 3
    assert (
        capacity_search.find_concurrency_at_slo(steps, 7.0) == 0
        and capacity_search.find_concurrency_at_slo(steps, 0.5) == 0
    )


def test_the_engine_is_full_where_more_requests_gain_little() -> None:
    """The fewest open requests that reach nine tenths of the highest rate."""
    rates = ((1, 1.0), (2, 1.9), (4, 3.0), (8, 3.2), (16, 3.1))
    assert (
        capacity_search.find_full_concurrency(
            tuple(SearchStep(n, 1.0, rate, RequestSize(8, output=1)) for n, rate in rates)
        )
        == 4
    )


def test_a_context_that_is_too_short_is_refused() -> None:
    """Too short a context is rejected."""
    with pytest.raises(UsageError, match="256"):
        min_length(MIN_LENGTH_TOKENS - 1, {})


def test_a_journal_goes_on_and_belongs_to_one_engine(tmp_path: Path) -> None:
    """Measurements are read back, a truncated line is ignored, another identity starts again."""
    out, shape, planned = (
        tmp_path / "co.json",
        GridShape(8, 0, 1),
        GridPlan(
            512,
            2,
            (SearchStep(1, 0.5, 2.0, RequestSize(8, output=1)),),
            (SearchStep(2, 0.5, 2.0, RequestSize(8, output=1)),),
            "time",
        ),
    )
    entry = CheckpointEntry(RequestSize(8, output=1), 2.5, shape, 0, 1.5)
    later = replace(entry, turn=1, mix=((0.75, RequestSize(8, output=1)), (0.25, RequestSize(4, 4, 1))))
    journal = Checkpoint(out, {"model": "a"})
    assert (journal.plan, journal.done) == (None, {})
    journal.begin(planned)
    journal.add(entry)
    with (tmp_path / "co.json.partial").open("a") as file:
        file.write('{"shape": {"uncached": 8}')
    again = Checkpoint(out, {"model": "a"})
    assert (again.plan, again.done) == (planned, {(shape, 0): entry})
    again.add(later)
    again = Checkpoint(out, {"model": "a"})
    assert (again.plan, again.done) == (planned, {(shape, 0): entry, (shape, 1): later})
    other = Checkpoint(out, {"model": "b"})
    assert (other.plan, other.done) == (None, {})
    journal.close()
    assert not list(tmp_path.iterdir())


def quick(**more: Any) -> EngineSettings:
    return EngineSettings(listen=("127.0.0.1", 0), prefill_tokens_per_second=50_000, decode_step_ms=2.0, **more)


@pytest.mark.slow
async def test_a_scripted_engine_is_calibrated(tmp_path: Path) -> None:
    """A generated token costs at least the engine's step; `sidecar run` reads the file; the report has the errors.

    Two requests do not fill an engine of 64, so no capacity is named.
    """
    out = tmp_path / "co.json"
    async with ScriptedEngine(quick(image_ms=50.0)) as running:
        chosen = CalibrateSettings(
            engine=running.url, out=str(out), seconds=6, concurrency=2, context=2048, slo_seconds=2
        )
        found, journal = await calibrate(chosen, out)
    assert 0 in {turn for _, turn in journal.done}
    co = found.co
    assert co.d > 0.4 * 2.0 / 2, "two requests share a step of 2 ms; a busy machine makes it longer, never shorter"
    assert (
        cost_model.from_json(cost_model.to_json(co)) == co
        and co.source.startswith("calibrated")
        and co.model == "scripted"
    )
    assert co.no_capacity and co.source.endswith(", not full") and co.batch == 2 and co.engine.endswith("scripted")
    assert any(row.shape.images for row in found.fitted) or found.plan.length < 1024
    text = report.text(found, 2)
    assert (
        "held out: MAPE" in text
        and "alpha-beta line" in text
        and "a generated token: 1 open" in text
        and "\nno capacity: " in text
    )


@pytest.mark.slow
async def test_killed_in_between_it_goes_on(tmp_path: Path) -> None:
    """After SIGKILL in the middle of the grid the same command measures only what is missing, and writes the file."""
    out, partial = tmp_path / "co.json", tmp_path / "co.json.partial"
    async with ScriptedEngine(quick()) as running:
        command = [
            sys.executable,
            "-m",
            "sidecar",
            "calibrate",
            "--engine",
            running.url,
            "--out",
            str(out),
            "--seconds",
            "5",
            "--concurrency",
            "2",
            "--context",
            "512",
        ]
        process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
        assert process.stderr is not None
        shown = 0
        while shown < 5:
            line = await process.stderr.readline()
            assert line, "it ended before it was killed"
            shown += b"turn 1:" in line
        process.kill()
        await process.wait()
        before = partial.read_text().splitlines()
        again = await asyncio.create_subprocess_exec(
            *command,
            "--measurements",
            str(tmp_path / "all.jsonl"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        said, errors = await again.communicate()
    assert again.returncode == 0 and b"held out: MAPE" in said
    kept = (tmp_path / "all.jsonl").read_text().splitlines()
    assert kept[: len(before)] == before and len(before) >= 2 + 4
    measured = sum('"turn":0' in line for line in kept)
    assert errors.count(b"turn 1:") == measured - (len(before) - 2)
    assert cost_model.from_json(out.read_text()).model == "scripted" and not partial.exists()


async def test_an_engine_that_serves_others_is_not_measured(tmp_path: Path, monkeypatch: Any) -> None:
    """Requests of other clients are reported and waited for, and end the calibration if they stay."""
    monkeypatch.setattr(command, "IDLE_TIMEOUT_S", 0.5)
    monkeypatch.setattr(command, "IDLE_CHECK_INTERVAL_S", 0.1)
    async with ScriptedEngine(quick()) as running, aiohttp.ClientSession() as session:
        body = {"model": "scripted", "prompt": "x", "max_tokens": 100_000, "stream": True}
        async with session.post(f"{running.url}/v1/completions", json=body) as answer:
            await answer.content.readline()
            chosen = CalibrateSettings(engine=running.url, out=str(tmp_path / "co.json"), seconds=5, context=512)
            with pytest.raises(EngineRefused, match="1 requests of other clients"):
                await calibrate(chosen, tmp_path / "co.json")


async def test_a_run_tells_of_others_that_come_meanwhile(monkeypatch: Any) -> None:
    """A sample reports the requests of other clients."""
    monkeypatch.setattr(traffic, "LOAD_CHECK_INTERVAL_S", 0.01)

    async def load() -> float:
        return 5.0

    async with ScriptedEngine(quick()) as running, aiohttp.ClientSession() as session:
        target = PromptTarget(session, running.url, "scripted", ids=False)
        sample = await traffic.CalibrationTraffic(target, load=load).run(GridShape(16, 0, 8), 2, 0.2)
    assert sample.others == 3


def test_the_wait_of_the_busiest_thread_counts() -> None:
    """Only the busiest thread counts, not idle or new ones; without threads the wait is 0."""
    before, after = {"a": (1.0, 0.0), "b": (5.0, 5.0)}, {"a": (4.0, 1.0), "b": (5.1, 9.0), "new": (9.0, 9.0)}
    assert contention.share(before, after, 4.0) == 0.25
    assert contention.share({}, {}, 4.0) == 0.0


def test_what_the_engine_waited_is_not_charged() -> None:
    """Half of the time without a core is half of the latency."""
    sample = traffic.LatencySample(2, [2.0, 2.0], Counter({RequestSize(8, output=1): 2}), waited=0.5)
    assert sample.cost().ms == 500 and sample.p95() == 1.0


def test_waiting_for_a_core_is_seen() -> None:
    """Of two processes that share one core, each waits about half of the time."""
    burn = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); os.write(1, b'.')\nwhile True: pass"
    processes = [subprocess.Popen([sys.executable, "-c", burn], stdout=subprocess.PIPE, bufsize=0) for _ in range(2)]
    try:
        for process in processes:
            assert process.stdout is not None and process.stdout.read(1)
        cores = contention.Cores([processes[0].pid])
        time.sleep(0.2)
        cores.mark()
        time.sleep(1.0)
        assert 0.2 < cores.waited() <= contention.MAX_WAITED_SHARE
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_mu_in_flight_is_the_measured_one_at_its_slo() -> None:
    """At another SLO, Little's law is used."""
    co = Coefficients(mu_in_flight=7.0, slo_seconds=10.0)
    assert cost_model.max_mu_in_flight(co, 10.0) == 7.0
    assert cost_model.max_mu_in_flight(co, 5.0) == cost_model.max_mu_in_flight(Coefficients(), 5.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1.0, "mape": 0.1}', replace(Coefficients(), a=1.0, q=0.0, mape=0.1, source="file")),
        ('{"version": 2, "a": 1.0, "q": 3.0}', replace(Coefficients(), a=1.0, q=3.0, source="file")),
        (
            '{"version": 3, "a": 1.0, "median_ape": 0.04, "no_capacity": "x", "no_cached": "y"}',
            replace(Coefficients(), a=1.0, median_ape=0.04, no_capacity="x", no_cached="y", source="file"),
        ),
    ],
)
def test_files_of_all_versions_are_read(text: str, expected: Coefficients) -> None:
    """What a version does not have yet keeps its default; q was not measured before version 2."""
    assert cost_model.from_json(text) == expected
    assert cost_model.from_json(cost_model.to_json(expected)) == expected
    with pytest.raises(UsageError, match="unknown version 4"):
        cost_model.from_json('{"version": 4}')


def test_the_median_is_stated_with_mean_and_tail() -> None:
    """Of errors of 2, 4, 6, 8 and 100 % the mean is 24 %, the median 6 %, the 90th percentile 100 %."""
    co = Coefficients(k=0.0, a=1.0, b=0.0, d=0.0, f=0.0)
    rows = [Measured(RequestSize(100), 100 / (1 + error)) for error in (0.02, 0.04, 0.06, 0.08, 1.0)]
    found = fit.accuracy(rows, co)
    assert (found.mape, found.median, found.p90) == pytest.approx((0.24, 0.06, 1.0))
    assert str(found).startswith("MAPE 24.0%, median 6.0%, P90 100.0%, R2 ")


def test_a_report_without_a_capacity_does_not_name_one() -> None:
    """The word appears only after "no", with the reason and what to do; the flow is not named."""
    size = RequestSize(3500, output=300)
    steps = tuple(SearchStep(n, 1.0, float(n), size) for n in (1, 2, 4))
    plan = GridPlan(512, 4, steps, ended="time")
    rows = [fit.FitRow(RequestSize(u, output=8), 10.0 + u, GridShape(u, 0, 8, u > 40), 0.0) for u in (8, 16, 32, 64)]
    why = capacity_search.explain_no_capacity(plan, 60)
    for co, capacity in ((replace(TRUE, no_capacity=why), False), (TRUE, True)):
        text = report.text(report.CalibrationReport(rows[:3], rows[3:], co, plan, 0.0), 10)
        assert ("no capacity: the rate still rose by 100%" in text) is not capacity
        assert ("capacity with 4 open: " in text) is capacity and text.count("capacity") == 1
        assert ("by Little's law" in text) is capacity


def test_no_engine_and_no_folder_are_said(tmp_path: Path, capsys: Any) -> None:
    """Each error is one line that says what to do."""
    assert run(["calibrate"]) == 2
    assert run(["calibrate", "--engine", "http://127.0.0.1:9", "--out", str(tmp_path / "no" / "co.json")]) == 2
    assert run(["calibrate", "--engine", "http://127.0.0.1:9", "--out", str(tmp_path / "co.json")]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert "--engine" in errors[0] and "--out" in errors[1] and "does not answer" in errors[2]


async def test_of_several_models_one_that_is_loaded_is_measured() -> None:
    """A server that loads on demand is not made to load another one."""
    server = OnDemand("a", "b", says=True, loaded="b")
    async with server.shown() as shown, aiohttp.ClientSession() as session:
        assert (await capabilities.text_target(PromptTarget(session, shown.url))).model == "b"
    assert server.loads == []
