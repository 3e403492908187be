"""Pure: when requests arrive, and how many the engine may have at once.

Arrivals are an open loop and do not wait for responses. Steady and burst have the same mean rate. Equal seeds give
equal times.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

BURSTS_PER_RUN: Final = 4
# Share of the time between two bursts in which all requests of a burst arrive.
BURST_SHARE: Final = 0.1
# Arrivals in the time that the engine needs for a single request, unless a rate is given: as in the reference matrix.
ARRIVALS_PER_LATENCY: Final = 6.4


@dataclass(frozen=True, slots=True)
class Profile:
    """`serving`: "naive" sends one request at a time, "batched" all that are open."""

    arrivals: Literal["steady", "burst"]
    serving: Literal["naive", "batched"]

    @property
    def name(self) -> str:
        """The name in flags and tables."""
        return f"{self.arrivals}-{self.serving}"


PROFILES: Final = (
    Profile("steady", "naive"),
    Profile("steady", "batched"),
    Profile("burst", "naive"),
    Profile("burst", "batched"),
)
NAMES: Final = tuple(profile.name for profile in PROFILES)


def arrival_times(profile: Profile, rate: float, seconds: float, seed: int) -> Iterator[float]:
    """Arrival times in seconds from the start: a Poisson process, for bursts compressed into a tenth of the time."""
    rng = random.Random(f"{seed}:{profile.arrivals}")
    at, every = rng.expovariate(rate), seconds / BURSTS_PER_RUN
    while at < seconds:
        yield at if profile.arrivals == "steady" else at // every * every + at % every * BURST_SHARE
        at += rng.expovariate(rate)


def rate_for(alone: float) -> float:
    """Requests per second for an engine that answers a single request in `alone` seconds."""
    return ARRIVALS_PER_LATENCY / max(alone, 1e-3)
