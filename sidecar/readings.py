"""What was measured: a reading is a value, absent with a reason, or failed with an error; never a bare 0.

Rules: records only; times are seconds on the machine's monotonic clock; units stand beside each field.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Generic, TypeVar

T = TypeVar("T")

# What makes a GPU slower than its load would have it; idleness and chosen clocks do not.
SLOWDOWNS: Final = ("power_cap", "hardware", "thermal_software", "thermal_hardware", "power_brake")


@dataclass(frozen=True, slots=True)
class Value(Generic[T]):
    """A signal that was read at `at`; `seconds` is what the reading cost."""

    value: T
    at: float
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Absent:
    """A signal that does not exist here (no GPU, an engine without metrics). Not an error."""

    reason: str


@dataclass(frozen=True, slots=True)
class Failed:
    """A signal that should be there and could not be read. Differs from absent, and never counts as 0."""

    error: str


Reading = Value[T] | Absent | Failed
_NOT_READ: Final = Absent("not read")


@dataclass(frozen=True, slots=True)
class RankSample:
    """One data-parallel rank's own numbers; None where they are not broken down by rank."""

    rank: int
    running: float | None = None
    waiting: float | None = None
    generation_tokens: float | None = None  # a counter


@dataclass(frozen=True, slots=True)
class EngineSample:
    """The engine's own numbers from its metrics page; None where its page has no such series."""

    running: float | None = None
    waiting: float | None = None
    kv_usage: float | None = None  # share 0..1
    prompt_tokens: float | None = None  # counters below
    generation_tokens: float | None = None
    finished: float | None = None
    iterations: float | None = None
    started_wall: float | None = None  # process_start_time_seconds
    sleeping: bool | None = None
    kv_capacity_tokens: float | None = None  # tokens that the KV cache of one rank holds
    ranks: tuple[RankSample, ...] = ()  # by rank; empty where the page tells no ranks apart
    tokens_at_end: bool = False  # generation_tokens moves only when a request ends

    @property
    def working(self) -> float | None:
        """A counter that moves while it generates: tokens, or steps where tokens are counted at a request's end."""
        return self.iterations if self.tokens_at_end else self.generation_tokens


@dataclass(frozen=True, slots=True)
class EngineIdentity:
    """What the engine says of itself: its model names, version and settings (`name=value`); and the GPUs that NVML sees, with the
    reasons why any of them is slowed down. Empty where unknown.

    `prepared`: nothing that it says of itself speaks against sending it prepared images.
    """

    models: tuple[str, ...] = ()
    engine: str = ""
    gpus: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    slowdowns: tuple[str, ...] = ()
    prepared: bool = True


@dataclass(frozen=True, slots=True)
class GpuSample:
    """One GPU through NVML. Each number is a reading of its own: MIG and lost GPUs answer some and not others."""

    index: int
    name: str
    uuid: str
    utilization: Reading[float]  # share of time 0..1 in which a kernel ran
    memory_used: Reading[int]  # bytes
    memory_total: Reading[int]  # bytes
    power: Reading[float]  # watts
    temperature: Reading[float]  # degrees Celsius
    xid_errors: tuple[tuple[int, int], ...] = ()  # (xid, count) since start
    mig: int | None = None  # the place of a MIG slice in its GPU
    energy: Reading[float] = _NOT_READ  # joules since the driver was loaded
    sm_clock: Reading[int] = _NOT_READ  # hertz
    slowdowns: Reading[tuple[str, ...]] = _NOT_READ  # why its clocks are lower than they could be
    processes: Reading[int] = _NOT_READ  # that compute on it

    @property
    def label(self) -> str:
        """Tells it from its neighbours: 0, or 0:2 for the third slice of GPU 0."""
        return str(self.index) if self.mig is None else f"{self.index}:{self.mig}"


@dataclass(frozen=True, slots=True)
class ProcessSample:
    """One process through psutil: resident bytes, CPU seconds used so far, threads."""

    pid: int
    rss: int
    cpu_seconds: float
    threads: int
