"""Pure: whether a stalled engine may be killed now, or stays unready until an operator acts.

A kill is liveness that begins to fail; kubelet restarts the container. Rules:
- The interval between two kills doubles from kill to kill and is forgotten after a healthy hour. Whatever makes the
  verdict wrong must not cause a storm of restarts, each of which costs minutes of loading.
- Replicas that stall at once are killed one after another: each waits for its own share of the jitter.
- A restart that cannot help is not requested. After restarts that did not help, or an XID that only a reset of the GPU
  or a reboot repairs, the engine is escalated to an operator. That stays so until the operator resumes restarts or it
  was healthy for an hour.
- A kill stands until the engine was seen to restart or to recover: liveness that continues to fail is no second kill.
- `dead` is neither held nor counted: where no process is left, kubelet restarts it and backs off by itself.
- Times are monotonic seconds, passed in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Final

from msgspec import Meta

from sidecar.events import State
from sidecar.readings import GpuSample, Reading, Value
from sidecar.settings import Settings

# NVIDIA's catalogue (docs.nvidia.com/deploy/xid-errors, "Analyzing Xid Errors with the Xid Catalog") resolves these
# with a reset of the GPU, and with a reboot: a new process in the same container would find the same broken GPU.
NEEDS_RESET: Final = frozenset({46, 62, 95, 109, 119, 120, 140})
NEEDS_REBOOT: Final = frozenset({79})
# Of a reason code in saved state.
MAX_CODE_CHARS: Final = 64

# The longest time between two kills: from the fifth on, a pod that stalls again and again costs at most a restart an
# hour.
MAX_INTERVAL_S: Final = 3600.0
# Replicas that stall at once are killed within this time, each at its own time, by POD_UID or POD_NAME. Longer than a
# period of their liveness probe (5 s), which would bring them together again, and short compared with the silence that
# found the stall.
JITTER_S: Final = 10.0
# An engine that stalls again within this time of its first token was not helped by its restart.
RECOVERY_S: Final = 600.0
# Health after which kills and an escalation are forgotten: as long as the longest interval, after which the next kill
# would be allowed anyway.
HEALTHY_S: Final = MAX_INTERVAL_S

HEALTHY_STATES: Final = frozenset[State]({"idle", "progressing"})
UNHEALTHY_STATES: Final = frozenset[State]({"stalled", "dead", "starting"})

# What is escalated, and what an operator must do about it; the gravest first.
ESCALATIONS: Final[dict[str, str]] = {
    "node_needs_reboot": "the GPU fell off the bus: drain the node and reboot it",
    "gpu_needs_reset": "drain the node and reset the GPU",
    "restart_useless": "restarts do not help: read the diagnoses, then repair or replace the pod",
}
# A hold too short to become the reason of the verdict.
JITTER_HOLD: Final = "kill_jitter"


@dataclass(frozen=True, slots=True)
class KillLimits:
    """The bounds, in seconds.

    `interval` and `useless` (restarts) are settings; `jitter` is this pod's own share of it.
    """

    interval: float = 300.0
    interval_cap: float = MAX_INTERVAL_S
    jitter: float = 0.0
    recovery: float = RECOVERY_S
    healthy: float = HEALTHY_S
    useless: int = 2


@dataclass(frozen=True, slots=True)
class KillInputs:
    """What a tick decides on. `proof`: when the last token came or the last canary passed; None before any.

    `xid`: one that a restart does not repair, reported since the last tick; 0 where there was none.
    """

    now: float
    state: State
    proof: float | None = None
    xid: int = 0
    resume: bool = False  # an operator resumed restarts


@dataclass(frozen=True, slots=True)
class KillState:
    """What the next tick must know. `restarted_at`, `served_at` and `counted` are of the engine since the last kill."""

    state: State = "starting"
    unwell_at: float = 0.0  # when it was last unhealthy
    stalled_at: float | None = None
    healthy_at: float | None = None  # since when it is healthy without a break
    killed_at: float | None = None
    standing: bool = False  # the last kill stands: neither a restart nor a recovery was seen since
    kills: int = 0  # since the last healthy hour
    kills_total: int = 0
    restarted_at: float | None = None
    served_at: float | None = None
    counted: bool = False  # that restart was found useless
    useless: int = 0  # useless restarts in a row
    xid: int = 0
    xid_at: float = 0.0
    handover: Annotated[str, Meta(max_length=MAX_CODE_CHARS)] = ""


@dataclass(frozen=True, slots=True)
class KillHold:
    """Why a kill is held back. `handover`: only an operator can repair it."""

    reason: str
    detail: str
    handover: bool


def decide(state: KillState, inputs: KillInputs, limits: KillLimits) -> tuple[KillState, KillHold | None]:
    """One tick: the new state, and what holds a kill back. None: nothing does, or the engine is not stalled."""
    state = _escalate(_count(_observe(state, inputs), inputs, limits), inputs, limits)
    if inputs.state != "stalled":
        return replace(state, state=inputs.state, stalled_at=None), None
    state = replace(state, state=inputs.state)
    reason = next((reason for reason, holds, _ in HOLDS if holds(state, inputs, limits)), "")
    if reason:
        return state, KillHold(reason, explain(reason, state, inputs, limits), reason in ESCALATIONS)
    return (state if state.standing else _kill(state, inputs.now)), None


def kill_limits(settings: Settings, pod: str) -> KillLimits:
    """The bounds by the settings, for the pod of this name."""
    return KillLimits(
        interval=settings.kill_interval,
        interval_cap=max(settings.kill_interval, MAX_INTERVAL_S),
        jitter=JITTER_S * share(pod),
        useless=settings.useless_restarts,
    )


def interval(kills: int, limits: KillLimits) -> float:
    """Seconds between the last of `kills` kills and the next, at least."""
    return min(limits.interval_cap, limits.interval * 2.0 ** min(kills - 1, 60)) if kills else 0.0


def share(identity: str) -> float:
    """A pod's own place among its replicas, 0 <= share < 1, by its name; 0 without one."""
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8]) / 2**64 if identity else 0.0


