"""Pure: the time to first token (TTFT) and per output token (TPOT) that the next request will have here.

    TTFT = overhead + own prefill + prefill before it + a decode step + decode steps in between + wait for capacity

Rules:
- Each part follows from the cost model and the open requests; this engine's factor for it is fitted to the first
  tokens as they arrive (least_squares.py). So predictions match an engine that is slower than its coefficients.
- The prefill before a request is that of all that still await their first token, less what the first of them has had.
- Where the KV cache or the places for sequences are full, a request waits until enough of those that run have ended.
- A decode step's time is fitted to the requests that decode together and the tokens they attend to.
- An answer in one piece has no first token: it counts as decoding from when its prefill should be over.
- Requests that waited for their client or in the sidecar's own queue are predicted, but teach nothing.
- A prediction is made at admission and compared with the outcome. State is one record per open request.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass
from typing import Final

from sidecar.events import Admitted, Delivered, Event, FirstToken, RequestBlocked
from sidecar.load import cost_model
from sidecar.load.cost_model import Coefficients
from sidecar.load.least_squares import RelativeFit
from sidecar.load.ledger import AdmissionHold, Key
from sidecar.readings import EngineSample
from sidecar.snapshot import LatencyForecast

OVERHEAD_S: Final = 0.005  # of a request at all, before anything was measured
CHUNK_TOKENS: Final = 2048  # of a prefill between two decode steps (vLLM's max_num_batched_tokens), likewise
TTFT_PARTS: Final = 6
TTFT_FORGETTING: Final = 0.995  # about the last 200 first tokens count
TTFT_RIDGE: Final = 0.1
TPOT_FORGETTING: Final = 0.98  # about the last 50 windows
TPOT_RIDGE: Final = 0.02
SETTLED_AFTER: Final = 10
MIN_PACE_TOKENS: Final = 16  # of a window of decoding, whose pace is one measurement
MIN_PACE_S, MAX_PACE_S = 1.0, 10.0
MAX_PREDICTED: Final = 50  # admissions per tick whose prediction is compared with the outcome; more would only cost CPU
MAX_ERRORS: Final = 200  # recent predictions whose errors are reported
SIZE_WEIGHT: Final = 0.05  # of one request in the typical size
RELEASES_AGE_S: Final = 0.1  # the order in which running requests end is computed at most so often
MAX_PREFILL_S: Final = 60.0  # after which an answer in one piece counts as decoding, whatever was predicted
FOREIGN_WEIGHT: Final = 0.2  # of one reading of the engine's queue, which may be a second older than the events
MIN_KV_USAGE: Final = 0.3  # from which, with so many requests, the size of the KV cache can be inferred
MIN_KV_REQUESTS: Final = 4


@dataclass(slots=True, eq=False)
class _Open:
    """One open request. `ms` and `tokens` of its prompt are still to be computed; `context` is all that it holds."""

    hold: AdmissionHold
    ms: float
    tokens: int
    context: int
    row: tuple[float, ...] = ()
    predicted: float = 0.0
    is_running: bool = False
    is_clean: bool = True

    @property
    def shows_pace(self) -> bool:
        """Whether its tokens come as they are generated."""
        return self.hold.admitted.stream and not self.hold.admitted.withholds


class LatencyPredictor:
    """Predicts the latencies of one engine, from the events of its requests."""

    def __init__(self, co: Coefficients, slots: int = 0) -> None:
        """`slots`: sequences that run at once, as configured; 0: as the engine's queue shows."""
        self._co = co
        self._slots, self._has_fixed_slots = slots, slots > 0
        self._kv_tokens: float | None = None
        self._ttft = RelativeFit(TTFT_PARTS, TTFT_FORGETTING, TTFT_RIDGE, SETTLED_AFTER)
        self._tpot = RelativeFit(3, TPOT_FORGETTING, TPOT_RIDGE, SETTLED_AFTER)
        self.slowness = 1.0  # of the engine, until first tokens and decoding were measured
        self._foreign = 0.0  # requests that wait in the engine's queue and did not pass the relay
        self._predicted = 0  # since the last tick
        self._errors: deque[float] = deque(maxlen=MAX_ERRORS)
        self._open: dict[Key, _Open] = {}
        self._waiting: dict[Key, _Open] = {}  # for their first token, oldest first
        self._due: list[tuple[float, Key]] = []  # when the prefill of an answer in one piece should be over
        self._queue_ms, self._queue_tokens, self._queue_context = 0.0, 0, 0
        self._context = self._running = self._streams = 0  # of those that decode
        self._head_since = 0.0  # when the prefill of the first that waits began
        self._at = 0.0
        self._stream_s = self._busy_s = self._running_s = self._context_s = 0.0  # sums over the window of decoding
        self._tokens, self._window_at = 0, 0.0
        self._releases: list[tuple[float, int]] = []
        self._released_at = -math.inf
        reference = cost_model.terms(cost_model.REFERENCE, co).before_first_token
        self._typical_ms, self._typical_tokens = reference, float(cost_model.REFERENCE.uncached)

    # --- events ---

    def apply(self, key: Key, event: Event, hold: AdmissionHold | None) -> None:
        """Process an event of a request in the ledger."""
        if isinstance(event, Admitted):
            if hold is not None and key not in self._open:
                self._admit(key, hold, event.at)
        elif (request := self._open.get(key)) is not None:
            if isinstance(event, Delivered):
                self._deliver(request, event.tokens)
            elif isinstance(event, FirstToken):
                self._first_token(key, request, event.at)
            elif isinstance(event, RequestBlocked):
                request.is_clean = False

    def end(self, key: Key, at: float) -> None:
        """A request was settled."""
        request = self._open.pop(key, None)
        if request is None:
            return
        self._advance(at)
        if request.is_running:
            self._released_at = -math.inf
            self._running -= 1
            self._streams -= request.shows_pace
            self._context -= request.context
        else:
            self._leave_queue(key, request, at)

    def tick(self, sample: EngineSample, now: float) -> None:
        """Update from the engine's metrics and the measurements since the last tick."""
        self._advance(now)
        self._end_window(now)
        self._predicted = 0
        self._ttft.solve()
        self._tpot.solve()
        if sample.kv_capacity_tokens:
            self._kv_tokens = sample.kv_capacity_tokens * max(1, len(sample.ranks))
        elif sample.kv_usage is not None and sample.kv_usage >= MIN_KV_USAGE and self._running >= MIN_KV_REQUESTS:
            self._kv_tokens = self._context / sample.kv_usage
        foreign = max(0.0, (sample.waiting or 0.0) - len(self._waiting))
        self._foreign += FOREIGN_WEIGHT * (foreign - self._foreign)
        if not self._has_fixed_slots and sample.running is not None and sample.waiting is not None:
            if sample.waiting >= 1:
                self._slots = int(sample.running)
            elif sample.running >= self._slots:
                self._slots = 0

    # --- predictions ---

    def forecast(self, now: float) -> LatencyForecast:
        """The latencies of the next request."""
        self._advance(now)
        typical_ms, tokens = self._typical_ms, round(self._typical_tokens)
        row = self._row(0.0, 0, tokens, now)
        base = self._predict(row)
        times = self._times()
        per_second, per_token = times[1], times[4] * self._step_per_token()
        typical = base + per_second * typical_ms / 1000 + per_token * tokens
        idle = times[0] * OVERHEAD_S + per_second * typical_ms / 1000
        errors = sorted(self._errors)
        return LatencyForecast(
            base_seconds=base,
            seconds_per_prefill_second=per_second,
            seconds_per_token=per_token,
            reference_seconds=self._reference(base, per_second, per_token),
            tpot_seconds=self._step(self._running + 1, self._context + tokens),
            wait_seconds=sum(t * x for t, x in zip(times[2:], row[2:], strict=True)),
            typical_seconds=typical,
            idle_seconds=idle,
            first_tokens=self._ttft.seen,
            error_median=errors[len(errors) // 2] if errors else None,
            error_p90=errors[len(errors) * 9 // 10] if errors else None,
        )

    def predicted(self, key: Key) -> float:
        """The TTFT that was predicted for an open request; 0 beyond MAX_PREDICTED."""
        return self._open[key].predicted

    def _reference(self, base: float, per_second: float, per_token: float) -> float:
        work = cost_model.REFERENCE
        own = cost_model.terms(work, self._co).before_first_token / 1000
        return base + per_second * own + per_token * work.uncached

    def _predict(self, row: tuple[float, ...]) -> float:
        return sum(t * x for t, x in zip(self._times(), row, strict=True))

    def _times(self) -> list[float]:
        """This engine's factor for each part."""
        fit = self._ttft
        return fit.times if fit.seen else [self.slowness, self.slowness, self.slowness, 1.0, 1.0, 1.0]

    def _row(self, ms: float, tokens: int, context: int, now: float) -> tuple[float, ...]:
        """The parts of a request's TTFT in seconds, by the cost model."""
        queue_s = self._queue_s(now)
        step = self._step(self._running, self._context) if self._running else 0.0
        between = step * (self._queue_tokens + tokens) / CHUNK_TOKENS
        return OVERHEAD_S, ms / 1000, queue_s, 0.5 * step, between, self._capacity_wait(context, now)

    def _queue_s(self, now: float) -> float:
        """Seconds of prefill before a new request, by the cost model."""
        foreign = self._foreign * self._typical_ms / 1000
        if not self._waiting:
            return foreign
        head = next(iter(self._waiting.values()))
        done = min(head.ms / 1000, max(0.0, now - self._head_since) / (self._times()[2] or 1.0))
        return max(0.0, self._queue_ms / 1000 - done) + foreign

    def _step_per_token(self) -> float:
        return self._step(self._running, self._context) / CHUNK_TOKENS if self._running else 0.0

    def _step(self, running: float, context: float) -> float:
        """Seconds of a decode step."""
        return self._tpot.predict(_step_row(self._co, running, context)) * (1.0 if self._tpot.seen else self.slowness)

    def _capacity_wait(self, context: int, now: float) -> float:
        """Seconds until a request of `context` tokens, and those before it, have room to run."""
        sequences = len(self._waiting) + 1
        over = sequences + self._running - self._slots if self._slots else 0
        needed = 0.0 if self._kv_tokens is None else self._queue_context + context + self._context - self._kv_tokens
        if over <= 0 and needed <= 0:
            return 0.0
        if now - self._released_at > RELEASES_AGE_S:
            self._released_at = now
            running = (request for request in self._open.values() if request.is_running)
            step = self._step(self._running, self._context)
            self._releases = sorted((r.hold.remaining_tokens * step, r.context) for r in running)
        wait = 0.0
        for ends, released in self._releases:
            if over <= 0 and needed <= 0:
                break
            wait, over, needed = ends, over - 1, needed - released
        return max(0.0, wait - (now - self._released_at))

    # --- how requests move ---

    def _admit(self, key: Key, hold: AdmissionHold, now: float) -> None:
        self._advance(now)
        work = hold.admitted.expected
        ms = cost_model.terms(work, self._co).before_first_token
        request = _Open(hold, ms, work.uncached, work.uncached + work.cached)
        if self._predicted < MAX_PREDICTED or not hold.admitted.stream:
            self._predicted += 1
            request.row = self._row(ms, work.uncached, request.context, now)
            request.predicted = self._predict(request.row)
        self._typical_ms += SIZE_WEIGHT * (ms - self._typical_ms)
        self._typical_tokens += SIZE_WEIGHT * (work.uncached - self._typical_tokens)
        if not self._waiting:
            self._head_since = now
        self._open[key] = self._waiting[key] = request
        self._queue_ms += ms
        self._queue_tokens += work.uncached
        self._queue_context += request.context
        if not hold.admitted.stream:
            heapq.heappush(self._due, (now + min(request.predicted, MAX_PREFILL_S), key))

    def _first_token(self, key: Key, request: _Open, now: float) -> None:
        self._advance(now)
        if request.is_running:
            return
        took = now - request.hold.admitted.at
        if request.row and request.is_clean and took > 0:
            self._errors.append(abs(request.predicted / took - 1))
            self._ttft.add(request.row, took)
        self._run(key, request, now)

    def _run(self, key: Key, request: _Open, now: float) -> None:
        self._leave_queue(key, request, now)
        request.is_running = True
        self._running += 1
        self._streams += request.shows_pace
        self._context += request.context

    def _leave_queue(self, key: Key, request: _Open, now: float) -> None:
        if self._waiting.pop(key, None) is None:
            return
        self._head_since = now
        self._queue_tokens -= request.tokens
        self._queue_context -= request.context
        self._queue_ms = self._queue_ms - request.ms if self._waiting else 0.0

    def _deliver(self, request: _Open, tokens: int) -> None:
        request.context += tokens
        if request.is_running:
            self._context += tokens
            if request.shows_pace:
                self._tokens += tokens

    # --- time ---

    def _advance(self, now: float) -> None:
        """Let time pass: sums over the window, and answers in one piece whose prefill should be over."""
        while self._due and self._due[0][0] <= now:
            at, key = heapq.heappop(self._due)
            if (request := self._waiting.get(key)) is not None:
                self._pass(at)
                self._run(key, request, at)
        self._pass(now)

    def _pass(self, now: float) -> None:
        passed = max(0.0, now - self._at)
        self._at = max(self._at, now)
        if self._streams:
            self._busy_s += passed
            self._stream_s += self._streams * passed
            self._running_s += self._running * passed
            self._context_s += self._context * passed

    def _end_window(self, now: float) -> None:
        """Learn the pace of the window of decoding, once it has enough tokens."""
        lasted = now - self._window_at
        is_enough = self._tokens >= max(MIN_PACE_TOKENS, self._streams) and self._busy_s > 0
        if lasted < MIN_PACE_S or (not is_enough and lasted < MAX_PACE_S):
            return
        if is_enough:
            running, context = self._running_s / self._busy_s, self._context_s / self._busy_s
            self._tpot.add(_step_row(self._co, running, context), self._stream_s / self._tokens)
        self._stream_s = self._busy_s = self._running_s = self._context_s = 0.0
        self._tokens, self._window_at = 0, now


def _step_row(co: Coefficients, running: float, context: float) -> tuple[float, float, float]:
    """The parts of a decode step in seconds, by the cost model: at all, per request, and per token attended to."""
    step = co.d * co.batch / 1000
    return 0.8 * step, 0.2 * step * running / co.batch, co.f * context / 1000
