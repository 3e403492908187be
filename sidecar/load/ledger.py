"""Pure: every admission holds model units until it is settled, exactly once.

    hold (Admitted) -> release of the prefill part (FirstToken) -> accrual per token (Delivered) -> settlement (Settled)

Rules:
- The load in flight is always the sum over the open holds.
- Settlement corrects a request's cost to the actual one: what the engine reported, else the most it can have done.
- A second Settled, or one of an unknown request, changes nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import msgspec
from msgspec import structs

from sidecar import events
from sidecar.events import Admitted, Delivered, Event, FirstToken, Outcome, RequestBlocked, RequestSize, Settled
from sidecar.load import cost_model
from sidecar.load.client_labels import ClientLabels, fold
from sidecar.load.prefill_queue import PrefillQueue

FLOW_WINDOW_S = 60.0
MAX_NAMES = 50  # default for tenants and models with labels of their own
RECENT_WINDOW_S = 10.0  # of the flow that routers weigh engines by
TOKEN_WINDOW_S = 5.0
# The engine or the sidecar is at fault.
FAILED_OUTCOMES: Final[frozenset[Outcome]] = frozenset(("engine_error", "stalled", "lost"))

# It ended without an answer from the engine.
LEFT_OUTCOMES: Final[frozenset[Outcome]] = frozenset(("client_cancelled", "lost"))
PACE_WEIGHT: Final = 0.1  # of one answer

# Of a recording that is transcribed: what Whisper's encoder computes, which takes as long as so many tokens.
AUDIO_FRAMES_PER_S: Final = 50

# Events of a stream that show no text yet: the role, and the first token.
MAX_FIRST_EVENTS: Final = 2

Key = tuple[int, str]  # (relay index, request id)


@dataclass(slots=True)
class AdmissionHold:
    """One open admission. `accrued` is the MU already counted in the flow.

    `blocked`: it waits for its client, or in the sidecar's own queue, not for the engine. `since`: when it began to
    wait for the engine: its admission, or the end of the last block.
    """

    admitted: Admitted
    since: float
    first_at: float | None = None
    last_at: float = 0.0
    delivered: int = 0
    accrued: float = 0.0
    blocked: bool = False
    slowed: bool = False  # its client blocked it after the first token, so its pace is no evidence about the engine
    prefill: float = 0.0  # seconds before the first token, by the cost model, if none of its prompt is cached
    begun_mu: float = 0.0  # of its prompt, as expected
    whole: int = 0  # maximum tokens of an answer that is not streamed; 0 for streams and SHORT_ROUTES
    remaining_mu: float = 0.0
    remaining_tokens: int = 0  # output tokens still expected

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens and frames of recordings, as estimated; all must be computed where the cache has none."""
        expected = self.admitted.expected
        return expected.uncached + expected.cached + round(expected.audio_seconds * AUDIO_FRAMES_PER_S)

    @property
    def route(self) -> str:
        """The route of its API."""
        return self.admitted.route

    @property
    def sequences(self) -> int:
        """Sequences that are computed at once, as far as the engine can."""
        return self.admitted.expected.sequences

    @property
    def size(self) -> float:
        """Its work in model units, as estimated."""
        return self.admitted.mu

    @property
    def has_media(self) -> bool:
        return self.admitted.expected.has_media

    @property
    def most_tokens(self) -> int | None:
        """Output tokens that its client allows over all sequences; None where it names no limit."""
        return self.admitted.max_output

    @property
    def shows(self) -> bool:
        """Whether it would be seen to generate: its text has begun to come, and it has nothing to withhold."""
        return self.delivered > MAX_FIRST_EVENTS and not self.admitted.withholds

    @property
    def pace(self) -> float | None:
        """Seconds per output token of a sequence, as they were seen to come; None where they were not (one piece)."""
        each = self.delivered / self.sequences
        if self.first_at is None or each < 2:
            return None
        return (self.last_at - self.first_at) / (each - 1)


class Settlement(msgspec.Struct, frozen=True, gc=False):
    """One settled request; `mu` is its actual cost. `tenant` and `model` are labels.

    `told`: all was reported by the engine; otherwise its tokens are estimated or counted in transit. `relabelled`:
    another name lost its label to one of them, and is part of `other` from now on.
    """

    admitted: Admitted
    settled: Settled
    tenant: str
    model: str
    work: RequestSize
    mu: float
    delivered: int
    slowed: bool = False  # its client blocked it after the first token
    pace: float | None = None  # seconds per output token, as the relay saw them come
    told: bool = False
    relabelled: bool = False

    @property
    def first_token_s(self) -> float | None:
        """Seconds from admission to a stream's first token. A long answer in one piece has a first byte, no token."""
        first_at = self.settled.first_at if self.admitted.stream else None
        return None if first_at is None else first_at - self.admitted.at

    @property
    def output_token_s(self) -> float | None:
        """Mean seconds between two tokens of a stream."""
        first_at, later_tokens = self.settled.first_at, self.delivered - 1
        if not self.admitted.stream or first_at is None or later_tokens < 1:
            return None
        return (self.settled.at - first_at) / later_tokens


