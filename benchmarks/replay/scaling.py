"""Pure: the desired number of replicas. Fast up, slow down, as in deploy/keda/prometheus.yaml.

Desired is the sum of the signal over serving replicas, divided by the target. Scaling up is immediate, but at most
doubles within `doubling` seconds; scaling down needs `calm` seconds in which no more replicas were desired.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Literal

from sidecar.load.rule_trial import MINUTE_S
from sidecar.load.scaling_rule import ScalingRule

Signal = Literal["utilization", "stock and flow", "requests", "flow and queue"]
SIGNALS: tuple[Signal, ...] = ("utilization", "stock and flow", "requests")


@dataclass(frozen=True, slots=True)
class Scaling:
    """A policy. `signal`: the headline utilisation; its two terms in MU; open requests; its parts `flow` and `queue`.

    `target`: per replica; of the last one, of the flow. `drain`: seconds to work off what waits, in addition.
    """

    signal: Signal
    target: float
    every: float = 15.0  # seconds between decisions
    calm: float = 600.0
    demand_calm: float = 0.0  # with `drain`: seconds for which the largest demand of the fleet counts
    startup: float = 30.0  # seconds until a new replica serves
    doubling: float = 30.0  # 0: as many as are desired
    drain: float = 0.0
    least: int = 1
    most: int = 64


class Scaler:
    """Keeps the recent desired and actual numbers."""

    def __init__(self, policy: Scaling) -> None:
        self.policy = policy
        self._wanted: deque[tuple[float, int]] = deque()
        self._there: deque[tuple[float, int]] = deque()
        self._demands: deque[tuple[float, float]] = deque()
        self._queues: deque[tuple[float, float]] = deque()

    def wanted(self, there: int, sum_: float, now: float, queue: float = 0.0) -> int:
        """The desired replicas. `there`: serving or starting; `sum_`: of the signal over those that serve; `queue`: of
        the seconds for which they have work waiting, if the policy reads them."""
        p = self.policy
        replicas = self._rule(sum_, queue, now) if p.drain else math.ceil(sum_ / p.target - 1e-9)
        self._wanted.append((now, max(p.least, replicas)))
        while self._wanted[0][0] < now - p.calm:
            self._wanted.popleft()
        self._there.append((now, there))
        while self._there[0][0] < now - p.doubling:
            self._there.popleft()
        fewest = min(n for _, n in self._there)
        if self._wanted[-1][1] > there:
            limit = 2 * fewest if p.doubling else p.most
            return max(there, min(self._wanted[-1][1], limit, p.most))
        return min(there, max(n for _, n in self._wanted))

    def _rule(self, flow: float, queue: float, now: float) -> int:
        """The production rule: the demand is the flow and the growth of the queue, both of a minute."""
        p = self.policy
        self._queues.append((now, queue))
        while self._queues[0][0] < now - MINUTE_S:
            self._queues.popleft()
        demand = max(0.0, flow + (queue - self._queues[0][1]) / MINUTE_S)
        self._demands.append((now, demand))
        while self._demands[0][0] < now - p.demand_calm:
            self._demands.popleft()
        rule = ScalingRule(p.target, p.drain, int(p.demand_calm), p.least)
        return rule.replicas(max(demand for _, demand in self._demands), queue)
