"""The one process that owns a GPU: resizes the image workers' pixels exactly, in batches.

Rules: no bytes from outside are decoded here. A batch is whatever was requested when the last one ended; it is never
waited for. The GPU is not touched before the first request, because no request comes while the engine is starting: an
engine that profiles its memory fails if another process's use changes. Device memory has a hard limit; what does not
fit is refused and resized on the CPU. Any other GPU error ends this process, because a CUDA context does not recover:
the workers continue without it, and the server restarts it later.

With TRITON_INTERPRET=1 the kernel runs in Triton's interpreter on the CPU, for tests.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from sidecar.images.protocol import FrameError, ImageLimits
from sidecar.images.worker.gpu_channel import FULL, MAX_REQUEST_BYTES, OK, READY, GpuRequest, map_arena, parse_request
from sidecar.images.worker.tensors import table
from sidecar.images.worker.worker import deadline
from sidecar.kernels import families
from sidecar.kernels.grid import PatchSpec, ProcessorSpec
from sidecar.kernels.ragged import RaggedBatch, RaggedImage

_log = logging.getLogger(__name__)

BATCH_TIMEOUT_S: Final = 10.0  # a GPU that hangs in the driver ends this process
FIRST_BATCH_TIMEOUT_S: Final = 180.0  # it creates a CUDA context and compiles the kernel
MAX_TABLES: Final = 16  # cached tables of values, one per model


@dataclass(frozen=True, slots=True)
class PendingRequest:
    """A worker's validated request. `memory` is its arena as a tensor, which also receives the result."""

    connection: socket.socket
    memory: Any
    wanted: RaggedImage
    spec: ProcessorSpec
    floats: bool

    @property
    def size(self) -> int:
        """Bytes of the result."""
        return self.wanted.values * (4 if self.floats else 1)