@dataclass(slots=True)
class TenantTotals:
    """One tenant's sums since the start."""

    mu: float = 0.0
    requests: int = 0
    tokens: int = 0

    def plus(self, other: TenantTotals) -> TenantTotals:
        return TenantTotals(self.mu + other.mu, self.requests + other.requests, self.tokens + other.tokens)


@dataclass(frozen=True, slots=True)
class InFlight:
    """The load in flight."""

    mu: float
    prefill_tokens: int
    decode_tokens: int
    requests: int
    waiting: int


class SlidingSum:
    """Sum over a sliding window, in one-second buckets."""

    def __init__(self, window: float) -> None:
        self._window = window
        self._buckets: deque[list[float]] = deque()

    def add(self, amount: float, now: float) -> None:
        """Count `amount` at `now`. Late amounts count in the newest bucket."""
        if self._buckets and self._buckets[-1][0] >= int(now):
            self._buckets[-1][1] += amount
        else:
            self._buckets.append([int(now), amount])
        self._expire(now)

    def sum(self, now: float) -> float:
        """The sum over the last window, at least 0, as corrections can make a bucket negative."""
        self._expire(now)
        return max(0.0, sum(amount for _, amount in self._buckets))

    def per_second(self, now: float) -> float:
        return self.sum(now) / self._window

    def _expire(self, now: float) -> None:
        while self._buckets and self._buckets[0][0] <= now - self._window:
            self._buckets.popleft()


