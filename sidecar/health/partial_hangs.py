"""Pure: parts that hang alone while the rest of the engine works: one stream, all decodes, one rank, admission.

Rules:
- A part's silence is counted on a clock that runs only while the engine makes progress and we are to be trusted. A silence of the
  whole engine, a long prefill that starves all others, and our own pauses are nobody's stuck part.
- Prefill that was done meanwhile explains a silence; so do tokens that are generated and not delivered (balance.py), or
  where they are not counted those that an answer may still hold back.
- One stuck stream is ended, a few at most; when they repeat, or another part is stuck, readiness goes first and liveness much later.
- A stream without a first token is stuck only when later ones were served before it: a full batch makes all wait alike.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from sidecar.events import Admitted, Delivered, Event, FirstToken, RequestBlocked, Settled
from sidecar.health.latency_model import LONGEST_ANSWER, LatencyModel
from sidecar.health.progress import Key, SilenceLimits
from sidecar.health.token_balance import Balance
from sidecar.readings import EngineSample, RankSample

CLOCK_RUNS_AFTER_PROGRESS_S = 5.0  # seconds after progress in which the clock of parts runs
MIN_SILENCE_FLOORS = 5.0  # floors that a part may always be silent
MAX_FIRST_PIECES = 2  # deliveries of a stream that prove no decode: the role, and the first token
MIN_OVERTAKES = 3  # requests that came later and were served, before one that still waits counts as stuck
MIN_SILENT_STREAMS = 2  # streams that no part of a finding on decodes can do without
MIN_FIRST_TOKENS = 3  # first tokens without any other, before the silence of all counts as decodes that stalled
PREFILL_BURST_S = 3.0  # seconds over which they must have come: prefills that go first end in bursts
MIN_FREED = 3  # requests that ended without anybody being admitted, before admission counts as stuck
KV_PRESSURE = 0.9  # share of the KV cache in use, from which preempted streams may wait long
KV_PRESSURE_PATIENCE = 5.0  # times the patience with one stream under pressure
STUCK_WINDOW_S = 300.0  # seconds in which stuck streams count together
MAX_ABORTS_PER_WINDOW = 8  # streams that are ended in a window
MIN_REPEATED_STUCK = 3  # stuck streams in a window that withdraw readiness
SEVERE_AFTER_S = 180.0  # seconds of a finding, before it fails liveness
SEVERE_STUCK_SHARE = 0.5  # of the open requests that must be stuck for that


@dataclass(slots=True)
class OpenStream:
    """One open request. `received` and `each`: when its last delivery came, and what each sequence had got by then.

    `seen`, `done` and `level`: clock, prefill done by all, and balance, then or when it was last seen to be worked for.
    """

    order: int
    prompt: int
    prefill: float
    answer: int  # tokens that it may hold back: a few times the expected
    most: int  # tokens that its client allows
    came: float
    seen: float
    done: float
    level: float
    received: float
    each: float
    first: bool = False
    tokens: int = 0
    blocked: bool = False
    stuck: bool = False


@dataclass(slots=True)
class RankProgress:
    """One data-parallel rank. `seen`: the clock when its counter last moved, or it last had nothing to do."""

    generation: float | None
    seen: float


@dataclass(frozen=True, slots=True)
class PartialHang:
    """A part that hangs: its reason code, since when, and whether it has lasted for as long as liveness needs."""

    reason: str
    since: float
    severe: bool
    detail: str


@dataclass(slots=True)
class PartialHangDetector:
    """Watches the parts. Facts come in as they do to the ledger; `tick` moves the clock, `judge` says what is stuck."""

    limits: SilenceLimits
    clock: float = 0.0
    ended: deque[float] = field(default_factory=deque)  # when streams were ended, within WINDOW
    found: deque[float] = field(default_factory=deque)  # when streams were found stuck, within WINDOW
    balance: Balance = field(default_factory=Balance)
    _counted: bool = False  # whether what the engine generates is read from a counter
    _streams: dict[Key, OpenStream] = field(default_factory=dict)
    _ranks: dict[int, RankProgress] = field(default_factory=dict)
    _orders: int = 0
    _done: float = 0.0  # seconds of prefill, by the cost model, whose first token came
    _firsts: deque[int] = field(
        default_factory=lambda: deque(maxlen=64)
    )  # `order` of the last streams with a first token
    _first_seen: float = 0.0  # the clock at the last first token
    _freed: int = 0  # requests that ended since then
    _decode_seen: float = 0.0  # the clock when a stream last got more than its first pieces
    _decode_firsts: int = 0  # first tokens since then
    _ticked_at: float | None = None
    _since: dict[str, float] = field(default_factory=dict)  # when each finding began

    # --- facts ---

    def book(self, key: Key, fact: Event, prefill: float = 0.0, whole: int = 0) -> None:
        """One fact of a request. `prefill` and `whole` are those of the ledger's hold, wanted at admission."""
        match fact:
            case Admitted():
                self._admitted(key, fact, prefill, whole)
            case FirstToken() if (s := self._streams.get(key)) is not None and not s.first:
                s.first = True
                self._served(s)
                self._received(s, fact.at)
                self._decode_firsts += 1
            case Delivered(tokens=tokens) if (s := self._streams.get(key)) is not None and tokens > 0:
                s.tokens += tokens
                self.balance.delivered(tokens, fact.at)
                self._received(s, fact.at)
                if s.tokens > MAX_FIRST_PIECES:
                    self._decoded()
            case RequestBlocked(on=on) if (s := self._streams.get(key)) is not None:
                s.blocked = on
                self._received(s, fact.at)
                if not on and not s.first:  # it waited in the relay: the engine has it from now on
                    self._orders += 1
                    s.order, s.came = self._orders, self.clock
            case Settled():
                self._settled(key, fact, fact.outcome == "ok")
            case _:
                pass

    def _admitted(self, key: Key, fact: Admitted, prefill: float, whole: int) -> None:
        self._orders += 1
        answer = min(fact.max_output or LONGEST_ANSWER, 4 * fact.expected.output + 256)
        most = fact.max_output or LONGEST_ANSWER if fact.stream or whole else answer
        prompt = fact.expected.uncached + fact.expected.cached
        now, balance = self.clock, self.balance
        self._streams[key] = OpenStream(
            self._orders, prompt, prefill, answer, most, now, now, self._done, balance.level, fact.at, balance.each
        )

    def _settled(self, key: Key, fact: Settled, ok: bool) -> None:
        s = self._streams.pop(key, None)
        if s is None:
            return
        self._freed += 1
        if s.first:
            self.balance.delivered(max(0, fact.delivered_tokens - s.tokens), fact.at)
        if ok and not s.first:
            self._served(s)
        if ok and fact.delivered_tokens > MAX_FIRST_PIECES:
            self._decoded()

    def _served(self, s: OpenStream) -> None:
        self._done += s.prefill
        self._firsts.append(s.order)
        self._first_seen, self._freed = self.clock, 0

    def _decoded(self) -> None:
        if "decode_stalled" in self._since:  # it is over: what all were silent for was no single stream's
            for s in self._streams.values():
                self._touch(s)
        self._decode_seen, self._decode_firsts = self.clock, 0

    def _received(self, s: OpenStream, at: float) -> None:
        s.received, s.each = at, self.balance.each
        self._touch(s)

    def _touch(self, s: OpenStream) -> None:
        s.seen, s.done, s.level, s.stuck = self.clock, self._done, self.balance.level, False

    # --- time ---

    def tick(self, now: float, progress_at: float | None, *, trusted: bool) -> None:
        """Move the clock: only while the engine makes progress, and neither it is exempt nor we unwell."""
        before, self._ticked_at = self._ticked_at, now
        if not trusted:
            self._since.clear()
        elif before is not None and progress_at is not None and now - progress_at <= CLOCK_RUNS_AFTER_PROGRESS_S:
            self.clock += min(now - before, 1.0)

    def read(self, sample: EngineSample, at: float, *, canary: bool) -> None:
        """A new reading of the engine's counters: a silent stream for which it generates is not silent.

        `canary`: one ran since the last reading.
        """
        since = self.balance.read_at
        open_ = [s for s in self._streams.values() if not s.blocked]
        still = [s for s in open_ if since is not None and s.received < since]
        silent = sum(s.first for s in still)
        moving = len(open_) - len(still)
        self.balance.read(sample, at, moving=moving, silent=silent, waiting=len(still) - silent, canary=canary)
        for s in still:
            if self.balance.level > s.level and not s.stuck and not self._overdue(s):
                self._touch(s)

    def _overdue(self, s: OpenStream) -> bool:
        """Whether a stream would long have had all that its client allows, were it worked for like the others."""
        return s.first and self.balance.each - s.each > self.limits.margin * (s.most - s.tokens)

    def restart(self) -> None:
        """The engine is another process: nothing of the old one's parts holds."""
        self._ranks.clear()
        self._since.clear()
        self.found.clear()
        for s in self._streams.values():
            self._touch(s)

    # --- judging ---

    def judge(
        self, now: float, sample: EngineSample | None, learned: LatencyModel
    ) -> tuple[PartialHang | None, tuple[Key, ...]]:
        """What is stuck, and the streams to end because they are stuck alone."""
        open_ = [s for s in self._streams.values() if not s.blocked]
        self._counted = self.balance.counts(now)
        findings = {
            "rank_silent": self._rank_silent(sample.ranks if sample else (), open_, learned),
            "decode_stalled": self._decode_stalled(open_, learned),
            "admission_stalled": self._admission_stalled(open_, sample, learned),
        }
        ends: tuple[Key, ...] = ()
        if not any(findings.values()):
            ends = tuple(self._stuck(now, sample, learned))
            findings["stream_stuck"] = self._repeated(open_, now)
        for reason, detail in findings.items():
            if not detail:
                self._since.pop(reason, None)
        reason = next((reason for reason, detail in findings.items() if detail), "")
        if not reason:
            return None, ends
        since = self._since.setdefault(reason, now)
        severe = now - since >= SEVERE_AFTER_S and (
            reason != "stream_stuck" or self._share(open_) >= SEVERE_STUCK_SHARE
        )
        return PartialHang(reason, since, severe, findings[reason]), ends

    def oversized(self, sample: EngineSample | None, age: float | None) -> Key | None:
        """The oldest request that can never enter the KV cache, while the page says that nothing runs and requests wait.

        Its size is an estimate: it is believed only once the queue has stood still for half a floor, which nothing else explains.
        """
        if sample is None or sample.kv_capacity_tokens is None or sample.running != 0 or not sample.waiting:
            return None
        if age is None or age < self.limits.floor / 2:
            return None
        waiting = ((key, s) for key, s in self._streams.items() if not s.first and not s.blocked and not s.stuck)
        for key, s in waiting:
            if s.prompt > sample.kv_capacity_tokens:
                s.stuck = True
                return key
        return None

    def suspected_cause(self) -> str:
        """What the parts say of a silence of the whole engine: a stuck part can fill it up until nothing moves. "" for nothing."""
        if self._since:
            return next(iter(self._since))
        seen = [rank.seen for rank in self._ranks.values()]
        if len(seen) > 1 and max(seen) - min(seen) > self.limits.floor:
            return "rank_silent"
        if self._decode_firsts >= MIN_FIRST_TOKENS and self._first_seen - self._decode_seen >= PREFILL_BURST_S:
            return "decode_stalled"
        went = [self.clock - s.seen for s in self._streams.values() if s.first and not s.blocked]
        return (
            "stream_stuck"
            if sum(silent > CLOCK_RUNS_AFTER_PROGRESS_S + self.limits.floor for silent in went) >= MIN_REPEATED_STUCK
            else ""
        )

    @property
    def min_silence(self) -> float:
        """Seconds that any part may be silent."""
        return max(self.limits.unlearned, MIN_SILENCE_FLOORS * self.limits.floor)

    def _outstanding(self, open_: list[OpenStream], until: float) -> float:
        """Seconds of prefill of what waits and came before the clock read `until`."""
        return sum(s.prefill for s in open_ if not s.first and s.came <= until)

    def _rank_silent(self, ranks: tuple[RankSample, ...], open_: list[OpenStream], learned: LatencyModel) -> str:
        for r in ranks:
            rank = self._ranks.setdefault(r.rank, RankProgress(r.generation_tokens, self.clock))
            if r.generation_tokens != rank.generation or not (r.running or 0) + (r.waiting or 0):
                rank.generation, rank.seen = r.generation_tokens, self.clock
        if len(ranks) < 2:
            return ""
        for r in ranks:
            seen = self._ranks[r.rank].seen
            silent = self.clock - seen
            if r.generation_tokens is None or silent <= self.min_silence:
                continue
            early = self._outstanding(open_, seen + self.limits.floor)
            if silent > self.limits.margin * learned.seconds(early):
                return f"rank {r.rank} has work and generated nothing for {silent:.0f} s while others did"
        return ""

    def _decode_stalled(self, open_: list[OpenStream], learned: LatencyModel) -> str:
        if self._decode_firsts < MIN_SILENT_STREAMS:
            return ""
        last = [s for s in open_ if s.first and s.seen >= self._decode_seen]
        still = [s for s in last if self._unexplained(s, learned) > max(self.min_silence, self._held_back(s, learned))]
        if len(still) < MIN_SILENT_STREAMS:
            return ""
        silent = self.clock - min(s.seen for s in still)
        early = self._outstanding(open_, self.clock - silent + self.limits.floor)
        if silent <= self.limits.margin * learned.seconds(early):
            return ""
        return f"{len(still)} streams have their first token and no other for {silent:.0f} s, while prefills go on"

    def _admission_stalled(self, open_: list[OpenStream], sample: EngineSample | None, learned: LatencyModel) -> str:
        silent = self.clock - self._first_seen
        if self._freed < MIN_FREED or silent <= self.min_silence or pressed(sample):
            return ""
        late = [s for s in open_ if not s.first and self.clock - s.seen > self.min_silence]
        if not late or silent <= self.limits.margin * learned.seconds(sum(s.prefill for s in late)):
            return ""
        return f"{len(late)} requests wait; none was admitted for {silent:.0f} s, while {self._freed} ended"

    def _stuck(self, now: float, sample: EngineSample | None, learned: LatencyModel) -> Iterator[Key]:
        """Mark the streams that are stuck alone; those to end now."""
        for times in (self.ended, self.found):
            while times and times[0] < now - STUCK_WINDOW_S:
                times.popleft()
        least = self.min_silence
        for key, s in self._streams.items():
            if s.stuck or s.blocked or self.clock - s.seen <= least or not self._alone(s, sample, learned):
                continue
            s.stuck = True
            self.found.append(now)
            if len(self.ended) < MAX_ABORTS_PER_WINDOW:
                self.ended.append(now)
                yield key

    def _alone(self, s: OpenStream, sample: EngineSample | None, learned: LatencyModel) -> bool:
        unexplained = self._unexplained(s, learned)
        if (
            unexplained <= self.min_silence
        ):  # before the sum below, which a long queue would make for each that waits in it
            return False
        if not s.first and sum(order > s.order for order in self._firsts) < MIN_OVERTAKES:
            return False
        if s.first and s.seen >= self._decode_seen and self._decode_firsts >= MIN_SILENT_STREAMS:
            return False  # nobody decodes: it is not alone
        early = sum(o.prefill for o in self._streams.values() if not o.first and o.order <= s.order)
        allowed = max(self.min_silence, self.limits.margin * learned.seconds(early) + self._held_back(s, learned))
        return unexplained > allowed * (KV_PRESSURE_PATIENCE if pressed(sample) else 1.0)

    def _unexplained(self, s: OpenStream, learned: LatencyModel) -> float:
        """Seconds of a stream's silence that the prefill done meanwhile does not explain."""
        return self.clock - s.seen - learned.slowness * (self._done - s.done)

    def _held_back(self, s: OpenStream, learned: LatencyModel) -> float:
        """Seconds for which an answer's tokens may be held back: where none are counted, all that its client allows."""
        if self._counted:
            return max(0, s.answer - s.tokens) * learned.token_seconds
        return self.limits.margin * max(0, s.most - s.tokens) * learned.token_seconds

    def _repeated(self, open_: list[OpenStream], now: float) -> str:
        if len(self.found) < MIN_REPEATED_STUCK:
            return ""
        stuck = sum(s.stuck for s in open_)
        return (
            f"{len(self.found)} streams were stuck within {STUCK_WINDOW_S:.0f} s while others moved; {stuck} still are"
        )

    def _share(self, open_: list[OpenStream]) -> float:
        return sum(s.stuck for s in open_) / len(open_) if open_ else 0.0


def pressed(sample: EngineSample | None) -> bool:
    """Whether streams may have been preempted: the KV cache is nearly full, or not known, and requests wait."""
    if sample is None:
        return False
    return sample.kv_usage >= KV_PRESSURE if sample.kv_usage is not None else (sample.waiting or 0) > 0
