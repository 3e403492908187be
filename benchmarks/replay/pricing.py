"""Coefficients of a simulated engine, as `sidecar calibrate` would find them: its shapes, its fit, its search at the SLO.

The engine is measured from outside, with a fixed number of requests open; the fit never sees its formulas.
"""

from __future__ import annotations

import random
import statistics
from dataclasses import replace
from functools import lru_cache

from replay.engine import Engine, Hardware, Sequence
from replay.requests import BLOCK, Request
from sidecar import units
from sidecar.calibrate import fit
from sidecar.calibrate.fit import Measured
from sidecar.calibrate.shapes import MOST, Shape, plan, reference
from sidecar.facts import Work

OPEN = 8  # requests, as `sidecar calibrate --concurrency`
SLO = 10.0  # seconds, as --slo-seconds
ROUNDS = 6


@lru_cache
def calibrated(hardware: Hardware) -> tuple[units.Coefficients, fit.Accuracy]:
    """The coefficients, and their errors on the shapes that were held out."""
    measured = [(shape.held_out, _measured(hardware, shape)) for shape in plan(MOST, cached=True)]
    co = fit.fit([m for held_out, m in measured if not held_out])
    co = replace(co, source="simulated", slo_seconds=SLO, mu_in_flight=_at_slo(hardware, co))
    return co, fit.accuracy([m for held_out, m in measured if held_out], co)


def _measured(hardware: Hardware, shape: Shape) -> Measured:
    latencies, cached = closed_loop(hardware, shape, OPEN)
    work = Work(shape.uncached + shape.cached - cached, cached, shape.output)
    return Measured(work, statistics.mean(latencies) * 1000 / OPEN)


def _at_slo(hardware: Hardware, co: units.Coefficients) -> float:
    """MU in flight of the last doubling of open reference requests whose p95 is within the SLO."""
    shape, held, count = reference(MOST), 1, 1
    while count <= 256:
        latencies, _ = closed_loop(hardware, shape, count)
        if statistics.quantiles(latencies, n=20)[-1] > SLO:
            break
        held, count = count, count * 2
    return held * units.mu(Work(shape.uncached, output=shape.output), co)


def closed_loop(hardware: Hardware, shape: Shape, open_: int) -> tuple[list[float], int]:
    """Seconds of requests of one shape while `open_` of them are open at all times, and the cached tokens of the last."""
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