class Ledger:
    """Open holds, and sums of the settled ones. `labels` bounds the tenants and models that clients name."""

    def __init__(self, co: cost_model.Coefficients, labels: ClientLabels | None = None) -> None:
        self.co = co
        self.labels = labels or ClientLabels(MAX_NAMES)
        self._holds: dict[Key, AdmissionHold] = {}
        self._queue = PrefillQueue()
        self._pace: float | None = None  # decayed seconds per output token of a sequence
        self._unit_ms = cost_model.unit_ms(co)
        self._token_mu = cost_model.decode_ms(RequestSize(0), 1, co) / self._unit_ms
        self.flow, self.recent_flow = SlidingSum(FLOW_WINDOW_S), SlidingSum(RECENT_WINDOW_S)  # MU done
        self.tokens = SlidingSum(TOKEN_WINDOW_S)  # delivered
        self.finished, self.failed = SlidingSum(FLOW_WINDOW_S), SlidingSum(FLOW_WINDOW_S)  # requests
        self._delivered = 0  # a settlement may correct it downwards
        self.delivered_total = 0  # its maximum so far: a counter that falls would read as a restart
        self.tenant_totals: dict[str, TenantTotals] = {}
        self.totals: dict[tuple[str, str, Outcome], list[float]] = {}  # (tenant, model, outcome) -> [MU, requests]

    def apply(self, relay: int, event: Event) -> Settlement | None:
        """Apply an event of a relay. Returns the settlement if it ended a request."""
        if isinstance(event, Settled):
            return self._settle(relay, event)
        if isinstance(event, Admitted):
            self._hold(relay, event)
        elif isinstance(event, FirstToken | Delivered | RequestBlocked) and (hold := self.hold((relay, event.id))):
            self._update((relay, event.id), hold, event)
        return None

    def lose(self, relay: int, now: float) -> list[Settlement]:
        """Settle the open requests of a relay that died, as `lost`."""
        lost = []
        for hold in [hold for (owner, _), hold in self._holds.items() if owner == relay]:
            id, sent_at, seen = hold.admitted.id, hold.admitted.at, hold.delivered
            event = Settled(id, now, "lost", 0, None, seen, 0, hold.first_at, sent_at, 0.0, error="relay_died")
            lost.append(self._settle(relay, event))
        return [settlement for settlement in lost if settlement is not None]

    def holds(self) -> Iterator[AdmissionHold]:
        """The open holds, oldest first."""
        return iter(self._holds.values())

    def hold(self, key: Key) -> AdmissionHold | None:
        return self._holds.get(key)

    def in_flight(self) -> InFlight:
        holds = self._holds.values()
        waiting = [hold.admitted.expected.uncached for hold in holds if hold.first_at is None]
        mu, decode = sum((hold.remaining_mu for hold in holds), 0.0), sum(hold.remaining_tokens for hold in holds)
        return InFlight(mu, sum(waiting), decode, len(holds), len(waiting))

    def _hold(self, relay: int, event: Admitted) -> None:
        hold = AdmissionHold(event, event.at, last_at=event.at, remaining_mu=event.mu)
        hold.remaining_tokens = event.expected.output
        expected = event.expected
        begun_ms = cost_model.terms(expected, self.co).before_first_token
        hold.begun_mu = begun_ms / self._unit_ms
        if expected.cached:
            whole = structs.replace(expected, uncached=expected.uncached + expected.cached, cached=0)
            begun_ms = cost_model.terms(whole, self.co).before_first_token
        hold.prefill = begun_ms / 1000
        if not event.stream and event.route not in events.SHORT_ROUTES:
            hold.whole = event.max_output or events.LONGEST_ANSWER_TOKENS
        if self._holds.setdefault((relay, event.id), hold) is hold:
            self._queue.enter((relay, event.id), hold.prefill, event.at, shows=event.stream)

    def _update(self, key: Key, hold: AdmissionHold, event: FirstToken | Delivered | RequestBlocked) -> None:
        if isinstance(event, Delivered):
            hold.last_at = event.at
            self._deliver(hold, event.tokens, event.at)
            self._book(hold, event.at)
        elif isinstance(event, RequestBlocked):
            hold.blocked = event.on
            hold.slowed |= hold.first_at is not None
            if not event.on:
                hold.since = hold.last_at = event.at
            if hold.first_at is None:  # in the sidecar's own queue
                if event.on:
                    self._queue.forget(key, event.at)
                else:
                    self._queue.enter(key, hold.prefill, event.at, shows=hold.admitted.stream)
        elif hold.first_at is None:
            hold.first_at = hold.last_at = event.at
            self._queue.begin(key, event.at)
            self._book(hold, event.at)

    def _deliver(self, hold: AdmissionHold, tokens: int, at: float) -> None:
        hold.delivered += tokens
        self._delivered += tokens
        self.delivered_total = max(self.delivered_total, self._delivered)
        self.tokens.add(tokens, at)

    def _book(self, hold: AdmissionHold, at: float) -> None:
        """Update what a hold has accrued to the tokens delivered so far."""
        done = self._price(hold, hold.delivered)
        self._add_flow(done - hold.accrued, at)
        hold.accrued = done
        hold.remaining_tokens = remaining_tokens(hold)
        hold.remaining_mu = max(self._price(hold, hold.delivered + hold.remaining_tokens) - done, self._token_mu)

    def _price(self, hold: AdmissionHold, output: int) -> float:
        """MU of a hold with `output` tokens: `cost_model.mu`, without repeating the prefill part at every Delivered."""
        return hold.begun_mu + cost_model.decode_ms(hold.admitted.expected, output, self.co) / self._unit_ms

    def _add_flow(self, mu: float, at: float) -> None:
        self.flow.add(mu, at)
        self.recent_flow.add(mu, at)

    def _settle(self, relay: int, event: Settled) -> Settlement | None:
        hold = self._holds.pop((relay, event.id), None)
        if hold is None:
            return None
        pace, started = hold.pace, (hold.first_at or event.first_at) is not None
        share = self._leave_queue((relay, event.id), event, started=started)
        seen = hold.delivered if started else max(hold.delivered, self._unseen(hold, event))
        work = actual_work(hold.admitted.expected, event, started=started, delivered=seen, share=share)
        if work is None and event.outcome == "client_cancelled":
            event = structs.replace(event, outcome="not_begun")
        delivered = hold.delivered if work is None else work.output
        self._deliver(hold, delivered - hold.delivered, event.at)
        mu = cost_model.mu(work, self.co) if work is not None else 0.0
        self._add_flow(mu - hold.accrued, event.at)
        self.finished.add(1, event.at)
        if event.outcome in FAILED_OUTCOMES:
            self.failed.add(1, event.at)
        relabelled = is_accepted(hold, event) and self._accept(hold.admitted, mu, event.at)
        tenant, model = self.labels.of(hold.admitted.tenant, hold.admitted.model)
        total = self.totals.setdefault((tenant, model, event.outcome), [0.0, 0])
        total[0] += mu
        total[1] += 1
        totals = self.tenant_totals.setdefault(tenant, TenantTotals())
        totals.mu += mu
        totals.requests += 1
        totals.tokens += delivered
        work = work or RequestSize(0)
        told = event.usage is not None and not event.estimated
        if told and event.outcome == "ok":
            self._learn_pace(hold, event, work.output)
        return Settlement(
            hold.admitted,
            event,
            tenant,
            model,
            work,
            mu,
            delivered,
            hold.slowed,
            pace,
            told=told,
            relabelled=relabelled,
        )

    def _accept(self, admitted: Admitted, mu: float, at: float) -> bool:
        """Name the client of a request that the engine accepted. True if another one became part of `other`."""
        labels = self.labels
        if not labels.accept(admitted.tenant, admitted.model, mu, at):
            return False
        self.totals = fold(
            self.totals,
            lambda key: (*labels.of(key[0], key[1]), key[2]),
            lambda a, b: [x + y for x, y in zip(a, b, strict=True)],
        )
        self.tenant_totals = fold(self.tenant_totals, labels.tenant, TenantTotals.plus)
        return True

    def _learn_pace(self, hold: AdmissionHold, event: Settled, output: int) -> None:
        """Learn the time per token from a whole answer."""
        each = output // hold.admitted.expected.sequences
        if each < 2 or event.sent_at is None or hold.slowed:
            return
        first = event.sent_at + hold.prefill if hold.first_at is None else hold.first_at
        pace = max(0.0, event.at - first) / each
        self._pace = pace if self._pace is None else self._pace + PACE_WEIGHT * (pace - self._pace)

    def _unseen(self, hold: AdmissionHold, event: Settled) -> int:
        """Tokens that an answer in one piece can have had when its client left; its expected ones at most."""
        expected, pace = hold.admitted.expected, self._pace
        if hold.admitted.stream or event.sent_at is None or not pace or event.outcome not in LEFT_OUTCOMES:
            return 0
        seconds = event.at - event.sent_at - hold.prefill
        return max(0, min(expected.output, int(seconds / pace) * expected.sequences))

    def _leave_queue(self, key: Key, event: Settled, *, started: bool) -> float:
        """Remove an ended request from the engine's queue. Returns the share of its prompt that may be computed."""
        if started or event.sent_at is None or event.status >= 300:
            self._queue.forget(key, event.at)
        elif event.outcome in LEFT_OUTCOMES:
            return self._queue.drop(key, event.at)
        else:
            self._queue.begin(key, event.at)
        return 1.0


