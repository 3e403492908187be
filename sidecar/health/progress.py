"""Pure: outstanding work + deliveries + the engine's counters + now -> evidence of progress, or of silence.

Rules:
- Work is what the relay counts as outstanding. The engine's own gauges can be wrong (they freeze with its core) and
  only add.
- Progress is anything delivered, or a generation or completion counter that moves. Prefill evidence (KV use, prompt
  tokens) and engine steps hold suspicion off for a while. Alone they prove nothing: an engine that admits and never
  delivers shows them too.
- Silence is compared with what the outstanding work may take: max(floor, margin x predicted, learned), capped.
- Times are monotonic seconds, passed in.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, Protocol

from sidecar.health.latency_model import LatencyModel
from sidecar.health.token_balance import COUNTER_STALE_S, MAX_CANARY_TOKENS
from sidecar.readings import EngineSample
from sidecar.settings import Settings

Key = tuple[int, str]  # (relay index, request id)

# The floor until this engine's own gaps are known. Five floors, which is what any part of an engine may always be
# silent.
UNLEARNED_FLOOR_S: Final = 60.0
# Allowed on top while the engine's API answers nothing at all: a tokenizer may block it for 60 s (alarm 15 of the
# catalogue), and from outside that looks like a hang.
BLOCKED_API_S: Final = 90.0
# Allowed over predicted silence: the figures of docs/benchmarks.md, 0.0025 false kills per engine-week, are of this
# margin.
PREDICTION_MARGIN: Final = 3.0
# What may be allowed to an engine of which nothing is known, and to an API that answers nothing, as a share of the cap:
# a short cap asks for short silences of every kind. From a cap of five minutes on these are the numbers above.
UNLEARNED_SHARE: Final = 1 / 5
BLOCKED_SHARE: Final = 1 / 3
# First tokens seen, before this engine's own gaps count as known; then the margin over the longest of them.
LEARNED_FIRST_TOKENS: Final = 10
GAP_MARGIN: Final = 2.0
# Shorter gaps teach nothing.
MIN_GAP_S: Final = 0.25
# Readings in a row with more requests than the relay's, before the work counts as foreign.
MIN_EXCESS_READINGS: Final = 5
# Tokens for which an answer in one piece may keep waiting a counter of tokens that stands still.
MAX_STANDING_TOKENS: Final = 4096
# Without work of the relay for so long, work of the engine is foreign.
FOREIGN_AFTER_S: Final = 3.0

# Counters whose movement is progress, by the kind of evidence.
COUNTERS: Final[dict[str, tuple[str, ...]]] = {
    "generation": ("generation_tokens", "working"),
    "completed": ("finished",),
}
PROGRESS: Final = tuple(name for names in COUNTERS.values() for name in names)
# Numbers whose movement, like that of the steps, only holds suspicion off.
PREFILLING: Final = ("prompt_tokens", "kv_usage")


@dataclass(frozen=True, slots=True)
class SilenceLimits:
    """The bounds of allowed silence, in seconds.

    `floor` and `cap` are settings, `silence_limits` derives the others.
    """

    floor: float = 12.0
    unlearned: float = UNLEARNED_FLOOR_S
    margin: float = PREDICTION_MARGIN
    cap: float = 900.0
    blocked: float = BLOCKED_API_S


def silence_limits(settings: Settings) -> SilenceLimits:
    """The bounds by the settings."""
    cap = settings.silence_cap
    unlearned, blocked = min(UNLEARNED_FLOOR_S, cap * UNLEARNED_SHARE), min(BLOCKED_API_S, cap * BLOCKED_SHARE)
    return SilenceLimits(floor=settings.silence_floor, unlearned=unlearned, cap=cap, blocked=blocked)


class OpenWork(Protocol):
    """One outstanding request, as far as silence goes; the ledger's holds have this shape.

    `since`: when its silence began to be the engine's; `prefill`: seconds before its first token, by the cost model;
    `whole`: tokens of an answer that comes in one piece, 0 for a stream; `blocked`: it waits for its client or in the
    relay.
    """

    @property
    def since(self) -> float: ...
    @property
    def first_at(self) -> float | None: ...
    @property
    def prefill(self) -> float: ...
    @property
    def whole(self) -> int: ...
    @property
    def blocked(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known about progress at `now`. `age`: the silence so far, None when nothing is outstanding.

    `progress_at`: the last progress ever, None before any.
    """

    now: float
    outstanding: int
    waiting: int
    engine_busy: bool
    progress_at: float | None
    progress_kind: str
    age: float | None
    steps_age: float | None
    prefill_age: float | None
    allowed: float
    ruled_by: str
    predicted: float
    learned: bool


