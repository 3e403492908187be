"""A verdict in one line: what was seen, for how long, what is done, what can be done."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from sidecar.events import CanaryResult, Verdict
from sidecar.health.kill_policy import KillHold
from sidecar.health.partial_hangs import PartialHang
from sidecar.health.verdict import CONDITIONS, VerdictInputs, VerdictState
from sidecar.health.verdict_text import PROBED_S, explain, with_hold

from .verdict_world import evidence

NOW = 100.0
SILENT = VerdictInputs(NOW, evidence(NOW, age=14.2, at=85.8, allowed=12.0), can_ask=True)
IDLE = VerdictInputs(NOW, evidence(NOW), CanaryResult("starved", 90.0, 98.0, 8.0), can_ask=True)
SUSPECT, STALLED = VerdictState("suspect", "no_progress", 95.0), VerdictState("stalled", "no_progress", 95.0)
PRINTED = Path(__file__).resolve().parents[2] / "deploy" / "kubernetes" / "vllm.yaml"


def test_a_suspicion_says_what_stands_still_and_what_will_follow() -> None:
    """Readiness has gone; when liveness goes, and what would prevent it."""
    assert explain(SUSPECT, SILENT, "silent") == (
        "1 outstanding, 14.2 s without progress (12.0 s allowed: floor); readiness fails; "
        "liveness fails at 20 s unless a canary passes"
    )
    assert "liveness fails at 60 s: no canary passes here" in explain(SUSPECT, replace(SILENT, can_ask=False), "silent")
    frozen = replace(SILENT, can_ask=False, evidence=replace(SILENT.evidence, frozen=True))
    assert "liveness fails at 20 s: no canary passes here" in explain(SUSPECT, frozen, "silent")


def test_a_stall_says_who_restarts_the_engine_and_what_becomes_of_its_requests() -> None:
    """The requests are named when they are ended, and not again."""
    inputs = replace(SILENT, canary=IDLE.canary)
    text = explain(STALLED, inputs, "confirmed")
    assert "1 request is ended, clients may send them again" in text and "/diagnoses" in text
    assert "the last canary got nothing in its time" in text
    assert f"about {PROBED_S} s with the printed manifest" in text
    assert "ended, clients" not in explain(STALLED, SILENT, "held")


def test_the_time_of_the_printed_manifest_is_that_of_the_printed_manifest() -> None:
    """Period times threshold of the engine's liveness probe."""
    (deployment,) = [d for d in yaml.safe_load_all(PRINTED.read_text()) if d["kind"] == "Deployment"]
    (engine,) = deployment["spec"]["template"]["spec"]["containers"]
    assert engine["livenessProbe"]["periodSeconds"] * engine["livenessProbe"]["failureThreshold"] == PROBED_S


def test_a_kill_that_is_held_back_is_not_announced() -> None:
    """The line says what holds it, and the cause moves into the evidence."""
    hold = KillHold("kill_interval", "killed 60 s ago, the next kill may come in 240 s", False)
    text = explain(STALLED, SILENT, "confirmed", hold)
    assert text.endswith("liveness is held back: killed 60 s ago, the next kill may come in 240 s")
    assert "Kubernetes" not in text
    held = with_hold(Verdict("stalled", "no_progress", text, 95.0, 95.0), hold)
    assert (held.reason, held.cause, held.detail) == ("kill_interval", "no_progress", text)


def test_why_the_engine_cannot_be_reached_comes_first() -> None:
    """A certificate that is not accepted is no engine that starts."""
    trouble = "the engine's certificate is signed by an unknown authority: set --engine-ca FILE"
    inputs = replace(IDLE, trouble=trouble, refused_since=90.0)
    assert explain(VerdictState("starting", "engine_unreachable"), inputs, "refused").startswith(trouble)
    assert trouble not in explain(VerdictState("progressing", "progress"), inputs, "progress")


@pytest.mark.parametrize(
    ("reason", "outlook"),
    [("decode_stalled", "liveness fails if it lasts 180 s"), ("request_overtaken", "liveness does not for this")],
)
def test_a_part_that_hangs_says_whether_it_will_cost_a_restart(reason: str, outlook: str) -> None:
    """Some findings withdraw readiness and never fail liveness."""
    part = PartialHang(reason, 90.0, False, "2 of them, for 70 s")
    text = explain(VerdictState("suspect", reason), replace(SILENT, part=part), "part")
    assert "2 of them, for 70 s" in text and text.endswith(outlook)


def test_an_idle_engine_that_gives_canaries_nothing_has_no_outstanding_work() -> None:
    """Nothing outstanding, and what the canary met."""
    text = explain(VerdictState("suspect", "canary_lost"), IDLE, "canary_lost")
    assert text.startswith("nothing outstanding; the last canary got nothing in its time")
    assert text.endswith("liveness fails once no canary has passed for 20 s")


def test_an_engine_that_refuses_everything_says_for_how_long() -> None:
    """The time is that of the refusals, not of a silence."""
    text = explain(VerdictState("suspect", "refuses_work"), replace(IDLE, refusing=13.4), "refuses")
    assert "refuses all work, for 13 s" in text and "liveness fails at 20 s unless something is served" in text


@pytest.mark.parametrize("condition", [name for name, _, _ in CONDITIONS])
def test_every_condition_has_one_line_and_no_bare_code(condition: str) -> None:
    """Whatever rules, the line is a sentence."""
    for state in (
        SUSPECT,
        STALLED,
        VerdictState(),
        VerdictState("unknown", "own_pause"),
        VerdictState("idle", "no_work"),
    ):
        for inputs in (SILENT, IDLE, replace(SILENT, can_ask=None)):
            text = explain(state, inputs, condition)
            assert text and "\n" not in text and not re.search(r"\b[a-z]+_[a-z]+\b", text), text
