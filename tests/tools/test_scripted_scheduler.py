"""The scripted engine's scheduler: batching, chunked prefill, KV limits, preemption, prefix cache."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sidecar.tools.scripted_engine.behaviour import Behaviour
from sidecar.tools.scripted_engine.scheduler import (
    BLOCK_TOKENS,
    ScheduledSequence,
    Scheduler,
    SchedulerLimits,
    StepOutput,
)

HEALTH = Behaviour()
LIMITS = SchedulerLimits(1000.0, 0.01, max_batch=8, max_waiting=100, kv_tokens=64 * BLOCK_TOKENS, step_tokens=100)


def step(scheduler: Scheduler, how: Behaviour = HEALTH) -> list[StepOutput]:
    return scheduler.apply(scheduler.plan(how))


def run(scheduler: Scheduler) -> int:
    """Steps until nothing is left."""
    steps = 0
    while scheduler.is_busy():
        step(scheduler)
        steps += 1
        assert steps < 100_000, "no progress"
    return steps


def test_two_sequences_take_the_steps_of_one() -> None:
    """Decoding is batched: two equal requests end after as many steps as one."""
    alone, both = Scheduler(LIMITS), Scheduler(LIMITS)
    alone.add(ScheduledSequence(10, 20))
    both.add(ScheduledSequence(10, 20))
    both.add(ScheduledSequence(10, 20))
    assert run(alone) == run(both) == 20


def test_a_chunked_prefill_gives_no_output_until_it_ends() -> None:
    """A prompt of three chunks has two steps in which only KV use grows, then its first token."""
    scheduler = Scheduler(LIMITS)
    scheduler.add(ScheduledSequence(250, 5))
    usage = [scheduler.kv_usage()]
    for _ in range(2):
        assert step(scheduler) == []
        usage.append(scheduler.kv_usage())
    assert usage == sorted(set(usage))
    assert [(o.tokens, o.prompt) for o in step(scheduler)] == [(1, 250)]


def test_the_time_of_a_step() -> None:
    """A step takes its prefill tokens at prefill speed plus one decode step, times the fault's factor."""
    scheduler = Scheduler(LIMITS)
    scheduler.add(ScheduledSequence(50, 5))
    assert abs(scheduler.plan(HEALTH).seconds - 0.06) < 1e-9
    assert abs(scheduler.plan(Behaviour(step_factor=10)).seconds - 0.6) < 1e-9
    assert abs(scheduler.plan(Behaviour(prefill_seconds=7)).seconds - 7.01) < 1e-9


def test_decodes_go_on_beside_a_long_prefill() -> None:
    """While one sequence's prompt is computed in chunks, a running one still gets a token in each step."""
    scheduler = Scheduler(LIMITS)
    short, long = ScheduledSequence(10, 50), ScheduledSequence(500, 5)
    scheduler.add(short)
    step(scheduler)
    scheduler.add(long)
    assert [o.sequence for o in step(scheduler)] == [short]


def test_the_head_of_the_queue_that_does_not_fit_blocks_those_behind() -> None:
    """Admission is in order of arrival: a prompt over the KV capacity holds the queue until it is removed."""
    scheduler = Scheduler(LIMITS)
    huge, small = ScheduledSequence(LIMITS.kv_tokens + 1, 1), ScheduledSequence(10, 1)
    scheduler.add(huge)
    scheduler.add(small)
    assert step(scheduler) == []
    assert scheduler.remove(huge)
    assert [o.sequence for o in step(scheduler)] == [small]


def test_preemption_when_the_cache_is_full() -> None:
    """Sequences that outgrow the KV cache are preempted, recomputed, and still end with all their tokens."""
    scheduler = Scheduler(SchedulerLimits(1000.0, 0.01, 8, 100, kv_tokens=8 * BLOCK_TOKENS, step_tokens=100))
    sequences = [ScheduledSequence(2 * BLOCK_TOKENS - 1, 3 * BLOCK_TOKENS) for _ in range(3)]
    for sequence in sequences:
        scheduler.add(sequence)
    run(scheduler)
    assert scheduler.preemptions > 0
    assert [s.generated for s in sequences] == [3 * BLOCK_TOKENS] * 3


def test_a_repeated_prompt_is_cached_in_whole_blocks() -> None:
    """The second of two equal prompts finds its blocks, but always computes at least one token."""
    scheduler = Scheduler(LIMITS)
    first = ScheduledSequence(4 * BLOCK_TOKENS, 1, blocks=(1, 2, 3, 4))
    again = ScheduledSequence(4 * BLOCK_TOKENS, 1, blocks=(1, 2, 3, 4))
    other = ScheduledSequence(4 * BLOCK_TOKENS, 1, blocks=(1, 9, 3, 4))
    for sequence in (first, again, other):
        scheduler.add(sequence)
        run(scheduler)
    assert (first.cached, again.cached, other.cached) == (0, 3 * BLOCK_TOKENS, BLOCK_TOKENS)


def test_the_prefix_cache_is_bounded() -> None:
    """The cache never holds more blocks than the KV cache has."""
    scheduler = Scheduler(LIMITS)
    for i in range(50):
        scheduler.add(ScheduledSequence(4 * BLOCK_TOKENS, 1, blocks=tuple(range(i * 4, i * 4 + 4))))
        run(scheduler)
    assert len(scheduler._cache) <= 64


@given(st.lists(st.tuples(st.integers(1, 700), st.integers(0, 60)), max_size=20))
def test_every_sequence_ends_with_its_tokens(sizes: list[tuple[int, int]]) -> None:
    """Any mix that fits the cache ends with all tokens, each prompt counted once, and nothing left."""
    scheduler = Scheduler(LIMITS)
    sequences = [ScheduledSequence(prompt, limit) for prompt, limit in sizes]
    outputs = []
    for sequence in sequences:
        scheduler.add(sequence)
    for _ in range(100_000):
        if not scheduler.is_busy():
            break
        outputs += step(scheduler)
        assert scheduler.kv_usage() <= 1
    assert [s.generated for s in sequences] == [limit for _, limit in sizes]
    assert sum(o.prompt for o in outputs) == sum(prompt for prompt, _ in sizes)
    assert scheduler.kv_usage() == 0 and not scheduler.is_busy()
