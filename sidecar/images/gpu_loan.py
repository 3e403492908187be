"""A relay's hold on device memory that the GPU's process lends to a client of /v1/preprocess (see worker/gpu_lender.py).

A loan is a connection: it begins with one message, and ends with the connection, whichever side closes it. So nothing that dies, on either
side, leaves memory behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import socket
from collections.abc import AsyncIterator
from typing import ClassVar, Final

from sidecar.errors import ImagesBusy, RequestError

PATIENCE: Final = 5.0  # seconds for the GPU's process to take an order: a batch lasts milliseconds, a first one minutes
KEPT, GONE = b"kept", b"gone"
BUSY: Final = "the GPU's process is busy; try again shortly, or take the tensors another way"


class NoGpu(RequestError):
    """No process here owns a GPU."""

    code = "handoff_not_implemented"
    status: ClassVar[int] = 501


class Loan:
    """One loan, open until `end`, or until the other side ends it."""

    def __init__(self, name: str, connection: socket.socket) -> None:
        self.name = name
        self._connection = connection

    async def over(self) -> None:
        """Wait until it has ended."""
        with contextlib.suppress(OSError):
            await asyncio.get_running_loop().sock_recv(self._connection, 1)

    def end(self) -> None:
        """End it at once."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)


@contextlib.asynccontextmanager
async def borrowed(path: str) -> AsyncIterator[Loan]:
    """A new loan of the GPU's process behind the socket `path`, which ends with the block. Raises NoGpu or ImagesBusy."""
    name = secrets.token_hex(16)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        if await _order(connection, path, "keep", name) != KEPT:
            raise ImagesBusy(BUSY)
        loan = Loan(name, connection)
        try:
            yield loan
        finally:
            loan.end()


async def give_back(path: str, name: str) -> bool:
    """End the loan `name`, whoever holds it. False where there is none. Raises NoGpu or ImagesBusy."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        return await _order(connection, path, "return", name) == GONE


async def _order(connection: socket.socket, path: str, order: str, name: str) -> bytes:
    connection.setblocking(False)
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(PATIENCE):
            await loop.sock_connect(connection, path)
            await loop.sock_sendall(connection, json.dumps([order, name]).encode())
            return await loop.sock_recv(connection, 64)
    except TimeoutError:
        raise ImagesBusy(BUSY) from None
    except OSError:
        text = "no GPU is in use here (--images-device, or it was lost); leave x-sidecar-handoff out, or send shm"
        raise NoGpu(text) from None
