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

from sidecar.kernels import cubins, ragged_jpeg
from sidecar.kernels.cuda_driver import OUT_OF_MEMORY, Context, CudaDevice, CudaError, Driver
from sidecar.kernels.jpeg import JpegLayout
from sidecar.kernels.ragged import RaggedBatch
from sidecar.kernels.ragged_jpeg import JpegBatch

# Of each part of a batch: Triton's kernels were compiled for pointers that are multiples of 16.
PART_ALIGN_BYTES: Final = 256
# Pinned memory grows in such steps, because each step waits for the driver.
PIN_STEP_BYTES: Final = 8 << 20

Octets = NDArray[np.uint8]


class NoKernelError(Exception):
    """No shipped machine code runs on this device."""


@dataclass(frozen=True, slots=True)
class HostImage:
    """One image of a batch in host memory, which begins with its source and receives its values.

    The source is rows of RGB, or the coefficients of a JPEG of this layout and these tables.
    """

    memory: Octets
    source_bytes: int
    result_bytes: int
    jpeg: JpegLayout | None = None
    jpeg_tables: NDArray[np.uint16] | None = None


class Places:
    """The parts of a batch in one block of memory: each begins behind the one before it, aligned."""

    def __init__(self) -> None:
        self.total = 0

    def take(self, size: int) -> int:
        """Where a part of `size` bytes begins."""
        at = self.total
        self.total += -(-max(size, 1) // PART_ALIGN_BYTES) * PART_ALIGN_BYTES
        return at


@dataclass(frozen=True, slots=True)
class Plan:
    """A batch with its place in memory: offsets of what is made there, and the arrays to be copied there."""

    batch: RaggedBatch
    jpegs: JpegBatch | None
    sources: int
    scratch: int
    out: int
    coefficients: int
    samples: int
    flags: int
    uploads: tuple[tuple[int, NDArray[Any]], ...]  # in the order below
    places: Places

    @property
    def total(self) -> int:
        """Bytes of device memory."""
        return self.places.total


# Of the resize, then of JPEGs.
VALUES, TABLES, DESCRIPTORS, ACROSS, DOWN, QUANT, INVERSE, INVERSE_OWNERS, COLOUR, COLOUR_OWNERS = range(10)


def plan(batch: RaggedBatch, value_bytes: int, values: NDArray[Any] | None, images: Sequence[HostImage]) -> Plan:
    """Place a batch. `values`: the tables of the batch's processors, (n, 3, 256) of `value_bytes`; None for bytes."""
    jpegs = [
        (image.jpeg, image.jpeg_tables, at)
        for at, image in zip(batch.sources, images, strict=True)
        if image.jpeg is not None and image.jpeg_tables is not None
    ]
    found = ragged_jpeg.lay_out(*zip(*jpegs, strict=True)) if jpegs else None
    arrays: list[NDArray[Any]] = [np.zeros(0, np.uint8) if values is None else np.ascontiguousarray(values)]
    arrays += [batch.tables, batch.descriptors, batch.across, batch.down]
    if found is not None:
        arrays += [found.tables, found.inverse, found.inverse_owners, found.colour, found.colour_owners]
    places = Places()
    return Plan(
        batch,
        found,
        places.take(batch.source_bytes),
        places.take(batch.scratch_bytes),
        places.take(batch.values * value_bytes),
        places.take(found.coefficient_bytes if found else 0),
        places.take(found.sample_bytes if found else 0),
        places.take(4 * found.inverse_owners.size if found else 0),
        tuple((places.take(array.nbytes), array) for array in arrays),
        places,
    )


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

    def run(self, plan: Plan, value_bytes: int, images: Sequence[HostImage]) -> list[bool] | None:
        """Resize a batch, each image in its own memory; None if the device has no memory for it.

        Of each image whether it was made: a JPEG whose numbers are beyond libjpeg's is not.
        """
        if not self._make_room(plan.total):
            return None
        at, jpegs = self._memory, iter(plan.jpegs.coefficients if plan.jpegs else ())
        for source, image in zip(plan.batch.sources, images, strict=True):
            self._pin(image.memory, max(image.source_bytes, image.result_bytes))
            target = plan.sources + source if image.jpeg is None else plan.coefficients + next(jpegs)
            self._context.to_device(at + target, image.memory.ctypes.data, image.source_bytes)
        for place, array in plan.uploads:
            if array.nbytes:
                self._context.to_device(at + place, array.ctypes.data, array.nbytes)
        flags = self._decode(plan)
        self._resize(plan, value_bytes)
        for out, image in zip(plan.batch.outs, images, strict=True):
            source = at + plan.out + out * value_bytes
            self._context.to_host(image.memory.ctypes.data, source, image.result_bytes)
        self._context.wait()
        return _are_sound(plan, flags, images)

    def _decode(self, plan: Plan) -> NDArray[np.int32]:
        """Turn coefficients into rows of RGB. Returns what each program reports, once it is waited for."""
        if plan.jpegs is None:
            return np.zeros(0, np.int32)
        place = [self._memory + at for at, _ in plan.uploads]
        coefficients, samples, flags = (self._memory + at for at in (plan.coefficients, plan.samples, plan.flags))
        inverse = [coefficients, place[QUANT], place[INVERSE], place[INVERSE_OWNERS], samples, flags]
        self._launch(cubins.INVERSE, plan.jpegs.inverse_owners.size, inverse)
        rgb = self._memory + plan.sources
        colour = [samples, place[COLOUR], place[COLOUR_OWNERS], rgb]
        self._launch(cubins.COLOUR, plan.jpegs.colour_owners.size, colour)
        reported = np.empty(plan.jpegs.inverse_owners.size, np.int32)
        self._context.to_host(reported.ctypes.data, flags, reported.nbytes)
        return reported

    def _resize(self, plan: Plan, value_bytes: int) -> None:
        place = [self._memory + at for at, _ in plan.uploads]
        sources, scratch, out = (self._memory + at for at in (plan.sources, plan.scratch, plan.out))
        across = [sources, place[TABLES], place[DESCRIPTORS], place[ACROSS], scratch]
        self._launch(cubins.ACROSS, plan.batch.across.size, across)
        down = [scratch, place[TABLES], place[DESCRIPTORS], place[DOWN], place[VALUES], out]
        self._launch(cubins.DOWN[value_bytes], plan.batch.down.size, down)

    def _launch(self, name: str, programs: int, pointers: list[int]) -> None:
        kernel, function = self._kernels[name]
        pointers = pointers + [0] * (kernel.parameters - len(pointers))
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


def _are_sound(plan: Plan, flags: NDArray[np.int32], images: Sequence[HostImage]) -> list[bool]:
    """Of each image whether none of the programs of its components reported numbers beyond the limits."""
    bad = set(plan.jpegs.inverse_owners[flags != 0].tolist()) if plan.jpegs else set()
    sound, component = [], 0
    for image in images:
        count = len(image.jpeg.sampling) if image.jpeg is not None else 0
        sound.append(bad.isdisjoint(range(component, component + count)))
        component += count
    return sound
