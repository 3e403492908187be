"""Pure: the last verdict as the answer to a probe. Nothing here waits or reads.

Unknown is neither healthy nor failed: it fails no probe. Load fails no probe.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

from sidecar.events import State, Verdict

Kind = Literal["live", "ready", "startup"]
KINDS: Final[tuple[Kind, ...]] = ("live", "ready", "startup")

FAILS: Final[dict[Kind, frozenset[State]]] = {
    "live": frozenset({"stalled", "dead"}),
    "ready": frozenset({"starting", "suspect", "stalled", "dead", "exempt"}),
    # It also needs a token served. These states count because kubelet probes start-up of a new container first: while
    # the verdict is still that of the container before, liveness must not start to count.
    "startup": frozenset({"stalled", "dead"}),
}
# A verdict file older than this proves nothing.
VERDICT_STALE_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class ProbeState:
    """What probes render: the verdict, whether start-up is done, and whether the sidecar drains.

    `held`: a stalled engine must not be killed now (see kill_policy.py). `doubtful`: the last known state was a stall,
    and nothing has shown the contrary yet. `settling`: seconds for which readiness waits after repeated doubts.
    `dozes`: the engine sleeps until a request wakes it, which none would do if no traffic came.
    """

    verdict: Verdict
    startup_done: bool
    draining: bool
    held: bool = False
    doubtful: bool = False
    settling: float = 0.0
    dozes: bool = False


def passes(kind: Kind, state: ProbeState) -> bool:
    """Whether a probe of this kind passes."""
    if kind == "startup" and not state.startup_done:
        return False
    if kind == "ready" and (state.draining or state.doubtful or state.settling > 0):
        return False
    if kind == "ready" and state.dozes:
        return True
    if kind == "live" and state.held and state.verdict.state == "stalled":
        return True
    return state.verdict.state not in FAILS[kind]


def verdict_json(verdict: Verdict) -> dict[str, Any]:
    """A verdict as JSON: the body of every probe endpoint."""
    return {
        "verdict": verdict.state,
        "reason": verdict.reason,
        "detail": verdict.detail,
        "since": verdict.since_wall,
        "evidence": dict(verdict.evidence),
    }


def file_body(state: ProbeState, now_wall: float) -> dict[str, Any]:
    """The content of verdict.json: the probe body, and the answer to each exec probe."""
    return {**verdict_json(state.verdict), "written": now_wall, "passes": {kind: passes(kind, state) for kind in KINDS}}


def exec_answer(kind: Kind, content: Any, age: float | None) -> tuple[bool, str]:
    """Judge an exec probe by the verdict file's content and age in seconds (None: no file). Fails open."""
    if age is None:
        return True, "no verdict file: passing, because a missing sidecar must not kill a healthy engine"
    if not -VERDICT_STALE_S <= age <= VERDICT_STALE_S:
        return True, f"the verdict file is {age:.0f} s old: passing, because it proves nothing"
    if not isinstance(content, dict) or not isinstance(content.get("passes"), dict):
        return True, "the verdict file cannot be read: passing, because it proves nothing"
    passed = content["passes"].get(kind) is not False
    return passed, f"{content.get('verdict')} ({content.get('reason')}): {content.get('detail')}"
