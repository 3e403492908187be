"""The ground truth hidden from the routers: a continuous-batching engine, step by step, on hardware with a roofline.

It is not the cost model under another name, whose prices per token, per pair of tokens and per request know none of
this:
- A step lasts as long as the slower of arithmetic and memory traffic. The weights are read once per batch, so a token
  costs less in a large batch, and a prefill chunk hides the decoding in the same step.
- Each sequence costs the host some time. Steps are noisy, and some are delayed.
- Prompts are prefilled in chunks that share a budget with decoding. Cached prefixes cost nothing.
- When the KV cache is full, the youngest sequence is preempted and recomputed.

Consecutive steps that only decode are computed together: their durations form an arithmetic series.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass

from replay.requests import BLOCK, Request

STEP_TOKENS = 2048
MAX_RUNNING = 256
SATURATING_REQUESTS = 256


@dataclass(frozen=True, slots=True)
class Hardware:
    """Seconds. Defaults: an 8B model in bf16 on an H100 (50 % of 990 TFLOP/s; 70 % of 3.35 TB/s)."""

    weights: float = 16e9 / 2.3e12  # reading all weights once
    token: float = 16e9 / 495e12  # arithmetic of one token
    pair: float = 4 * 32 * 4096 / 495e12  # attention of one token to one other
    kv_read: float = 131_072 / 2.3e12  # reading one token's KV
    launch: float = 0.0015  # a step's own
    host: float = 0.00002  # a running sequence's share of scheduling and sampling
    kv_tokens: int = 440_000  # 58 GB
    noise: float = 0.08  # of one step: spread of its logarithm
    hiccup: tuple[float, float, float] = (1 / 2000, 0.05, 0.3)  # how often a step is delayed, and for how long

    def slower(self, factor: float) -> Hardware:
        """The same with all times longer."""
        times = (self.weights, self.token, self.pair, self.kv_read, self.launch, self.host)
        return Hardware(*(t * factor for t in times), self.kv_tokens, self.noise, self.hiccup)


@dataclass(slots=True, eq=False)
class Sequence:
    """One request inside an engine. `target` tokens are computed before its next new one."""

    id: str
    request: Request
    arrived: float
    target: int = 0
    computed: int = 0
    cached: int = 0  # at its first admission
    base: int = 0  # tokens generated before it joined the decoding
    joined: int = -1  # the engine's count of decode steps then; -1 while it does not decode
    ends: int = 0  # that count at its end
    first_at: float = -1.0
    expected_mu: float = 0.0
    reported: int = 0  # tokens reported to the ledger
    preempted: int = 0


class Engine:
    """One replica's engine. `step` must be called at `next_at`, when the current steps end."""

    def __init__(self, hardware: Hardware, rng: random.Random) -> None:
        self.hardware = hardware
        self.next_at = math.inf
        self.preemptions = 0
        self.busy_seconds = 0.0
        self.waiting: deque[Sequence] = deque()
        self.prefilling: list[Sequence] = []
        self.decoding: dict[str, Sequence] = {}  # in the order in which they began to decode
        self._rng = rng
        self._steps = 0  # decode steps so far
        self._context = 0  # tokens in the KV cache of those that decode
        self._ends: list[tuple[int, str]] = []
        self._cache: OrderedDict[object, None] = OrderedDict()
        self._began = 0.0
        # Duration of the first of the current steps, and the growth from each to the next.
        self._first = self._growth = 0.0
        self._count = 0
        self._chunks: list[tuple[Sequence, int]] = []

    @property
    def open(self) -> int:
        """Requests that have not ended."""
        return len(self.waiting) + len(self.prefilling) + len(self.decoding)

    def generated(self, s: Sequence, now: float) -> int:
        """Tokens that a sequence has given by `now`."""
        return s.base if s.joined < 0 else s.base + self._steps + self._done(now) - s.joined

    def arrive(self, s: Sequence, now: float) -> None:
        """A request arrives; a series of decode steps is cut at the end of the current one."""
        s.target = s.request.prompt
        self.waiting.append(s)
        if self._count == 0:
            self._plan(now)
        elif (done := self._done(now)) + 1 < self._count:
            self._count = done + 1
            self.next_at = self._began + self._length(self._count)

    def step(self, now: float) -> tuple[list[Sequence], list[Sequence]]:
        """End the current steps. Returns (sequences with their first token, sequences that ended)."""
        self.busy_seconds += now - self._began
        self._steps += self._count
        self._context += self._count * len(self.decoding)
        ended = self._ended()
        first: list[Sequence] = []
        for s, tokens in self._chunks:
            s.computed += tokens
            if s.computed < s.target:
                continue
            self.prefilling.remove(s)
            self._keep(s)
            s.base += 1
            if s.first_at < 0:
                s.first_at = now
                first.append(s)
            if s.base >= s.request.output:
                ended.append(s)
            else:
                self._decode(s)
        self._plan(now)
        return first, ended

    # --- the current steps ---

    def _length(self, count: int) -> float:
        return count * self._first + self._growth * count * (count - 1) / 2

    def _done(self, now: float) -> int:
        """Completed steps of the current series by `now`."""
        if self._count <= 1 or now >= self.next_at:
            return self._count if self._count and now >= self.next_at else 0
        past, g = now - self._began, self._growth
        if g <= 0:
            return min(self._count - 1, int(past / self._first))
        half = self._first - g / 2
        return min(self._count - 1, int((math.sqrt(half * half + 2 * g * past) - half) / g))

    def _plan(self, now: float) -> None:
        self._admit()
        self._make_room()
        batch, h = len(self.decoding), self.hardware
        self._chunks = self._share(STEP_TOKENS - batch)
        tokens = sum(n for _, n in self._chunks)
        self._began, self._count, self.next_at = now, 0, math.inf
        if not batch and not tokens:
            return
        pairs = sum(n * (s.computed + n / 2) for s, n in self._chunks)
        arithmetic = h.token * (tokens + batch) + h.pair * pairs
        memory = h.weights + h.kv_read * (self._context + sum(s.computed for s, _ in self._chunks))
        factor = self._rng.lognormvariate(0.0, h.noise)
        self._first = factor * (max(arithmetic, memory) + h.launch + h.host * (batch + len(self._chunks)))
        self._growth = factor * h.kv_read * batch if memory >= arithmetic else 0.0
        self._count = 1 if self._chunks else max(1, min(self._ends[0][0] - self._steps, self.room // batch))
        self.next_at = now + self._length(self._count) + self._hiccups(self._count)

    def _hiccups(self, steps: int) -> float:
        share, least, most = self.hardware.hiccup
        return self._rng.uniform(least, most) if self._rng.random() < share * steps else 0.0

    # --- who runs ---

    @property
    def room(self) -> int:
        """Tokens of the KV cache that no sequence holds or certainly needs."""
        return self.hardware.kv_tokens - self._context - sum(s.target for s in self.prefilling)

    def _admit(self) -> None:
        room = self.room
        while self.waiting and len(self.prefilling) + len(self.decoding) < MAX_RUNNING:
            s = self.waiting[0]
            if s.target + 1 > room and (self.prefilling or self.decoding):
                return
            self.waiting.popleft()
            s.computed = self._hit(s)
            if s.first_at < 0 and not s.preempted:
                s.cached = s.computed
            self.prefilling.append(s)
            room -= s.target

    def _share(self, budget: int) -> list[tuple[Sequence, int]]:
        chunks = []
        for s in self.prefilling:
            if budget <= 0:
                break
            tokens = min(budget, s.target - s.computed)
            chunks.append((s, tokens))
            budget -= tokens
        return chunks

    def _decode(self, s: Sequence) -> None:
        s.joined, s.ends = self._steps, self._steps + s.request.output - s.base
        self.decoding[s.id] = s
        self._context += s.request.prompt + s.base
        heapq.heappush(self._ends, (s.ends, s.id))

    def _ended(self) -> list[Sequence]:
        ended = []
        while self._ends and self._ends[0][0] <= self._steps:
            at, id = heapq.heappop(self._ends)
            if self._valid(at, id):
                s = self.decoding[id]
                self._leave(s)
                ended.append(s)
        return ended

    def _leave(self, s: Sequence) -> None:
        del self.decoding[s.id]
        s.base += self._steps - s.joined
        s.joined = -1
        self._context -= s.request.prompt + s.base

    def _make_room(self) -> None:
        """Preempt the youngest until each that decodes has room for its next token."""
        while len(self.decoding) > 1 and self.room < len(self.decoding):
            s = self.decoding[next(reversed(self.decoding))]
            self._leave(s)
            s.target, s.computed = s.request.prompt + s.base, 0
            s.preempted += 1
            self.preemptions += 1
            self.waiting.appendleft(s)
        while self._ends and not self._valid(*self._ends[0]):
            heapq.heappop(self._ends)

    def _valid(self, at: int, id: str) -> bool:
        """Whether an end is still valid: a preempted sequence ends later."""
        s = self.decoding.get(id)
        return s is not None and s.ends == at

    # --- prefix cache ---

    def _hit(self, s: Sequence) -> int:
        """Leading prompt tokens in the cache; at least one is always computed."""
        hits = 0
        for block in s.request.blocks:
            if block not in self._cache:
                break
            self._cache.move_to_end(block)
            hits += 1
        return min(hits * BLOCK, s.request.prompt - 1)

    def _keep(self, s: Sequence) -> None:
        for block in s.request.blocks:
            self._cache[block] = None
            self._cache.move_to_end(block)
        while len(self._cache) > self.hardware.kv_tokens // BLOCK:
            self._cache.popitem(last=False)


def busy_seconds(requests: Iterable[Request], hardware: Hardware) -> float:
    """Seconds that an engine needs for all requests if some always wait."""
    engine, now = Engine(hardware, random.Random(0)), 0.0
    coming = enumerate(requests)

    def start() -> None:
        for n, request in coming:
            engine.arrive(Sequence(str(n), request, now), now)
            return

    for _ in range(SATURATING_REQUESTS):
        start()
    while engine.next_at < math.inf:
        now = engine.next_at
        for _ in engine.step(now)[1]:
            start()
    return now
