"""The production control object next to an engine model, under one simulated clock.

Rules: `sidecar.control.state.ControlState` is driven as the ticker drives it: events as they come, a metrics page a
second, a tick each 0.5 s, a canary when it asks for one, the ends of requests that it orders. Nothing of the verdict is
re-implemented here, and nothing but the reports is left out; the relay does what the real one does: a stalled verdict
ends all its requests and refuses new ones. `skip` passes over time in which nothing that a verdict hangs on can happen
(see weeks.py for when that is so); the only private fields it touches are the control's own clock.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace

from sidecar.control.state import ControlState
from sidecar.engines.registry import KINDS
from sidecar.events import CanaryResult, EnginePauseChanged, Event, RequestBlocked, Settled, UnreadRequest
from sidecar.health.monitor import TICK_S, TickReadings
from sidecar.health.probes import passes
from sidecar.load import cost_model
from sidecar.load.coefficient_monitor import CoefficientMonitor
from sidecar.load.latency_prediction import LatencyPredictor
from sidecar.load.ledger import AdmissionHold, Key, Settlement
from sidecar.readings import Absent, EngineIdentity, EngineSample, GpuSample, Reading, Value
from sidecar.settings import Settings
from sidecar.snapshot import RelayUse, Snapshot
from sim import proofs
from sim.engine import NOT_FOUND, REFUSED, TOO_MANY, Engine
from sim.rivals import Rivals
from sim.seqs import FOREIGN, OURS, PLAIN, Seq, Site, Special, admitted, refused, settled
from sim.surface import sample
from sim.traces import Arrival

WALL = 1_700_000_000.0  # the wall clock when the monotonic one reads 0
UNREST_S = 1200.0  # for what is under way to end before time is passed over
GONE_S = 300.0  # seconds after an engine's own death in which `dead` is the truth
UNLIVE = ("stalled", "dead")
UNREADY = ("starting", "suspect", "stalled", "dead", "exempt")
CALM = ("idle", "progressing", "quiet")
NONE = Absent("not simulated")
HEALTHY_GPU = GpuSample(0, "GPU", "GPU-0", NONE, NONE, NONE, NONE, NONE)
UNREAD = Absent("not read yet")
ANSWER_TIMEOUT_S = 2.0  # seconds that the sidecar waits for an answer of the API, a metrics page or a cheap one
WRITE_BLOCKS_S = 1.0  # seconds that a write to a client must wait, before the relay says so
FOREIGN_INTERVAL_S = 20.0  # seconds between requests that go past the relay, at a shared engine
BUSY = (TOO_MANY, REFUSED)  # statuses that a canary takes for a full engine
READINGS = {each.name for each in fields(TickReadings)}
UNPROVEN = "none"  # the level of proof of a verdict that names none


class NoForecast(LatencyPredictor):
    """Predicts nothing."""

    def apply(self, key: Key, event: Event, hold: AdmissionHold | None) -> None:
        pass

    def end(self, key: Key, now: float) -> None:
        pass

    def tick(self, sample: EngineSample, now: float) -> None:
        pass


class Unwatched(CoefficientMonitor):
    """Coefficients that are never stale."""

    def settled(self, settlement: Settlement) -> None:
        pass

    def tick(self, holds: Iterable[AdmissionHold], now: float, identity: EngineIdentity, *, trusted: bool) -> None:
        pass


class Judge(ControlState):
    """The production control; what only its reports show, which costs more than all the rest, is made once.

    That is the snapshot, the forecast of latencies, the number of GPUs, and, where the coefficients were not measured
    and so are never stale, their re-fit. No verdict hangs on any of them.
    """

    _report: Snapshot | None = None

    def _snapshot(self, readings: TickReadings, now: float, wall: float) -> Snapshot:
        if self._report is None:
            self._report = super()._snapshot(readings, now, wall)
            self.latency = NoForecast(self.coefficients.co)
            if not cost_model.is_measured(self.coefficients.co):
                self.coefficients = Unwatched(self.coefficients.co, now)
        return self._report

    def _count_gpus(self, readings: TickReadings) -> None:
        if self._report is None:
            super()._count_gpus(readings)


@dataclass(frozen=True, slots=True)
class Change:
    """The verdict from `at` on, whether /readyz passes, and when the engine last put out a token."""

    at: float
    state: str
    reason: str
    ready: bool = True
    proof: str = UNPROVEN
    token_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Ended:
    """A request that the control aborted."""

    at: float
    id: str
    code: str


@dataclass(slots=True)
class World:
    """One engine, its users, the control, and the baselines. Times are simulated monotonic seconds."""

    site: Site
    rng: random.Random
    compare: bool = True  # run the baselines, too
    relief: bool = True  # a stalled verdict ends all requests; off where the baselines are to find the same hang
    settings: Settings = field(default_factory=lambda: Settings(engine="http://engine"))
    co: cost_model.Coefficients = field(default_factory=cost_model.Coefficients)
    now: float = 1000.0
    wall: float = WALL
    arrivals: Iterator[Arrival] | None = None
    trail: list[Change] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)
    users: dict[str, Seq] = field(default_factory=dict)
    blind: bool = False  # the relay process is stopped: its events wait
    usual: Special = PLAIN  # what its users' requests are
    patience: float = 0.0  # seconds after which users without a first token give up; 0: they do not
    reports: bool = False  # make the control's reports, too
    cut: int = 0  # requests that the control ended
    passed: float = 0.0  # seconds that were passed over
    story_at: float = 0.0  # when a story began that made itself a site first
    restarted_at: float = -1e9  # the engine, last
    ticks: int = 0
    looked: int = 0  # ticks at which the engine's processes would be looked at
    engine: Engine = field(init=False)
    control: ControlState = field(init=False)
    gpu: GpuSample = HEALTHY_GPU
    shows: str = ""  # what the engine's processes show, one of proofs.SHOWN; "": what it does
    looks: proofs.ProcessLooks = field(default_factory=proofs.ProcessLooks)
    rivals: Rivals = field(default_factory=Rivals)
    _next: Arrival | None = None
    _events: list[Event] = field(default_factory=list)
    _reading: Reading[EngineSample] = UNREAD
    _page: tuple[float, Reading[EngineSample]] | None = None  # one that is being made: when it is done
    _canary: tuple[Seq, float, float] | None = None  # ours: (sequence, started, allowed)
    _passed: Engine | None = None  # the process in which a canary of this control passed last
    _requests: int = 0
    _pulse_at: float = 0.0
    _refused: float | None = None
    _foreign_at: float = 0.0
    _unanswered: float = 0.0  # seconds for which the API has answered nothing

    def __post_init__(self) -> None:
        self.engine = Engine(self.site, self.co, self.now)
        self._pulse_at = self.now
        self.new_control()
        self.forget_baselines()

    # --- what the story does ---

    def run(self, seconds: float) -> None:
        """Live through `seconds`, tick by tick."""
        for _ in range(round(seconds / TICK_S)):
            self.tick()

    def traffic(self, arrivals: Iterator[Arrival] | None) -> None:
        """Requests from now on; their times are absolute. None ends them."""
        self.arrivals = arrivals
        self._next = next(arrivals, None) if arrivals is not None else None

    def request(self, prompt: int, output: int, streams: bool = True, special: Special = PLAIN) -> Seq | None:
        """One request through the relay, now. None where it was refused."""
        self._requests += 1
        id = str(self._requests)
        self._events.append(admitted(id, prompt, output, streams, self.now, self.co, special))
        if self.verdict == "stalled" and self.relief:
            self._events.append(refused(id, self.now, "stalled", "engine_stalled", special=special))
            return None
        seq = self.engine.submit(id, prompt, output, self.now, streams=streams, special=special)
        if seq is None:
            status = self.engine.refusal
            outcome = "rejected" if status < 500 else "engine_error"
            self._events.append(refused(id, self.now, outcome, status=status, special=special))
        else:
            self.users[id] = seq
        return seq

    def wrong(self) -> None:
        """A request for a model that is not there."""
        self._requests += 1
        self._events.append(admitted(str(self._requests), 100, 100, True, self.now, self.co))
        self._events.append(refused(str(self._requests), self.now, "rejected", "status_404", NOT_FOUND))

    def past_relay(self, prompt: int, output: int) -> None:
        """A request that reaches the engine by another way."""
        self.engine.submit("foreign", prompt, output, self.now, owner=FOREIGN)

    def unread(self, seq: Seq) -> None:
        """A client stops reading."""
        seq.blocked = True

    def read(self, seq: Seq) -> None:
        """It reads again: what waited comes at once."""
        if seq.reported:
            self._events.append(RequestBlocked(seq.id, self.now, on=False))
        self._keep(self.engine.read(seq, self.now))

    def direct(self, what: str, on: bool) -> None:
        """The relay saw an order that stops the engine on purpose, or lets it go on."""
        self._events.append(EnginePauseChanged(self.now, what, on))

    def xid(self, number: int) -> None:
        """The driver reports an error of the GPU."""
        self.gpu = replace(self.gpu, xid_errors=((number, 1),))

    def streams(self) -> bool:
        """Whether the next request streams."""
        return self.rng.random() < self.site.streams

    def abort(self, seq: Seq, outcome: str = "client_cancelled", code: str = "") -> None:
        """A client hangs up, or the relay ends the request: the engine frees its place."""
        if self.users.pop(seq.id, None) is not None:
            self.engine.abort(seq, self.now)
            self._events.append(settled(seq, self.now, outcome, error=code))

    def pause(self, seconds: float) -> None:
        """The control process is stopped; engine and relay go on."""
        for _ in range(round(seconds / TICK_S)):
            self._live()

    def restart_engine(self, closed: float) -> None:
        """A new engine process: what the old one held breaks off, and the port is closed for `closed` seconds."""
        for seq in list(self.users.values()):
            self.abort(seq, "engine_error")
        self.engine = Engine(self.site, self.co, self.now)
        self.restarted_at = self.now
        if self._canary is not None:
            _, started, allowed = self._canary
            self._canary = None
            self._canary_ended("failed", started, allowed)
        self.engine.fault("refuse")
        self.run(closed)
        self.engine.heal()

    def restart_relay(self) -> None:
        """The relay process died: all its requests are lost and the engine sees them hang up."""
        self._book()
        self.control.relay_lost(0, self.now)
        for seq in list(self.users.values()):
            self.engine.abort(seq, self.now)
        self.users.clear()

    def new_control(self, *, remembers: bool = False) -> None:
        """The control process restarts; `remembers`: with the saved state of the one before."""
        kept = self.control.save() if remembers else None
        made = ControlState if self.reports else Judge
        self.control = made(self.settings, self.co, self.now, self.wall + self.now)
        self._canary = self._passed = None
        if kept is not None:
            self.control.restore(kept, self.now, same=True)

    def drained(self, most: float) -> bool:
        """Let outstanding requests end without new ones, for at most `most` seconds. Whether they did."""
        self.traffic(None)
        until = self.now + most
        while self.users and self.now < until:
            self.tick()
        return not self.users

    def _is_calm(self) -> bool:
        """Whether nothing is under way whose age a jump in time would change: work of anyone, a canary, a doubt."""
        no_work = not self.users and self._canary is None and self.control.health.evidence.age is None
        return no_work and self.verdict in CALM

    def skip(self, seconds: float, busy: bool, taught: Iterable[float] = ()) -> None:
        """Pass over calm time. `busy`: users were served meanwhile. `taught`: seconds of prefill, by the cost model, of
        the streams among them; each is taken to have had the engine to itself, and tokens to have come as fast as they
        can: the impatient side. What waiting and sharing would have taught (patience) is left out."""
        assert not self.users and self.verdict in CALM, "only calm time may be skipped"
        began = self.now
        while not self._is_calm() and self.now < began + UNREST_S:
            self.tick()
        seconds = max(0.0, seconds - (self.now - began))
        self.now += seconds
        self.passed += seconds
        self.control.health._ticked_at, self.control.health._ticked_wall = self.now, self.wall + self.now
        learned = self.control.health.progress.learned
        canaries = int(seconds / self.settings.canary_interval)
        learned.answers += canaries  # what idle canaries alone would have added
        if busy:
            for prefill in taught:
                learned.first_token(prefill * self.site.slowness, prefill)
            learned.token_seconds = min(learned.token_seconds, 2 * self.engine.fastest)
            self.engine.counters.generation += 1
        e = self.engine
        e.step_at = e.loop_at = e.token_at = e.chunk_at = e.busy_at = self._pulse_at = self._foreign_at = self.now
        self.forget_baselines()

    def forget_baselines(self) -> None:
        """The baselines restart."""
        if self.compare:
            self.rivals.forget()

    # --- what is seen ---

    @property
    def verdict(self) -> str:
        return self.control.health.state.state

    def killed(self, since: float) -> float | None:
        """When liveness first failed, from `since` on, for an engine that had not just died of itself."""
        return next((c.at for c in self.trail if c.at >= since and c.state in UNLIVE and not self._gone(c)), None)

    def spent(self, states: tuple[str, ...], since: float) -> float:
        """Seconds in some states from `since` on; those of an engine that had just died of itself do not count."""
        ends = [*(c.at for c in self.trail[1:]), self.now]
        return sum(
            end - max(since, c.at)
            for c, end in zip(self.trail, ends, strict=True)
            if c.state in states and end > since and not self._gone(c)
        )

    def _gone(self, change: Change) -> bool:
        return change.state == "dead" and change.at - self.restarted_at < GONE_S

    def first(self, states: tuple[str, ...], since: float) -> float | None:
        """When the verdict was first one of `states`, from `since` on."""
        return next((c.at for c in self.trail if c.at >= since and c.state in states), None)

    # --- one tick ---

    def tick(self) -> None:
        """0.5 s of everyone's life, and then the control's."""
        self._live()
        self._book()
        self._read()
        self._end_canary()
        self.control.tick(self._readings(), self.now, self.wall + self.now)
        self._note()
        self._obey()
        allowed = self.control.health.canary_due()
        if allowed is not None:
            self._send_canary(allowed)
        self.ticks += 1
        if self.compare and self.ticks % 2 == 0:
            self.rivals.poll(self.engine, self._reading, len(self.users), self.now)

    def _live(self) -> None:
        start, self.now = self.now, self.now + TICK_S
        self._keep(self.engine.advance(start, self.now))
        while self._next is not None and self.arrivals is not None and self._next.at <= self.now:
            self.request(self._next.prompt, self._next.output, self.streams(), self.usual)
            self._next = next(self.arrivals, None)
        if self.site.shared and self.arrivals is not None and self.now - self._foreign_at >= FOREIGN_INTERVAL_S:
            self._foreign_at = self.now
            self.past_relay(self.rng.randrange(200, 8000), self.rng.randrange(20, 400))
        for seq in self.users.values():
            if seq.unread_since is not None and not seq.reported and self.now - seq.unread_since >= WRITE_BLOCKS_S:
                seq.reported = True
                self._events.append(RequestBlocked(seq.id, self.now, on=True))
        if self.patience:
            for seq in list(self.users.values()):
                if not seq.special.patient and seq.first_at is None and self.now - seq.came >= self.patience:
                    self.abort(seq)
        if not self.blind:
            self._pulse_at = self.now

    def _keep(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Settled) or (isinstance(event, UnreadRequest) and not event.on):
                self.users.pop(event.id, None)
        self._events.extend(events)

    def _obey(self) -> None:
        """What the relay does on a verdict and on orders, before the next tick."""
        if self.verdict in UNLIVE and self.relief and not self.blind:
            self.cut += len(self.users)
            for seq in list(self.users.values()):
                self.abort(seq, "stalled", "engine_stalled")
        for _, end in self.control.health.take_aborts():
            for id in end.ids:
                if (seq := self.users.get(id)) is not None:
                    self.cut += 1
                    self.ended.append(Ended(self.now, id, end.code))
                    self.abort(seq, "rejected" if end.code == "prompt_exceeds_kv_cache" else "stalled", end.code)

    def _book(self) -> None:
        if self.blind:
            return
        for event in self._events:
            self.control.on_event(0, event)
        self._events.clear()

    def _read(self) -> None:
        if self.site.page_seconds:
            self._read_slowly()
        elif self.ticks % 2 == 0:
            self._reading = sample(self.engine, self.now, self.wall)
        how = self.engine.how
        self._unanswered = 0.0 if how.answering and not self._waits() else self._unanswered + TICK_S
        closed = not how.port_open
        self._refused = (self._refused or self.now) if closed else None

    def _read_slowly(self) -> None:
        """A page takes seconds to make, one at a time; what it holds is as old as that."""
        if self._page is None:
            self._page = self.now + self.site.page_seconds, sample(self.engine, self.now, self.wall)
        elif self.now >= self._page[0]:
            page, self._page = self._page[1], None
            self._reading = replace(page, at=self.now) if isinstance(page, Value) else page

    def _waits(self) -> bool:
        """HTTP is served behind inference, one request at a time."""
        return self.engine.how.serial and bool(self.engine.running or self.engine.waiting)

    def _readings(self) -> TickReadings:
        relay = RelayUse(0, 1, 0, len(self.users), 0.0, self.now - self._pulse_at)
        how = self.engine.how
        unanswered = self._unanswered >= ANSWER_TIMEOUT_S and how.port_open
        is_reported = self.site.tells_rest and how.answering
        resting = (
            "engine_paused" if how.paused and is_reported else "engine_sleeping" if how.sleeping and is_reported else ""
        )
        gpus = Value((self.gpu,), self.now)
        slots = self.site.max_batch if self.site.kind == "llamacpp" else 0  # others do not say
        identity = EngineIdentity(max_context=self.site.context, slots=slots)
        sees_processes, sees_steps = self.site.proof in ("processes", "both"), self.site.proof in ("steps", "both")
        is_suspect = self.verdict == "suspect"
        self.looked += is_suspect
        if sees_processes:
            self.looks.tick(self.engine, self.shows, self.now, suspect=is_suspect)
        steps = proofs.core_steps(self.engine, self.now) if sees_steps and how.port_open else proofs.NOTHING
        more = {"hang_signs": self.looks.reading, "steps": steps}
        more |= {"is_fcfs": KINDS[self.site.kind].is_fcfs, "canary_disturbs": slots == 1}
        return TickReadings(
            self._reading,
            gpus,
            NONE,
            (relay,),
            self._refused,
            self.site.kind,
            unanswered,
            resting,
            identity=identity,
            **{name: value for name, value in more.items() if name in READINGS},
        )

    def _send_canary(self, allowed: float) -> None:
        self.control.health.canary_sent(self.now)
        takes = self.site.takes_canary or not self.engine.how.port_open
        seq = self.engine.submit("canary", 8, 1, self.now, owner=OURS) if takes else None
        if seq is not None:
            self._canary = (seq, self.now, allowed)
            return
        status = self.engine.refusal if takes else NOT_FOUND
        outcome = "busy" if status in BUSY else "rejected" if status < 500 else "failed"
        self._canary_ended(outcome if self.engine.how.port_open else "refused", self.now, allowed)

    def _end_canary(self) -> None:
        if self._canary is None:
            return
        seq, started, allowed = self._canary
        if seq.ended_at is None and self.now - started < allowed:
            return
        outcome = "ok" if seq.ended_at is not None else "starved"
        if outcome == "ok":
            self._passed = self.engine
        else:
            self.engine.abort(seq, self.now)
        self._canary = None
        self._canary_ended(outcome, started, allowed)

    def _canary_ended(self, outcome: str, started: float, allowed: float) -> None:
        known = self._passed is self.engine
        self.control.canary_ended(CanaryResult(outcome, started, self.now, allowed, known=known))  # type: ignore[arg-type]

    def _note(self) -> None:
        m = self.control.health.state
        ready = passes("ready", self.control.health.probe_state())
        last = self.trail[-1] if self.trail else None
        if last is None or (last.state, last.reason, last.ready) != (m.state, m.reason, ready):
            proof = str(self.control.health.verdict.evidence.get("proof", UNPROVEN))
            self.trail.append(Change(self.now, m.state, m.reason, ready, proof, self.engine.token_at))
