"""Pure: when requests arrive.

Arrivals are an open loop and do not wait for responses. Steady and burst have the same mean rate.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Final

# How requests arrive, and how many the engine gets at a time: naive is one, batched all that are open.
PROFILES: Final = ("steady-naive", "steady-batched", "burst-naive", "burst-batched")
BURSTS_PER_RUN: Final = 4
# Share of the time between two bursts in which all requests of a burst arrive.
BURST_SHARE: Final = 0.1


def arrival_times(profile: str, rate: float, seconds: float, seed: int) -> Iterator[float]:
    """Arrival times in seconds from the start: a Poisson process, for bursts compressed into a tenth of the time.

    Equal seeds give equal times.
    """
    arrivals = profile.partition("-")[0]
    rng = random.Random(f"{seed}:{arrivals}")
    at, every = rng.expovariate(rate), seconds / BURSTS_PER_RUN
    while at < seconds:
        yield at if arrivals == "steady" else at // every * every + at % every * BURST_SHARE
        at += rng.expovariate(rate)
