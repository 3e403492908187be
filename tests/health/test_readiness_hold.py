"""Readiness that was lost again and again waits before it comes back."""

from __future__ import annotations

from sidecar.events import Verdict
from sidecar.health.probes import ProbeState, passes
from sidecar.health.readiness_hold import CALM_S, WINDOW_S, ReadinessHold


def doubt(hold: ReadinessHold, at: float, seconds: float = 5.0) -> None:
    hold.tick("suspect", at)
    hold.tick("progressing", at + seconds)


def test_the_first_doubt_is_over_with_progress() -> None:
    """A pause of the engine costs no more readiness than it lasts."""
    hold = ReadinessHold()
    doubt(hold, 100.0)
    assert hold.seconds_left(105.0) == 0.0


def test_the_second_doubt_within_the_window_waits_for_calm() -> None:
    """An endpoint that flaps is worse for a router than one that is away."""
    hold = ReadinessHold()
    doubt(hold, 100.0)
    doubt(hold, 130.0)
    assert hold.seconds_left(135.0) == CALM_S and hold.seconds_left(135.0 + CALM_S) == 0.0


def test_doubts_far_apart_do_not_add_up() -> None:
    """Twice a day is no flapping."""
    hold = ReadinessHold()
    doubt(hold, 100.0)
    doubt(hold, 101.0 + WINDOW_S)
    assert hold.seconds_left(110.0 + WINDOW_S) == 0.0


def test_only_readiness_waits() -> None:
    """The engine works: liveness and start-up pass."""
    state = ProbeState(Verdict("progressing", "progress", "", 0.0, 0.0), True, False, settling=10.0)
    assert [passes(kind, state) for kind in ("live", "ready", "startup")] == [True, False, True]
