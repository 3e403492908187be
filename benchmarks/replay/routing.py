"""Pure: where a router sends a request. One router sees the whole fleet, like a gateway.

The router's counts of open requests are always right. A sidecar's report is up to `period` old, the interval between
two reads of a policy. `own`: the router adds what it has sent there since, at the mean price it has learned.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Signal = Literal["turns", "requests", "two", "tokens", "mu", "weights", "true"]


@dataclass(frozen=True, slots=True)
class Policy:
    """A way to route.

    `signal`: in turn, fewest open requests, the fewer of two random ones, fewest tokens or MU in flight, random with
    Envoy's weights from ORCA reports (rate over utilisation), least true work.
    """

    name: str
    signal: Signal
    period: float = 0.0
    own: bool = False

    @property
    def reads(self) -> bool:
        """Whether it needs reports."""
        return self.signal in ("tokens", "mu", "weights")


POLICIES = (
    Policy("round robin", "turns"),
    Policy("request count", "requests"),
    Policy("power of two choices", "two"),
    Policy("tokens + own, 0.5 s", "tokens", 0.5, own=True),
    Policy("MU + own, 0.5 s", "mu", 0.5, own=True),
    Policy("MU + own, 50 ms", "mu", 0.05, own=True),
    Policy("MU, 50 ms", "mu", 0.05),
    Policy("MU, 1 s", "mu", 1.0),
    Policy("ORCA weights, 1 s", "weights", 1.0),
    Policy("true work, at once", "true"),
)
OURS = POLICIES[4]  # possible in production: the sidecar's numbers are updated every 0.5 s


@dataclass(slots=True)
class Report:
    """The router's last report of a replica, and the requests sent there since."""

    tokens: float = 0.0
    mu: float = 0.0  # share of what is held at the SLO
    weight: float = 0.0  # rate over utilisation, of the ORCA report
    sent: int = 0


class Replica(Protocol):
    """A replica as a router sees it."""

    open: int
    report: Report

    def true_work(self, now: float) -> float: ...


class Router:
    """Chooses among the replicas that take requests."""

    def __init__(self, policy: Policy, rng: random.Random) -> None:
        self.policy = policy
        self._rng = rng
        self._turn = 0
        self._each = {"mu": 0.0, "tokens": 0.0}

    def learn_price(self, share: float, tokens: float) -> None:
        """Learn a request's price (`x-sidecar-mu`), as a share of its replica's capacity at the SLO, and in tokens."""
        for name, value in (("mu", share), ("tokens", tokens)):
            self._each[name] += (value - self._each[name]) * 0.05

    def choose(self, replicas: Sequence[Replica], now: float) -> int:
        """An index into `replicas`; ties are broken at random."""
        if self.policy.signal == "turns":
            self._turn += 1
            return self._turn % len(replicas)
        if self.policy.signal == "two" and len(replicas) > 2:
            pair = self._rng.sample(range(len(replicas)), 2)
            return min(pair, key=lambda i: replicas[i].open)
        if self.policy.signal == "weights":
            weights = [replica.report.weight for replica in replicas]
            known = [w for w in weights if w > 0]
            usual = statistics.median(known) if known else 1.0
            return self._rng.choices(range(len(replicas)), [w or usual for w in weights])[0]
        loads = [self._load(replica, now) for replica in replicas]
        least = min(loads)
        return self._rng.choice([i for i, load in enumerate(loads) if load <= least])

    def _load(self, replica: Replica, now: float) -> float:
        report, own = replica.report, self.policy.own
        match self.policy.signal:
            case "tokens":
                return report.tokens + (report.sent * self._each["tokens"] if own else 0.0)
            case "mu":
                return report.mu + (report.sent * self._each["mu"] if own else 0.0)
            case "true":
                return replica.true_work(now)
            case _:
                return replica.open
