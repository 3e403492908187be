"""Autoscaling policies of the fluid model, for many lanes at once. Each sees what its real form can see.

reactive     ours: the production rule (sidecar/load/scaling_rule.py) on the `flow` and `queue` parts, with one setting
             for all, or with a plan from the lane's own past
utilization  KEDA on a utilisation between 0 and 1: the HPA's n x value / target, with its default behaviour
concurrency  KEDA on running and waiting requests: their sum / target, with the HPA's default behaviour
wva          llm-d's Workload Variant Autoscaler 0.9: tokens in use and queued against 85 % and 70 % of the supply
clairvoyant  knows the demand until a replica that starts now serves: a ceiling
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from replay.clients import WINDOW_S, Numbers
from sidecar.load.rule_trial import SLOT_MINUTES
from sidecar.load.scaling_rule import HOLD_S, ROUNDING, TRACE, ScalingRule, drain_of

if TYPE_CHECKING:
    from replay.fluid import Lane

FAST_S, SLOW_S, AHEAD_S = 10.0, 60.0, 30.0
BLOCKS, BLOCK_S, HPA_CALM_S = 20, 10.0, 300.0
DAY_S = 86_400


class Policy(Protocol):
    """How many replicas there should be."""

    name: str

    def wanted(self, seen: Observed) -> Numbers:
        """Of each lane, now."""
        ...


@dataclass(slots=True)
class Observed:
    """What the last steps looked like, by lane."""

    step_s: float
    start_s: Numbers
    floor: Numbers
    history: Numbers  # (step, lane): work done, of the last minute
    backlogs: Numbers  # (step, lane): work that waited
    clients: list[str]
    demands: Numbers  # (window, lane): what comes, for the forecast's past and for the clairvoyant
    steps: int = 0
    window: int = 0
    serving: Numbers = field(default_factory=lambda: np.zeros(0))
    pending: Numbers = field(default_factory=lambda: np.zeros(0))
    backlog: Numbers = field(default_factory=lambda: np.zeros(0))
    work: Numbers = field(default_factory=lambda: np.zeros(0))
    came: Numbers = field(default_factory=lambda: np.zeros(0))  # replicas kept busy by what came within a minute
    seconds: Numbers = field(default_factory=lambda: np.zeros(0))  # of a replica, for a request
    residence: Numbers = field(default_factory=lambda: np.zeros(0))
    usual_seconds: Numbers = field(default_factory=lambda: np.zeros(0))
    usual_residence: Numbers = field(default_factory=lambda: np.zeros(0))
    _sum: Numbers = field(default_factory=lambda: np.zeros(0))  # of the history

    @classmethod
    def of(cls, lanes: Sequence[Lane], step_s: float) -> Observed:
        of_all = np.array([lane.client.demand for lane in lanes]).T
        seen = cls(
            step_s,
            np.array([lane.start_s for lane in lanes]),
            np.array([float(lane.floor) for lane in lanes]),
            np.zeros((round(SLOW_S / step_s), len(lanes))),
            np.zeros((round(SLOW_S / step_s), len(lanes))),
            [lane.client.name for lane in lanes],
            of_all,
        )
        seen.usual_seconds = np.array([_weighted(lane.client.seconds, lane.client.rate) for lane in lanes])
        seen.usual_residence = np.array([_weighted(lane.client.residence, lane.client.rate) for lane in lanes])
        return seen

    def enter(self, lanes: Sequence[Lane], window: int) -> None:
        """A window begins."""
        self.window = window
        self.seconds = np.array([lane.client.seconds[window] for lane in lanes])
        self.residence = np.array([lane.client.residence[window] for lane in lanes])

    def see(self, work: Numbers, served: Numbers, backlog: Numbers, serving: Numbers, pending: Numbers) -> None:
        """A step has passed."""
        row = self.steps % len(self.history)
        self._sum = self._sum + served - self.history[row] if self.steps else served.copy()
        self.history[row] = served
        # What has come: what was done, and by how much the queue has grown.
        self.came = np.maximum(self._sum + backlog - self.backlogs[row], 0.0) / SLOW_S
        self.backlogs[row] = backlog
        self.work, self.backlog, self.serving, self.pending = work, backlog, serving, pending
        self.steps += 1

    def flow(self, seconds: float) -> Numbers:
        """Replicas kept busy, on the mean of the last seconds."""
        if seconds == SLOW_S:
            return np.maximum(self._sum, 0.0) / SLOW_S
        count = round(seconds / self.step_s)
        recent = [(self.steps - 1 - back) % len(self.history) for back in range(count)]
        return np.asarray(self.history[recent].mean(axis=0) / self.step_s)

    @property
    def in_flight(self) -> Numbers:
        """Requests with engines: by Little's law those that are served, and those that wait."""
        return self.flow(FAST_S) / self.seconds * self.residence + self.backlog / self.seconds


