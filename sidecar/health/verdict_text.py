"""Pure: a verdict in words and numbers, for an operator: one line why, and the evidence as plain values."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from sidecar.events import State, Verdict
from sidecar.health.kill_policy import JITTER_HOLD, KillHold
from sidecar.health.partial_hangs import NEVER_SEVERE, SEVERE_AFTER_S
from sidecar.health.reasons import REASON_TEXTS, STATE_TEXTS
from sidecar.health.verdict import UNASKED_KILLS, VerdictInputs, VerdictState

# Seconds that kubelet takes with the liveness probe of `sidecar manifests`: three failures, 5 s apart.
PROBED_S: Final = 15
KILLED: Final = (
    "liveness fails: Kubernetes restarts the container, or `sidecar run -- COMMAND` its engine, after the probe's "
    f"failureThreshold (about {PROBED_S} s with the printed manifest); the evidence is kept under /diagnoses"
)
# What ends an exemption.
RESUMED: Final = {
    "engine_sleeping": ", until it is woken (/wake_up, /resume_memory_occupation)",
    "engine_paused": ", until it is resumed (/resume, /continue_generation)",
    "engine_profiling": ", until the profile is stopped (/stop_profile)",
    "weight_update": ", until the new weights are there",
}
# States in which it matters why the engine cannot be reached.
TROUBLED_STATES: Final = frozenset[State]({"starting", "suspect", "stalled", "dead", "unknown"})
CANARY_ENDS: Final[dict[str, str]] = {
    "ok": "passed",
    "failed": "failed",
    "starved": "got nothing in its time",
    "moot": "proves nothing",
    "refused": "found no connection",
    "busy": "was refused as too much",
    "rejected": "was rejected",
}


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
        "hang": inputs.hang.name or None,
        "step_age": _round(evidence.step_age),
        "core_stands": evidence.stands,
        "core_computes": evidence.computing,
        "can_ask": inputs.can_ask,
        "learned": evidence.learned,
        "part": part.reason if part else None,
        "part_for": _round(inputs.now - part.since) if part else None,
        "canary": canary.outcome if canary else None,
        "canary_age": _round(inputs.now - canary.ended) if canary else None,
        "refused_for": _round(inputs.now - refused) if refused is not None else None,
    }


def explain(state: VerdictState, inputs: VerdictInputs, condition: str, hold: KillHold | None = None) -> str:
    """One line for an operator: what was seen, for how long, what is done now, and what can be done."""
    parts = [_seen(state, inputs, condition), _hang(state, inputs), _done(state, inputs, condition, hold)]
    if inputs.trouble and state.state in TROUBLED_STATES:
        parts.insert(0, inputs.trouble)
    return "; ".join(filter(None, parts))


def with_hold(verdict: Verdict, hold: KillHold | None) -> Verdict:
    """A verdict whose kill is held back: the hold becomes its reason, the cause moves into its evidence."""
    if hold is None:
        return verdict
    evidence = {**verdict.evidence, "cause": verdict.reason, "held": hold.reason}
    return replace(verdict, reason=verdict.reason if hold.reason == JITTER_HOLD else hold.reason, evidence=evidence)


def _seen(state: VerdictState, inputs: VerdictInputs, condition: str) -> str:
    """What was seen, and for how long."""
    silence, canary = _silence(inputs), _canary(inputs)
    why = (REASON_TEXTS | STATE_TEXTS).get(state.reason, state.reason)
    starting = f"for {inputs.now - state.engine_since:.0f} s; {canary}"
    texts = {
        "part": f"{why}: {inputs.part.detail}" if inputs.part else why,
        "part_severe": f"{why}: {inputs.part.detail}" if inputs.part else why,
        "refuses": f"{why}, for {inputs.refusing or 0.0:.0f} s; {canary}",
        "refuses_long": f"{why}, for {inputs.refusing or 0.0:.0f} s; {canary}",
        "silent": f"{silence}{_named(state)}",
        "confirmed": f"{silence}; {_confirmation(inputs)}{_named(state)}",
        "proven": f"{silence}{_named(state)}",
        "held": f"{silence}; {canary}: {why}; nothing shows recovery",
        "canary_lost": f"{silence}; {canary}{_named(state)}",
        "lost": f"{silence}; no canary has passed for {_since(inputs, state.lost_at)}, {canary}{_named(state)}",
        "stuck": f"{silence}; {state.stuck_cycles} canaries passed, the users' work does not move",
        "canary_ok_busy": f"{silence}; a canary passed: the engine computes",
        "canary_ok": f"{silence}; a canary passed",
        "progress": f"{inputs.evidence.outstanding} outstanding, last progress {inputs.evidence.progress_kind}",
        "canary_rejected": canary,
        "refused": f"connections are refused, for {_since(inputs, inputs.refused_since)}",
        "refused_long": f"connections are refused, for {_since(inputs, inputs.refused_since)}",
        "refused_stalled": "connections are refused",
        "restarted": "another process of the engine answers",
        "reopened": "the engine accepts connections again",
        "not_served": f"the engine has served nothing {starting}{_named(state)}",
        "start_overdue": f"the engine was replaced and has served nothing {starting}{_named(state)}",
        "exempt": why,
        "withheld": why,
    }
    return texts.get(condition, silence)


def _hang(state: VerdictState, inputs: VerdictInputs) -> str:
    """What the engine's processes and its GPUs show, while it is thought to hang."""
    if state.state not in ("suspect", "stalled") or not inputs.hang.name:
        return ""
    whose = "by its GPUs" if inputs.hang.is_of_gpu else "by its processes"
    proved = f"proved {whose}" if inputs.proven_after is not None else whose
    where = f", {inputs.hang_where}" if inputs.hang_where else ""
    return f"{proved}{where}: {inputs.hang.name}, {inputs.hang.text}"


