"""A continuous-batching engine under a simulated clock, as a fluid: work flows in quanta of 0.5 s, not in single steps.

Rules, after vLLM: waiting requests are admitted while the batch and the KV cache have room, in order of arrival or as
the site's scheduler has it; prefills go in order of admission; either a prefill shares the step with the decodes
(chunked) or the decodes starve until it ends. A prefill under way moves no counter, only KV use, unless the site counts
its batches. What the faults change is the product's own table (`sidecar.tools.scripted_engine.faults`) and FAULTS
below; the events are what a relay would send.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from msgspec import structs

from sidecar.events import Delivered, Event, FirstToken, RequestSize
from sidecar.load import cost_model
from sidecar.tools.scripted_engine.behaviour import Behaviour
from sidecar.tools.scripted_engine.faults import changes_of
from sim.seqs import IN_FULL, OURS, PLAIN, UNREAD, USER, ZOMBIE, Counters, Seq, Site, Special, settled

QUANTUM_S = 0.5  # seconds: that of a tick, so that what a tick sees is what happened in it
CHUNK_SHARE = 0.85  # of a step that a chunked prefill takes while others decode
FAMILY = 32  # requests that share a decode step, as in the coefficients
ENDLESS = 1 << 40  # tokens
NOT_FOUND, TOO_MANY, REFUSED = 404, 429, 503  # statuses

# Faults that only this engine has, as changes of its fields.
FAULTS: dict[str, dict[str, int | bool]] = {
    "refuse_all": {"refuses": REFUSED},  # nothing runs, and everything is refused at once
    "worker_lost": {"refuses": NOT_FOUND},  # the front lives, the worker behind it is gone
    "zombies": {"zombies": True},  # abandoned sequences run forever, in all slots
    "deaf_listener": {"deaf": True},  # of two listeners one takes connections and answers none
    "rank_gauge_stands": {"zero_gauge": True},  # the gauge of a dead rank reads 0
    "memory_released": {"released": True},  # a request that comes meanwhile kills the core
}


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
    refuses: int = 0  # the status of every request; 0: none
    refusal: int = 0  # the status of the last request that was refused
    zombies: bool = False
    deaf: bool = False
    zero_gauge: bool = False
    released: bool = False
    harmed: int = 0  # canaries that killed it
    steps: int = 0  # that the core began, the last one at `step_at`, of `step_tokens`; of all of them: `scheduled`
    step_at: float = 0.0
    step_tokens: float = 0.0
    scheduled: float = 0.0
    _inbox: list[Seq] = field(default_factory=list)  # sent while the API did not answer
    _held: list[Event] = field(default_factory=list)
    _late: list[Seq] = field(default_factory=list)  # canaries that ended while the API did not answer
    _victim: Seq | None = None
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _connections: Iterator[int] = field(default_factory=itertools.count)
    _speed: float = 0.0

    def __post_init__(self) -> None:
        self.step_at = self.loop_at = self.token_at = self.chunk_at = self.busy_at = self.started
        self._speed = self.co.d * FAMILY / 1000
        self.counters.ranks = [0.0] * self.site.ranks

    @property
    def fastest(self) -> float:
        """Seconds per token of a stream while no prefill shares the steps."""
        return self._speed * self.site.slowness

    # --- what comes in ---

    def submit(
        self,
        id: str,
        prompt: int,
        limit: int,
        now: float,
        *,
        streams: bool = True,
        owner: str = USER,
        special: Special = PLAIN,
    ) -> Seq | None:
        """Queue a request. None when it is refused, with the status `refusal`: no event follows but the relay's own."""
        if self.how.after_idle and now - self.busy_at >= self.how.after_idle[0] and owner == USER:
            self.fault(self.how.after_idle[1])
        if self.released and owner == OURS:
            self.harmed += 1
            self.fault("core_dead")
        self.refusal = self._refusal()
        if self.refusal:
            return None
        need = cost_model.terms(RequestSize(prompt), self.co).before_first_token / 1000 * self.site.prefill_slowness
        if special.seconds:
            need = special.seconds / self.site.slowness
        seq = Seq(id, prompt, limit, streams, owner, need, next(self._numbers) % self.site.ranks, special, now)
        if self.deaf and owner in (USER, OURS) and next(self._connections) % 2:
            return seq  # no one ever answers
        (self.waiting if self.how.answering else self._inbox).append(seq)
        if owner == USER:
            self.busy_at = now
        return seq

    def _refusal(self) -> int:
        """The status with which a request is refused now; 0 where it is taken."""
        if not self.how.port_open or self.how.loading:
            return REFUSED
        if self.refuses or self.how.error:
            return self.refuses or self.how.error
        is_full = self.site.queue and len(self.waiting) >= self.site.queue
        return (TOO_MANY if self.site.kind == "tgi" else REFUSED) if is_full else 0

    def abort(self, seq: Seq, now: float) -> None:
        """The client hung up."""
        if self.zombies and seq in self.running:
            seq.owner, seq.limit = ZOMBIE, ENDLESS
        for place in (self.waiting, self.running, self._inbox) if seq.owner != ZOMBIE else ():
            if seq in place:
                place.remove(seq)
        seq.ended_at = seq.ended_at or now
        if self.how.on_abort and seq.owner == USER:
            self.fault(self.how.on_abort)

    def fault(self, kind: str, **parameters: float) -> None:
        """Begin a fault of the product's table, or of FAULTS."""
        if kind in FAULTS:
            self._change(**FAULTS[kind])
            return
        self.how = replace(self.how, **changes_of(kind, parameters))
        self.compile_left += self.how.first_step_seconds
        self.how = replace(self.how, first_step_seconds=0.0)

    def heal(self) -> None:
        """End all faults."""
        self.how = Behaviour()
        self.refuses, self.zombies, self.deaf, self.zero_gauge, self.released = 0, False, False, False, False
        self.running = [s for s in self.running if s.owner != ZOMBIE]

    def _change(self, **changes: int | bool) -> None:
        for name, value in changes.items():
            setattr(self, name, value)
        if self.refuses:  # what runs is gone with the worker
            self.running.clear()
            self.waiting.clear()
        if self.zombies:
            for _ in range(self.site.max_batch):  # as many as there are slots, next to those that still run
                self.running.append(Seq("zombie", 100, ENDLESS, True, ZOMBIE, 0.0, first=True, tokens=1.0))

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
            self._admit(now)
        gpu = dt / (self.site.slowness * self.how.step_factor)
        outputs, done = self.counters.generation, self._computed()
        self._begin_step(now - dt)
        left = self._prefill(gpu, dt, now, out) if self.how.prefilling else gpu
        self.counters.iterations += self.site.counts_prefill and left < gpu
        if self.how.decoding:
            self._decode(left, now, out)
        self.counters.iterations += self.how.empty_steps or self.counters.generation > outputs
        self._schedule(done, now)
        self.loop_at = now
        users = [s for s in self.running if not s.shadow]
        self.gauges = (float(len(users)), float(sum(not s.shadow for s in self.waiting)))

    def _computed(self) -> float:
        return sum(s.computed() for s in self.running)

    def _in_one_step(self) -> Seq | None:
        """The prompt that a step without chunks computes to its end."""
        prefills = (s for s in self._movable() if not s.first and s.done > 0)
        return next(prefills, None) if self.site.starves else None

    def _begin_step(self, now: float) -> None:
        """A step begins with each quantum, unless the one before goes on."""
        if self._in_one_step() is None:
            self.steps, self.step_at = self.steps + 1, now

    def _schedule(self, before: float, now: float) -> None:
        """Count the tokens of the step, from its beginning all those of a prompt without chunks."""
        whole = self._in_one_step()
        tokens = max(0.0, self._computed() - before)
        self.step_tokens = whole.prompt if whole is not None else tokens
        if whole is None or self.step_at >= now - QUANTUM_S:
            self.scheduled += self.step_tokens

    def _admit(self, now: float) -> None:
        used = sum(s.prompt + s.tokens for s in self.running)
        while (head := self._head(now)) is not None and (head.shadow or len(self.running) < self.site.max_batch):
            if head.prompt > self.site.kv_tokens and not self.how.oversized:
                self.waiting.remove(head)  # never fits: a real engine answers 400
                continue
            if used + head.prompt + 1 > self.site.kv_tokens:
                return
            used += head.prompt
            self.waiting.remove(head)
            self.running.append(head)

    def _head(self, now: float) -> Seq | None:
        """The request that the scheduler admits next."""
        if not self.waiting:
            return None
        site, head = self.site, self.waiting[0]
        if site.order == "fcfs" and not site.adapters and now >= head.came + head.special.prepares:
            return head
        ready = [s for s in self.waiting if now >= s.came + s.special.prepares]
        if site.adapters:
            loaded = {s.special.adapter for s in self.running if s.special.adapter}
            has_room = len(loaded) < site.adapters
            ready = [s for s in ready if not s.special.adapter or s.special.adapter in loaded or has_room]
        if site.order == "priority":  # the sidecar's canary has the first one
            return min(ready, key=lambda s: (s.owner != OURS, s.special.priority), default=None)
        if site.order == "prefix":
            return min(ready, key=lambda s: (s.owner != OURS, s.prompt * 2_654_435_761 % 4096), default=None)
        return ready[0] if ready else None

    def _movable(self) -> list[Seq]:
        if not self.how.stuck_one:
            self._victim = None
        elif self._victim is None:
            self._victim = next((s for s in self.running if s.owner == USER and s.first), None)
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
        if not seq.shadow and seq.special.counted:
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
            if seq.special.counted:
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
        if not ends and 1 < seq.sent <= seq.special.hides:
            seq.kept += tokens
            self.chunk_at = now
            return
        if seq.streams or ends:
            events = self._shown(seq, tokens + seq.kept, now)
            seq.kept = 0
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
        is_read = seq.streams and seq.special.route not in (UNREAD, *IN_FULL)
        if is_read and seq.first_at is None:
            seq.first_at = now
            events.append(FirstToken(seq.id, now))
        return [*events, Delivered(seq.id, now, tokens if is_read else 0, 4 * tokens)]

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
            out.extend(structs.replace(f, at=now) for f in self._held)  # they reach the relay now
            self._held.clear()
            self.chunk_at = now
