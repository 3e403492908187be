"""The exact resize on a CUDA device, by shipped machine code: cubins.py launched through cuda_driver.py.

Rules: one block of device memory holds a batch: sources, scratch, values, tables; it is kept for the next batch and
never exceeds `budget`. Copies run to and from the caller's memory, which is pinned up to what has been used of it. What
pinning refuses is copied all the same, only slower. Nothing here allocates per image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sidecar.kernels import cubins
from sidecar.kernels.cuda_driver import OUT_OF_MEMORY, Context, CudaDevice, CudaError, Driver
from sidecar.kernels.ragged import RaggedBatch

# Of each part of a batch: Triton's kernels were compiled for pointers that are multiples of 16.
PART_ALIGN_BYTES: Final = 256
# Pinned memory grows in such steps, because each step waits for the driver.
PIN_STEP_BYTES: Final = 8 << 20

Octets = NDArray[np.uint8]


class NoKernelError(Exception):
    """No shipped machine code runs on this device."""


@dataclass(frozen=True, slots=True)
class HostImage:
    """One image of a batch in host memory, which begins with its rows of RGB and receives its values."""

    memory: Octets
    source_bytes: int
    result_bytes: int


@dataclass(frozen=True, slots=True)
class Parts:
    """Where the parts of a batch lie, in bytes from the beginning of its memory."""

    sources: int
    scratch: int
    out: int
    values: int
    tables: int
    descriptors: int
    across: int
    down: int
    total: int


def parts_of(batch: RaggedBatch, value_bytes: int, table_bytes: int) -> Parts:
    """The parts of a batch whose values have `value_bytes` bytes and whose tables of values `table_bytes`."""
    integers = (batch.tables, batch.descriptors, batch.across, batch.down)
    sizes = (batch.source_bytes, batch.scratch_bytes, batch.values * value_bytes, table_bytes)
    ends = [0]
    for size in (*sizes, *(array.nbytes for array in integers)):
        ends.append(-(-(ends[-1] + size) // PART_ALIGN_BYTES) * PART_ALIGN_BYTES)
    return Parts(*ends)


class CudaResize:
    """One device, ready for batches. Raises CudaError or NoKernelError."""

    def __init__(self, driver: Driver, device: CudaDevice, budget: int) -> None:
        architecture = cubins.architecture_for(*device.capability)
        if architecture is None:
            raise NoKernelError(f"{device.name} has compute capability {'.'.join(map(str, device.capability))}")
        self._context = Context(driver, device)
        self._kernels = {
            name: (kernel, self._context.load(kernel.code, name))
            for name, kernel in cubins.Archive().kernels(architecture).items()
        }
        self._budget = budget
        self._memory, self._size = 0, 0
        self._pinned: dict[int, int] = {}  # address -> bytes
        self._can_pin = True

    def run(
        self, batch: RaggedBatch, value_bytes: int, values: NDArray[Any] | None, images: Sequence[HostImage]
    ) -> bool:
        """Resize a batch, each image in its own memory; False if the device has no memory for it.

        `values`: the tables of the batch's processors, (n, 3, 256) of `value_bytes` each; None for bytes.
        """
        uploads: list[NDArray[Any]] = [batch.tables, batch.descriptors, batch.across, batch.down]
        tables: NDArray[Any] = np.zeros(0, np.uint8) if values is None else np.ascontiguousarray(values)
        parts = parts_of(batch, value_bytes, tables.nbytes)
        if not self._make_room(parts.total):
            return False
        for at, image in zip(batch.sources, images, strict=True):
            self._pin(image.memory, max(image.source_bytes, image.result_bytes))
            self._context.to_device(self._memory + parts.sources + at, image.memory.ctypes.data, image.source_bytes)
        places = (parts.values, parts.tables, parts.descriptors, parts.across, parts.down)
        for place, array in zip(places, (tables, *uploads), strict=True):
            if array.nbytes:
                self._context.to_device(self._memory + place, array.ctypes.data, array.nbytes)
        self._launch(batch, parts, value_bytes)
        for at, image in zip(batch.outs, images, strict=True):
            source = self._memory + parts.out + at * value_bytes
            self._context.to_host(image.memory.ctypes.data, source, image.result_bytes)
        self._context.wait()
        return True

    def _launch(self, batch: RaggedBatch, parts: Parts, value_bytes: int) -> None:
        at = self._memory
        tables, descriptors, scratch = at + parts.tables, at + parts.descriptors, at + parts.scratch
        across = [at + parts.sources, tables, descriptors, at + parts.across, scratch]
        down = [scratch, tables, descriptors, at + parts.down, at + parts.values, at + parts.out]
        launches = ((cubins.ACROSS, batch.across.size, across), (cubins.DOWN[value_bytes], batch.down.size, down))
        for name, programs, pointers in launches:
            kernel, function = self._kernels[name]
            pointers += [0] * (kernel.parameters - len(pointers))
            self._context.launch(function, programs, kernel.threads, kernel.shared_bytes, pointers)

    def _make_room(self, size: int) -> bool:
        """Whether there is device memory of `size` bytes, after allocating it if need be."""
        if size > self._budget:
            return False
        if size > self._size:
            if self._memory:
                self._context.free(self._memory)
                self._memory, self._size = 0, 0
            try:
                self._memory = self._context.allocate(size)
            except CudaError as e:
                if e.code != OUT_OF_MEMORY:
                    raise
                return False
            self._size = size
        return True

    def _pin(self, memory: Octets, size: int) -> None:
        """Pin the beginning of an image's memory, at least `size` bytes of it."""
        address = memory.ctypes.data
        if not self._can_pin or self._pinned.get(address, 0) >= size:
            return
        self.unpin(memory)
        wanted = min(-(-size // PIN_STEP_BYTES) * PIN_STEP_BYTES, memory.nbytes)
        try:
            self._context.pin(address, wanted)
        except CudaError:  # the container forbids it, or its memory is short
            self._can_pin = False
        else:
            self._pinned[address] = wanted

    def unpin(self, memory: Octets) -> None:
        """Forget an image's memory, which its owner is about to unmap."""
        if self._pinned.pop(memory.ctypes.data, 0):
            self._context.unpin(memory.ctypes.data)
