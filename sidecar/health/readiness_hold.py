"""Pure: readiness that was lost again and again comes back only after a calm time: routers need no endpoint that flaps.

The first doubt within WINDOW_S is over when the engine shows progress; after the next one readiness waits for CALM_S.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

from sidecar.events import State

WINDOW_S: Final = 120.0
CALM_S: Final = 30.0
MIN_DOUBTS: Final = 2
DOUBTS: Final = frozenset[State]({"suspect", "stalled"})


@dataclass(slots=True)
class ReadinessHold:
    """When the engine was doubted lately, and until when readiness waits."""

    began: deque[float] = field(default_factory=lambda: deque(maxlen=MIN_DOUBTS))
    until: float = 0.0
    _is_doubted: bool = False

    def tick(self, state: State, now: float) -> None:
        """The verdict at `now`."""
        was_doubted, self._is_doubted = self._is_doubted, state in DOUBTS
        if self._is_doubted and not was_doubted:
            self.began.append(now)
        if was_doubted and not self._is_doubted and len(self.began) == MIN_DOUBTS:
            self.until = now + CALM_S if self.began[-1] - self.began[0] <= WINDOW_S else self.until

    def seconds_left(self, now: float) -> float:
        """Seconds that readiness still waits; 0 if it does not."""
        return max(0.0, self.until - now)
