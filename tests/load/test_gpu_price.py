"""GPU seconds and dollars are those of all GPUs of the engine, whatever the source of their number."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sidecar.load import cost_model
from sidecar.load.gpu_price import GpuCount, GpuPrice, count_gpus, mean_watts
from sidecar.readings import Absent, EngineIdentity, Failed, GpuSample, Reading, Value

from ..report.snapshots import GPU

EIGHT: Reading[tuple[GpuSample, ...]] = Value(tuple(replace(GPU, index=n) for n in range(8)), 1.0)
NONE: Reading[tuple[GpuSample, ...]] = Absent("no NVIDIA driver library")


def test_an_hour_at_full_flow_costs_every_gpu() -> None:
    """Eight H100 at $2.50 are $20 an hour."""
    co = cost_model.Coefficients()
    price = GpuPrice(8, 2.5)
    engine_ms = 60 * cost_model.max_mu_per_minute(co) * cost_model.unit_ms(co)
    assert price.gpu_seconds(engine_ms) == pytest.approx(8 * 3600)
    assert price.dollars(price.gpu_seconds(engine_ms)) == pytest.approx(20.0)


@pytest.mark.parametrize(
    ("chosen", "named", "stated", "ranks", "seen", "found"),
    [
        (4, "2xH100", 2, 0, EIGHT, GpuCount(4, "--gpus")),
        (0, "2xH100", 8, 0, EIGHT, GpuCount(2, "--gpu")),
        (0, "H100", 4, 0, EIGHT, GpuCount(4, "engine")),
        (0, "", 0, 0, EIGHT, GpuCount(8, "NVML")),
        (0, "", 0, 2, EIGHT, GpuCount(8, "NVML")),
        (0, "", 0, 2, NONE, GpuCount(2, "ranks")),
        (0, "", 0, 1, NONE, GpuCount(1, "")),
        (0, "", 0, 0, NONE, GpuCount(1, "")),
        (0, "", 0, 0, Failed("lost"), GpuCount(1, "")),
    ],
)
def test_the_source_of_the_count(
    chosen: int, named: str, stated: int, ranks: int, seen: Reading[tuple[GpuSample, ...]], found: GpuCount
) -> None:
    """An operator, else the engine, else what can be seen: GPUs, and ranks where no GPU can be."""
    assert count_gpus(chosen, named, EngineIdentity(gpu_count=stated), ranks, seen) == found


def test_the_power_of_a_gpu_is_the_mean() -> None:
    """Of GPUs that report power; a slice reports none, and without GPUs power is unknown, not 0."""
    low, sliced = replace(GPU, power=Value(100.0, 1.0)), replace(GPU, power=Absent("MIG"))
    assert mean_watts(Value((GPU, low, sliced), 1.0)) == (640.5 + 100.0) / 2
    assert mean_watts(Value((sliced,), 1.0)) is None and mean_watts(NONE) is None
