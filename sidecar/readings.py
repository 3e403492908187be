"""Measurements: a reading is a value, absent with a reason, or failed with an error; never a bare 0.

Rules: records only. Times are seconds on the machine's monotonic clock. Each field states its unit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Generic, TypeVar

T = TypeVar("T")

# Reasons for clocks below what the load calls for; idleness and configured clocks are not among them.
SLOWDOWNS: Final = ("power_cap", "hardware", "thermal_software", "thermal_hardware", "power_brake")
# What a GPU needs, in the order of nvmlDeviceGpuRecoveryAction_t.
RECOVERY_ACTIONS: Final = (
    "none",
    "gpu_reset",
    "node_reboot",
    "drain_p2p",
    "drain_and_reset",
    "recover_imex_domain",
    "bus_reset",
    "system_reboot",
)
# Those of a GPU on which nothing can be computed; a drained one works on until it is reset.
RESET_ACTIONS: Final = frozenset({"gpu_reset", "bus_reset"})
REBOOT_ACTIONS: Final = frozenset({"node_reboot", "system_reboot"})
# Severities of GPU Operational Events that are counted.
EVENT_SEVERITIES: Final = ("recoverable", "fatal")


@dataclass(frozen=True, slots=True)
class Value(Generic[T]):
    """A signal that was read at `at`; reading it took `seconds`."""

    value: T
    at: float
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Absent:
    """A signal that does not exist here (no GPU, an engine without metrics). Not an error."""

    reason: str


@dataclass(frozen=True, slots=True)
class Failed:
    """A signal that should exist and could not be read. Not the same as absent, and never counted as 0."""

    error: str


Reading = Value[T] | Absent | Failed
_NOT_READ: Final = Absent("not read")


@dataclass(frozen=True, slots=True)
class RankSample:
    """One data-parallel rank's numbers; None if the page does not break them down by rank."""

    rank: int
    running: float | None = None
    waiting: float | None = None
    generation_tokens: float | None = None  # a counter


@dataclass(frozen=True, slots=True)
class EngineSample:
    """The engine's numbers from its metrics page; None if the page has no such series."""

    running: float | None = None
    waiting: float | None = None
    kv_usage: float | None = None  # share 0..1
    prompt_tokens: float | None = None  # counters below
    generation_tokens: float | None = None
    finished: float | None = None
    iterations: float | None = None
    started_wall: float | None = None  # process_start_time_seconds
    sleeping: bool | None = None
    kv_capacity_tokens: float | None = None  # of one rank
    ranks: tuple[RankSample, ...] = ()  # by rank; empty if the page does not separate ranks
    tokens_at_end: bool = False  # generation_tokens moves only when a request ends
    cached_tokens: float | None = None  # counter: prompt tokens found in the cache
    cache_queries: float | None = None  # counter: prompt tokens looked up in the cache

    @property
    def working(self) -> float | None:
        """A counter that moves while it generates: tokens, or steps where tokens are counted at a request's end."""
        return self.iterations if self.tokens_at_end else self.generation_tokens

    @property
    def cache_lookups(self) -> float | None:
        """A counter: tokens of prompts that were looked up in the cache. Where no series of the page counts them,
        `prompt_tokens` are those that were computed, as llama.cpp's are.
        """
        if self.cache_queries is not None or self.cached_tokens is None or self.prompt_tokens is None:
            return self.cache_queries
        return self.prompt_tokens + self.cached_tokens

    def cached_share(self, earlier: EngineSample) -> float | None:
        """The share of prompt tokens since `earlier` that came from the cache; None if the page does not report it.

        0 if there were no lookups, as without a cache.
        """
        if self.cached_tokens is None or self.cache_lookups is None:
            return None
        hits = self.cached_tokens - (earlier.cached_tokens or 0.0)
        lookups = self.cache_lookups - (earlier.cache_lookups or 0.0)
        if hits < 0 or lookups < 0:
            return None  # counters of another process
        return min(1.0, hits / lookups) if lookups else 0.0


@dataclass(frozen=True, slots=True)
class EngineIdentity:
    """The engine's model names, version and settings (`name=value`), and the GPUs that NVML sees. Empty if unknown.

    `slowdowns` are the reasons why any of the GPUs runs below its clocks.
    `prepared` is False if the engine says that it does not take prepared images.
    `max_context` is the longest sequence in tokens, `slots` how many sequences it computes at once, `gpu_count` how
    many GPUs it reports to use; 0 if unknown.
    """

    models: tuple[str, ...] = ()
    engine: str = ""
    gpus: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    slowdowns: tuple[str, ...] = ()
    prepared: bool = True
    max_context: int = 0
    slots: int = 0
    gpu_count: int = 0


