"""Pure: outstanding work + deliveries + the engine's counters + now -> evidence of progress, or of silence.

Rules:
- Work is what is open at the engine, also what the relay passed on unread. The engine's own gauges can be wrong (they
  freeze with its core) and only add.
- Progress is any byte delivered, or a generation or completion counter that moves. Prefill evidence (KV use, prompt
  tokens) and engine steps hold suspicion off for a while. Alone they prove nothing: an engine that admits and never
  delivers shows them too.
- Silence is compared with the longest piece of work that may be silent, never with the sum over a queue: something must
  be delivered within one prompt, or one batch of them. `allowed` withdraws readiness, `kill_after` fails liveness.
- Without a counter of tokens, an answer that shows nothing may take all that its client allowed, before liveness fails.
  A stream whose text is seen to come, and that has nothing to withhold, shows otherwise. So does an engine known to
  compute as many requests at once: it would answer the canary. One known to compute them one by one stays ready, too.
- A speed that was not measured may be anything: prompts far longer than any seen may take until the cap. One that was
  may be that of the engine's cache: before liveness fails, a prompt has the time that the slowest like it took.
- Texts say little of pictures and sounds, whose encoder is another model: until some were seen, it may be
  UNKNOWN_SLOWNESS times as slow as the texts are, against the coefficients.
- Times are monotonic seconds, passed in.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import ceil
from typing import Final, Protocol

from sidecar.events import LONGEST_ANSWER_TOKENS, SHORT_ROUTES
from sidecar.health.latency_model import MIN_PREFILL_S, UNKNOWN_SLOWNESS, UNMEASURED_SLOWNESS, LatencyModel
from sidecar.health.token_balance import COUNTER_STALE_S, MAX_CANARY_TOKENS
from sidecar.readings import EngineSample
from sidecar.settings import Settings

Key = tuple[int, str]  # (relay index, request id)

# Seconds of silence that a kill waits for where the engine's processes prove a hang.
PROVEN_KILL_S: Final = 30.0
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
# Answers seen to begin or, where they have no tokens, to end, before this engine's own gaps count as known; then the
# margin over the longest of them.
LEARNED_ANSWERS: Final = 10
GAP_MARGIN: Final = 2.0
# Shorter gaps teach nothing.
MIN_GAP_S: Final = 0.25
# Readings in a row with more requests than the relay's, before the work counts as foreign.
MIN_EXCESS_READINGS: Final = 5
# Prompt tokens that an engine may compute in one step, all of whose first tokens come together (vLLM, TGI and SGLang
# take 2,048 to 16,384).
BATCH_TOKENS: Final = 16_384
# Routes whose answer is no text: their time is that of the route. How long a session may be silent is never known.
TIMED_ROUTES: Final = ("transcription", "speech", "images", "realtime", "unread")
SESSION_ROUTE: Final = "realtime"
# The name under which first tokens of requests with pictures or sounds are learned, per second of predicted prefill.
MEDIA: Final = "media"
MIN_SIZE: Final = 1e-3  # model units
# Processes behind one port that are distinguished.
MAX_PAGES: Final = 4
# A start time of the engine's process that lies so long before the last page is not of a new process.
START_SLACK_S: Final = 2.0
# Counters that moved so soon after the silence began do not speak against it: pages are read once a second.
FROZEN_SLACK_S: Final = 2.0
# Streams that delivered within so long of each other are computed at once.
TOGETHER_S: Final = 2.0
# Requests that came so soon after the silence began were there with it.
CLOSE_S: Final = 1.0
# A request passed on unread that is answered sooner may need the API process only (/tokenize).
MIN_UNREAD_WORK_S: Final = 2.0
# A canary next to users' work that takes longer waited for it.
ONE_BY_ONE_S: Final = 4.0
# Canaries that were answered only after a user was, before an engine counts as one that answers one by one.
MIN_ONE_BY_ONE: Final = 2
# A canary is asked so long before a silence withdraws readiness.
ASK_LEAD_S: Final = 4.0
# Without work of the relay for so long, work of the engine is foreign.
FOREIGN_AFTER_S: Final = 3.0

# Counters whose movement is progress, by the kind of evidence.
COUNTERS: Final[dict[str, tuple[str, ...]]] = {
    "generation": ("generation_tokens", "working"),
    "completed": ("finished",),
}
PROGRESS: Final = tuple(name for names in COUNTERS.values() for name in names)
# Counters that only rise while a process lives.
TOTALS: Final = ("generation_tokens", "prompt_tokens", "finished")
# Numbers whose movement, like that of the steps, only holds suspicion off.
PREFILLING: Final = ("prompt_tokens", "kv_usage")
ALL: Final = (*PROGRESS, *PREFILLING, "iterations")


# What proves a hang beyond silence.
UNPROVEN: Final = "none"
BY_PROCESSES: Final = "processes"
BY_GPUS: Final = "gpus"


@dataclass(frozen=True, slots=True)
class SilenceLimits:
    """The bounds of allowed silence, in seconds.

    `floor`, `kill` and `cap` are settings, `silence_limits` derives the others. `proven`: of a kill with a proof.
    """

    floor: float = 12.0
    unlearned: float = UNLEARNED_FLOOR_S
    margin: float = PREDICTION_MARGIN
    cap: float = 900.0
    blocked: float = BLOCKED_API_S
    kill: float = 75.0
    proven: float = PROVEN_KILL_S


def silence_limits(settings: Settings) -> SilenceLimits:
    """The bounds by the settings."""
    cap = settings.silence_cap
    kill = min(max(settings.silence_kill, settings.silence_floor), cap)
    return SilenceLimits(
        floor=settings.silence_floor,
        unlearned=min(UNLEARNED_FLOOR_S, cap * UNLEARNED_SHARE),
        cap=cap,
        blocked=min(BLOCKED_API_S, cap * BLOCKED_SHARE),
        kill=kill,
        proven=min(kill, max(PROVEN_KILL_S, settings.silence_floor)),
    )


class OpenWork(Protocol):
    """One outstanding request, as far as silence goes; the ledger's holds have this shape.

    `since`: when its silence began to be the engine's; `prefill`: seconds before its first token, by the cost model;
    `whole`: tokens of an answer that comes in one piece, 0 for a stream; `blocked`: it waits for its client or in the
    relay; `most_tokens`: that its client allows over all its `sequences`, None where it names no limit; `delivered`:
    events so far, the last one at `last_at`; `shows`: it would be seen to generate, because its text has begun to come
    and it has nothing to withhold; `size`: its work in model units; `has_media`: pictures or sounds are part of it.
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
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def route(self) -> str: ...
    @property
    def most_tokens(self) -> int | None: ...
    @property
    def sequences(self) -> int: ...
    @property
    def delivered(self) -> int: ...
    @property
    def last_at(self) -> float: ...
    @property
    def shows(self) -> bool: ...
    @property
    def size(self) -> float: ...
    @property
    def has_media(self) -> bool: ...


