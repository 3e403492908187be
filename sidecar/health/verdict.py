"""Pure: (state, evidence, canary, now) -> verdict with a reason, from a literal table.

Each tick the first condition of CONDITIONS that holds picks the row of TABLE. The row maps the present state (or `*`)
to the next state and its reason. Rules:

- Readiness goes at `allowed`, liveness at `kill_after`: traffic can go elsewhere at once, a restart costs minutes.
- A kill needs all of: work or a canary outstanding; silence beyond `kill_after`; a canary sent in that silence that
  failed or starved; no exemption; nothing withheld because of the sidecar's own trouble.
- A proof from the engine's processes shortens `kill_after`, and a canary that got nothing so far is enough; all else
  is needed as before.
- Where no canary passes, counters that stand still over running work confirm as well, and silence alone does after
  UNASKED_KILLS times as long. "Busy" confirms where the counters stand still.
- What served and refuses everything now is not ready, then dead. So is a process that replaced another one under the
  sidecar and never serves.
- Unknown is neither healthy nor failed, and never lasts forever.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from sidecar.events import CanaryResult, State
from sidecar.health.hang_classes import MIN_PROOF_S, NO_CLASS, HangClass
from sidecar.health.partial_hangs import PartialHang
from sidecar.health.progress import Evidence

# After progress the engine counts as progressing for so long.
FRESH_PROGRESS_S: Final = 2.0
# The engine counts as gone once it has refused connections for so long.
REFUSED_GRACE_S: Final = 5.0
# `dead` is held for so long; then a restart is under way, and another kill would loop.
DEAD_HOLD_S: Final = 60.0
# Canaries that passed while the users' work stood still, before readiness stays withdrawn.
STUCK_CYCLES: Final = 3
# Canaries rejected (4xx) before start-up no longer waits for one.
REJECTED_STARTS: Final = 3
# `stalled` is held for so long after a part was the reason: its streams are aborted, and nothing else would show it.
PART_HOLD_S: Final = 120.0
# Over the allowed silence, engine steps alone hold suspicion off for so long, and prefill evidence alone for so many
# times.
STEPS_HOLD_OFF_S: Final = 3.0
PREFILL_HOLD_OFF: Final = 1.25
# Where no canary passes, so many times the silence withdraws readiness, and so many times fails liveness. An answer
# that may be generated unseen keeps readiness for all of its time.
UNASKED_FACTOR: Final = 2.0
UNASKED_KILLS: Final = 3.0
# A stalled engine at which no canary passes stays stalled for so long, in which kubelet restarts it: its users'
# requests were ended, and nothing else would show it.
UNASKED_HOLD_S: Final = 120.0
# Seconds between canaries that test whether an engine computes several requests at once.
TEST_INTERVAL_S: Final = 60.0
# Seconds between canaries of an engine in doubt, and of one that starts.
DOUBT_CANARY_INTERVAL_S: Final = 2.0
START_CANARY_INTERVAL_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class VerdictInputs:
    """What a tick judges.

    `refused_since`: since when connections are refused; `exempt`, `withheld`: reason codes or None; `can_ask`: whether
    canaries pass here, None while that is unknown; `refusing`: seconds for which every request was refused, None while
    some are not; `start_overdue`: this process has started for longer than any is known to take; `trouble`: why
    the sidecar cannot talk to the engine, "" while it can; `wakes`: a request wakes it when it sleeps;
    `proven_after`: the silence that a kill waits for, where the engine's processes prove a hang; `hang`: which one it
    is, `hang_where`: in which process; `canary_since`: a canary has been under way since then.
    """

    now: float
    evidence: Evidence
    canary: CanaryResult | None = None  # the last one that ended
    refused_since: float | None = None
    exempt: str | None = None
    withheld: str | None = None
    restarted: bool = False
    part: PartialHang | None = None  # a part that hangs alone
    cause: str = "no_progress"  # the reason code of a silence of the whole engine
    startup_stuck: bool = False
    can_ask: bool | None = True
    refusing: float | None = None
    start_overdue: bool = False
    trouble: str = ""
    wakes: bool = False
    proven_after: float | None = None
    hang: HangClass = NO_CLASS
    hang_where: str = ""
    canary_since: float | None = None

    @property
    def is_working(self) -> bool:
        """Whether work is outstanding."""
        return self.evidence.age is not None


@dataclass(frozen=True, slots=True)
class VerdictState:
    """What the next tick must know.

    `served`: a token came since the engine last started; `window_at`: a canary passed then; `lost_at`: since when
    canaries do not pass; `replaced`: this process of the engine took the place of another one.
    """

    state: State = "starting"
    reason: str = "awaiting_first_token"
    since: float = 0.0
    served: bool = False
    engine_since: float = 0.0  # when this engine process was first seen
    window_at: float = 0.0
    stuck_cycles: int = 0
    rejected: int = 0
    part: bool = False  # a part that hangs alone ruled last
    canary_seen: float = 0.0  # `ended` of the last canary that was counted
    lost_at: float | None = None
    replaced: bool = False

    @property
    def startup_done(self) -> bool:
        """Whether /startupz may pass: a token was served, or the engine accepts no canary at all."""
        return self.served or self.rejected >= REJECTED_STARTS


Condition = Callable[[VerdictState, VerdictInputs], bool]


def _is_progressing(before: VerdictState, inputs: VerdictInputs) -> bool:
    at = inputs.evidence.progress_at
    return at is not None and at > before.engine_since and inputs.now - at <= FRESH_PROGRESS_S


def _is_refused(before: VerdictState, inputs: VerdictInputs) -> bool:
    return inputs.refused_since is not None and inputs.now - inputs.refused_since >= REFUSED_GRACE_S


def _is_refused_long(before: VerdictState, inputs: VerdictInputs) -> bool:
    return _is_refused(before, inputs) and before.state == "dead" and inputs.now - before.since >= DEAD_HOLD_S


def _silence(before: VerdictState, inputs: VerdictInputs) -> float:
    """Seconds of silence; a canary that passes resets it."""
    return min(inputs.evidence.age or 0.0, inputs.now - before.window_at)


def _is_silent(before: VerdictState, inputs: VerdictInputs) -> bool:
    """Silent beyond the allowed time, or its core stands in a step: not ready."""
    return (inputs.is_working and inputs.evidence.stands) or _is_silent_long(before, inputs)


def _is_silent_long(before: VerdictState, inputs: VerdictInputs) -> bool:
    """Silent beyond the allowed time, unless steps or a prefill that takes longer than predicted hold suspicion off.

    While the engine's cores report that they compute open prompts, nothing is.
    """
    evidence, age = inputs.evidence, inputs.evidence.age
    if age is None or evidence.computing:
        return False
    is_blind = inputs.can_ask is False and not evidence.frozen
    allowed = max(UNASKED_FACTOR * evidence.allowed, evidence.hidden) if is_blind else evidence.allowed
    silence = _silence(before, inputs)
    if inputs.canary and _is_canary_newer(inputs) and _has_canary(inputs, _asked_since(before), "failed", "starved"):
        silence, age = (max(x, inputs.now - inputs.canary.started) for x in (silence, age))  # sent before the work came
    if silence <= allowed:
        return False
    steps = _is_fresh(evidence.steps_age) and age <= allowed + STEPS_HOLD_OFF_S
    prefill = _is_fresh(evidence.prefill_age) and age <= PREFILL_HOLD_OFF * allowed
    return not steps and not prefill


def _is_fresh(age: float | None) -> bool:
    return age is not None and age <= FRESH_PROGRESS_S


def _has_canary(inputs: VerdictInputs, since: float, *outcomes: str) -> bool:
    """Whether the last canary ended so, and was sent at `since` or later."""
    return inputs.canary is not None and inputs.canary.outcome in outcomes and inputs.canary.started >= since


def _asked_since(before: VerdictState) -> float:
    """A canary that was sent earlier says nothing of this silence."""
    return max(before.engine_since, before.window_at)


def _is_canary_newer(inputs: VerdictInputs) -> bool:
    """Whether the last canary was sent after the last progress: an older one proves nothing about now."""
    return inputs.canary is not None and inputs.canary.started > (inputs.evidence.progress_at or 0.0)


def _has_canary_passed(before: VerdictState, inputs: VerdictInputs) -> bool:
    if before.state in ("starting", "dead", "unknown"):
        return _has_canary(inputs, before.engine_since, "ok")
    if inputs.canary is None or inputs.canary.ended <= before.window_at:
        return False
    if before.state == "quiet":
        began = inputs.now - (inputs.evidence.age or 0.0)
        return inputs.canary.started >= max(began, before.engine_since) and inputs.canary.outcome == "ok"
    since = max(before.since, before.engine_since)
    is_asked_before = _is_canary_newer(inputs) and inputs.canary.ended >= since  # sent before it was suspect
    if before.state == "suspect" and is_asked_before:
        since = before.engine_since
    return before.state in ("suspect", "stalled", "exempt") and _has_canary(inputs, since, "ok")


def _is_confirmed(before: VerdictState, inputs: VerdictInputs) -> bool:
    """Suspect, silent for as long as a kill takes, and what else can be known says so, too."""
    if before.state != "suspect" or not inputs.is_working or not _is_silent_long(before, inputs):
        return False
    evidence, silence = inputs.evidence, _silence(before, inputs)
    if silence <= evidence.kill_after:
        return False
    since = _asked_since(before)
    if _is_canary_newer(inputs) and _has_canary(inputs, since, "busy") and evidence.frozen:
        return True
    if inputs.can_ask and _is_canary_newer(inputs) and _has_canary(inputs, since, "failed", "starved"):
        return True
    return (not inputs.can_ask and evidence.frozen) or silence > UNASKED_KILLS * evidence.kill_after


def _is_proven(before: VerdictState, inputs: VerdictInputs) -> bool:
    """Suspect, silent for as long as a proven kill takes, and what was asked in that silence got nothing."""
    if before.state != "suspect" or inputs.proven_after is None:
        return False
    if not inputs.is_working:
        is_lost = before.lost_at is not None and inputs.now - before.lost_at > inputs.proven_after
        return is_lost and _is_canary_lost(before, inputs)
    silence = _silence(before, inputs) if _is_silent_long(before, inputs) else 0.0
    step = (inputs.evidence.step_age or 0.0) if inputs.evidence.stands else 0.0
    if max(silence, step) <= inputs.proven_after:
        return False
    return inputs.evidence.frozen or _is_canary_unanswered(before, inputs)


def _is_canary_unanswered(before: VerdictState, inputs: VerdictInputs) -> bool:
    """Whether a canary sent in this silence failed, or has waited for as long as a proof takes."""
    since, at = _asked_since(before), inputs.evidence.progress_at or 0.0
    if _is_canary_newer(inputs) and _has_canary(inputs, since, "failed", "starved"):
        return True
    sent = inputs.canary_since
    return sent is not None and sent > at and sent >= since and inputs.now - sent >= MIN_PROOF_S


def _is_lost(before: VerdictState, inputs: VerdictInputs) -> bool:
    """Nothing is outstanding, and no canary has passed for as long as a kill takes."""
    if before.state != "suspect" or inputs.is_working or before.lost_at is None:
        return False
    return _is_canary_lost(before, inputs) and inputs.now - before.lost_at > inputs.evidence.kill_after


def _is_canary_lost(before: VerdictState, inputs: VerdictInputs) -> bool:
    if not before.served or inputs.is_working or not inputs.can_ask or not _is_canary_newer(inputs):
        return False
    return _has_canary(inputs, _asked_since(before), "failed", "starved")


def _is_refusing(before: VerdictState, inputs: VerdictInputs) -> bool:
    return before.served and inputs.refusing is not None


def _is_refusing_long(before: VerdictState, inputs: VerdictInputs) -> bool:
    kill = inputs.evidence.kill_after
    if not _is_refusing(before, inputs) or (inputs.refusing or 0.0) <= kill:
        return False
    is_warned = before.reason == "refuses_work" and inputs.now - before.since > kill / 2  # readiness goes first
    return before.state == "stalled" or (before.state == "suspect" and is_warned)


def _is_start_overdue(before: VerdictState, inputs: VerdictInputs) -> bool:
    is_starting = not before.served and before.rejected < REJECTED_STARTS
    return is_starting and before.replaced and inputs.start_overdue


def _is_unserved(before: VerdictState, inputs: VerdictInputs) -> bool:
    """No token since the engine started; where it takes no canary, its users' work is judged."""
    return not before.served and not (before.rejected >= REJECTED_STARTS and _is_silent(before, inputs))


