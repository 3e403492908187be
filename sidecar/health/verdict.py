"""Pure: (state, evidence, canary, now) -> verdict with a reason, from a literal table.

Each tick the first condition of CONDITIONS that holds picks the row of TABLE; the row maps the present state (or `*`) to the
next state and its reason. A kill needs all of: work or a canary outstanding; silence beyond what is allowed; a confirming canary
that failed or starved; no exemption; nothing withheld because of our own ill-health. Unknown is neither healthy nor failed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from sidecar.events import CanaryResult, State
from sidecar.health.partial_hangs import PartialHang
from sidecar.health.progress import Evidence

FRESH_PROGRESS_S = 2.0  # seconds after progress in which the engine counts as progressing
REFUSED_GRACE_S = 5.0  # seconds of refused connections before the engine counts as gone
DEAD_HOLD_S = 60.0  # seconds that `dead` is held; then a restart is under way, and killing again would loop
STUCK_CYCLES = 3  # canaries that passed while the users' work stood still, before readiness stays withdrawn
REJECTED_STARTS = 3  # canaries rejected (4xx) before start-up no longer waits for one
PART_HOLD_S = (
    120.0  # seconds that `stalled` holds after a part was the reason: its streams are ended, nothing else would show it
)
STALLED_CANARY = 2.0  # seconds between canaries of a stalled or suspect engine
STARTING_CANARY = 1.0


@dataclass(frozen=True, slots=True)
class VerdictInputs:
    """What a tick judges. `refused_since`: since when no connection is taken; `exempt`, `withheld`: reason codes or None."""

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


@dataclass(frozen=True, slots=True)
class VerdictState:
    """What the next tick must know. `served`: a token came since the engine last started; `window_at`: a canary passed then."""

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

    @property
    def startup_done(self) -> bool:
        """Whether /startupz may pass: a token was served, or the engine takes no canary at all."""
        return self.served or self.rejected >= REJECTED_STARTS


Condition = Callable[[VerdictState, VerdictInputs], bool]


def _progress(m: VerdictState, i: VerdictInputs) -> bool:
    at = i.evidence.progress_at
    return at is not None and at > m.engine_since and i.now - at <= FRESH_PROGRESS_S


def _refused(m: VerdictState, i: VerdictInputs) -> bool:
    return i.refused_since is not None and i.now - i.refused_since >= REFUSED_GRACE_S


def _refused_long(m: VerdictState, i: VerdictInputs) -> bool:
    return _refused(m, i) and m.state == "dead" and i.now - m.since >= DEAD_HOLD_S


def _silent(m: VerdictState, i: VerdictInputs) -> bool:
    e = i.evidence
    if e.age is None:
        return False
    silence = min(e.age, i.now - m.window_at)
    return (
        silence > e.allowed and not (_fresh(e.steps_age) and e.age <= e.allowed + STEPS_HOLD_OFF) and not _prefills(e)
    )


def _fresh(age: float | None) -> bool:
    return age is not None and age <= FRESH_PROGRESS_S


def _prefills(e: Evidence) -> bool:
    """Prefill evidence moves: a prefill may take longer than was foreseen, for a while."""
    return _fresh(e.prefill_age) and e.age is not None and e.age <= PREFILL_HOLD_OFF * e.allowed


STEPS_HOLD_OFF = 6.0  # seconds over the allowed silence for which engine steps alone hold suspicion off
PREFILL_HOLD_OFF = 1.5  # times the allowed silence for which prefill evidence alone does


def _canary(m: VerdictState, i: VerdictInputs, *outcomes: str) -> bool:
    """Whether the last canary ended so, and is of this engine process."""
    return i.canary is not None and i.canary.outcome in outcomes and i.canary.started >= m.engine_since


def _canary_ok(m: VerdictState, i: VerdictInputs) -> bool:
    return (
        m.state in ("starting", "suspect", "stalled", "dead", "unknown", "exempt")
        and _canary(m, i, "ok")
        and i.canary is not None
        and i.canary.started >= (m.since if m.state in ("suspect", "stalled", "exempt") else m.engine_since)
    )


def _confirmed(m: VerdictState, i: VerdictInputs) -> bool:
    """Suspect, and a canary that was sent since then failed too, while the silence went on."""
    sent = i.canary is not None and i.canary.started >= m.since
    silence = i.evidence.age is None or _silent(m, i)
    return m.state == "suspect" and sent and silence and _canary(m, i, "failed", "starved")


def _canary_lost(m: VerdictState, i: VerdictInputs) -> bool:
    return m.served and i.evidence.age is None and _since_progress(i) and _canary(m, i, "failed", "starved")


def _since_progress(i: VerdictInputs) -> bool:
    """Whether the last canary was sent after the last progress: an older one says nothing of now."""
    return i.canary is not None and i.canary.started > (i.evidence.progress_at or 0.0)


def _rejected(m: VerdictState, i: VerdictInputs) -> bool:
    judged = m.rejected >= REJECTED_STARTS if not m.served else i.evidence.age is None or _silent(m, i)
    return judged and _since_progress(i) and _canary(m, i, "rejected")


def _part(m: VerdictState, i: VerdictInputs) -> bool:
    """A part hangs alone; the silence of the whole engine goes before it."""
    return i.part is not None and m.served and m.state not in ("starting", "dead") and not _silent(m, i)


def _part_severe(m: VerdictState, i: VerdictInputs) -> bool:
    """A part has hung for long, or did until its requests were ended for it: then the kill is under way."""
    held = m.state == "stalled" and m.part and i.now - m.since < PART_HOLD_S
    return held or (_part(m, i) and i.part is not None and i.part.severe)


def _working(m: VerdictState, i: VerdictInputs) -> bool:
    return i.evidence.age is not None


def _stuck(m: VerdictState, i: VerdictInputs) -> bool:
    return m.stuck_cycles >= STUCK_CYCLES and _working(m, i)


CONDITIONS: tuple[tuple[str, Condition, str], ...] = (
    ("exempt", lambda m, i: i.exempt is not None, "the engine sleeps or is paused, or the pod drains"),
    ("withheld", lambda m, i: i.withheld is not None, "our own loop, clock or facts were not to be trusted just now"),
    ("restarted", lambda m, i: i.restarted, "the engine's start time or counters show a new process"),
    ("refused_long", _refused_long, f"no connection for {DEAD_HOLD_S:.0f} s after the engine was found dead"),
    (
        "refused_stalled",
        lambda m, i: m.state == "stalled" and i.refused_since is not None,
        "no connection taken: the stalled engine is being restarted",
    ),
    ("refused", _refused, f"no connection taken for {REFUSED_GRACE_S:.0f} s"),
    ("reopened", lambda m, i: m.state == "dead" and i.refused_since is None, "connections are taken again after death"),
    ("part_severe", _part_severe, "a part has hung alone for long, with much of the work"),
    ("part", _part, "a part hangs alone: a stream again and again, all decodes, one rank, admission"),
    ("progress", _progress, f"progress within the last {FRESH_PROGRESS_S:.0f} s"),
    ("confirmed", _confirmed, "silent beyond the allowed time, and the confirming canary failed or starved"),
    ("stuck", _stuck, f"{STUCK_CYCLES} canaries passed while the users' work stood still"),
    ("canary_ok_busy", lambda m, i: _canary_ok(m, i) and _working(m, i), "a canary passed; users' work is outstanding"),
    ("canary_ok", _canary_ok, "a canary passed; nothing else is outstanding"),
    ("canary_rejected", _rejected, "the engine does not take our canary (4xx), so silence proves nothing"),
    ("not_served", lambda m, i: not m.served, "no token yet since the engine started"),
    ("held", lambda m, i: m.state in ("stalled", "dead"), "nothing shows recovery"),
    ("canary_lost", _canary_lost, "idle, and the canary failed or starved"),
    ("silent", _silent, "work is outstanding and silent beyond the allowed time"),
    ("working", _working, "work is outstanding, silent within the allowed time"),
    ("nothing", lambda m, i: True, "nothing is outstanding"),
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
    "progress": {"*": ("progressing", "progress")},
    "confirmed": {"*": ("stalled", "no_progress")},
    "stuck": {"*": ("suspect", "work_stuck")},
    "canary_ok_busy": {"*": ("quiet", "canary_ok")},
    "canary_ok": {"*": ("idle", "canary_ok")},
    "canary_rejected": {"*": ("unknown", "canary_rejected")},
    "not_served": {"*": ("starting", "awaiting_first_token")},
    "held": {"stalled": ("stalled", "kept"), "dead": ("dead", "engine_gone")},
    "canary_lost": {"*": ("suspect", "canary_lost")},
    "silent": {"*": ("suspect", "no_progress")},
    "working": {"suspect": ("suspect", "kept"), "*": ("quiet", "within_allowed")},
    "nothing": {"suspect": ("suspect", "kept"), "*": ("idle", "no_work")},
}


def judge(m: VerdictState, i: VerdictInputs) -> tuple[VerdictState, str]:
    """One tick: the new memory, and the name of the condition that ruled."""
    m = _count(m, i)
    name = next(name for name, holds, _ in CONDITIONS if holds(m, i))
    row = TABLE[name]
    state, reason = row.get(m.state) or row.get("*", (m.state, m.reason))
    return _enter(m, i, name, state, _exact(m, i, reason)), name


def _exact(m: VerdictState, i: VerdictInputs, reason: str) -> str:
    """The reason code, where the table's stands for one that the inputs or the memory name."""
    exact = {
        "exempt": i.exempt,
        "own_lag": i.withheld,
        "part": i.part.reason if i.part is not None else m.reason,
        "kept": m.reason,
        "no_progress": i.cause,
        "awaiting_first_token": "startup_stuck" if i.startup_stuck else None,
    }
    return exact.get(reason) or reason


