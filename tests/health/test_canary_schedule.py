"""How long a canary may take, by why it is sent."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sidecar.health.canary_schedule import canary_allowed
from sidecar.health.progress import Evidence, SilenceLimits

LIMITS = SilenceLimits()
IDLE = Evidence(
    now=100.0,
    outstanding=0,
    waiting=0,
    engine_busy=False,
    progress_at=None,
    progress_kind="none",
    age=None,
    steps_age=None,
    prefill_age=None,
    allowed=12.0,
    ruled_by="floor",
    predicted=0.0,
    learned=True,
)
KNOWN = [0.1, 0.2, 0.1]


def test_start_up_gets_the_cap() -> None:
    """A cold start compiles for minutes."""
    assert canary_allowed("starting", IDLE, [], LIMITS, 0.0, 0.0) == LIMITS.cap


def test_two_canaries_of_an_idle_engine_outlast_a_kernel_that_compiles() -> None:
    """Together over 20 s, and soon enough after one interval to be found within 30 s."""
    first = canary_allowed("idle", IDLE, KNOWN, LIMITS, 0.0, 0.0)
    second = canary_allowed("suspect", IDLE, KNOWN, LIMITS, 0.0, 0.0)
    assert first == 8.0
    assert 20.0 < first + second < 22.0


def test_a_slow_engines_canaries_have_a_multiple_of_what_they_took() -> None:
    """What canaries take is known from those before; until then the floor rules."""
    assert canary_allowed("idle", IDLE, [1.0, 4.0, 2.0], LIMITS, 0.0, 0.0) == 20.0
    assert canary_allowed("idle", replace(IDLE, allowed=60.0), [0.1], LIMITS, 0.0, 0.0) == 60.0


@pytest.mark.parametrize(("age", "allowed"), [(12.5, 11.5), (18.0, 8.0), (30.0, 8.0)])
def test_what_steps_held_off_is_a_part_of_the_confirming_canarys_time(age: float, allowed: float) -> None:
    """A suspicion that came late is confirmed sooner; a canary always has its floor."""
    assert canary_allowed("suspect", replace(IDLE, age=age), KNOWN, LIMITS, 0.0, 0.0) == allowed


def test_a_long_silence_is_confirmed_in_a_short_time() -> None:
    """It has had all that its work may take."""
    assert canary_allowed("suspect", replace(IDLE, age=401.0, allowed=400.0), KNOWN, LIMITS, 0.0, 0.0) == 24.0


def test_patience_with_a_blocked_api_is_given_once() -> None:
    """It shrinks with the time for which nothing was answered, and no confirming canary gets it again."""
    blocked = replace(IDLE, allowed=102.0)
    assert canary_allowed("idle", blocked, KNOWN, LIMITS, 90.0, 10.0) == 88.0
    assert canary_allowed("suspect", blocked, KNOWN, LIMITS, 90.0, 100.0) == 13.0
    assert canary_allowed("suspect", replace(blocked, age=102.5), KNOWN, LIMITS, 90.0, 100.0) == 11.5
