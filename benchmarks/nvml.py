"""What each NVML call and a round of the sidecar's GPU signal cost on this machine: median and 99th percentile.

    python benchmarks/nvml.py [--rounds 300] [--lists 10] [--write]

Calls alternate within each round, for each GPU. `batch` is one nvmlDeviceGetFieldValues of the fields that the
signal reads, next to the single calls that it replaces. Lists of processes lock the driver, so they are
asked `--lists` times only, a tenth of a second apart. Figures of a scripted driver library are printed, and never
written.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pynvml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that a checkout is enough

from sidecar.signals.gpu.sample import BATCH_FIELDS, SM_CLOCK, GpuDevice, GpuSampler, find_devices

STUB_GPU_NAME: Final = "Stub GPU"
# Between two rounds of the signal.
SIGNAL_INTERVAL_S: Final = 1.0


def calls(device: GpuDevice) -> dict[str, Callable[[], Any]]:
    """The timed calls by name."""
    sampler = GpuSampler(pynvml, lambda call, *args: call(*args), lambda _: (), lambda _: False, lambda _: ())
    handle, whole = device.handle, device.whole
    return {
        "nvmlDeviceGetUtilizationRates": lambda: pynvml.nvmlDeviceGetUtilizationRates(handle),
        "nvmlDeviceGetMemoryInfo": lambda: pynvml.nvmlDeviceGetMemoryInfo(handle),
        "nvmlDeviceGetPowerUsage": lambda: pynvml.nvmlDeviceGetPowerUsage(handle),
        "nvmlDeviceGetTotalEnergyConsumption": lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle),
        f"batch of {len(BATCH_FIELDS)} fields": lambda: pynvml.nvmlDeviceGetFieldValues(handle, BATCH_FIELDS),
        "nvmlDeviceGetTemperature": lambda: pynvml.nvmlDeviceGetTemperature(whole, pynvml.NVML_TEMPERATURE_GPU),
        "nvmlDeviceGetClockInfo": lambda: pynvml.nvmlDeviceGetClockInfo(whole, SM_CLOCK),
        "nvmlDeviceGetCurrentClocksThrottleReasons": lambda: pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(whole),
        "one whole sample": lambda: sampler.sample(device, 0.0, False),
        "one whole sample in doubt": lambda: sampler.sample(device, time.monotonic(), True),
    }


def timed(call: Callable[[], Any]) -> float | None:
    """Microseconds of one call; None if this GPU does not have it."""
    began = time.perf_counter()
    try:
        call()
    except pynvml.NVMLError:
        return None
    return (time.perf_counter() - began) * 1e6


def measure(device: GpuDevice, rounds: int, lists: int) -> dict[str, list[float]]:
    """Microseconds by call, in interleaved rounds; a call that the GPU does not have has none."""
    every = calls(device)
    took: dict[str, list[float]] = {name: [] for name in every}
    for round_ in range(rounds + 1):
        for name, call in every.items():
            one = timed(call)
            if round_ and one is not None:  # the first round wakes the driver
                took[name].append(one)
        print(f"\rGPU {device.index}: round {round_} of {rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    took["nvmlDeviceGetComputeRunningProcesses"] = []
    for _ in range(lists):
        time.sleep(0.1)
        one = timed(lambda: pynvml.nvmlDeviceGetComputeRunningProcesses(device.handle))
        took["nvmlDeviceGetComputeRunningProcesses"] += [] if one is None else [one]
    return took


def table(device: GpuDevice, took: dict[str, list[float]]) -> str:
    """One GPU's figures as Markdown."""
    lines = [f"### GPU {device.index}: {device.name}", "", "| call | median µs | p99 µs | n |", "|---|---|---|---|"]
    for name, values in took.items():
        if len(values) < 2:
            lines.append(f"| {name} | not on this GPU | | {len(values)} |")
            continue
        p99 = statistics.quantiles(values, n=100, method="inclusive")[98]
        lines.append(f"| {name} | {statistics.median(values):.1f} | {p99:.1f} | {len(values)} |")
    whole = statistics.median(took["one whole sample"]) / 1e6
    lines += ["", f"One sample a second: {whole / SIGNAL_INTERVAL_S:.4%} of a core.", ""]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--lists", type=int, default=10)
    parser.add_argument("--write", action="store_true")
    chosen = parser.parse_args()
    try:
        began = time.perf_counter()
        pynvml.nvmlInit()
    except pynvml.NVMLError as e:
        print(f"NVML does not start: {e}. This needs an NVIDIA GPU and its driver.", file=sys.stderr)
        return 1
    init = time.perf_counter() - began
    indexes = range(pynvml.nvmlDeviceGetCount())
    every = [d for i in indexes for d in find_devices(pynvml, lambda call, *args: call(*args), i)]
    if not every or all(device.error for device in every):
        print("NVML starts, but no GPU responds.", file=sys.stderr)
        return 1
    head = f"NVML {time.strftime('%Y-%m-%d')}, driver {driver()}; nvmlInit {init * 1e3:.1f} ms"
    text = "\n".join([f"# {head}", "", f"`benchmarks/nvml.py --rounds {chosen.rounds}`", ""])
    text += "\n".join(table(d, measure(d, chosen.rounds, chosen.lists)) for d in every if d.error is None)
    print(text)
    if chosen.write and any(device.name.startswith(STUB_GPU_NAME) for device in every):
        print("a scripted driver library: nothing is written", file=sys.stderr)
        return 1
    if chosen.write:
        name = re.sub("[^a-z0-9]+", "-", every[0].name.lower()).strip("-")
        (Path(__file__).parent / "results" / f"nvml-{time.strftime('%Y-%m-%d')}-{name}.md").write_text(text + "\n")
    return 0


def driver() -> str:
    try:
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError as e:
        return f"unknown ({e})"


if __name__ == "__main__":
    sys.exit(main())