def _listed(numbers: frozenset[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))


def _is_too_soon(state: KillState, inputs: KillInputs, limits: KillLimits) -> bool:
    if state.standing or state.killed_at is None:
        return False
    return inputs.now - state.killed_at < interval(state.kills, limits)


def _is_within_jitter(state: KillState, inputs: KillInputs, limits: KillLimits) -> bool:
    return not state.standing and state.stalled_at is not None and inputs.now - state.stalled_at < limits.jitter


Condition = Callable[[KillState, KillInputs, KillLimits], bool]


def _is_escalated(reason: str) -> Condition:
    return lambda state, inputs, limits: state.handover == reason


# The first that holds keeps liveness passing.
HOLDS: Final[tuple[tuple[str, Condition, str], ...]] = (
    ("node_needs_reboot", _is_escalated("node_needs_reboot"), f"XID {_listed(NEEDS_REBOOT)}"),
    ("gpu_needs_reset", _is_escalated("gpu_needs_reset"), f"XID {_listed(NEEDS_RESET)}"),
    ("restart_useless", _is_escalated("restart_useless"), "it stalled again soon after each of its last restarts"),
    ("kill_interval", _is_too_soon, "the last kill is too recent"),
    (JITTER_HOLD, _is_within_jitter, "its share of the jitter is not over; the verdict keeps its own reason"),
)


def explain(reason: str, state: KillState, inputs: KillInputs, limits: KillLimits) -> str:
    """One line for an operator: why there is no kill, and what comes next."""
    ago = inputs.now - state.killed_at if state.killed_at is not None else 0.0
    left = interval(state.kills, limits) - ago
    texts = {
        "node_needs_reboot": f"XID {state.xid}; {ESCALATIONS['node_needs_reboot']}",
        "gpu_needs_reset": f"XID {state.xid}, which a restart does not repair; {ESCALATIONS['gpu_needs_reset']}",
        "restart_useless": f"{state.useless} restarts in a row without recovery; {ESCALATIONS['restart_useless']}",
        "kill_interval": f"killed {ago:.0f} s ago, the next kill may come in {left:.0f} s",
        JITTER_HOLD: f"killed within {limits.jitter:.0f} s, so that replicas do not restart at once",
    }
    return texts[reason]


