"""An engine that served and refuses everything now: what counts, and what ends it."""

from __future__ import annotations

from typing import Any

import pytest

from sidecar.events import CanaryResult, Settled
from sidecar.health.refusals import MIN_USERS, RefusedWork


def canary(refusals: RefusedWork, outcome: Any, at: float, *, known: bool = True, idle: bool = True) -> None:
    refusals.canary(CanaryResult(outcome, at - 0.1, at, 8.0, known=known), idle=idle)


def user(refusals: RefusedWork, status: int, at: float, outcome: Any = "engine_error", tokens: int = 0) -> None:
    refusals.settle(Settled("a", at, outcome, status, None, tokens, 0, None, at - 0.1, 0.0), idle=True)


def refusing(refusals: RefusedWork, now: float, can_ask: bool | None = True) -> float | None:
    return refusals.seconds(now, 12.0, can_ask=can_ask, open_for=None)


def test_a_canary_that_passed_before_and_is_rejected_now_refuses() -> None:
    """A worker lost behind a living front answers 404; one that never passed proves nothing."""
    lost, never = RefusedWork(), RefusedWork()
    for at in (10.0, 20.0):
        canary(lost, "rejected", at)
        canary(never, "rejected", at, known=False)
    assert refusing(lost, 21.0) is None, "not before a floor"
    assert refusing(lost, 30.0) == 20.0
    assert refusing(never, 300.0) is None


def test_busy_is_a_refusal_only_while_nothing_runs() -> None:
    """A full queue is busy; an engine without work that answers 503 has a fault."""
    busy, broken = RefusedWork(), RefusedWork()
    for at in (10.0, 20.0, 30.0):
        canary(busy, "busy", at, idle=False)
        canary(broken, "busy", at)
    assert refusing(busy, 60.0) is None and refusing(broken, 60.0) == 50.0


@pytest.mark.parametrize("status", [400, 404, 422, 429])
def test_users_alone_may_all_be_wrong(status: int) -> None:
    """A client with the name of another model is refused forever."""
    refusals = RefusedWork()
    for n in range(50):
        user(refusals, status, 10.0 + n)
    assert refusing(refusals, 100.0) is None and refusing(refusals, 100.0, can_ask=False) is None


def test_an_error_inside_a_200_neither_serves_nor_refuses() -> None:
    """It ends no series of refusals, as it served no request, and begins none: a request alone may be at fault."""
    refusals = RefusedWork()
    for n in range(50):
        user(refusals, 200, 10.0 + n)
    assert refusals.since is None
    user(refusals, 500, 70.0)
    user(refusals, 200, 80.0)
    assert refusals.since == 70.0
    user(refusals, 200, 90.0, tokens=3)  # it had begun: some of it was served
    assert refusals.since is None


def test_where_no_canary_passes_errors_to_many_users_refuse() -> None:
    """A front without its worker answers 500 to each of them."""
    refusals = RefusedWork()
    for n in range(MIN_USERS):
        user(refusals, 500, 10.0 + n)
    assert refusing(refusals, 30.0) is None and refusing(refusals, 30.0, can_ask=False) == 20.0


def test_anything_served_ends_it_and_an_open_request_was_not_refused() -> None:
    """One answer shows that not everything is refused."""
    refusals = RefusedWork()
    for at in (10.0, 20.0):
        canary(refusals, "rejected", at)
    assert refusals.seconds(40.0, 12.0, can_ask=True, open_for=1.0) is None
    assert refusing(refusals, 40.0) == 30.0, "one that came just now may be refused like the others"
    assert refusals.seconds(41.0, 12.0, can_ask=True, open_for=13.0) is None
    assert refusing(refusals, 60.0) is None, "the engine held one for longer than the floor"
    for at in (70.0, 80.0):
        canary(refusals, "rejected", at)
    user(refusals, 200, 91.0, "ok", 5)
    assert refusing(refusals, 110.0) is None
