"""Pure: whether a stalled engine may be killed now, or stays unready until an operator acts.

A kill is liveness that begins to fail; kubelet restarts the container. Rules:
- A kill is to be paid for by six minutes of service. While all are paid for, the next comes at once: a brake would cost
  more than the restarts. As long as some are not, there is an interval between kills, which doubles with every six
  minutes unpaid. A wrong verdict, for any reason, must not cause a storm of restarts, each of which costs minutes of
  loading. Ten minutes of service without a break pay for everything: that restart helped.
- Replicas that stall at once are killed one after another: each waits for its own share of the jitter.
- When the service of some restarts is unpaid, the engine is escalated to an operator, and tried again once an hour
  until an attempt helps: an hour later the cause may be gone, and no operator may have come.
- After an XID that only a reset of the GPU or a reboot repairs, or while the driver itself asks for one, no restart is
  requested until an operator resumes restarts or the engine was healthy for an hour.
- A kill stands until the engine was seen to restart or to recover: liveness that continues to fail is no second kill.
- `dead` is neither held nor counted: where no process is left, kubelet restarts it and backs off by itself.
- Times are monotonic seconds, passed in.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Final

from msgspec import Meta

from sidecar.events import State
from sidecar.health.reasons import REASON_TEXTS
from sidecar.labels import OTHER
from sidecar.readings import REBOOT_ACTIONS, RESET_ACTIONS, GpuSample, Reading, Value
from sidecar.settings import Settings

# NVIDIA's catalogue (docs.nvidia.com/deploy/xid-errors, "Analyzing Xid Errors with the Xid Catalog") resolves these
# with a reset of the GPU, and with a reboot: a new process in the same container would find the same broken GPU.
NEEDS_RESET: Final = frozenset({46, 62, 95, 109, 119, 120, 140})
NEEDS_REBOOT: Final = frozenset({79})
# Kills are counted by the reason of the verdict; what is none of these counts as `other`.
KILL_REASONS: Final = (*REASON_TEXTS, OTHER)
# Of a reason code in saved state, and of a list of them.
MAX_CODE_CHARS: Final = 64
MAX_CODES: Final = 200

# The longest time between two kills: while half an hour is unpaid, or after an escalation, a pod costs at most a
# restart an hour.
MAX_INTERVAL_S: Final = 3600.0
# Replicas that stall at once are killed within this time, each at its own time, by POD_UID or POD_NAME. Longer than a
# period of their liveness probe (5 s), which would bring them together again, and short compared with the silence that
# found the stall.
JITTER_S: Final = 10.0
# The service that pays for a kill, in minutes: with the time that loading takes, about the ten minutes of running after
# which kubelet forgets its own back-off.
PRICE_MIN: Final = 6
# An engine that served for so long without a break was helped by its restart.
RECOVERY_S: Final = 600.0
# Health that disproves a broken GPU: as long as the longest interval, after which any other kill would be allowed.
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

    `xid`: one that a restart does not repair, reported since the last tick; 0 where there was none. `recovery`: what
    the driver asks for now, of ESCALATIONS; "" for nothing.
    """

    now: float
    state: State
    proof: float | None = None
    xid: int = 0
    resume: bool = False  # an operator resumed restarts
    cause: str = ""  # the reason of the verdict
    recovery: str = ""


Code = Annotated[str, Meta(max_length=MAX_CODE_CHARS)]


@dataclass(frozen=True, slots=True)
class KillState:
    """What the next tick must know. `standing` and `restarted` are of the last kill."""

    state: State = "starting"
    unwell_at: float = 0.0  # when it was last unhealthy
    stalled_at: float | None = None
    healthy_at: float | None = None  # since when it is healthy without a break
    credited: int = 0  # whole minutes of this health that were counted
    killed_at: float | None = None
    standing: bool = False  # neither a restart nor a recovery was seen since
    restarted: bool = False
    owed: int = 0  # minutes of service that would pay for the kills so far
    kills: Annotated[tuple[tuple[Code, int], ...], Meta(max_length=MAX_CODES)] = ()  # by reason, since the first start
    xid: int = 0
    xid_at: float = 0.0
    handover: Code = ""

    @property
    def kills_total(self) -> int:
        """All kills since the first start."""
        return sum(count for _, count in self.kills)


@dataclass(frozen=True, slots=True)
class KillHold:
    """Why a kill is held back. `handover`: an operator must act."""

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
    return (state if state.standing else _kill(state, inputs)), None