def _is_canary_rejected(before: VerdictState, inputs: VerdictInputs) -> bool:
    """Canaries cannot be asked here, and nothing else can be judged."""
    is_held = before.state == "stalled" and inputs.now - before.since < UNASKED_HOLD_S
    is_judged = not inputs.is_working if before.served else before.rejected >= REJECTED_STARTS
    if is_held or not is_judged or _is_silent(before, inputs) or not _is_canary_newer(inputs):
        return False
    unasked = not inputs.can_ask and _has_canary(inputs, before.engine_since, "failed", "starved")
    return unasked or _has_canary(inputs, before.engine_since, "rejected")


def _has_part(before: VerdictState, inputs: VerdictInputs) -> bool:
    """A part hangs alone; the silence of the whole engine goes before it."""
    is_judged = before.served and before.state not in ("starting", "dead")
    return inputs.part is not None and is_judged and not _is_silent(before, inputs)


def _has_severe_part(before: VerdictState, inputs: VerdictInputs) -> bool:
    """A part has hung for long, or did until its requests were aborted for it: then the kill is under way."""
    if before.state == "stalled" and before.part and inputs.now - before.since < PART_HOLD_S:
        return True
    return inputs.part is not None and inputs.part.severe and _has_part(before, inputs)


def _is_stuck(before: VerdictState, inputs: VerdictInputs) -> bool:
    is_seen = inputs.is_working and (inputs.evidence.age or 0.0) > inputs.evidence.hidden
    return before.stuck_cycles >= STUCK_CYCLES and is_seen