class GpuResizer:
    """The GPU and its kernel. Raises whatever CUDA or Triton raise if it cannot be used."""

    def __init__(self, memory_budget: int) -> None:
        from sidecar.kernels import gpu

        self._kernel = gpu
        self._name = "cpu" if gpu.is_interpreted() else "cuda"
        self._budget = memory_budget
        self._tables: dict[ProcessorSpec, Any] = {}
        self._stream: Any = contextlib.nullcontext()
        if self._name == "cuda":
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, memory_budget / total))
            lowest, _ = torch.cuda.Stream.priority_range()
            self._stream = torch.cuda.stream(torch.cuda.Stream(priority=lowest))

    def process(self, requests: list[PendingRequest]) -> list[PendingRequest]:
        """Process the requests that fit into the budget, each into its arena. Returns those."""
        done: list[PendingRequest] = []
        for floats in (True, False):
            remaining = [request for request in requests if request.floats == floats]
            while remaining:
                fitting, batch = self._fitting(remaining, 4 if floats else 1)
                try:
                    with self._stream:
                        if batch is not None:
                            self._run(fitting, batch, floats)
                            done += fitting
                except torch.cuda.OutOfMemoryError:
                    torch.cuda.empty_cache()
                remaining = remaining[max(1, len(fitting)) :]
        return done

    def _fitting(
        self, requests: list[PendingRequest], value_bytes: int
    ) -> tuple[list[PendingRequest], RaggedBatch | None]:
        """The longest prefix of `requests` that fits into the budget, by halving; None if not even one does."""
        while requests:
            specs = list(dict.fromkeys(request.spec for request in requests))
            batch = self._kernel.lay_out([replace(r.wanted, table=specs.index(r.spec)) for r in requests])
            if batch.memory(value_bytes) + len(specs) * 768 * value_bytes <= self._budget:
                return requests, batch
            requests = requests[: len(requests) // 2]
        return [], None

    def _run(self, requests: list[PendingRequest], batch: RaggedBatch, floats: bool) -> None:
        kind = torch.float32 if floats else torch.uint8
        sizes = ((batch.source_bytes, torch.uint8), (batch.scratch_bytes, torch.uint8), (batch.values, kind))
        sources, scratch, out = (torch.empty(n, dtype=dtype, device=self._name) for n, dtype in sizes)
        for at, request in zip(batch.sources, requests, strict=True):
            size = 3 * request.wanted.height * request.wanted.width
            sources[at : at + size].copy_(request.memory[:size])
        values = self._values(requests) if floats else None
        self._kernel.launch(self._kernel.load(batch, self._name), sources, scratch, values, out)
        octets = out.view(torch.uint8)
        for at, request in zip(batch.outs, requests, strict=True):
            first = at * kind.itemsize
            request.memory[: request.size].copy_(octets[first : first + request.size])  # waits for the kernel

    def _values(self, requests: list[PendingRequest]) -> Any:
        """The tables of the batch's processors, in order of first appearance."""
        if len(self._tables) > MAX_TABLES:
            self._tables.clear()
        specs = list(dict.fromkeys(request.spec for request in requests))
        for spec in specs:
            if spec not in self._tables:
                self._tables[spec] = torch.from_numpy(table(spec))
        return torch.stack([self._tables[spec] for spec in specs]).to(self._name)


def is_available() -> bool:
    """True if this process can use a CUDA device or its interpreter. Takes no device memory."""
    return os.environ.get("TRITON_INTERPRET") == "1" or bool(torch.cuda.is_available())


def serve(listening: socket.socket, limits: ImageLimits, memory_budget: int) -> int:
    """Serve requests until the GPU is lost; logs the reason and returns 1."""
    os.environ.setdefault("TRITON_CACHE_DIR", f"{listening.getsockname()}-kernels")  # a home may be read-only
    with selectors.DefaultSelector() as waiting:
        waiting.register(listening, selectors.EVENT_READ)
        try:
            _loop(listening, waiting, limits, memory_budget)
        except Exception as e:  # noqa: BLE001  CUDA's and Triton's errors have many types
            # the first line, which comes from a driver or a compiler, never from an image
            why = f"{type(e).__name__}: {str(e).partition(chr(10))[0][:200]}"
            _log.warning("cannot use the GPU (%s); resizing images on the CPU", why)
    return 1


def _loop(listening: socket.socket, waiting: selectors.BaseSelector, limits: ImageLimits, memory_budget: int) -> None:
    device: GpuResizer | None = None
    arenas: dict[socket.socket, Any] = {}
    while True:
        requests = _receive_all(listening, waiting, arenas, limits)
        if requests:
            with deadline(BATCH_TIMEOUT_S if device else FIRST_BATCH_TIMEOUT_S):
                device = device or GpuResizer(memory_budget)
                done = {id(request) for request in device.process(requests)}
            for request in requests:
                with contextlib.suppress(OSError):  # a worker that has exited is noticed on the next read
                    request.connection.send(OK if id(request) in done else FULL)


def _receive_all(
    listening: socket.socket, waiting: selectors.BaseSelector, arenas: dict[socket.socket, Any], limits: ImageLimits
) -> list[PendingRequest]:
    """The requests of all ready connections; new connections are accepted and closed ones removed."""
    requests: list[PendingRequest] = []
    for key, _ in waiting.select():
        if key.fileobj is listening:
            connection, _ = listening.accept()
            connection.setblocking(False)
            waiting.register(connection, selectors.EVENT_READ)
            continue
        connection = key.fileobj  # type: ignore[assignment]
        try:
            requests += _receive(connection, arenas, limits)
        except (OSError, ValueError, LookupError, TypeError, AttributeError):  # closed, or not a worker of this version
            waiting.unregister(connection)
            arenas.pop(connection, None)
            connection.close()
    return requests


def _receive(connection: socket.socket, arenas: dict[socket.socket, Any], limits: ImageLimits) -> list[PendingRequest]:
    """Read a worker's arena or its request. Raises OSError, FrameError or ValueError for anything else."""
    if connection not in arenas:
        _, fds, _, _ = socket.recv_fds(connection, MAX_REQUEST_BYTES, 1)
        try:
            if not fds:
                raise FrameError("no arena")
            arenas[connection] = torch.frombuffer(map_arena(fds[0]), dtype=torch.uint8)
            connection.send(READY)
        finally:
            for fd in fds:
                os.close(fd)
        return []
    text = connection.recv(MAX_REQUEST_BYTES)
    if not text:
        raise ConnectionResetError("the worker has ended")
    return [_check(connection, arenas[connection], parse_request(text), limits)]


def _check(connection: socket.socket, memory: Any, request: GpuRequest, limits: ImageLimits) -> PendingRequest:
    """Validate a request: its pixels and its result must fit the arena. Raises FrameError or ValueError."""
    spec = families.from_json(request.spec)
    height, width = request.height, request.width
    if max(height, width) > limits.max_side:
        raise FrameError("a side over the limit")
    geometry = spec.geometry(height, width)
    patches = spec if isinstance(spec, PatchSpec) and not request.inline else None
    wanted = RaggedImage(height, width, geometry, spec.resample, patches, planes=not request.inline)
    pending = PendingRequest(connection, memory, wanted, spec, spec.floats and not request.inline)
    if max(3 * height * width, pending.size) > memory.numel():
        raise FrameError("a request larger than its arena")
    return pending
