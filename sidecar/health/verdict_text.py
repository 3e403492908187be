"""Pure: a verdict in words and numbers, for an operator: one line why, and the evidence as plain values."""

from __future__ import annotations

from dataclasses import replace

from sidecar.events import Verdict
from sidecar.health.kill_policy import JITTER_HOLD, KillHold
from sidecar.health.reasons import REASON_TEXTS
from sidecar.health.verdict import VerdictInputs, VerdictState


def evidence_json(inputs: VerdictInputs, condition: str) -> dict[str, float | int | str | bool | None]:
    """The evidence of a verdict as plain numbers and codes."""
    evidence, canary, part, refused = inputs.evidence, inputs.canary, inputs.part, inputs.refused_since
    return {
        "condition": condition,
        "outstanding": evidence.outstanding,
        "waiting": evidence.waiting,
        "engine_busy": evidence.engine_busy,
        "progress_age": _round(evidence.age),
        "progress_kind": evidence.progress_kind,
        "silence_allowed": _round(evidence.allowed),
        "ruled_by": evidence.ruled_by,
        "silence_predicted": _round(evidence.predicted),
        "kill_after": _round(evidence.kill_after),
        "unseen_for": _round(evidence.hidden),
        "frozen": evidence.frozen,
        "foreign": evidence.foreign,
        "proof": evidence.proof,
        "can_ask": inputs.can_ask,
        "learned": evidence.learned,
        "part": part.reason if part else None,
        "part_for": _round(inputs.now - part.since) if part else None,
        "canary": canary.outcome if canary else None,
        "canary_age": _round(inputs.now - canary.ended) if canary else None,
        "refused_for": _round(inputs.now - refused) if refused is not None else None,
    }


def explain(state: VerdictState, inputs: VerdictInputs, condition: str) -> str:
    """One line for an operator: why this verdict."""
    evidence, last, part = inputs.evidence, inputs.canary, inputs.part
    silence = "nothing outstanding"
    if evidence.age is not None:
        allowed = f"{evidence.allowed:.1f} s allowed ({evidence.ruled_by})"
        silence = f"{evidence.outstanding} outstanding, {evidence.age:.1f} s without progress, {allowed}"
    canary = f"canary {last.outcome} ({last.detail})" if last and last.detail else "no canary verdict"
    why = REASON_TEXTS.get(state.reason, state.reason)
    texts = {
        "part": f"{why}: {part.detail}" if part else why,
        "part_severe": f"{why}: {part.detail}" if part else f"{why}; held until the engine is restarted",
        "silent": f"{silence}: {why}",
        "progress": f"{evidence.outstanding} outstanding, last progress {evidence.progress_kind}",
        "confirmed": f"{silence}; {canary}: {why}",
        "held": f"{silence}; {canary}: {why}",
        "canary_lost": f"{silence}; {canary}",
        "canary_rejected": f"{canary}; silence cannot be judged",
        "stuck": f"{silence}; the canary passes, the users' work does not move",
        "refused": "the engine refuses connections",
        "refused_long": "the engine refuses connections; a restart must be under way",
        "restarted": "the engine was restarted",
        "reopened": "the engine accepts connections again",
        "not_served": f"no token from the engine yet; {canary}"
        + (f": {why}" if state.reason == "startup_stuck" else ""),
        "exempt": f"not judged: {state.reason}",
        "withheld": f"withheld: {state.reason}",
    }
    return texts.get(condition, silence)


def with_hold(verdict: Verdict, hold: KillHold | None) -> Verdict:
    """A verdict whose kill is held back: the hold becomes its reason, the cause moves into its evidence."""
    if hold is None:
        return verdict
    evidence = {**verdict.evidence, "cause": verdict.reason, "held": hold.reason}
    reason = verdict.reason if hold.reason == JITTER_HOLD else hold.reason
    return replace(verdict, reason=reason, detail=f"{verdict.detail}; {hold.detail}", evidence=evidence)


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
