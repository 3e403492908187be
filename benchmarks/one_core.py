"""Shared by the image benchmarks: one core, the processor's name, interleaved rounds. Run images.py.

Rules: a time is the CPU time of the one working thread, so that other work on the machine affects only caches and
memory bandwidth. A chain named in `elsewhere` works in another process and is timed by the clock. Freed memory stays
with the process, so that no time includes the kernel's first touch of fresh pages, which depends on what was freed
before.
"""

from __future__ import annotations

import ctypes
import io
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the others import torch's bits from tests/

from sidecar.images import file_headers
from sidecar.images.protocol import ImageLimits
from sidecar.images.worker.decode import decode

LIMITS: Final = ImageLimits(20 << 20, 50_000_000)
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
DECODE: Final = "decode alone"

Chain = Callable[[], Any]


def pin() -> None:
    """One core, one thread, no gradients, and memory that is kept."""
    libc = ctypes.CDLL(None)
    for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 1 << 30)):
        if not libc.mallopt(option, value):
            raise OSError("malloc cannot be configured to keep memory")
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)


def cpu_name() -> str:
    """The processor, as the kernel calls it."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.processor() or platform.machine()


def decoded(data: bytes) -> Any:
    """The pixels of a file, (height, width, 3)."""
    header = file_headers.read(data)
    assert header is not None
    return decode(data, header, LIMITS)


def measure(todo: dict[str, Chain], rounds: int, elsewhere: Container[str] = ()) -> dict[str, float]:
    """Median milliseconds of each chain; they take turns in every round."""
    taken: dict[str, list[float]] = {name: [] for name in todo}
    for _ in range(rounds):
        for name, chain in todo.items():
            clock = time.perf_counter if name in elsewhere else time.thread_time
            start = clock()
            chain()
            taken[name].append((clock() - start) * 1e3)
    return {name: statistics.median(times) for name, times in taken.items()}


def screenshot(width: int, height: int) -> bytes:
    """A PNG of areas of one colour, and lines of something like text."""
    rng = np.random.default_rng(1)
    screen = np.full((height, width, 3), 245, np.uint8)
    screen[:, : width // 5] = (40, 44, 52)
    for top in range(20, height - 20, 22):
        line = np.repeat(rng.integers(0, 2, (12, width // 6), np.uint8), 2, axis=1)
        screen[top : top + 12, width // 4 : width // 4 + line.shape[1]] -= 200 * line[..., None]
    out = io.BytesIO()
    Image.fromarray(screen).save(out, "PNG")
    return out.getvalue()
