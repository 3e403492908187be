"""What the control process knows, and how a tick turns it into a verdict and a Snapshot. No I/O, no clock, no tasks.

facts -> ledger + progress        readings -> progress        tick -> evidence -> verdict -> Snapshot
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

from sidecar import __version__
from sidecar.control.canary_stats import GARBAGE, CanaryStats
from sidecar.control.saved_state import SavedState
from sidecar.events import (
    AbortRequests,
    Admitted,
    CanaryResult,
    Delivered,
    DiagnosisSummary,
    Directing,
    EnginePauseChanged,
    Event,
    FirstToken,
    ImagePrepared,
    RequestBlocked,
    Settled,
    Verdict,
)
from sidecar.health import reasons, verdict
from sidecar.health.canary_schedule import canary_allowed
from sidecar.health.kill_policy import KillPolicy, kill_limits
from sidecar.health.monitor import HealthMonitor
from sidecar.health.progress import PREDICTION_MARGIN, Progress, limits_of
from sidecar.health.verdict_text import explain, facts_of, held
from sidecar.labels import BoundedLabels
from sidecar.load import coefficient_monitor, cost_model, summary
from sidecar.load.coefficient_monitor import CoefficientMonitor
from sidecar.load.ledger import AdmissionHold, Ledger, Settlement
from sidecar.readings import EngineIdentity, EngineSample, GpuSample, ProcessSample, Reading, Value
from sidecar.settings import Settings
from sidecar.snapshot import Load, RelayUse, Snapshot

REQUEST_EVENTS = (Admitted, FirstToken, Delivered, RequestBlocked, Settled)
TICK_S = 0.5  # seconds between ticks
MAX_TICK_DELAY_S = 2.0  # seconds that a tick may be late before our own evidence is withheld
CLOCK_JUMP_S = 5.0  # seconds between wall and monotonic clock that count as a jump
HEARTBEAT_STALE_S = 4.0  # seconds without a relay's pulse (sent each second), past which its deliveries are unknown
LEARNING = ("idle", "progressing", "quiet", "suspect")  # states whose silences, once ended, were legitimate
UNKNOWN_ENGINE = EngineIdentity()  # an engine that has not said who it is
QUEUE_WEIGHT = 0.2  # of one reading: a request that waits for a step (20 ms) is no queue, one that is seen for 5 s is
DOUBTED = ("suspect", "stalled", "dead")  # states in which a silence is taken for a hang
CALIBRATED_STATES = ("idle", "progressing", "quiet")  # states in which the engine's time is its price
RESTORED = "sidecar_restarted"
MAX_VERDICT_CHANGES = 50  # verdict changes kept


@dataclass(frozen=True, slots=True)
class TickReadings:
    """The signals at a tick. `refused_since`: since when the engine's port takes no connection; `unanswered`: it takes them, and
    its API answers nothing; `resting`: the reason code of the engine's own rest, "" where it is awake."""

    engine: Reading[EngineSample]
    gpus: Reading[tuple[GpuSample, ...]]
    own: Reading[ProcessSample]
    relays: tuple[RelayUse, ...]
    refused_since: float | None
    engine_kind: str
    unanswered: bool = False
    resting: str = ""
    diagnoses: tuple[DiagnosisSummary, ...] = ()
    identity: EngineIdentity = UNKNOWN_ENGINE