def kill_limits(settings: Settings, pod: str) -> KillLimits:
    """The bounds by the settings, for the pod of this name."""
    return KillLimits(
        interval=settings.kill_interval,
        interval_cap=max(settings.kill_interval, MAX_INTERVAL_S),
        jitter=JITTER_S * share(pod),
        useless=settings.useless_restarts,
    )


def interval(owed: int, limits: KillLimits) -> float:
    """Seconds between the last kill and the next, at least, while `owed` minutes of service are owed."""
    unpaid = math.ceil(owed / PRICE_MIN)  # kills
    return min(limits.interval_cap, limits.interval * 2.0 ** min(unpaid - 1, 60)) if unpaid else 0.0


def kills_by_reason(kills: tuple[tuple[str, int], ...]) -> dict[str, int]:
    """The kills of each of KILL_REASONS that had any; codes that only another version knows count as `other`."""
    found: dict[str, int] = {}
    for code, count in kills:
        known = code if code in KILL_REASONS else OTHER
        found[known] = found.get(known, 0) + count
    return found


def share(identity: str) -> float:
    """A pod's own place among its replicas, 0 <= share < 1, by its name; 0 without one."""
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8]) / 2**64 if identity else 0.0


def _listed(numbers: frozenset[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))


def _left(state: KillState, now: float, limits: KillLimits) -> float:
    """Seconds until the next kill may come."""
    if state.standing or state.killed_at is None:
        return 0.0
    wait = limits.interval_cap if state.handover == "restart_useless" else interval(state.owed, limits)
    return state.killed_at + wait - now


def _is_too_soon(state: KillState, inputs: KillInputs, limits: KillLimits) -> bool:
    return _left(state, inputs.now, limits) > 0


def _is_between_attempts(state: KillState, inputs: KillInputs, limits: KillLimits) -> bool:
    return state.handover == "restart_useless" and _is_too_soon(state, inputs, limits)


def _is_within_jitter(state: KillState, inputs: KillInputs, limits: KillLimits) -> bool:
    return not state.standing and state.stalled_at is not None and inputs.now - state.stalled_at < limits.jitter


Condition = Callable[[KillState, KillInputs, KillLimits], bool]


def _is_escalated(reason: str) -> Condition:
    return lambda state, inputs, limits: state.handover == reason


# The first that holds keeps liveness passing.
HOLDS: Final[tuple[tuple[str, Condition, str], ...]] = (
    (
        "node_needs_reboot",
        _is_escalated("node_needs_reboot"),
        f"XID {_listed(NEEDS_REBOOT)}, or the driver asks for it",
    ),
    (
        "gpu_needs_reset",
        _is_escalated("gpu_needs_reset"),
        f"XID {_listed(NEEDS_RESET)}, or the driver asks for it",
    ),
    (
        "restart_useless",
        _is_between_attempts,
        "it stalled soon after each of its last restarts, and the last is less than an hour ago",
    ),
    ("kill_interval", _is_too_soon, "the last kill is too recent for the little service since"),
    (JITTER_HOLD, _is_within_jitter, "its share of the jitter is not over; the verdict keeps its own reason"),
)


def explain(reason: str, state: KillState, inputs: KillInputs, limits: KillLimits) -> str:
    """One line for an operator: why there is no kill, and what comes next."""
    ago = inputs.now - state.killed_at if state.killed_at is not None else 0.0
    left = _left(state, inputs.now, limits)
    texts = {
        "node_needs_reboot": f"{_sign(state)}; {ESCALATIONS['node_needs_reboot']}",
        "gpu_needs_reset": f"{_sign(state)}, which a restart does not repair; {ESCALATIONS['gpu_needs_reset']}",
        "restart_useless": f"killed {ago:.0f} s ago, next attempt in {left:.0f} s; {ESCALATIONS['restart_useless']}",
        "kill_interval": f"killed {ago:.0f} s ago, the next kill may come in {left:.0f} s",
        JITTER_HOLD: f"killed within {limits.jitter:.0f} s, so that replicas do not restart at once",
    }
    return texts[reason]


def _sign(state: KillState) -> str:
    """What shows that the GPU is broken."""
    return f"XID {state.xid}" if state.xid else "the driver's recovery action"


