"""Opens what `sidecar.client.preprocess` was lent: tensors of torch in the memory of the sidecar's GPU process, without a copy.

    async with client.lend([Path("a.jpg")]) as loan:
        with opened(loan) as tensors:
            batch = torch.cat(tensors)  # a copy of one's own, before the loan ends

Needs torch. A tensor may not be touched after its block: the memory is somebody else's then. The sidecar and this process must see the same
GPU, and in containers share the IPC namespace (hostIPC).
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator
from typing import Any, Final

import torch

from sidecar.client.preprocess import Lent, Loan, PreprocessError
from sidecar.images import cuda_ipc as cudaipc

TYPES: Final = {"U8": torch.uint8, "F32": torch.float32, "I64": torch.int64}


@contextlib.contextmanager
def opened(loan: Loan) -> Iterator[list[Any]]:
    """`pixel_values` of each image, in order. Raises PreprocessError where they cannot be opened here."""
    with contextlib.ExitStack() as stack:
        try:
            tensors = [_shaped(stack.enter_context(_octets(piece)), piece) for piece in loan.pixel_values]
        except (OSError, ValueError, cudaipc.CudaError) as e:
            raise PreprocessError(f"what was lent cannot be opened here: {e}", "loan_unreadable") from None
        try:
            yield tensors
        finally:
            tensors.clear()


def _shaped(octets: Any, piece: Lent) -> Any:
    return octets.view(TYPES[piece.dtype]).reshape(piece.shape)


def _octets(piece: Lent) -> contextlib.AbstractContextManager[Any]:
    if piece.kind == "memfd":
        return _in_memory(piece)
    if piece.kind == "cuda-ipc":
        return _on_device(piece)
    raise ValueError(f"memory of the kind {piece.kind[:16]!a}")


@contextlib.contextmanager
def _on_device(piece: Lent) -> Iterator[Any]:
    with torch.cuda.device(_index(piece.device)):
        torch.cuda.synchronize()  # makes the context in which the handle is opened
        pointer = cudaipc.opened(piece.handle)
        try:
            yield torch.as_tensor(cudaipc.View(pointer + piece.offset, piece.size), device="cuda")
        finally:
            torch.cuda.synchronize()  # whatever still reads it
            cudaipc.close(pointer)


def _index(uuid: str) -> int:
    """The device of this UUID, by the number that it has in this process."""
    for index in range(torch.cuda.device_count()):
        if f"GPU-{torch.cuda.get_device_properties(index).uuid}" == uuid:
            return index
    raise ValueError(f"the sidecar's GPU {uuid[:60]!a} is not visible in this process")


@contextlib.contextmanager
def _in_memory(piece: Lent) -> Iterator[Any]:
    """What stands in for a device in Triton's interpreter: a file of another process, for tests."""
    process, _, number = piece.handle.decode().strip().partition("/")
    fd = os.open(f"/proc/{int(process)}/fd/{int(number)}", os.O_RDWR | os.O_CLOEXEC)
    try:
        memory = mmap.mmap(fd, piece.offset + piece.size)
    finally:
        os.close(fd)
    yield torch.frombuffer(memory, dtype=torch.uint8, offset=piece.offset, count=piece.size)
