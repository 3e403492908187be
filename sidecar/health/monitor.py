"""Pure: everything that decides whether the engine is healthy, from tick to tick. No I/O, no clock.

Rules:
- Each tick is a list of steps, each of which returns a value: own health, engine page, exemption, evidence, partial
  hang, verdict, kill policy.
- The sidecar's own trouble (a late tick, a jump of the clock, a relay without a heartbeat) withholds judgement for a
  full window.
- The end of an exemption begins a new silence; so does a call to the engine that it accepted.
- What is restored after a restart of the sidecar never kills: judgement is withheld for the silence that was allowed
  last.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Final, Protocol

from msgspec import Meta

from sidecar.events import (
    CACHE_RESET,
    SHORT_ROUTES,
    AbortRequests,
    Admitted,
    CanaryResult,
    Delivered,
    DiagnosisSummary,
    Directing,
    EnginePauseChanged,
    Event,
    FirstToken,
    RequestBlocked,
    Settled,
    State,
    UnreadRequest,
    Verdict,
)
from sidecar.health import reasons, verdict
from sidecar.health.canary_schedule import canary_allowed
from sidecar.health.exemptions import Exemptions
from sidecar.health.garbage import GARBAGE, GarbageDetector
from sidecar.health.gpu_signs import NO_GPU_SIGNS, GpuSigns
from sidecar.health.hang_classes import (
    MAX_WORK_AGE_S,
    MIN_PROOF_S,
    NO_CLASS,
    HangClass,
    hang_class,
    is_proof,
    is_work,
)
from sidecar.health.kill_policy import KillPolicy, KillState, kill_limits
from sidecar.health.latency_model import LatencyModel
from sidecar.health.partial_hangs import PartialHang, PartialHangDetector
from sidecar.health.probes import ProbeState
from sidecar.health.progress import BY_GPUS, BY_PROCESSES, UNPROVEN, Evidence, Key, OpenWork, Progress, silence_limits
from sidecar.health.readiness_hold import ReadinessHold
from sidecar.health.refusals import RefusedWork
from sidecar.health.start_deadline import start_deadline
from sidecar.health.step_watch import StepWatch
from sidecar.health.token_balance import COUNTER_STALE_S
from sidecar.health.verdict_text import evidence_json, explain, with_hold
from sidecar.readings import (
    Absent,
    CoreSteps,
    EngineIdentity,
    EngineSample,
    GpuSample,
    HangSigns,
    ProcessSample,
    Reading,
    Value,
)
from sidecar.settings import Settings
from sidecar.snapshot import RelayUse

TICK_S: Final = 0.5
# A tick may be late by so much before the sidecar withholds its own evidence.
MAX_TICK_DELAY_S: Final = 2.0
# Difference between the wall and the monotonic clock that counts as a jump.
CLOCK_JUMP_S: Final = 5.0
# A relay sends a heartbeat each second; without one for so long, its deliveries are unknown.
HEARTBEAT_STALE_S: Final = 4.0
MAX_VERDICT_CHANGES: Final = 50
MAX_CANARIES: Final = 16
MAX_SAVED_CANARIES: Final = 64
MAX_SAVED_PAUSES: Final = 64

# Canaries in a row that did not pass where none ever has, before none counts as usable.
MIN_UNUSABLE_CANARIES: Final = 3
# Processes that one after the other never serve have so many deadlines of a start together.
MAX_STARTS: Final = 2

# States without a doubt. Their silences teach (what ended a doubt may have been a fault), and the engine's time in them
# is its price.
CALM_STATES: Final = frozenset[State]({"idle", "progressing", "quiet"})
# States in which a silence is taken for a hang.
DOUBTED_STATES: Final = frozenset[State]({"suspect", "stalled", "dead"})

SLEEPING: Final = "engine_sleeping"
RESTORED: Final = "sidecar_restarted"
UNKNOWN_ENGINE: Final = EngineIdentity()
# The reading of the cores' steps is made twice a second; one that is older says nothing.
STEPS_STALE_S: Final = 3.0
NOT_LOOKED: Final = Absent("not looked at")


@dataclass(frozen=True, slots=True)
class TickReadings:
    """The signals at a tick.

    `refused_since`: since when the engine's port refuses connections; `unanswered`: it accepts them, and the API
    answers nothing; `resting`: the reason code of a rest that the engine reports, "" while it is awake; `denied_rests`:
    those that it denies, and when it was asked; `is_fcfs`: it serves requests of one model and priority in order;
    `canary_disturbs`: a canary drops what it keeps for its users; `wakes`: it sleeps when it has been idle, and any
    request wakes it; `trouble`: why no connection to it can be made, in one sentence, "" if none is known;
    `hang_signs`: what its processes do, while it is suspect; `steps`: what the plug-in in its cores reports.
    """

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
    is_fcfs: bool = False
    canary_disturbs: bool = False
    wakes: bool = False
    trouble: str = ""
    denied_rests: Mapping[str, float] = field(default_factory=dict)
    hang_signs: Reading[HangSigns] = NOT_LOOKED
    steps: Reading[tuple[CoreSteps, ...]] = NOT_LOOKED

    @property
    def sample(self) -> EngineSample | None:
        """The engine's metrics page, where it was read."""
        return self.engine.value if isinstance(self.engine, Value) else None


