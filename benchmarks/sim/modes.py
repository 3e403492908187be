"""What must be found: the hang modes of docs/health.md as rows of the product's own fault table, and the field's
reports of hangs that stayed, under the loads that can show them.

Rules: each trial is a served engine with 60 s of history, then the fault at a drawn moment, then at most HORIZON_S
seconds. What is owed and which reason codes are right stand in the product's catalogue
(`sidecar.tools.scripted_engine.hang_catalogue`) and are not repeated here: liveness that fails, readiness that is
withdrawn, the one request that is ended, or a start-up with its reason. Mode 21 is an alarm here, and mode 23
(garbage) cannot be seen in a simulation without text.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from sidecar.events import RequestSize
from sidecar.load import cost_model
from sidecar.tools.scripted_engine.hang_catalogue import MODES as CATALOGUE
from sidecar.tools.scripted_engine.hang_catalogue import HangCase
from sim.engine import CHUNK_SHARE
from sim.proofs import HANGS
from sim.seqs import PLAIN, Site, Special
from sim.sites import spread, with_proof
from sim.traces import Arrival
from sim.world import UNLIVE, UNPROVEN, UNREADY, Change, Ended, World

HORIZON_S = 600.0
START_HORIZON_S = 1000.0  # the same for start-ups: they may compile for the cap
RESTART_HORIZON_S = 2400.0  # the same for restarts: a healthy one may take 20 minutes
FULL_HORIZON_S = 300.0  # the same behind a full queue, where each second costs most
FULL = "full queue"  # 200 prompts of 4,000 tokens behind those that decode
LOADS = ("idle", "decoding", "short prefill", "long prefill", FULL)
BUSY = LOADS[1:4]
SPECIAL = {  # loads of one mode each: what its users ask for, the tokens of their prompts and of what comes back
    "embeddings": (Special(route="embeddings"), 3000, 1),
    "transcription": (Special(route="transcription", seconds=1.0), 100, 1),
}
FIRST_FIELD = 100  # numbers from here on: the kind of the field's report, and which of that kind
FIELD = (
    HangCase(111, "No canary passes; the core freezes in a step.", ("freeze_busy",), "liveness", ("no_progress",)),
    HangCase(112, "The same without a metrics page.", ("freeze_busy",), "liveness", ("no_progress",)),
    HangCase(113, "The same at an engine of embeddings.", ("freeze_busy",), "liveness", ("no_progress",)),
    HangCase(121, "A bounded queue is full, the core freezes; canaries get 503.", ("freeze_busy",), "liveness",
             ("no_progress",)),
    HangCase(122, "After a fault all is refused at once with 503.", ("refuse_all",), "liveness", ("refuses_work",)),
    HangCase(141, "The core freezes behind 200 waiting prompts.", ("freeze_busy",), "liveness", ("no_progress",)),
    HangCase(142, "An engine of embeddings freezes.", ("freeze_busy",), "liveness", ("no_progress",)),
    HangCase(143, "An engine of transcriptions freezes.", ("freeze_busy",), "liveness", ("no_progress",)),
    HangCase(151, "Restarted inside its container, it takes connections and answers nothing.", ("api_block",),
             "liveness", ("startup_stuck", "api_blocked")),
    HangCase(152, "Restarted inside its container, it loads forever.", ("start_hang",), "liveness",
             ("startup_stuck",)),
    HangCase(161, "Zombies hold all slots; users leave after 30 s.", ("zombies",), "readiness", ("work_unserved",)),
    HangCase(205, "The worker behind the front is lost: 404 to all.", ("worker_lost",), "liveness", ("refuses_work",)),
    HangCase(210, "One of two listeners answers nothing.", ("deaf_listener",), "readiness", ("connection_silent",)),
    HangCase(211, "A rank stops, and its gauge reads 0.", ("one_rank", "rank_gauge_stands"), "readiness",
             ("rank_silent",)),
)  # fmt: skip
CASES = {case.number: case for case in (*CATALOGUE, *FIELD)}
UNEXPLAINED = ("no_progress", "canary_lost")  # what is right where nothing but a canary's silence can be seen


@dataclass(frozen=True, slots=True)
class Mode:
    """One row: its number in docs/health.md, the fault, under which loads it can show, and what sets it off."""

    number: int
    fault: str
    loads: tuple[str, ...] = LOADS
    parameters: dict[str, float] = field(default_factory=dict)
    trigger: Callable[[World], None] | None = None
    kv_tokens: int = 600_000
    ranks: int = 1
    late: bool = False  # the hang begins when the trigger is over
    site: dict[str, object] = field(default_factory=dict)
    horizon: float = HORIZON_S

    @property
    def is_field(self) -> bool:
        """Whether it is one of the field's reports, which are not held against the other detectors."""
        return self.number >= FIRST_FIELD

    @property
    def case(self) -> HangCase:
        """What is owed, and the reasons that are right."""
        return CASES[self.number]

    @property
    def whole(self) -> bool:
        """Whether the whole engine hangs, so that liveness must fail."""
        return self.case.owed == "liveness"


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
    """The engine was restarted, and its start-up hangs."""
    w.restart_engine(10.0)
    w.engine.fault("start_hang")


