"""The law of first tokens: never faster than the machine, and close to it where the observations tell."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from sidecar.events import RequestSize
from sidecar.health.latency_model import LatencyModel, fit_slowness
from sidecar.load.cost_model import Coefficients, terms

SIZES: dict[str, Callable[[random.Random], float]] = {
    "short": lambda r: 1000 * 4 ** (r.random() - 0.5),
    "middling": lambda r: 3000 * 4 ** (r.random() - 0.5),
    "wide": lambda r: 100 * 1000 ** r.random(),
}


def observed(
    r: random.Random, size: str, slowness: float, *, cached: float = 0.0, hiccups: float = 0.0
) -> tuple[float, float]:
    """One prefill: predicted seconds, and those that it took: 50 ms and some noise over slowness x predicted."""
    predicted = terms(RequestSize(int(SIZES[size](r))), Coefficients()).before_first_token / 1000
    took = 0.05 + slowness * predicted * (0.1 if r.random() < cached else 1.0) + r.expovariate(50)
    return predicted, took + (r.uniform(1, 20) if r.random() < hiccups else 0.0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("slowness", [1.0, 3.0, 20.0])
@pytest.mark.parametrize("cached", [0.0, 0.6])
def test_a_machine_is_never_held_to_be_faster_than_it_is(size: str, slowness: float, cached: float) -> None:
    """Whatever the sizes, and though most prompts come from the prefix cache: at most a tenth under the truth."""
    for seed in range(40):
        r = random.Random(seed)
        found, _ = fit_slowness([observed(r, size, slowness, cached=cached) for _ in range(40)])
        assert found >= 0.9 * slowness


@pytest.mark.parametrize("slowness", [1.0, 3.0, 20.0])
def test_short_prefills_do_not_inflate_what_long_ones_show(slowness: float) -> None:
    """Fixed overhead is distinguished from slowness where sizes differ, hiccups or not."""
    r = random.Random(7)
    found, overhead = fit_slowness([observed(r, "wide", slowness, hiccups=0.05) for _ in range(64)])
    assert found <= 1.6 * slowness
    assert overhead == pytest.approx(0.05, abs=0.05)


def test_indistinguishable_overhead_counts_as_slowness() -> None:
    """Prompts of one size only: one second each may be overhead, and is taken for a slow machine."""
    found, overhead = fit_slowness([(0.1, 1.0)] * 20)
    assert (found, overhead) == (pytest.approx(10.0), 0.0)


def test_the_model_is_fitted_again_only_when_there_are_new_first_tokens() -> None:
    """A tick without news costs nothing and changes nothing."""
    learned = LatencyModel()
    for _ in range(20):
        learned.first_token(2.0, 1.0)
    learned.refit()
    assert learned.seconds(10.0) == pytest.approx(20.0)
    learned.prefills.clear()
    learned.refit()
    assert learned.slowness == pytest.approx(2.0)
