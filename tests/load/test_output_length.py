"""Output lengths: decayed histograms, and the blending of their levels."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.load.output_length import (
    BUCKET_COUNT,
    BUCKET_STARTS,
    MIDDLES,
    PRIOR,
    OutputForecast,
    OutputLengths,
    bucket_of,
)

lengths = st.lists(st.integers(0, 200_000), min_size=1, max_size=60)


def taught(answers: list[int]) -> OutputLengths:
    outputs = OutputLengths()
    for tokens in answers:
        outputs.learn("t", "m", 100, tokens)
    return outputs


def test_buckets_cover_every_length_once() -> None:
    """Each start begins its own bucket, and nothing exceeds the last one."""
    assert [bucket_of(start) for start in BUCKET_STARTS] == list(range(1, BUCKET_COUNT))
    assert bucket_of(0) == 0 and bucket_of(1 << 30) == BUCKET_COUNT - 1


@given(lengths, st.none() | st.integers(1, 5000))
def test_a_forecast_is_a_distribution_within_its_limit(answers: list[int], limit: int | None) -> None:
    """Shares sum to 1, quantiles grow, and the client's limit bounds mean and quantiles."""
    forecast = taught(answers).forecast("t", "m", 100, limit)
    assert sum(forecast.shares()) == pytest.approx(1.0)
    quantiles = [forecast.quantile(q) for q in (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)]
    assert all(a <= b for a, b in pairwise(quantiles))
    assert limit is None or (quantiles[-1] <= limit and forecast.mean() <= limit + 1e-9)


@given(lengths, lengths, st.none() | st.integers(0, 200_000), st.integers(0, 200_000))
def test_the_mean_and_what_is_left_are_those_of_the_shares(
    whole: list[int], cut: list[int], limit: int | None, came: int
) -> None:
    """Running sums and shortcuts equal the plain sums over all buckets."""
    outputs = taught(whole)
    for tokens in cut:
        outputs.learn("t", "m", 100, tokens, cut=True)
    forecast = outputs.forecast("t", "m", 100, limit)
    most = float("inf") if limit is None else limit
    rows = [(share, middle, min(middle, most)) for share, middle in zip(forecast.shares(), MIDDLES, strict=True)]
    assert forecast.mean() == pytest.approx(sum(share * tokens for share, _, tokens in rows))
    beyond = [(share, tokens) for share, middle, tokens in rows if middle > came]
    mass = sum(share for share, _ in beyond)
    if came < most and mass > 1e-6:
        plain = sum(share * tokens for share, tokens in beyond) / mass - came
        assert forecast.remaining([came]) == pytest.approx([min(max(1.0, plain), most - came)])


@given(lengths, st.integers(1, 5000), st.integers(0, 6000))
def test_what_is_left_never_passes_the_limit_and_is_never_nothing_before_it(
    answers: list[int], limit: int, came: int
) -> None:
    """At least one more token is expected of an open answer, and at most the client's limit."""
    [left] = taught(answers).forecast("t", "m", 100, limit).remaining([came])
    assert min(1, max(0, limit - came)) <= left <= max(0, limit - came)


def test_the_mean_residual_of_a_memoryless_length_is_level() -> None:
    """Geometric lengths: the expected rest is constant, to within the width of a bucket."""
    rng = random.Random(1)
    outputs = taught([int(rng.expovariate(1 / 300)) for _ in range(3000)])
    assert all(150 < left < 600 for left in outputs.forecast("t", "m", 100, None).remaining([1, 100, 300, 600]))


def test_quantiles_cover_what_they_say() -> None:
    """After 500 log-normal answers, the forecast 90th percentile holds for the next 2000, to within 3 points."""
    rng = random.Random(2)
    outputs, covered = taught([round(rng.lognormvariate(5, 1)) for _ in range(500)]), 0
    for _ in range(2000):
        tokens = round(rng.lognormvariate(5, 1))
        covered += tokens <= outputs.forecast("t", "m", 100, None).quantile(0.9)
        outputs.learn("t", "m", 100, tokens)
    assert 0.87 < covered / 2000 < 0.93


def test_old_answers_fade() -> None:
    """After a change of lengths, the forecast follows within some hundred answers."""
    outputs = taught([10] * 1000 + [1000] * 600)
    assert outputs.forecast("t", "m", 100, None).mean() > 900


def test_weights_that_grow_are_scaled_back() -> None:
    """After ten thousand answers the weights are finite, and the effective number is that of the decay."""
    outputs = taught([100] * 10_000)
    assert max(outputs.forecast("t", "m", 100, None).shares()) > 0.99


def test_an_unknown_tenant_borrows_from_its_model_and_an_unknown_model_from_the_prior() -> None:
    """Levels back off from the specific to the general, where more than one tenant has taught them."""
    outputs = taught([50] * 300)
    for _ in range(300):
        outputs.learn("second", "m", 100, 50)
        outputs.learn("third", "m", 100, 50)
    assert outputs.forecast("new", "m", 100, None).mean() < 60
    assert 50 < outputs.forecast("new", "m", 8000, None).mean() < 60  # another size class: the model's own
    assert list(outputs.forecast("t", "else", 100, None).shares()) == pytest.approx(list(PRIOR))


def test_one_tenant_alone_teaches_others_nothing() -> None:
    """Endless answers of one tenant, however many, leave what a new one and an established one expect."""
    outputs = OutputLengths()
    for _ in range(100):
        outputs.learn("honest", "m", 3000, 50)
    before = [outputs.forecast("honest", "m", 3000, None).mean(), outputs.forecast("new", "m", 8000, None).mean()]
    for _ in range(1000):
        outputs.learn("hostile", "m", 3000, 100_000)
        outputs.learn("hostile", "m", 8000, 100_000)
    after = [outputs.forecast("honest", "m", 3000, None).mean(), outputs.forecast("new", "m", 8000, None).mean()]
    assert after == pytest.approx(before, rel=0.05)
    assert outputs.forecast("hostile", "m", 3000, None).mean() > 90_000


def test_answers_that_were_cut_off_count_above_their_limit() -> None:
    """A tenant that always requests 16 tokens does not teach that answers have 16."""
    outputs = taught([400] * 50)
    for _ in range(500):
        outputs.learn("t", "m", 100, 16, cut=True)
    assert outputs.forecast("t", "m", 100, None).mean() > 300
    assert outputs.forecast("t", "m", 100, 16).mean() == pytest.approx(16, abs=0.5)


def test_a_cut_that_tells_nothing_changes_nothing() -> None:
    """A thousand requests for one token do not change the forecast."""
    outputs = taught([400] * 50)
    before = outputs.forecast("t", "m", 100, None)
    for _ in range(1000):
        outputs.learn("t", "m", 100, 1, cut=True)
    assert outputs.forecast("t", "m", 100, None) == before


def test_the_table_is_bounded() -> None:
    """The number of histograms is bounded, and those used last are kept."""
    outputs = OutputLengths(limit=30)
    for n in range(500):
        outputs.learn(f"tenant-{n}", "m", 100, 10)
    assert len(outputs) == 32  # and two of the typical tenants
    assert (
        outputs.forecast("tenant-499", "m", 100, None).mean() < outputs.forecast("tenant-0", "m", 100, None).mean() + 1
    )


def test_a_length_beyond_all_seen_is_expected_to_double() -> None:
    """Beyond the longest answer so far, as many tokens again are expected."""
    nothing_beyond = OutputForecast([(1.0, [1.0] + [0.0] * (BUCKET_COUNT - 1), 1.0, 0.0)])
    assert nothing_beyond.remaining([500.0]) == [500.0]
