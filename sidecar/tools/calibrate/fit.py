"""Pure: measured costs -> coefficients, with their accuracy on held-out shapes.

Non-negative least squares on relative errors, pulled slightly toward a prior whose overall scale is fitted first: a
term that the shapes hardly show keeps the prior's share instead of a wild value. The pull acts on ratios and is
bounded, so measurements can move a term any number of times away from the prior. Solved by coordinate descent over a
few unknowns.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from msgspec import structs

from sidecar.events import RequestSize
from sidecar.load import cost_model
from sidecar.load.cost_model import TERMS, Coefficients
from sidecar.tools.calibrate.shapes import GridShape

# Members of a size in which the requests of one shape may differ.
AVERAGED: Final = ("uncached", "cached", "output", "image_tokens", "image_squares")
# Share of a prefix above which it was cached: engines cache whole blocks.
MIN_CACHED_SHARE: Final = 0.5
# Weight of the prior.
RIDGE_PER_MEASUREMENT: Final = 0.0003
MAX_ROUNDS: Final = 4000
# Iterations in which the pull is weighted by the previous solution.
REWEIGHTINGS: Final = 20
TOLERANCE: Final = 1e-12

Vector = Sequence[float]


Mix = tuple[tuple[float, RequestSize], ...]  # shares, of sum 1, and the size of the requests that each stands for


@dataclass(frozen=True, slots=True)
class Measured:
    """The mean cost of requests of this size: milliseconds of a fully loaded engine.

    If the engine had different parts of their prompts cached, `mix` holds each size, and `work` is the most common.
    """

    work: RequestSize
    ms: float
    mix: Mix = field(default=(), kw_only=True)

    @property
    def sizes(self) -> Mix:
        """Each size with its share."""
        return self.mix or ((1.0, self.work),)

    @property
    def cached(self) -> float:
        """Prompt tokens that came from the engine's cache, on average."""
        return sum(share * size.cached for share, size in self.sizes)


