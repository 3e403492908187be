"""What canaries cost, and when their answers are reported as garbage."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.control.canary_stats import BASE, STRIKES, CanaryStats, GarbageDetector
from sidecar.control.state import ControlState, TickReadings
from sidecar.events import CanaryResult, RequestSize
from sidecar.load import cost_model
from sidecar.readings import Absent
from sidecar.settings import Settings


def test_a_canary_costs_what_its_tokens_cost() -> None:
    """Each canary that passed adds its prompt and its token, in model units and in tokens; an embedding has no output."""
    co = cost_model.Coefficients()
    canaries = CanaryStats(co)
    canaries.passed(CanaryResult("ok", 0.0, 1.0, 8.0, prompt_tokens=16, digest="a"))
    canaries.passed(CanaryResult("ok", 0.0, 1.0, 8.0, prompt_tokens=2))
    assert canaries.use().tokens == 19
    assert canaries.use().mu == pytest.approx(
        cost_model.mu(RequestSize(16, output=1), co) + cost_model.mu(RequestSize(2), co)
    )


def sameness(*answers: str) -> list[bool]:
    """What each answer in turn gives."""
    one = GarbageDetector()
    return [one.heard(answer) for answer in answers]


def test_garbage_is_told_once_after_several_other_answers() -> None:
    """An engine that always said the same, and then says something else several times in a row, is reported, once."""
    told = sameness(*["a"] * BASE, *["!"] * (STRIKES + 10))
    assert [n for n, begins in enumerate(told) if begins] == [BASE + STRIKES - 1]


def test_another_model_that_answers_otherwise_is_no_garbage() -> None:
    """What one model always said is no measure of the next one that is loaded in its place."""
    canaries = CanaryStats(cost_model.Coefficients())
    for model in ("a", "b"):
        for _ in range(BASE + STRIKES):
            assert not canaries.passed(CanaryResult("ok", 0.0, 1.0, 8.0, digest=model, model=model))
    assert not canaries.use().garbage


def test_garbage_ends_with_the_usual_answer() -> None:
    """The report is taken back when the usual answer returns, and can begin anew."""
    one = GarbageDetector()
    for answer in ["a"] * BASE + ["!"] * STRIKES:
        one.heard(answer)
    assert one.garbage
    one.heard("a")
    assert not one.garbage and one.strikes == 0


@pytest.mark.parametrize("answers", [["a", "b"] * 50, ["a"] * 50 + ["b", "a"] * 30, ["b"] * 3 + ["a"] * 100, [""] * 99])
def test_near_ties_are_no_garbage(answers: list[str]) -> None:
    """Answers that change with the batch, now and then or half of the time, are never reported; nor are embeddings."""
    assert not any(sameness(*answers))


def test_another_engine_process_is_known_anew() -> None:
    """What the last process said is no measure of this one."""
    one = GarbageDetector()
    for answer in ["a"] * BASE:
        one.heard(answer)
    one.forget()
    assert not any(one.heard("b") for _ in range(BASE + STRIKES))


@given(st.lists(st.text("abcdefghijklmnopqrstuvwxyz", max_size=2), max_size=200))
def test_memory_is_bounded(answers: list[str]) -> None:
    """However many answers differ, a few are kept."""
    one = GarbageDetector()
    for answer in answers:
        one.heard(answer)
    assert len(one.answers) <= 16


NOTHING = Absent("x")


def control() -> ControlState:
    """A control beside an engine that has served its first canary."""
    made = ControlState(Settings(engine="http://e"), cost_model.Coefficients(), 0.0, 0.0)
    made.tick(TickReadings(NOTHING, NOTHING, NOTHING, (), None, "vllm"), 0.5, 0.5)
    answer(made, 1.0, "usual")
    return made


def answer(made: ControlState, now: float, digest: str) -> None:
    """A canary passes with this answer, and a tick comes."""
    made.canary_sent(now)
    made.canary_ended(CanaryResult("ok", now, now + 0.1, 8.0, prompt_tokens=1, digest=digest))
    made.tick(TickReadings(NOTHING, NOTHING, NOTHING, (), None, "vllm"), now + 0.5, now + 0.5)


def test_garbage_is_reported_and_changes_no_verdict() -> None:
    """The changes and the evidence tell of garbage, once; the verdict stays, and a new engine process begins anew."""
    made = control()
    for n in range(1, BASE):
        answer(made, 1.0 + n, "usual")
    for n in range(3 * STRIKES):
        answer(made, 20.0 + n, "!!!")
    assert made.verdict.state == "idle" and made.verdict.evidence["garbage_output"] is True
    assert [change.reason for change in made.changes].count("garbage_output") == 1
    shown = made.tick(TickReadings(NOTHING, NOTHING, NOTHING, (), None, "vllm"), 50.0, 50.0)
    assert shown.canaries.garbage and shown.canaries.passed == BASE + 3 * STRIKES and shown.canaries.mu > 0
    made.tick(TickReadings(NOTHING, NOTHING, NOTHING, (), None, "vllm", resting="engine_sleeping"), 50.5, 50.5)
    assert (made.verdict.state, made.verdict.reason) == ("exempt", "engine_sleeping")
    assert "garbage_output" not in made.verdict.evidence


@pytest.mark.parametrize("reason", ["engine_sleeping", "engine_paused"])
def test_an_engine_that_rests_is_not_judged(reason: str) -> None:
    """What the engine says of its own rest is the reason of the exemption, with or without a metrics page."""
    made = control()
    for n in range(200):
        made.tick(TickReadings(NOTHING, NOTHING, NOTHING, (), None, "llamacpp", resting=reason), 2 + n / 2, 2 + n / 2)
        assert made.canary_due() is None
    assert (made.verdict.state, made.verdict.reason) == ("exempt", reason)
