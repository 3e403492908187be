"""Whether a GPU may be used beside an engine, whether it is worth it, and when a lost one is tried again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sidecar.images.worker import gpu_access, gpu_exit, gpu_worth
from sidecar.images.worker.gpu_access import GpuFacts, has_room, refusal
from sidecar.images.worker.gpu_exit import GpuExit
from sidecar.images.worker.gpu_worth import MeasuredWorth
from sidecar.kernels.cuda_driver import CudaDevice

GIB = 1 << 30


def device(capability: tuple[int, int] = (9, 0), mode: int = 0) -> CudaDevice:
    return CudaDevice(0, "H200", capability, mode, "")


@pytest.mark.parametrize(
    ("facts", "auto", "cuda"),
    [
        (GpuFacts((device(),), False), None, None),
        (GpuFacts((), False), GpuExit.NO_DEVICE, GpuExit.NO_DEVICE),
        (GpuFacts((device((7, 0)),), False), GpuExit.NO_KERNEL, GpuExit.NO_KERNEL),
        (GpuFacts((device(),), True), GpuExit.MPS, GpuExit.MPS),
        (GpuFacts((device(mode=3),), False), GpuExit.COMPUTE_MODE, GpuExit.COMPUTE_MODE),
        (GpuFacts((device(mode=2),), False), GpuExit.COMPUTE_MODE, GpuExit.COMPUTE_MODE),
        (GpuFacts((device(), device()), False), GpuExit.SEVERAL, None),
    ],
)
def test_who_may_use_a_gpu(facts: GpuFacts, auto: GpuExit | None, cuda: GpuExit | None) -> None:
    """The table of decision 0055; of several GPUs only `cuda` takes the first."""
    assert (refusal(facts, "auto"), refusal(facts, "cuda")) == (auto, cuda)


def test_an_mps_server_is_seen_by_its_pipe(tmp_path: Path) -> None:
    """Clients look for its control pipe in CUDA_MPS_PIPE_DIRECTORY; a folder alone is no server."""
    environment = {"CUDA_MPS_PIPE_DIRECTORY": str(tmp_path)}
    assert not gpu_access.has_mps(environment)
    (tmp_path / "control").touch()
    assert gpu_access.has_mps(environment)


@pytest.mark.parametrize(("free", "fits"), [(80 * GIB, True), (3 * GIB, True), (2 * GIB, False), (0, False)])
def test_a_context_leaves_the_engine_room(free: int, fits: bool) -> None:
    """Beside a budget of 1 GiB, the context and a reserve must fit."""
    assert has_room(free, GIB) is fits


@pytest.mark.parametrize(
    ("gpu_cpu_s", "gpu_s", "cpu_s", "worth"),
    [
        (0.001, 0.002, 0.004, True),
        (0.0033, 0.002, 0.004, False),  # it saves too little
        (0.008, 0.002, 0.004, False),
        (0.001, 0.2, 0.004, False),  # its answers would be late
    ],
)
def test_a_gpu_must_earn_its_place(gpu_cpu_s: float, gpu_s: float, cpu_s: float, worth: bool) -> None:
    """It saves at least a fifth of the CPU time, within half of what a worker waits."""
    measured = MeasuredWorth(gpu_cpu_s, gpu_s, cpu_s, np.zeros(1, np.uint8))
    assert gpu_worth.is_worth_it(measured) is worth


def test_every_exit_has_words() -> None:
    """Each is passing or permanent; the permanent ones have a remedy."""
    assert set(gpu_exit.PASSING) | set(gpu_exit.PERMANENT) == set(GpuExit)
    assert not set(gpu_exit.PASSING) & set(gpu_exit.PERMANENT)
    assert all(gpu_exit.describe(exit) for exit in GpuExit)


@pytest.mark.parametrize("status", [0, 1, 2, -9, -14, 255])
def test_an_unknown_status_may_pass(status: int) -> None:
    """A signal or any other status is a lost GPU."""
    assert gpu_exit.of_status(status) is GpuExit.LOST


@pytest.mark.parametrize(
    ("code", "exit"),
    [  # CUresult, from cuda.h
        (2, GpuExit.FULL),  # OUT_OF_MEMORY
        (34, GpuExit.NO_DEVICE),  # STUB_LIBRARY
        (46, GpuExit.COMPUTE_MODE),  # DEVICE_UNAVAILABLE
        (100, GpuExit.NO_DEVICE),  # NO_DEVICE
        (209, GpuExit.NO_KERNEL),  # NO_BINARY_FOR_GPU
        (700, GpuExit.LOST),  # ILLEGAL_ADDRESS
        (802, GpuExit.LOST),  # SYSTEM_NOT_READY: the fabric manager is starting
        (803, GpuExit.NO_DEVICE),  # SYSTEM_DRIVER_MISMATCH
        (999, GpuExit.LOST),  # UNKNOWN
    ],
)
def test_errors_of_the_driver_pass_or_stay(code: int, exit: GpuExit) -> None:
    """What a restart of the process cannot mend is permanent."""
    assert gpu_exit.of_driver_error(code) is exit
