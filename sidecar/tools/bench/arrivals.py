"""Pure: when requests come, and how many of them the engine may have at once.

Rules: arrivals are an open loop, they do not wait for answers; steady and burst have the same mean rate; the same seed gives the same times.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

BURSTS_PER_RUN: Final = 4  # in a run
BURST_SHARE: Final = 0.1  # of the time between two bursts, all requests of a burst come
ARRIVALS_PER_LATENCY: Final = (
    6.4  # requests that come while one is answered alone, unless a rate is named: that of the reference matrix
)


@dataclass(frozen=True, slots=True)
class Profile:
    """`serving`: "naive" gives the engine one request at a time, "batched" as many as are open."""

    arrivals: Literal["steady", "burst"]
    serving: Literal["naive", "batched"]

    @property
    def name(self) -> str:
        """As flags and tables spell it."""
        return f"{self.arrivals}-{self.serving}"


PROFILES: Final = (
    Profile("steady", "naive"),
    Profile("steady", "batched"),
    Profile("burst", "naive"),
    Profile("burst", "batched"),
)
NAMES: Final = tuple(profile.name for profile in PROFILES)


def arrival_times(profile: Profile, rate: float, seconds: float, seed: int) -> Iterator[float]:
    """Seconds since the beginning at which a request comes: a Poisson process, for bursts pressed into a tenth of the time."""
    rng = random.Random(f"{seed}:{profile.arrivals}")
    at, every = rng.expovariate(rate), seconds / BURSTS_PER_RUN
    while at < seconds:
        yield at if profile.arrivals == "steady" else at // every * every + at % every * BURST_SHARE
        at += rng.expovariate(rate)


def rate_for(alone: float) -> float:
    """Requests per second for an engine that answers one alone in `alone` seconds."""
    return ARRIVALS_PER_LATENCY / max(alone, 1e-3)
