"""Healthy engines whose answers are silent on the wire: what such answers teach, and that none of them is taken for a hang."""

from __future__ import annotations

import pytest

from sidecar.events import Delivered, FirstToken
from sidecar.health.latency_model import LEAST_TOKEN, LatencyModel

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
    before = pod.control.progress.learned.token_seconds
    id = pod.admit()
    pod.tick(10)
    pod.control.on_event(0, FirstToken(id, pod.now - 0.2))
    pod.control.on_event(0, Delivered(id, pod.now, 6000, 24_000))
    pod.settle(id, 6000, pod.now - 0.2)
    assert pod.control.progress.learned.token_seconds == before


def test_tokens_that_never_came_do_not_shorten_the_time_of_those_that_did() -> None:
    """Hidden thoughts count in the usage, not among what was seen: 49 tokens in 1.96 s are 40 ms each."""
    pod = Pod()
    learned = pod.control.progress.learned
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
    for seconds in (0.0, 1e-6, LEAST_TOKEN, 1e-9) * 1000:
        learned.token_time(seconds)
    assert learned.token_seconds == pytest.approx(2 * LEAST_TOKEN)