@dataclass(frozen=True, slots=True)
class GpuActivity:
    """What a GPU did between two looks, by GPM; None where it does not report a metric.

    `tensor`: share of time 0..1 in which tensor cores worked; `dram`: share of the memory bandwidth that was used;
    `nvlink`: bytes a second over all links, both ways.
    """

    tensor: float | None = None
    dram: float | None = None
    nvlink: float | None = None


@dataclass(frozen=True, slots=True)
class GpuFaults:
    """What the driver says of a GPU's state; None where it does not.

    `recovery`: what it needs, one of RECOVERY_ACTIONS; `ecc_uncorrected`: errors since the driver was loaded;
    `remap_pending`: rows of memory are remapped at its next reset; `remap_failed`: a row could not be remapped.
    """

    recovery: str | None = None
    ecc_uncorrected: int | None = None
    remap_pending: bool | None = None
    remap_failed: bool | None = None


@dataclass(frozen=True, slots=True)
class GpuSample:
    """One GPU, read through NVML. Each number is its own reading, as MIG slices and lost GPUs provide only some."""

    index: int
    name: str
    uuid: str
    utilization: Reading[float]  # share of time 0..1 in which a kernel ran
    memory_used: Reading[int]  # bytes
    memory_total: Reading[int]  # bytes
    power: Reading[float]  # watts
    temperature: Reading[float]  # degrees Celsius
    xid_errors: tuple[tuple[int, int], ...] = ()  # (xid, count) since start
    mig: int | None = None  # index of a MIG slice in its GPU
    energy: Reading[float] = _NOT_READ  # joules since the driver was loaded
    sm_clock: Reading[int] = _NOT_READ  # hertz
    slowdowns: Reading[tuple[str, ...]] = _NOT_READ  # why its clocks are reduced
    processes: Reading[int] = _NOT_READ  # compute processes
    xids_watched: bool = False  # whether the driver reports its XID errors: without, no count is no 0
    activity: Reading[GpuActivity] = _NOT_READ
    faults: Reading[GpuFaults] = _NOT_READ
    events: tuple[tuple[str, int], ...] = ()  # (severity, count) of GPU Operational Events since start

    @property
    def label(self) -> str:
        """The GPU's name in metrics: 0, or 0:2 for the third slice of GPU 0."""
        return str(self.index) if self.mig is None else f"{self.index}:{self.mig}"


@dataclass(frozen=True, slots=True)
class HangSigns:
    """What the engine's processes did over `seconds`, in looks that followed each other without a gap.

    None: it cannot be read here. A flag is that of any core, worker or front end in the last look. `cpu`: of all
    processes, "none", "some" or "busy"; `wait`: what they wait for ("lock", "device", "disk",
    "network"); `frames`: what their Python stacks are in ("compiler", "transfer", "collective"); `same_stacks`: their
    main threads stayed where they were; `memory`: "none", "pressure" or "oom"; `where`: the process that shows most.
    Of the GPUs, by health/gpu_signs.py: `gpu_power` ("idle", "busy"), `gpu_activity` ("idle", "busy", "working") and
    `gpu_fault` ("xid", "recovery", "event").
    """

    seconds: float
    lost: bool = False  # an inner process ended
    debugged: bool = False
    frozen: bool | None = None
    stopped: bool = False
    compilers: tuple[str, ...] = ()
    cpu: str | None = None
    wait: str | None = None
    frames: str | None = None
    same_stacks: bool | None = None
    memory: str | None = None
    gpu_power: str | None = None
    gpu_activity: str | None = None
    gpu_fault: str | None = None
    where: str = ""


@dataclass(frozen=True, slots=True)
class CoreSteps:
    """What the plug-in in an engine core says: its steps so far, the tokens that they scheduled, its queue.

    `at`: monotonic seconds when the last step began; `last_tokens`: that it scheduled.
    """

    pid: int
    steps: int
    tokens: int
    last_tokens: int
    running: int
    waiting: int
    at: float


@dataclass(frozen=True, slots=True)
class ProcessSample:
    """One process: resident bytes, CPU seconds used so far, threads, open files and how many it may have open."""

    pid: int
    rss: int
    cpu_seconds: float
    threads: int
    open_files: int = 0
    max_files: int = 0
