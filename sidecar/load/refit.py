"""Pure: coefficients fitted online to the engine's own work. Reported only; never used for pricing.

Recursive, non-negative least squares on relative errors over windows of work, with forgetting. A ridge pulls toward the
coefficients in use, after their overall scale was fitted: a term that the traffic hardly shows keeps its share of them.
Decoding is fitted in two parts, per step and per token, because a small batch pays as much for reading the weights. The
reported d is for the batch size of the coefficients in use.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Final

from sidecar.load import cost_model
from sidecar.load.cost_model import Coefficients
from sidecar.load.work_windows import WINDOW_TERMS, WorkWindow

FORGETTING_FACTOR: Final = 0.995  # per window: one from half an hour of work ago weighs a third of a new one
RIDGE_WEIGHT: Final = 0.02  # of the coefficients in use, in windows
PRIOR_STEP_SHARE: Final = 0.8  # share of d that is paid per step, before anything is known
MAX_LOG_ERROR: Final = 0.5  # larger errors pull no harder than this
MIN_REFIT_WINDOWS: Final = 20  # before the fit is reported
MAX_COEFFICIENT_FACTOR: Final = 1e4  # of a fitted coefficient over the one in use
MIN_PIVOT_RATIO: Final = 1e-14  # of the largest pivot
MAX_REPORTED_ERROR: Final = 5.0
TERM_COUNT: Final = len(WINDOW_TERMS)


@dataclass(slots=True)
class Refit:
    """Learns from windows. `log_scale` is the log of measured over predicted time; `times` are factors on the prior.

    `error` is the mean log error of predicting a window before learning it.
    """

    co: Coefficients
    windows: int = 0
    log_scale: float = 0.0
    error: float = 0.0
    times: list[float] = field(default_factory=lambda: [1.0] * TERM_COUNT)
    _gram: list[list[float]] = field(default_factory=lambda: [[0.0] * TERM_COUNT for _ in range(TERM_COUNT)])
    _target: list[float] = field(default_factory=lambda: [0.0] * TERM_COUNT)

    def add(self, window: WorkWindow) -> None:
        whole = [x * p for x, p in zip(window.work, self._prior(), strict=True)]
        if not (window.ms > 0 and 1e-9 < sum(whole) / window.ms < 1e9):
            return
        predicted = sum(w * t for w, t in zip(whole, self.times, strict=True)) if self.windows else sum(whole)
        error = abs(math.log(window.ms / predicted)) if predicted > 0 else MAX_LOG_ERROR
        is_settled = self.windows >= MIN_REFIT_WINDOWS and predicted > 0
        weight = min(1.0, MAX_LOG_ERROR / error) if is_settled and error > MAX_LOG_ERROR else 1.0
        # Relative to the measurement, one that is too high would weigh too little.
        base = predicted if is_settled else window.ms
        self.windows += 1
        rate = weight * max(1 / self.windows, 1 - FORGETTING_FACTOR)
        self.log_scale += rate * (math.log(window.ms / sum(whole)) - self.log_scale)
        self.error += max(1 / self.windows, 0.02) * (min(error, MAX_REPORTED_ERROR) - self.error)
        row, target = [w / base for w in whole], window.ms / base
        target = min(target, math.exp(MAX_LOG_ERROR) if is_settled else target)
        for i in range(TERM_COUNT):
            self._target[i] = FORGETTING_FACTOR * self._target[i] + weight * row[i] * target
            for j in range(TERM_COUNT):
                self._gram[i][j] = FORGETTING_FACTOR * self._gram[i][j] + weight * row[i] * row[j]
        self._solve()

    def shadow(self) -> Coefficients | None:
        """The fitted coefficients; None before MIN_REFIT_WINDOWS windows."""
        if self.windows < MIN_REFIT_WINDOWS:
            return None
        values = {name: p * t for name, p, t in zip(WINDOW_TERMS, self._prior(), self.times, strict=True)}
        fitted = {name: values[name] for name in cost_model.TERMS}
        fitted["d"] = values["d"] + values["step"] / self.co.batch
        return replace(self.co, **fitted, fingerprint="", source="refit", mu_in_flight=0.0)  # type: ignore[arg-type]

    def _prior(self) -> list[float]:
        d = self.co.d
        values = {name: getattr(self.co, name) for name in cost_model.TERMS}
        values |= {"step": PRIOR_STEP_SHARE * d * self.co.batch, "d": (1 - PRIOR_STEP_SHARE) * d}
        return [values[name] for name in WINDOW_TERMS]

    def _solve(self) -> None:
        """Minimize the decayed sum of (row . x - target)^2 and the pull toward `scale`; negative terms become 0."""
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
    """Solve a positive definite system by Gaussian elimination; tiny pivots, left by rounding, are raised."""
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
