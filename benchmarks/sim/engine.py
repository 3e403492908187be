"""A continuous-batching engine under a simulated clock, as a fluid: work flows in quanta of 0.5 s, not in single steps.

Rules, after vLLM: waiting requests are admitted in order while the batch and the KV cache have room; prefills go first
come, first served; either a prefill shares the step with the decodes (chunked) or the decodes starve until it ends. A
prefill under way moves no counter, only KV use. What the faults change is the product's own table
(`sidecar.tools.scripted_engine.faults`); the events are what a relay would send.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from sidecar.events import Delivered, Event, FirstToken, RequestSize
from sidecar.load import cost_model
from sidecar.tools.scripted_engine.behaviour import Behaviour
from sidecar.tools.scripted_engine.faults import changes_of
from sim.seqs import USER, Counters, Seq, Site, settled

QUANTUM_S = 0.5  # seconds: that of a tick, so that what a tick sees is what happened in it
CHUNK_SHARE = 0.85  # of a step that a chunked prefill takes while others decode
FAMILY = 32  # requests that share a decode step, as in the coefficients


@dataclass(slots=True)
class Engine:
    """One engine process. `advance` moves it and returns the relay's events; it is fed by `submit` and `abort`."""

    site: Site
    co: cost_model.Coefficients
    started: float
    how: Behaviour = field(default_factory=Behaviour)
    counters: Counters = field(default_factory=Counters)
    waiting: deque[Seq] = field(default_factory=deque)
    running: list[Seq] = field(default_factory=list)
    loop_at: float = 0.0  # the core's loop last came round
    token_at: float = 0.0  # the core last put out a token
    chunk_at: float = 0.0  # a client last got a chunk
    busy_at: float = 0.0  # work was last there
    compile_left: float = 0.0
    lag: float = 0.0  # seconds by which HTTP answers are late, in addition to what the fault says
    gauges: tuple[float, float] = (0.0, 0.0)  # running, waiting, as the core last reported them
    _inbox: list[Seq] = field(default_factory=list)  # sent while the API did not answer
    _held: list[Event] = field(default_factory=list)
    _late: list[Seq] = field(default_factory=list)  # canaries that ended while the API did not answer
    _victim: Seq | None = None
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _speed: float = 0.0

    def __post_init__(self) -> None:
        self.loop_at = self.token_at = self.chunk_at = self.busy_at = self.started
        self._speed = self.co.d * FAMILY / 1000
        self.counters.ranks = [0.0] * self.site.ranks

    @property
    def fastest(self) -> float:
        """Seconds per token of a stream while no prefill shares the steps."""
        return self._speed * self.site.slowness

    # --- what comes in ---

    def submit(
        self, id: str, prompt: int, limit: int, now: float, *, streams: bool = True, owner: str = USER
    ) -> Seq | None:
        """Queue a request. None when it is refused (a dead core, start-up): no event follows but the relay's own."""
        if self.how.after_idle and now - self.busy_at >= self.how.after_idle[0] and owner == USER:
            self.fault(self.how.after_idle[1])
        if self.how.error or self.how.loading or not self.how.port_open:
            return None
        need = cost_model.terms(RequestSize(prompt), self.co).before_first_token / 1000
        seq = Seq(id, prompt, limit, streams, owner, need, rank=next(self._numbers) % self.site.ranks)
        (self.waiting if self.how.answering else self._inbox).append(seq)
        if owner == USER:
            self.busy_at = now
        return seq

    def abort(self, seq: Seq, now: float) -> None:
        """The client hung up."""
        for place in (self.waiting, self.running, self._inbox):
            if seq in place:
                place.remove(seq)
        seq.ended_at = seq.ended_at or now
        if self.how.on_abort and seq.owner == USER:
            self.fault(self.how.on_abort)

    def fault(self, kind: str, **parameters: float) -> None:
        """Begin a fault of the product's table."""
        self.how = replace(self.how, **changes_of(kind, parameters))
        self.compile_left += self.how.first_step_seconds
        self.how = replace(self.how, first_step_seconds=0.0)

    def heal(self) -> None:
        """End all faults."""
        self.how = Behaviour()

    # --- what goes on inside ---

    def advance(self, start: float, end: float) -> list[Event]:
        """Move from `start` to `end`. Returns the events in order of time."""
        out: list[Event] = []
        now = start
        while now < end - 1e-9:
            dt = min(QUANTUM_S, end - now)
            now += dt
            self._quantum(dt, now, out)
        return out

    def _quantum(self, dt: float, now: float, out: list[Event]) -> None:
        if self.how.answering:
            self._flush(now, out)
        if not self.how.stepping or (self.how.dead_rank is not None and self.site.ranks == 1):
            return
        if not (self.running or self.waiting):
            self.loop_at, self.gauges = now, (0.0, 0.0)
            return
        if any(s.owner == USER for s in (*self.running, *self.waiting)):
            self.busy_at = now
        if self.compile_left > 0:
            self.compile_left -= dt
            return
        if self.how.admitting:
            self._admit()
        gpu = dt / (self.site.slowness * self.how.step_factor)
        outputs = self.counters.generation
        left = self._prefill(gpu, dt, now, out) if self.how.prefilling else gpu
        if self.how.decoding:
            self._decode(left, now, out)
        self.counters.iterations += self.how.empty_steps or self.counters.generation > outputs
        self.loop_at = now
        users = [s for s in self.running if not s.shadow]
        self.gauges = (float(len(users)), float(sum(not s.shadow for s in self.waiting)))

    def _admit(self) -> None:
        used = sum(s.prompt + s.tokens for s in self.running)
        while self.waiting and (self.waiting[0].shadow or len(self.running) < self.site.max_batch):
            head = self.waiting[0]
            if head.prompt > self.site.kv_tokens and not self.how.oversized:
                self.waiting.popleft()  # never fits: a real engine answers 400
                continue
            if used + head.prompt + 1 > self.site.kv_tokens:
                return
            used += head.prompt
            self.running.append(self.waiting.popleft())

    def _movable(self) -> list[Seq]:
        if not self.how.stuck_one:
            self._victim = None
        elif self._victim is None:
            self._victim = next((s for s in self.running if s.owner == USER), None)
        return [s for s in self.running if s is not self._victim and s.rank != self.how.dead_rank]

    def _prefill(self, gpu: float, dt: float, now: float, out: list[Event]) -> float:
        """Spend GPU seconds on prefills, first come first served, each first token at its own time in `dt`. Returns
        what is left for decodes."""
        movable = self._movable()
        prefills = [s for s in movable if not s.first]
        if not prefills:
            return gpu
        decoding = any(s.first for s in movable)
        left = gpu * (CHUNK_SHARE if decoding and not self.site.starves else 1.0)
        kept, most = gpu - left, left
        for seq in prefills:
            speed = seq.need / self.how.prefill_seconds * self.site.slowness if self.how.prefill_seconds else 1.0
            used = min(left, max(0.0, seq.need - seq.done) / speed)
            seq.done += used * speed
            left -= used
            if seq.done >= seq.need - 1e-9 and self.how.first_token:
                self._first(seq, now - dt * left / most, out)
            if left <= 1e-9:
                break
        return kept + left

    def _first(self, seq: Seq, now: float, out: list[Event]) -> None:
        seq.first, seq.tokens = True, 1.0
        if not seq.shadow:
            self.counters.prompt += seq.prompt
        self._output(seq, now, out)

    def _decode(self, gpu: float, now: float, out: list[Event]) -> None:
        for seq in [s for s in self._movable() if s.first]:
            most = seq.limit if self.how.last_token or seq.limit <= self.how.short else seq.limit - 1
            seq.tokens = min(max(seq.tokens, most), seq.tokens + gpu / self._speed)
            self._output(seq, now, out)

    def _output(self, seq: Seq, now: float, out: list[Event]) -> None:
        """Put out the whole tokens that are new, and end the request at its last."""
        tokens = int(seq.tokens) - seq.sent
        if tokens <= 0:
            return
        seq.sent += tokens
        ends = seq.sent >= seq.limit
        if not seq.shadow:
            self.counters.generation += tokens
            self.counters.ranks[seq.rank] += tokens
            self.counters.finished += ends
            self.token_at = now
        if ends:
            self.running.remove(seq)
            if seq.owner != USER and not self.how.answering:
                self._late.append(seq)
            elif seq.owner != USER and self.how.max_pieces is None:
                seq.ended_at = now
        if seq.owner == USER:
            self._deliver(seq, tokens, ends, now, out)
        elif seq.first_at is None and self.how.answering:
            seq.first_at = now

    def _deliver(self, seq: Seq, tokens: int, ends: bool, now: float, out: list[Event]) -> None:
        seq.pieces += 1
        if self.how.max_pieces is not None and (seq.pieces > self.how.max_pieces):
            return
        if seq.blocked:
            seq.unread += tokens
            seq.unread_since = now if seq.unread_since is None else seq.unread_since
            seq.ended_at = now if ends else None
            self.chunk_at = now
            return
        events: list[Event] = []
        if seq.streams or ends:
            events = self._shown(seq, tokens, now)
        if ends and self.how.max_pieces is None:
            seq.ended_at = now
            events.append(settled(seq, now, "ok"))
        if self.how.answering:
            self.chunk_at = now if events else self.chunk_at
            out.extend(events)
        else:
            self._held.extend(events)

    def _shown(self, seq: Seq, tokens: int, now: float) -> list[Event]:
        """What the relay says of tokens that reach a client: of an answer in one piece, bytes alone."""
        events: list[Event] = []
        if seq.streams and seq.first_at is None:
            seq.first_at = now
            events.append(FirstToken(seq.id, now))
        return [*events, Delivered(seq.id, now, tokens if seq.streams else 0, 4 * tokens)]

    def read(self, seq: Seq, now: float) -> list[Event]:
        """A client that did not read goes on: what waited for it comes at once."""
        seq.blocked = False
        if not seq.unread:
            return []
        events: list[Event] = []
        if seq.streams or seq.ended_at is not None:
            events = self._shown(seq, seq.unread, now)
        seq.unread, seq.unread_since, seq.reported = 0, None, False
        return [*events, settled(seq, now, "ok")] if seq.ended_at is not None else events

    def _flush(self, now: float, out: list[Event]) -> None:
        if self._inbox:
            self.waiting.extend(self._inbox)
            self._inbox.clear()
        for seq in self._late:
            seq.first_at = seq.ended_at = now
        self._late.clear()
        if self._held:
            out.extend(replace(f, at=now) for f in self._held)  # they reach the relay now
            self._held.clear()
            self.chunk_at = now