def _is_restarting(before: VerdictState, inputs: VerdictInputs) -> bool:
    return before.state == "stalled" and inputs.refused_since is not None


def _is_reopened(before: VerdictState, inputs: VerdictInputs) -> bool:
    return before.state == "dead" and inputs.refused_since is None


def _has_canary_passed_busy(before: VerdictState, inputs: VerdictInputs) -> bool:
    return inputs.is_working and _has_canary_passed(before, inputs)


CONDITIONS: Final[tuple[tuple[str, Condition, str], ...]] = (
    ("exempt", lambda _, inputs: inputs.exempt is not None, "the engine sleeps or is paused, or the pod drains"),
    (
        "withheld",
        lambda _, inputs: inputs.withheld is not None,
        "the sidecar's own loop, clock or events were unreliable",
    ),
    (
        "restarted",
        lambda _, inputs: inputs.restarted,
        "its start time, or a port that was closed, shows a new process of the engine",
    ),
    ("refused_long", _is_refused_long, f"refused connections for {DEAD_HOLD_S:.0f} s after the engine was found dead"),
    ("refused_stalled", _is_restarting, "connections are refused: the stalled engine is being restarted"),
    ("refused", _is_refused, f"connections have been refused for {REFUSED_GRACE_S:.0f} s"),
    ("reopened", _is_reopened, "connections are accepted again after death"),
    ("part_severe", _has_severe_part, "a part has hung alone for long, with much of the work"),
    (
        "part",
        _has_part,
        "a part hangs alone (single streams, decodes, a rank, admission, a listener), or users go unserved",
    ),
    ("refuses_long", _is_refusing_long, "every request has been refused for as long as a kill takes"),
    ("refuses", _is_refusing, "an engine that has served refuses every request, canaries too"),
    ("progress", _is_progressing, f"progress within the last {FRESH_PROGRESS_S:.0f} s"),
    ("proven", _is_proven, "silent for 30 s, the engine's processes prove a hang, and nothing asked of it is answered"),
    ("confirmed", _is_confirmed, "silent beyond the time of a kill, and a canary or the engine's counters confirm it"),
    ("lost", _is_lost, "idle, and no canary has passed for as long as a kill takes"),
    ("stuck", _is_stuck, f"{STUCK_CYCLES} canaries passed while the users' work stood still"),
    ("canary_ok_busy", _has_canary_passed_busy, "a canary passed; users' work is outstanding"),
    ("canary_ok", _has_canary_passed, "a canary passed; nothing else is outstanding"),
    ("start_overdue", _is_start_overdue, "the engine was replaced, and its start has taken far too long"),
    ("canary_rejected", _is_canary_rejected, "no canary passes here, and no silence of users is too long"),
    ("not_served", _is_unserved, "no token yet since the engine started"),
    ("held", lambda before, _: before.state in ("stalled", "dead"), "nothing shows recovery"),
    ("canary_lost", _is_canary_lost, "idle, and the canary failed or starved"),
    ("silent", _is_silent, "work is outstanding and silent beyond the allowed time"),
    ("working", lambda _, inputs: inputs.is_working, "work is outstanding, silent within the allowed time"),
    ("nothing", lambda *_: True, "nothing is outstanding"),
)