def _observe(state: KillState, inputs: KillInputs) -> KillState:
    """What a change of the verdict shows about the last kill, and about health."""
    has_started = inputs.state == "starting" and state.state != "starting"
    if has_started and state.killed_at is not None and state.restarted_at is None:
        state = replace(state, restarted_at=inputs.now, standing=False)
    if _is_healthy(state, inputs):
        healthy_at = inputs.now if state.healthy_at is None else state.healthy_at
        served_at = inputs.now if state.served_at is None and state.restarted_at is not None else state.served_at
        return replace(state, healthy_at=healthy_at, served_at=served_at, standing=False)
    return replace(state, healthy_at=None, unwell_at=inputs.now) if inputs.state in UNHEALTHY_STATES else state


def _is_healthy(state: KillState, inputs: KillInputs) -> bool:
    """Healthy, and not only because no work comes: the engine did something since it was last unhealthy."""
    return inputs.state in HEALTHY_STATES and inputs.proof is not None and inputs.proof > state.unwell_at


def _count(state: KillState, inputs: KillInputs, limits: KillLimits) -> KillState:
    """Count a restart that did not help, once, when the engine stalls again; forget what health has disproved."""
    if inputs.state == "stalled" and state.stalled_at is None:
        state = replace(state, stalled_at=inputs.now)
        is_useless = state.served_at is None or inputs.now - state.served_at < limits.recovery
        if state.restarted_at is not None and not state.counted and is_useless:
            state = replace(state, useless=state.useless + 1, counted=True)
    if state.healthy_at is not None and _is_healthy(state, inputs):
        healthy = inputs.now - state.healthy_at
        if healthy >= limits.healthy:
            state = replace(state, kills=0, handover="")
        if healthy >= limits.recovery and not state.handover:
            state = replace(state, useless=0, xid=state.xid if inputs.now - state.xid_at < limits.recovery else 0)
    return state


def _escalate(state: KillState, inputs: KillInputs, limits: KillLimits) -> KillState:
    if inputs.resume:
        state = replace(state, handover="", useless=0, xid=0, kills=0)
    if inputs.xid and (inputs.xid in NEEDS_REBOOT or state.xid not in NEEDS_REBOOT):
        state = replace(state, xid=inputs.xid, xid_at=inputs.now)
    if inputs.state not in ("stalled", "dead"):
        return state
    found = {
        "node_needs_reboot": state.xid in NEEDS_REBOOT,
        "gpu_needs_reset": state.xid in NEEDS_RESET,
        "restart_useless": 0 < limits.useless <= state.useless,
    }
    return replace(state, handover=next((name for name in ESCALATIONS if found[name] or state.handover == name), ""))


def _kill(state: KillState, now: float) -> KillState:
    state = replace(state, kills=state.kills + 1, kills_total=state.kills_total + 1, killed_at=now, standing=True)
    return replace(state, restarted_at=None, served_at=None, counted=False)


class KillPolicy:
    """The policy's state from tick to tick, and what holds a kill back now."""

    def __init__(self, limits: KillLimits) -> None:
        self.limits = limits
        self.state = KillState()
        self.hold: KillHold | None = None
        self.resume = False  # an operator resumed restarts; consumed by the next tick
        self._xids: dict[tuple[int, int], int] = {}

    @property
    def reason(self) -> str:
        """What holds a kill back, where it becomes the reason of the verdict; empty otherwise."""
        return self.hold.reason if self.hold and self.hold.reason != JITTER_HOLD else ""

    def tick(self, state: State, proof: float | None, gpus: Reading[tuple[GpuSample, ...]], now: float) -> None:
        """Decide, and keep the state for the next tick."""
        inputs = KillInputs(now, state, proof, self._new_xid(gpus), self.resume)
        self.resume = False
        self.state, self.hold = decide(self.state, inputs, self.limits)

    def _new_xid(self, gpus: Reading[tuple[GpuSample, ...]]) -> int:
        """The gravest XID that a restart does not repair and that was reported since the last tick; 0 for none."""
        new = 0
        for gpu in gpus.value if isinstance(gpus, Value) else ():
            for xid, count in gpu.xid_errors:
                if xid in NEEDS_RESET | NEEDS_REBOOT and count > self._xids.get((gpu.index, xid), 0):
                    self._xids[gpu.index, xid] = count
                    new = xid if xid in NEEDS_REBOOT or not new else new
        return new