@dataclass(slots=True)
class Progress:
    """The times of the last progress of each kind, and what this engine has taught."""

    limits: SilenceLimits
    kinds: dict[str, float] = field(default_factory=dict)
    learned: LatencyModel = field(default_factory=LatencyModel)
    started_at: float | None = None  # when work last began to be outstanding
    baseline: float = 0.0  # nothing before this counts as silence
    steps_at: float | None = None
    prefill_at: float | None = None
    iterating: int = 0  # readings in a row in which the engine's steps moved
    _sample: EngineSample | None = None
    _read_at: float = 0.0
    _worked: EngineSample | None = None  # the last reading whose counters were not a canary's alone
    _busy: bool = False  # the engine's gauges show work that is not the canary
    _open: int = 0  # requests that the relay has sent
    _excess: int = 0  # readings in a row that moved and showed more than those
    _alone_at: float | None = None  # the last reading, where it showed work while the relay seemed to have none
    _worked_at: float = 0.0  # when the relay last had work outstanding
    _open_gap: float = 0.0  # the silence under way; it is learned only when progress ends it
    _whole: bool = False  # an answer in one piece was outstanding in it
    _tainted: bool = False  # it was, at some time, a stall, a start or an exemption: it teaches nothing
    _first_at: float = 0.0  # the last first token
    _predicted: dict[Key, tuple[float, float]] = field(default_factory=dict)  # admitted at, seconds of prefill

    def rebaseline(self, now: float) -> None:
        """Forget silence up to `now`: what the sidecar saw of it is unreliable, or it was excused."""
        self.baseline = max(self.baseline, now)

    def delivered(self, now: float) -> None:
        """Bytes of an answer reached a client."""
        self._mark("delivered", now)

    def admitted(self, key: Key, prefill: float | None, now: float) -> None:
        """A request was sent. The cost model predicts `prefill` seconds before its first token, if it streams."""
        self._worked_at = max(now, self._worked_at)
        if prefill is not None:
            self._predicted[key] = (now, prefill)

    def resumed(self, key: Key, now: float) -> None:
        """A request that waited for its client or in the relay's queue is the engine's from now on."""
        if (predicted := self._predicted.get(key)) is not None:
            self._predicted[key] = (now, predicted[1])

    def first_token(self, key: Key, now: float) -> None:
        """A first token: progress, and one more observation of this engine.

        Prefills end first come, first served, so its own time runs from its admission or from the first token before
        it.
        """
        predicted = self._predicted.pop(key, None)
        if predicted is not None and not self._tainted:
            self.learned.first_token(max(0.0, now - max(predicted[0], self._first_at)), predicted[1])
        self._first_at = now
        self._mark("delivered", now)

    def settled(self, key: Key) -> None:
        """A request ended: nothing is predicted for it any more."""
        self._predicted.pop(key, None)

    def completed(self, now: float) -> None:
        """The engine ended a request by itself."""
        self._mark("completed", now)

    def engine(self, sample: EngineSample, now: float, *, canary: bool = False) -> bool:
        """Compare the engine's counters with the last reading. Returns True if the engine was restarted.

        `canary`: one ran between the two readings, so counters that moved prove nothing about the users' work.
        """
        before, self._sample, self._read_at = self._sample, sample, now
        self._busy = not canary and load(sample) > 0
        self.learned.foreign |= not canary and self._is_foreign(before, sample, now)
        if before is None or restarted(before, sample):
            self._worked = sample
            return before is not None
        worked = self._worked or before
        canary = canary and grown(worked.working, sample.working) <= MAX_CANARY_TOKENS
        if not canary:
            self._worked = sample
        for kind, names in COUNTERS.items():
            if not canary and any_moved(before, sample, names):
                self._mark(kind, now)
        self.iterating = self.iterating + 1 if moved(before.iterations, sample.iterations) else 0
        if moved(before.iterations, sample.iterations):
            self.steps_at = now
        if any_moved(before, sample, PREFILLING):
            self.prefill_at = now
        return False

    def evidence(self, items: Iterable[OpenWork], now: float, *, extra: float = 0.0, learn: bool = True) -> Evidence:
        """The silence at `now`.

        `extra`: seconds of patience for own lag; `learn`: False while a silence teaches nothing.
        """
        holds = list(items)
        work = [hold for hold in holds if not hold.blocked]
        self._open = max(len(holds), self._open - 1)  # falls slowly: gauges lag behind
        if work:
            self._worked_at = now
        busy = self._busy and (
            bool(work) or self.learned.foreign
        )  # otherwise it is only what is left of the relay's own work
        since = self._silent_since(work, busy, now)
        self.learned.decay(now, working=bool(work))
        self.learned.refit()
        known = self.learned.first_tokens >= LEARNED_FIRST_TOKENS and (
            bool(work) or not busy
        )  # foreign work: size unknown
        floor = self.limits.floor if known else max(self.limits.floor, self.limits.unlearned)
        predicted = self.learned.seconds(early_prefill(work, since, floor))
        whole = max((hold.whole for hold in work), default=0)
        # Where tokens are counted, this is the patience with a counter that stands still: not that of the longest
        # answer.
        predicted += (min(whole, MAX_STANDING_TOKENS) if self._counted(now) else whole) * self.learned.token_seconds
        gap = max(self.learned.gap, self.learned.whole_gap if whole else 0.0)
        allowed, ruled_by = allowed_silence(predicted, floor, gap, self.limits)
        age = max(0.0, now - since) if work or busy else None
        self._open_gap = age or 0.0
        self._whole = (self._whole or whole > 0) and age is not None
        self._tainted = (self._tainted or not learn) and age is not None
        kind, at = self.last()
        return Evidence(
            now=now,
            outstanding=len(work),
            waiting=sum(hold.first_at is None for hold in work),
            engine_busy=self._busy,
            progress_at=at,
            progress_kind=kind,
            age=age,
            steps_age=None if self.steps_at is None else now - self.steps_at,
            prefill_age=None if self.prefill_at is None else now - self.prefill_at,
            allowed=allowed + extra,
            ruled_by=ruled_by,
            predicted=predicted,
            learned=known,
        )

    def last(self) -> tuple[str, float | None]:
        """The newest progress: its kind and time; ("none", None) before any."""
        return max(self.kinds.items(), key=lambda item: item[1]) if self.kinds else ("none", None)

    def _counted(self, now: float) -> bool:
        """Whether the engine has a counter that was seen to move while it generates."""
        known = self._sample is not None and self._sample.working is not None and "generation" in self.kinds
        return known and now - self._read_at <= COUNTER_STALE_S

    def _is_foreign(self, before: EngineSample | None, sample: EngineSample, now: float) -> bool:
        """Whether a reading shows foreign work: it came or moved while the relay had none, or exceeds the relay's.

        A gauge that only stays up after the relay's last request proves nothing: an abort can wedge an engine.
        """
        moves = before is not None and any_moved(before, sample, PROGRESS)
        self._excess = self._excess + 1 if moves and load(sample) > self._open else 0
        alone, self._alone_at = (
            self._alone_at,
            None,
        )  # of the reading before: whether the relay had work then is known by now
        if now - self._worked_at > FOREIGN_AFTER_S and (moves or load(sample) > (load(before) if before else 0)):
            self._alone_at = now
        return self._excess >= MIN_EXCESS_READINGS or (alone is not None and alone - self._worked_at > FOREIGN_AFTER_S)

    def _silent_since(self, work: list[OpenWork], busy: bool, now: float) -> float:
        if not work and not busy:
            self.started_at = None
        elif self.started_at is None:
            self.started_at = min((hold.since for hold in work), default=now)
        started = now if self.started_at is None else self.started_at
        return max(self.last()[1] or 0.0, self.baseline, started)

    def _mark(self, kind: str, now: float) -> None:
        gap, self._open_gap = self._open_gap, 0.0
        whole, self._whole = self._whole, False
        tainted, self._tainted = self._tainted, False
        if gap > MIN_GAP_S and not tainted:
            self.learned.silence(min(gap, self.limits.cap), whole=whole)
        self.kinds[kind] = max(now, self.kinds.get(kind, 0.0))