def new_and_silent(w: World) -> None:
    """The engine was restarted at once, and answers nothing."""
    w.restart_engine(2.0)
    w.engine.fault("api_block")


def new_and_loading(w: World) -> None:
    """The engine was restarted at once, and loads forever."""
    w.restart_engine(2.0)
    w.engine.fault("start_hang")


def break_off(w: World) -> None:
    """All requests end with an error."""
    for seq in list(w.users.values()):
        w.abort(seq, "engine_error")


def overfill(w: World) -> None:
    """Prompts that fill every queue."""
    for _ in range(200):
        w.request(4000, 50)


def leave_early(w: World) -> None:
    """Users leave after 30 s."""
    w.patience = 30.0


def gauge_stands(w: World) -> None:
    """The gauge of the dead rank reads 0."""
    w.engine.fault("rank_gauge_stands")


def long_one(w: World) -> None:
    """One request that is longer than all others, come to its end."""
    seq = w.request(1000, 1000)
    until = w.now + 120
    while seq is not None and seq.sent < seq.limit - 1 and w.now < until:
        w.tick()


def gpu_fault(w: World) -> None:
    """The driver reports an XID (31: a page fault of the GPU's memory)."""
    w.xid(31)


SHORT = {"short": 900.0}  # tokens up to which sequences end

MODES: tuple[Mode, ...] = (
    Mode(1, "freeze"),
    Mode(2, "freeze_admission"),
    Mode(3, "oversized_head", LOADS[:3], trigger=oversized, kv_tokens=100_000),
    Mode(4, "kv_deadlock"),
    Mode(5, "livelock"),
    Mode(6, "freeze_busy"),
    Mode(7, "one_rank", BUSY, {"rank": 0}, ranks=2),
    Mode(8, "freeze_busy"),
    Mode(9, "freeze_decode", BUSY),
    Mode(10, "start_hang", ("idle",), trigger=new_process, late=True),
    Mode(11, "core_dead"),
    Mode(12, "api_block"),
    Mode(13, "first_chunk_then_silence", BUSY),
    Mode(14, "one_stream", ("decoding", "short prefill")),
    Mode(15, "transfer_stuck"),
    Mode(16, "wedge_on_abort", trigger=client_aborts),
    Mode(17, "hang_after_idle", ("idle",), {"idle": 30}, first_after_idle),
    Mode(18, "gpu_fault", trigger=gpu_fault),
    Mode(19, "start_hang", ("idle",), trigger=new_process, late=True),
    Mode(20, "livelock"),
    Mode(22, "stuck_near_limit", BUSY, SHORT, long_one, late=True),
)

UNCOUNTED: dict[str, object] = {"lacks": frozenset({"counters", "iterations"})}
NO_CANARY: dict[str, object] = {"takes_canary": False}
FIELD_MODES: tuple[Mode, ...] = (
    Mode(111, "freeze_busy", ("decoding",), site=NO_CANARY),
    Mode(112, "freeze_busy", ("decoding",), site={**NO_CANARY, "page": False}),
    Mode(113, "freeze_busy", ("embeddings",), site={**NO_CANARY, **UNCOUNTED}),
    Mode(121, "freeze_busy", (FULL,), trigger=overfill, site={"queue": 64}),
    Mode(122, "refuse_all", ("idle", "decoding"), trigger=break_off),
    Mode(141, "freeze_busy", (FULL,)),
    Mode(142, "freeze_busy", ("embeddings",), site=UNCOUNTED),
    Mode(143, "freeze_busy", ("transcription",), site=UNCOUNTED),
    Mode(151, "api_block", ("idle", "decoding"), trigger=new_and_silent, late=True, horizon=RESTART_HORIZON_S),
    Mode(152, "start_hang", ("idle", "decoding"), trigger=new_and_loading, late=True, horizon=RESTART_HORIZON_S),
    Mode(161, "zombies", ("decoding",), trigger=leave_early),
    Mode(205, "worker_lost", ("idle", "decoding"), trigger=break_off),
    Mode(210, "deaf_listener", ("idle",)),
    Mode(211, "one_rank", ("decoding",), {"rank": 0}, gauge_stands, ranks=2),
)