TransitionRow = dict[str, tuple[State, str]]

TABLE: dict[str, TransitionRow] = {
    "exempt": {"*": ("exempt", "exempt")},
    "withheld": {"starting": ("starting", "own_lag"), "*": ("unknown", "own_lag")},
    "restarted": {"*": ("starting", "engine_restarted")},
    "refused_long": {"*": ("starting", "engine_unreachable")},
    "refused_stalled": {"*": ("starting", "engine_restarting")},
    "refused": {
        "starting": ("starting", "engine_unreachable"),
        "*": ("dead", "engine_gone"),
    },
    "reopened": {"*": ("starting", "engine_restarting")},
    "part_severe": {"*": ("stalled", "part")},
    "part": {"*": ("suspect", "part")},
    "refuses_long": {"*": ("stalled", "refuses_work")},
    "refuses": {"*": ("suspect", "refuses_work")},
    "progress": {"*": ("progressing", "progress")},
    "proven": {"*": ("stalled", "no_progress")},
    "confirmed": {"*": ("stalled", "no_progress")},
    "lost": {"*": ("stalled", "canary_lost")},
    "stuck": {"*": ("suspect", "work_stuck")},
    "canary_ok_busy": {"*": ("quiet", "canary_ok")},
    "canary_ok": {"*": ("idle", "canary_ok")},
    "start_overdue": {"*": ("stalled", "startup_stuck")},
    "canary_rejected": {"*": ("unknown", "canary_rejected")},
    "not_served": {"*": ("starting", "awaiting_first_token")},
    "held": {"stalled": ("stalled", "kept"), "dead": ("dead", "engine_gone")},
    "canary_lost": {"*": ("suspect", "canary_lost")},
    "silent": {"*": ("suspect", "no_progress")},
    "working": {"suspect": ("suspect", "kept"), "*": ("quiet", "within_allowed")},
    "nothing": {"suspect": ("suspect", "kept"), "*": ("idle", "no_work")},
}


