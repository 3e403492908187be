"""The one process that owns a GPU: resizes the image workers' pixels exactly, in batches.

Rules: no file from outside is read here: workers send pixels, or a JPEG's coefficients, and numbers that are checked. A
batch is whatever was requested when the last one ended; it is never waited for. No context is made before the first
request, because no request comes while the engine is starting: an engine that profiles its memory fails if another
process's use changes. Before it is made, free memory is looked at (gpu_access.py), and `auto` keeps it only if it saves
CPU time here (gpu_worth.py). Device memory has a hard limit; what does not fit is refused and resized on the CPU. When
the engine needs its GPU, a relay says so and this process exits: only that gives a context's memory back. Any CUDA
error ends it, too, because a context does not recover: the workers continue without it, and gpu_exit.py says when
another is started.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sidecar.images.protocol import FrameError, ImageLimits
from sidecar.images.tensor_layout import ELEMENT_BYTES
from sidecar.images.worker import gpu_access, gpu_worth
from sidecar.images.worker.gpu_access import GpuRefusedError
from sidecar.images.worker.gpu_channel import (
    FULL,
    MAX_REQUEST_BYTES,
    OK,
    READY,
    RELEASE,
    GpuRequest,
    map_arena,
    parse_request,
)
from sidecar.images.worker.gpu_exit import GpuExit, describe, of_driver_error
from sidecar.images.worker.tensors import round_to, table
from sidecar.images.worker.worker import deadline
from sidecar.kernels import families
from sidecar.kernels.cuda_driver import CudaDevice, CudaError, Driver
from sidecar.kernels.cuda_resize import CudaResize, HostImage, NoKernelError, Octets, Plan, plan
from sidecar.kernels.grid import PatchSpec, ProcessorSpec
from sidecar.kernels.jpeg import BLOCK, JpegLayout
from sidecar.kernels.ragged import GPU_TILES, RaggedImage, lay_out

_log = logging.getLogger(__name__)

BATCH_TIMEOUT_S: Final = 10.0  # a GPU that hangs in the driver ends this process
FIRST_BATCH_TIMEOUT_S: Final = 60.0  # it creates a CUDA context, and measures
MAX_TABLES: Final = 16  # cached tables of values, one per model


class _Released(Exception):
    """The engine needs its GPU."""


@dataclass(frozen=True, slots=True)
class PendingRequest:
    """A worker's validated request. `memory` is its arena, which also receives the result."""

    connection: socket.socket
    memory: Octets
    wanted: RaggedImage
    spec: ProcessorSpec
    value_bytes: int
    jpeg: JpegLayout | None = None
    jpeg_tables: NDArray[np.uint16] | None = None

    @property
    def source_bytes(self) -> int:
        """Bytes of the rows of RGB, or of the coefficients."""
        if self.jpeg is not None:
            return 2 * self.jpeg.coefficients
        return 3 * self.wanted.height * self.wanted.width

    @property
    def size(self) -> int:
        """Bytes of the result."""
        return self.wanted.values * self.value_bytes