@dataclass(frozen=True, slots=True)
class Part:
    """What some of the lanes look like, for a policy that has these alone."""

    whole: Observed
    lanes: slice

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.whole, name)
        return found[..., self.lanes] if isinstance(found, np.ndarray) else found

    def flow(self, seconds: float) -> Numbers:
        """As of all lanes."""
        return self.whole.flow(seconds)[self.lanes]


class Together:
    """Several policies, each with lanes of its own, in one run: a step of few lanes takes as long as one of many."""

    name = "together"

    def __init__(self, parts: Sequence[tuple[Policy, slice]]) -> None:
        self._parts = parts

    def wanted(self, seen: Observed) -> Numbers:
        found = np.zeros(len(seen.serving))
        for policy, lanes in self._parts:
            found[lanes] = policy.wanted(Part(seen, lanes))  # type: ignore[arg-type]
        return found


def _weighted(values: Numbers, rate: Numbers) -> float:
    return float((values * rate).sum() / rate.sum())


class Calm:
    """Stays at the largest number wanted within the last `seconds` of each lane, to a twentieth of them."""

    def __init__(self, seconds: Numbers, held: Numbers | float = 0.0) -> None:
        self._counts = np.clip(np.round(seconds / BLOCK_S), 1, BLOCKS).astype(int)
        self._length = np.maximum(seconds / self._counts, BLOCK_S)
        self._blocks = np.where(np.arange(BLOCKS)[:, None] < self._counts, held, 0.0)
        self._lanes = np.arange(len(seconds))
        self._at = np.full(len(seconds), -1)

    def hold(self, wanted: Numbers, seen: Observed) -> Numbers:
        """A maximum over time, from those of the last blocks."""
        at = (seen.steps * seen.step_s // self._length).astype(int)
        slot, new = at % self._counts, np.flatnonzero(at != self._at)
        self._blocks[slot[new], new] = 0.0
        self._at = at
        self._blocks[slot, self._lanes] = np.maximum(self._blocks[slot, self._lanes], wanted)
        return np.asarray(self._blocks.max(axis=0))


# One setting for all clients, by what a replica takes to start; and that of a plan's first day, which has no past.
RULES = {
    5.0: ScalingRule(0.5, drain_of(5.0), 2400, 0),
    60.0: ScalingRule(0.65, drain_of(60.0), 2400, 1),
    180.0: ScalingRule(0.4, drain_of(180.0), 2400, 1),
}


@dataclass(frozen=True, slots=True)
class Plan:
    """The rule of each day, and the season of each day by slot."""

    rules: Sequence[ScalingRule]
    seasons: Sequence[Sequence[float]]


class Reactive:
    """Ours: the production rule, with the same settings each day or with a plan for each lane."""

    name = "ours, one setting"

    def __init__(self, start_s: Numbers, plans: Sequence[Plan] = ()) -> None:
        if plans:
            self.name = "ours"
        self._plans = plans or [Plan([RULES[float(start)]], []) for start in start_s]
        self._hold = Calm(np.full(len(start_s), float(HOLD_S)))
        self._demand, self._day, self._slot = np.zeros(len(start_s)), -1, -1

    def wanted(self, seen: Observed) -> Numbers:
        self._follow(seen.window * WINDOW_S)
        self._demand = self._calm.hold(seen.came, seen)
        wanted = np.ceil(self._demand / self._target + seen.backlog / self._drain - ROUNDING)
        wanted = np.maximum(wanted, (self._demand > TRACE) | (seen.backlog > TRACE))
        return self._hold.hold(np.maximum(wanted, self._least), seen)

    def _follow(self, now: float) -> None:
        """Take the rules of a new day, and the season of a new slot."""
        day, slot = int(now // DAY_S), int(now % DAY_S // (SLOT_MINUTES * 60))
        if day != self._day:
            self._rules = [plan.rules[min(day, len(plan.rules) - 1)] for plan in self._plans]
            self._target, self._drain, calm = (
                np.array([getattr(rule, name) for rule in self._rules], float) for name in ("target", "drain", "calm")
            )
            self._calm = Calm(calm, self._demand)
        if (day, slot) != (self._day, self._slot):
            seasons = [plan.seasons[day][slot] if plan.seasons else 0.0 for plan in self._plans]
            self._least = np.array([rule.least(busy) for rule, busy in zip(self._rules, seasons, strict=True)], float)
        self._day, self._slot = day, slot


class HpaUtilization:
    """The HPA on a value between 0 and 1 per replica, such as an engine's busy share or KV cache usage."""

    name = "KEDA, utilization"

    def __init__(self, start_s: Numbers, target: float = 0.7) -> None:
        self._target, self._calm = target, Calm(np.full(len(start_s), HPA_CALM_S))

    def wanted(self, seen: Observed) -> Numbers:
        share = np.clip(seen.flow(FAST_S * 3) / np.maximum(seen.serving, 1e-9), 0.0, 1.0)
        ratio = share / self._target
        wanted = np.where(np.abs(ratio - 1) <= 0.1, seen.serving, np.ceil(seen.serving * ratio - 1e-9))
        return _hpa(_activated(wanted, seen), seen, self._calm)


class HpaConcurrency:
    """The HPA on requests that run and wait, over a target: what a replica that is 70 % busy has on the mean."""

    name = "KEDA, concurrency"

    def __init__(self, start_s: Numbers, target: float = 0.7) -> None:
        self._target, self._calm = target, Calm(np.full(len(start_s), HPA_CALM_S))

    def wanted(self, seen: Observed) -> Numbers:
        per_replica = self._target * seen.usual_residence / seen.usual_seconds
        wanted = np.ceil(seen.in_flight / per_replica - 1e-9)
        now = seen.serving + seen.pending
        wanted = np.where(np.abs(wanted - now) <= 0.1 * now, now, wanted)
        return _hpa(_activated(wanted, seen), seen, self._calm)


class Wva:
    """Every 30 s: above 85 % of the supply that serves and starts, as much as is missing; below 70 %, one fewer."""

    name = "WVA"

    def __init__(self, start_s: Numbers) -> None:
        self._calm, self._last = Calm(np.full(len(start_s), HPA_CALM_S)), np.zeros(0)

    def wanted(self, seen: Observed) -> Numbers:
        if seen.steps % round(30 / seen.step_s) and len(self._last):
            return self._last
        full = seen.residence / seen.seconds  # requests of one full replica
        demand = np.minimum(seen.flow(SLOW_S), seen.serving) + seen.backlog / seen.seconds / np.maximum(full, 1e-9)
        supply = seen.serving + seen.pending
        more = np.ceil(np.maximum(demand / 0.85 - supply, 0.0) - 1e-9)
        spare = supply - demand / 0.70
        wanted = np.where(more > 0, supply + more, np.where(spare >= 1.0, supply - 1.0, supply))
        self._last = self._calm.hold(_activated(wanted, seen), seen)
        return self._last


class Clairvoyant:
    """Knows the mean rates until a replica that starts now serves, and keeps replicas `target` busy with them."""

    name = "clairvoyant"

    def __init__(self, start_s: Numbers, target: Numbers | float = 0.8) -> None:
        self._target = target

    def wanted(self, seen: Observed) -> Numbers:
        within = (seen.steps * seen.step_s - 1) % WINDOW_S + 1
        ahead = seen.window + ((within + seen.start_s + AHEAD_S) // WINDOW_S).astype(int)
        ahead = np.minimum(ahead, len(seen.demands) - 1)
        known = np.maximum(seen.demands[seen.window], seen.demands[ahead, np.arange(len(ahead))])
        # Copies of the window before are still under way.
        known = np.maximum(known, seen.demands[max(seen.window - 1, 0)] * (1 - within / WINDOW_S))
        return np.ceil(known / self._target - 1e-9)


def _activated(wanted: Numbers, seen: Observed) -> Numbers:
    """From none to one as soon as a request waits in the queue before the pods, which every rival has here, too."""
    return np.where((seen.serving + seen.pending == 0) & (seen.backlog > 0), 1.0, wanted)


def _hpa(wanted: Numbers, seen: Observed, calm: Calm) -> Numbers:
    """The HPA's default behaviour: up at once, but by at most 100 % or 4 pods in 15 s; down after 300 s."""
    now = seen.serving + seen.pending
    return calm.hold(np.minimum(wanted, np.maximum(2 * now, now + 4)), seen)
