"""Pure: parts that hang alone while the rest of the engine works: one stream, all decodes, one rank, admission.

Rules:
- A part's silence is counted on a clock that runs only while the engine makes progress and the sidecar is healthy. A
  silence of the whole engine, a long prefill that starves all others, and the sidecar's own pauses are no part's hang.
- Prefill done meanwhile explains a silence. So do tokens that are generated and not delivered (token_balance.py) or,
  where they are not counted, those that an answer may still hold back.
- A stream that is stuck alone is aborted, a few at most, and only if it cannot have been put back into the queue. When
  they repeat, or another part hangs, readiness goes first and liveness much later.
- A request that waits is overtaken only by later ones that its engine would serve after it: of the same model and
  priority, on an engine that is first come, first served, none with a grammar to compile or a transfer to await. That
  withdraws readiness, and ends no request.
- Users who leave unserved while nothing is delivered through the relay withdraw readiness, whatever the engine's
  counters do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from sidecar.events import LONGEST_ANSWER_TOKENS, Admitted, CanaryResult, FirstToken, RequestBlocked, Settled
from sidecar.health.latency_model import LatencyModel
from sidecar.health.progress import Key, SilenceLimits
from sidecar.health.token_balance import TokenBalance
from sidecar.readings import EngineSample, RankSample

CLOCK_RUNS_AFTER_PROGRESS_S = 5.0
MAX_CLOCK_STEP_S = 1.0
# Floors that a part may always be silent.
MIN_SILENCE_FLOORS = 5.0
# Deliveries of a stream that prove no decode: the role, and the first token.
MAX_FIRST_PIECES = 2
# Later requests that were served, before one that still waits counts as stuck.
MIN_OVERTAKES = 3
MAX_SERVED_KEPT = 64
# Requests that came within so many seconds may enter the engine's queue in any order: its front end reads and tokenizes
# them on several threads (llama.cpp: of eight long prompts at once, the first was seen to be served as the eighth).
ARRIVAL_SPREAD_S = 2.0
# Fewer silent streams are no finding on decodes.
MIN_SILENT_STREAMS = 2
# First tokens without any other, before the silence of all streams counts as stalled decodes.
MIN_FIRST_TOKENS = 3
# Seconds over which they must have come, and how many times the seconds of their prefills: prefills that go first end
# in bursts.
PREFILL_BURST_S = 3.0
PREFILL_BURST_FACTOR = 1.5
# Requests that ended without an admission, before admission counts as stalled.
MIN_FREED = 3
# Share of the KV cache in use from which preempted streams may wait long, and how many times longer.
KV_PRESSURE = 0.9
KV_PRESSURE_PATIENCE = 5.0
# Stuck streams count together within this window; so many are aborted in it, and so many withdraw readiness.
STUCK_WINDOW_S = 300.0
MAX_ABORTS_PER_WINDOW = 8
MIN_REPEATED_STUCK = 3
# Users who must have left unserved within the window, each after a floor, before their work counts as unserved.
MIN_UNSERVED: Final = 3
MIN_UNSERVED_S: Final = 2.0  # over which they leave: clients of one process that ends leave together
# Canaries of an idle engine that are looked at; how many must have starved, and passed, before some of its connections
# count as silent; and how often one followed the other, which a hang of all connections and its end do twice.
CANARIES_KEPT: Final = 8
MIN_EACH_CANARIES: Final = 2
MIN_CANARY_CHANGES: Final = 4
# Seconds that a finding must last, and share of the open requests that must be stuck, before it fails liveness.
SEVERE_AFTER_S = 180.0
SEVERE_STUCK_SHARE = 0.5
# Findings that only withdraw readiness: the engine serves others, or admits again when they end.
NEVER_SEVERE: Final = ("request_overtaken", "work_unserved", "admission_stalled")


@dataclass(frozen=True, slots=True)
class PartialHang:
    """A part that hangs: its reason code, since when, and whether it has lasted as long as failing liveness needs."""

    reason: str
    since: float
    severe: bool
    detail: str


@dataclass(slots=True)
class OpenStream:
    """One open request. `received_at` and `each`: when its last delivery came, and what each sequence had got by then.

    `seen`, `prefilled` and `level`: clock, prefill done by all, and token balance, when the engine last worked for it.
    """

    number: int
    lane: tuple[str, int] | None  # model and priority: requests of one lane are served in order; None: in no order
    prompt_tokens: int
    prefill: float
    likely_tokens: int  # that it may hold back: a few times the expected ones
    max_tokens: int  # that its client allows
    came: float
    seen: float
    prefilled: float
    level: float
    received_at: float
    each: float
    first: bool = False
    tokens: int = 0
    whole: bool = False  # its answer comes in one piece: whether it waits cannot be seen
    blocked: bool = False
    stuck: bool = False


@dataclass(slots=True)
class StreamTable:
    """What all detectors look at: the open streams, and the clock of parts, on which every time here is counted."""

    limits: SilenceLimits
    clock: float = 0.0
    streams: dict[Key, OpenStream] = field(default_factory=dict)
    balance: TokenBalance = field(default_factory=TokenBalance)
    counted: bool = False  # the engine has a counter of what it generates
    is_fcfs: bool = False  # the engine serves the requests of a lane in order
    max_context: int = 0  # tokens of its longest sequence; 0 if unknown
    prefilled: float = 0.0  # seconds of prefill, by the cost model, whose first token came
    # The last streams: when each came, its lane, and when it was served, on the clock.
    served: deque[tuple[float, tuple[str, int] | None, float]] = field(
        default_factory=lambda: deque(maxlen=MAX_SERVED_KEPT)
    )
    served_at: float = 0.0  # the last first token
    freed: int = 0  # requests that ended since then
    decoded_at: float = 0.0  # the last token of any stream past its first pieces
    decoded_prefilled: float = 0.0  # `prefilled` then
    first_tokens: int = 0  # since then
    numbers: int = 0  # of requests so far
    _ticked_at: float | None = None

    @property
    def open(self) -> list[OpenStream]:
        """Streams whose silence is the engine's."""
        return [stream for stream in self.streams.values() if not stream.blocked]

    @property
    def min_silence(self) -> float:
        """Seconds that any part may be silent."""
        return max(self.limits.unlearned, MIN_SILENCE_FLOORS * self.limits.floor)

    def tick(self, now: float, progress_at: float | None) -> None:
        """Advance the clock if the engine makes progress."""
        before, self._ticked_at = self._ticked_at, now
        if before is not None and progress_at is not None and now - progress_at <= CLOCK_RUNS_AFTER_PROGRESS_S:
            self.clock += min(now - before, MAX_CLOCK_STEP_S)

    def admit(self, key: Key, event: Admitted, prefill: float, whole: int) -> None:
        """Add a request. `prefill` and `whole` are those of the ledger's hold."""
        expected, allowed = event.expected, event.max_output or self.max_context or LONGEST_ANSWER_TOKENS
        likely = min(allowed, 4 * expected.output + 256)
        self.streams[key] = OpenStream(
            number=self._next_number(),
            lane=None if event.reorders else (event.model, event.priority),
            prompt_tokens=(expected.uncached + expected.cached) // expected.prompts,
            prefill=prefill,
            likely_tokens=likely,
            max_tokens=allowed if event.stream or whole else likely,
            came=self.clock,
            seen=self.clock,
            prefilled=self.prefilled,
            level=self.balance.level,
            received_at=event.at,
            each=self.balance.each,
            whole=not event.stream,
        )

    def first_token(self, key: Key, event: FirstToken) -> None:
        """A stream was served."""
        stream = self.streams.get(key)
        if stream is not None and not stream.first:
            stream.first = True
            self._serve(stream)
            self._receive(stream, event.at)
            self.first_tokens += 1

    def deliver(self, key: Key, tokens: int, at: float) -> bool:
        """Tokens, or other bytes, reached a client. Returns True when they prove a decode."""
        stream = self.streams.get(key)
        if stream is None:
            return False
        if tokens <= 0:  # bytes of an answer whose tokens cannot be counted
            self._receive(stream, at)
            return stream.first
        stream.tokens += tokens
        self.balance.delivered(tokens, at)
        self._receive(stream, at)
        return stream.tokens > MAX_FIRST_PIECES

    def block(self, key: Key, event: RequestBlocked) -> None:
        """A stream waits for its client or in the relay, or goes on."""
        if (stream := self.streams.get(key)) is not None:
            stream.blocked = event.on
            self._receive(stream, event.at)
            if not event.on and not stream.first:  # it waited in the relay: the engine has it from now on
                stream.number, stream.came = self._next_number(), self.clock

    def settle(self, key: Key, event: Settled) -> bool:
        """Remove a request. Returns True when its answer proves a decode."""
        stream = self.streams.pop(key, None)
        if stream is None:
            return False
        self.freed += 1
        if stream.first:
            self.balance.delivered(max(0, event.delivered_tokens - stream.tokens), event.at)
        if event.outcome != "ok":
            return False
        if not stream.first:
            self._serve(stream)
        return event.delivered_tokens > MAX_FIRST_PIECES

    def read(self, sample: EngineSample, at: float, before: EngineSample | None, *, canary: bool) -> None:
        """Compare with the engine's counters: a silent stream for which it generates is not silent.

        `before`: the page of the same process before; `canary`: one ran since then.
        """
        since = self.balance.read_at
        open_ = self.open
        still = [stream for stream in open_ if since is not None and stream.received_at < since]
        silent = sum(stream.first for stream in still)
        moving, waiting = len(open_) - len(still), len(still) - silent
        self.balance.read(sample, at, before, moving=moving, silent=silent, waiting=waiting, canary=canary)
        for stream in still:
            if self.balance.level > stream.level and not stream.stuck and not self.is_overdue(stream):
                self.restart_silence(stream)

    def restart_silence(self, *streams: OpenStream) -> None:
        """The silence of these streams begins now."""
        for stream in streams:
            stream.seen, stream.prefilled, stream.level = self.clock, self.prefilled, self.balance.level
            stream.stuck = False

    def unexplained(self, stream: OpenStream, learned: LatencyModel) -> float:
        """Seconds of a stream's silence that the prefill done meanwhile does not explain."""
        return self.clock - stream.seen - learned.slowness * (self.prefilled - stream.prefilled)

    def held_back(self, stream: OpenStream, learned: LatencyModel) -> float:
        """Seconds for which a stream's tokens may be held back: where none are counted, all that its client allows."""
        if self.counted:
            return max(0, stream.likely_tokens - stream.tokens) * learned.token_seconds
        return self.limits.margin * max(0, stream.max_tokens - stream.tokens) * learned.token_seconds

    def overtakes(self, stream: OpenStream) -> int:
        """Later requests that were served while this one was silent, although they come after it in the queue."""
        if not self.is_fcfs or stream.lane is None:
            return 0
        later = stream.came + ARRIVAL_SPREAD_S
        return sum(came > later and lane == stream.lane and at >= stream.seen for came, lane, at in self.served)

    def waiting_since(self) -> float | None:
        """When the oldest open request came; None where one of them was begun, or none is open."""
        open_ = self.open
        return None if any(stream.first for stream in open_) else min((s.received_at for s in open_), default=None)

    def waiting_prefill(self, until: float) -> float:
        """Seconds of prefill of the streams that wait and came before the clock read `until`."""
        return sum(stream.prefill for stream in self.open if not stream.first and stream.came <= until)

    def _next_number(self) -> int:
        self.numbers += 1
        return self.numbers

    def _serve(self, stream: OpenStream) -> None:
        self.prefilled += stream.prefill
        self.served.append((stream.came, stream.lane, self.clock))
        self.served_at, self.freed = self.clock, 0

    def _receive(self, stream: OpenStream, at: float) -> None:
        stream.received_at, stream.each = at, self.balance.each
        self.restart_silence(stream)

    def is_overdue(self, stream: OpenStream) -> bool:
        """Whether a stream would long have all that its client allows, if it got as much as the others."""
        missing = stream.max_tokens - stream.tokens
        return self.balance.each - stream.each > self.limits.margin * missing


