"""Pure: how many times slower than its coefficients an engine works, once that is sure. Its capacity follows it.

Rules:
- Each window of work yields its duration over the re-fit's prediction; before the re-fit is reported, over what the
  coefficients predict. The median of the last ones counts, so that a single odd window changes nothing.
- It is sure when enough windows agree. It then changes the capacity if that is off by more than the hysteresis, and
  than STANDARD_ERRORS of the median: noise must not move a router's weights.
- It stays within bounds, which are narrower if the coefficients were measured. An engine that reports no cached tokens
  is never assumed to be faster than measured: cached prompts look like speed.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from statistics import median
from typing import Final

from sidecar.load import cost_model
from sidecar.load.cost_model import Coefficients
from sidecar.load.refit import Refit
from sidecar.load.work_windows import WorkWindow

RECENT_WINDOWS: Final = 9  # that the median is over: a minute and a half of work
MIN_WINDOWS: Final = 4  # that must agree
MAX_SPREAD: Final = 0.4  # median distance of their log ratios from their median
HYSTERESIS: Final = 0.2  # of the log: 22 % are not followed
STANDARD_ERRORS: Final = 4.0
ERROR_PER_SPREAD: Final = 1.86  # of a median of n: this times the spread over the root of n, if the noise is normal
MEASURED_BOUNDS: Final = (0.5, 16.0)  # a clock that is held down, a neighbour on the GPU
UNMEASURED_BOUNDS: Final = (
    0.05,
    20_000.0,
)  # the default assumes an H100; a CPU with a large model is 5,000 times slower


class MeasuredCapacity:
    """`slowness`: actual time of work over the time predicted by the coefficients; 1 until known."""

    def __init__(self, co: Coefficients, *, follows: bool = True) -> None:
        self._co, self._follows = co, follows
        self.slowness = 1.0
        self._recent: deque[float] = deque(maxlen=RECENT_WINDOWS)
        self._by_refit = False

    def add(self, window: WorkWindow, refit: Refit, *, caching: bool) -> None:
        """Add a window, before the re-fit learns it. `caching`: the engine reports cached prompt tokens."""
        if not self._follows:
            return
        expected = refit.expected(window)
        predicted = refit.fit.predict(expected) if refit.fit.is_settled else sum(expected)
        if not (window.ms > 0 and 0 < predicted < math.inf):
            return
        if refit.fit.is_settled is not self._by_refit:  # what was measured against the coefficients is not comparable
            self._by_refit = refit.fit.is_settled
            self._recent.clear()
        self._recent.append(math.log(window.ms / predicted))
        shadow = refit.shadow()
        base = 0.0 if shadow is None else math.log(cost_model.unit_ms(shadow) / cost_model.unit_ms(self._co))
        found = agreed(self._recent)
        if found is not None:
            self._follow(base + found[0], found[1], caching=caching)

    def _follow(self, log_slowness: float, error: float, *, caching: bool) -> None:
        """`error`: the standard error of the logarithm."""
        is_measured = cost_model.is_measured(self._co)
        low, high = MEASURED_BOUNDS if is_measured else UNMEASURED_BOUNDS
        if is_measured and not caching:
            low = 1.0
        slowness = min(high, max(low, math.exp(log_slowness)))
        hysteresis = max(HYSTERESIS, math.log1p(self._co.p90), STANDARD_ERRORS * error)
        if abs(math.log(slowness / self.slowness)) > hysteresis:
            self.slowness = 1.0 if abs(math.log(slowness)) <= hysteresis else slowness


def agreed(log_ratios: Iterable[float]) -> tuple[float, float] | None:
    """The median of log ratios and its standard error, if enough of them agree; else None."""
    seen = list(log_ratios)
    if len(seen) < MIN_WINDOWS:
        return None
    middle = median(seen)
    spread = median(abs(ratio - middle) for ratio in seen)
    return (middle, ERROR_PER_SPREAD * spread / math.sqrt(len(seen))) if spread <= MAX_SPREAD else None