@dataclass(slots=True)
class UnreadWork:
    """A request that the relay passed on unread: of unknown size."""

    since: float
    blocked: bool = False
    first_at: float | None = None
    prefill: float = 0.0
    whole: int = 0
    prompt_tokens: int = 0
    route: str = "unread"
    most_tokens: int | None = None
    sequences: int = 1
    delivered: int = 0
    last_at: float = 0.0
    shows: bool = False
    size: float = 1.0
    has_media: bool = False


@dataclass(frozen=True, slots=True)
class SilenceBounds:
    """How long a silence may last, in seconds; the fields are those of Evidence."""

    ask_after: float
    allowed: float
    ruled_by: str
    kill_after: float
    hidden: float
    predicted: float


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known about progress at `now`. `age`: the silence so far, None when nothing is outstanding.

    `progress_at`: the last progress ever, None before any. `ask_after`: the silence after which a canary is worth its
    cost; `allowed`: the one that withdraws readiness; `kill_after`: the one that fails liveness, if a canary confirms
    it. `hidden`: for so long answers may be generated unseen. `frozen`: the engine says that it has work, and none of
    its counters moved in the silence. `foreign`: it has work that did not pass the relay. `untested`: whether it
    computes several requests at once should be known, and is not. `proof`: what proves a hang beyond silence. `stands`:
    its cores say that they have requests and begin no step, `computing`: that they compute prompts which are open;
    `step_age`: seconds since they began one, None where they do not say.
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
    ask_after: float = 0.0
    kill_after: float = 0.0
    hidden: float = 0.0
    frozen: bool = False
    foreign: bool = False
    untested: bool = False
    proof: str = UNPROVEN
    stands: bool = False
    computing: bool = False
    step_age: float | None = None


