"""Device memory that leaves the GPU's process: pieces that another process opens by their handle, and the connections that hold them.

A relay opens one connection for each loan and says its name; the loan lives no longer than that connection. So whoever is gone, the client,
the relay or the engine for which the relay held it, its memory comes back at once. DELETE comes as a message of its own.
"""

from __future__ import annotations

import base64
import contextlib
import json
import mmap
import os
import socket
from collections.abc import Callable
from typing import Any, Final, Protocol

import torch

from sidecar.images import cuda_ipc as cudaipc
from sidecar.images.protocol import FrameError
from sidecar.images.worker.loan_table import Loans

SECONDS: Final = 30.0  # longest life of a loan: a copy on the device takes milliseconds
KEPT, GONE, REFUSED = b"kept", b"gone", b"refused"


class Piece(Protocol):
    """A piece of device memory."""

    kind: str  # "cuda-ipc", or "memfd" where the interpreter stands in for a GPU
    device: str  # its UUID
    handle: bytes  # what another process opens it with
    tensor: Any  # uint8, one dimension

    def free(self) -> None: ...


class CudaPiece:
    """A piece of a CUDA device's memory."""

    kind = "cuda-ipc"

    def __init__(self, size: int) -> None:
        self._pointer = cudaipc.allocate(size)
        self.handle = cudaipc.handle_of(self._pointer)
        self.device = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
        self.tensor = torch.as_tensor(cudaipc.View(self._pointer, size), device="cuda")

    def free(self) -> None:
        self.tensor = None
        cudaipc.free(self._pointer)


class HostPiece:
    """What stands in for it in Triton's interpreter: a file in memory, opened by process and number."""

    kind = "memfd"
    device = "interpreter"

    def __init__(self, size: int) -> None:
        self._fd = os.memfd_create("sidecar-loan", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, size)
        self.handle = f"{os.getpid()}/{self._fd}".encode().ljust(cudaipc.HANDLE)
        self.tensor = torch.frombuffer(mmap.mmap(self._fd, size), dtype=torch.uint8)

    def free(self) -> None:
        self.tensor = None
        os.close(self._fd)


def allocator(kind: Callable[[int], Piece]) -> Callable[[int], Piece | None]:
    """A function: bytes -> a piece, None where the device has no memory for it."""

    def allocate(size: int) -> Piece | None:
        try:
            return kind(size)
        except cudaipc.CudaError as e:
            if e.code != cudaipc.OUT_OF_MEMORY:
                raise
            return None

    return allocate


class Lender:
    """All loans of this process, within `budget` bytes, and the connections that hold them."""

    def __init__(self, budget: int, seconds: float = SECONDS) -> None:
        self.loans: Loans[Piece] = Loans(budget, cudaipc.GRAIN)
        self._seconds = seconds
        self._holders: dict[socket.socket, str] = {}

    def hear(self, connection: socket.socket, text: bytes, now: float) -> None:
        """Open a loan that lives as long as the connection, or end one. Raises FrameError, LookupError or OSError: hang up then."""
        order, name = _parsed(text)
        if order == "return":
            ended = self._end(name)
            connection.send(GONE if ended else REFUSED)
        elif connection not in self._holders and self.loans.open(name, now + self._seconds):
            self._holders[connection] = name
            connection.send(KEPT)
        else:
            connection.send(REFUSED)

    def hung_up(self, connection: socket.socket) -> None:
        """A connection is gone, and the loan that it held."""
        name = self._holders.pop(connection, "")
        for piece in self.loans.end(name):
            piece.free()

    def expire(self, now: float) -> None:
        """End the loans whose time is over."""
        for name in self.loans.due(now):
            self._end(name)

    def _end(self, name: str) -> bool:
        """End a loan from this side: its holder is told by the end of its connection."""
        for connection in [c for c, held in self._holders.items() if held == name]:
            self.hung_up(connection)
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            return True
        return False


def described(piece: Piece, size: int) -> bytes:
    """What opens a piece, of which `size` bytes are the tensor's."""
    handle = base64.b64encode(piece.handle).decode()
    return json.dumps(
        {"kind": piece.kind, "device": piece.device, "handle": handle, "offset": 0, "bytes": size}
    ).encode()


def _parsed(text: bytes) -> tuple[str, str]:
    try:
        order, name = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        raise FrameError("not an order") from None
    if order not in ("keep", "return") or not isinstance(name, str):
        raise FrameError("not an order")
    return order, name
