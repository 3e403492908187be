"""Pure: how many replicas there should be. Fast up, slow down.

`desired` is what Kubernetes' HPA computes, ceil(replicas * signal / target), of a signal averaged over the replicas that serve. More are
started at once; fewer are kept only when nothing more was desired for `calm` seconds (the HPA's default stabilisation, 300 s).
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Scaling:
    """A policy. `signal`: headline MU utilisation, or open requests, each per replica; `target` in the same unit."""

    signal: Literal["mu", "requests"]
    target: float
    every: float = 5.0  # seconds between decisions
    calm: float = 300.0
    startup: float = 30.0  # seconds until a new replica serves
    least: int = 1
    most: int = 64


class Scaler:
    """Remembers what was desired."""

    def __init__(self, policy: Scaling) -> None:
        self.policy = policy
        self._desired: deque[tuple[float, int]] = deque()

    def wanted(self, serving: int, signal: float, now: float) -> int:
        """Replicas that there should be. `signal` is the mean over the `serving` ones."""
        p = self.policy
        desired = min(p.most, max(p.least, math.ceil(serving * signal / p.target)))
        self._desired.append((now, desired))
        while self._desired[0][0] < now - p.calm:
            self._desired.popleft()
        return max(n for _, n in self._desired)
