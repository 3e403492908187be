"""Coefficients of a simulated engine, found like in `sidecar calibrate`: its shapes, fit, and search at the SLO.

The engine is measured from outside, with a fixed number of requests open; the fit never sees its formulas.
"""

from __future__ import annotations

import random
import statistics
from dataclasses import replace
from functools import lru_cache

from replay.engine import Engine, Hardware, Sequence
from replay.requests import BLOCK, Request
from sidecar.events import RequestSize
from sidecar.load import cost_model
from sidecar.tools.calibrate import capacity_search, fit
from sidecar.tools.calibrate.checkpoint import SearchStep
from sidecar.tools.calibrate.fit import Measured
from sidecar.tools.calibrate.shapes import MAX_LENGTH_TOKENS, GridShape, plan_shapes, reference_shape

# As --slo-seconds.
SLO_S = 10.0
ROUNDS = 6
MAX_OPEN = 256


@lru_cache
def calibrated(hardware: Hardware) -> tuple[cost_model.Coefficients, fit.Accuracy]:
    """The coefficients, and their errors on the shapes that were held out."""
    steps = _search(hardware)
    open_ = capacity_search.find_full_concurrency(steps)
    measured = [
        (shape.held_out, _measured(hardware, shape, open_)) for shape in plan_shapes(MAX_LENGTH_TOKENS, cached=True)
    ]
    co = fit.fit([m for held_out, m in measured if not held_out])
    held = capacity_search.find_concurrency_at_slo(steps, SLO_S) * cost_model.mu(steps[0].work, co)
    co = replace(co, source="simulated", slo_seconds=SLO_S, mu_in_flight=held)
    return co, fit.accuracy([m for held_out, m in measured if held_out], co)


def _measured(hardware: Hardware, shape: GridShape, open_: int) -> Measured:
    latencies, cached = closed_loop(hardware, shape, open_)
    work = RequestSize(shape.uncached + shape.cached - cached, cached, shape.output)
    return Measured(work, statistics.mean(latencies) * 1000 / open_)


def _search(hardware: Hardware) -> tuple[SearchStep, ...]:
    """Open more and more requests of the reference shape until their p95 exceeds the SLO."""
    shape, steps, count = reference_shape(MAX_LENGTH_TOKENS), [], 1
    while count <= MAX_OPEN and (not steps or steps[-1].p95 <= SLO_S):
        latencies, _ = closed_loop(hardware, shape, count)
        rate = count / statistics.mean(latencies)
        steps.append(
            SearchStep(
                count, statistics.quantiles(latencies, n=20)[-1], rate, RequestSize(shape.uncached, output=shape.output)
            )
        )
        count *= 2
    return tuple(steps)


def closed_loop(hardware: Hardware, shape: GridShape, open_: int) -> tuple[list[float], int]:
    """Latencies of one shape with `open_` requests open at all times, and the cached tokens of the last."""
    engine = Engine(hardware, random.Random(f"{shape}:{open_}"))
    latencies: list[float] = []
    started, now, cached = 0, 0.0, 0

    def start() -> None:
        nonlocal started
        started += 1
        blocks = tuple(range(shape.cached // BLOCK))
        engine.arrive(
            Sequence(str(started), Request(now, shape.uncached + shape.cached, shape.output, 0, blocks), now), now
        )

    for _ in range(open_):
        start()
    while len(latencies) < (ROUNDS + 1) * open_:
        now = engine.next_at
        for s in engine.step(now)[1]:
            latencies.append(now - s.arrived)
            cached = s.cached
            start()
    return latencies[open_:], cached
