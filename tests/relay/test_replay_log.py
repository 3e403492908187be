"""What a relay sends to a new control process: the same ledger, each request once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sidecar.events import (
    Admitted,
    Delivered,
    Directing,
    EnginePauseChanged,
    Event,
    FirstToken,
    RequestBlocked,
    RequestSize,
    Settled,
    UnreadRequest,
    Usage,
)
from sidecar.load import cost_model
from sidecar.load.ledger import Ledger
from sidecar.relay.replay_log import MAX_SETTLED, ReplayLog


def admitted(id: str, at: float) -> Admitted:
    return Admitted(id, at, "t", "m", "chat", True, RequestSize(100, output=10), 10, 0.5)


def settled(id: str, at: float) -> Settled:
    return Settled(id, at, "ok", 200, Usage(100, 5), 5, 50, at, at, 0.0)


def life(id: str, began: float) -> list[Event]:
    """A request from admission to settlement."""
    times = [began + n for n in range(5)]
    return [
        admitted(id, times[0]),
        FirstToken(id, times[1]),
        Delivered(id, times[2], 2, 20),
        Delivered(id, times[3], 3, 30),
        settled(id, times[4]),
    ]


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 5)), max_size=8), st.integers(0, 8))
def test_a_new_ledger_has_the_same_holds_and_each_settlement_that_was_not_booked(
    requests: list[tuple[float, int]], booked: int
) -> None:
    """However far each request came: open ones are open again, with their tokens; acknowledged ones do not return."""
    emitted = sorted((f for n, (at, far) in enumerate(requests) for f in life(str(n), at)[:far]), key=lambda f: f.at)
    outstanding, before, after = ReplayLog(), Ledger(cost_model.Coefficients()), Ledger(cost_model.Coefficients())
    for event in emitted:
        outstanding.note(event)
        before.apply(0, event)
    outstanding.ack(booked)
    settlements = [s for event in outstanding.events() if (s := after.apply(0, event)) is not None]
    assert {h.admitted.id: h for h in after.holds()} == {h.admitted.id: h for h in before.holds()}
    ends = [f.id for f in emitted if isinstance(f, Settled)]
    assert [s.admitted.id for s in settlements] == ends[booked:]


def test_bookings_count_for_one_connection() -> None:
    """After a new connection, the first settlement sent on it is number 1."""
    outstanding = ReplayLog()
    for id in ("a", "b", "c"):
        for event in life(id, 0.0):
            outstanding.note(event)
    outstanding.ack(1)
    outstanding.events()
    outstanding.ack(1)
    assert [f.id for f in outstanding.events() if isinstance(f, Settled)] == ["c"]


def test_what_stops_the_engine_or_a_stream_on_purpose_is_told_again_while_it_holds() -> None:
    """So are a pause and a weight update that go on, and who of a client and an engine kept whom waiting last."""
    outstanding = ReplayLog()
    for event in (
        admitted("a", 1.0),
        RequestBlocked("a", 2.0, True),
        admitted("b", 1.0),
        RequestBlocked("b", 2.0, True),
        RequestBlocked("b", 3.0, False),
        EnginePauseChanged(1.0, "engine_paused", True),
        EnginePauseChanged(1.0, "engine_sleeping", True),
        EnginePauseChanged(2.0, "engine_sleeping", False),
        Directing(2.5, 1, "weight_update", True),
        Directing(2.5, 2, "weight_update", True),
        Directing(2.6, 1, "weight_update", False, taken=True),
    ):
        outstanding.note(event)
    again = [f for f in outstanding.events() if isinstance(f, RequestBlocked | EnginePauseChanged | Directing)]
    assert again == [
        EnginePauseChanged(1.0, "engine_paused", True),
        RequestBlocked("a", 2.0, True),
        Directing(2.5, 2, "weight_update", True),
        RequestBlocked("b", 3.0, False),
    ]


def test_calls_that_were_passed_on_unread_are_told_again_while_they_are_open() -> None:
    """With the sum of their bytes; those that ended are forgotten, and count for no settlement."""
    outstanding = ReplayLog()
    for event in (
        UnreadRequest("a", 1.0, True),
        UnreadRequest("b", 1.5, True),
        Delivered("a", 2.0, 0, 20),
        RequestBlocked("b", 2.5, True),
        Delivered("a", 3.0, 0, 30),
        UnreadRequest("b", 4.0, False, 200),
        Delivered("b", 5.0, 0, 10),
        admitted("c", 6.0),
        settled("c", 7.0),
    ):
        outstanding.note(event)
    outstanding.ack(1)
    assert outstanding.events() == [UnreadRequest("a", 1.0, True), Delivered("a", 3.0, 0, 50)]


def test_what_is_kept_is_bounded() -> None:
    """Where no control process ever comes, the oldest settlements are forgotten."""
    outstanding = ReplayLog()
    for n in range(MAX_SETTLED + 1):
        outstanding.note(admitted(str(n), float(n)))
        outstanding.note(settled(str(n), float(n)))
    assert sum(isinstance(f, Settled) for f in outstanding.events()) == MAX_SETTLED