@dataclass(slots=True)
class SilentRank:
    """One data-parallel rank generates nothing while others do, although it has work; no prefill explains it.

    Its own gauges may have frozen at 0: a request that is silent for as long as the rank is work, too.
    """

    table: StreamTable
    _ranks: dict[int, tuple[float | None, float]] = field(default_factory=dict)  # counter, clock when it last moved

    def detect(self, ranks: tuple[RankSample, ...], learned: LatencyModel) -> str:
        """The finding in words, "" for none."""
        clock, limits = self.table.clock, self.table.limits
        silences = [self.table.unexplained(stream, learned) for stream in self.table.open]
        longest = max(silences, default=0.0)
        for rank in ranks:
            known, has_work = self._ranks.get(rank.rank), (rank.running or 0) + (rank.waiting or 0) > 0
            may_work = has_work or longest > limits.floor
            if known is None or known[0] != rank.generation_tokens or not may_work:
                self._ranks[rank.rank] = rank.generation_tokens, clock
        for rank in ranks if len(ranks) > 1 else ():
            _, moved = self._ranks[rank.rank]
            silent, has_gauge = clock - moved, (rank.running or 0) + (rank.waiting or 0) > 0
            if rank.generation_tokens is None or silent <= self.table.min_silence:
                continue
            if not has_gauge and longest <= self.table.min_silence:
                continue
            if silent > limits.margin * learned.seconds(self.table.waiting_prefill(moved + limits.floor)):
                return f"rank {rank.rank} has work and generated nothing for {silent:.0f} s while others did"
        return ""

    def is_suspected(self) -> bool:
        """Whether one rank had stopped clearly before the others."""
        moved = [at for _, at in self._ranks.values()]
        return len(moved) > 1 and max(moved) - min(moved) > self.table.limits.floor

    def reset(self) -> None:
        """The engine is another process."""
        self._ranks.clear()