@dataclass(frozen=True, slots=True)
class Trial:
    """What one trial found: seconds from the fault to each detection (None: not within the horizon).

    `found`: what is owed came, with whatever reason; `right`: it came with a right one. `predicted` and `real`: seconds
    of prefill that were outstanding at the fault, by the cost model, and as this site would have taken them;
    `expected`: as the sidecar itself expected after what it had learned.
    """

    mode: int
    load: str
    owed: str
    level: str  # what can be seen of the engine besides
    proof: str  # of the verdict that failed liveness
    predicted: float
    real: float
    expected: float
    liveness: float | None
    readiness: float | None
    since_token: float | None  # the same from the engine's last token, where that came after the fault
    ended: float | None  # the first request that the control aborted
    found: float | None
    right: bool
    reasons: tuple[str, ...]  # all that were given, in order
    before: str  # the verdict when the fault began
    baselines: dict[str, float | None]  # their first failing check
    kills: dict[str, float | None]  # when those would have killed
    trail: tuple[tuple[float, str, str], ...] = ()

    @property
    def whole(self) -> bool:
        """Whether it is a hang of the whole engine that all detectors are held against."""
        return self.owed == "liveness" and not self.is_field

    @property
    def is_field(self) -> bool:
        return self.mode >= FIRST_FIELD


def arrivals(w: World, load: str) -> Iterator[Arrival] | None:
    """The requests of a load; None where there are none."""
    if load == "idle":
        return None
    sizes = {"decoding": (300, 400), "short prefill": (3000, 60), "long prefill": (1000, 100), FULL: (300, 400)}
    return poisson(w, *(sizes[load] if load in sizes else SPECIAL[load][1:]))


def poisson(w: World, prompt: int, output: int) -> Iterator[Arrival]:
    """One request in two seconds, sizes within a factor of two."""
    at = w.now
    while True:
        at += w.rng.expovariate(0.5)
        tokens = max(1, int(spread(w.rng, output / 2, output * 2)))
        yield Arrival(at, int(spread(w.rng, prompt / 2, prompt * 2)), tokens)


def made_for(mode: Mode, rng: random.Random, *, tells: bool = True, level: str = "", compare: bool = True) -> World:
    """A world whose engine can show the mode; speeds and habits are drawn.

    `tells` False: no page, and answers in one piece. `level`: what can be seen of it besides, instead of what is drawn.
    `compare`: with the other detectors.
    """
    site = Site(
        slowness=spread(rng, 0.3, 3.0),
        starves=rng.random() < 0.5,
        kv_tokens=mode.kv_tokens,
        ranks=mode.ranks,
        lacks=rng.choice((frozenset(), frozenset({"iterations"}))),
        page=tells,
        streams=1.0 if tells else 0.5,
    )
    site = with_proof(replace(site, **mode.site))  # type: ignore[arg-type]
    site = replace(site, proof=level or site.proof)
    return World(site, rng, compare=compare and not mode.is_field, relief=False)


def trial(w: World, mode: Mode, load: str, horizon: float = HORIZON_S) -> Trial:
    """One fault of one mode under one load, on a world that was made for it."""
    loaded(w, load)
    predicted, before, at = prefill_of(w), w.verdict, w.now
    strike(w, mode)
    at = w.now if mode.late else at
    if horizon >= HORIZON_S:
        horizon = START_HORIZON_S if mode.case.owed == "startup" else FULL_HORIZON_S if load == FULL else mode.horizon
    until = at + horizon
    while w.now < until and not over(w, mode, at):
        w.tick()
    return result(w, mode, load, predicted, before, at)


