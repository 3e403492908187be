"""Numbers learned per tenant, and what one tenant can do to the others."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sidecar.load.tenant_means import Prior, TenantMeans

PRIOR = Prior(4.0, 256.0, (2.0, 8.0))


def test_a_tenant_is_known_by_its_own_observations() -> None:
    """After a thousand tokens a tenant's own number counts for most, after many for nearly all."""
    means = TenantMeans(PRIOR, 100)
    means.add("a", "m", 2.0, 1000.0)
    assert 2.3 < means.get("a", "m") < 2.5
    for _ in range(50):
        means.add("a", "m", 2.0, 1000.0)
    assert abs(means.get("a", "m") - 2.0) < 0.05
    assert means.get("a", "other") == 4.0


@given(st.lists(st.tuples(st.floats(0.5, 16.0), st.floats(1.0, 4096.0)), max_size=200))
def test_one_tenant_alone_moves_no_one(observations: list[tuple[float, float]]) -> None:
    """Whatever a single tenant sends, a new tenant's number stays at the prior."""
    means = TenantMeans(PRIOR, 100)
    for value, weight in observations:
        means.add("hostile", "m", value, weight)
    assert means.get("new", "m") == 4.0


@given(st.integers(1, 300), st.floats(0.5, 16.0))
def test_invented_tenants_stay_within_the_bounds(tenants: int, value: float) -> None:
    """Any number of invented tenants moves a new tenant's number within the bounds only, and an own one hardly."""
    means = TenantMeans(PRIOR, 1000)
    for _ in range(50):
        means.add("honest", "m", 4.0, 4000.0)
    for n in range(tenants):
        means.add(f"invented-{n}", "m", value, 4096.0)
    assert 2.0 <= means.get("new", "m") <= 8.0
    assert abs(means.get("honest", "m") - 4.0) < 0.05


def test_many_tenants_teach_a_new_one() -> None:
    """What most tenants have in common is expected of the next."""
    means = TenantMeans(PRIOR, 100)
    for n in range(20):
        means.add(f"t{n}", "m", 3.0, 4000.0)
    means.add("odd", "m", 16.0, 4000.0)
    assert 2.9 < means.get("new", "m") < 3.2


def test_the_tables_are_bounded() -> None:
    """Tenants, models and voters are bounded; the least recently used is evicted."""
    means = TenantMeans(PRIOR, 10)
    for n in range(1000):
        means.add(f"t{n}", f"m{n % 30}", 2.0, 1000.0)
    assert len(means) == 20
    assert means.get("t0", "m0") == 4.0 and means.get("t999", "m9") < 3.0
