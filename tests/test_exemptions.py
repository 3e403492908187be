"""Orders that stop an engine on purpose: when they hold, and what ends them."""

from __future__ import annotations

import pytest

from sidecar.exemptions import STOPPING, Orders
from sidecar.facts import Directed


def test_an_order_holds_until_its_opposite_and_never_for_longer_than_the_bound() -> None:
    """On, off, and a lost off."""
    orders = Orders(longest=100.0)
    orders.book(Directed(10.0, "engine_paused", True))
    assert orders.active(50.0) == "engine_paused"
    orders.book(Directed(60.0, "engine_paused", False))
    assert orders.active(61.0) is None
    orders.book(Directed(70.0, "engine_sleeping", True))
    assert orders.active(169.0) == "engine_sleeping"
    assert orders.active(170.0) is None


@pytest.mark.parametrize("what", STOPPING)
def test_a_token_of_a_later_request_ends_what_would_have_kept_it_back(what: str) -> None:
    """Draining requests from before the order prove nothing; one that came after it does."""
    orders = Orders(longest=100.0)
    orders.book(Directed(10.0, what, True))
    orders.served(9.0)
    assert orders.active(20.0) == what
    orders.served(12.0)
    assert orders.active(20.0) is None


def test_profiling_goes_on_beside_work() -> None:
    """Tokens during a profile are no sign that it is over: its end stops the world to write."""
    orders = Orders(longest=100.0)
    orders.book(Directed(10.0, "engine_profiling", True))
    orders.served(12.0)
    assert orders.active(20.0) == "engine_profiling"
    orders.clear()
    assert orders.active(20.0) is None
