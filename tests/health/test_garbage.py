"""Garbage: when the canaries' answers are reported."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.health.garbage import MAX_ANSWERS, MIN_CANARIES, STRIKES, GarbageDetector


def observed(*answers: str) -> list[bool]:
    """What the detector returns for each answer in turn."""
    detector = GarbageDetector()
    return [detector.observe(answer) for answer in answers]


def test_garbage_is_reported_once_after_several_other_answers() -> None:
    """An engine that always answered the same, and then something else several times in a row, is reported once."""
    begun = observed(*["a"] * MIN_CANARIES, *["!"] * (STRIKES + 10))
    assert [n for n, begins in enumerate(begun) if begins] == [MIN_CANARIES + STRIKES - 1]


def test_garbage_ends_with_the_usual_answer() -> None:
    """The report ends when the usual answer returns, and can begin again."""
    detector = GarbageDetector()
    for answer in ["a"] * MIN_CANARIES + ["!"] * STRIKES:
        detector.observe(answer)
    assert detector.found
    detector.observe("a")
    assert not detector.found and detector.strikes == 0


@pytest.mark.parametrize("answers", [["a", "b"] * 50, ["a"] * 50 + ["b", "a"] * 30, ["b"] * 3 + ["a"] * 100, [""] * 99])
def test_near_ties_are_no_garbage(answers: list[str]) -> None:
    """Answers that change with the batch, now and then or half of the time, are never reported; nor are embeddings."""
    assert not any(observed(*answers))


def test_another_engine_process_begins_again() -> None:
    """What the last process said is no measure of this detector."""
    detector = GarbageDetector()
    for answer in ["a"] * MIN_CANARIES:
        detector.observe(answer)
    detector.reset()
    assert not any(detector.observe("b") for _ in range(MIN_CANARIES + STRIKES))


@given(st.lists(st.text("abcdefghijklmnopqrstuvwxyz", max_size=2), max_size=200))
def test_memory_is_bounded(answers: list[str]) -> None:
    """However many answers differ, a few are kept."""
    detector = GarbageDetector()
    for answer in answers:
        detector.observe(answer)
    assert len(detector.answers) <= MAX_ANSWERS


def test_another_model_that_answers_otherwise_is_no_garbage() -> None:
    """The usual answer of one model is no measure of the next one that is loaded in its place."""
    detector = GarbageDetector()
    for model in ("a", "b"):
        for _ in range(MIN_CANARIES + STRIKES):
            assert not detector.observe(model, model)
    assert not detector.found
