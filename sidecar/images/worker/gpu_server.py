"""The one process that owns a GPU: takes pixels from the image workers, resizes them exactly in batches, hands them back.

Rules: no byte from outside is decoded here. A batch is what has been asked when the last one is done, never waited for. The GPU is
touched at the first ask and no earlier, because asks come only when the engine is not starting: an engine that profiles its
memory gives up when a neighbour's use changes. Device memory has a hard bound; what does not fit is refused, and resized on the
CPU. Whatever else goes wrong on the GPU ends this process, since a CUDA context does not recover: the workers go on alone, and
the server tries again after a while.

What is lent (lending.py) stays on the device, in memory of its own beside torch's, and counts against the same bound.

With TRITON_INTERPRET=1 the kernel runs in Triton's interpreter on the CPU: for tests.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from sidecar.images.protocol import FrameError, Limits
from sidecar.images.worker.gpu_channel import FULL, MAX_ASK, OK, Ask, mapped, parse
from sidecar.images.worker.gpu_lender import CudaPiece, HostPiece, Lender, Piece, allocator, described
from sidecar.images.worker.tensors import table
from sidecar.images.worker.worker import deadline
from sidecar.kernels import families
from sidecar.kernels.grid import PatchSpec, ProcessorSpec
from sidecar.kernels.ragged import Batch, Wanted

_log = logging.getLogger("sidecar.imaging")

SECONDS: Final = 10.0  # most that a batch may take; a GPU that hangs in the driver ends this process
FIRST: Final = 180.0  # the first one makes a CUDA context and compiles the kernel
KNOWN: Final = 16  # tables of values that are kept: there is one per model


@dataclass(frozen=True, slots=True)
class Asked:
    """One ask of one worker, checked. `memory` is its arena as a tensor; the result goes there, or into `piece` for a loan."""

    connection: socket.socket
    memory: Any
    wanted: Wanted
    spec: ProcessorSpec
    floats: bool
    loan: str = ""
    piece: Piece | None = None

    @property
    def size(self) -> int:
        """Bytes of the result."""
        return self.wanted.values * (4 if self.floats else 1)


class Device:
    """The GPU with the kernel compiled for it. Raises whatever CUDA or Triton raise where it cannot be used."""

    def __init__(self, memory_budget: int, lender: Lender) -> None:
        from sidecar.kernels import gpu

        self._kernel = gpu
        self._name = "cpu" if gpu.interpreted() else "cuda"
        self._budget = memory_budget
        self._lender = lender
        self._tables: dict[ProcessorSpec, Any] = {}
        self._stream: Any = contextlib.nullcontext()
        if self._name == "cuda":
            self._total = torch.cuda.get_device_properties(0).total_memory
            least, _ = torch.cuda.Stream.priority_range()
            self._stream = torch.cuda.stream(torch.cuda.Stream(priority=least))

    def serve(self, asked: list[Asked]) -> list[bytes]:
        """Do what can be done, and say of each ask what is to be answered."""
        furnished = [self._furnished(ask) for ask in asked]
        done = {id(ask) for ask in self.make([ask for ask in furnished if ask is not None])}
        return [_answer(ask) if ask is not None and id(ask) in done else FULL for ask in furnished]

    def _furnished(self, ask: Asked) -> Asked | None:
        """The ask with the memory that is lent for it; None where there is none. The loan's end gives it back, whatever comes of it."""
        if not ask.loan:
            return ask
        piece = self._lender.loans.lend(ask.loan, ask.size, self._allocate)
        return replace(ask, piece=piece) if piece is not None else None

    def _allocate(self, size: int) -> Piece | None:
        if self._name != "cuda":
            return HostPiece(size)
        if torch.cuda.memory_reserved() + self._lender.loans.held + size > self._budget:
            torch.cuda.empty_cache()  # what torch keeps for later counts, too
        return allocator(CudaPiece)(size)

    def _bound(self) -> int:
        """Bytes that batches may use now; torch's allocator is held to it."""
        free = self._budget - self._lender.loans.held
        if self._name == "cuda" and free > 0:
            torch.cuda.set_per_process_memory_fraction(min(1.0, free / self._total))
        return free

    def make(self, asked: list[Asked]) -> list[Asked]:
        """Do what fits into the budget, each into its arena. Returns what was done."""
        done: list[Asked] = []
        kinds: defaultdict[bool, list[Asked]] = defaultdict(list)
        for ask in asked:
            kinds[ask.floats].append(ask)
        for floats, alike in kinds.items():
            item = 4 if floats else 1
            while alike:
                some, batch = self._fitting(alike, item)
                if batch is not None and self._launch(some, batch, floats):
                    done += some
                alike = alike[max(1, len(some)) :]
        return done

    def _fitting(self, asked: list[Asked], item: int) -> tuple[list[Asked], Batch | None]:
        """The longest beginning of `asked` that fits into the budget, found by halving; None where not even one does."""
        bound = self._bound()
        while asked:
            specs = list(dict.fromkeys(ask.spec for ask in asked))
            batch = self._kernel.lay_out([replace(ask.wanted, table=specs.index(ask.spec)) for ask in asked])
            if batch.memory(item) + len(specs) * 768 * item <= bound:
                return asked, batch
            asked = asked[: len(asked) // 2]
        return [], None

    def _launch(self, asked: list[Asked], batch: Batch, floats: bool) -> bool:
        """One batch, start to end. False where the GPU has no memory for it."""
        try:
            with self._stream:
                self._run(asked, batch, floats)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            return False
        return True

    def _run(self, asked: list[Asked], batch: Batch, floats: bool) -> None:
        kind = torch.float32 if floats else torch.uint8
        sources, scratch = (self._empty(n, torch.uint8) for n in (batch.source_bytes, batch.scratch_bytes))
        out = self._empty(batch.values, kind)
        for at, ask in zip(batch.sources, asked, strict=True):
            size = 3 * ask.wanted.height * ask.wanted.width
            sources[at : at + size].copy_(ask.memory[:size])
        values = self._values(asked) if floats else None
        self._kernel.launch(self._kernel.load(batch, self._name), sources, scratch, values, out)
        octets = out.view(torch.uint8)
        for at, ask in zip(batch.outs, asked, strict=True):
            first = at * kind.itemsize
            target = ask.memory if ask.piece is None else ask.piece.tensor
            target[: ask.size].copy_(octets[first : first + ask.size])
        if self._name == "cuda":
            torch.cuda.current_stream().synchronize()  # whoever is answered finds the result there

    def _values(self, asked: list[Asked]) -> Any:
        """The tables of the batch's processors, in the order in which they first come."""
        if len(self._tables) > KNOWN:
            self._tables.clear()
        specs = list(dict.fromkeys(ask.spec for ask in asked))
        for spec in specs:
            if spec not in self._tables:
                self._tables[spec] = table(spec)
        return torch.stack([self._tables[spec] for spec in specs]).to(self._name)

    def _empty(self, size: int, kind: Any) -> Any:
        return torch.empty(size, dtype=kind, device=self._name)


def _answer(ask: Asked) -> bytes:
    return OK if ask.piece is None else described(ask.piece, ask.size)


def visible() -> bool:
    """Whether this process can use a CUDA device, or the interpreter stands in for it. Takes no device memory."""
    return os.environ.get("TRITON_INTERPRET") == "1" or bool(torch.cuda.is_available())


def serve(path: str, limits: Limits, memory_budget: int) -> int:
    """Answer asks until the GPU is lost. Returns 1 then, having said so."""
    os.environ.setdefault("TRITON_CACHE_DIR", f"{path}-kernels")  # a home may be read-only
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)  # noqa: PTH108
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening, selectors.DefaultSelector() as waiting:
        listening.bind(path)
        listening.listen()
        waiting.register(listening, selectors.EVENT_READ)
        try:
            _loop(listening, waiting, limits, memory_budget)
        except Exception as e:  # noqa: BLE001  CUDA's and Triton's errors are of many kinds, and each means the same
            _log.warning("the GPU cannot be used (%s); images are resized on the CPU", _why(e))
    return 1


