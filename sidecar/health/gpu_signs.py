"""Pure: what the GPUs show of a hang: power against the level that this engine taught, activity, faults.

Rules:
- A sign is that of all GPUs of the engine, for MIN_PROOF_S without a break. A number that one of them does not give
  (MIG, an old driver) leaves the sign out, and so does a GPU on another node: what spins here may wait for a compiler
  there. One GPU at work is enough for "working".
- Power is low if it is under half of what the GPU draws in nearly all of the time in which the engine delivers. Where
  it idles at more than that, or has not served for a minute, power says nothing; neither does it while heat or the
  power supply slows the clocks.
- Activity is the share of time in which a kernel ran, which a collective that waits fills, too. Tensor cores, memory
  and links (GPM, from Hopper on) move only while something is computed or copied: then the engine works.
- A fault is an XID that ends a process's context and came in this silence or just before, a GPU that the driver wants
  reset, or a fatal GPU Operational Event.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from sidecar.health.hang_classes import MAX_PROOF_AGE_S, MIN_PROOF_S
from sidecar.health.kill_policy import NEEDS_REBOOT, NEEDS_RESET
from sidecar.readings import REBOOT_ACTIONS, RESET_ACTIONS, GpuSample, Reading, Value

# The level is what a GPU exceeds in nine tenths of the seconds in which the engine delivers.
LEVEL_SAMPLES: Final = 600
MIN_LEVEL_SAMPLES: Final = 60
LEVEL_SHARE: Final = 0.1
MAX_GPUS: Final = 64
# Shares of that level below which a GPU has nothing to do, and from which it works.
IDLE_POWER: Final = 0.5
BUSY_POWER: Final = 0.8
# Shares of time in which kernels run.
IDLE_UTILIZATION: Final = 0.02
BUSY_UTILIZATION: Final = 0.95
# Above what polling and the sidecar's own kernels do.
WORKING_TENSOR: Final = 0.005
WORKING_DRAM: Final = 0.05
WORKING_NVLINK: Final = 100e6  # bytes a second
# Reasons for reduced clocks with which power follows no load.
_UNLOADED: Final = frozenset({"hardware", "thermal_software", "thermal_hardware", "power_brake"})
# A graphics exception, a page fault, a channel that was stopped, an uncorrectable ECC error, a class error and a
# contained ECC error, after which NVIDIA's catalogue has the application restarted; and those that need a reset.
FATAL_XIDS: Final = frozenset({13, 31, 43, 48, 69, 94}) | NEEDS_RESET | NEEDS_REBOOT
# A fault comes before the silence that it causes.
FAULT_LEAD_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class GpuLook:
    """The signs of all GPUs now; None: unknown, or not for long enough."""

    power: str | None = None
    activity: str | None = None
    fault: str | None = None


NO_GPU_SIGNS: Final = GpuLook()


@dataclass(slots=True)
class _SteadySign:
    """A sign, and since when it is what it is."""

    value: str | None = None
    since: float = 0.0

    def see(self, value: str | None, at: float) -> None:
        if value != self.value:
            self.value, self.since = value, at

    def lasting(self, now: float) -> str | None:
        return self.value if now - self.since >= MIN_PROOF_S else None


@dataclass(slots=True)
class GpuSigns:
    """The signs from one reading to the next. `teach` while the engine delivers; `read` at each tick.

    `engine_gpus`: how many the engine has, on all nodes; 0: those that are seen.
    """

    engine_gpus: int = 0
    _levels: dict[str, deque[float]] = field(default_factory=dict)  # watts by UUID
    _power: _SteadySign = field(default_factory=_SteadySign)
    _activity: _SteadySign = field(default_factory=_SteadySign)
    _worked_at: float | None = None
    _taught_at: float = 0.0
    _read_at: float | None = None
    _faults: dict[tuple[int, str], int] = field(default_factory=dict)  # counts by GPU and kind
    _fault: tuple[float, str] | None = None  # the last one that came, and when

    def teach(self, gpus: Reading[tuple[GpuSample, ...]]) -> None:
        """The engine delivers: what each GPU draws is its level at work."""
        if not isinstance(gpus, Value) or gpus.at <= self._taught_at:
            return
        self._taught_at = gpus.at
        for gpu in gpus.value:
            if isinstance(gpu.power, Value) and (gpu.uuid in self._levels or len(self._levels) < MAX_GPUS):
                self._levels.setdefault(gpu.uuid, deque(maxlen=LEVEL_SAMPLES)).append(gpu.power.value)

    def read(self, gpus: Reading[tuple[GpuSample, ...]], now: float, silent_since: float | None) -> GpuLook:
        """The signs at `now`. `silent_since`: when the engine last did anything, None while it works."""
        if not isinstance(gpus, Value) or now - gpus.at > MAX_PROOF_AGE_S or not gpus.value:
            self._power.see(None, now)
            self._activity.see(None, now)
            return GpuLook(fault=self._fault_since(silent_since))
        if gpus.at != self._read_at:
            self._take(gpus.value, gpus.at, gap=self._read_at is None or gpus.at - self._read_at > MAX_PROOF_AGE_S)
        is_working = self._worked_at is not None and now - self._worked_at < MIN_PROOF_S
        fault = self._fault_since(silent_since) or ("recovery" if any(map(_needs_recovery, gpus.value)) else None)
        return GpuLook(
            self._power.lasting(gpus.at), "working" if is_working else self._activity.lasting(gpus.at), fault
        )

    def level(self, uuid: str) -> float | None:
        """What a GPU draws at work at least, in watts; None until it is known."""
        seen = self._levels.get(uuid, ())
        if len(seen) < MIN_LEVEL_SAMPLES:
            return None
        return sorted(seen)[int(LEVEL_SHARE * len(seen))]

    def _take(self, gpus: tuple[GpuSample, ...], at: float, *, gap: bool) -> None:
        self._count_faults(gpus, at, first=self._read_at is None)
        self._read_at = at
        if gap:  # what happened meanwhile is unknown
            self._power, self._activity = _SteadySign(), _SteadySign()
        sees_all = len(gpus) >= self.engine_gpus
        self._power.see(_common(self._power_of, gpus) if sees_all else None, at)
        self._activity.see(_common(_activity_of, gpus) if sees_all else None, at)
        if any(map(_is_working, gpus)):
            self._worked_at = at

    def _power_of(self, gpu: GpuSample) -> str | None:
        level = self.level(gpu.uuid)
        if level is None or not isinstance(gpu.power, Value) or not isinstance(gpu.slowdowns, Value):
            return None
        if _UNLOADED.intersection(gpu.slowdowns.value):
            return None
        share = gpu.power.value / level if level else 1.0
        return "idle" if share < IDLE_POWER else "busy" if share >= BUSY_POWER else None

    def _count_faults(self, gpus: tuple[GpuSample, ...], at: float, *, first: bool) -> None:
        """Note what is new. What was counted before the first reading is of an earlier time."""
        for gpu in gpus:
            xids = sum(count for xid, count in gpu.xid_errors if xid in FATAL_XIDS)
            for kind, count in (("xid", xids), ("event", dict(gpu.events).get("fatal", 0))):
                if count > self._faults.get((gpu.index, kind), 0) and not first:
                    self._fault = (at, kind)
                self._faults[gpu.index, kind] = count

    def _fault_since(self, silent_since: float | None) -> str | None:
        if self._fault is None or silent_since is None or self._fault[0] < silent_since - FAULT_LEAD_S:
            return None
        return self._fault[1]


def _common(of: Callable[[GpuSample], str | None], gpus: tuple[GpuSample, ...]) -> str | None:
    """The sign that all GPUs have."""
    found = {of(gpu) for gpu in gpus}
    return found.pop() if len(found) == 1 else None


def _activity_of(gpu: GpuSample) -> str | None:
    if not isinstance(gpu.utilization, Value):
        return None
    share = gpu.utilization.value
    return "idle" if share <= IDLE_UTILIZATION else "busy" if share >= BUSY_UTILIZATION else None


def _is_working(gpu: GpuSample) -> bool:
    """Whether GPM shows that something is computed or copied."""
    if not isinstance(gpu.activity, Value):
        return False
    seen = gpu.activity.value
    floors = (seen.tensor, WORKING_TENSOR), (seen.dram, WORKING_DRAM), (seen.nvlink, WORKING_NVLINK)
    return any(value is not None and value >= floor for value, floor in floors)


def _needs_recovery(gpu: GpuSample) -> bool:
    """Whether the driver says that nothing can be computed on it before a reset or a reboot."""
    return isinstance(gpu.faults, Value) and gpu.faults.value.recovery in RESET_ACTIONS | REBOOT_ACTIONS