def judge(before: VerdictState, inputs: VerdictInputs) -> tuple[VerdictState, str]:
    """One tick: the new state, and the name of the condition that ruled."""
    before = _count(before, inputs)
    condition = next(name for name, holds, _ in CONDITIONS if holds(before, inputs))
    row = TABLE[condition]
    state, reason = row.get(before.state) or row.get("*", (before.state, before.reason))
    return _enter(before, inputs, condition, state, _exact_reason(before, inputs, reason)), condition


def _exact_reason(before: VerdictState, inputs: VerdictInputs, reason: str) -> str:
    """The reason code, where the table's stands for one that the inputs or the state name."""
    exact = {
        "exempt": inputs.exempt,
        "own_lag": inputs.withheld,
        "part": inputs.part.reason if inputs.part is not None else before.reason,
        "kept": before.reason,
        "no_progress": inputs.cause,
        "canary_lost": inputs.cause if inputs.cause != "no_progress" else None,
        "awaiting_first_token": "startup_stuck" if inputs.startup_stuck else None,
    }
    return exact.get(reason) or reason


def _count(before: VerdictState, inputs: VerdictInputs) -> VerdictState:
    """Count a canary's end once, and forget stuck work when it moved or went away."""
    canary = inputs.canary
    if canary is not None and canary.ended > before.canary_seen:
        rejected = {"rejected": before.rejected + 1, "moot": before.rejected}.get(canary.outcome, 0)
        lost_at = before.lost_at if before.lost_at is not None else canary.started
        lost = {"ok": None, "moot": before.lost_at, "refused": before.lost_at}.get(canary.outcome, lost_at)
        before = replace(before, canary_seen=canary.ended, rejected=rejected, lost_at=lost)
    is_calm = inputs.is_working and before.state not in ("suspect", "stalled", "dead")
    if _is_progressing(before, inputs) or is_calm:  # behind work that is silent within its time a canary may starve
        before = replace(before, lost_at=None)
    if before.stuck_cycles and (not inputs.is_working or _is_progressing(before, inputs)):
        before = replace(before, stuck_cycles=0)
    return before


