"""Orders that stop an engine on purpose, and calls that are not answered yet: when they hold, and what ends them."""

from __future__ import annotations

import pytest

from sidecar.events import Directing, EnginePauseChanged
from sidecar.health.exemptions import MIN_CALL_S, STOPPING, Exemptions


def test_an_order_holds_until_its_opposite_and_never_for_longer_than_the_bound() -> None:
    """On, off, and a lost off."""
    orders = Exemptions(cap=100.0)
    orders.pause(EnginePauseChanged(10.0, "engine_paused", True))
    assert orders.active(50.0) == "engine_paused"
    orders.pause(EnginePauseChanged(60.0, "engine_paused", False))
    assert orders.active(61.0) is None
    orders.pause(EnginePauseChanged(70.0, "engine_sleeping", True))
    assert orders.active(169.0) == "engine_sleeping"
    assert orders.active(170.0) is None


def test_a_pause_that_the_engine_denies_later_is_over() -> None:
    """It was resumed where no relay saw it; an answer from before the order, or about another one, says nothing."""
    orders = Exemptions(cap=100.0)
    orders.pause(EnginePauseChanged(10.0, "engine_sleeping", True))
    orders.deny({"engine_sleeping": 9.9, "engine_paused": 12.0})
    assert orders.active(20.0) == "engine_sleeping"
    orders.deny({"engine_sleeping": 12.0})
    assert orders.active(20.0) is None
    assert not orders.are_stopping()


@pytest.mark.parametrize("what", STOPPING)
def test_a_token_of_a_later_request_ends_what_would_have_kept_it_back(what: str) -> None:
    """Draining requests from before the order prove nothing; one that came after it does."""
    orders = Exemptions(cap=100.0)
    orders.pause(EnginePauseChanged(10.0, what, True))
    orders.served(9.0)
    assert orders.active(20.0) == what
    orders.served(12.0)
    assert orders.active(20.0) is None


def test_profiling_goes_on_next_to_work() -> None:
    """Tokens during a profile are no sign that it is over: its end stops the world to write."""
    orders = Exemptions(cap=100.0)
    orders.pause(EnginePauseChanged(10.0, "engine_profiling", True))
    orders.served(12.0)
    assert orders.active(20.0) == "engine_profiling"
    orders.clear()
    assert orders.active(20.0) is None


def begun(at: float, id: int = 1, what: str = "weight_update") -> Directing:
    return Directing(at, id, what, True)


def over(at: float, id: int = 1, what: str = "weight_update", *, taken: bool = False) -> Directing:
    return Directing(at, id, what, False, taken)


def looks(
    orders: Exemptions, first: int, last: int, *, proof: float = 0.0, doubted_at: float | None = None
) -> list[int]:
    """The seconds at which a call exempts, of a look each second."""
    seconds = range(first, last)
    return [now for now in seconds if orders.under_way(now, 1.0, proof, doubted_at)]


def test_a_call_exempts_while_it_is_with_the_engine() -> None:
    """From MIN_CALL_S after it was sent until it is over; another relay's call of the same number is another call."""
    orders = Exemptions(cap=100.0)
    orders.call(0, begun(10.0))
    assert looks(orders, 10, 20) == list(range(10 + int(MIN_CALL_S), 20))
    orders.call(1, over(20.0))
    assert orders.under_way(20.0, 1.0, 0.0, None) == "weight_update"
    orders.call(0, over(20.0))
    assert looks(orders, 20, 30) == []
    assert orders.active(20.0) is None


def test_calls_exempt_no_longer_than_the_bound_in_one_silence() -> None:
    """However many there are, and however they overlap: what exempted is summed up until the engine does something."""
    orders = Exemptions(cap=100.0)
    for n in range(20):
        orders.call(0, begun(10.0 * n, n))
        orders.call(0, over(10.0 * n, n - 2))
        looks(orders, 10 * n, 10 * n + 10)
    assert orders.relied == 100.0
    assert looks(orders, 200, 210) == []
    assert looks(orders, 210, 220, proof=205.0) == list(range(210, 220))


def test_a_call_that_is_never_over_is_forgotten() -> None:
    """Where its end was lost, it neither exempts nor is kept any longer."""
    orders = Exemptions(cap=100.0)
    orders.call(0, begun(10.0))
    assert orders.under_way(110.0, 1.0, 0.0, None) is None
    assert orders.calls == {}


def test_a_call_does_not_excuse_the_doubt_that_was_there_before_it() -> None:
    """One that was sent before the engine was thought to hang may be why it does not move; a later one may not."""
    orders = Exemptions(cap=100.0)
    orders.call(0, begun(10.0))
    assert looks(orders, 20, 23, doubted_at=9.0) == []
    assert looks(orders, 20, 23, doubted_at=10.0) == [20, 21, 22]


def test_the_calls_of_a_relay_that_died_are_over() -> None:
    """Those of other relays are not."""
    orders = Exemptions(cap=100.0)
    orders.call(0, begun(10.0))
    orders.call(1, begun(10.0))
    orders.relay_lost(0)
    assert looks(orders, 20, 23) == [20, 21, 22]
    orders.relay_lost(1)
    assert looks(orders, 23, 26) == []


def test_the_engines_state_denies_only_what_it_would_show() -> None:
    """Released memory is no sleep to vLLM or SGLang: they go on to say that they are awake."""
    orders = Exemptions(cap=100.0)
    orders.pause(EnginePauseChanged(10.0, "engine_sleeping", True, shown=False))
    orders.deny({"engine_sleeping": 20.0})
    assert orders.are_stopping()


@pytest.mark.parametrize(("taken", "until"), [(True, 190.0), (False, 110.0)])
def test_a_call_that_the_engine_took_shows_that_a_longer_stop_goes_on(taken: bool, until: float) -> None:
    """Weights that come in many pieces: the bound runs from the last piece."""
    orders = Exemptions(cap=100.0)
    orders.pause(EnginePauseChanged(10.0, "weight_update", True))
    orders.call(0, begun(80.0))
    orders.call(0, over(90.0, taken=taken))
    assert orders.active(until - 0.5) == "weight_update"
    assert orders.active(until) is None
