"""Limits of tenants: the file, and the arithmetic of buckets under a simulated clock."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sidecar.errors import UsageError
from sidecar.load.tenant_limits import (
    NEVER_RETRY_AFTER_S,
    TenantLimit,
    TenantLimits,
    TokenBucket,
    charge,
    check,
    parse,
    refill,
)

FILE = """
spill_over_below = 0.5
[default]
mu_per_minute = 60
mu_in_flight = 4
[tenants.acme]
mu_per_minute = 600
burst_mu = 100
spill_over = true
[tenants."team a/b"]
"""

rates = st.floats(0.6, 6000)
sizes = st.floats(0.001, 50)
steps = st.lists(st.tuples(st.floats(0, 30), sizes, st.floats(0, 80), st.booleans()), max_size=60)


def test_a_file_gives_each_tenant_its_own_and_others_the_default() -> None:
    """A tenant's table replaces the default, an empty one lifts it, and JSON is equivalent."""
    limits = parse(FILE, "f")
    assert limits.of("acme") == TenantLimit(600.0, None, 100.0, True) and limits.of("acme").burst == 100
    assert limits.of("team a/b") == TenantLimit()
    assert limits.of("anyone") == TenantLimit(60.0, 4.0) and limits.of("anyone").burst == 60
    assert limits.spill_over_below == 0.5
    assert parse('{"default": {"mu_per_minute": 60}}', "f") == TenantLimits(TenantLimit(60.0))
    assert parse("", "f") == TenantLimits()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[tenant.acme]", "unknown key 'tenant'; the nearest valid key is tenants"),
        (
            "[tenants.acme]\nmu_per_min = 3",
            "tenants.acme: unknown key 'mu_per_min'; the nearest valid key is mu_per_minute",
        ),
        ("[default]\nmu_per_minute = -1", "default.mu_per_minute"),
        ("[default]\nmu_in_flight = true", "default.mu_in_flight"),
        ("[default]\nmu_in_flight = nan", "default.mu_in_flight"),
        ("[default]\nburst_mu = 3", "default.burst_mu needs default.mu_per_minute"),
        ("[default]\nspill_over = 1", "default.spill_over"),
        ("spill_over_below = 2", "spill_over_below"),
        ("tenants = 3", "tenants must be"),
        ("default = 3", "default must be"),
        ("[tenants." + "x" * 65 + "]", "tenant names have 1 to 64 characters, not 65"),
        ('[tenants.""]', "tenant names"),
        ("[x", "neither TOML nor JSON"),
        ("{", "neither TOML nor JSON"),
    ],
)
def test_a_wrong_file_is_refused_by_the_place_that_is_wrong(text: str, named: str) -> None:
    """The error is one line with the file, the key and its valid values."""
    with pytest.raises(UsageError, match=r"^f: ") as caught:
        parse(text, "f")
    assert named in str(caught.value) and "\n" not in str(caught.value)


@given(rates, st.floats(0, 100), steps)
def test_never_more_than_rate_times_time_and_burst(
    rate: float, burst: float, requests: list[tuple[float, float, float, bool]]
) -> None:
    """At every admission the charges so far are at most burst + rate * t, however wrong the estimates were.

    A request larger than the burst is admitted from a full bucket, and exceeds the bound by at most its own size.
    """
    limit = TenantLimit(rate, None, burst)
    bucket, now, used = TokenBucket(limit.burst, 0.0), 0.0, 0.0
    for step, mu, actual, settles in requests:
        now += step
        bucket = refill(bucket, limit, now)
        if check(limit, bucket, 0.0, mu, mu) is None:
            bucket = charge(bucket, limit, mu)
            used += mu
            assert used <= burst + rate / 60 * now + max(0.0, mu - burst) + 1e-6
            if settles:
                bucket = charge(bucket, limit, actual - mu)
                used += actual - mu
        assert bucket.level <= burst


@given(rates, st.floats(0, 100), st.floats(-50, 100), sizes)
@example(60.0, 5e-324, 0.0, 1.0)
@example(6000.0, 5e-324, -5e-324, 50.0)
@example(0.6, 1e-7, -1e-7, 0.001)
def test_the_wait_is_true(rate: float, burst: float, level: float, mu: float) -> None:
    """After the reported wait the request is admitted, and a hundredth earlier it is not."""
    limit, bucket = TenantLimit(rate, None, burst), TokenBucket(min(level, burst), 0.0)
    refused = check(limit, bucket, 0.0, mu, mu)
    if refused is None:
        return
    assert refused.what == "mu_per_minute" and refused.wait is not None and refused.wait > 0
    assert check(limit, refill(bucket, limit, refused.wait * 1.0001 + 1e-6), 0.0, mu, mu) is None
    if refused.wait > 1e-3:
        assert check(limit, refill(bucket, limit, refused.wait * 0.99), 0.0, mu, mu) is not None


@given(st.floats(0.1, 20), st.lists(st.tuples(st.booleans(), sizes), max_size=60))
def test_reservations_in_flight_keep_to_their_limit(most: float, events: list[tuple[bool, float]]) -> None:
    """The sum of open requests never exceeds the limit, except for a single larger request."""
    limit, open_ = TenantLimit(None, most), list[float]()
    for ends, high in events:
        if ends and open_:
            open_.pop(0)
        elif check(limit, TokenBucket(0.0, 0.0), sum(open_), 1.0, high) is None:
            open_.append(high)
        assert sum(open_) <= most + 1e-9 or len(open_) == 1


def test_a_limit_of_nothing_admits_nothing() -> None:
    """A limit of 0 closes a tenant: no burst, no first request, and the longest wait."""
    for limit in (TenantLimit(0.0), TenantLimit(0.0, None, 5.0), TenantLimit(None, 0.0)):
        refused = check(limit, TokenBucket(limit.burst, 0.0), 0.0, 0.1, 0.1)
        assert refused is not None and refused.wait == NEVER_RETRY_AFTER_S


def test_a_clock_that_stands_still_or_goes_back_gives_nothing() -> None:
    """A clock reading older than the bucket changes nothing, as two processes may write out of order."""
    limit = TenantLimit(60.0)
    assert refill(TokenBucket(1.0, 10.0), limit, 9.0) == TokenBucket(1.0, 10.0)
