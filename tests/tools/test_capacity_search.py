"""The capacity search: it continues until the engine is full, or there is no capacity, with the reason."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.events import RequestSize
from sidecar.tools.calibrate.capabilities import text_target
from sidecar.tools.calibrate.capacity_search import (
    SearchTime,
    explain_no_capacity,
    find_full_concurrency,
    is_full,
    make_plan,
    search_end,
)
from sidecar.tools.calibrate.checkpoint import GridPlan, SearchEnd, SearchStep
from sidecar.tools.calibrate.prompts import PromptTarget
from sidecar.tools.calibrate.traffic import CalibrationTraffic
from sidecar.tools.scripted_engine.server import EngineSettings, ScriptedEngine

SIZE = RequestSize(100, output=10)
AMPLE = SearchTime(1e6, 1e6, 1e6)


def search(rate: Callable[[int], float], seconds: SearchTime, slo: float = 0.0) -> GridPlan:
    """A search at an engine that answers `rate(n)` requests a second while n are open; each step is two rounds."""
    steps: list[SearchStep] = []
    elapsed, ended = 0.0, None
    while (ended := search_end(steps, slo, elapsed, seconds)) is None:
        n = 2 ** len(steps)
        steps.append(SearchStep(n, n / rate(n), rate(n), SIZE))
        elapsed += 2 * n / rate(n)
    return GridPlan(512, find_full_concurrency(tuple(steps)), tuple(steps), ended=ended)


@settings(max_examples=200)
@given(slots=st.integers(1, 256), overlap=st.floats(0.5, 1.0), noise=st.floats(0, 0.02), seed=st.integers(0, 999))
def test_it_goes_on_until_the_engine_is_full(slots: int, overlap: float, noise: float, seed: int) -> None:
    """Whatever the number of slots, and how much they gain from each other: at least 85 % of the highest rate."""
    rng = random.Random(seed)

    def true(n: int) -> float:
        return min(n, slots) ** overlap

    plan = search(lambda n: true(n) * (1 + rng.uniform(-noise, noise)), AMPLE)
    assert plan.ended == "full" and explain_no_capacity(plan, 60) == ""
    assert true(plan.concurrency) >= 0.85 * true(slots)


def test_a_search_that_ran_out_of_time_gives_no_capacity() -> None:
    """The field's example: the rate still doubles with each step. The reason states by how much, and what to do."""
    plan = search(lambda n: n / 0.5, SearchTime(2.0, 5.0, 5.0))
    assert (plan.ended, plan.steps[-1].open) == ("time", 8)
    why = explain_no_capacity(plan, 10)
    assert "rose by 100% with the last step, to 8 open requests" in why and "--seconds 60 or more" in why


def test_one_flat_step_is_not_enough() -> None:
    """One doubling that gained nothing may be chance: the next decides."""
    rates = {1: 1.0, 2: 1.9, 4: 1.9, 8: 7.0, 16: 13.0, 32: 13.2, 64: 13.1}
    plan = search(rates.__getitem__, AMPLE)
    assert (plan.ended, plan.concurrency, plan.steps[-1].open) == ("full", 16, 64)
    assert not is_full(plan.steps[:3])


def test_one_flat_step_is_enough_where_there_is_no_other() -> None:
    """At the end of the time the last step decides: 2 % more is full, 20 % more is not."""
    for last, ended in ((1.02, "full"), (1.2, "time")):
        rates = {1: 10.0, 2: 19.0, 4: 19.0 * last}
        assert search(rates.__getitem__, SearchTime(0.3, 0.9, 5.0)).ended == ended


def test_slow_growth_is_growth() -> None:
    """Steps of 8 % each are 17 % over two: not yet full."""
    steps = [SearchStep(2**i, 1.0, 1.08**i, SIZE) for i in range(3)]
    assert not is_full(steps) and is_full([replace(steps[0], rate=1.07), *steps[1:]])


def test_a_rate_that_never_ends_to_rise_gives_no_capacity() -> None:
    """At 1024 open requests the search ends."""
    plan = search(lambda n: float(n), AMPLE)
    assert (plan.ended, plan.steps[-1].open) == ("limit", 1024) and "1024 open" in explain_no_capacity(plan, 60)


def test_beyond_full_it_goes_on_up_to_the_slo() -> None:
    """The capacity in flight lies where p95 passes the SLO, and is sought only in the search's share of the time."""
    assert search(lambda n: 2.0, AMPLE, slo=10.0).steps[-1].open == 32
    assert search(lambda n: 2.0, SearchTime(20.0, 1e6, 1e6), slo=10.0).steps[-1].open == 8


@pytest.mark.parametrize(("concurrency", "refuses"), [(4, True), (8, False)])
def test_too_few_open_requests_give_no_capacity(concurrency: int, refuses: bool) -> None:
    """With --concurrency below what fills the engine, its costs are not those of a full one."""
    plan = replace(search(lambda n: min(n, 8.0), AMPLE), concurrency=concurrency)
    why = explain_no_capacity(plan, 60)
    assert ("only 4 requests were open (--concurrency) and 8 fill the engine" in why) is refuses
    assert bool(why) is refuses


def quick(**more: object) -> EngineSettings:
    return EngineSettings(("127.0.0.1", 0), prefill_tokens_per_second=100_000, decode_step_ms=10.0, **more)  # type: ignore[arg-type]


# What bounds the engine, its settings, how the search ends, and how many open requests fill it: twice its slots where
# a slot would rest between an answer and the next request.
ENGINES: list[tuple[str, EngineSettings, SearchEnd, tuple[int, int]]] = [
    ("one slot", quick(max_batch=1), "full", (1, 2)),
    ("few slots and a queue", quick(max_batch=4), "full", (4, 8)),
    ("many slots", quick(max_batch=32), "full", (16, 64)),
    ("KV cache", quick(max_batch=64, kv_tokens=2048), "full", (8, 32)),
    ("slots, and refuses to queue", quick(max_batch=4, max_waiting=16, full_status=429), "full", (4, 8)),
    ("refuses before it is full", quick(max_batch=64, max_waiting=4), "refused", (4, 4)),
]


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("chosen", "ended", "full"), [row[1:] for row in ENGINES], ids=[row[0] for row in ENGINES])
async def test_engines_are_filled(chosen: EngineSettings, ended: SearchEnd, full: tuple[int, int]) -> None:
    """Each kind of bound is found; no rate is above what the engine's step and batch allow."""
    async with ScriptedEngine(chosen) as running, aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as s:
        traffic = CalibrationTraffic(await text_target(PromptTarget(s, running.url)))
        plan = await make_plan(traffic, (256, 2048), 0.0, SearchTime(3.0, 60.0, 1.0), 0)
    assert plan.ended == ended and bool(explain_no_capacity(plan, 60)) is (ended != "full")
    least, most = full
    assert least <= find_full_concurrency(plan.steps) <= most
    steps = plan.steps[0].work.output  # the first token comes with the prefill, in a step of its own or another's
    for step in plan.steps:
        most_rate = min(step.open, chosen.max_batch) / (steps * chosen.decode_step_ms / 1000)
        assert step.rate <= 1.05 * most_rate, "a busy machine makes it slower, never faster"
