"""What must be found: the hang modes of docs/health.md as rows of the product's own fault table, under four kinds of load.

Rules: each trial is a served engine with 60 s of history, then the fault at a drawn moment, then at most HORIZON seconds. A
part that hangs alone is found when readiness is withdrawn; the whole, when liveness fails. A start-up that never ends is the
startup probe's to find, for every detector.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from sidecar import units
from sidecar.facts import Work
from sim.engine import Site
from sim.sites import spread
from sim.traces import Arrival
from sim.world import UNLIVE, UNREADY, World

HORIZON = 600.0
LOADS = ("idle", "decoding", "short prefill", "long prefill")
BUSY = LOADS[1:]


@dataclass(frozen=True, slots=True)
class Mode:
    """One row: its number in docs/health.md, the fault, under which loads it can show, and what sets it off."""

    number: int
    text: str
    fault: str
    loads: tuple[str, ...] = LOADS
    parameters: dict[str, float] = field(default_factory=dict)
    trigger: Callable[[World], None] | None = None
    part: bool = False  # only a part of the engine hangs
    kv_tokens: int = 600_000
    ranks: int = 1


def oversized(w: World) -> None:
    """A prompt larger than the KV cache."""
    w.request(w.site.kv_tokens + 1, 10)


def client_aborts(w: World) -> None:
    """A client hangs up."""
    seq = w.request(4000, 5000)
    w.run(1)
    if seq is not None:
        w.abort(seq)


def first_after_idle(w: World) -> None:
    """A request after the idle time."""
    w.run(1)
    w.request(500, 50)


def new_process(w: World) -> None:
    """The engine was started anew, and its start-up hangs."""
    w.restart_engine(10.0)
    w.engine.fault("start_hang")


MODES: tuple[Mode, ...] = (
    Mode(1, "core dead, API answers", "freeze"),
    Mode(2, "running 0, waiting > 0", "freeze_admission"),
    Mode(3, "head larger than the KV cache", "oversized_head", LOADS[:3], trigger=oversized, kv_tokens=100_000),
    Mode(4, "KV pressure deadlock", "kv_deadlock"),
    Mode(5, "livelock at 100 % CPU", "livelock"),
    Mode(6, "grammar freeze", "freeze_busy"),
    Mode(7, "one of two ranks stops", "one_rank", BUSY, {"rank": 0}, part=True, ranks=2),
    Mode(8, "NCCL hang", "freeze_busy"),
    Mode(9, "decode 0, prefill goes on", "freeze_decode", BUSY, part=True),
    Mode(10, "deadlock in graph capture", "start_hang", ("idle",), trigger=new_process, part=True),
    Mode(11, "core dies, parent stays", "core_dead"),
    Mode(12, "API loop blocked for minutes", "api_block"),
    Mode(13, "one chunk, then silence", "first_chunk_then_silence", part=True),
    Mode(14, "one stream never ends", "one_stream", ("decoding", "short prefill"), part=True),
    Mode(15, "transfer queue stuck", "transfer_stuck"),
    Mode(16, "abort wedges the engine", "wedge_on_abort", trigger=client_aborts),
    Mode(17, "first request after idle hangs", "hang_after_idle", ("idle",), {"idle": 30}, first_after_idle),
    Mode(18, "GPU fault, process alive", "freeze_busy"),
    Mode(19, "start-up never ends", "start_hang", ("idle",), trigger=new_process, part=True),
    Mode(20, "iterates, delivers nothing", "livelock"),
    Mode(22, "stuck near max length", "stuck_near_limit", BUSY, part=True),
)


@dataclass(frozen=True, slots=True)
class Trial:
    """What one trial found: seconds from the fault to each detector's detection (None: not within HORIZON)."""

    mode: int
    load: str
    part: bool
    predicted: float  # seconds of prefill, by the cost model, that were outstanding at the fault
    liveness: float | None
    readiness: float | None
    reason: str
    before: str  # the verdict at the fault
    baselines: dict[str, float | None]
    trail: tuple[tuple[float, str, str], ...]


def arrivals(w: World, load: str) -> Iterator[Arrival] | None:
    """The requests of a load; None where there are none."""
    if load == "idle":
        return None
    return poisson(w, *{"decoding": (300, 400), "short prefill": (3000, 60), "long prefill": (1000, 100)}[load])


def poisson(w: World, prompt: int, output: int) -> Iterator[Arrival]:
    """One request in two seconds, sizes within a factor of two."""
    at = w.now
    while True:
        at += w.rng.expovariate(0.5)
        yield Arrival(at, int(spread(w.rng, prompt / 2, prompt * 2)), int(spread(w.rng, output / 2, output * 2)))


def made_for(mode: Mode, rng: random.Random) -> World:
    """A world whose engine can show the mode; speeds and habits are drawn."""
    site = Site(
        slowness=spread(rng, 0.3, 3.0), starves=rng.random() < 0.5, kv_tokens=mode.kv_tokens, ranks=mode.ranks,
        lacks=rng.choice((frozenset(), frozenset({"iterations"}))),
    )  # fmt: skip
    return World(site, rng)


def trial(w: World, mode: Mode, load: str, horizon: float = HORIZON) -> Trial:
    """One fault of one mode under one load, on a world that was made for it."""
    w.run(15)
    w.traffic(arrivals(w, "short prefill" if load == "idle" else load))
    w.run(60)
    if load == "idle":
        w.drained(300)
        w.run(spread(w.rng, 60, 90))
    if load == "long prefill":
        w.request(int(spread(w.rng, 100_000, 250_000)), 50)
        w.run(spread(w.rng, 1, 10))
    w.run(w.rng.randrange(8) / 2)
    predicted, before, at = outstanding(w), w.verdict, w.now
    strike(w, mode)
    at = w.now if mode.fault == "start_hang" else at  # it hangs once the new process has opened its port
    while w.now - at < horizon and not over(w, at):
        w.tick()
    return result(w, mode, load, predicted, before, at)


def strike(w: World, mode: Mode) -> None:
    """Begin the fault, and what sets it off."""
    if mode.fault != "start_hang":
        w.engine.fault(mode.fault, **mode.parameters)
    if mode.trigger is not None:
        mode.trigger(w)


def over(w: World, at: float) -> bool:
    """Whether all have spoken."""
    return w.first(UNLIVE, at) is not None and all(b.failing_since is not None for b in w.baselines)


def outstanding(w: World) -> float:
    """Seconds of prefill that are outstanding, by the cost model."""
    waiting = (s for s in w.users.values() if not s.first)
    return sum(units.terms(Work(s.prompt), w.co).before_first_token for s in waiting) / 1000


def result(w: World, mode: Mode, load: str, predicted: float, before: str, at: float) -> Trial:
    live, ready = w.first(UNLIVE, at), w.first(UNREADY, at)
    found = [c for c in w.trail if c.at >= at and c.state in UNREADY]
    return Trial(
        mode.number, load, mode.part, predicted, None if live is None else live - at, None if ready is None else ready - at,
        f"{found[-1].state}/{found[-1].reason}" if found else "-", before,
        {b.name: None if b.failing_since is None else max(0.0, b.failing_since - at) for b in w.baselines},
        tuple((c.at - at, c.state, c.reason) for c in w.trail if c.at >= at - 30)[:30],
    )  # fmt: skip
