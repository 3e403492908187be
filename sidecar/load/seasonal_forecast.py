"""Pure: what the same time of earlier days asked for, as a forecast of the demand.

    forecast(slot) = max over the slot and its neighbours of the QUANTILE of this time of day over the last DAYS days

So what happened on four of seven days at this time is expected, on weekends, too; what happened twice is not. On two
weeks of 17 production clients (benchmarks/replay/clients.py) this covers more of the demand on average, for the same
replica hours, than yesterday, than the same weekday of the week before (one sample), and than the mean of both; not for
each client.

Series are equally spaced and end with the present; a day of them has `slots` values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

DAYS: Final = 7
QUANTILE: Final = 0.6
NEIGHBOURS: Final = 1  # of slots, as jobs do not begin to the minute


def forecast_of(past: Sequence[float], slot: int, slots: int, quantile: float = QUANTILE) -> float:
    """The demand of slot number `slot`, counted from the first of `past`; 0 where no earlier day is known."""
    return max(_at(past, near, slots, quantile) for near in range(slot - NEIGHBOURS, slot + NEIGHBOURS + 1))


def _at(past: Sequence[float], slot: int, slots: int, quantile: float) -> float:
    same = sorted(float(past[at]) for day in range(1, DAYS + 1) if 0 <= (at := slot - day * slots) < len(past))
    return same[min(len(same) - 1, int(quantile * len(same)))] if same else 0.0