def loaded(w: World, load: str) -> None:
    """Some history, and then the load under which the fault begins."""
    w.run(15)
    w.usual = SPECIAL[load][0] if load in SPECIAL else PLAIN
    w.traffic(arrivals(w, "short prefill" if load == "idle" else load))
    w.run(60)
    if load == "idle":
        w.drained(300)
        w.run(spread(w.rng, 60, 90))
    if load == "long prefill":
        w.request(int(spread(w.rng, 100_000, 250_000)), 50)
        w.run(spread(w.rng, 1, 10))
    if load == FULL:
        overfill(w)
        w.run(1)
    w.run(w.rng.randrange(8) / 2)


def strike(w: World, mode: Mode) -> None:
    """Begin the fault, and what sets it off."""
    if mode.fault != "start_hang":
        w.engine.fault(mode.fault, **mode.parameters)
    if mode.trigger is not None:
        mode.trigger(w)
    if mode.whole and mode.fault in HANGS:
        w.shows = random.Random(repr((w.site, mode.number))).choice(HANGS[mode.fault])


def over(w: World, mode: Mode, at: float) -> bool:
    """Whether liveness has failed and every baseline has killed; otherwise the trial goes on to its horizon."""
    return w.first(UNLIVE, at) is not None and all(b.killed_at is not None for b in w.rivals.baselines)


def prefill_of(w: World) -> tuple[float, float, float]:
    """Outstanding seconds of prefill: by the cost model, at this site, and as the sidecar expects."""
    waiting = (s for s in w.users.values() if not s.first)
    seconds = sum(cost_model.terms(RequestSize(s.prompt), w.co).before_first_token for s in waiting) / 1000
    slow = w.site.slowness / (1.0 if w.site.starves else CHUNK_SHARE)
    return seconds, seconds * slow, w.control.health.progress.learned.seconds(seconds)


def right_reasons(w: World, mode: Mode, load: str) -> tuple[str, ...]:
    """The catalogue's, and what is as right where the evidence cannot tell more: no one's request but a canary is out,
    or the engine's page does not count its steps, or its tokens."""
    counts = {"iterations", "counters"} & set(w.site.lacks)
    is_unexplained = load == "idle" or (bool(counts) and "livelock" in mode.case.reasons) or not w.site.page
    return (*mode.case.reasons, *(UNEXPLAINED if is_unexplained and not mode.is_field else ()))


def result(w: World, mode: Mode, load: str, predicted: tuple[float, float, float], before: str, at: float) -> Trial:
    """What was found of the fault that began at `at`."""
    reasons, owed = right_reasons(w, mode, load), mode.case.owed
    seen = [c for c in w.trail if c.at >= at and c.state in UNREADY]
    live = next((c for c in seen if c.state in UNLIVE), None)
    ready = next((c for c in w.trail if c.at >= at and not c.ready), None)
    ended = next(iter(w.ended), None)
    named = next((c for c in seen if c.reason in reasons), None)
    found = {"liveness": live, "readiness": ready, "request": ended, "startup": named}[owed]
    right = {
        "liveness": live is not None and live.reason in reasons,
        "readiness": named is not None,
        "request": ended is not None and ended.code in reasons,
        "startup": named is not None,
    }[owed]
    codes = [f"{c.state}/{c.reason}" for c in seen if c.reason not in ("silent", "canary_pending")]
    return Trial(
        mode.number,
        load,
        owed,
        w.site.proof,
        UNPROVEN if live is None else live.proof,
        *predicted,
        since(live, at),
        since(ready, at),
        since(ready, at if ready is None else max(at, ready.token_at)),
        since(ended, at),
        since(found, at),
        right,
        tuple(dict.fromkeys([*codes, *(f"end/{e.code}" for e in w.ended)])),
        before,
        {b.name: None if b.failing_since is None else max(0.0, b.failing_since - at) for b in w.rivals.baselines},
        {b.name: None if b.killed_at is None else max(0.0, b.killed_at - at) for b in w.rivals.baselines},
        tuple((c.at - at, c.state, c.reason) for c in w.trail if c.at >= at - 30)[:30],
    )


def since(what: Change | Ended | None, at: float) -> float | None:
    """Seconds from `at`."""
    return None if what is None else what.at - at