@dataclass(slots=True)
class StalledDecodes:
    """First tokens come, and no stream gets any more; neither prefill nor tokens held back explain it."""

    table: StreamTable

    def detect(self, learned: LatencyModel) -> str:
        """The finding in words, "" for none."""
        table = self.table
        if table.first_tokens < MIN_SILENT_STREAMS:
            return ""
        silent_streams = [
            stream
            for stream in table.open
            if stream.first
            and stream.seen >= table.decoded_at
            and table.unexplained(stream, learned) > max(table.min_silence, table.held_back(stream, learned))
        ]
        if len(silent_streams) < MIN_SILENT_STREAMS:
            return ""
        silent = table.clock - min(stream.seen for stream in silent_streams)
        early = table.waiting_prefill(table.clock - silent + table.limits.floor)
        if silent <= table.limits.margin * learned.seconds(early):
            return ""
        count = len(silent_streams)
        return f"{count} streams have their first token and no other for {silent:.0f} s, while prefills go on"

    def is_suspected(self, learned: LatencyModel) -> bool:
        """Whether first tokens had come over some time, longer than their prefills took, and no other token."""
        table = self.table
        prefills = learned.slowness * (table.prefilled - table.decoded_prefilled)
        seconds = table.served_at - table.decoded_at
        is_long = seconds >= max(PREFILL_BURST_S, PREFILL_BURST_FACTOR * prefills)
        return table.first_tokens >= MIN_FIRST_TOKENS and is_long


