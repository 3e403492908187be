"""Pure: how long a canary may take before it counts as starved, by why it is sent.

Rules: start-up may compile for minutes and gets the cap; the canary of an idle engine is judged by those before it; the one that
confirms a suspicion completes the silence to what a kernel that compiles in service can take, and no more; what the work or a blocked
API was already given is not given twice.
"""

from __future__ import annotations

from collections.abc import Sequence

from sidecar.events import State
from sidecar.health.progress import Evidence, SilenceLimits

MIN_KNOWN_CANARIES = 3  # canaries that passed, before they say what one takes
CANARY_FLOOR_S = 8.0  # seconds that the canary of an idle engine always has, once some are known
CANARY_MARGIN = 5.0  # allowed over the slowest known canary
CONFIRMING = 24.0  # most seconds of the canary that confirms a suspicion over outstanding work
IDLE = 1.75  # floors that both canaries of an idle engine have together: a kernel compiles for up to 20 s in service


def canary_allowed(
    state: State, e: Evidence, seen: Sequence[float], limits: SilenceLimits, blocked: float, unanswered: float
) -> float:
    """Seconds that the next canary may take.

    `seen`: seconds of those that passed; `blocked`: the extra patience that is in `e.allowed` now, with an API that has answered
    nothing for `unanswered` seconds.
    """
    if state == "starting":
        return limits.cap
    least = min(limits.floor, CANARY_FLOOR_S)
    if e.age is None:
        left = max(0.0, blocked - unanswered)
        if len(seen) < MIN_KNOWN_CANARIES:
            return e.allowed - blocked + left
        known = max(least, CANARY_MARGIN * max(seen))
        if state == "suspect":
            known = max(known, IDLE * limits.floor - known)
        return min(known + left, limits.cap)
    held_off = max(0.0, e.age - e.allowed)  # for the sake of steps or prefill evidence: a part of its time
    return max(least, min(e.allowed - blocked - held_off, max(CONFIRMING, limits.floor)))