def _count(m: VerdictState, i: VerdictInputs) -> VerdictState:
    """Count a canary's end once, and forget stuck work when it moved or went away."""
    if i.canary is not None and i.canary.ended > m.canary_seen:
        m = replace(m, canary_seen=i.canary.ended, rejected=m.rejected + 1 if i.canary.outcome == "rejected" else 0)
    if m.stuck_cycles and (not _working(m, i) or _progress(m, i)):
        m = replace(m, stuck_cycles=0)
    return m


def _enter(m: VerdictState, i: VerdictInputs, name: str, state: State, reason: str) -> VerdictState:
    changes: dict[str, float | int | bool] = {"part": name in ("part", "part_severe")}
    if name in ("progress", "canary_ok", "canary_ok_busy"):
        changes["served"] = True
    if name == "canary_ok_busy":
        changes["window_at"] = i.now
        if m.state == "suspect":
            changes["stuck_cycles"] = m.stuck_cycles + 1
    if state == "starting" and m.state != "starting":
        changes |= {"served": False, "rejected": 0, "engine_since": i.now, "stuck_cycles": 0}
    elif name == "restarted":
        changes |= {"served": False, "engine_since": i.now}
    since = m.since if state == m.state else i.now
    return replace(m, state=state, reason=reason, since=since, **changes)  # type: ignore[arg-type]


def is_canary_due(m: VerdictState, e: Evidence, last_ended: float | None, interval: float) -> bool:
    """Whether a canary should be sent now (none is outstanding): when starting, idle for `interval`, suspect, or stalled.

    Never while work progresses or is silent within its time: a canary would only add load.
    """
    pauses = {"starting": STARTING_CANARY, "suspect": STALLED_CANARY, "stalled": STALLED_CANARY, "dead": STALLED_CANARY}
    pause = interval if m.part else pauses.get(m.state, interval)
    idle = m.state in ("idle", "unknown") and (e.age is None or e.age > e.allowed)
    quiet_for = e.now - max(last_ended or 0.0, e.progress_at or 0.0 if idle else 0.0)
    fresh_suspect = m.state == "suspect" and (last_ended is None or last_ended <= m.since)
    return (idle or m.state in pauses) and (fresh_suspect or quiet_for >= pause)