@dataclass(slots=True)
class StalledAdmission:
    """Requests end and none that waits is admitted, although there is room in the KV cache."""

    table: StreamTable

    def detect(self, sample: EngineSample | None, learned: LatencyModel) -> str:
        """The finding in words, "" for none."""
        table = self.table
        silent = table.clock - table.served_at
        if table.freed < MIN_FREED or silent <= table.min_silence or has_kv_pressure(sample):
            return ""
        late = [s for s in table.open if not s.first and s.lane and table.clock - s.seen > table.min_silence]
        if not late or silent <= table.limits.margin * learned.seconds(sum(s.prefill for s in late)):
            return ""
        return f"{len(late)} requests wait; none was admitted for {silent:.0f} s, while {table.freed} ended"


@dataclass(slots=True)
class StuckStreams:
    """Single streams that are silent while others move. `aborted`, `found`: when, within STUCK_WINDOW_S."""

    table: StreamTable
    aborted: deque[float] = field(default_factory=deque)
    found: deque[float] = field(default_factory=deque)

    def find(self, now: float, sample: EngineSample | None, learned: LatencyModel) -> Iterator[Key]:
        """Mark the streams that are stuck alone. Yields those to abort now."""
        for times in (self.aborted, self.found):
            while times and times[0] < now - STUCK_WINDOW_S:
                times.popleft()
        for key, stream in self.table.streams.items():
            if stream.stuck or stream.blocked or not self._is_stuck(stream, sample, learned):
                continue
            stream.stuck = True
            self.found.append(now)
            if len(self.aborted) < MAX_ABORTS_PER_WINDOW:
                self.aborted.append(now)
                yield key

    def detect(self) -> str:
        """The finding in words, "" while stuck streams do not repeat."""
        found = len(self.found)
        if found < MIN_REPEATED_STUCK:
            return ""
        still = sum(stream.stuck for stream in self.table.open)
        return f"{found} streams were stuck within {STUCK_WINDOW_S:.0f} s while others moved; {still} still are"

    def are_most(self) -> bool:
        """Whether most of the open requests are stuck."""
        open_ = self.table.open
        return bool(open_) and sum(stream.stuck for stream in open_) / len(open_) >= SEVERE_STUCK_SHARE

    def are_suspected(self) -> bool:
        """Whether several streams had fallen silent one by one, not all at once."""
        long = CLOCK_RUNS_AFTER_PROGRESS_S + self.table.limits.floor
        silent = [stream.seen for stream in self.table.open if stream.first and self.table.clock - stream.seen > long]
        return len(silent) >= MIN_REPEATED_STUCK and max(silent) - min(silent) > self.table.limits.floor

    def _is_stuck(self, stream: OpenStream, sample: EngineSample | None, learned: LatencyModel) -> bool:
        table = self.table
        unexplained = table.unexplained(stream, learned)
        # Checked before the sum below, which a long queue would compute for each request that waits in it.
        if table.clock - stream.seen <= table.min_silence or unexplained <= table.min_silence:
            return False
        if not stream.first:
            return False  # it waits: it may be overtaken, and is never aborted
        has_queue = sample is not None and bool(sample.waiting)  # in which a preempted stream may wait
        if has_queue and table.overtakes(stream) < MIN_OVERTAKES:
            return False
        if stream.seen >= table.decoded_at and table.first_tokens >= MIN_SILENT_STREAMS:
            return False  # no stream decodes: it is not alone
        allowed = max(table.min_silence, table.held_back(stream, learned))
        return unexplained > allowed * (KV_PRESSURE_PATIENCE if has_kv_pressure(sample) else 1.0)