@dataclass(frozen=True, slots=True)
class FitRow(Measured):
    """A shape over all turns: its cost, and the interquartile range of the turns as a share of the cost."""

    shape: GridShape
    spread: float


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Errors of a model over shapes, as shares of the measured cost: mean, median, 90th percentile.

    BLIS states the median, over experiments of which each counts by its mean. `r2` is on the logarithms.
    """

    mape: float
    median: float
    p90: float
    r2: float

    def __str__(self) -> str:
        return f"MAPE {self.mape:.1%}, median {self.median:.1%}, P90 {self.p90:.1%}, R2 {self.r2:.3f}"


def mix_of(works: Mapping[RequestSize, int]) -> Mix:
    """The sizes of requests, averaged over those with a like part of the prompt cached; the most common first."""
    groups: dict[int, Counter[RequestSize]] = {}
    for work, count in works.items():
        groups.setdefault(_cached_quarters(work), Counter())[work] += count
    total = sum(works.values())
    mix = [(group.total() / total, _mean(group)) for group in groups.values()]
    return tuple(sorted(mix, key=lambda row: row[0], reverse=True))


def _cached_quarters(work: RequestSize) -> int:
    return round(4 * work.cached / max(1, work.uncached + work.cached))


def _mean(works: Mapping[RequestSize, int]) -> RequestSize:
    count = sum(works.values())
    sums = {name: sum(getattr(work, name) * n for work, n in works.items()) for name in AVERAGED}
    return structs.replace(next(iter(works)), **{name: round(value / count) for name, value in sums.items()})


def was_cached(shape: GridShape, measured: Measured) -> bool:
    """Whether the prefix of the shape was cached, as far as whole blocks can be; True of shapes without one."""
    return measured.cached >= MIN_CACHED_SHARE * shape.cached


def merge_turns(turns: Iterable[tuple[GridShape, Measured]]) -> list[FitRow]:
    """The lower quartile of each shape's turns, because other work on the machine only ever adds to a cost.

    Turns between which the engine's cache was emptied are rows of their own.
    """
    shapes: dict[tuple[GridShape, bool], list[Measured]] = {}
    for shape, measured in turns:
        shapes.setdefault((shape, was_cached(shape, measured)), []).append(measured)
    rows = []
    for (shape, _), several in shapes.items():
        costs = [m.ms for m in several]
        low, _, high = statistics.quantiles(costs, n=4, method="inclusive") if len(costs) > 1 else costs * 3
        rows.append(FitRow(several[0].work, low, shape, (high - low) / low, mix=several[0].mix))
    return rows


def features(measured: Measured, co: Coefficients) -> Vector:
    """The factors of the terms, averaged over the sizes: a cost is linear in them, not in tokens."""
    rows = [[share * value for value in cost_model.features(size, co)] for share, size in measured.sizes]
    return [sum(column) for column in zip(*rows, strict=True)]


def predicted_ms(measured: Measured, co: Coefficients) -> float:
    """The cost according to the coefficients."""
    return sum(share * cost_model.gpu_ms(size, co) for share, size in measured.sizes)


def fit(measured: Sequence[Measured], prior: Coefficients | None = None) -> Coefficients:
    """The best coefficients for the measurements. Raises ValueError for fewer than four."""
    if len(measured) < 4:
        raise ValueError("too few measurements to fit: at least four shapes are needed")
    prior = prior or Coefficients()
    rows, scale = [features(m, prior) for m in measured], _scale(measured, prior)
    start = [getattr(prior, name) * scale for name in TERMS]
    solved = solve(rows, [m.ms for m in measured], start, RIDGE_PER_MEASUREMENT * len(measured))
    return replace(prior, **dict(zip(TERMS, solved, strict=True)))  # type: ignore[arg-type]


def _scale(measured: Sequence[Measured], prior: Coefficients) -> float:
    return math.exp(statistics.median(math.log(m.ms / predicted_ms(m, prior)) for m in measured))


def solve(rows: Sequence[Vector], costs: Vector, prior: Vector, ridge: float) -> list[float]:
    """argmin over x >= 0 of sum(((row . x - cost) / cost)^2) + ridge * sum(((x - prior) / max(x, prior))^2)."""
    count = range(len(prior))
    relative = [[value / cost for value in r] for r, cost in zip(rows, costs, strict=True)]
    gram = [[sum(r[i] * r[j] for r in relative) for j in count] for i in count]
    target = [sum(r[i] for r in relative) for i in count]
    x = _descend(gram, target, prior, [0.0] * len(prior), prior)  # near a prior that is far off, the pull is steep
    for _ in range(REWEIGHTINGS if ridge else 0):
        pull = [ridge / max(x[i], prior[i]) ** 2 if prior[i] > 0 else 0.0 for i in count]
        x = _descend(gram, target, prior, pull, x)
    return x


def _descend(gram: Sequence[Vector], target: Vector, prior: Vector, pull: Vector, start: Vector) -> list[float]:
    """Coordinate descent on the quadratic form, with coordinates >= 0."""
    x, count = list(start), range(len(start))
    for _ in range(MAX_ROUNDS):
        moved = 0.0
        for i in count:
            weight = gram[i][i] + pull[i]
            if weight <= 0:
                continue
            rest = sum(gram[i][j] * x[j] for j in count if j != i)
            new = max(0.0, (target[i] + pull[i] * prior[i] - rest) / weight)
            moved += weight * (new - x[i]) ** 2
            x[i] = new
        if moved < TOLERANCE:
            break
    return x


def fit_line(measured: Sequence[Measured]) -> list[float]:
    """The usual alpha-beta line on the same measurements: [per request, per input token, per output token]."""
    rows = [[1.0, m.work.uncached + m.work.cached, m.work.output] for m in measured]
    return solve(rows, [m.ms for m in measured], [1.0, 1.0, 1.0], 0.0)


def accuracy(measured: Sequence[Measured], co: Coefficients) -> Accuracy:
    """Errors of the coefficients on these measurements."""
    return _accuracy([(m.ms, predicted_ms(m, co)) for m in measured])


def line_accuracy(measured: Sequence[Measured], fitted: Sequence[float]) -> Accuracy:
    """Errors of the alpha-beta line."""
    per, i, o = fitted
    return _accuracy([(m.ms, per + i * (m.work.uncached + m.work.cached) + o * m.work.output) for m in measured])


def variation(measured: Sequence[Measured], co: Coefficients) -> float:
    """Coefficient of variation over the shapes of the capacity in MU per minute. 0: equal for all shapes."""
    per_minute = [predicted_ms(m, co) / cost_model.unit_ms(co) * 60_000 / m.ms for m in measured]
    return statistics.pstdev(per_minute) / statistics.mean(per_minute)


def _accuracy(pairs: Sequence[tuple[float, float]]) -> Accuracy:
    errors = sorted(abs(predicted - ms) / ms for ms, predicted in pairs)
    logs = [math.log(ms) for ms, _ in pairs]
    spread = len(logs) * statistics.pvariance(logs)
    left = sum((math.log(max(predicted, 1e-9)) - x) ** 2 for x, (_, predicted) in zip(logs, pairs, strict=True))
    p90 = errors[math.ceil(0.9 * len(errors)) - 1]
    return Accuracy(statistics.mean(errors), statistics.median(errors), p90, 1 - left / spread if spread else 0.0)
