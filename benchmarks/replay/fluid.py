"""A fluid model of fleets over weeks: many lanes at once, each a client, a seed, a start time and a policy.

Work arrives as an amount for each step, served first come, first served by the replicas that serve. What it leaves out,
discrete events have (fleet.py): single requests, batches, the KV cache. `weeks.py` holds one against the other.

A first token is in time if its work waits no longer than the objective less its own prefill. Requests that come while
no replica serves wait in a queue before the pods. Time of a replica counts from its start command until it is gone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from replay.clients import WINDOW_S, Client, Numbers, shifts
from replay.policies import Observed, Policy

STEP_S = 10.0
FIRST_TOKEN_S = 2.0
MOST_REPLICAS = 64
WAITS = np.array(
    [0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 15, 20, 30, 45, 60, 90, 120, 180, 240, 300, 600, 1e9]
)
CHUNK_STEPS = int(WINDOW_S / STEP_S)


@dataclass(frozen=True, slots=True)
class Lane:
    """One fleet. `floor`: replicas that never stop. `static`: a fleet of that size, whatever the policy says."""

    client: Client
    seed: int
    start_s: float
    floor: int
    static: int = 0


@dataclass(slots=True)
class Kept:
    """What came of each lane: shares of requests, seconds, replica hours, requests."""

    kept: Numbers
    p99: Numbers
    hours: Numbers
    requests: Numbers
    most: Numbers
    by_window: Numbers = field(
        default_factory=lambda: np.zeros(0)
    )  # (window, 4, lane): replicas, demand, kept, requests

    def of(self, lanes: slice) -> Kept:
        """That of some lanes."""
        each = (self.kept, self.p99, self.hours, self.requests, self.most, self.by_window)
        return Kept(*(numbers[..., lanes] for numbers in each))


class Arrivals:
    """The work of each step, in seconds of a replica; the same for all policies, start times and sizes of a seed."""

    def __init__(self, lanes: Sequence[Lane]) -> None:
        keys = [(lane.client.name, lane.client.gaps, lane.seed) for lane in lanes]
        clients = dict(zip(keys, (lane.client for lane in lanes), strict=True))
        self._clients = list(clients.values())
        self._random = [np.random.default_rng([seed, *name.encode(), *gaps.encode()]) for name, gaps, seed in clients]
        self._before = [
            _share_before(client, seed) for client, (_, _, seed) in zip(self._clients, clients, strict=True)
        ]
        order = list(clients)
        self._of = np.array([order.index(key) for key in keys])

    def window(self, number: int) -> tuple[Numbers, Numbers]:
        """(step, lane): requests and work of a window, in which some copies are still in the window before."""
        counts, works = [], []
        for client, drawn, late in zip(self._clients, self._random, self._before, strict=True):
            before = max(number - 1, 0)
            rate = client.rate[before] * late + client.rate[number] * (1 - late)
            mean = np.maximum(rate * STEP_S, 1e-12)
            dispersion = max(float(client.dispersion[number]), float(client.dispersion[before]) if late[0] else 0.05)
            seconds, moment = float(client.seconds[number]), float(client.second_moment[number])
            count = drawn.gamma(mean / dispersion, dispersion)
            # The work of so many requests of random sizes.
            spread = np.maximum(count * (moment - seconds**2), 1e-18)
            work = drawn.gamma(
                np.maximum((count * seconds) ** 2 / spread, 1e-9), spread / np.maximum(count * seconds, 1e-12)
            )
            counts.append(np.where(rate > 0, count, 0.0))
            works.append(np.where(rate > 0, work, 0.0))
        return np.array(counts).T[:, self._of], np.array(works).T[:, self._of]


def _share_before(client: Client, seed: int) -> Numbers:
    """The share of copies that are late, by step of a window."""
    late = np.array(shifts(client, random.Random(f"{client.name}:{seed}")))
    middle = (np.arange(CHUNK_STEPS) + 0.5) * STEP_S
    return np.asarray((late[None, :] > middle[:, None]).mean(axis=1))


def run(lanes: Sequence[Lane], policy: Policy, windows: range) -> Kept:
    """Serve the windows. All lanes follow one policy, in which start times and floors differ."""
    count = len(lanes)
    arrivals, observed = Arrivals(lanes), Observed.of(lanes, STEP_S)
    delay = np.array([int(lane.start_s // STEP_S) for lane in lanes])
    late = np.array([lane.start_s % STEP_S / STEP_S for lane in lanes])  # of a step, in which a replica begins to serve
    floor = np.array([float(lane.static or lane.floor) for lane in lanes])
    is_static = np.array([lane.static > 0 for lane in lanes])
    ring, index = np.zeros((int(delay.max()) + 1, count)), np.arange(count)
    serving, pending, backlog = floor.copy(), np.zeros(count), np.zeros(count)
    next_start = np.full(count, np.inf)  # seconds until the first pending replica serves
    kept, asked, hours, most = np.zeros(count), np.zeros(count), np.zeros(count), floor.copy()
    waits, by_window = np.zeros((len(WAITS), count)), []
    for number in windows:
        counts, works = arrivals.window(number)
        own = np.array([lane.client.prefill[number] for lane in lanes])
        bound = np.maximum(FIRST_TOKEN_S - own, 0.0)
        observed.enter(lanes, number)
        sums = np.zeros((4, count))
        for step in range(CHUNK_STEPS):
            slot = observed.steps % len(ring)
            started = ring[slot].copy()
            ring[slot] = 0.0
            all_serving, pending = serving + started, pending - started
            serving = all_serving - started * late  # on the mean of the step
            next_start = np.where(pending > 0, np.maximum(next_start - STEP_S, STEP_S), np.inf)
            work, requests = works[step], counts[step]
            capacity = serving * STEP_S
            in_time = _share_in_time(backlog, work / STEP_S, serving, bound)
            kept += in_time * requests
            asked += requests
            middle = np.where(
                serving > 0,
                np.maximum(backlog + (work - capacity) / 2, 0.0) / np.maximum(serving, 1e-9),
                np.where(pending > 0, next_start + backlog / np.maximum(pending, 1.0), 3600.0),
            )
            waits[np.searchsorted(WAITS, middle + own), index] += requests
            served = np.minimum(backlog + work, capacity)
            backlog = backlog + work - served
            serving = all_serving
            observed.see(work=work, served=served, backlog=backlog, serving=serving, pending=pending)
            hours += (serving + pending) * (STEP_S / 3600)
            sums += (serving + pending, work / STEP_S, in_time * requests, requests)
            if not is_static.all():
                wanted = np.where(is_static, floor, np.clip(policy.wanted(observed), floor, MOST_REPLICAS))
                more = np.maximum(wanted - serving - pending, 0.0)
                ring[(observed.steps + delay) % len(ring), index] += more
                next_start = np.where((pending == 0) & (more > 0), delay * STEP_S, next_start)
                pending = pending + more
                fewer = np.maximum(serving + pending - wanted, 0.0)
                # What starts is not cut short; with work left, one of the last stays.
                least = np.where((backlog > 0) & (pending == 0), 1.0, 0.0)
                serving = np.maximum(serving - fewer, np.minimum(serving, least))
                most = np.maximum(most, serving + pending)
        sums[:2] /= CHUNK_STEPS
        by_window.append(sums)
    shares = np.cumsum(waits, axis=0) / np.maximum(asked, 1e-9)
    p99 = WAITS[np.argmax(shares >= 0.99, axis=0)]
    return Kept(kept / np.maximum(asked, 1e-9), p99, hours, asked, most, np.array(by_window))


def _share_in_time(backlog: Numbers, rate: Numbers, serving: Numbers, bound: Numbers) -> Numbers:
    """The share of a step's arrivals that wait at most `bound`: backlog + (rate - serving) * t <= bound * serving."""
    growth = rate - serving
    growth += 1e-9 * (np.abs(growth) < 1e-9)
    until = np.clip((bound * serving - backlog) / growth, 0.0, STEP_S) / STEP_S
    return np.where(growth > 0, until, 1.0 - until) * (serving > 0)
