"""What canaries cost, and what the control process makes of garbage answers and of an engine that rests."""

from __future__ import annotations

import pytest

from sidecar.control.loop import is_canary_news
from sidecar.control.state import ControlState, add_canary
from sidecar.events import CanaryResult, RequestSize
from sidecar.health.garbage import MIN_CANARIES, STRIKES
from sidecar.health.monitor import TickReadings
from sidecar.load import cost_model
from sidecar.readings import Absent
from sidecar.settings import Settings
from sidecar.snapshot import CanaryUse


def test_a_canary_costs_what_its_tokens_cost() -> None:
    """Each canary that passed adds its prompt and its token, in MU and tokens; an embedding has no output."""
    co = cost_model.Coefficients()
    use = add_canary(CanaryUse(), CanaryResult("ok", 0.0, 1.0, 8.0, prompt_tokens=16, digest="a"), co)
    use = add_canary(use, CanaryResult("ok", 0.0, 1.0, 8.0, prompt_tokens=2), co)
    assert (use.passed, use.tokens) == (2, 19)
    assert use.mu == pytest.approx(cost_model.mu(RequestSize(16, output=1), co) + cost_model.mu(RequestSize(2), co))


def ended(outcome: str, *, known: bool = False) -> CanaryResult:
    return CanaryResult(outcome, 1.0, 1.1, 8.0, known=known)  # type: ignore[arg-type]


def test_a_hang_of_an_hour_is_one_line_of_starved_canaries() -> None:
    """A canary that ends as the one before did is no news; one that ends otherwise is, unless it passes."""
    starved, rejected = ended("starved"), ended("rejected")
    assert is_canary_news(starved, None) and is_canary_news(starved, ended("ok")) and is_canary_news(rejected, starved)
    assert not is_canary_news(starved, starved) and not is_canary_news(ended("ok"), starved)


@pytest.mark.parametrize(
    ("outcomes", "usable"),
    [
        ("", None),
        ("rejected rejected", None),
        ("rejected rejected rejected", False),
        ("rejected starved moot busy refused rejected", False),
        ("moot busy refused moot", None),
        ("rejected rejected ok", True),
        ("rejected rejected rejected ok", True),
        ("ok rejected rejected rejected", True),
    ],
)
def test_an_engine_that_takes_no_canary_is_reported(outcomes: str, usable: bool | None) -> None:
    """One that passed settles it for this process; three in a row that prove nothing say that none passes here."""
    made = ControlState(Settings(engine="http://e"), cost_model.Coefficients(), 0.0, 0.0)
    for outcome in outcomes.split():
        made.canary_ended(ended(outcome))
    shown = made.tick(TickReadings(NOTHING, NOTHING, NOTHING, (), None, "vllm"), 2.0, 2.0)
    assert made.health.canary_usable is shown.canaries.usable is usable


def test_another_process_of_the_engine_is_asked_anew() -> None:
    """What passed in one process says nothing of the next."""
    made = control()
    assert made.health.canary_usable is True
    for n in range(4, 24):  # the port is closed for a while
        made.tick(TickReadings(NOTHING, NOTHING, NOTHING, (), 3.0 if n < 20 else None, "vllm"), n / 2, n / 2)
    assert (made.health.verdict.state, made.health.canary_usable) == ("starting", None)


NOTHING = Absent("x")


def control() -> ControlState:
    """A control next to an engine that has served its first canary."""
    made = ControlState(Settings(engine="http://e"), cost_model.Coefficients(), 0.0, 0.0)
    made.tick(TickReadings(NOTHING, NOTHING, NOTHING, (), None, "vllm"), 0.5, 0.5)
    answer(made, 1.0, "usual")
    return made


def answer(made: ControlState, now: float, digest: str) -> None:
    """A canary passes with this answer, and a tick comes."""
    made.health.canary_sent(now)
    made.canary_ended(CanaryResult("ok", now, now + 0.1, 8.0, prompt_tokens=1, digest=digest))
    made.tick(TickReadings(NOTHING, NOTHING, NOTHING, (), None, "vllm"), now + 0.5, now + 0.5)


def test_garbage_is_reported_and_changes_no_verdict() -> None:
    """The changes and the evidence report garbage, once; the verdict stays, and a new engine process begins again."""
    made = control()
    for n in range(1, MIN_CANARIES):
        answer(made, 1.0 + n, "usual")
    for n in range(3 * STRIKES):
        answer(made, 20.0 + n, "!!!")
    assert made.health.verdict.state == "idle" and made.health.verdict.evidence["garbage_output"] is True
    assert [change.reason for change in made.health.changes].count("garbage_output") == 1
    shown = made.tick(TickReadings(NOTHING, NOTHING, NOTHING, (), None, "vllm"), 50.0, 50.0)
    assert shown.canaries.garbage and shown.canaries.passed == MIN_CANARIES + 3 * STRIKES and shown.canaries.mu > 0
    made.tick(TickReadings(NOTHING, NOTHING, NOTHING, (), None, "vllm", resting="engine_sleeping"), 50.5, 50.5)
    assert (made.health.verdict.state, made.health.verdict.reason) == ("exempt", "engine_sleeping")
    assert "garbage_output" not in made.health.verdict.evidence


@pytest.mark.parametrize("reason", ["engine_sleeping", "engine_paused"])
def test_an_engine_that_rests_is_not_judged(reason: str) -> None:
    """What the engine reports about its own rest is the reason of the exemption, with or without a metrics page."""
    made = control()
    for n in range(200):
        made.tick(TickReadings(NOTHING, NOTHING, NOTHING, (), None, "llamacpp", resting=reason), 2 + n / 2, 2 + n / 2)
        assert made.health.canary_due() is None
    assert (made.health.verdict.state, made.health.verdict.reason) == ("exempt", reason)