def _why(error: Exception) -> str:
    """The error's type and its first line: it comes from a driver or a compiler, never from an image."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"


def _loop(listening: socket.socket, waiting: selectors.BaseSelector, limits: Limits, memory_budget: int) -> None:
    device: Device | None = None
    arenas: dict[socket.socket, Any] = {}
    lender = Lender(memory_budget)
    while True:
        ready = waiting.select(lender.loans.wait(time.monotonic()))
        with deadline(SECONDS):  # what was lent is freed here, by the driver
            asked = _heard(listening, waiting, ready, arenas, lender, limits)
            lender.expire(time.monotonic())
        if asked:
            with deadline(SECONDS if device else FIRST):
                device = device or Device(memory_budget, lender)
                answers = device.serve(asked)
            for ask, answer in zip(asked, answers, strict=True):
                with contextlib.suppress(OSError):  # a worker that has gone is noticed when it is read from
                    ask.connection.send(answer)


def _heard(
    listening: socket.socket,
    waiting: selectors.BaseSelector,
    ready: list[tuple[selectors.SelectorKey, int]],
    arenas: dict[socket.socket, Any],
    lender: Lender,
    limits: Limits,
) -> list[Asked]:
    """What the connections that are ready ask; new ones are taken, and those that are gone forgotten."""
    asked: list[Asked] = []
    for key, _ in ready:
        if key.fileobj is listening:
            connection, _ = listening.accept()
            connection.setblocking(False)
            waiting.register(connection, selectors.EVENT_READ)
            continue
        connection = key.fileobj  # type: ignore[assignment]
        try:
            asked += _hear(connection, arenas, lender, limits)
        except (OSError, ValueError, LookupError, TypeError, AttributeError):  # gone, or not of this version
            waiting.unregister(connection)
            arenas.pop(connection, None)
            lender.hung_up(connection)
            connection.close()
    return asked


def _hear(connection: socket.socket, arenas: dict[socket.socket, Any], lender: Lender, limits: Limits) -> list[Asked]:
    """A worker's arena or its ask, or a relay's order about a loan. Raises OSError, FrameError or ValueError for what is neither."""
    if connection not in arenas:
        order, fds, _, _ = socket.recv_fds(connection, MAX_ASK, 1)
        try:
            if fds:
                arenas[connection] = torch.frombuffer(mapped(fds[0]), dtype=torch.uint8)
            elif order:
                lender.hear(connection, order, time.monotonic())
            else:
                raise ConnectionResetError("the relay has gone")
        finally:
            for fd in fds:
                os.close(fd)
        return []
    text = connection.recv(MAX_ASK)
    if not text:
        raise ConnectionResetError("the worker has ended")
    return [_checked(connection, arenas[connection], parse(text), limits)]


def _checked(connection: socket.socket, memory: Any, ask: Ask, limits: Limits) -> Asked:
    """An ask whose pixels and whose answer lie within the arena. Raises FrameError or ValueError."""
    spec = families.from_json(ask.spec)
    height, width = ask.height, ask.width
    if max(height, width, *ask.original) > limits.max_side:
        raise FrameError("a side over the bound")
    geometry = spec.geometry(*ask.original)
    patches = spec if isinstance(spec, PatchSpec) and not ask.inline else None
    wanted = Wanted(height, width, geometry, spec.resample, patches, planes=not ask.inline)
    asked = Asked(connection, memory, wanted, spec, spec.floats and not ask.inline, ask.loan)
    if max(3 * height * width, 0 if ask.loan else asked.size) > memory.numel() or (ask.loan and ask.inline):
        raise FrameError("an ask beyond its arena")
    return asked
