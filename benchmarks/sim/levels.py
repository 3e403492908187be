"""The same weeks and the same hangs at each level of proof: what can be seen of an engine besides its answers.

Rules: each level has every week and every hang of its own, with the same draws. What an engine's processes show is read
only while the verdict is suspect. So a week without a doubt is the same whether they can be looked at or not, and is
lived once for both. tests/health/test_proof_levels.py holds that.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from sidecar.load import cost_model
from sim import modes, report
from sim.proofs import LEVELS
from sim.traces import Trace
from sim.weeks import HIDDEN, Tally, week
from sim.world import UNPROVEN

# A level, and what it is the same as while nothing is doubted.
UNDOUBTED: Final = {"processes": "none", "both": "steps"}
LONG_PREFILL: Final = modes.LOADS[3]
API_BLOCKED: Final = report.API_BLOCKED
Lived = dict[str, Tally]


def lived(seed: str, traces: dict[str, Trace], co: cost_model.Coefficients) -> Lived:
    """One week at each level."""
    found: Lived = {}
    for level in LEVELS:
        same = found.get(UNDOUBTED.get(level, ""))
        is_same = same is not None and not same.looked
        found[level] = renamed(same, level) if same and is_same else week(seed, traces, co, compare=False, level=level)
    return found


def renamed(tally: Tally, level: str) -> Tally:
    """The sums of a week as those of another level."""
    examples = [replace(kill, site=replace(kill.site, proof=level)) for kill in tally.examples]
    levels, mistaken = (
        dict.fromkeys([level] * len(sums), sum(sums.values())) for sums in (tally.levels, tally.mistaken)
    )
    return replace(tally, levels=levels, mistaken=mistaken, examples=examples)


def draws_of(seed: str, mode: modes.Mode, load: str) -> random.Random:
    """The draws of one hang, the same at each level."""
    return random.Random(f"{seed}:{mode.number}:{load}")


def trials(seed: str, level: str) -> list[modes.Trial]:
    """One round at one level: all hangs of the whole engine, except those during a long prefill."""
    rows = [(mode, load) for mode in modes.MODES for load in mode.loads if mode.whole and load != LONG_PREFILL]
    found = []
    for mode, load in rows:
        w = modes.made_for(mode, draws_of(seed, mode, load), level=level, compare=False)
        found.append(modes.trial(w, mode, load))
    return found


def table(weeks: Lived, found: Sequence[modes.Trial]) -> str:
    """One row per level. Seconds are p50 / p99."""
    rows = [row(level, weeks.get(level, Tally()), [t for t in found if t.level == level]) for level in LEVELS]
    head = (
        "seen of the engine", "weeks", "events", "false kills", "kills in hidden stops", "requests ended",
        "hangs", "missed",
        "readiness, from the last token", "readiness, from the fault", "killed with a proof", "killed without",
    )  # fmt: skip
    return report.table(head, rows)


def row(level: str, tally: Tally, found: Sequence[modes.Trial]) -> tuple[object, ...]:
    """A level's figures. Stops that no client can see are counted apart; kill times are without the API that blocks,
    which is given more time."""
    plain = [t for t in found if t.mode != API_BLOCKED]
    proven = [t.liveness for t in plain if t.liveness is not None and t.proof != UNPROVEN]
    unproven = [t.liveness for t in plain if t.liveness is not None and t.proof == UNPROVEN]
    return (
        level,
        f"{tally.weeks:.0f}",
        sum(n for alarm, n in tally.events.items() if alarm not in HIDDEN),
        report.mistakes(tally, report.OURS[0]),
        report.mistakes(tally, report.OURS[0], hidden=True) - report.mistakes(tally, report.OURS[0]),
        sum(n for alarm, n in tally.cut.items() if alarm not in HIDDEN),
        len(found),
        sum(t.liveness is None for t in found),
        report.cell([t.since_token for t in found]),
        report.cell([t.readiness for t in found]),
        report.cell(proven) or "-",
        report.cell(unproven) or "-",
    )