def load(sample: EngineSample) -> float:
    """Requests that the engine's gauges show."""
    return (sample.running or 0) + (sample.waiting or 0)


def any_moved(before: EngineSample, after: EngineSample, names: tuple[str, ...]) -> bool:
    """Whether any of these numbers changed between two readings."""
    return any(moved(getattr(before, name), getattr(after, name)) for name in names)


def moved(before: float | None, after: float | None) -> bool:
    """Whether a number changed between two readings that both have it."""
    return before is not None and after is not None and before != after


def grown(before: float | None, after: float | None) -> float:
    """By how much a counter grew between two readings; 0 where it is not in both."""
    return 0.0 if before is None or after is None else after - before


def restarted(before: EngineSample, after: EngineSample) -> bool:
    """Whether two readings come from different engine processes: another start time, or a counter that fell."""
    counters = ("generation_tokens", "prompt_tokens", "finished")
    has_fallen = any(grown(getattr(before, name), getattr(after, name)) < 0 for name in counters)
    return has_fallen or moved(before.started_wall, after.started_wall)


def early_prefill(items: Iterable[OpenWork], since: float, grace: float) -> float:
    """Seconds of prefill, by the cost model, that can explain a silence since `since`.

    Counted are requests without a first token that were present when the silence began or came within `grace` seconds
    of it: later arrivals queue behind them and cannot excuse them.
    """
    return sum(item.prefill for item in items if item.first_at is None and item.since <= since + grace)


def allowed_silence(predicted: float, floor: float, gap: float, limits: SilenceLimits) -> tuple[float, str]:
    """Allowed silence in seconds, and the term that ruled: "floor", "predicted", "learned" or "cap"."""
    terms = {"floor": floor, "predicted": limits.margin * predicted, "learned": GAP_MARGIN * gap}
    ruled_by = max(terms, key=lambda name: terms[name])
    if terms[ruled_by] > limits.cap:
        return limits.cap, "cap"
    return terms[ruled_by], ruled_by