@dataclass(slots=True)
class OvertakenRequests:
    """A request waits while later ones of its lane are served again and again."""

    table: StreamTable

    def detect(self, sample: EngineSample | None, learned: LatencyModel) -> str:
        """The finding in words, "" for none."""
        if not self.table.is_fcfs or has_kv_pressure(sample):
            return ""
        found, early = [], 0.0  # the prefill of those that wait up to each
        for stream in sorted(self.table.streams.values(), key=lambda stream: stream.number):
            if stream.first:
                continue
            early += stream.prefill
            if not stream.blocked and self._is_overtaken(stream, early, learned):
                found.append(stream)
        if not found:
            return ""
        longest = max(self.table.clock - stream.seen for stream in found)
        return f"{len(found)} requests have waited for up to {longest:.0f} s while later ones like them were served"

    def _is_overtaken(self, stream: OpenStream, early: float, learned: LatencyModel) -> bool:
        table = self.table
        unseen = table.held_back(stream, learned) if stream.whole else 0.0
        if table.unexplained(stream, learned) <= max(table.min_silence, unseen):
            return False
        if table.overtakes(stream) < MIN_OVERTAKES:
            return False
        return table.clock - stream.seen > table.limits.margin * learned.seconds(early)


@dataclass(slots=True)
class UnservedWork:
    """Users leave without a byte, or should long have all that they asked for, and nothing is delivered to any other.

    `left`: when they left; `served_number`: the last request that had come when something was delivered.
    """

    table: StreamTable
    left: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_SERVED_KEPT))
    served_number: int = 0

    def settle(self, event: Settled, silent_since: float) -> None:
        """A request that the engine had ended. `silent_since`: when its silence began to be the engine's."""
        has_waited = (
            event.sent_at is not None and event.at - max(silent_since, event.sent_at) >= self.table.limits.floor
        )
        if event.outcome == "client_cancelled" and event.delivered_bytes == 0 and has_waited:
            self.left.append(event.at)

    def unread_left(self, at: float) -> None:
        """A call that is passed on unread ended without an answer, after longer than any takes."""
        self.left.append(at)

    def served(self) -> None:
        """Something was delivered, or a canary passed."""
        self.left.clear()
        self.served_number = self.table.numbers

    def detect(self, now: float) -> str:
        """The finding in words, "" for none."""
        while self.left and self.left[0] < now - STUCK_WINDOW_S:
            self.left.popleft()
        # all at once they left because of their own process
        if len(self.left) < MIN_UNSERVED or self.left[-1] - self.left[0] < MIN_UNSERVED_S:
            return self._find_overdue(now)
        seconds = now - self.left[0]
        return f"{len(self.left)} users left unserved within {seconds:.0f} s, and nothing was delivered to any other"

    def _find_overdue(self, now: float) -> str:
        """Requests for which the engine must have generated all that they may have, while no client got anything."""
        table, floor = self.table, self.table.limits.floor
        new = (stream for stream in table.open if not stream.first and stream.number > self.served_number)
        overdue = [now - s.received_at for s in new if now - s.received_at >= floor and table.is_overdue(s)]
        if not table.counted or len(overdue) < MIN_UNSERVED:
            return ""
        return f"{len(overdue)} users wait for up to {max(overdue):.0f} s, and no client gets what the engine generates"


