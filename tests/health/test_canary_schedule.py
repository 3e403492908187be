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
    assert canary_allowed("starting", IDLE, [], LIMITS) == LIMITS.cap


def test_a_slow_engines_canaries_have_a_multiple_of_what_they_took() -> None:
    """What canaries take is known from those before; until then the floor rules."""
    assert canary_allowed("idle", IDLE, KNOWN, LIMITS) == 8.0
    assert canary_allowed("idle", IDLE, [1.0, 4.0, 2.0], LIMITS) == 20.0
    assert canary_allowed("idle", replace(IDLE, learned=False), [0.1], LIMITS) == 60.0


def test_where_users_taught_enough_no_canary_need_come_before() -> None:
    """An engine with one slot is asked so seldom that it would never have three; that of its start does not count."""
    assert canary_allowed("idle", replace(IDLE, learned=False), [], LIMITS) == 60.0
    assert canary_allowed("idle", IDLE, [], LIMITS) == 12.0
    assert canary_allowed("idle", IDLE, [0.1], LIMITS) == 12.0
    assert canary_allowed("idle", IDLE, [5.0], LIMITS) == 25.0


def test_one_canary_that_waited_out_a_pause_does_not_lengthen_the_next() -> None:
    """The slowest counts for a few medians at most: else one pause of 26 s would hide the next hang for minutes."""
    assert canary_allowed("idle", IDLE, [0.5, 0.5, 0.5, 26.0], LIMITS) == 10.0


@pytest.mark.parametrize(("age", "allowed"), [(12.5, 62.5), (60.0, 15.0), (74.0, 8.0), (401.0, 8.0)])
def test_the_canary_of_a_silence_is_given_the_rest_of_it(age: float, allowed: float) -> None:
    """One that waits until a kill is due leaves less behind than many that are given up; each has its floor."""
    assert canary_allowed("suspect", replace(IDLE, age=age, kill_after=75.0), KNOWN, LIMITS) == allowed
