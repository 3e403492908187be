"""Pure: how long a canary may take before it counts as starved, by why it is sent.

Rules:
- Start-up may compile for minutes: its canary gets the cap.
- The canary of an idle engine is judged by those before it: by their median, so that one which waited out a pause
  does not lengthen the next. Where too few came before, users' answers may have taught enough.
- The canary of a silence is given the rest of it, as long as a kill usually takes: one that waits until then says as
  much as many that are given up, and leaves nothing in the engine's queue.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Final

from sidecar.events import State
from sidecar.health.progress import Evidence, SilenceLimits

# Canaries that passed, before they tell what one takes; then one always has so many seconds, and this margin over the
# slowest, which counts for at most so many medians.
MIN_KNOWN_CANARIES: Final = 3
CANARY_FLOOR_S: Final = 8.0
CANARY_MARGIN: Final = 5.0
MAX_MEDIANS: Final = 4.0


def canary_allowed(state: State, evidence: Evidence, passed_seconds: Sequence[float], limits: SilenceLimits) -> float:
    """Seconds that the next canary may take. `passed_seconds`: of those that passed."""
    if state == "starting":
        return limits.cap
    shortest = min(limits.floor, CANARY_FLOOR_S)
    if evidence.age is not None:
        return max(shortest, min(evidence.kill_after - evidence.age, limits.kill))
    if len(passed_seconds) < MIN_KNOWN_CANARIES:
        shortest = evidence.allowed if evidence.learned else max(evidence.allowed, limits.unlearned)
    if not passed_seconds:
        return shortest
    slowest = min(max(passed_seconds), MAX_MEDIANS * median(passed_seconds))
    return min(max(shortest, CANARY_MARGIN * slowest), limits.cap)
