"""Requests that their client, or the relay's own queue, keeps waiting: load, but no silence of the engine's."""

from __future__ import annotations

from typing import Final

import pytest

from sidecar.control.state import ControlState
from sidecar.events import Admitted, Delivered, Event, FirstToken, RequestBlocked, RequestSize, Settled
from sidecar.health.monitor import TICK_S, TickReadings
from sidecar.health.progress import UNLEARNED_SHARE
from sidecar.load.cost_model import Coefficients
from sidecar.readings import Absent
from sidecar.settings import Settings

FLOOR: Final = 4.0
NOTHING: Final = Absent("not here")


class Control:
    """A control object next to an engine without a metrics page."""

    def __init__(self) -> None:
        self.now = 1000.0
        chosen = Settings(engine="http://engine", silence_floor=FLOOR, silence_cap=FLOOR / UNLEARNED_SHARE)
        self.control = ControlState(chosen, Coefficients(), self.now, self.now)

    def send(self, *events: Event) -> None:
        for event in events:
            self.control.on_event(0, event)

    def admitted(self) -> Admitted:
        return Admitted("a", self.now, "t", "m", "chat", True, RequestSize(10, output=100), 100, 1.0)

    def wait(self, seconds: float) -> set[str]:
        """The verdicts of this time."""
        states = set()
        for _ in range(int(seconds / TICK_S)):
            self.now += TICK_S
            readings = TickReadings(NOTHING, NOTHING, NOTHING, (), None, "openai")
            states.add(self.control.tick(readings, self.now, self.now).verdict.state)
        return states


@pytest.mark.parametrize(
    "started", [True, False], ids=["a client that does not read", "a request in the relay's queue"]
)
def test_a_blocked_request_is_no_silence_and_its_end_begins_one(started: bool) -> None:
    """However long it is blocked, nothing is suspected; afterwards it has the whole of its time, and no more."""
    judge = Control()
    judge.wait(1)
    judge.send(Admitted("z", judge.now, "t", "m", "chat", True, RequestSize(1), 1, 1.0), FirstToken("z", judge.now))
    judge.send(Settled("z", judge.now, "ok", 200, None, 1, 1, judge.now, judge.now, 0.0))
    assert judge.wait(1) == {"progressing"}
    judge.send(judge.admitted())
    if started:
        judge.send(FirstToken("a", judge.now), Delivered("a", judge.now, 1, 1))
    judge.send(RequestBlocked("a", judge.now, True))
    assert not judge.wait(100) & {"suspect", "stalled"}
    assert judge.control.ledger.in_flight().requests == 1
    judge.send(RequestBlocked("a", judge.now, False))
    assert not judge.wait(FLOOR - TICK_S) & {"suspect", "stalled"}
    assert "suspect" in judge.wait(2 * TICK_S + FLOOR)


def test_the_pace_of_a_slow_client_is_not_learned() -> None:
    """A stream that its client slowed down teaches no time per token; the same stream at its own pace does."""
    for slowed in (True, False):
        judge = Control()
        before = judge.control.health.progress.learned.token_seconds
        judge.send(judge.admitted(), FirstToken("a", judge.now))
        if slowed:
            judge.send(RequestBlocked("a", judge.now + 1, True), RequestBlocked("a", judge.now + 50, False))
        judge.send(Delivered("a", judge.now + 99, 10, 10))
        judge.send(Settled("a", judge.now + 100, "ok", 200, None, 11, 11, judge.now, judge.now, 0.0))
        assert (judge.control.health.progress.learned.token_seconds == before) is slowed
