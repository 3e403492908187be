"""The demo's scorecard: what counts as detected, as recovered, and as a false alarm."""

from __future__ import annotations

import pytest

from sidecar.tools.demo.scorecard import Scorecard, summary

Step = tuple[str, *tuple[object, ...]]

GOOD: list[Step] = [
    ("verdict", "idle", "no_work", 1.0),
    ("ready", 1.0),
    ("served", 2.0),
    ("injected", 10.0),
    ("verdict", "suspect", "silent", 13.0),
    ("verdict", "stalled", "no_progress", 15.0),
    ("served", 9.9),
    ("killed", "liveness", 18.0),
    ("exited",),
    ("verdict", "dead", "engine_gone", 18.5),
    ("verdict", "starting", "engine_restarting", 20.0),
    ("ready", 21.0),
    ("served", 20.5),
    ("served", 22.0),
]


def play(steps: list[Step]) -> Scorecard:
    card = Scorecard()
    for name, *args in steps:
        getattr(card, name)(*args)
    return card


def test_the_whole_story() -> None:
    """Detected at the first verdict that fails liveness, recovered at the first request served once ready again."""
    card = play(GOOD)
    (stall,) = card.stalls
    assert (stall.injected, stall.detected, stall.killed, stall.ready, stall.recovered) == (10, 15, 18, 21, 22)
    assert card.failures() == []
    assert card.open_stall is None


CASES: list[tuple[str, list[Step], list[str]]] = [
    ("nothing happened", [], []),
    ("suspect is no alarm", [("ready", 1.0), ("verdict", "suspect", "silent", 2.0)], []),
    (
        "verdict for nothing",
        [("verdict", "stalled", "no_progress", 2.0)],
        ["false alarm: verdict stalled (no_progress)"],
    ),
    (
        "one mistake is one alarm",
        [("verdict", "stalled", "x", 2.0), ("killed", "liveness", 3.0), ("exited",), ("verdict", "dead", "y", 4.0)],
        ["false alarm: verdict stalled (x)"],
    ),
    (
        "two mistakes are two",
        [("killed", "liveness", 3.0), ("exited",), ("ready", 5.0), ("verdict", "dead", "y", 9.0)],
        ["false alarm: killed by its liveness probe", "false alarm: verdict dead (y)"],
    ),
    (
        "a crash makes the verdict right",
        [("ready", 1.0), ("exited",), ("verdict", "dead", "engine_gone", 3.0), ("ready", 5.0)],
        ["the engine exited by itself 1 time(s)"],
    ),
    ("never detected", GOOD[:5], ["a stall was not detected"]),
    ("not recovered", GOOD[:12], ["the engine had not recovered from the last stall at the end"]),
    ("after the recovery", [*GOOD, ("verdict", "stalled", "x", 30.0)], ["false alarm: verdict stalled (x)"]),
    ("read late, but of the stall", [*GOOD, ("verdict", "dead", "engine_gone", 19.0)], []),
    (
        "ready before the kill is no recovery",
        [*GOOD[:4], ("ready", 11.0), ("served", 12.0)],
        ["a stall was not detected"],
    ),
]


@pytest.mark.parametrize(("name", "steps", "failures"), CASES, ids=[c[0] for c in CASES])
def test_failures(name: str, steps: list[Step], failures: list[str]) -> None:
    """Each failure is one line, and there are no others."""
    assert play(steps).failures() == failures


def test_summary_lines() -> None:
    """The summary names requests by outcome, images, MU, both times of each stall, and the false alarms."""
    card = play([*GOOD, ("injected", 40.0), ("verdict", "stalled", "no_progress", 46.5)])
    requests, mu = {"ok": 90, "broken": 2, "skipped": 0}, {"ok": 12.5, "stalled": 0.25}
    lines = dict(line.strip().split("  ", 1) for line in summary(card, requests, 31, mu, 60.0))
    assert {k: v.strip() for k, v in lines.items()} == {
        "ran for": "60 s",
        "requests": "92: 90 ok, 2 broken",
        "images": "31 in successful requests",
        "model units": "12.75 MU: 12.50 ok, 0.25 stalled",
        "stalls injected": "2",
        "time to detect": "5.0 s, 6.5 s",
        "time to recover": "12.0 s, not recovered",
        "false alarms": "0",
    }


def test_summary_of_nothing() -> None:
    """Without requests, stalls or a metrics page, the summary shows no unmeasured 0."""
    lines = "\n".join(summary(Scorecard(), {}, 0, None, 3.0))
    assert "unknown" in lines
    assert "-" in lines
