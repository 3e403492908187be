"""The search before the grid: how many requests to keep open, the capacity at the SLO, the longest shape.

Open more and more requests of the reference shape: their p95 grows, and their rate until the engine is full. Shapes are
measured on a full engine, where a request costs what it takes from others. The length is limited by the time.
"""

from __future__ import annotations

import itertools
import math
import time
from typing import Final

from sidecar.tools.calibrate.checkpoint import GridPlan, SearchStep
from sidecar.tools.calibrate.report import show_progress
from sidecar.tools.calibrate.shapes import GENERATING, LARGEST, MAX_LENGTH_TOKENS, GridShape, reference_shape, shape_of
from sidecar.tools.calibrate.traffic import CalibrationTraffic, EngineRefused

MAX_OPEN_REQUESTS: Final = 1024
# Share of the highest rate at which the engine counts as full.
FULL_RATE_SHARE: Final = 0.9
# Latencies that the next step may take: two rounds, of requests that take up to twice as long.
NEXT_STEP_LATENCIES: Final = 4
# Approximate length of the whole search, in latencies of a single request.
SEARCH_LATENCIES: Final = 20
# Share of the reference shape, if time is short.
MIN_SCALE: Final = 1 / 16
# The whole grid in costs of its largest shape, measured on an engine with steep attention.
GRID_COST: Final = 6.0
# Turns of the grid that must fit into the time.
MIN_TURNS: Final = 4


async def make_plan(
    traffic: CalibrationTraffic, span: tuple[int, int], slo: float, seconds: tuple[float, float], concurrency: int
) -> GridPlan:
    """Search, then find the length. `span`: shortest and longest allowed length; `seconds`: for search and for grid.

    `concurrency` 0: as many requests as fill the engine. Raises EngineRefused.
    """
    until = time.monotonic() + seconds[0]
    shape = await _fit_reference(traffic, span[1], seconds[0])
    steps = await _open_more(traffic, shape, MAX_OPEN_REQUESTS, seconds[0] / 12, slo, until)
    at_once = concurrency or find_full_concurrency(steps)
    length = await _find_length(traffic, span, at_once, seconds[1])
    decode = await _open_more(traffic, shape_of(length, *GENERATING), at_once, 0.0, math.inf, math.inf)
    return GridPlan(length, at_once, steps, decode)


async def _fit_reference(traffic: CalibrationTraffic, context: int, seconds: float) -> GridShape:
    """The reference shape, scaled down until there is time for some steps."""
    shape, scale = reference_shape(context), 1.0
    while SEARCH_LATENCIES * await traffic.burst(shape, 1) > seconds and scale > MIN_SCALE:
        scale /= 2
        shape = reference_shape(context, scale)
    return shape


async def _open_more(
    traffic: CalibrationTraffic, shape: GridShape, limit: int, each: float, slo: float, until: float
) -> tuple[SearchStep, ...]:
    """Steps of 1, 2, 4, ... open requests up to `limit`, of `each` seconds or more.

    The last one is the first whose p95 exceeds the SLO, or after which there is no time for another.
    """
    steps: list[SearchStep] = []
    count = 1
    while count <= limit:
        show_progress(f"{count} of {shape.name} open at all times")
        sample = await traffic.run(shape, count, each)
        if sample.others:
            clients = f"{sample.others} requests of other clients"
            raise EngineRefused(f"the engine also served {clients}; take it out of traffic and start again")
        cost = sample.cost()
        steps.append(SearchStep(count, round(sample.p95(), 4), round(1000 / cost.ms, 4), cost.work))
        if sample.p95() > slo or time.monotonic() + NEXT_STEP_LATENCIES * sample.p95() > until:
            break
        count *= 2
    return tuple(steps)


def find_full_concurrency(steps: tuple[SearchStep, ...]) -> int:
    """The smallest number of open requests that nearly fills the engine."""
    highest = max(one.rate for one in steps)
    return min(one.open for one in steps if one.rate >= FULL_RATE_SHARE * highest)


def find_concurrency_at_slo(steps: tuple[SearchStep, ...], slo: float) -> float:
    """Open requests at which p95 reaches the SLO, interpolated; 0 if no step exceeded it, or the first one did."""
    for below, over in itertools.pairwise(steps):
        if below.p95 <= slo < over.p95:
            return below.open + (over.open - below.open) * (slo - below.p95) / (over.p95 - below.p95)
    return 0.0


async def _find_length(traffic: CalibrationTraffic, span: tuple[int, int], concurrency: int, seconds: float) -> int:
    """Tokens of the longest shapes within `span`: doubled while the turns of the grid fit into `seconds`."""
    longest, limit = span[0], min(span[1], MAX_LENGTH_TOKENS)
    while longest < limit:
        tried = min(2 * longest, limit)
        largest = shape_of(tried, *LARGEST)
        show_progress(f"{concurrency} of {largest.name} at once")
        # A turn keeps each shape's requests open for two rounds, of which the first does not count.
        if 2 * GRID_COST * await traffic.burst(largest, concurrency) * MIN_TURNS > seconds:
            break
        longest = tried
    return longest