@dataclass(slots=True)
class Progress:
    """The times of the last progress of each kind, and what this engine has taught.

    `max_context`: tokens of its longest sequence, 0 if unknown; `is_speed_known`: the coefficients are of this machine.
    """

    limits: SilenceLimits
    kinds: dict[str, float] = field(default_factory=dict)
    learned: LatencyModel = field(default_factory=LatencyModel)
    max_context: int = 0
    is_speed_known: bool = False
    started_at: float | None = None  # when work last began to be outstanding
    baseline: float = 0.0  # nothing before this counts as silence
    steps_at: float | None = None
    prefill_at: float | None = None
    iterating: int = 0  # readings in a row in which the engine's steps moved
    unread: dict[Key, UnreadWork] = field(default_factory=dict)
    before: EngineSample | None = None  # the page of the same process before the last one; None where there was none
    _sample: EngineSample | None = None
    _read_at: float = 0.0
    _read_wall: float = 0.0
    _moved_at: float = 0.0  # the last reading in which any counter had moved
    _pages: list[EngineSample] = field(default_factory=list)  # the last one of each process behind the port
    _first_read_at: float = 0.0
    _began_busy: bool = False  # the first reading showed work
    _busy: bool = False  # the engine's gauges show work that is not the canary
    _open: int = 0  # requests that the relay has sent
    _excess: int = 0  # readings in a row that moved and showed more than those
    _foreign: bool = False  # the gauges show work that did not pass the relay, since they last moved
    _alone_at: float | None = None  # the last reading, where it showed work while the relay seemed to have none
    _worked_at: float = 0.0  # when the relay last had work outstanding
    _open_gap: float = 0.0  # the silence under way; it is learned only when progress ends it
    _explained: float = 0.0  # of it, by the work that was outstanding
    _whole: bool = False  # an answer in one piece was outstanding in it
    _tainted: bool = False  # it was, at some time, doubted, a start or an exemption: it teaches nothing
    _ended_at: float = 0.0  # the last end of a request
    _work_since: tuple[float, ...] = ()  # since when those outstanding at the last tick were
    _first_at: float = 0.0  # the last first token, or answer that counts as one
    _predicted: dict[Key, tuple[float, float]] = field(default_factory=dict)  # admitted at, seconds of prefill
    _timed: dict[Key, tuple[float, str, float]] = field(default_factory=dict)  # of TIMED_ROUTES: since, route, size
    _media: set[Key] = field(default_factory=set)  # of those whose prefill is predicted: they have pictures or sounds
    _sessions: set[Key] = field(default_factory=set)  # those of SESSION_ROUTE

    def rebaseline(self, now: float) -> None:
        """Forget silence up to `now`: what the sidecar saw of it is unreliable, or it was excused."""
        self.baseline = max(self.baseline, now)

    def delivered(self, now: float) -> None:
        """Bytes of an answer reached a client."""
        self._mark("delivered", now)

    def admitted(
        self,
        key: Key,
        prefill: float | None,
        now: float,
        route: str = "",
        *,
        size: float = 1.0,
        has_media: bool = False,
    ) -> None:
        """A request was sent. `size`, `has_media`: as in OpenWork.

        `prefill`: the seconds that the cost model predicts before the first token of a stream, or before the end of an
        answer without tokens; None where neither can be seen.
        """
        self._worked_at = max(now, self._worked_at)
        if route in TIMED_ROUTES:
            if route == SESSION_ROUTE:
                self._sessions.add(key)
            else:
                self._timed[key] = (now, route, max(size, MIN_SIZE))
        elif prefill is not None:
            self._predicted[key] = (now, prefill)
            if has_media:
                self._media.add(key)

    def resumed(self, key: Key, now: float) -> None:
        """A request that waited for its client or in the relay's queue is the engine's from now on."""
        if (predicted := self._predicted.get(key)) is not None:
            self._predicted[key] = (now, predicted[1])
        if (timed := self._timed.get(key)) is not None:
            self._timed[key] = (now, *timed[1:])
        if (unread := self.unread.get(key)) is not None:
            unread.since = now

    def blocked(self, key: Key, now: float, *, on: bool) -> None:
        """A request waits for its client or in the relay's queue, or no longer."""
        if (unread := self.unread.get(key)) is not None:
            unread.blocked = on
        if not on:
            self.resumed(key, now)

    def first_token(self, key: Key, now: float) -> None:
        """A first token: progress, and one more observation of this engine."""
        self._observe_prefill(key, now)
        self.learned.answers += 1
        self._mark("delivered", now)

    def settled(self, key: Key, now: float) -> None:
        """A request ended: nothing is predicted for it any more."""
        self._ended_at = max(now, self._ended_at)
        self._predicted.pop(key, None)
        self._timed.pop(key, None)
        self._sessions.discard(key)
        self._media.discard(key)

    def completed(self, key: Key, now: float) -> None:
        """The engine ended a request by itself: an answer without tokens shows the time of its prompt.

        Sessions are ended by clients, which is no evidence.
        """
        if key in self._sessions:
            return
        if key in self._predicted:
            self._observe_prefill(key, now)
            self.learned.answers += 1
        elif (timed := self._timed.pop(key, None)) is not None:
            self.learned.answers += 1
            if not self._tainted:
                self.learned.route_time(timed[1], (now - timed[0]) / timed[2])
        self._mark("completed", now)

    def unread_opened(self, key: Key, now: float) -> None:
        """A request that the relay passes on unread is with the engine."""
        self.unread[key] = UnreadWork(now)
        self.admitted(key, None, now, "unread")

    def unread_closed(self, key: Key, status: int, now: float) -> None:
        """It is over; `status` is the engine's, 0 for none.

        Only one that took its time shows that the engine works: a living API answers others by itself.
        """
        work = self.unread.pop(key, None)
        if work is not None and 200 <= status < 300 and now - work.since >= MIN_UNREAD_WORK_S:
            self.completed(key, now)
        self.settled(key, now)

    def is_unread_overdue(self, key: Key, now: float) -> bool:
        """Whether a call that is passed on unread has waited for longer than such calls take, as far as that is known.

        Where it is not, it is so after the patience with an engine that is not known.
        """
        work = self.unread.get(key)
        if work is None or work.blocked:
            return False
        longest = self.learned.route_seconds(work.route, self.limits.unlearned)
        return now - work.since >= max(self.limits.floor, longest)

    def relay_lost(self, relay: int) -> None:
        """A relay died, and its connections with it."""
        for key in [key for key in self.unread if key[0] == relay]:
            del self.unread[key]
            self._timed.pop(key, None)

    def canary_passed(self, started: float, ended: float) -> None:
        """A canary passed. Next to users' requests that were there before and after it, it shows concurrency."""
        others = sum(since < started for since in self._work_since)
        if others and self._ended_at < started:
            self.learned.concurrent, self.learned.one_by_one = max(self.learned.concurrent, others), 0
        elif self._ended_at >= started and ended - started > ONE_BY_ONE_S:
            self.learned.one_by_one += 1

    def engine(self, sample: EngineSample, now: float, *, wall: float = 0.0, canary: bool = False) -> bool:
        """Compare the engine's counters with the last reading. Returns True if its process is another one.

        `canary`: one ran between the two readings, so counters that moved prove nothing about the users' work.
        """
        last, before = self._sample, self._match(sample)
        if last is None:
            self._first_read_at, self._began_busy = now, load(sample) > 0
        self.before = before
        self._sample, self._read_at = sample, now
        since_wall, self._read_wall = self._read_wall, wall
        is_new = last is not None and started_after(last, sample, since_wall)
        self._busy = load(sample) > (1 if canary and not self._foreign else 0)
        if before is None and last is not None:
            self._foreign = False  # of another process, of which nothing is known
        else:
            self._look_for_foreign(before, sample, now, canary=canary)
        if before is None or any_moved(before, sample, ALL):
            self._moved_at = now
        if before is None:  # another process, or one of several behind the port: nothing to compare with
            return is_new
        canary = canary and grown(before.working, sample.working) <= MAX_CANARY_TOKENS
        for kind, names in COUNTERS.items():
            if not canary and any_moved(before, sample, names):
                self._mark(kind, now)
        self.iterating = self.iterating + 1 if moved(before.iterations, sample.iterations) else 0
        if moved(before.iterations, sample.iterations):
            self.steps_at = now
        if any_moved(before, sample, PREFILLING):
            self.prefill_at = now
        return is_new

    def _match(self, sample: EngineSample) -> EngineSample | None:
        """The last page of the process that this one is of: none of its counters is higher. None for a new one.

        Several processes may take turns behind one port; the one whose counters are nearest is meant.
        """
        known = [page for page in self._pages if not fell(page, sample)]
        best = max(known, key=lambda page: (page.generation_tokens or 0.0, page.prompt_tokens or 0.0), default=None)
        self._pages = [*(page for page in self._pages if page is not best), sample][-MAX_PAGES:]
        return best

    def evidence(
        self, items: Iterable[OpenWork], now: float, *, extra: float = 0.0, learn: bool = True, unanswered: bool = False
    ) -> Evidence:
        """The silence at `now`.

        `extra`: seconds of patience for own lag; `learn`: False while a silence teaches nothing; `unanswered`: the
        engine accepts connections and answers nothing.
        """
        holds = [*items, *self.unread.values()]
        work = [hold for hold in holds if not hold.blocked]
        self._open = max(len(holds), self._open - 1)  # falls slowly: gauges lag behind
        self._work_since = tuple(hold.since for hold in work)
        if work:
            self._worked_at = now
        busy = self._busy and (bool(work) or self._foreign)  # otherwise it is what is left of the relay's own work
        since = self._silent_since(work, busy, now)
        self.learned.decay(now, working=bool(work))
        self.learned.refit()
        known = self.learned.answers >= LEARNED_ANSWERS and (bool(work) or not busy)  # foreign work: size unknown
        is_counted = self._is_counted(now, unanswered=unanswered)
        self._look_for_concurrency(work, now)
        bounds = self._bounds(work, since, known=known, counted=is_counted, foreign=busy and self._foreign)
        age = max(0.0, now - since) if work or busy else None
        has_whole = any(hold.whole for hold in work)
        is_explained = bounds.ruled_by in ("predicted", "unknown", "cap")
        self._open_gap = age or 0.0
        self._explained = bounds.allowed if is_explained else self.limits.margin * bounds.predicted
        self._whole = (self._whole or has_whole) and age is not None
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
            allowed=bounds.allowed + extra,
            ruled_by=bounds.ruled_by,
            predicted=bounds.predicted,
            learned=known,
            ask_after=bounds.ask_after,
            kill_after=max(bounds.kill_after, bounds.allowed + self.limits.blocked if unanswered else 0.0) + extra,
            hidden=bounds.hidden,
            frozen=age is not None and self._is_frozen(work, since, now, counted=is_counted),
            foreign=self._foreign,
            untested=bool(work) and not is_counted and not (self.learned.concurrent or self.learned.one_by_one),
        )

    def _bounds(
        self, work: list[OpenWork], since: float, *, known: bool, counted: bool, foreign: bool
    ) -> SilenceBounds:
        """What a silence since `since` may last over this work.

        `known`: this engine's own gaps are; `counted`: it counts its tokens; `foreign`: it has work of unknown size.
        """
        limits, learned = self.limits, self.learned
        # An idle engine is judged by its canaries, which have no gaps.
        floor = limits.floor if known or not (work or foreign) else max(limits.floor, limits.unlearned)
        prefill = early_prefill(work, since, floor)
        waiting = [hold for hold in work if hold.first_at is None and hold.since <= since + floor]
        predicted, unmeasured = learned.seconds(prefill), self._unmeasured(waiting)
        # A counter of tokens counts neither pictures nor what else goes by unread.
        uncounted = [hold for hold in work if hold.route in TIMED_ROUTES] if counted else work
        hidden = 0.0 if any(hold.shows for hold in work) else min(limits.cap, self._longest_hidden(uncounted))
        early = sum(hold.since <= since + CLOSE_S for hold in work)
        unseen = 0.0 if 0 < early <= learned.concurrent else hidden
        is_unknown = bool(work) and all(hold.route in TIMED_ROUTES for hold in work)
        one_by_one = unseen if is_unknown or learned.one_by_one >= MIN_ONE_BY_ONE else 0.0
        is_streaming = counted or not any(hold.whole for hold in work)
        gap = (learned.gap if is_streaming else max(learned.gap, learned.whole_gap)) if work else 0.0
        asked, _ = allowed_silence(predicted, floor, gap, limits)
        allowed, ruled_by = allowed_silence(predicted, floor, gap, limits, max(unmeasured, one_by_one))
        slow = max(predicted, self._slowest(prefill))
        kill = limits.cap if foreign else min(limits.cap, max(allowed, limits.kill + slow, unseen))
        return SilenceBounds(asked - min(ASK_LEAD_S, asked / 3), allowed, ruled_by, kill, hidden, predicted)

    def last(self) -> tuple[str, float | None]:
        """The newest progress: its kind and time; ("none", None) before any."""
        return max(self.kinds.items(), key=lambda item: item[1]) if self.kinds else ("none", None)

    def moves(self, since: float) -> bool:
        """Whether any counter of the engine moved during the silence since `since`."""
        return self._moved_at > since + FROZEN_SLACK_S

    def _unmeasured(self, waiting: list[OpenWork]) -> float:
        """Seconds that a prefill may take of a size or of media that were never seen, on a machine of unknown speed."""
        if self.is_speed_known:
            return 0.0
        learned = self.learned
        longest = max((hold.prefill for hold in waiting), default=0.0)
        media = max((hold.prefill for hold in waiting if hold.has_media), default=0.0)
        text = 0.0 if longest <= learned.measured_to else UNMEASURED_SLOWNESS * longest
        return max(text, media * learned.route_seconds(MEDIA, self.limits.margin * UNKNOWN_SLOWNESS * learned.slowness))

    def _slowest(self, prefill: float) -> float:
        """Seconds that a prefill may take before liveness fails, if the others came from the engine's cache."""
        return 0.0 if self.is_speed_known else max(UNKNOWN_SLOWNESS * prefill, self.learned.slowest(prefill))

    def _longest_hidden(self, work: list[OpenWork]) -> float:
        """Seconds for which one of these may be generated unseen."""
        return max((self._hidden(hold) for hold in work), default=0.0)

    def _look_for_concurrency(self, work: list[OpenWork], now: float) -> None:
        """Streams that come side by side show how many an engine computes at once."""
        together = sum(hold.shows and now - hold.last_at <= TOGETHER_S for hold in work)
        if together > 1:
            self.learned.concurrent = max(self.learned.concurrent, together)

    def _hidden(self, hold: OpenWork) -> float:
        if hold.route in TIMED_ROUTES:
            size = max(hold.size, MIN_SIZE)
            return size * self.learned.route_seconds(hold.route, self.limits.cap / size)
        if hold.route in SHORT_ROUTES:
            return 0.0
        many = hold.sequences
        most = hold.most_tokens / many if hold.most_tokens else self.max_context or LONGEST_ANSWER_TOKENS
        rounds = ceil(many / max(1, self.learned.concurrent))
        return max(0.0, most - hold.delivered / many) * rounds * self.learned.longest_token

    def _observe_prefill(self, key: Key, now: float) -> None:
        """Prefills end first come, first served: the time runs from the admission or from the first token before."""
        predicted = self._predicted.pop(key, None)
        if predicted is not None and not self._tainted:
            took = max(0.0, now - max(predicted[0], self._first_at))
            self.learned.first_token(took, predicted[1])
            if key in self._media:
                self.learned.route_time(MEDIA, took / max(predicted[1], MIN_PREFILL_S))
        self._first_at = now

    def _is_counted(self, now: float, *, unanswered: bool) -> bool:
        """Whether the engine has a counter that was seen to move while it generates, and that can be read now.

        An engine that answers nothing at all has no page either; its counter would not move.
        """
        known = self._sample is not None and self._sample.working is not None and "generation" in self.kinds
        return known and (unanswered or now - self._read_at <= COUNTER_STALE_S)

    def _is_frozen(self, work: list[OpenWork], since: float, now: float, *, counted: bool) -> bool:
        """Whether the engine's page shows work, and no counter of it moved in the silence.

        Only counters that move while it works can show it: tokens, or answers where they are short.
        """
        if self._sample is None or now - self._read_at > COUNTER_STALE_S or load(self._sample) <= 0:
            return False
        if not counted and not all(hold.route in SHORT_ROUTES for hold in work):
            return False
        return not self.moves(since)

    def _look_for_foreign(self, before: EngineSample | None, sample: EngineSample, now: float, *, canary: bool) -> None:
        """Note whether a reading shows work that did not pass the relay.

        Such work came or moved while the relay had none, or exceeds the relay's. A gauge that only stays up after the
        relay's last request proves nothing: an abort can wedge an engine. What a
        sidecar finds at work at its start, until any counter moves, may be anybody's.
        """
        has_excess = load(sample) > self._open + (1 if canary else 0)
        if before is None:
            self._foreign = has_excess
            return
        moves = any_moved(before, sample, PROGRESS)
        self._excess = self._excess + 1 if moves and has_excess else 0
        # of the reading before: whether the relay had work then is known by now
        alone, self._alone_at = self._alone_at, None
        has_come = (moves or load(sample) > load(before)) and (has_excess if canary else load(sample) > 0)
        if now - self._worked_at > FOREIGN_AFTER_S and has_come:
            self._alone_at = now
        is_foreign = self._excess >= MIN_EXCESS_READINGS or (
            alone is not None and alone - self._worked_at > FOREIGN_AFTER_S
        )
        is_foreign |= has_excess and self._began_busy and self._moved_at <= self._first_read_at
        self.learned.foreign |= is_foreign
        stays = load(sample) > (0 if canary else self._open)
        self._foreign = is_foreign or (self._foreign and stays)

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
        if gap > max(MIN_GAP_S, self._explained) and not tainted:
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