def _observe(state: KillState, inputs: KillInputs) -> KillState:
    """What a change of the verdict shows about the last kill, and about health."""
    has_started = inputs.state == "starting" and state.state != "starting"
    if has_started and state.killed_at is not None and not state.restarted:
        state = replace(state, restarted=True, standing=False)
    if _is_healthy(state, inputs):
        healthy_at = inputs.now if state.healthy_at is None else state.healthy_at
        return replace(state, healthy_at=healthy_at, standing=False)
    if inputs.state in UNHEALTHY_STATES:
        return replace(state, healthy_at=None, credited=0, unwell_at=inputs.now)
    return state


def _is_healthy(state: KillState, inputs: KillInputs) -> bool:
    """Healthy, and not only because no work comes: the engine did something since it was last unhealthy."""
    return inputs.state in HEALTHY_STATES and inputs.proof is not None and inputs.proof > state.unwell_at


def _count(state: KillState, inputs: KillInputs, limits: KillLimits) -> KillState:
    """Note when a stall begins, and count what health pays for and disproves."""
    if inputs.state == "stalled" and state.stalled_at is None:
        return replace(state, stalled_at=inputs.now)
    if state.healthy_at is None or not _is_healthy(state, inputs):
        return state
    healthy = inputs.now - state.healthy_at
    minutes, has_recovered = int(healthy / 60), healthy >= limits.recovery
    owed = 0 if has_recovered else max(0, state.owed - (minutes - state.credited))
    state = replace(state, owed=owed, credited=minutes)
    if healthy >= limits.healthy or (has_recovered and state.handover == "restart_useless"):
        state = replace(state, handover="")
    if has_recovered and not state.handover and inputs.now - state.xid_at >= limits.recovery:
        state = replace(state, xid=0)
    return state


def _escalate(state: KillState, inputs: KillInputs, limits: KillLimits) -> KillState:
    if inputs.resume:
        state = replace(state, handover="", xid=0, owed=0)
    if inputs.xid and (inputs.xid in NEEDS_REBOOT or state.xid not in NEEDS_REBOOT):
        state = replace(state, xid=inputs.xid, xid_at=inputs.now)
    if inputs.state not in ("stalled", "dead"):
        return state
    found = {
        "node_needs_reboot": state.xid in NEEDS_REBOOT or inputs.recovery == "node_needs_reboot",
        "gpu_needs_reset": state.xid in NEEDS_RESET or inputs.recovery == "gpu_needs_reset",
        "restart_useless": inputs.state == "stalled" and _are_restarts_useless(state, limits),
    }
    return replace(state, handover=next((name for name in ESCALATIONS if found[name] or state.handover == name), ""))


def _are_restarts_useless(state: KillState, limits: KillLimits) -> bool:
    return state.restarted and 0 < PRICE_MIN * limits.useless <= state.owed


def _kill(state: KillState, inputs: KillInputs) -> KillState:
    kills = tuple(kills_by_reason((*state.kills, (inputs.cause, 1))).items())
    owed = state.owed + PRICE_MIN
    return replace(state, kills=kills, owed=owed, killed_at=inputs.now, standing=True, restarted=False)


class KillPolicy:
    """The policy's state from tick to tick, and what holds a kill back now."""

    def __init__(self, limits: KillLimits) -> None:
        self.limits = limits
        self.state = KillState()
        self.hold: KillHold | None = None
        self.resume = False  # an operator resumed restarts; consumed by the next tick
        self._xids: dict[tuple[int, int], int] = {}
        self._overruled = ""  # the driver asked for it, and an operator resumed restarts all the same

    @property
    def reason(self) -> str:
        """What holds a kill back, where it becomes the reason of the verdict; empty otherwise."""
        return self.hold.reason if self.hold and self.hold.reason != JITTER_HOLD else ""

    def tick(
        self, state: State, proof: float | None, gpus: Reading[tuple[GpuSample, ...]], now: float, cause: str = ""
    ) -> None:
        """Decide, and keep the state for the next tick. `cause`: the reason of the verdict."""
        recovery = _recovery(gpus)
        if self.resume or recovery != self._overruled:
            self._overruled = recovery if self.resume else ""
        asked = "" if recovery == self._overruled else recovery
        inputs = KillInputs(now, state, proof, self._new_xid(gpus), self.resume, cause, asked)
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


def _recovery(gpus: Reading[tuple[GpuSample, ...]]) -> str:
    """What the driver asks for, of ESCALATIONS; "" for nothing."""
    faults = [gpu.faults for gpu in gpus.value] if isinstance(gpus, Value) else []
    actions = {found.value.recovery for found in faults if isinstance(found, Value)}
    return "node_needs_reboot" if actions & REBOOT_ACTIONS else "gpu_needs_reset" if actions & RESET_ACTIONS else ""
