"""Healthy engines whose answers are silent on the wire: what they teach, and that none of them is taken for a hang."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sidecar.events import AbortRequests, Delivered, FirstToken, Settled
from sidecar.health.latency_model import MIN_TOKEN_S, LatencyModel
from sidecar.health.monitor import TICK_S
from sidecar.readings import EngineSample

from .judged_pod import Pod

INSTANT = 1e-6  # seconds before its end at which the first byte of an answer in one piece is seen


def in_one_piece(pod: Pod, tokens: int, seconds: float) -> None:
    """One answer that is not streamed: its first byte comes with its last."""
    id = pod.admit(most=None, stream=False)
    pod.tick(seconds)
    pod.control.on_event(0, FirstToken(id, pod.now - INSTANT))
    pod.settle(id, tokens, pod.now - INSTANT)


@pytest.mark.parametrize("most", [4000, None])
def test_answers_in_one_piece_do_not_shorten_the_patience_with_the_next_one(most: int | None) -> None:
    """40 answers of 2 s, then one of 80 s on an engine with one slot, behind which the canary starves: healthy."""
    pod = Pod()
    for _ in range(40):
        in_one_piece(pod, 80, 2.0)
    pod.canaries = "starved"
    pod.control.health.progress.learned.one_by_one = 2  # as its canaries have shown
    pod.watch()
    id = pod.admit(most=most, stream=False)
    pod.tick(80)
    pod.settle(id, 3200)
    pod.tick(2)
    assert pod.well, pod.states


def test_answers_in_one_piece_teach_no_patience_with_streams() -> None:
    """After answers in one piece of 80 s, a freeze under streams is found as fast as if there had been none."""
    fresh, taught = Pod(), Pod()
    for _ in range(3):
        in_one_piece(taught, 3200, 80.0)
    for pod in (fresh, taught):
        pod.tick(20)
        pod.decoding()
        pod.canaries = "starved"
    assert taught.until("stalled") == fresh.until("stalled")


def test_a_stream_that_came_at_once_teaches_no_time_per_token() -> None:
    """6000 tokens were withheld and came within 0.2 s: they did not take 30 us each."""
    pod = Pod()
    before = pod.control.health.progress.learned.token_seconds
    id = pod.admit()
    pod.tick(10)
    pod.control.on_event(0, FirstToken(id, pod.now - 0.2))
    pod.control.on_event(0, Delivered(id, pod.now, 6000, 24_000))
    pod.settle(id, 6000, pod.now - 0.2)
    assert pod.control.health.progress.learned.token_seconds == before


def test_tokens_that_never_came_do_not_shorten_the_time_of_those_that_did() -> None:
    """Hidden thoughts count in the usage, not among what was seen: 49 tokens in 1.96 s are 40 ms each."""
    pod = Pod()
    learned = pod.control.health.progress.learned
    learned.token_seconds = 0.08
    id = pod.admit()
    pod.tick(60)
    pod.control.on_event(0, FirstToken(id, pod.now))
    first = pod.now
    pod.control.on_event(0, Delivered(id, first + 1.96, 50, 200))
    pod.tick(2)
    pod.settle(id, 6050, first)
    assert learned.token_seconds == pytest.approx(0.08)


def test_the_time_per_token_has_a_floor() -> None:
    """Whatever is reported, it is never learned to be less than any hardware needs."""
    learned = LatencyModel()
    for seconds in (0.0, 1e-6, MIN_TOKEN_S, 1e-9) * 1000:
        learned.token_time(seconds)
    assert learned.token_seconds == pytest.approx(2 * MIN_TOKEN_S)


def works(pod: Pod, running: int, speed: float, canaries: str = "starved") -> None:
    """The engine runs so many sequences and counts `speed` tokens a second; canaries starve where the batch is full."""
    pod.page = replace(pod.page or EngineSample(generation_tokens=0.0), running=running, waiting=0)
    pod.speed, pod.canaries = speed, canaries


def silent(pod: Pod, count: int, *, stream: bool = True, first: bool = True) -> list[str]:
    """Requests without max_tokens, admitted now; `first`: their stream has begun with its role."""
    ids = [pod.admit(most=None, stream=stream) for _ in range(count)]
    for id in ids if first else ():
        pod.control.on_event(0, FirstToken(id, pod.now))
    return ids


def flow(pod: Pod, seconds: float, *ids: str, events: int = 10) -> None:
    """Time in which each of these streams brings so many events per tick."""
    for _ in range(round(seconds / TICK_S)):
        pod.tick(TICK_S)
        for id in ids:
            pod.control.on_event(0, Delivered(id, pod.now, events, 4 * events))


def come_and_go(pod: Pod, seconds: float) -> None:
    """Time in which short streams of 20 tokens a second are served, one after the other."""
    for _ in range(round(seconds / 10)):
        id = pod.decoding()
        flow(pod, 10, id)
        pod.settle(id, 200)


@pytest.mark.parametrize("first", [True, False], ids=["after the role", "without any delta"])
def test_streams_whose_tokens_are_withheld_are_worked_for(first: bool) -> None:
    """Three tool calls of 6000 tokens at 50 ms, or thoughts that are hidden: silent for 300 s, then all at once."""
    pod = Pod()
    pod.watch()
    works(pod, 3, 60.0)
    ids = silent(pod, 3, first=first)
    pod.tick(300)
    for id in ids:
        pod.control.on_event(0, FirstToken(id, pod.now))
        pod.control.on_event(0, Delivered(id, pod.now, 6000, 24_000))
        pod.settle(id, 6000, pod.now)
    works(pod, 0, 0.0, "ok")
    pod.tick(20)
    assert pod.well, (pod.states, pod.ends)


def test_one_burst_takes_nothing_from_those_that_are_still_silent() -> None:
    """Of three tool calls one ends, and brings at once what was generated for it: the others go on for 200 s."""
    pod = Pod()
    pod.watch()
    works(pod, 4, 80.0)
    first, *others = silent(pod, 3)
    flowing = pod.decoding()
    flow(pod, 100, flowing)
    pod.control.on_event(0, Delivered(first, pod.now, 2000, 8000))
    pod.settle(first, 2000, pod.now)
    works(pod, 3, 60.0)
    flow(pod, 200, flowing)
    assert len(others) == 2 and pod.well, (pod.states, pod.ends)


@pytest.mark.parametrize("stream", [True, False], ids=["tool calls", "in one piece"])
def test_silent_answers_that_are_overtaken_are_worked_for(stream: bool) -> None:
    """Eight answers of 16,000 tokens at 25 ms, overtaken by short streams that are served: none is stuck."""
    pod = Pod()
    pod.watch()
    works(pod, 9, 8 * 40 + 20.0)
    ids = silent(pod, 8, stream=stream, first=stream)
    come_and_go(pod, 400)
    for id in ids:
        pod.settle(id, 16_000)
    works(pod, 0, 0.0, "ok")
    pod.tick(20)
    assert pod.well, (pod.states, pod.ends)


def test_answers_in_one_piece_of_an_engine_without_counters_have_what_their_client_allows() -> None:
    """The same eight next to short streams, and nothing but answers to judge by: without max_tokens none is cut."""
    pod = Pod()
    pod.watch()
    silent(pod, 8, stream=False, first=False)
    come_and_go(pod, 400)
    assert pod.well, (pod.states, pod.ends)


def test_what_is_generated_while_a_canary_waits_is_not_the_canarys() -> None:
    """It came just before a tool call took the only slot, and waits for 200 s: the counter moves for the user."""
    pod = Pod()
    pod.control.health.progress.learned.answers = 0  # unlearned: the canary is given as long as the silence
    pod.watch()
    pod.canaries = "starved"
    while pod.sent is None:
        pod.tick()
    works(pod, 1, 20.0)
    [id] = silent(pod, 1)
    pod.tick(200)
    pod.settle(id, 4000)
    assert pod.well, (pod.states, pod.ends)


def test_an_engine_that_counts_tokens_at_their_end_shows_its_work_by_steps() -> None:
    """llama.cpp with one slot and a tool call of 300 s: only n_decode_total moves."""
    pod = Pod()
    pod.watch()
    works(pod, 1, 0.0)
    silent(pod, 1)
    for n in range(300):
        pod.page = EngineSample(running=1, waiting=0, generation_tokens=5, iterations=20 * n, tokens_at_end=True)
        pod.tick(1)
    assert pod.well, (pod.states, pod.ends)


@pytest.mark.parametrize("events", [10, 4], ids=["a token each", "some tokens each"])
@pytest.mark.parametrize("others", [1, 20])
def test_a_stream_that_is_stuck_while_others_bring_all_that_is_generated_is_ended(others: int, events: int) -> None:
    """The counter moves for the others alone, whether their events hold one token or 2.5: no later than before."""
    pod = Pod()
    works(pod, others, 20.0 * others)
    ids = [pod.decoding() for _ in range(others)]
    flow(pod, 600, *ids, events=events)
    works(pod, others + 1, 20.0 * others)
    stuck = pod.decoding()
    flow(pod, 66, *ids, events=events)
    assert pod.ends == [(0, AbortRequests((stuck,), "stream_stuck"))]
    assert pod.state == "progressing"


def test_a_stream_that_is_stuck_after_it_was_worked_for_is_ended() -> None:
    """Silent for 300 s with its tokens counted, then stuck: its time runs from there, not from far above."""
    pod = Pod()
    works(pod, 2, 40.0)
    [stuck], flowing = silent(pod, 1), pod.decoding()
    flow(pod, 300, flowing)
    assert not pod.ends
    pod.speed = 20.0
    flow(pod, 90, flowing)
    assert pod.ends == [(0, AbortRequests((stuck,), "stream_stuck"))]


def test_streams_that_the_engine_no_longer_runs_are_stuck_though_its_counter_moves() -> None:
    """Each got its first token and no more, and the engine ended its work for them: others alone are generated for."""
    pod = Pod()
    pod.watch()
    for n in range(40):
        silent(pod, 1)
        works(pod, 1, 20.0)
        pod.tick(5)
        if n > 25:
            assert pod.state == "suspect"
    assert pod.reason == "decode_stalled"


@pytest.mark.parametrize("stream", [True, False], ids=["streams", "in one piece"])
def test_a_frozen_engine_that_counts_is_found_under_silent_answers(stream: bool) -> None:
    """The counter stands still with everything else: that is found no later than where each token is delivered."""
    pod = Pod()
    works(pod, 3, 60.0)
    silent(pod, 3, stream=stream, first=stream)
    pod.tick(100)
    pod.speed = 0.0
    assert pod.until("suspect") <= 15
    assert pod.until("stalled") <= 80


def test_a_counter_that_has_never_moved_is_no_evidence_against_answers_in_one_piece() -> None:
    """A page that has the series and never fills it: the answer may be silent for as long as its client allows."""
    pod = Pod()
    pod.watch()
    works(pod, 1, 0.0)
    pod.control.health.progress.learned.one_by_one = 2  # as its canaries have shown
    id = pod.admit(most=8000, stream=False)
    pod.tick(400)
    pod.settle(id, 8000)
    assert pod.well, (pod.states, pod.ends)


def test_streams_are_worked_for_after_the_engine_was_restarted() -> None:
    """The counter began again from nothing: the next silent streams have their tokens counted as those before."""
    pod = Pod()
    works(pod, 3, 60.0)
    ids = silent(pod, 3)
    pod.tick(100)
    for id in ids:
        pod.control.on_event(0, Settled(id, pod.now, "engine_error", 0, None, 0, 0, None, pod.now, 0.0))
    pod.page = EngineSample(running=0, waiting=0, generation_tokens=0.0)
    works(pod, 0, 0.0, "ok")
    pod.tick(10)
    pod.watch()
    works(pod, 3, 60.0)
    silent(pod, 3)
    pod.tick(300)
    assert pod.well, (pod.states, pod.ends)


@pytest.mark.parametrize("stream", [True, False], ids=["a stream", "in one piece"])
def test_a_request_that_the_engine_lost_is_found_next_to_answers_in_one_piece(stream: bool) -> None:
    """What is generated for answers in one piece excuses a lost request no longer than its client's limit allows.

    It waits, so readiness says so, and nothing is ended: it might yet be served.
    """
    pod = Pod()
    pod.watch()
    works(pod, 4, 80.0, "ok")
    lost = pod.admit(most=256, stream=stream)
    running = [pod.admit(most=256, stream=False) for _ in range(4)]
    for _ in range(60):
        pod.tick(10)
        for id in running:
            pod.settle(id, 200)
        running = [pod.admit(most=256, stream=False) for _ in range(4)]
    assert lost and not pod.ends and pod.reason == "request_overtaken"
