"""How long a process that replaced another one may start."""

from __future__ import annotations

from sidecar.health.progress import SilenceLimits
from sidecar.health.start_deadline import start_deadline

LIMITS = SilenceLimits()


def test_a_start_may_take_37_minutes_or_three_times_the_longest_seen() -> None:
    """A model may be loaded from the network this time."""
    assert start_deadline(0.0, 0.0, LIMITS) == 2250.0
    assert start_deadline(1500.0, 0.0, LIMITS) == 4500.0


def test_one_that_takes_connections_and_answers_nothing_is_no_start() -> None:
    """Engines open their port when they are loaded; a loading one answers 503."""
    assert start_deadline(60.0, 299.0, LIMITS) == 2250.0
    assert start_deadline(60.0, 300.0, LIMITS) == 300.0
    assert start_deadline(400.0, 700.0, LIMITS) == 2250.0
    assert start_deadline(400.0, 800.0, LIMITS) == 800.0
