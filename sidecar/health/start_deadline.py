"""Pure: how long an engine process that replaced another one may start, before liveness fails.

kubelet's start-up probe watches the first start of a container, and every start after kubelet's own restarts. A process
that a supervisor restarted inside the container is watched only here.
"""

from __future__ import annotations

from typing import Final

from sidecar.health.progress import SilenceLimits

# Times the longest start seen; and caps, for a start that may take longer than any before (a model that is loaded from
# the network instead of a cache): 37 minutes by default.
START_MARGIN: Final = 3.0
START_CAPS: Final = 2.5
# A start takes connections when it is done. One that takes them and answers nothing for so many unlearned floors (five
# minutes by default), or twice the longest start, is none.
SILENT_FLOORS: Final = 5.0
SILENT_MARGIN: Final = 2.0


def start_deadline(longest: float, unanswered: float, limits: SilenceLimits) -> float:
    """Seconds that a start may take.

    `longest`: of the starts seen, 0 before any; `unanswered`: seconds for which connections were taken and nothing was
    answered.
    """
    silent = max(SILENT_FLOORS * limits.unlearned, SILENT_MARGIN * longest)
    if unanswered >= silent:
        return silent
    return max(START_CAPS * limits.cap, START_MARGIN * longest)