def fell(before: EngineSample, after: EngineSample) -> bool:
    """Whether a counter fell between two readings: they are of different processes."""
    return any(grown(getattr(before, name), getattr(after, name)) < 0 for name in TOTALS)


def started_after(before: EngineSample, after: EngineSample, read_wall: float) -> bool:
    """Whether the process of `after` was started after the reading of `before`.

    Several processes behind one port have different start times, too, and none of them is new.
    """
    is_other = moved(before.started_wall, after.started_wall)
    return is_other and after.started_wall is not None and after.started_wall > read_wall - START_SLACK_S


def early_prefill(items: Iterable[OpenWork], since: float, grace: float) -> float:
    """Seconds of prefill, by the cost model, that can explain a silence since `since`.

    That is the longest prompt that waits, or as many of the oldest as fit into one batch. Counted are requests without
    a first token that were present when the silence began or came within `grace` seconds of it: later arrivals queue
    behind them and cannot excuse them.
    """
    waiting = [item for item in items if item.first_at is None and item.since <= since + grace]
    batch, tokens = 0.0, 0
    for item in sorted(waiting, key=lambda item: item.since):
        tokens += item.prompt_tokens
        if tokens > BATCH_TOKENS:
            break
        batch += item.prefill
    return max((batch, *(item.prefill for item in waiting)))


def allowed_silence(
    predicted: float, floor: float, gap: float, limits: SilenceLimits, unknown: float = 0.0
) -> tuple[float, str]:
    """Allowed silence in seconds, and the term that ruled: "floor", "predicted", "learned", "unknown" or "cap".

    `unknown`: seconds for work whose speed or size is not known.
    """
    terms = {"floor": floor, "predicted": limits.margin * predicted, "learned": GAP_MARGIN * gap, "unknown": unknown}
    ruled_by = max(terms, key=lambda name: terms[name])
    if terms[ruled_by] > limits.cap:
        return limits.cap, "cap"
    return terms[ruled_by], ruled_by
