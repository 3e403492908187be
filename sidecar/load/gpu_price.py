"""Pure: how many GPUs an engine has, and what their time costs.

The cost model counts milliseconds of the engine. In each of them all of its GPUs work for it, or wait for each other.
"""

from __future__ import annotations

from dataclasses import dataclass

from sidecar.flags import parse_gpu
from sidecar.readings import EngineIdentity, GpuSample, Reading, Value

MS_PER_SECOND, SECONDS_PER_HOUR = 1000, 3600


@dataclass(frozen=True, slots=True)
class GpuPrice:
    """The GPUs of one engine, the price of an hour of each (0: unknown), and the power that each draws now.

    A MIG slice counts as a GPU; NVML does not report its power.
    """

    gpus: int = 1
    dollars_per_gpu_hour: float = 0.0
    watts: float | None = None

    def gpu_seconds(self, engine_ms: float) -> float:
        """GPU seconds of some milliseconds of the engine."""
        return engine_ms / MS_PER_SECOND * self.gpus

    def dollars(self, gpu_seconds: float) -> float:
        return gpu_seconds / SECONDS_PER_HOUR * self.dollars_per_gpu_hour

    def joules(self, gpu_seconds: float) -> float | None:
        return None if self.watts is None else gpu_seconds * self.watts


@dataclass(frozen=True, slots=True)
class GpuCount:
    """The number of GPUs and its source; "" if unknown, in which case one is assumed."""

    gpus: int = 1
    source: str = ""


def mean_watts(seen: Reading[tuple[GpuSample, ...]]) -> float | None:
    """The mean power of a GPU in the last second; None where NVML has none."""
    powers = [gpu.power.value for gpu in seen.value if isinstance(gpu.power, Value)] if isinstance(seen, Value) else []
    return sum(powers) / len(powers) if powers else None


def count_gpus(
    chosen: int, named: str, identity: EngineIdentity, ranks: int, seen: Reading[tuple[GpuSample, ...]]
) -> GpuCount:
    """The GPUs of an engine: as configured, else as reported by the engine, else as many as are visible.

    `chosen`: --gpus; `named`: --gpu, which counts with a number; `ranks`: the engine's data-parallel ranks, each of
    which has at least one GPU. A single rank does not show its number of GPUs.
    """
    stated = parse_gpu(named)[0] if named[:1].isdigit() else 0
    visible = len(seen.value) if isinstance(seen, Value) else 0
    by_sight = ("ranks", ranks) if ranks > max(1, visible) else ("NVML", visible)
    sources = ("--gpus", chosen), ("--gpu", stated), ("engine", identity.gpu_count), by_sight
    return next((GpuCount(count, source) for source, count in sources if count), GpuCount())
