"""Does the GPU save CPU time on this machine? Measured once, before `auto` uses it.

Rules: CPU time is what the engine loses, so that is compared: of this process and of the worker's copies, against the
CPU's own kernel, for one image of common size. A GPU must be clearly ahead, and its answer must not be late.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from sidecar.images.worker.gpu_channel import GPU_TIMEOUT_S
from sidecar.images.worker.tensors import prepare
from sidecar.kernels.cuda_resize import Octets
from sidecar.kernels.families.single_view import Qwen2VLSpec
from sidecar.kernels.grid import BICUBIC

RUNS: Final = 5
SIZE: Final = (1080, 1920)
# Of the CPU's time, what the GPU's way may take at most: less would not pay for the memory of a context.
MAX_SHARE: Final = 0.8
SPEC: Final = Qwen2VLSpec(
    resample=BICUBIC,
    do_rescale=True,
    rescale_factor=1 / 255,
    do_normalize=True,
    image_mean=(0.5,) * 3,
    image_std=(0.5,) * 3,
    patch_size=14,
    merge_size=2,
    temporal_patch_size=2,
    min_pixels=3136,
    max_pixels=1_003_520,
    half="BF16",
)


@dataclass(frozen=True, slots=True)
class MeasuredWorth:
    """Seconds for one image: of CPU and of time on the way over the GPU, of CPU without it; and the memory used."""

    gpu_cpu_s: float
    gpu_s: float
    cpu_s: float
    memory: Octets


def is_worth_it(measured: MeasuredWorth) -> bool:
    """Whether the GPU saves enough of a CPU, and answers in time."""
    return measured.gpu_cpu_s <= MAX_SHARE * measured.cpu_s and measured.gpu_s <= GPU_TIMEOUT_S / 2


def measure(on_gpu: Callable[[Octets], None]) -> MeasuredWorth:
    """Measure both ways. `on_gpu` replaces the rows of RGB at the beginning of its argument by SPEC's result."""
    height, width = SIZE
    geometry = SPEC.geometry(height, width)
    rows = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    size = prepare(rows, geometry, SPEC).nbytes
    memory = np.zeros(max(rows.nbytes, size), np.uint8)

    def whole() -> None:
        memory[: rows.nbytes] = rows.reshape(-1)  # as a worker writes them to its arena
        on_gpu(memory)

    whole()  # allocates and pins
    cpu_s, _ = _least(lambda: prepare(rows, geometry, SPEC))
    return MeasuredWorth(*_least(whole), cpu_s, memory)


def _least(run: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of CPU and of time, each the least of some runs."""
    used, taken = [], []
    for _ in range(RUNS):
        cpu, start = time.process_time(), time.perf_counter()
        run()
        used.append(time.process_time() - cpu)
        taken.append(time.perf_counter() - start)
    return min(used), min(taken)