@dataclass(slots=True)
class SilentConnections:
    """Of the connections to an idle engine some are answered and others not: one of its listeners hangs."""

    # The last canaries: when each ended, and whether it passed.
    ends: deque[tuple[float, bool]] = field(default_factory=lambda: deque(maxlen=CANARIES_KEPT))

    def observe(self, canary: CanaryResult) -> None:
        """A canary of an idle engine ended. Each has a connection of its own."""
        if canary.outcome in ("ok", "starved"):
            self.ends.append((canary.ended, canary.outcome == "ok"))

    def detect(self, now: float) -> str:
        """The finding in words, "" for none."""
        while self.ends and self.ends[0][0] < now - STUCK_WINDOW_S:
            self.ends.popleft()
        ends = [has_passed for _, has_passed in self.ends]
        passed, changes = sum(ends), sum(a != b for a, b in pairwise(ends))
        starved = len(ends) - passed
        if min(passed, starved) < MIN_EACH_CANARIES or changes < MIN_CANARY_CHANGES:
            return ""
        return f"{starved} of the last {len(self.ends)} connections got no answer while the others did"


@dataclass(slots=True)
class OversizedPrompt:
    """A prompt that can never enter the KV cache blocks the queue: nothing runs, and requests wait."""

    table: StreamTable

    def find(self, sample: EngineSample | None, age: float | None) -> Key | None:
        """The oldest such request, once.

        Its size is an estimate: it is believed only after a silence of half a floor, which nothing else explains.
        """
        if sample is None or sample.kv_capacity_tokens is None or sample.running != 0 or not sample.waiting:
            return None
        if age is None or age < self.table.limits.floor / 2:
            return None
        for key, stream in self.table.streams.items():
            if stream.prompt_tokens > sample.kv_capacity_tokens and not (
                stream.first or stream.blocked or stream.stuck
            ):
                stream.stuck = True
                return key
        return None


