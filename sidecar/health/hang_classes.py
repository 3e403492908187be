"""Pure: which hang it is, from a literal table: the first row of HANG_CLASSES whose signs are all there names it.

Rules:
- A cell that is None does not matter. A sign that cannot be read matches no cell that asks for it.
- `proves`: these signs are never those of a healthy engine with work, so that a kill need not wait any longer. Without
  a proof everything stays as it is.
- `waits`: with CPU time used, these signs are those of work that may take minutes, so that a kill waits up to the cap.
- Compilers, disks, transfers, memory pressure and waits for the GPU end by themselves: they prove nothing. Who debugs
  or freezes an engine does so on purpose.
- A wait for the GPU and a collective that spins are proved by the GPU's signs only (gpu_signs.py). GPUs without work
  prove nothing alone, because a compiler looks the same; GPUs that work prove the contrary: no kill before the cap.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final

from sidecar.readings import HangSigns

# What the engine's processes do is looked at so often while the engine is suspect.
LOOK_INTERVAL_S: Final = 3.0
# After so long in one doubt it is looked at more seldom: by then silence alone has decided.
LONG_DOUBT_S: Final = 180.0
SELDOM_INTERVAL_S: Final = 60.0
# A look that is later than this after the one before begins a new series: what happened between is unknown.
MAX_LOOK_GAP_S: Final = 3 * LOOK_INTERVAL_S
# A series proves nothing before it has lasted so long: five looks.
MIN_PROOF_S: Final = 12.0
# A proof that is older than this is none.
MAX_PROOF_AGE_S: Final = 2 * LOOK_INTERVAL_S
# A compiler that was seen is waited for until it should have been seen again: the looks become seldom.
MAX_WORK_AGE_S: Final = SELDOM_INTERVAL_S + MAX_LOOK_GAP_S

Cell = str | bool | None


@dataclass(frozen=True, slots=True)
class HangClass:
    """One row: signs by the names of HangSigns. `compilers`: whether any runs."""

    name: str
    text: str
    proves: bool = False
    waits: bool = False
    lost: Cell = None
    debugged: Cell = None
    frozen: Cell = None
    stopped: Cell = None
    compilers: Cell = None
    cpu: Cell = None
    wait: Cell = None
    frames: Cell = None
    same_stacks: Cell = None
    memory: Cell = None
    gpu_power: Cell = None
    gpu_activity: Cell = None
    gpu_fault: Cell = None

    @property
    def is_of_gpu(self) -> bool:
        """Whether the signs of the GPUs make it this class."""
        return any(getattr(self, name) is not None for name in _GPU_SIGNS)

    @property
    def is_of_processes(self) -> bool:
        """Whether signs of the processes are among them."""
        return any(getattr(self, name) is not None for name in _SIGNS if name not in _GPU_SIGNS)


HANG_CLASSES: Final[tuple[HangClass, ...]] = (
    HangClass("debugger", "a debugger or profiler has stopped a process of the engine; it goes on when that lets it",
              debugged=True),
    HangClass("frozen", "the engine's control group is frozen; it goes on when that is thawed",
              frozen=True),
    HangClass("compiling", "a compiler runs among the engine's processes: it may take minutes and ends by itself",
              waits=True, compilers=True),
    HangClass("compiling", "the engine compiles kernels: it may take minutes and ends by itself",
              waits=True, frames="compiler"),
    HangClass("memory_pressure", "a process was killed for want of memory (OOM); raise the container's memory limit",
              memory="oom"),
    HangClass("memory_pressure", "the machine or container is short of memory, and processes wait for pages",
              memory="pressure"),
    HangClass("lost_worker", "a process of the engine has ended, and the others wait for it", proves=True,
              lost=True, cpu="none"),
    HangClass("stopped", "a process of the engine is stopped by a signal; SIGCONT resumes it", proves=True,
              stopped=True, cpu="none"),
    HangClass("gpu_fault", "the GPU ended the engine's work with an XID error; see the node's kernel log", proves=True,
              gpu_fault="xid"),
    HangClass("gpu_fault", "the driver wants the GPU reset; drain the node", proves=True,
              gpu_fault="recovery"),
    HangClass("gpu_fault", "the driver reports a fatal event of the GPU; see the node's kernel log", proves=True,
              gpu_fault="event"),
    HangClass("gpu_working", "the GPUs compute: tensor cores, memory or links move",
              gpu_activity="working"),
    HangClass("gpu_spin", "the GPUs are all busy at low power, while the engine's own code goes on",
              same_stacks=False, gpu_activity="busy", gpu_power="idle"),
    HangClass("collective_spin", "the GPUs are all busy at low power: a collective operation spins", proves=True,
              gpu_activity="busy", gpu_power="idle"),
    HangClass("collective_spin", "a collective operation spins: another rank or GPU does not come; see the ranks' logs",
              frames="collective", same_stacks=True),
    HangClass("network_wait", "the engine waits for another machine (a KV transfer, a store, a peer)",
              cpu="none", frames="transfer"),
    HangClass("network_wait", "the engine waits for another machine (a KV transfer, a store, a peer)",
              cpu="none", wait="network"),
    HangClass("device_wait", "the engine waits for a GPU that does nothing: a kernel's launch is lost", proves=True,
              cpu="none", wait="device", gpu_activity="idle", gpu_power="idle"),
    HangClass("device_wait", "the engine waits for its GPU",
              cpu="none", wait="device"),
    HangClass("device_wait", "the engine waits for a driver or a disk",
              cpu="none", wait="disk"),
    HangClass("host_lock", "all threads of the engine wait for each other: a lock is never released", proves=True,
              cpu="none", wait="lock", same_stacks=True),
    HangClass("gpu_idle", "the GPUs do nothing: a lost launch, a lock or a compiler, in processes that cannot be read",
              gpu_activity="idle", gpu_power="idle"),
)  # fmt: skip

_GPU_SIGNS: Final = ("gpu_power", "gpu_activity", "gpu_fault")
_SIGNS: Final = tuple(
    field.name for field in fields(HangClass) if field.name not in ("name", "text", "proves", "waits")
)
NO_CLASS: Final = HangClass("", "")


def hang_class(signs: HangSigns) -> HangClass:
    """The row that these signs match; NO_CLASS for none."""
    return next((row for row in HANG_CLASSES if _matches(row, signs)), NO_CLASS)


def is_proof(signs: HangSigns, age: float) -> bool:
    """Whether these signs, read `age` seconds ago, prove that the engine hangs.

    Those of the GPUs have lasted long enough when they are given.
    """
    found = hang_class(signs)
    has_lasted = signs.seconds >= MIN_PROOF_S or not found.is_of_processes
    return found.proves and has_lasted and age <= MAX_PROOF_AGE_S


def is_work(signs: HangSigns) -> bool:
    """Whether these signs are those of work that ends by itself, however long it takes."""
    return hang_class(signs).waits and signs.cpu in ("some", "busy")


def _matches(row: HangClass, signs: HangSigns) -> bool:
    wanted = ((name, cell) for name in _SIGNS if (cell := getattr(row, name)) is not None)
    return all(_seen(signs, name) == cell for name, cell in wanted)


def _seen(signs: HangSigns, name: str) -> Cell:
    return bool(signs.compilers) if name == "compilers" else getattr(signs, name)