def _enter(before: VerdictState, inputs: VerdictInputs, condition: str, state: State, reason: str) -> VerdictState:
    changes: dict[str, float | int | bool | None] = {"part": condition in ("part", "part_severe")}
    if condition in ("progress", "canary_ok", "canary_ok_busy"):
        changes["served"] = True
    if condition == "stuck" and _has_canary_passed(before, inputs):
        changes["window_at"] = inputs.now
    if condition == "canary_ok_busy":
        changes["window_at"] = inputs.now
        if before.state in ("suspect", "quiet"):
            changes["stuck_cycles"] = before.stuck_cycles + 1
    if state == "starting" and before.state != "starting":
        changes |= {"served": False, "rejected": 0, "engine_since": inputs.now, "stuck_cycles": 0}
        changes["replaced"] = before.replaced or condition != "not_served"  # which may follow a canary's end
        return _entered(before, inputs, state, reason, {**changes, "lost_at": None})
    if condition == "restarted":
        changes |= {"served": False, "engine_since": inputs.now, "replaced": True}
    return _entered(before, inputs, state, reason, changes)


def _entered(
    before: VerdictState,
    inputs: VerdictInputs,
    state: State,
    reason: str,
    changes: dict[str, float | int | bool | None],
) -> VerdictState:
    since = before.since if state == before.state else inputs.now
    return replace(before, state=state, reason=reason, since=since, **changes)  # type: ignore[arg-type]


def is_canary_due(
    state: VerdictState,
    evidence: Evidence,
    last_ended: float | None,
    interval: float,
    *,
    disturbs: bool = False,
    unknown: bool = False,
) -> bool:
    """Whether a canary should be sent now; none is outstanding.

    It is sent when the engine starts, has been idle for `interval`, is suspect or stalled; once before a silence makes
    it suspect; and next to users' work, while it must be known whether the engine computes several requests at once, or
    whether canaries pass here at all (`unknown`: one that never passed confirms no hang). Else never while work
    progresses or is silent within its time: it would only add load. `disturbs`: it would drop
    what the engine keeps for its users, so that only doubt is worth one.
    """
    is_doubted = state.state in ("suspect", "stalled", "dead")
    if state.state in ("progressing", "quiet"):
        asked_at = max(evidence.progress_at or 0.0, state.window_at)
        silence = min(evidence.age or 0.0, evidence.now - state.window_at)
        is_silence_long = silence > evidence.ask_after and (last_ended or 0.0) <= asked_at
        pause = interval if unknown else TEST_INTERVAL_S
        is_test_due = (evidence.untested or unknown) and evidence.now - (last_ended or 0.0) >= pause
        return not disturbs and (is_silence_long or is_test_due)
    is_idle = state.state in ("idle", "unknown") and (evidence.age is None or evidence.age > evidence.allowed)
    if not ((is_idle and not disturbs) or is_doubted or state.state == "starting"):
        return False
    if state.state == "suspect" and (last_ended is None or last_ended <= state.since):
        return True
    pause = interval
    if not state.part and not is_idle:
        pause = DOUBT_CANARY_INTERVAL_S if is_doubted else START_CANARY_INTERVAL_S
    return evidence.now - max(last_ended or 0.0, evidence.progress_at or 0.0 if is_idle else 0.0) >= pause
