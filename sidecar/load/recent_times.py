"""Percentiles of what took so long in the last minute.

Rules: of the last MAX_VALUES values, those of the last WINDOW_S seconds count; without one there is no percentile.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from sidecar.snapshot import Percentiles

WINDOW_S: Final = 60.0
MAX_VALUES: Final = 1000


class RecentTimes:
    """Times in seconds, each with the moment at which it was seen."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque(maxlen=MAX_VALUES)

    def add(self, at: float, seconds: float) -> None:
        self._seen.append((at, seconds))

    def percentiles(self, now: float) -> Percentiles | None:
        """Nearest-rank percentiles of the window."""
        while self._seen and self._seen[0][0] < now - WINDOW_S:
            self._seen.popleft()
        values = sorted(seconds for _, seconds in self._seen)
        if not values:
            return None
        p50, p95 = (values[-(-len(values) * percent // 100) - 1] for percent in (50, 95))
        return Percentiles(p50, p95, len(values))
