"""What the simulated engine shows: its metrics page as a scrape reads it, and its health endpoint."""

from __future__ import annotations

from collections.abc import Iterable

from sidecar.readings import Absent, EngineSample, Failed, RankSample, Reading, Value
from sim.engine import Engine
from sim.seqs import Seq

SERIES = ("kv_usage", "iterations", "counters", "kv_capacity", "started")  # what a metrics page may lack
NO_PAGE = Absent("the engine has no metrics page")


def sample(e: Engine, now: float, wall_offset: float) -> Reading[EngineSample]:
    """The metrics page, as a scrape reads it."""
    how, site = e.how, e.site
    if not site.page or how.metrics == "none":
        return NO_PAGE
    if not how.answering or how.metrics == "garbage" or not how.port_open:
        return Failed("the metrics page could not be read")
    if how.serial and (e.running or e.waiting):
        return Failed("the metrics page did not answer in time")
    share, offset = backend(site.backends, now)
    running, waiting = (0.0, 0.0) if how.gauges_zeroed else (share * gauge for gauge in e.gauges)
    kv = min(1.0, sum(s.computed() for s in e.running if not s.shadow) / site.kv_tokens)
    c, lacks = e.counters, site.lacks
    counted = "counters" not in lacks
    return Value(
        EngineSample(
            running=running,
            waiting=waiting,
            kv_usage=None if "kv_usage" in lacks else kv if how.kv_usage is None else how.kv_usage,
            prompt_tokens=offset + share * c.prompt if counted else None,
            generation_tokens=offset + share * c.generation if counted else None,
            finished=offset + share * c.finished if counted else None,
            iterations=None if "iterations" in lacks else offset + share * c.iterations,
            started_wall=None if "started" in lacks else e.started + wall_offset + offset / 1000,
            sleeping=how.sleeping,
            kv_capacity_tokens=None if "kv_capacity" in lacks else float(site.kv_tokens),
            ranks=ranks(e) if site.ranks > 1 and counted else (),
        ),
        now,
    )


def backend(number: int, now: float) -> tuple[float, float]:
    """The share of all work that the process has which answers now, and from where it counts."""
    which = int(now) * 7919 % number
    return 2 * (which + 1) / (number * (number + 1)), 1000.0 * which


def ranks(e: Engine) -> tuple[RankSample, ...]:
    """Each data-parallel rank's own numbers."""

    def count(place: Iterable[Seq], rank: int) -> float:
        is_zero = e.zero_gauge and rank == e.how.dead_rank
        return 0.0 if is_zero else float(sum(s.rank == rank and not s.shadow for s in place))

    return tuple(
        RankSample(rank, count(e.running, rank), count(e.waiting, rank), e.counters.ranks[rank])
        for rank in range(e.site.ranks)
    )


def health(e: Engine) -> tuple[int, float]:
    """What `/health` answers: status (0 where it answers nothing) and seconds; infinity when it does not."""
    if not e.how.answering or not e.how.port_open:
        return 0, float("inf")
    if e.how.loading:
        return 503, 0.01
    wait = 0.0
    if e.how.serial:
        wait = sum(max(0.0, s.need - s.done) * e.site.slowness for s in (*e.running, *e.waiting))
    return e.how.health_status, 0.01 + e.how.health_delay + e.lag + wait
