"""Engines and users drawn at random, and slices of their traces."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from sidecar.events import RequestSize
from sidecar.health.latency_model import TOKEN_SECONDS
from sidecar.health.progress import SilenceLimits
from sidecar.load import cost_model
from sidecar.settings import Settings
from sim.engine import CHUNK_SHARE, FAMILY, QUANTUM_S
from sim.proofs import LEVELS
from sim.seqs import Site
from sim.traces import Arrival, Trace

MAX_ARRIVALS_PER_S = 1.5  # arrivals; bounds the cost of a simulated second
SHARE = 0.8  # of the least silence that can end in a kill, past which a gap is simulated in full resolution
LACKS = (
    frozenset(),
    frozenset(),
    frozenset(),
    frozenset({"iterations"}),
    frozenset({"kv_usage"}),
    frozenset({"kv_capacity"}),
    frozenset({"counters", "iterations"}),
)


@dataclass(frozen=True, slots=True)
class Load:
    """A trace's own load at the coefficients' speed: arrivals per second, prefill seconds and tokens per request."""

    per_second: float
    prefill: float
    output: float


def draw(rng: random.Random, traces: dict[str, Trace], co: cost_model.Coefficients) -> Site:
    """A site: a trace at 2 to 60 % of its hardware's prefill capacity; one in six far slower than predicted."""
    name = rng.choice(sorted(traces))
    load = load_of(traces[name], co)
    slowness = spread(rng, 3.0, 20.0) if rng.random() < 1 / 6 else spread(rng, 0.3, 3.0)
    batch = rng.choice((8, 16, 32, 64))
    token = co.d * FAMILY / 1000 * slowness / (1 - CHUNK_SHARE)
    most = min(MAX_ARRIVALS_PER_S, 0.6 * batch / (token * load.output))
    per_second = min(most, spread(rng, 0.02, 0.6) / (load.prefill * slowness))
    site = Site(
        trace=name,
        rate=per_second / load.per_second,
        slowness=slowness,
        starves=rng.random() < 0.3,
        max_batch=batch,
        streams=rng.choice((1.0, 1.0, 0.9, 0.5, 0.0)),
        lacks=rng.choice(LACKS),
        page=rng.random() < 0.9,
        shared=rng.random() < 0.1,
        ranks=rng.choice((1, 1, 1, 2, 4)),
        context=rng.choice((0, 131_072)),
    )
    if rng.random() < 1 / 8:
        site = replace(site, order="prefix", kind="sglang")
    site = with_proof(site)
    # Otherwise a whole answer could wait for any number of prefills.
    return replace(site, starves=False) if unseen(site) else site


def with_proof(site: Site) -> Site:
    """What can be seen of a site besides, drawn by all else of it: other draws stay what they are."""
    rng = random.Random(repr(site))
    return replace(site, proof=rng.choice(LEVELS), blocks=rng.random() < 0.5)


def unseen(site: Site) -> bool:
    """Whether tokens can go by unseen: answers in one piece, and no counters that show them."""
    return site.streams < 1 and ("counters" in site.lacks or not site.page)


def spread(rng: random.Random, low: float, high: float) -> float:
    """A number between the two, uniform in its logarithm."""
    return float(low * (high / low) ** rng.random())


@lru_cache
def load_of(trace: Trace, co: cost_model.Coefficients) -> Load:
    """Means over a trace."""
    n = len(trace)
    prefill = sum(cost_model.terms(RequestSize(a.prompt), co).before_first_token for a in trace) / n / 1000
    return Load(n / max(1.0, trace[-1].at), prefill, sum(a.output for a in trace) / n)


def slice_of(trace: Trace, start: float, rate: float, now: float) -> Iterator[Arrival]:
    """The trace from `start` (its own seconds), without end, at `rate` times its speed, beginning at `now`."""
    length = trace[-1].at + 1.0
    at = start % length
    i, base = bisect_left(trace, at, key=lambda a: a.at), -at
    while True:
        for a in trace[i:]:
            yield Arrival(now + (base + a.at) / rate, a.prompt, a.output)
        i, base = 0, base + length


@lru_cache
def prefills(trace: Trace, co: cost_model.Coefficients) -> tuple[float, ...]:
    """Seconds of prefill of each arrival, by the cost model."""
    return tuple(cost_model.terms(RequestSize(a.prompt), co).before_first_token / 1000 for a in trace)


def kill_bound() -> float:
    """Seconds of silence before which nothing is killed, whatever is allowed."""
    return Settings(engine="http://engine").silence_kill


def windows(
    trace: Trace, site: Site, co: cost_model.Coefficients, limits: SilenceLimits, kill: float
) -> list[tuple[float, int]]:
    """The arrivals of a trace around which this site could be silent for SHARE of the least silence that can end in a
    kill: (longest silence over least deadly one, place in the trace). `kill`: no shorter one is, whatever is allowed.
    """
    tail = longest_gap(Arrival(0.0, 1, longest_output(trace)), 0.0, site, co)
    # a shorter prefill cannot: most need no second look
    least = (SHARE * max(kill, limits.floor) - tail) * CHUNK_SHARE / site.slowness
    rows = ((i, a, p) for i, (a, p) in enumerate(zip(trace, prefills(trace, co), strict=True)) if p >= least)
    ratios = ((longest_gap(a, p, site, co) / max(kill, least_allowed(a, p, site, co, limits)), i) for i, a, p in rows)
    return [(ratio, i) for ratio, i in ratios if ratio > SHARE]


@lru_cache
def longest_output(trace: Trace) -> int:
    """Tokens of a trace's longest answer."""
    return max(a.output for a in trace)


def longest_gap(a: Arrival, prefill: float, site: Site, co: cost_model.Coefficients) -> float:
    """The longest silence that an arrival can cause in this engine model, seconds.

    Prefills end one after the other, in whatever order they were admitted, and each end is progress; a decode goes on
    next to them, or starves until they end. So between two signs of progress lies one prefill at most, and, where
    neither chunks nor counters show them, the tokens of an answer.
    """
    token = co.d * FAMILY / 1000 * site.slowness / (1 - CHUNK_SHARE)
    seen_after = a.output if unseen(site) else 1
    return prefill * site.slowness / CHUNK_SHARE + seen_after * token + 2 * QUANTUM_S


def least_allowed(a: Arrival, prefill: float, site: Site, co: cost_model.Coefficients, limits: SilenceLimits) -> float:
    """The least silence that the production code allows while that arrival is outstanding, with nothing learned."""
    token = min(TOKEN_SECONDS, 2 * co.d * FAMILY / 1000 * site.slowness)
    whole = max(a.output, 256) * token if unseen(site) and site.streams == 0 else 0.0
    return min(limits.cap, max(limits.floor, limits.margin * (prefill + whole)))
