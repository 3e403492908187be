"""The capacity follows the engine's measured speed, once it is sure; on synthetic engines, in simulated time."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import replace

import pytest

from sidecar.load.coefficient_monitor import CoefficientMonitor
from sidecar.load.cost_model import Coefficients
from sidecar.load.ledger import Ledger
from sidecar.load.measured_capacity import HYSTERESIS, MIN_WINDOWS, MeasuredCapacity, agreed
from sidecar.load.refit import Refit
from sidecar.load.work_windows import WorkWindow
from sidecar.readings import EngineIdentity

from .work import history, slower, windows

TRUE = Coefficients(k=5.0, a=0.2, b=2e-5, d=3.0, f=4e-4, g=0.05, h=4.0, batch=8, source="calibrated")


def fed(capacity: MeasuredCapacity, seen: Iterable[WorkWindow], refit: Refit, *, caching: bool = True) -> list[float]:
    """The slowness after each window."""
    found = []
    for window in seen:
        capacity.add(window, refit, caching=caching)
        refit.add(window)
        found.append(capacity.slowness)
    return found


def watched(seconds: float, *, slow: float, seed: int = 1, rate: float = 3.0) -> CoefficientMonitor:
    """A monitor with the default coefficients next to the scripted engine's scheduler."""
    monitor, ledger = CoefficientMonitor(Coefficients(), 0.0), Ledger(Coefficients())
    for at, event in history(Coefficients(), seconds, seed, rate=rate, slow=slow):
        if (settlement := ledger.apply(0, event)) is not None:
            monitor.settled(settlement)
            monitor.tick(ledger.holds(), at, EngineIdentity(), trusted=True)
    return monitor


@pytest.mark.parametrize("rate", [0.5, 2.0])
def test_an_uncalibrated_slow_engine_is_known_within_two_minutes(rate: float) -> None:
    """Two engines with the same default coefficients, one four times slower: so is its capacity."""
    fast, slow = (watched(120.0, slow=times, rate=rate).capacity.slowness for times in (1.0, 4.0))
    assert slow / fast == pytest.approx(4.0, rel=0.35)


def test_noise_does_not_move_it() -> None:
    """At 15 % noise of each window, the capacity is off for 5 % of a day of work at most, and by a third at most."""
    found = fed(MeasuredCapacity(TRUE), windows(TRUE, 8640, 1, noise=0.15), Refit(TRUE))
    assert sum(slowness != 1.0 for slowness in found) < 0.05 * len(found)
    assert max(abs(math.log(slowness)) for slowness in found) < math.log(4 / 3)


@pytest.mark.parametrize("times", [2.0, 4.0])
def test_a_slowdown_and_its_end_are_followed(times: float) -> None:
    """A calibrated engine that becomes slower and recovers: both are followed within a minute and a half of work."""
    capacity, refit = MeasuredCapacity(TRUE), Refit(TRUE)
    fed(capacity, windows(TRUE, 100, 1), refit)
    assert capacity.slowness == 1.0
    assert fed(capacity, slower(windows(TRUE, 9, 2), times), refit)[-1] == pytest.approx(times, rel=0.25)
    assert fed(capacity, windows(TRUE, 9, 3), refit)[-1] == pytest.approx(1.0, rel=0.25)


def test_prompts_that_may_be_cached_are_no_speed() -> None:
    """Faster than measured counts only where the engine reports cached tokens, and within the bounds."""
    for caching, expected in ((False, 1.0), (True, 0.5)):
        found = fed(MeasuredCapacity(TRUE), slower(windows(TRUE, 60, 1), 0.2), Refit(TRUE), caching=caching)
        assert found[-1] == expected


def test_windows_that_disagree_or_are_few_decide_nothing() -> None:
    """It needs MIN_WINDOWS that agree; a single outlier among them changes nothing."""
    assert agreed([1.0] * (MIN_WINDOWS - 1)) is None
    assert agreed([-2.0, 2.0, -1.0, 1.0, 3.0]) is None
    found = agreed([1.0, 1.1, 0.9, 1.0, 9.0])
    assert found is not None and found[0] == 1.0 and found[1] < 0.1
    rng = random.Random(1)
    seen = [replace(w, ms=w.ms * (50.0 if rng.random() < 0.1 else 1.0)) for w in windows(TRUE, 200, 4, noise=0.05)]
    assert set(fed(MeasuredCapacity(TRUE), seen, Refit(TRUE))) == {1.0}


def test_it_can_be_switched_off() -> None:
    """Without following, the coefficients alone determine the capacity."""
    found = fed(MeasuredCapacity(TRUE, follows=False), slower(windows(TRUE, 60, 1), 9.0), Refit(TRUE))
    assert set(found) == {1.0}


def test_small_differences_are_not_followed() -> None:
    """An engine within the hysteresis of its coefficients counts as measured."""
    seen = slower(windows(TRUE, 100, 1, noise=0.02), math.exp(HYSTERESIS / 2))
    assert set(fed(MeasuredCapacity(TRUE), seen, Refit(TRUE))) == {1.0}