class GpuResizer:
    """The GPU and its kernels, for requests. Raises CudaError or NoKernelError."""

    def __init__(self, driver: Driver, device: CudaDevice, memory_budget: int) -> None:
        self._device = CudaResize(driver, device, memory_budget)
        self._budget = memory_budget
        self._tables: dict[ProcessorSpec, NDArray[Any]] = {}

    def process(self, requests: list[PendingRequest]) -> list[PendingRequest]:
        """Process the requests that fit into the budget, each into its arena. Returns those."""
        done: list[PendingRequest] = []
        for value_bytes in sorted({request.value_bytes for request in requests}):
            remaining = [request for request in requests if request.value_bytes == value_bytes]
            while remaining:
                fitting, plan, images = self._fitting(remaining, value_bytes)
                if plan is not None and (made := self._device.run(plan, value_bytes, images)) is not None:
                    done += [request for request, is_made in zip(fitting, made, strict=True) if is_made]
                remaining = remaining[max(1, len(fitting)) :]
        return done

    def forget(self, memory: Octets) -> None:
        """Unpin an arena that is about to be unmapped."""
        self._device.unpin(memory)

    def _fitting(
        self, requests: list[PendingRequest], value_bytes: int
    ) -> tuple[list[PendingRequest], Plan | None, list[HostImage]]:
        """The longest prefix of `requests` that fits into the budget, by halving; no plan if not even one does."""
        while requests:
            specs = list(dict.fromkeys(request.spec for request in requests))
            batch = lay_out([replace(r.wanted, table=specs.index(r.spec)) for r in requests], GPU_TILES)
            images = [HostImage(r.memory, r.source_bytes, r.size, r.jpeg, r.jpeg_tables) for r in requests]
            values = np.stack([self._table(spec) for spec in specs]) if value_bytes > 1 else None
            placed = plan(batch, value_bytes, values, images)
            if placed.total <= self._budget:
                return requests, placed, images
            requests = requests[: len(requests) // 2]
        return [], None, []

    def _table(self, spec: ProcessorSpec) -> NDArray[Any]:
        """A processor's value of each byte, in the type that it ends with."""
        if spec not in self._tables:
            if len(self._tables) >= MAX_TABLES:
                self._tables.clear()
            self._tables[spec] = round_to(table(spec), spec.dtype)
        return self._tables[spec]


def serve(listening: socket.socket, limits: ImageLimits, memory_budget: int, chosen: str) -> GpuExit:
    """Serve requests until the GPU is lost or must be given back; logs why. `chosen`: --images-device."""
    detail = ""
    try:
        driver, device = gpu_access.open_driver(chosen)
        _loop(listening, limits, memory_budget, chosen == "auto", driver, device)
    except _Released:
        exit = GpuExit.RELEASED
    except GpuRefusedError as e:
        exit, detail = e.exit, e.detail
    except NoKernelError as e:
        exit, detail = GpuExit.NO_KERNEL, str(e)
    except CudaError as e:
        exit, detail = of_driver_error(e.code), str(e)
    level = logging.INFO if exit is GpuExit.RELEASED else logging.WARNING
    if exit is GpuExit.NO_DRIVER and chosen == "auto":
        level = logging.INFO  # most machines that prepare images have no GPU
    said = f" ({detail[:200]})" if detail else ""
    _log.log(level, "resizing images on the CPU: %s%s", describe(exit), said)
    return exit


def _loop(
    listening: socket.socket, limits: ImageLimits, budget: int, must_earn: bool, driver: Driver, device: CudaDevice
) -> None:
    resizer: GpuResizer | None = None
    arenas: dict[socket.socket, Octets] = {}
    with selectors.DefaultSelector() as waiting:
        waiting.register(listening, selectors.EVENT_READ)
        while True:
            requests, closed = _receive_all(listening, waiting, arenas, limits, has_context=resizer is not None)
            if resizer is not None:
                for memory in closed:
                    resizer.forget(memory)
            if requests:
                with deadline(BATCH_TIMEOUT_S if resizer else FIRST_BATCH_TIMEOUT_S):
                    resizer = resizer or _open(driver, device, budget, must_earn)
                    done = {id(request) for request in resizer.process(requests)}
                for request in requests:
                    with contextlib.suppress(OSError):  # a worker that has exited is noticed on the next read
                        request.connection.send(OK if id(request) in done else FULL)


def _open(driver: Driver, device: CudaDevice, budget: int, must_earn: bool) -> GpuResizer:
    """The device with a context, if it may have one. Raises GpuRefusedError, CudaError or NoKernelError."""
    free = gpu_access.free_memory(device)
    if not gpu_access.has_room(free, budget):
        raise GpuRefusedError(GpuExit.FULL, f"{free >> 20} MiB free of {device.name}")
    resizer = GpuResizer(driver, device, budget)
    if must_earn:
        _check_worth(resizer)
    _log.info("resizing images on %s, in at most %d MiB of its memory", device.name, budget >> 20)
    return resizer


def _check_worth(resizer: GpuResizer) -> None:
    """Raise GpuRefusedError if the GPU saves no CPU time here."""
    spec, (height, width) = gpu_worth.SPEC, gpu_worth.SIZE
    wanted = RaggedImage(height, width, spec.geometry(height, width), spec.resample, spec)

    def on_gpu(memory: Octets) -> None:
        with socket.socket(socket.AF_UNIX) as unused:
            request = PendingRequest(unused, memory, wanted, spec, ELEMENT_BYTES[spec.dtype])
            if not resizer.process([request]):
                raise GpuRefusedError(GpuExit.NOT_FASTER, "the memory budget has no room for one image of 1080p")

    measured = gpu_worth.measure(on_gpu)
    resizer.forget(measured.memory)
    if not gpu_worth.is_worth_it(measured):
        text = f"{measured.gpu_cpu_s * 1e3:.1f} ms of CPU an image, against {measured.cpu_s * 1e3:.1f} ms without"
        raise GpuRefusedError(GpuExit.NOT_FASTER, text)


def _receive_all(
    listening: socket.socket,
    waiting: selectors.BaseSelector,
    arenas: dict[socket.socket, Octets],
    limits: ImageLimits,
    *,
    has_context: bool,
) -> tuple[list[PendingRequest], list[Octets]]:
    """The requests of all ready connections, and the arenas of closed ones; new connections are accepted.

    Raises _Released if the engine needs its GPU and there is a context to give back.
    """
    requests: list[PendingRequest] = []
    closed: list[Octets] = []
    for key, _ in waiting.select():
        if key.fileobj is listening:
            connection, _ = listening.accept()
            connection.setblocking(False)
            waiting.register(connection, selectors.EVENT_READ)
            continue
        connection = key.fileobj  # type: ignore[assignment]
        try:
            requests += _receive(connection, arenas, limits)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError):
            # closed, or not a worker of this version
            waiting.unregister(connection)
            if (memory := arenas.pop(connection, None)) is not None:
                closed.append(memory)
            connection.close()
        except _Released:
            if has_context:
                raise
            waiting.unregister(connection)
            connection.close()
    return requests, closed


