"""Which reason code a silence gets."""

from __future__ import annotations

import pytest

from sidecar.health.reasons import CAUSES, REASON_TEXTS, ClueHistory, HangClues, cause_of
from sidecar.readings import EngineSample

WAITING = EngineSample(running=0, waiting=3, kv_usage=0.1)


@pytest.mark.parametrize(
    ("signs", "code"),
    [
        (HangClues(age=20.0), "no_progress"),
        (HangClues(age=20.0, sample=EngineSample(running=2, waiting=0)), "no_progress"),
        (HangClues(age=20.0, sample=WAITING), "admission_stalled"),
        (HangClues(sample=WAITING), "admission_stalled"),
        (HangClues(age=20.0, sample=EngineSample(running=0, waiting=3, kv_usage=1.0)), "no_progress"),
        (HangClues(age=20.0, sample=EngineSample(running=2), iterating=10), "livelock"),
        (HangClues(age=20.0, iterating=2), "no_progress"),
        (HangClues(age=20.0, unanswered=15.0), "api_blocked"),
        (HangClues(age=100.0, unanswered=5.0), "no_progress"),
        (HangClues(unanswered=8.0), "api_blocked"),
        (HangClues(age=20.0, xid_age=25.0, sample=WAITING, unanswered=15.0), "gpu_fault"),
        (HangClues(age=20.0, xid_age=3600.0), "no_progress"),
        (HangClues(age=20.0, part="decode_stalled", iterating=9), "decode_stalled"),
        (HangClues(age=20.0, part="rank_silent"), "rank_silent"),
    ],
)
def test_the_first_cause_that_holds_names_the_silence(signs: HangClues, code: str) -> None:
    """What was seen together with the silence decides, the most telling sign first; else `no_progress`."""
    assert cause_of(signs) == code


def test_every_cause_has_words_for_an_operator() -> None:
    """No code is shown bare."""
    assert {code for code, _, _ in CAUSES} <= set(REASON_TEXTS)


def test_xids_from_before_the_start_explain_nothing() -> None:
    """The driver's count at the start is history; a rise is news."""
    watch = ClueHistory()
    watch.record(1.0, False, 3)
    watch.record(2.0, False, None)
    assert watch.xid_age(5.0) is None
    watch.record(6.0, True, 4)
    assert (watch.xid_age(8.0), watch.unanswered(8.0)) == (2.0, 2.0)
    watch.record(9.0, False, 4)
    assert watch.unanswered(10.0) == 0.0