class PartialHangDetector:
    """Runs the detectors over one table of streams, and keeps since when each finding holds."""

    def __init__(self, limits: SilenceLimits) -> None:
        self.table = table = StreamTable(limits)
        self.silent_rank, self.stalled_decodes = SilentRank(table), StalledDecodes(table)
        self.stalled_admission, self.stuck_streams = StalledAdmission(table), StuckStreams(table)
        self.overtaken_requests, self.oversized_prompt = OvertakenRequests(table), OversizedPrompt(table)
        self.unserved_work, self.silent_connections = UnservedWork(table), SilentConnections()
        self._since: dict[str, float] = {}

    def deliver(self, key: Key, tokens: int, at: float) -> None:
        """Tokens, or other bytes, reached a client."""
        self.unserved_work.served()
        if self.table.deliver(key, tokens, at):
            self._decode()

    def settle(self, key: Key, event: Settled) -> None:
        """A request ended."""
        if (stream := self.table.streams.get(key)) is not None:
            self.unserved_work.settle(event, stream.received_at)
        if event.outcome == "ok":
            self.unserved_work.served()
        if self.table.settle(key, event):
            self._decode()

    def canary_ended(self, canary: CanaryResult, *, idle: bool) -> None:
        """A canary ended. `idle`: nothing else was outstanding."""
        if canary.outcome == "ok":
            self.unserved_work.served()
        if idle:
            self.silent_connections.observe(canary)

    def all_stalled(self) -> None:
        """The engine as a whole hangs: what it did not answer says nothing of one listener."""
        self.silent_connections.ends.clear()

    def tick(self, now: float, progress_at: float | None, *, trusted: bool) -> None:
        """Advance the clock. `trusted`: the engine is not exempt, and the sidecar itself is healthy."""
        self.table.tick(now, progress_at if trusted else None)
        if not trusted:
            self._since.clear()

    def judge(
        self, now: float, sample: EngineSample | None, learned: LatencyModel
    ) -> tuple[PartialHang | None, tuple[Key, ...]]:
        """Returns the finding, and the streams to abort because they are stuck alone."""
        self.table.counted = self.table.balance.has_counter(now)
        findings = {
            "rank_silent": self.silent_rank.detect(sample.ranks if sample else (), learned),
            "decode_stalled": self.stalled_decodes.detect(learned),
            "admission_stalled": self.stalled_admission.detect(sample, learned),
        }
        aborts: tuple[Key, ...] = ()
        if not any(findings.values()):
            aborts = tuple(self.stuck_streams.find(now, sample, learned))
            findings |= {
                "stream_stuck": self.stuck_streams.detect(),
                "request_overtaken": self.overtaken_requests.detect(sample, learned),
                "work_unserved": self.unserved_work.detect(now),
                "connection_silent": self.silent_connections.detect(now),
            }
        for reason, detail in findings.items():
            if not detail:
                self._since.pop(reason, None)
        reason = next((reason for reason, detail in findings.items() if detail), "")
        if not reason:
            return None, aborts
        since = self._since.setdefault(reason, now)
        return PartialHang(reason, since, self._is_severe(reason, now - since), findings[reason]), aborts

    def _is_severe(self, reason: str, seconds: float) -> bool:
        """Whether a restart is worth its cost: what stands still stays so, and it is much of the engine."""
        if seconds < SEVERE_AFTER_S or reason in NEVER_SEVERE:
            return False
        if reason == "connection_silent" and self.table.streams:
            return False  # its canaries are of an idle engine: they say nothing of those who are served now
        return reason != "stream_stuck" or self.stuck_streams.are_most()

    def suspected_cause(self, learned: LatencyModel) -> str:
        """The reason code of a part whose hang may have filled up the whole engine until nothing moves; "" for none."""
        suspected = {
            "rank_silent": self.silent_rank.is_suspected(),
            "decode_stalled": self.stalled_decodes.is_suspected(learned),
            "stream_stuck": self.stuck_streams.are_suspected(),
        }
        return next(iter([*self._since, *(reason for reason, holds in suspected.items() if holds)]), "")

    def reset(self) -> None:
        """The engine is another process: nothing of the old one's parts holds."""
        self.silent_rank.reset()
        self._since.clear()
        self.stuck_streams.found.clear()
        self.unserved_work.served()
        self.silent_connections.ends.clear()
        self.table.restart_silence(*self.table.streams.values())

    def _decode(self) -> None:
        if "decode_stalled" in self._since:  # it is over: what all were silent for was no single stream's
            self.table.restart_silence(*self.table.streams.values())
        table = self.table
        table.decoded_at, table.decoded_prefilled, table.first_tokens = table.clock, table.prefilled, 0


def has_kv_pressure(sample: EngineSample | None) -> bool:
    """Whether streams may have been preempted: the KV cache is nearly full, or not known, and requests wait."""
    if sample is None:
        return False
    return sample.kv_usage >= KV_PRESSURE if sample.kv_usage is not None else (sample.waiting or 0) > 0
