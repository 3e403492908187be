"""Why the GPU process ended, and when it is started again. Pure.

Rules: what cannot change while this pod lives is logged once, with its remedy, and never tried again: each attempt may
make a CUDA context, hundreds of MB on the engine's GPU. What may pass is tried again, after pauses that double. The
reason is the process's exit status, so that it needs no other way to its parent.
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Final


class GpuExit(IntEnum):
    """Exit statuses of the GPU process; any other is LOST."""

    LOST = 1
    RELEASED = 64
    FULL = 65
    NO_DRIVER = 70
    NO_DEVICE = 71
    NO_KERNEL = 72
    NO_NVML = 73
    MPS = 74
    COMPUTE_MODE = 75
    SEVERAL = 76
    NOT_FASTER = 77


# Those that may pass, in words.
PASSING: Final = {
    GpuExit.LOST: "the GPU failed, or did not answer",
    GpuExit.RELEASED: "the engine is starting or hangs, and gets its memory back",
    GpuExit.FULL: "too little GPU memory is free for a CUDA context next to the engine",
}
# Those that need someone: what is wrong, and what to do.
PERMANENT: Final = {
    GpuExit.NO_DRIVER: (
        "there is no CUDA driver in this container (libcuda.so.1), or it is too old",
        "give the container the GPU with the driver's capability `compute`",
    ),
    GpuExit.NO_DEVICE: (
        "the CUDA driver finds no device that it can use",
        "give the container the engine's GPU (--gpu-access), or look at CUDA_VISIBLE_DEVICES",
    ),
    GpuExit.NO_KERNEL: (
        "no shipped kernel runs on this GPU",
        "take one of compute capability 8, 9, 10 or 12, from Ampere on",
    ),
    GpuExit.NO_NVML: (
        "NVML does not report how much GPU memory is free",
        "give the container the driver's capability `utility`, too",
    ),
    GpuExit.MPS: (
        "an MPS server runs on this GPU, where a fault of the sidecar would end the engine, too",
        "keep the engine's MPS pipe directory out of the sidecar's container",
    ),
    GpuExit.COMPUTE_MODE: (
        "the GPU's compute mode admits one process only, or none",
        "nvidia-smi --compute-mode=DEFAULT on the node",
    ),
    GpuExit.SEVERAL: (
        "several GPUs are visible, whose ranks would wait for the one that also resizes",
        "name one with CUDA_VISIBLE_DEVICES and --images-device cuda",
    ),
    GpuExit.NOT_FASTER: (
        "measured here, resizing on the GPU takes no less of a CPU",
        "--images-device cuda uses it anyway",
    ),
}
# First and longest pause.
RETRY_S: Final = (60.0, 3600.0)
# Longer than a job's deadline, so that no job of before the release takes memory of an engine that starts.
RELEASED_S: Final = 120.0

# Errors of the driver (CUresult) that do not pass: no device, or none for this driver library.
_NO_DEVICE: Final = frozenset({3, 34, 100, 101, 102, 304, 803, 804})
_NO_KERNEL: Final = frozenset({200, 209, 218, 222, 223, 300, 301, 500})
_COMPUTE_MODE: Final = frozenset({46})
_OUT_OF_MEMORY: Final = 2


def of_driver_error(code: int) -> GpuExit:
    """The exit that an error of the CUDA driver means."""
    if code in _NO_DEVICE:
        return GpuExit.NO_DEVICE
    if code in _NO_KERNEL:
        return GpuExit.NO_KERNEL
    if code in _COMPUTE_MODE:
        return GpuExit.COMPUTE_MODE
    return GpuExit.FULL if code == _OUT_OF_MEMORY else GpuExit.LOST


def of_status(status: int) -> GpuExit:
    """The exit of a status as waitpid gives it: negative for a signal."""
    try:
        return GpuExit(status)
    except ValueError:
        return GpuExit.LOST


def retry_after(exit: GpuExit, failures: int) -> float:
    """Seconds until the next start after this many failures in a row; infinite if there is none."""
    if exit in PERMANENT:
        return math.inf
    if exit is GpuExit.RELEASED:
        return RELEASED_S
    first, longest = RETRY_S
    return float(min(first * 2.0 ** min(failures - 1, 30), longest))


def describe(exit: GpuExit) -> str:
    """In words, with the remedy if it needs one."""
    if exit in PERMANENT:
        what, remedy = PERMANENT[exit]
        return f"{what}; {remedy}"
    return PASSING[exit]
