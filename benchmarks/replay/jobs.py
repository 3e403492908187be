"""Which fleets are simulated under which traffic, and the results of each run.

Load is the mean work of the trace over the capacity of a fleet that is never idle, both of the simulated engine, so
that no policy's price decides how hard the test is. For routing, the trace is compressed in time to that load; each
seed replays up to MAX_REQUESTS of another third of it. For autoscaling the time is unchanged, and each request arrives
several times (as from more users), so that one to a few dozen replicas are needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from replay import requests
from replay.engine import Hardware, busy_seconds
from replay.fleet import Fleet, Outcome
from replay.requests import Request
from replay.routing import OURS, POLICIES
from replay.scaling import Scaling, Signal

FAST = Hardware()
SLOW = FAST.slower(2.0)
MAX_PER_TOKEN_S = 0.1
# Share of the requests within the SLO.
MIN_KEPT_SHARE = 0.99


@dataclass(frozen=True, slots=True)
class Service:
    """How a trace is used. `first`: SLO in seconds to the first token; `copies` of each request for autoscaling."""

    first: float
    copies: int


# 2 s and 0.1 s a token: MLPerf Inference's server scenario for an 8B model. 30 s: the SLO of the Mooncake paper for its
# long prompts.
SERVICES = {
    "azure-2023-code": Service(2.0, 4),
    "azure-2023-conversation": Service(2.0, 2),
    "mooncake-conversation": Service(30.0, 1),
}
LOADS = (0.5, 0.8)
PACES = ((30.0, 600.0), (30.0, 120.0), (5.0, 30.0))  # seconds to start a replica, seconds of calm before one is stopped
TARGETS: dict[Signal, tuple[float, ...]] = {
    "utilization": (0.35, 0.7, 1.4),  # deploy/ has 0.7
    "stock and flow": (0.1, 0.2, 0.4),
    "requests": (4.0, 8.0, 16.0),
}
MAX_REPLICAS = 64
MAX_REQUESTS = 3000
# Part of the trace that is used for autoscaling.
SCALING_TRACE_S = 1200.0


@dataclass(frozen=True, slots=True)
class Job:
    """One run; with `signal` "static", the search for the smallest fleet that meets the SLO."""

    trace: str
    seed: int
    policy: int = 0
    load: float = 0.0
    replicas: int = 0
    slow: int = 0
    signal: str = ""  # an autoscaler's, or "static"; empty for routing
    target: float = 0.0
    pace: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Routed:
    """The result of a policy on one trace at one load. Seconds, shares."""

    job: Job
    p50: float
    p99: float
    kept: float  # share within the SLO
    busy: float
    preemptions: int


@dataclass(frozen=True, slots=True)
class Scaled:
    """The result of a fleet of changing size on one trace."""

    job: Job
    kept: float
    p99: float
    gpu_hours: float
    most: int


def routing(replicas: int, seeds: Iterable[int], trace: str = "", *, quick: bool = False) -> list[Job]:
    """Every policy under every trace and load, with equal replicas and with one slow one."""
    mixes = [(load, 0) for load in LOADS] + [(LOADS[0], 1)]
    return [
        Job(name, seed, policy, load, replicas, slow)
        for name in ([trace] if trace else SERVICES)
        for load, slow in (mixes[1:2] if quick else mixes)
        for seed in seeds
        for policy in range(len(POLICIES))
    ]


def scaling(seed: int, trace: str = "", *, quick: bool = False) -> list[Job]:
    """Every signal at several targets; the pace is varied on the burstiest trace."""
    found = []
    for name in [trace] if trace else SERVICES:
        paces = PACES[1:2] if quick or name != "azure-2023-code" else PACES
        found.append(Job(name, seed, signal="static"))
        for pace in paces:
            for signal, targets in TARGETS.items():
                found += [
                    Job(name, seed, signal=signal, target=t, pace=pace) for t in (targets[1:2] if quick else targets)
                ]
    return found


def run(job: Job, folder: Path) -> Routed | Scaled:
    """Run one job. Deterministic in its arguments."""
    trace = loaded(folder)[job.trace]
    if not job.signal:
        return _route(job, trace, saturated(folder, job.trace))
    service = SERVICES[job.trace]
    more = requests.multiplied([r for r in trace if r.at < SCALING_TRACE_S], service.copies, job.seed)
    return _smallest(job, more) if job.signal == "static" else _scale(job, more)


@lru_cache
def loaded(folder: Path) -> dict[str, list[Request]]:
    """The traces, once per process."""
    return requests.load(folder)


@lru_cache
def saturated(folder: Path, name: str) -> float:
    """Seconds that one fast engine needs for a whole trace when requests always wait."""
    return busy_seconds(loaded(folder)[name], FAST)


def _route(job: Job, trace: list[Request], work: float) -> Routed:
    capacity = job.replicas - job.slow / 2
    factor = job.load * capacity / (work / trace[-1].at)
    length = len(trace) // 3
    first = (job.seed - 1) % 3 * length
    part = requests.compressed(trace[first : first + min(length, MAX_REQUESTS)], factor)
    part = [Request(r.at - part[0].at, r.prompt, r.output, r.text_bytes, r.blocks) for r in part]
    hardware = [FAST] * (job.replicas - job.slow) + [SLOW] * job.slow
    outcome = Fleet(hardware, POLICIES[job.policy], str(job.seed)).run(part)
    times = firsts(outcome)
    busy = outcome.busy_seconds / job.replicas / outcome.ends_at
    return Routed(job, quantile(times, 0.5), quantile(times, 0.99), kept(outcome, job.trace), busy, outcome.preemptions)


def _scale(job: Job, trace: list[Request]) -> Scaled:
    startup, calm = job.pace
    signal = next(signal for signal in TARGETS if signal == job.signal)
    policy = Scaling(signal, job.target, calm=calm, startup=startup, most=MAX_REPLICAS)
    return _scaled(job, Fleet([FAST], OURS, str(job.seed), policy, flush=1.0).run(trace))


def _smallest(job: Job, trace: list[Request]) -> Scaled:
    """The smallest static fleet that meets the SLO, by bisection; the largest allowed if none does."""
    low, high = 0, MAX_REPLICAS
    best: Scaled | None = None
    while high - low > 1:
        middle = (low + high) // 2 if low else min(8, high - 1)
        found = _scaled(job, Fleet([FAST] * middle, OURS, str(job.seed), flush=1.0).run(trace))
        if found.kept >= MIN_KEPT_SHARE:
            high, best = middle, found
        else:
            low = middle
    return best or _scaled(job, Fleet([FAST] * MAX_REPLICAS, OURS, str(job.seed), flush=1.0).run(trace))


def _scaled(job: Job, outcome: Outcome) -> Scaled:
    times = firsts(outcome)
    return Scaled(
        job, kept(outcome, job.trace), quantile(times, 0.99), outcome.gpu_seconds / 3600, outcome.most_replicas
    )


def kept(outcome: Outcome, trace: str) -> float:
    """The share of requests within the SLO."""
    most = SERVICES[trace].first
    return sum(s.first <= most and s.per_token <= MAX_PER_TOKEN_S for s in outcome.served) / len(outcome.served)


def firsts(outcome: Outcome) -> list[float]:
    """Seconds to the first token, in order."""
    return sorted(s.first for s in outcome.served)


def quantile(ordered: list[float], share: float) -> float:
    """The nearest-rank quantile of at least one value."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