class AdmittedWork(OpenWork, Protocol):
    """One outstanding request, with the event that admitted it."""

    @property
    def admitted(self) -> Admitted: ...


@dataclass(frozen=True, slots=True)
class SavedHealth:
    """What outlives a restart of the sidecar. `allowed`: the silence allowed last; `stalled`: suspect or stalled.

    `orders`: the pauses of the engine in force, by code, and since when. The fields are named as in the file.
    """

    learned: LatencyModel
    canary_seconds: Annotated[tuple[float, ...], Meta(max_length=MAX_SAVED_CANARIES)]
    served: bool
    rejected: int
    stalled: bool
    allowed: float
    orders: Annotated[dict[str, float], Meta(max_length=MAX_SAVED_PAUSES)]
    fleet: KillState
    canaries_pass: bool


@dataclass(slots=True)
class CanaryRecord:
    """The canaries of one engine process: the last one, one under way, and how long those that passed took.

    `passes`: whether any can pass; None before it is known.
    """

    last: CanaryResult | None = None
    since: float | None = None  # one is under way
    passed_at: float | None = None
    touched: float = 0.0  # a canary was under way then: counters that moved may be its own
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_CANARIES))
    passes: bool | None = None
    unpassed: int = 0  # in a row, while none has passed

    def ended(self, result: CanaryResult, *, teaches: bool) -> None:
        """One ended. `teaches`: it ended no doubt, so that its time is the usual one."""
        self.last, self.since, self.touched = result, None, result.ended
        if result.outcome == "ok":
            self.passed_at, self.passes = result.ended, True
            if teaches:
                self.seconds.append(result.ended - result.started)
        elif result.outcome in ("rejected", "failed", "starved") and not self.passes:
            self.unpassed += 1
            if self.unpassed >= MIN_UNUSABLE_CANARIES:
                self.passes = False

    def forget_engine(self) -> None:
        """The engine is another process: it may take other canaries."""
        self.seconds.clear()
        self.passes, self.unpassed = None, 0


