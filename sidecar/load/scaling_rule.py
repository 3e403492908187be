"""Pure: the rule that scales a fleet, and the settings that are tried for a fleet.

    replicas = max(floor, season / target, largest demand of the last `calm` seconds / target + queue / drain)

The demand is what comes, as replicas kept busy, on the mean of a minute: the flow plus the growth of the queue. It is
not the flow alone: that is the capacity while replicas start, and the capacity again while they work off what piled up.
The queue is the work that waits, in seconds of a replica; the season is what the same time of earlier days asked for
(`seasonal_forecast`). Each wanted number holds for HOLD_S, which is the HPA's stabilisation window: what a queue asks
for is kept briefly, what the demand asks for for `calm` seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import Final

HOLD_S: Final = 120
ROUNDING: Final = 0.05  # of a replica: so little more does not start one
TRACE: Final = 0.001  # of a replica: more than this needs one

# The candidates. Bursts that come again within an hour or two are kept by a long calm and a low target, daily ones by a
# season. More replicas that never stop are none: they cost more than they keep (docs/benchmarks.md).
TARGETS: Final = (0.4, 0.5, 0.65, 0.8, 0.95)
CALMS_S: Final = (300, 1200, 2400, 7200)
QUANTILES: Final = (0.0, 0.9)
# Of what a rule may lose, the share that it may have lost in its trial, as no week is like the one before.
LOST_IN_TRIAL: Final = 0.6


@dataclass(frozen=True, slots=True)
class ScalingRule:
    """Settings. `target`: busy share of a replica; `drain`, `calm`: seconds; `quantile`: of the season, 0 without."""

    target: float
    drain: float
    calm: int
    floor: int
    quantile: float = 0.0

    def replicas(self, demand: float, queue: float) -> int:
        """For a demand and a queue, without floor and season."""
        needs_one = demand > TRACE or queue > TRACE
        return max(int(needs_one), math.ceil(demand / self.target + queue / self.drain - ROUNDING))

    def least(self, season: float) -> int:
        """The floor, or more where the season asks for it."""
        return max(self.floor, math.ceil(season / self.target - ROUNDING))


def candidates(start_s: float, least: int) -> list[ScalingRule]:
    """The settings to try for replicas that take `start_s` seconds to start, of which `least` must stay."""
    return [
        ScalingRule(target, drain_of(start_s), calm, least, quantile)
        for target, calm, quantile in product(TARGETS, CALMS_S, QUANTILES)
    ]


def drain_of(start_s: float) -> float:
    """Seconds in which to work off what piled up while a replica started."""
    return max(5.0, start_s / 4)
