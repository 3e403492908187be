"""Pure: recursive, non-negative least squares on relative errors, with forgetting.

    measured = sum of times[i] * expected[i]        expected: the prior of each part

Rules:
- A ridge pulls `times` toward a common scale, which is fitted first: a part that is hardly seen keeps its share.
- Once settled, a measurement pulls with a bounded gain, and errors are relative to the fit, not to the measurement: one
  that is too high would weigh too little.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

MAX_LOG_ERROR: Final = 0.5  # larger errors are clipped to this
MAX_FACTOR: Final = 1e4  # of a part over its prior
MAX_REPORTED_ERROR: Final = 5.0
MIN_PIVOT_RATIO: Final = 1e-14  # of the largest pivot


@dataclass(slots=True)
class RelativeFit:
    """Fits `size` parts. `error` is the mean log error of predicting a measurement before learning it.

    `forgetting` is the weight that old measurements keep at each new one, `ridge` that of the prior in measurements;
    `settled_after` so many, the fit can be used.
    """

    size: int
    forgetting: float
    ridge: float
    settled_after: int
    seen: int = 0
    log_scale: float = 0.0  # of measured over expected
    error: float = 0.0
    times: list[float] = field(default_factory=list)
    _gram: list[list[float]] = field(default_factory=list)
    _target: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.times = [1.0] * self.size
        self._gram = [[0.0] * self.size for _ in range(self.size)]
        self._target = [0.0] * self.size

    @property
    def is_settled(self) -> bool:
        return self.seen >= self.settled_after

    def predict(self, expected: Sequence[float]) -> float:
        """The expected measurement; that of the prior before anything was learned."""
        return sum(x * t for x, t in zip(expected, self.times, strict=True)) if self.seen else sum(expected)

    def add(self, expected: Sequence[float], measured: float) -> None:
        """Learn one measurement; `solve` updates `times`. Impossible values are ignored."""
        whole = sum(expected)
        if not (measured > 0 and 1e-9 < whole / measured < 1e9):
            return
        predicted = self.predict(expected)
        error = abs(math.log(measured / predicted)) if predicted > 0 else MAX_LOG_ERROR
        settled = self.is_settled and predicted > 0
        weight = min(1.0, MAX_LOG_ERROR / error) if settled and error > MAX_LOG_ERROR else 1.0
        base = predicted if settled else measured
        self.seen += 1
        rate = weight * max(1 / self.seen, 1 - self.forgetting)
        self.log_scale += rate * (math.log(measured / whole) - self.log_scale)
        self.error += max(1 / self.seen, 0.02) * (min(error, MAX_REPORTED_ERROR) - self.error)
        row, target = [x / base for x in expected], measured / base
        target = min(target, math.exp(MAX_LOG_ERROR) if settled else target)
        keep, target = self.forgetting, weight * target
        self._target = [keep * old + x * target for old, x in zip(self._target, row, strict=True)]
        for i, x in enumerate(row):
            pull = weight * x
            self._gram[i] = [keep * old + pull * y for old, y in zip(self._gram[i], row, strict=True)]

    def solve(self) -> None:
        """Minimize the decayed sum of (row . times - target)^2 and the pull toward the scale; none is negative."""
        scale = math.exp(max(-9.0, min(9.0, self.log_scale)))
        pull = self.ridge / scale**2
        free = list(range(self.size))
        while True:
            rows = [[self._gram[i][j] + (pull if i == j else 0.0) for j in free] for i in free]
            found = solve(rows, [self._target[i] + pull * scale for i in free])
            least = min(range(len(free)), key=found.__getitem__)
            if found[least] >= 0 or len(free) == 1:
                break
            del free[least]
        self.times = [0.0] * self.size
        for i, value in zip(free, found, strict=True):
            self.times[i] = min(MAX_FACTOR, max(0.0, value))


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
