"""Which reason code a silence gets."""

from __future__ import annotations

import pytest

from sidecar.health.kill_policy import HOLDS
from sidecar.health.reasons import CAUSES, NOTABLE, REASON_TEXTS, STATE_TEXTS, ClueHistory, HangClues, cause_of
from sidecar.health.verdict import TABLE
from sidecar.readings import EngineSample

WAITING = EngineSample(running=0, waiting=3, kv_usage=0.1)
COUNTING = EngineSample(running=2, generation_tokens=500.0)
# Reasons of the table that stand for others, and are never shown.
PLACEHOLDERS = {"exempt", "own_lag", "part", "kept"}


@pytest.mark.parametrize(
    ("signs", "code"),
    [
        (HangClues(age=20.0), "no_progress"),
        (HangClues(), "canary_lost"),
        (HangClues(age=20.0, sample=EngineSample(running=2, waiting=0)), "no_progress"),
        (HangClues(age=20.0, sample=COUNTING, iterating=10), "livelock"),
        (HangClues(sample=COUNTING, iterating=10), "livelock"),
        (HangClues(age=20.0, sample=COUNTING, iterating=2), "no_progress"),
        (HangClues(age=20.0, unanswered=15.0), "api_blocked"),
        (HangClues(age=100.0, unanswered=5.0), "no_progress"),
        (HangClues(unanswered=8.0), "api_blocked"),
        (HangClues(age=20.0, xid_age=25.0, sample=WAITING, unanswered=15.0), "gpu_fault"),
        (HangClues(age=20.0, xid_age=3600.0), "no_progress"),
        (HangClues(age=20.0, part="decode_stalled", sample=COUNTING, iterating=9), "decode_stalled"),
        (HangClues(age=20.0, part="rank_silent"), "rank_silent"),
    ],
)
def test_the_first_cause_that_holds_names_the_silence(signs: HangClues, code: str) -> None:
    """What was seen together with the silence decides, the most telling sign first; else `no_progress`."""
    assert cause_of(signs) == code


@pytest.mark.parametrize(
    ("signs", "code"),
    [
        (HangClues(age=20.0, sample=WAITING, waiting=21.0, ended=20.0), "admission_stalled"),
        (HangClues(age=20.0, sample=WAITING, waiting=19.0, moves=True), "admission_stalled"),
        (HangClues(age=20.0, sample=WAITING, waiting=19.0, ended=20.0), "no_progress"),
        (HangClues(age=20.0, sample=WAITING, waiting=None, ended=20.0), "no_progress"),
        (HangClues(age=20.0, sample=WAITING, waiting=21.0, ended=20.0, vanished=True), "no_progress"),
        (HangClues(age=20.0, sample=WAITING), "no_progress"),
        (HangClues(sample=WAITING), "canary_lost"),
        (
            HangClues(age=20.0, sample=EngineSample(running=0, waiting=3, kv_usage=1.0), waiting=21.0, ended=20.0),
            "no_progress",
        ),
    ],
)
def test_a_frozen_core_whose_gauge_reads_0_is_no_stalled_admission(signs: HangClues, code: str) -> None:
    """Requests that ended while others waited, or counters that move, show that only admission stands."""
    assert cause_of(signs) == code


@pytest.mark.parametrize(
    "sample",
    [None, EngineSample(running=2), EngineSample(running=2, generation_tokens=5.0, tokens_at_end=True)],
    ids=["no page", "no tokens", "tokens at the end"],
)
def test_steps_alone_are_no_livelock(sample: EngineSample | None) -> None:
    """Where no counter of tokens stands still the steps may generate a hidden answer."""
    assert cause_of(HangClues(age=20.0, sample=sample, iterating=10)) == "no_progress"


def test_requests_that_leave_the_gauge_without_an_end_have_vanished() -> None:
    """A core that froze may set its gauge to 0; one that works ends what it ran."""
    watch = ClueHistory()
    for running, finished, vanished in ((4, 10, False), (0, 14, False), (4, 14, False), (0, 15, True), (1, 15, False)):
        watch.read(EngineSample(running=running, finished=finished))
        assert watch.vanished is vanished, (running, finished)


def test_every_code_has_one_sentence() -> None:
    """Each reason of the table, of a cause, of a hold and of an alert is explained, once."""
    causes, holds = {code for code, _, _ in CAUSES}, {code for code, _, _ in HOLDS}
    table = {reason for row in TABLE.values() for _, reason in row.values()} - PLACEHOLDERS
    assert causes | table | NOTABLE <= set(REASON_TEXTS) | set(STATE_TEXTS)
    assert set(REASON_TEXTS).isdisjoint(STATE_TEXTS) and holds.isdisjoint(REASON_TEXTS | STATE_TEXTS)
    for code, text in (REASON_TEXTS | STATE_TEXTS).items():
        assert (text and not text.endswith(".") and text[0].islower()) or text.startswith("start"), code


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