def is_accepted(hold: AdmissionHold, event: Settled) -> bool:
    """Whether the engine accepted a request: only then do its tenant and model get labels.

    An error in an answer of 200 does not count as accepted, nor does a status of 0 without a first token.
    """
    if event.status == 0 or event.outcome == "engine_error":
        return hold.first_at is not None
    return 200 <= event.status < 300 and event.outcome != "rejected"


def actual_work(
    expected: RequestSize, event: Settled, *, started: bool, delivered: int, share: float = 1.0
) -> RequestSize | None:
    """The actual work of a settled request; None if the engine cannot have begun it, or failed before its first token.

    `share`: how much of a prompt without a first token the engine can have computed.
    """
    if event.usage is not None:
        return cost_model.settled_work(expected, event.usage, 0)
    if event.sent_at is None or event.outcome == "rejected" or event.status >= 300:
        return None
    if not started and event.outcome in ("engine_error", "stalled"):
        return None
    work = cost_model.settled_work(expected, None, max(event.delivered_tokens, delivered))
    if event.outcome == "ok":  # a non-streamed answer without a usage
        return work if work.output else structs.replace(work, output=expected.output)
    return work if started else cost_model.part_of(work, share)


def remaining_tokens(hold: AdmissionHold) -> int:
    """Output tokens still expected, given those delivered, as answers often outlast their estimate.

    Linear between the points of the estimate's tail, constant beyond them, and never above the client's limit.
    """
    expected, delivered, tail = hold.admitted.expected.output, hold.delivered, hold.admitted.tail
    if not tail or expected == 0:
        return max(expected - delivered, 0)
    points = [(0, expected), *((at * expected, left) for at, left in zip(events.TAIL_MULTIPLES, tail, strict=False))]
    left = points[-1][1]
    for (x0, y0), (x1, y1) in pairwise(points):
        if delivered < x1:
            left = round(y0 + (y1 - y0) * (delivered - x0) / (x1 - x0))
            break
    limit = hold.admitted.max_output
    return left if limit is None else max(0, min(left, limit - delivered))