class HealthMonitor:
    """The health of one engine. `verdict`, `evidence` and the kill policy's hold are those of the last tick."""

    def __init__(self, settings: Settings, now: float, wall: float, pod: str = "") -> None:
        self._settings = settings
        limits = silence_limits(settings)
        self.progress = Progress(limits, baseline=now)
        self.partial_hangs = PartialHangDetector(limits)
        self.exemptions = Exemptions(limits.cap)
        self.kill_policy = KillPolicy(kill_limits(settings, pod))
        self.garbage = GarbageDetector()
        self.refusals = RefusedWork()
        self.readiness_hold = ReadinessHold()
        self.steps = StepWatch()
        self.gpu_signs = GpuSigns(settings.gpus)
        self.canaries = CanaryRecord()
        self.state = verdict.VerdictState(since=now, engine_since=now)
        self.verdict = Verdict("starting", "awaiting_first_token", "no token from the engine yet", now, wall)
        self.changes: deque[Verdict] = deque(maxlen=MAX_VERDICT_CHANGES)
        self.has_changed = False  # at the last tick, in a way that is to be reported
        self.is_trusted = False  # at the last tick nothing exempted, withheld or blocked judgement
        self.draining = False
        self.used_model = self.used_route = ""  # of the last request that this engine process answered
        self.lag = 0.0
        self.evidence = self.progress.evidence((), now)
        self._clues = reasons.ClueHistory(start_at=now)
        self._aborts: list[tuple[int, AbortRequests]] = []
        self._ticked_at, self._ticked_wall = now, wall
        self._read_at = 0.0  # the last metrics page
        self._was_refused = False
        self._computed_at = 0.0  # its core last computed open prompts
        self._disturbs = False  # a canary would drop what the engine keeps for its users
        self._wakes = False  # it sleeps when it has been idle, and a request wakes it
        self._woken_at: float | None = None  # a sleep ended then, and nothing has come since: it loads its model
        self._withheld_until, self._withheld_reason = 0.0, ""
        self._judged_from = 0.0  # when the last exemption ended: an older canary proves nothing
        self._checked_at = now  # for exemptions
        self._was_exempt = False  # at the last tick, by more than calls without an answer
        self._unserved_at: float | None = None  # since when no process of the engine has served
        self._worked_at: float | None = None  # when a compiler was last seen at work in this doubt
        self._doubted_at: float | None = None  # since when the engine has been thought to hang
        self._restored_stall = False  # and nothing has disproved it yet
        self._stall_unknown_at: float | None = None  # a doubt became unknown then, by the sidecar's own trouble

    # --- events ---

    def on_event(self, relay: int, event: Event, work: AdmittedWork | None) -> None:
        """One event of a relay. `work`: the ledger's hold of a request that was admitted or got its first token."""
        match event:
            case Admitted():
                prefill, whole = (work.prefill, work.whole) if work else (0.0, 0)
                self.partial_hangs.table.admit((relay, event.id), event, prefill, whole)
                shows_prefill = work is not None and (event.stream or event.route in SHORT_ROUTES)
                self.progress.admitted(
                    (relay, event.id),
                    prefill if shows_prefill else None,
                    event.at,
                    event.route,
                    size=event.mu,
                    has_media=event.expected.has_media,
                )
            case FirstToken():
                self.partial_hangs.table.first_token((relay, event.id), event)
                self.progress.first_token((relay, event.id), event.at)
                if work is not None:
                    self.exemptions.served(work.admitted.at)
            case Delivered():
                if event.bytes > 0:
                    self.partial_hangs.deliver((relay, event.id), event.tokens, event.at)
                    self.progress.delivered(event.at)
            case RequestBlocked():
                self.partial_hangs.table.block((relay, event.id), event)
                self.progress.blocked((relay, event.id), event.at, on=event.on)
            case Settled():
                self.partial_hangs.settle((relay, event.id), event)
                self.refusals.settle(event, idle=self._is_engine_idle())
                if event.outcome == "ok":
                    self.progress.completed((relay, event.id), event.at)
                self.progress.settled((relay, event.id), event.at)
            case UnreadRequest(on=True):
                self.progress.unread_opened((relay, event.id), event.at)
            case UnreadRequest():
                if 200 <= event.status < 300:
                    self.refusals.served()
                elif event.status == 0 and self.progress.is_unread_overdue((relay, event.id), event.at):
                    self.partial_hangs.unserved_work.unread_left(event.at)
                self.progress.unread_closed((relay, event.id), event.status, event.at)
            case EnginePauseChanged():
                self.exemptions.pause(event)
            case Directing():
                self.exemptions.call(relay, event)
                if event.taken and event.what != CACHE_RESET:
                    self._judge_from(event.at)
            case _:
                pass

    def on_settlement(self, event: Settled, admitted: Admitted, token_seconds: float | None) -> None:
        """The ledger settled a request. `token_seconds`: of each of its tokens, None where it teaches nothing."""
        if event.outcome == "ok":
            if admitted.expected.output:  # a canary asks for tokens, which embedding models do not give
                self.used_model = admitted.model
            self.used_route = admitted.route
            self.exemptions.served(admitted.at)
        if token_seconds is not None and event.outcome != "stalled":
            self.progress.learned.token_time(token_seconds)

    def relay_lost(self, relay: int, now: float) -> None:
        """A relay died. Its deliveries are unknown, so a new silence begins."""
        self.progress.rebaseline(now)
        self.progress.relay_lost(relay)
        self.exemptions.relay_lost(relay)

    # --- canaries ---

    @property
    def canary_usable(self) -> bool | None:
        """Whether canaries pass at this engine; None before it is known."""
        return self.canaries.passes

    def canary_due(self) -> float | None:
        """Seconds that a canary may take, if one should be sent now."""
        canaries = self.canaries
        if canaries.since is not None or self.draining or self.exemptions.are_stopping():
            return None
        if self.exemptions.is_stop_called() and self.state.state in CALM_STATES:
            return None
        last = canaries.last.ended if canaries.last else None
        interval, disturbs = self._settings.canary_interval, self._disturbs
        if self._wakes and last is not None:  # as long again as it had been idle: else it would never sleep
            interval = max(interval, last - max(self.progress.last()[1] or 0.0, self.state.engine_since))
        unknown = canaries.passes is None
        if not verdict.is_canary_due(self.state, self.evidence, last, interval, disturbs=disturbs, unknown=unknown):
            return None
        return canary_allowed(self.state.state, self.evidence, canaries.seconds, self.progress.limits)

    def canary_sent(self, now: float) -> None:
        """A canary is under way."""
        self.canaries.since = self.canaries.touched = now

    def canary_ended(self, result: CanaryResult) -> CanaryResult:
        """Record a canary's end. One that did not pass while real work progressed proves nothing: it is moot.

        So does one that waited behind a prompt that the engine's core computed.
        """
        at = self.progress.last()[1]
        worked_at = max(at or 0.0, self._computed_at)
        if result.outcome in ("failed", "starved") and worked_at > result.started:
            result = replace(result, outcome="moot")
        is_idle = self.evidence.age is None
        self.refusals.canary(result, idle=self._is_engine_idle())
        self.partial_hangs.canary_ended(result, idle=is_idle)
        self.canaries.ended(result, teaches=self.state.state in CALM_STATES)
        if result.outcome == "ok":
            self.progress.canary_passed(result.started, result.ended)
            if self.garbage.observe(result.digest, result.model):
                self._report_garbage(result.ended)
        return result

    def _is_engine_idle(self) -> bool:
        """Whether the engine has nothing to do that would explain a refusal."""
        return self.evidence.outstanding == 0 and not self.evidence.engine_busy

    def _report_garbage(self, now: float) -> None:
        """Append an entry to the verdict history; the verdict itself does not change."""
        evidence = {**self.verdict.evidence, "garbage_output": True}
        self.changes.appendleft(
            Verdict(self.verdict.state, "garbage_output", GARBAGE, now, self._ticked_wall, evidence)
        )

    # --- ticks ---

    def tick(self, readings: TickReadings, work: Iterable[OpenWork], now: float, wall: float) -> Verdict:
        """Evaluate health: the verdict, and whether the engine may be killed."""
        self.lag = self._own_health(readings.relays, now, wall)
        self._know_engine(readings)
        restarted = self._read_engine(readings, now, wall)
        withheld = self._withheld(now)
        exempt = self._exemption(readings, now)  # before the evidence: where one ends, a new silence begins
        self.evidence = self._evidence(readings, work, now)
        hang, where = self._hang(readings, now)
        self.is_trusted = withheld is None and exempt is None and not readings.unanswered
        if self.evidence.computing:
            self._computed_at = now
        self._record_clues(readings, now)
        inputs = verdict.VerdictInputs(
            now=now,
            evidence=self.evidence,
            canary=self._relevant_canary(),
            refused_since=readings.refused_since,
            exempt=exempt,
            withheld=withheld,
            restarted=restarted,
            part=self._partial_hang(readings.sample, now),
            cause=self._cause(readings.sample, now),
            startup_stuck=now - self._clues.start_at >= self.progress.limits.cap,
            can_ask=self.canaries.passes if not self.exemptions.are_stopping() else False,
            refusing=self._refusing(now),
            start_overdue=self._is_start_overdue(now),
            trouble=readings.trouble,
            wakes=readings.wakes,
            proven_after=None if self.evidence.proof == UNPROVEN else self.progress.limits.proven,
            hang=hang,
            hang_where=where,
            canary_since=self.canaries.since,
        )
        before, hold_before = self.state, self.kill_policy.reason
        self.state, condition = verdict.judge(before, inputs)
        if self.state.state == "progressing":
            self.gpu_signs.teach(readings.gpus)
        self.kill_policy.tick(self.state.state, self._proof(), readings.gpus, now, cause=self.state.reason)
        if self.state.state == "unknown" and before.state in ("suspect", "stalled"):
            self._stall_unknown_at = now
        self._count_unserved(before, now)
        self._learn_start(before, now)
        self._forget_engine(before, condition, now)
        self.readiness_hold.tick(self.state.state, now)
        self.verdict = self._new_verdict(inputs, condition, before, hold_before, wall)
        return self.verdict

    def _hang(self, readings: TickReadings, now: float) -> tuple[HangClass, str]:
        """Which hang the engine's processes and its GPUs show, and where; the evidence says whether they prove it."""
        signs = self._signs(readings, now)
        if not isinstance(signs, Value) or self.state.state not in DOUBTED_STATES:
            self._worked_at = None
            return NO_CLASS, ""
        found = hang_class(signs.value)
        if is_work(signs.value):
            self._worked_at = signs.at
        if self._worked_at is not None and now - self._worked_at <= MAX_WORK_AGE_S:
            self._wait_to_the_cap()
        if is_proof(signs.value, now - signs.at):
            self.evidence = replace(self.evidence, proof=BY_GPUS if found.is_of_gpu else BY_PROCESSES)
        if signs.value.gpu_activity == "working":  # whatever it computes may be delivered, until the cap
            self._wait_to_the_cap()
        return found, signs.value.where

    def _wait_to_the_cap(self) -> None:
        patience = max(self.evidence.kill_after, self.progress.limits.cap)
        self.evidence = replace(self.evidence, kill_after=patience)

    def _signs(self, readings: TickReadings, now: float) -> Reading[HangSigns]:
        """Those of the processes, with those of the GPUs; of the GPUs alone where no process can be seen."""
        silent_since = None if self.evidence.age is None else now - self.evidence.age
        if silent_since is None and self.state.state in DOUBTED_STATES:  # only canaries are asked
            silent_since = self._doubted_at
        gpus, processes = self.gpu_signs.read(readings.gpus, now, silent_since), readings.hang_signs
        if not isinstance(processes, Value):
            if gpus == NO_GPU_SIGNS:
                return processes
            processes = Value(HangSigns(MIN_PROOF_S), now)
        seen = processes.value
        seen = replace(seen, gpu_power=gpus.power, gpu_activity=gpus.activity, gpu_fault=gpus.fault)
        return replace(processes, value=seen)

    def _know_engine(self, readings: TickReadings) -> None:
        """What the engine and its machine say of themselves."""
        settings, gpus = self._settings, readings.gpus
        has_gpu = bool(settings.gpu) or (isinstance(gpus, Value) and bool(gpus.value))
        self.progress.is_speed_known = bool(settings.coefficients) or (bool(settings.model) and has_gpu)
        self.progress.max_context = self.partial_hangs.table.max_context = readings.identity.max_context
        self.partial_hangs.table.is_fcfs = readings.is_fcfs
        self._disturbs = readings.canary_disturbs and not readings.unanswered
        self._wakes = readings.wakes

    def _own_health(self, relays: tuple[RelayUse, ...], now: float, wall: float) -> float:
        """Withhold judgement for a full window if the sidecar itself was not healthy. Returns its lag."""
        gap, wall_gap = now - self._ticked_at, wall - self._ticked_wall
        self._ticked_at, self._ticked_wall = now, wall
        troubles = {
            "own_pause": gap > MAX_TICK_DELAY_S,
            "clock_jump": abs(wall_gap - gap) > CLOCK_JUMP_S,
            "relay_blind": any(
                relay.open > 0 and (relay.pulse_age is None or relay.pulse_age > HEARTBEAT_STALE_S) for relay in relays
            ),
        }
        trouble = next((name for name, holds in troubles.items() if holds), "")
        if trouble:
            self.progress.rebaseline(now)
            self._withheld_until, self._withheld_reason = now + self._settings.silence_floor, trouble
        return max(0.0, gap - TICK_S)

    def _read_engine(self, readings: TickReadings, now: float, wall: float) -> bool:
        """Compare a new metrics page with the last one. Returns True if it or the port shows a new process."""
        restarted, canaries = False, self.canaries
        if isinstance(readings.engine, Value) and readings.engine.at > self._read_at:
            sample, at = readings.engine.value, readings.engine.at
            if canaries.since is not None:
                canaries.touched = now
            canary = canaries.touched >= self._read_at
            is_new = self.progress.engine(sample, at, wall=wall - (now - at), canary=canary)
            self.partial_hangs.table.read(sample, at, self.progress.before, canary=canary)
            self._clues.read(sample)
            restarted = is_new and not self._served_since_start(sample, now, wall)
            self._read_at = at
        # A port that was closed belongs to a new process when it opens.
        reopened = self._was_refused and readings.refused_since is None and self.state.state != "starting"
        self._was_refused = readings.refused_since is not None
        return restarted or reopened

    def _served_since_start(self, sample: EngineSample, now: float, wall: float) -> bool:
        """Whether the process of this page has served a token already: then its start is known."""
        if sample.started_wall is None:
            return False
        last = self.canaries.last
        canary_at = last.started if last and last.outcome == "ok" else 0.0
        return max(self.progress.last()[1] or 0.0, canary_at) > now - (wall - sample.started_wall)

    def _withheld(self, now: float) -> str | None:
        """The reason code for which judgement is withheld now."""
        if self._proof() is not None:  # the engine has worked since the sidecar restarted
            self._restored_stall = False
            if self._withheld_reason == RESTORED:
                self._withheld_until = 0.0
        return self._withheld_reason if now < self._withheld_until else None

    def _exemption(self, readings: TickReadings, now: float) -> str | None:
        """The exemption that holds: reported, or a pause or a call that passed the relay, while no token flows."""
        at = self.progress.last()[1]
        is_silent = at is None or now - at > verdict.FRESH_PROGRESS_S
        before, self._checked_at = self._checked_at, now
        is_doubted = self.state.state in DOUBTED_STATES
        if self.state.state != "unknown":  # the sidecar's own trouble ends no doubt
            self._doubted_at = (self._doubted_at or before) if is_doubted else None  # the tick before found it
        self.exemptions.deny(readings.denied_rests)
        exempt = self._reported_exemption(readings)
        if exempt is None and is_silent:
            exempt = self.exemptions.active(now)
        if self._was_exempt and exempt is None:
            self._judge_from(now)
            self._woken_at = now if self.state.reason == SLEEPING and self._wakes else None
        self._was_exempt = exempt is not None
        if exempt is None and is_silent:
            proof = max(self._proof() or 0.0, self._judged_from)
            exempt = self.exemptions.under_way(now, now - before, proof, self._doubted_at)
        return exempt

    def _reported_exemption(self, readings: TickReadings) -> str | None:
        if self.draining:
            return "draining"
        if readings.sample is not None and readings.sample.sleeping:
            return SLEEPING
        return readings.resting or None

    def _judge_from(self, now: float) -> None:
        """A new silence begins."""
        self.progress.rebaseline(now)
        self._judged_from = max(self._judged_from, now)

    def _evidence(self, readings: TickReadings, work: Iterable[OpenWork], now: float) -> Evidence:
        """Compare the silence so far with what the outstanding work may take; own lag adds patience."""
        extra = 2 * max((self.lag, *(relay.lag for relay in readings.relays))) + self._waking_seconds()
        learn, work = self.state.state in CALM_STATES, tuple(work)
        found = self.progress.evidence(work, now, extra=extra, learn=learn, unanswered=readings.unanswered)
        return self._with_steps(found, readings.steps, work, now, extra=extra)

    def _with_steps(
        self,
        found: Evidence,
        steps: Reading[tuple[CoreSteps, ...]],
        work: tuple[OpenWork, ...],
        now: float,
        *,
        extra: float,
    ) -> Evidence:
        """What the engine's cores say of their steps, where they do."""
        if not isinstance(steps, Value) or now - steps.at > STEPS_STALE_S:
            self.steps.forget()
            return found
        self.steps.read(steps.value, steps.at, teaches=self.state.state in CALM_STATES)
        standing = self.steps.standing(now)
        if found.age is None or standing is None:
            return replace(found, step_age=standing)
        prompts = [hold.prompt_tokens for hold in work if hold.first_at is None]
        share = min(1.0, self.steps.last_tokens() / max(1, *prompts, 1))
        step = self.steps.allowed(self.progress.limits.margin * share * found.predicted) + extra
        # A speed that was not measured may be anything, and a step with it.
        allowed = found.allowed if found.ruled_by in ("unknown", "cap") else min(step, found.allowed)
        return replace(
            found,
            step_age=standing,
            stands=min(standing, found.age) > allowed,
            computing=self.steps.is_computing(now, now - found.age, sum(prompts))
            and found.age <= self.progress.limits.cap,
        )

    def _waking_seconds(self) -> float:
        """Patience with an engine that loads its model again, as a request asks for it."""
        if self._woken_at is not None and (self._proof() or 0.0) > self._woken_at:
            self._woken_at = None
        return 0.0 if self._woken_at is None else self.progress.limits.cap

    def _record_clues(self, readings: TickReadings, now: float) -> None:
        """Record XID counts and whether the API is unresponsive."""
        gpus = readings.gpus
        xids = sum(count for gpu in gpus.value for _, count in gpu.xid_errors) if isinstance(gpus, Value) else None
        self._clues.record(now, readings.unanswered, xids)

    def _relevant_canary(self) -> CanaryResult | None:
        """The last canary, unless an exemption has ended since it was sent."""
        last = self.canaries.last
        return last if last is not None and last.started >= self._judged_from else None

    def _partial_hang(self, sample: EngineSample | None, now: float) -> PartialHang | None:
        """A part that hangs alone. Requests that can never end are to be aborted by their relay."""
        self.partial_hangs.tick(now, self.progress.last()[1], trusted=self.is_trusted)
        if not self.is_trusted:
            return None
        found, stuck = self.partial_hangs.judge(now, sample, self.progress.learned)
        self._abort(stuck, "stream_stuck")
        oversized = self.partial_hangs.oversized_prompt.find(sample, self.evidence.age)
        self._abort((oversized,) if oversized else (), "prompt_exceeds_kv_cache")
        return found

    def _abort(self, keys: tuple[Key, ...], code: str) -> None:
        self._aborts.extend((relay, AbortRequests((id,), code)) for relay, id in keys)

    def take_aborts(self) -> list[tuple[int, AbortRequests]]:
        """Commands to relays since the last call: (relay index, requests to abort)."""
        aborts, self._aborts = self._aborts, []
        return aborts

    def _cause(self, sample: EngineSample | None, now: float) -> str:
        """The reason code that the silence would get."""
        waiting, ended = self.partial_hangs.table.waiting_since(), self.progress.kinds.get("completed")
        clues = reasons.HangClues(
            age=self.evidence.age,
            sample=sample if now - self._read_at <= COUNTER_STALE_S else None,
            xid_age=self._clues.xid_age(now),
            unanswered=self._clues.unanswered(now),
            iterating=self.progress.iterating,
            part=self.partial_hangs.suspected_cause(self.progress.learned),
            moves=self.progress.moves(now - (self.evidence.age or 0.0)),
            waiting=None if waiting is None else now - waiting,
            ended=None if ended is None else now - ended,
            vanished=self._clues.vanished,
        )
        return reasons.cause_of(clues)

    def _proof(self) -> float | None:
        """When the engine last did anything: a token, an answer, a canary that passed. None before any."""
        times = (self.progress.last()[1], self.canaries.passed_at)
        return max((at for at in times if at is not None), default=None)

    def _refusing(self, now: float) -> float | None:
        """Seconds for which the engine has refused everything; None while it does not."""
        open_for = self.evidence.age if self.evidence.outstanding else None
        return self.refusals.seconds(now, self.progress.limits.floor, can_ask=self.canaries.passes, open_for=open_for)

    def _is_start_overdue(self, now: float) -> bool:
        """Whether this process of the engine has been starting for longer than any may, or several have in turn."""
        learned, limits = self.progress.learned.start_seconds, self.progress.limits
        deadline = start_deadline(learned, self._clues.unanswered(now), limits)
        unserved = 0.0 if self._unserved_at is None else now - self._unserved_at
        return now - self.state.engine_since > deadline or unserved > MAX_STARTS * deadline

    def _count_unserved(self, before: verdict.VerdictState, now: float) -> None:
        """Note since when no process has served. After a kill the time begins again: the next start is kubelet's."""
        if self.state.served:
            self._unserved_at = None
        elif self._unserved_at is None or (before.state == "stalled" and self.state.state == "starting"):
            self._unserved_at = now

    def _learn_start(self, before: verdict.VerdictState, now: float) -> None:
        """The engine has served its first token: its start took so long."""
        if self.state.served and not before.startup_done:
            self.progress.learned.start_time(now - self._clues.start_at)

    def _forget_engine(self, before: verdict.VerdictState, condition: str, now: float) -> None:
        """Forget what was true of one engine process, if it is another one or may have other weights."""
        state = self.state.state
        if state in ("starting", "exempt") and state != before.state:
            self.garbage.reset()
        if state == "starting" and (before.state != "starting" or condition == "restarted"):
            self.canaries.forget_engine()
            self.refusals.served()
            self.used_model = self.used_route = ""
            self.partial_hangs.reset()
            self.exemptions.clear()
            self._clues.start_at = now
        if state == "stalled" and not self.state.part:
            self.partial_hangs.all_stalled()

    def _new_verdict(
        self,
        inputs: verdict.VerdictInputs,
        condition: str,
        before: verdict.VerdictState,
        hold_before: str,
        wall: float,
    ) -> Verdict:
        """The verdict in words and numbers; a change is kept in the history."""
        state = self.state
        is_new = (state.state, self.kill_policy.reason) != (before.state, hold_before)
        is_notable = state.reason != before.reason and state.reason in reasons.NOTABLE
        self.has_changed = state.state != before.state or is_notable
        evidence = evidence_json(inputs, condition)
        if self.garbage.found:
            evidence["garbage_output"] = True
        since_wall = wall if is_new else self.verdict.since_wall
        detail = explain(state, inputs, condition, self.kill_policy.hold)
        plain = Verdict(state.state, state.reason, detail, state.since, since_wall, evidence)
        new = with_hold(plain, self.kill_policy.hold)
        if is_new or self.has_changed:
            self.changes.appendleft(new)
        return new

    # --- reports, and restarts of the sidecar ---

    @property
    def is_doubtful(self) -> bool:
        """Whether the last known state is a stall, or an operator must act, and no token shows the contrary."""
        doubted_at = self._stall_unknown_at
        is_open = doubted_at is not None and self.state.state == "unknown" and (self._proof() or 0.0) <= doubted_at
        return (
            self._restored_stall or is_open or (self.kill_policy.state.handover != "" and self.state.state == "unknown")
        )

    @property
    def is_usual(self) -> bool:
        """Whether the engine's time is that of the relay's work alone, so that its coefficients can be judged."""
        return self.is_trusted and self.state.state in CALM_STATES and not self.progress.learned.foreign

    def probe_state(self) -> ProbeState:
        """What probes render."""
        held = self.kill_policy.hold is not None
        settling = self.readiness_hold.seconds_left(self._ticked_at)
        dozes = self._wakes and self.state.reason == SLEEPING
        return ProbeState(self.verdict, self.state.startup_done, self.draining, held, self.is_doubtful, settling, dozes)

    def set_margin(self, margin: float) -> None:
        """Allow `margin` times the predicted silence from now on."""
        if margin != self.progress.limits.margin:
            self.progress.limits = replace(self.progress.limits, margin=margin)

    def save(self) -> SavedHealth:
        """What the next process of the sidecar should know."""
        return SavedHealth(
            learned=self.progress.learned,
            canary_seconds=tuple(self.canaries.seconds),
            served=self.state.served,
            rejected=self.state.rejected,
            stalled=self.state.state in ("suspect", "stalled"),
            allowed=self.evidence.allowed,
            orders=dict(self.exemptions.since),
            fleet=self.kill_policy.state,
            canaries_pass=bool(self.canaries.passes),
        )

    def restore(self, saved: SavedHealth, now: float, *, same: bool) -> None:
        """Restore saved state.

        `same`: it is of the engine process running now, which may hold requests not known here.
        """
        self.progress.learned = saved.learned
        self.kill_policy.state = saved.fleet
        if not same:
            return
        self.canaries.seconds.extend(saved.canary_seconds)
        self.canaries.passes = saved.canaries_pass or bool(saved.canary_seconds) or None
        self.exemptions.since = dict(saved.orders)
        self.state = replace(self.state, rejected=saved.rejected)
        if saved.served:
            self.state = replace(self.state, state="unknown", reason=RESTORED, served=True)
            self._restored_stall = saved.stalled
            window = min(max(saved.allowed, self._settings.silence_floor), self._settings.silence_cap)
            self._withheld_until, self._withheld_reason = now + window, RESTORED
