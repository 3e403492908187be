"""Pure: a verdict in words and numbers, for an operator: one line why, and the evidence as plain values."""

from __future__ import annotations

from dataclasses import replace

from sidecar.events import Verdict
from sidecar.health import reasons, verdict
from sidecar.health.kill_policy import JITTER_HOLD, KillHold
from sidecar.health.progress import Evidence


def evidence_json(i: verdict.VerdictInputs, name: str) -> dict[str, float | int | str | bool | None]:
    """The evidence of a verdict as plain numbers and codes."""
    e, c = i.evidence, i.canary
    return {
        "condition": name,
        "outstanding": e.outstanding,
        "waiting": e.waiting,
        "engine_busy": e.engine_busy,
        "progress_age": _round(e.age),
        "progress_kind": e.progress_kind,
        "silence_allowed": _round(e.allowed),
        "ruled_by": e.ruled_by,
        "silence_predicted": _round(e.predicted),
        "learned": e.learned,
        "part": i.part.reason if i.part else None,
        "part_for": _round(i.now - i.part.since) if i.part else None,
        "canary": c.outcome if c else None,
        "canary_age": _round(i.now - c.ended) if c else None,
        "refused_for": _round(i.now - i.refused_since) if i.refused_since is not None else None,
    }


def explain(m: verdict.VerdictState, i: verdict.VerdictInputs, name: str) -> str:
    """One line for an operator: why this verdict."""
    e: Evidence = i.evidence
    silence = (
        f"{e.outstanding} outstanding, {e.age:.1f} s without progress, {e.allowed:.1f} s allowed ({e.ruled_by})"
        if e.age is not None
        else "nothing outstanding"
    )
    canary = f"canary {i.canary.outcome} ({i.canary.detail})" if i.canary and i.canary.detail else "no canary verdict"
    why = reasons.REASON_TEXTS.get(m.reason, m.reason)
    texts = {
        "part": f"{why}: {i.part.detail}" if i.part else why,
        "part_severe": f"{why}: {i.part.detail}" if i.part else f"{why}; held until the engine is restarted",
        "silent": f"{silence}: {why}",
        "progress": f"{e.outstanding} outstanding, last progress {e.progress_kind}",
        "confirmed": f"{silence}; {canary}: {why}",
        "held": f"{silence}; {canary}: {why}",
        "canary_lost": f"{silence}; {canary}",
        "canary_rejected": f"{canary}; silence cannot be judged",
        "stuck": f"{silence}; the canary passes, the users' work does not move",
        "refused": "the engine takes no connection",
        "refused_long": "the engine takes no connection; a restart must be under way",
        "restarted": "the engine was started anew",
        "reopened": "the engine takes connections again",
        "not_served": f"no token from the engine yet; {canary}" + (f": {why}" if m.reason == "startup_stuck" else ""),
        "exempt": f"not judged: {m.reason}",
        "withheld": f"withheld: {m.reason}",
    }
    return texts.get(name, silence)


def with_hold(verdict: Verdict, hold: KillHold | None) -> Verdict:
    """A verdict whose kill is held back: the hold is its reason, the cause moves into its evidence."""
    if hold is None:
        return verdict
    evidence = {**verdict.evidence, "cause": verdict.reason, "held": hold.reason}
    reason = verdict.reason if hold.reason == JITTER_HOLD else hold.reason
    return replace(verdict, reason=reason, detail=f"{verdict.detail}; {hold.detail}", evidence=evidence)


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