class ControlState:
    """State of the control process. The composition root feeds it and acts on what `tick` returns."""

    def __init__(self, settings: Settings, co: cost_model.Coefficients, now: float, wall: float, pod: str = "") -> None:
        self._settings = settings
        self._co = co
        self.unit_ms = cost_model.unit_ms(co)
        self.ledger = Ledger(co, BoundedLabels(settings.max_tenants), BoundedLabels(settings.max_tenants))
        limits = limits_of(settings)
        self.progress = Progress(limits, baseline=now)
        self.health = HealthMonitor.begin(self.progress, limits, now)
        self.news = False  # the last tick's verdict is one to tell
        self.memory = verdict.VerdictState(since=now, engine_since=now)
        self.fleet = KillPolicy(kill_limits(settings, pod))
        self.changes: deque[Verdict] = deque(maxlen=MAX_VERDICT_CHANGES)
        self.canary: CanaryResult | None = None
        self.canaries = CanaryStats(co)
        self.upkeep = CoefficientMonitor(co, now)
        self.canary_since: float | None = None
        self._canary_touched = 0.0
        self.draining = False
        self._images = summary.ImageSums()
        self._sampled_at = 0.0
        self._queue = 0.0
        self._canary_seconds: deque[float] = deque(maxlen=16)  # of those that passed since the engine started
        self._was_refused = False
        self._blocked = 0.0  # seconds of patience with an API that answers nothing
        self._restarted = False
        self._ticked_at, self._ticked_wall = now, wall
        self._withheld_until, self._withheld_reason = 0.0, ""
        self._doubt = False
        self._passed_at: float | None = None  # when a canary last passed
        self.used = ""  # the model that users were last served with, as they call it
        self.lag = 0.0
        self.verdict = Verdict("starting", "awaiting_first_token", "no token from the engine yet", now, wall)
        self.evidence = self.progress.evidence((), now)

    # --- facts ---

    def on_event(self, relay: int, fact: Event) -> Settlement | None:
        """Book one fact. Returns the settlement when it ended a request."""
        key = (relay, fact.id) if isinstance(fact, REQUEST_EVENTS) else None
        settlement = self.ledger.apply(relay, fact)
        if key is not None:
            self._of_request(key, fact, self.ledger.hold(key))
        match fact:
            case Delivered(bytes=size) if size > 0:
                self.progress.delivered(fact.at)
            case EnginePauseChanged():
                self.health.orders.book(fact)
            case Directing():
                self.health.call(relay, fact)
            case Settled():
                if fact.outcome == "ok":
                    self.progress.completed(fact.at)
                if settlement is not None:
                    self._ended(settlement)
            case ImagePrepared():
                self._images.add(fact)
            case _:
                pass
        return settlement

    def _of_request(self, key: tuple[int, str], fact: Event, hold: AdmissionHold | None) -> None:
        """What a fact says of its request's progress."""
        self.health.parts.book(key, fact, *((hold.prefill, hold.whole) if hold else ()))
        match fact:
            case Admitted():
                self.progress.admitted(key, hold.prefill if hold and fact.stream else None, fact.at)
            case FirstToken():
                self.progress.first_token(key, fact.at)
                if hold is not None:
                    self.health.orders.served(hold.admitted.at)
            case RequestBlocked(on=False):
                self.progress.resumed(key, fact.at)
            case Settled():
                self.progress.settled(key)
            case _:
                pass

    def relay_lost(self, relay: int, now: float) -> list[Settlement]:
        """Settle what a dead relay held. Its deliveries are unknown, so silence starts anew."""
        self.progress.rebaseline(now)
        self.health.orders.relay_lost(relay)
        lost = self.ledger.lose(relay, now)
        for settlement in lost:
            self.upkeep.settled(settlement)
            self._of_request((relay, settlement.admitted.id), settlement.settled, None)
        return lost

    def _ended(self, s: Settlement) -> None:
        self.upkeep.settled(s)
        if s.settled.outcome == "ok":
            self.used = s.admitted.model
            self.health.orders.served(s.admitted.at)
        if s.pace is not None and s.settled.outcome != "stalled" and not s.slowed:
            self.progress.learned.token_time(s.pace)

    # --- canaries ---

    def canary_due(self) -> float | None:
        """Seconds that a canary may take, if one should be sent now."""
        if self.canary_since is not None or self.draining:
            return None
        last = self.canary.ended if self.canary else None
        if not verdict.canary_due(self.memory, self.evidence, last, self._settings.canary_interval):
            return None
        unanswered = self.health.watch.unanswered(self.evidence.now)
        limits = self.progress.limits
        return canary_allowed(self.memory.state, self.evidence, self._canary_seconds, limits, self._blocked, unanswered)

    def canary_sent(self, now: float) -> None:
        """A canary is under way."""
        self.canary_since = self._canary_touched = now

    def canary_ended(self, result: CanaryResult) -> CanaryResult:
        """Book a canary's end. One that did not pass says nothing when real work progressed meanwhile: it is moot."""
        at = self.progress.last()[1]
        if result.outcome in ("failed", "starved") and at is not None and at > result.started:
            result = replace(result, outcome="moot")
        if result.outcome == "ok":
            self._canary_seconds.append(result.ended - result.started)
            self._passed_at = result.ended
            if self.canaries.passed(result):
                self._report_garbage(result.ended)
        self.canary, self.canary_since, self._canary_touched = result, None, result.ended
        return result

    def _report_garbage(self, now: float) -> None:
        """A line among the changes of the verdict, which stays what it is."""
        seen = {**self.verdict.evidence, "garbage_output": True}
        report = Verdict(self.verdict.state, "garbage_output", GARBAGE, now, self._ticked_wall, seen)
        self.changes.appendleft(report)

    def take_ends(self) -> list[tuple[int, AbortRequests]]:
        """Orders to relays since the last call: (relay index, what to end)."""
        return self.health.take_ends()

    # --- ticks ---

    def tick(self, r: TickReadings, now: float, wall: float) -> Snapshot:
        """Judge, and say everything that reports may show."""
        self._watch_ourselves(r, now, wall)
        self._read_engine(r.engine, now, wall)
        self._watch_restored()
        # A port that was closed belongs to a new process when it opens.
        self._restarted |= self._was_refused and r.refused_since is None and self.memory.state != "starting"
        self._was_refused = r.refused_since is not None
        self._blocked = self.progress.limits.blocked if r.unanswered else 0.0
        extra = 2 * max((self.lag, *(relay.lag for relay in r.relays))) + self._blocked
        doubted = self.memory.state in DOUBTED
        # first: where one ends, a new silence begins
        exempt = self.health.exemption(self._exemption(r), now, proof=self._proof(), doubted=doubted)
        self.evidence = self.progress.evidence(
            self.ledger.holds(), now, extra=extra, learn=self.memory.state in LEARNING
        )
        withheld = self._withheld_reason if now < self._withheld_until else None
        trusted = withheld is None and exempt is None and not r.unanswered
        sample = r.engine.value if isinstance(r.engine, Value) else None
        age, around = self.evidence.age, self.health
        around.see(r.gpus, r.unanswered, now)
        inputs = verdict.VerdictInputs(
            now=now, evidence=self.evidence, canary=around.canary(self.canary), refused_since=r.refused_since,
            exempt=exempt, restarted=self._restarted, withheld=withheld, part=around.part(sample, age, now, trusted=trusted),
            cause=around.cause(sample, age, now), startup_stuck=around.startup_stuck(now),
        )  # fmt: skip
        self._restarted = False
        before = self.memory, self.fleet.reason
        self.memory, name = verdict.judge(self.memory, inputs)
        self.fleet.tick(self.memory.state, self._proof(), r.gpus, now)
        self._say(inputs, name, before, now, wall)
        self._keep_up(r, now, trusted=trusted)
        return self._snapshot(r, now, wall)

    def _keep_up(self, r: TickReadings, now: float, *, trusted: bool) -> None:
        """Hold the coefficients against the work that was done, where all of it was ours; while they are stale, be patient."""
        ours = trusted and self.memory.state in CALIBRATED_STATES and not self.progress.learned.foreign
        gpus = r.gpus.value if isinstance(r.gpus, Value) else ()
        slow = tuple(sorted({why for gpu in gpus if isinstance(gpu.slowdowns, Value) for why in gpu.slowdowns.value}))
        seen = replace(r.identity, gpus=tuple(gpu.name for gpu in gpus), slowdowns=slow)
        self.upkeep.tick(self.ledger.holds(), now, seen, trusted=ours)
        margin = PREDICTION_MARGIN * (coefficient_monitor.STALE_MARGIN_FACTOR if self.upkeep.stale else 1.0)
        if margin != self.progress.limits.margin:
            self.progress.limits = replace(self.progress.limits, margin=margin)

    def _watch_ourselves(self, r: TickReadings, now: float, wall: float) -> None:
        """Our own ill-health lengthens patience: re-baseline, and withhold for a full window."""
        gap, wall_gap = now - self._ticked_at, wall - self._ticked_wall
        self._ticked_at, self._ticked_wall = now, wall
        self.lag = max(0.0, gap - TICK_S)
        blind = any(x.open > 0 and (x.pulse_age is None or x.pulse_age > HEARTBEAT_STALE_S) for x in r.relays)
        reasons = {
            "own_pause": gap > MAX_TICK_DELAY_S,
            "clock_jump": abs(wall_gap - gap) > CLOCK_JUMP_S,
            "relay_blind": blind,
        }
        reason = next((name for name, holds in reasons.items() if holds), None)
        if reason is not None:
            self.progress.rebaseline(now)
            self._withheld_until = now + self._settings.silence_floor
            self._withheld_reason = reason

    def _read_engine(self, reading: Reading[EngineSample], now: float, wall: float) -> None:
        if isinstance(reading, Value) and reading.at > self._sampled_at:
            if self.canary_since is not None:
                self._canary_touched = now
            canary = self._canary_touched >= self._sampled_at
            self._queue += QUEUE_WEIGHT * (summary.queue_share(reading.value) - self._queue)
            restarted = self.progress.engine(reading.value, reading.at, canary=canary)
            self.health.parts.read(reading.value, reading.at, canary=canary)
            self._restarted |= restarted and not self._served_since_start(reading.value, now, wall)
            self._sampled_at = reading.at

    def _served_since_start(self, sample: EngineSample, now: float, wall: float) -> bool:
        """Whether the engine process of this reading has served a token already: then its start is no news."""
        if sample.started_wall is None:
            return False
        started = now - (wall - sample.started_wall)
        canary = self.canary.started if self.canary and self.canary.outcome == "ok" else 0.0
        return max(self.progress.last()[1] or 0.0, canary) > started

    def _exemption(self, r: TickReadings) -> str | None:
        if self.draining:
            return "draining"
        if isinstance(r.engine, Value) and r.engine.value.sleeping:
            return "engine_sleeping"
        return r.resting or None

    def _say(
        self, i: verdict.VerdictInputs, name: str, before: tuple[verdict.VerdictState, str], now: float, wall: float
    ) -> None:
        m, (was, hold) = self.memory, before
        changed = (m.state, self.fleet.reason) != (was.state, hold)
        self.news = m.state != was.state or (m.reason != was.reason and m.reason in reasons.NOTABLE)
        if m.state in ("starting", "exempt") and m.state != was.state:
            self.canaries.sameness.forget()
        since_wall = wall if changed else self.verdict.since_wall
        bare = Verdict(m.state, m.reason, explain(m, i, name), m.since, since_wall, facts_of(i, name))
        if self.canaries.sameness.garbage:
            bare.evidence["garbage_output"] = True
        self.verdict = held(bare, self.fleet.hold)
        if changed or self.news:
            self.changes.appendleft(self.verdict)
        if m.state == "starting" and (was.state != "starting" or name == "restarted"):
            self._canary_seconds.clear()
            self.used = ""
            self.health.restarted(now)

    # --- over a restart of our own process ---

    def keep(self) -> SavedState:
        """What a next process of ours should know."""
        m = self.memory
        return SavedState(
            learned=self.progress.learned, canary_seconds=tuple(self._canary_seconds), served=m.served, rejected=m.rejected,
            stalled=m.state in ("suspect", "stalled"), allowed=self.evidence.allowed,
            orders=dict(self.health.orders.since), fleet=self.fleet.memory, drift=self.upkeep.drift.memory,
        )  # fmt: skip

    def restore(self, kept: SavedState, now: float, *, same: bool) -> None:
        """Know it. `same`: of the engine process that runs now. Work that we do not know of may be under way in it."""
        self.progress.learned = kept.learned
        self.fleet.memory = kept.fleet
        self.upkeep.restore(kept.drift)
        if not same:
            return
        self._canary_seconds.extend(kept.canary_seconds)
        self.health.orders.since = dict(kept.orders)
        self.memory = replace(self.memory, rejected=kept.rejected)
        if kept.served:
            self.memory = replace(self.memory, state="unknown", reason=RESTORED, served=True)
            self._doubt = kept.stalled
            window = min(max(kept.allowed, self._settings.silence_floor), self._settings.silence_cap)
            self._withheld_until, self._withheld_reason = now + window, RESTORED

    @property
    def doubtful(self) -> bool:
        """Whether the last that was known is a stall, or an operator has to act and no token says otherwise."""
        return self._doubt or (self.fleet.memory.handover != "" and self.memory.state == "unknown")

    def _proof(self) -> float | None:
        """When the engine last did anything: a token, an answer, a canary that passed. None before any."""
        times = (self.progress.last()[1], self._passed_at)
        return max((t for t in times if t is not None), default=None)

    def _watch_restored(self) -> None:
        """What has been seen to work since a restart of ours need not be waited for."""
        if self._proof() is not None:
            self._doubt = False
            if self._withheld_reason == RESTORED:
                self._withheld_until = 0.0

    # --- reports ---

    def _snapshot(self, r: TickReadings, now: float, wall: float) -> Snapshot:
        return Snapshot(
            at=now, at_wall=wall, version=__version__, engine_kind=r.engine_kind, draining=self.draining,
            verdict=self.verdict, progress_age=self.evidence.age, silence_allowed=self.evidence.allowed,
            silence_ruled_by=self.evidence.ruled_by, load=self._load(r, now), tenants=summary.tenants_of(self.ledger),
            images=self._images.use(), images_device="off" if self._settings.images == "off" else self._settings.images_device,
            engine=r.engine, gpus=r.gpus, own=r.own, own_lag=self.lag, relays=r.relays, canary=self.canary,
            canary_outstanding_since=self.canary_since, changes=tuple(self.changes), diagnoses=r.diagnoses,
            kills=self.fleet.memory.kills_total, handover=self.fleet.memory.handover, canaries=self.canaries.use(),
            prices=self.upkeep.use(),
        )  # fmt: skip

    def _load(self, r: TickReadings, now: float) -> Load:
        sample = r.engine.value if isinstance(r.engine, Value) else EngineSample()
        queue = self._queue if sample.waiting is not None else None
        load = summary.load_of(self.ledger, self._co, self._settings.slo_seconds, sample.kv_usage, queue, now)
        return replace(load, coefficients_stale=bool(self.upkeep.stale))
