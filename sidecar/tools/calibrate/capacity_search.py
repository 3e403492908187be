"""The search before the grid: how many requests fill the engine, the capacity at the SLO, the longest shape.

Open more and more requests of the reference shape: their rate grows until the engine is full, and their p95 with it.
The search ends when two doublings in a row gained less than a tenth, or at a bound; if the last one still gained more
by then, the capacity is unknown.
Shapes are measured on a full engine: a request costs the time that others lose. Their length is limited by time.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sidecar.tools.calibrate.checkpoint import GridPlan, SearchEnd, SearchStep
from sidecar.tools.calibrate.report import show_progress
from sidecar.tools.calibrate.shapes import GENERATING, LARGEST, MAX_LENGTH_TOKENS, GridShape, reference_shape, shape_of
from sidecar.tools.calibrate.traffic import FULL_STATUSES, CalibrationTraffic, EngineRefused

MAX_OPEN_REQUESTS: Final = 1024
# With fewer, the engine rests between an answer and the next request.
MIN_OPEN_REQUESTS: Final = 4
# A step that gains less than this share is flat. The engine is full after two flat steps, as one may be chance; where
# there can be no further step, one is enough.
MIN_GAIN: Final = 0.1
FLAT_STEPS: Final = 2
# Share of the highest rate at which the engine counts as full.
FULL_RATE_SHARE: Final = 0.9
# Latencies that the next step may take: two rounds, of requests that take up to twice as long.
NEXT_STEP_LATENCIES: Final = 4
# Approximate length of a search up to 32 requests, in latencies of a single one.
SEARCH_LATENCIES: Final = 40
# Share of the reference shape, if time is short.
MIN_SCALE: Final = 1 / 16
# The whole grid in costs of its largest shape, measured on an engine with steep attention.
GRID_COST: Final = 6.0
# Turns of the grid that must fit into the time.
MIN_TURNS: Final = 4
# Share of the grid's time for the steps of generating requests.
DECODE_SHARE: Final = 0.1


@dataclass(frozen=True, slots=True)
class SearchTime:
    """Seconds for the search, its maximum until the engine is full, and seconds for the grid."""

    search: float
    longest: float
    grid: float


async def make_plan(
    traffic: CalibrationTraffic, span: tuple[int, int], slo: float, seconds: SearchTime, concurrency: int
) -> GridPlan:
    """Search, then find the length. `span`: shortest and longest allowed length.

    `concurrency` 0: as many requests as fill the engine. Raises EngineRefused.
    """
    began = time.monotonic()
    shape = await _fit_reference(traffic, span[1], seconds.search)
    steps, ended = await _fill(traffic, shape, slo, seconds, began)
    at_once = concurrency or _open_at_all_times(steps, ended)
    length = await _find_length(traffic, span, at_once, seconds.grid)
    decode = await _steps_up_to(traffic, shape_of(length, *GENERATING), at_once, DECODE_SHARE * seconds.grid)
    return GridPlan(length, at_once, steps, decode, ended)


def _open_at_all_times(steps: tuple[SearchStep, ...], ended: SearchEnd) -> int:
    """Open requests for the shapes: as many as fill the engine, a few in any case, and none that it refuses."""
    fill = max(MIN_OPEN_REQUESTS, find_full_concurrency(steps))
    return min(fill, steps[-1].open) if ended == "refused" else fill


async def _fit_reference(traffic: CalibrationTraffic, context: int, seconds: float) -> GridShape:
    """The reference shape, scaled down until there is time for some steps."""
    shape, scale = reference_shape(context), 1.0
    while SEARCH_LATENCIES * await traffic.burst(shape, 1) > seconds and scale > MIN_SCALE:
        scale /= 2
        shape = reference_shape(context, scale)
    return shape


async def _fill(
    traffic: CalibrationTraffic, shape: GridShape, slo: float, seconds: SearchTime, began: float
) -> tuple[tuple[SearchStep, ...], SearchEnd]:
    """Steps of 1, 2, 4, ... open requests, and why there is no further one."""
    steps: list[SearchStep] = []
    while (ended := search_end(steps, slo, time.monotonic() - began, seconds)) is None:
        try:
            steps.append(await _step(traffic, shape, 2 ** len(steps), seconds.search / 12))
        except EngineRefused as e:
            if not steps or e.status not in FULL_STATUSES:
                raise
            return tuple(steps), "full" if is_full(steps, flat=1) else "refused"
    return tuple(steps), ended


def search_end(steps: Sequence[SearchStep], slo: float, elapsed: float, seconds: SearchTime) -> SearchEnd | None:
    """Why the search ends after these steps; None if there is another one.

    Until the engine is full, for `seconds.longest`; then up to the SLO, for `seconds.search`.
    """
    if not steps:
        return None
    full = is_full(steps)
    after_next = elapsed + NEXT_STEP_LATENCIES * steps[-1].p95
    if full:
        return "full" if steps[-1].p95 > slo or after_next > seconds.search or _is_last(steps) else None
    if not _is_last(steps) and after_next <= seconds.longest:
        return None
    if is_full(steps, flat=1):
        return "full"
    return "limit" if _is_last(steps) else "time"


def _is_last(steps: Sequence[SearchStep]) -> bool:
    return 2 * steps[-1].open > MAX_OPEN_REQUESTS


async def _steps_up_to(
    traffic: CalibrationTraffic, shape: GridShape, limit: int, seconds: float
) -> tuple[SearchStep, ...]:
    """Steps of 1, 2, 4, ... open requests up to `limit`, as far as they fit into `seconds`."""
    steps: list[SearchStep] = []
    until = time.monotonic() + seconds
    while 2 ** len(steps) <= limit and (not steps or time.monotonic() + NEXT_STEP_LATENCIES * steps[-1].p95 <= until):
        steps.append(await _step(traffic, shape, 2 ** len(steps), 0.0))
    return tuple(steps)


async def _step(traffic: CalibrationTraffic, shape: GridShape, count: int, seconds: float) -> SearchStep:
    """`count` open requests for `seconds` or more. Raises EngineRefused."""
    show_progress(f"{count} of {shape.name} open at all times")
    sample = await traffic.run(shape, count, seconds)
    if sample.others:
        clients = f"{sample.others} requests of other clients"
        raise EngineRefused(f"the engine also served {clients}; remove it from traffic and start again")
    cost = sample.cost()
    return SearchStep(count, round(sample.p95(), 4), round(1000 / cost.ms, 4), cost.work)


def is_full(steps: Sequence[SearchStep], flat: int = FLAT_STEPS) -> bool:
    """Whether the last `flat` steps gained so little over those before that more open requests yield no more."""
    before, last = steps[:-flat], steps[-flat:]
    if not before:
        return False
    return max(step.rate for step in last) <= (1 + MIN_GAIN) * max(step.rate for step in before)


def find_full_concurrency(steps: tuple[SearchStep, ...]) -> int:
    """The smallest number of open requests that nearly fills the engine."""
    highest = max(one.rate for one in steps)
    return min(one.open for one in steps if one.rate >= FULL_RATE_SHARE * highest)


def explain_no_capacity(plan: GridPlan, seconds: float) -> str:
    """Why the capacity is not known and what to do about it; "" if shapes were measured on a full engine."""
    last = plan.steps[-1]
    if plan.ended == "full":
        if plan.concurrency >= (full := find_full_concurrency(plan.steps)):
            return ""
        few = f"only {plan.concurrency} requests were open (--concurrency) and {full} fill the engine"
        return f"{few}; omit --concurrency"
    before = max((step.rate for step in plan.steps[:-1]), default=last.rate)
    if len(plan.steps) > 1 and last.rate > before:
        gained = f"the rate still rose by {last.rate / before - 1:.0%} with the last step, to {last.open} open requests"
    else:
        gained = f"{last.open} open requests are too few to see where the rate stops rising"
    return f"{gained}; {_REMEDIES[plan.ended].format(seconds=math.ceil(4 * seconds / 60) * 60)}"


_REMEDIES: Final[dict[SearchEnd, str]] = {
    "full": "",
    "time": "the search ran out of time: set --seconds {seconds} or more",
    "limit": "this is the maximum; neither the engine nor the network limits the rate",
    "refused": "the engine refuses more: raise its request limit and calibrate again",
}


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
        # Three rounds for each shape: until all are open, those that count, and until the last has ended.
        if 3 * GRID_COST * await traffic.burst(largest, concurrency) * MIN_TURNS > seconds:
            break
        longest = tried
    return longest
