"""Pure: the coefficients as the engine's own work shows them, beside those that are in use. They price nothing: they are told.

Recursive least squares on relative errors over windows of work, old ones forgotten, non-negative, pulled slightly toward the coefficients
in use, whose overall scale is followed first: a term that the traffic hardly shows keeps its share of them instead of a wild value.

Rules: decoding is fitted in two parts, per step and per token, because a small batch pays the same for the weights that it reads; told
is d at the batch that the coefficients in use hold for. One window has a bounded weight, and a bounded pull however odd it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Final

from sidecar.load import cost_model
from sidecar.load.cost_model import Coefficients
from sidecar.load.work_windows import STEP_INDEX, TOKEN_INDEX, WINDOW_TERMS, WorkWindow

FORGETTING_FACTOR: Final = 0.995  # per window: a window of half an hour ago (of work) weighs a third of a new one
RIDGE_WEIGHT: Final = 0.02  # weight of the coefficients in use, in windows
PRIOR_STEP_SHARE: Final = 0.8  # of d that is paid per step, before anything is known
MAX_LOG_ERROR: Final = 0.5  # of a log: errors beyond it pull with no more than it
MIN_REFIT_WINDOWS: Final = 20  # windows before it is told
MAX_COEFFICIENT_FACTOR: Final = 1e4  # times a coefficient in use
MIN_PIVOT_RATIO: Final = 1e-14  # of the largest pivot
MAX_REPORTED_ERROR: Final = 5.0
TERM_COUNT: Final = len(WINDOW_TERMS)


@dataclass(frozen=True, slots=True)
class RefitResult:
    """What was fitted: coefficients, over how many windows, and the mean log error of a window's prediction before it was learned."""

    co: Coefficients
    windows: int
    error: float


@dataclass(slots=True)
class Refit:
    """Learns from windows. `scale` is how many times the predicted time the engine takes."""

    co: Coefficients
    windows: int = 0
    log_scale: float = 0.0
    error: float = 0.0
    times: list[float] = field(default_factory=lambda: [1.0] * TERM_COUNT)  # of each prior
    _gram: list[list[float]] = field(default_factory=lambda: [[0.0] * TERM_COUNT for _ in range(TERM_COUNT)])
    _target: list[float] = field(default_factory=lambda: [0.0] * TERM_COUNT)

    def add(self, window: WorkWindow) -> None:
        """Learn one window."""
        whole = [x * p for x, p in zip(window.work, self._prior(), strict=True)]
        if not (window.ms > 0 and 1e-9 < sum(whole) / window.ms < 1e9):
            return
        predicted = sum(w * t for w, t in zip(whole, self.times, strict=True)) if self.windows else sum(whole)
        error = abs(math.log(window.ms / predicted)) if predicted > 0 else MAX_LOG_ERROR
        is_settled = self.windows >= MIN_REFIT_WINDOWS and predicted > 0
        weight = min(1.0, MAX_LOG_ERROR / error) if is_settled and error > MAX_LOG_ERROR else 1.0
        base = (
            predicted if is_settled else window.ms
        )  # relative to a measurement, what was measured too high would weigh too little
        self.windows += 1
        self.log_scale += (
            max(1 / self.windows, 1 - FORGETTING_FACTOR) * weight * (math.log(window.ms / sum(whole)) - self.log_scale)
        )
        self.error += max(1 / self.windows, 0.02) * (min(error, MAX_REPORTED_ERROR) - self.error)
        row, target = [w / base for w in whole], window.ms / base
        target = min(target, math.exp(MAX_LOG_ERROR) if is_settled else target)
        for i in range(TERM_COUNT):
            self._target[i] = FORGETTING_FACTOR * self._target[i] + weight * row[i] * target
            for j in range(TERM_COUNT):
                self._gram[i][j] = FORGETTING_FACTOR * self._gram[i][j] + weight * row[i] * row[j]
        self._solve()

    def shadow(self) -> RefitResult | None:
        """What was learned, once that is enough to tell."""
        if self.windows < MIN_REFIT_WINDOWS:
            return None
        values = dict(zip(WINDOW_TERMS, (p * t for p, t in zip(self._prior(), self.times, strict=True)), strict=True))
        d = values["d"] + values["step"] / self.co.batch
        fitted = {name: values[name] for name in cost_model.TERMS}
        co = replace(self.co, **{**fitted, "d": d}, fingerprint="", source="refit", mu_in_flight=0.0)  # type: ignore[arg-type]
        return RefitResult(co, self.windows, self.error)

    def step_share(self) -> float:
        """The share of d that is paid per step."""
        step, token = PRIOR_STEP_SHARE * self.times[STEP_INDEX], (1 - PRIOR_STEP_SHARE) * self.times[TOKEN_INDEX]
        return step / (step + token) if step + token > 0 else PRIOR_STEP_SHARE

    def _prior(self) -> list[float]:
        d = self.co.d
        values = {name: getattr(self.co, name) for name in cost_model.TERMS}
        values |= {"step": PRIOR_STEP_SHARE * d * self.co.batch, "d": (1 - PRIOR_STEP_SHARE) * d}
        return [values[name] for name in WINDOW_TERMS]

    def _solve(self) -> None:
        """argmin over x >= 0 of the forgotten sum of (row . x - target)^2 + the pull toward `scale`: what would be negative is 0."""
        scale = math.exp(max(-9.0, min(9.0, self.log_scale)))
        pull = RIDGE_WEIGHT / scale**2
        free = list(range(TERM_COUNT))
        while True:
            rows = [[self._gram[i][j] + (pull if i == j else 0.0) for j in free] for i in free]
            found = solve(rows, [self._target[i] + pull * scale for i in free])
            least = min(range(len(free)), key=found.__getitem__)
            if found[least] >= 0 or len(free) == 1:
                break
            del free[least]
        self.times = [0.0] * TERM_COUNT
        for i, value in zip(free, found, strict=True):
            self.times[i] = min(MAX_COEFFICIENT_FACTOR, max(0.0, value))


def solve(rows: list[list[float]], target: list[float]) -> list[float]:
    """The solution of a positive definite system, by Gauss. What rounding leaves of a dependent row counts for next to nothing."""
    a = [[*row, t] for row, t in zip(rows, target, strict=True)]
    n = len(a)
    least = max(1e-300, MIN_PIVOT_RATIO * max(row[i] for i, row in enumerate(rows)))
    for i in range(n):
        a[i][i] = max(a[i][i], least)
        for below in a[i + 1 :]:
            times = below[i] / a[i][i]
            for j in range(i, n + 1):
                below[j] -= times * a[i][j]
    x = [0.0] * n
    for i in reversed(range(n)):
        x[i] = (a[i][n] - sum(a[i][j] * x[j] for j in range(i + 1, n))) / a[i][i]
    return x