def _done(state: VerdictState, inputs: VerdictInputs, condition: str, hold: KillHold | None) -> str:
    """What is done now, and what an operator can do."""
    if state.state == "stalled":
        return _ended(inputs, condition) + (f"liveness is held back: {hold.detail}" if hold else KILLED)
    if state.reason == "engine_sleeping" and inputs.wakes:
        return "not judged: readiness and liveness pass, and a request wakes it"
    if state.state == "suspect":
        return f"readiness fails; {_outlook(state, inputs, condition)}"
    if state.state == "starting" and state.reason == "startup_stuck":
        return "readiness fails until it serves; see the engine's log"
    texts = {
        "starting": "readiness fails until it serves",
        "dead": "liveness fails; see the log of the engine's last start",
        "exempt": "not judged: readiness fails, liveness passes" + RESUMED.get(state.reason, ""),
        "unknown": "not judged now: liveness passes",
    }
    if condition == "canary_rejected":
        return "silence of users is judged alone; `sidecar doctor` says why no canary passes"
    return texts.get(state.state, "")


def _outlook(state: VerdictState, inputs: VerdictInputs, condition: str) -> str:
    """What will follow a doubt."""
    evidence = inputs.evidence
    kill = f"{evidence.kill_after if inputs.proven_after is None else inputs.proven_after:.0f} s"
    if condition == "part":
        may_kill = inputs.part is not None and inputs.part.reason not in NEVER_SEVERE
        return f"liveness fails if it lasts {SEVERE_AFTER_S:.0f} s" if may_kill else "liveness does not for this"
    if condition == "stuck":
        return "liveness does not for this: the engine computes; restart it by hand if the work stays where it is"
    if condition == "refuses":
        return f"liveness fails at {kill} unless something is served"
    if not inputs.is_working and inputs.can_ask is False:
        return "no canary passes here"
    if not inputs.is_working:
        return f"liveness fails once no canary has passed for {kill}"
    blind = evidence.kill_after * (1.0 if evidence.frozen else UNASKED_KILLS)
    if inputs.canary is not None and inputs.canary.outcome == "busy":
        return f"liveness fails at {blind:.0f} s unless a canary passes: a refusal as too much proves nothing sooner"
    if inputs.can_ask:
        return f"liveness fails at {kill} unless a canary passes"
    return f"liveness fails at {blind:.0f} s: no canary passes here, `sidecar doctor` says why"


def _ended(inputs: VerdictInputs, condition: str) -> str:
    """What becomes of the open requests, at the moment when a stall is found."""
    count = inputs.evidence.outstanding
    if not count or condition == "held":
        return ""
    return f"{count} {'request is' if count == 1 else 'requests are'} ended, clients may send them again; "


def _silence(inputs: VerdictInputs) -> str:
    """How long nothing has moved, and how long it may."""
    evidence = inputs.evidence
    if evidence.age is None:
        return "nothing outstanding"
    work = f"{evidence.outstanding} outstanding" if evidence.outstanding else "the engine has work of others"
    step = f"; its core has begun no step for {evidence.step_age:.1f} s" if evidence.stands else ""
    return (
        f"{work}, {evidence.age:.1f} s without progress ({evidence.allowed:.1f} s allowed: {evidence.ruled_by}){step}"
    )


def _canary(inputs: VerdictInputs) -> str:
    """The last canary in words."""
    last = inputs.canary
    if last is None:
        return "no canary has ended yet"
    return f"the last canary {CANARY_ENDS[last.outcome]}" + (f" ({last.detail})" if last.detail else "")


def _confirmation(inputs: VerdictInputs) -> str:
    """What confirms a silence."""
    evidence, canary = inputs.evidence, _canary(inputs)
    if inputs.can_ask:
        return canary
    return "the engine's counters stand still" if evidence.frozen else f"no canary passes here, {canary}"


def _named(state: VerdictState) -> str:
    """The reason in words, where it says more than the numbers before it."""
    is_said = state.reason in ("no_progress", "canary_lost") or state.reason not in REASON_TEXTS
    return "" if is_said else f": {REASON_TEXTS[state.reason]}"


def _since(inputs: VerdictInputs, at: float | None) -> str:
    return f"{0.0 if at is None else inputs.now - at:.0f} s"


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