def _receive(
    connection: socket.socket, arenas: dict[socket.socket, Octets], limits: ImageLimits
) -> list[PendingRequest]:
    """Read a worker's arena or its request. Raises _Released; OSError, FrameError or ValueError for anything else."""
    if connection not in arenas:
        text, fds, _, _ = socket.recv_fds(connection, MAX_REQUEST_BYTES, 1)
        try:
            if text == RELEASE:
                raise _Released
            if not fds:
                raise FrameError("no arena")
            arenas[connection] = np.frombuffer(map_arena(fds[0]), np.uint8)
            connection.send(READY)
        finally:
            for fd in fds:
                os.close(fd)
        return []
    text = connection.recv(MAX_REQUEST_BYTES)
    if not text:
        raise ConnectionResetError("the worker has ended")
    return [_check(connection, arenas[connection], parse_request(text), limits)]


def _check(connection: socket.socket, memory: Octets, request: GpuRequest, limits: ImageLimits) -> PendingRequest:
    """Validate a request: its source and its result must fit the arena. Raises FrameError or ValueError."""
    spec = families.from_json(request.spec)
    height, width = request.height, request.width
    if max(height, width) > limits.max_side:
        raise FrameError("a side over the limit")
    geometry = spec.geometry(height, width)
    patches = spec if isinstance(spec, PatchSpec) and not request.inline else None
    wanted = RaggedImage(height, width, geometry, spec.resample, patches, planes=not request.inline)
    layout, tables = None, None
    if request.sampling:
        layout = JpegLayout(height, width, request.sampling)
        tables = np.array(request.tables, np.uint16).reshape(len(layout.sampling), BLOCK * BLOCK)
    value_bytes = 1 if request.inline else ELEMENT_BYTES[spec.dtype]
    pending = PendingRequest(connection, memory, wanted, spec, value_bytes, layout, tables)
    if max(pending.source_bytes, pending.size) > memory.nbytes:
        raise FrameError("a request larger than its arena")
    return pending
