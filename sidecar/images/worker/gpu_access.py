"""May a CUDA context be made next to the engine? The facts that are checked first, and the decision.

Rules: everything here reads without taking device memory. NVML's numbers are used for free memory, because CUDA reports
it only in a context. Of several devices the first that CUDA shows is used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sidecar.images.worker.gpu_exit import GpuExit, of_driver_error
from sidecar.kernels import cubins
from sidecar.kernels.cuda_driver import EXCLUSIVE, PROHIBITED, CudaDevice, CudaError, CudaMissingError, Driver

# Where a client looks for an MPS server: CUDA_MPS_PIPE_DIRECTORY, or this.
MPS_FOLDER: Final = "/tmp/nvidia-mps"
# What the driver takes for a context with our kernels; sglang 39334 measured 628 MiB.
CONTEXT_BYTES: Final = 700 << 20
# What is left free for the engine, whose use moves by workspaces and graphs.
RESERVE_BYTES: Final = 512 << 20


class GpuRefusedError(Exception):
    """The GPU is not to be used; `exit` says why, `detail` what the driver or NVML said."""

    def __init__(self, exit: GpuExit, detail: str = "") -> None:
        super().__init__(detail)
        self.exit = exit
        self.detail = detail


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """What can be seen of the GPUs of this container."""

    devices: tuple[CudaDevice, ...]
    has_mps: bool


def refusal(facts: GpuFacts, chosen: str) -> GpuExit | None:
    """Why no context may ever be made here with `--images-device` `chosen`; None if one may."""
    if not facts.devices:
        return GpuExit.NO_DEVICE
    device = facts.devices[0]
    if cubins.architecture_for(*device.capability) is None:
        return GpuExit.NO_KERNEL
    if facts.has_mps:
        return GpuExit.MPS
    if device.compute_mode in (EXCLUSIVE, PROHIBITED):
        return GpuExit.COMPUTE_MODE
    if chosen == "auto" and len(facts.devices) > 1:
        return GpuExit.SEVERAL
    return None


def has_room(free: int, budget: int) -> bool:
    """Whether a context and `budget` bytes fit into `free` bytes, and leave the engine its reserve."""
    return free >= CONTEXT_BYTES + budget + RESERVE_BYTES


def open_driver(chosen: str, environment: Mapping[str, str] = os.environ) -> tuple[Driver, CudaDevice]:
    """The driver and the device to use. Raises GpuRefusedError; takes no device memory."""
    try:
        driver = Driver()
        facts = GpuFacts(tuple(driver.devices()), has_mps(environment))
    except CudaMissingError as e:
        raise GpuRefusedError(GpuExit.NO_DRIVER, str(e)) from None
    except CudaError as e:
        raise GpuRefusedError(of_driver_error(e.code), str(e)) from None
    if (why := refusal(facts, chosen)) is not None:
        raise GpuRefusedError(why, ", ".join(device.name for device in facts.devices))
    return driver, facts.devices[0]


def print_answer(chosen: str) -> None:
    """For `sidecar doctor`: exit status (0: the GPU can be used), detail or device, free bytes, as JSON."""
    try:
        driver, device = open_driver(chosen)
        version = ".".join(map(str, driver.version()))
        answer = (0, f"{device.name} (driver of CUDA {version})", free_memory(device))
    except GpuRefusedError as e:
        answer = (int(e.exit), e.detail, 0)
    print(json.dumps(answer))


def has_mps(environment: Mapping[str, str]) -> bool:
    """Whether a context would be a client of an MPS server."""
    return (Path(environment.get("CUDA_MPS_PIPE_DIRECTORY") or MPS_FOLDER) / "control").exists()


def free_memory(device: CudaDevice) -> int:
    """Free bytes of a device or of its slice. Raises GpuRefusedError if NVML does not report them."""
    import pynvml

    try:
        pynvml.nvmlInit()
        try:
            return int(pynvml.nvmlDeviceGetMemoryInfo(_handle(pynvml, device.uuid)).free)
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as e:
        raise GpuRefusedError(GpuExit.NO_NVML, f"NVML: {e}") from None


def _handle(nvml: Any, uuid: str) -> Any:
    """NVML's handle of a device of CUDA, whose number does not distinguish a slice from a whole GPU."""
    try:
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except nvml.NVMLError:
        return nvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")
