"""Pure: a continuous-batching scheduler over simulated steps: `plan` returns a step with its duration, `apply` runs it.

The rules follow vLLM's scheduler:
- a step has a token budget; running sequences decode one token each, prefills share the rest (chunked prefill);
- a chunk that does not finish its prompt yields no output and advances no counter, only KV use grows;
- waiting sequences are admitted by priority, then in order of arrival, while the batch and the KV cache have room; one
  whose grammar is compiled, or whose adapter finds no place in the batch, is passed over;
- when a decode finds no room, the youngest sequence of the last priority is preempted and recomputed;
- blocks of finished prompts stay in a bounded prefix cache.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field

from sidecar.tools.scripted_engine.behaviour import Behaviour

# Tokens per KV block: vLLM's default.
BLOCK_TOKENS = 16
# A step without work takes at least this long, which bounds the step rate of a stuck engine.
IDLE_STEP_S = 0.005


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """The engine's size and speed. Times in seconds, capacities in tokens."""

    prefill_tokens_per_second: float
    decode_step: float
    max_batch: int
    max_waiting: int
    kv_tokens: int
    step_tokens: int  # budget of one step
    max_adapters: int = 1  # of the running sequences


@dataclass(eq=False, slots=True)
class ScheduledSequence:
    """One request. `computed` tokens are in the KV cache; `limit` 0 means prefill only (embeddings)."""

    prompt: int
    limit: int
    blocks: tuple[int, ...] = ()  # hashes of the prompt's whole blocks
    finish: str = "stop"  # its finish_reason
    cached: int = 0
    computed: int = 0
    generated: int = 0
    restart: int = 0  # generated tokens to recompute after a preemption
    priority: int = 0  # the lowest goes first
    adapter: str = ""
    held: bool = False  # it cannot be scheduled yet
    zombie: bool = False  # it has no client

    @property
    def target(self) -> int:
        """Tokens to compute before the next new token."""
        return self.prompt + self.restart

    @property
    def prefilled(self) -> bool:
        return self.computed >= self.target


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """What one step will do: prefill chunks and decodes, and its duration."""

    seconds: float
    chunks: tuple[tuple[ScheduledSequence, int], ...] = ()
    decodes: tuple[ScheduledSequence, ...] = ()


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step yielded for one sequence. `prompt` > 0 if its prefill finished in this step."""

    sequence: ScheduledSequence
    tokens: int
    prompt: int = 0
    done: bool = False


@dataclass(slots=True)
class Scheduler:
    """All sequences of one core. Mutable state, synchronous methods."""

    limits: SchedulerLimits
    waiting: deque[ScheduledSequence] = field(default_factory=deque)
    running: list[ScheduledSequence] = field(default_factory=list)
    preemptions: int = 0
    victim: ScheduledSequence | None = None  # the stuck sequence of the `one_stream` fault
    _cache: OrderedDict[int, None] = field(default_factory=OrderedDict)

    def has_room(self) -> bool:
        """Whether the queue takes one more sequence."""
        return len(self.waiting) < self.limits.max_waiting

    def add(self, sequence: ScheduledSequence) -> None:
        behind = sum(other.priority > sequence.priority for other in self.waiting)
        self.waiting.insert(len(self.waiting) - behind, sequence)

    def remove(self, sequence: ScheduledSequence) -> bool:
        """Remove a sequence, running or waiting. False if it is already gone."""
        for place in (self.running, self.waiting):
            if sequence in place:
                place.remove(sequence)
                return True
        return False

    def is_busy(self) -> bool:
        return bool(self.running or self.waiting)

    def kv_usage(self) -> float:
        """Share of the KV blocks held by running sequences, 0..1."""
        return min(1.0, sum(_blocks(s.computed) for s in self.running) / self._capacity())

    def plan(self, behaviour: Behaviour) -> ScheduledStep:
        """Admit what fits, then choose the tokens of the next step."""
        self._set_zombies(behaviour)
        if behaviour.admitting:
            self._admit()
        movable = self._movable(behaviour)
        decodes = [s for s in movable if s.prefilled and behaviour.decoding and not _at_limit(s, behaviour)]
        decodes = self._preempt_for_room(decodes)
        prefills = [s for s in movable if not s.prefilled and s in self.running]
        budget = self.limits.step_tokens - len(decodes) if behaviour.prefilling else 0
        chunks = _chunks(prefills, budget, spare=0 if behaviour.first_token else 1)
        return ScheduledStep(self._seconds(chunks, decodes, behaviour), tuple(chunks), tuple(decodes))

    def apply(self, step: ScheduledStep) -> list[StepOutput]:
        """Execute the step for the sequences that have not been removed."""
        outputs = [self._decode(s) for s in step.decodes if s in self.running]
        for sequence, tokens in step.chunks:
            if sequence in self.running:
                sequence.computed += tokens
                if sequence.prefilled:
                    outputs.append(self._end_prefill(sequence))
        for output in outputs:
            if output.done:
                self.remove(output.sequence)
        return outputs

    def _admit(self) -> None:
        if len(self.running) >= self.limits.max_batch:
            return
        for head in list(self.waiting):
            if len(self.running) >= self.limits.max_batch:
                return
            if head.held or not self._has_place_for(head.adapter):
                continue
            free = self._capacity() - sum(_blocks(max(s.computed, s.target) + 1) for s in self.running)
            if _blocks(head.target + 1) > free:
                return
            self.waiting.remove(head)
            head.computed = self._cached_tokens(head)
            head.cached = head.cached if head.restart else head.computed
            self.running.append(head)

    def _has_place_for(self, adapter: str) -> bool:
        if not adapter:
            return True
        batch = {s.adapter for s in self.running} - {""}
        return adapter in batch or len(batch) < self.limits.max_adapters

    def _set_zombies(self, behaviour: Behaviour) -> None:
        if not behaviour.zombies and any(s.zombie for s in self.running):
            self.running[:] = [s for s in self.running if not s.zombie]
        while behaviour.zombies and len(self.running) < self.limits.max_batch:
            self.running.append(ScheduledSequence(1, 1 << 40, computed=1, zombie=True))

    def _cached_tokens(self, sequence: ScheduledSequence) -> int:
        """Leading prompt tokens in the prefix cache; at least one is always computed."""
        hits = 0
        for block in sequence.blocks:
            if block not in self._cache:
                break
            self._cache.move_to_end(block)
            hits += 1
        return min(hits, (sequence.prompt - 1) // BLOCK_TOKENS) * BLOCK_TOKENS

    def _movable(self, behaviour: Behaviour) -> list[ScheduledSequence]:
        if not behaviour.stuck_one:
            self.victim = None
        elif self.victim is None and self.running:
            self.victim = self.running[0]
        return [s for s in self.running if s is not self.victim]

    def _preempt_for_room(self, decodes: list[ScheduledSequence]) -> list[ScheduledSequence]:
        """Preempt the youngest sequence until each decode has a block for its next token."""
        while decodes and self._needed_blocks(decodes) > self._capacity() and len(self.running) > 1:
            youngest = max(reversed(self.running), key=lambda s: s.priority)
            self.running.remove(youngest)
            youngest.computed, youngest.restart = 0, youngest.generated
            if not youngest.zombie:  # another one takes its place
                before = sum(other.priority < youngest.priority for other in self.waiting)
                self.waiting.insert(before, youngest)
            self.preemptions += 1
            decodes = [s for s in decodes if s is not youngest]
        return decodes

    def _needed_blocks(self, decodes: list[ScheduledSequence]) -> int:
        return sum(_blocks(s.computed) for s in self.running) + sum(s.computed % BLOCK_TOKENS == 0 for s in decodes)

    def _seconds(
        self, chunks: list[tuple[ScheduledSequence, int]], decodes: list[ScheduledSequence], behaviour: Behaviour
    ) -> float:
        if not chunks and not decodes:
            return max(IDLE_STEP_S, self.limits.decode_step) * behaviour.step_factor
        if behaviour.prefill_seconds is None:
            prefill = sum(n for _, n in chunks) / self.limits.prefill_tokens_per_second
        else:
            prefill = sum(behaviour.prefill_seconds * n / max(1, s.target - s.cached) for s, n in chunks)
        return (prefill + self.limits.decode_step) * behaviour.step_factor

    def _end_prefill(self, sequence: ScheduledSequence) -> StepOutput:
        for block in sequence.blocks:
            self._cache[block] = None
            self._cache.move_to_end(block)
        while len(self._cache) > self._capacity():
            self._cache.popitem(last=False)
        prompt = 0 if sequence.restart else sequence.prompt
        return self._decode(sequence, prompt, new_kv=False)

    def _decode(self, sequence: ScheduledSequence, prompt: int = 0, *, new_kv: bool = True) -> StepOutput:
        """Generate one token; the first token after a prefill takes its KV slot in the next step."""
        sequence.computed += new_kv and not sequence.zombie
        if sequence.limit:
            sequence.generated += 1
        sequence.restart = 0
        tokens = 1 if sequence.limit else 0
        return StepOutput(sequence, tokens, prompt, sequence.generated >= sequence.limit)

    def _capacity(self) -> int:
        return max(1, self.limits.kv_tokens // BLOCK_TOKENS)


def _at_limit(s: ScheduledSequence, behaviour: Behaviour) -> bool:
    """Whether the `stuck_near_limit` fault holds back this sequence's last token."""
    return not behaviour.last_token and s.generated + 1 >= s.limit and s.prompt + s.limit > behaviour.short


def _chunks(prefills: list[ScheduledSequence], budget: int, spare: int) -> list[tuple[ScheduledSequence, int]]:
    """Share the budget among prefills in order of admission, never computing the last `spare` tokens of each."""
    chunks = []
    for sequence in prefills:
        tokens = min(budget, sequence.target - sequence.computed - spare)
        if tokens > 0:
            chunks.append((sequence, tokens))
            budget -= tokens
    return chunks


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)
