"""The simulator's short cuts at each level of proof: they change no verdict."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from sim import levels, modes, traces  # noqa: E402  # the path above must come first
from sim.proofs import LEVELS  # noqa: E402
from sim.weeks import Tally, week  # noqa: E402

from sidecar.load.cost_model import Coefficients  # noqa: E402

CO = Coefficients()
TRACES = {"synthetic": traces.synthetic()}
# One with doubts, two without.
SEEDS = ("proof:1", "proof:5", "proof:9")


def slow(seed: str, level: str) -> Tally:
    """The week on its own, with everything that the control makes, reports too."""
    return week(seed, TRACES, CO, compare=False, level=level, reports=True)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_fast_way_gives_the_verdicts_of_the_slow_one(seed: str) -> None:
    """Every change of every verdict, with its time, reason, readiness and proof, at each level; and all sums."""
    fast = levels.lived(seed, TRACES, CO)
    for level in LEVELS:
        assert fast[level].trails and fast[level] == slow(seed, level), level


def test_some_weeks_have_a_doubt_and_some_have_none() -> None:
    """So that both ways of living a week at a level are held against the slow one."""
    looked = {levels.lived(seed, TRACES, CO)["none"].looked > 0 for seed in SEEDS}
    assert looked == {True, False}


def test_a_proof_shortens_the_kill_of_the_same_hang() -> None:
    """A core that died is killed by proof where its processes are seen, and at the usual bound elsewhere."""
    (mode,) = [mode for mode in modes.MODES if mode.fault == "core_dead"]
    found = {}
    for level in LEVELS:
        w = modes.made_for(mode, levels.draws_of("7", mode, "decoding"), level=level, compare=False)
        found[level] = modes.trial(w, mode, "decoding")
    killed = {level: trial.liveness or 1e9 for level, trial in found.items()}
    assert {level for level, trial in found.items() if trial.proof == "processes"} == {"processes", "both"}
    assert max(killed["processes"], killed["both"]) <= 40 < min(killed["none"], killed["steps"]) <= 120


def test_the_table_has_each_level_with_its_own_sums() -> None:
    """False kills are booked where they happened; hidden alarms do not count."""
    tally = Tally(weeks=3.0, events={"client hang-ups": 5}, kills={("client hang-ups", "processes"): 2})
    weeks = {level: Tally() for level in LEVELS} | {"processes": tally, "both": replace(tally, kills={})}
    rows = [line.split(" | ") for line in levels.table(weeks, []).splitlines()[2:]]
    assert [(row[0].strip("| "), row[1], row[3]) for row in rows] == [
        ("none", "0", "0"), ("processes", "3", "2"), ("steps", "0", "0"), ("both", "3", "0"),
    ]  # fmt: skip
