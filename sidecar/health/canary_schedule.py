"""Pure: how long a canary may take before it counts as starved, by why it is sent.

Rules:
- Start-up may compile for minutes: its canary gets the cap.
- The canary of an idle engine is judged by those before it.
- The canary that confirms a suspicion extends the silence to what a kernel that compiles in service can take, and no
  further.
- Time that the work or a blocked API was already allowed is not allowed twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from sidecar.events import State
from sidecar.health.progress import Evidence, SilenceLimits

# Canaries that passed, before they tell what one takes; then one always has so many seconds, and this margin over the
# slowest.
MIN_KNOWN_CANARIES: Final = 3
CANARY_FLOOR_S: Final = 8.0
CANARY_MARGIN: Final = 5.0
# The canary that confirms a suspicion over outstanding work gets at most so long.
MAX_CONFIRMING_S: Final = 24.0
# Floors that both canaries of an idle engine have together: a kernel compiles for up to 20 s in service.
IDLE_FLOORS: Final = 1.75


def canary_allowed(
    state: State,
    evidence: Evidence,
    passed_seconds: Sequence[float],
    limits: SilenceLimits,
    blocked: float,
    unanswered: float,
) -> float:
    """Seconds that the next canary may take.

    `passed_seconds`: of those that passed; `blocked`: the extra patience that `evidence.allowed` includes now, with an
    API that has answered nothing for `unanswered` seconds.
    """
    if state == "starting":
        return limits.cap
    shortest = min(limits.floor, CANARY_FLOOR_S)
    if evidence.age is None:
        left = max(0.0, blocked - unanswered)
        if len(passed_seconds) < MIN_KNOWN_CANARIES:
            return evidence.allowed - blocked + left
        known = max(shortest, CANARY_MARGIN * max(passed_seconds))
        if state == "suspect":
            known = max(known, IDLE_FLOORS * limits.floor - known)
        return min(known + left, limits.cap)
    held_off = max(0.0, evidence.age - evidence.allowed)  # by steps or prefill evidence: a part of the canary's time
    return max(shortest, min(evidence.allowed - blocked - held_off, max(MAX_CONFIRMING_S, limits.floor)))
