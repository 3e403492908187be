"""The protocol between an image worker and the process that owns the GPU: decoded pixels go in, resized ones come back.

Rules: workers decode the bytes from outside; the GPU process sees only pixels and numbers. Pixels travel in shared
memory that the worker created and sealed, so that it cannot shrink under a reader. The GPU process checks every
request. Any request may be refused, and a refusal costs only time: the worker then resizes the image itself. A full
budget and a lost, starting or missing GPU are therefore the same case: None. After a timeout the worker stops asking
for a while, and leaves the shared memory alone until the answer has come: the GPU may still be writing.

A worker connects before it is confined, since it cannot connect later. The GPU process may come afterwards: it greets
whom it accepts, and no request is sent before. A worker whose connection is lost ends after its job, and its successor
connects again.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import msgspec

from sidecar.images.protocol import FrameError

ARENA_BYTES: Final = 64 << 20  # 12 MP take 36 MB; larger ones are resized on the CPU. Untouched pages cost nothing.
GPU_TIMEOUT_S: Final = 0.25  # ten times what the CPU needs for 1080p
GPU_BACKOFF_S: Final = (1.0, 30.0)  # first and longest pause after a failed request
MAX_REQUEST_BYTES: Final = 8192
OK, FULL, READY = b"ok", b"full", b"ready"
RELEASE: Final = b"release"  # instead of an arena: the engine needs its GPU
SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
GPU_SOCKET_SUFFIX: Final = ".gpu"  # appended to the image server's socket name: the socket of the GPU process


@dataclass(frozen=True, slots=True)
class GpuRequest:
    """One image, whose RGB bytes are at the beginning of the arena. `spec` is ProcessorSpec.to_json().

    With `sampling`, it is a JPEG's coefficients instead, as kernels/jpeg.py has them; `tables` are its quantisation
    tables. The result replaces them: RGB rows if `inline`, else the processor's output.
    """

    height: int
    width: int
    spec: str
    inline: bool
    sampling: tuple[tuple[int, int], ...] = ()
    tables: tuple[tuple[int, ...], ...] = ()

    def to_json(self) -> bytes:
        return msgspec.json.encode(self)


_decoder: Final = msgspec.json.Decoder(GpuRequest)


def parse_request(text: bytes) -> GpuRequest:
    """Inverse of GpuRequest.to_json. Raises FrameError."""
    try:
        request = _decoder.decode(text)
        if request.height > 0 and request.width > 0:
            return request
    except (msgspec.MsgspecError, UnicodeDecodeError):
        pass
    raise FrameError("not a GPU request")


def make_arena() -> int:
    """Create a file in memory that can neither grow nor shrink."""
    fd = os.memfd_create("sidecar-pixels", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, ARENA_BYTES)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    return fd


def map_arena(fd: int) -> mmap.mmap:
    """Map a worker's arena in the GPU process. Raises FrameError if it could shrink or has another size."""
    try:
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS == SEALS and os.fstat(fd).st_size == ARENA_BYTES:
            return mmap.mmap(fd, ARENA_BYTES)
    except OSError:
        pass
    raise FrameError("not a sealed arena")


def release(server_path: str) -> None:
    """Ask the GPU process of an image server to end, if there is one with a context. Never waits, never raises."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.setblocking(False)
        connection.connect(server_path + GPU_SOCKET_SUFFIX)
        connection.send(RELEASE)


class GpuChannel:
    """A worker's connection to the GPU process at the socket `path`."""

    def __init__(self, path: str, timeout_s: float = GPU_TIMEOUT_S, now: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._timeout_s = timeout_s
        self._now = now
        self._fd = make_arena()
        self._memory = mmap.mmap(self._fd, ARENA_BYTES)
        self._connection: socket.socket | None = None
        self._greeted = False
        self._answer_pending = False
        self.lost = False
        self._backoff_s = GPU_BACKOFF_S[0]
        self._retry_at = 0.0

    def open(self) -> None:
        """Connect if the socket is there. Later calls do so, too, but a confined process cannot."""
        with contextlib.suppress(OSError):
            self._connect()

    @property
    def descriptors(self) -> tuple[int, ...]:
        """The open files that it needs."""
        return (self._fd, self._connection.fileno()) if self._connection is not None else (self._fd,)

    def process(
        self, write: Callable[[memoryview], bool], source_bytes: int, request: GpuRequest, size: int
    ) -> memoryview | None:
        """Process an image on the GPU: `size` bytes, valid until the next call; None if the CPU must do it.

        `write` puts the image's `source_bytes` into the memory that it is given, or returns False.
        """
        if max(source_bytes, size) > ARENA_BYTES or self._now() < self._retry_at:
            return None
        try:
            connection = self._connect()
            if not self._is_greeted(connection) or not write(memoryview(self._memory)[:source_bytes]):
                return None
            connection.send(request.to_json())
            self._answer_pending = True
            answer = self._receive_answer(connection, self._timeout_s)
        except OSError as e:
            if not isinstance(e, TimeoutError):
                self._disconnect()
            self._retry_at = self._now() + self._backoff_s
            self._backoff_s = min(2 * self._backoff_s, GPU_BACKOFF_S[1])
            return None
        self._backoff_s = GPU_BACKOFF_S[0]
        return memoryview(self._memory)[:size] if answer == OK else None

    def _connect(self) -> socket.socket:
        """A connection with a free arena. Raises TimeoutError while the GPU may still write to it, OSError if lost."""
        if self._connection is not None:
            if self._answer_pending:
                self._receive_answer(self._connection, 0)
            return self._connection
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._connection.settimeout(self._timeout_s)
        self._connection.connect(self._path)
        socket.send_fds(self._connection, [b"arena"], [self._fd])
        return self._connection

    def _is_greeted(self, connection: socket.socket) -> bool:
        """Whether the GPU process has accepted the connection. Raises OSError if it never will."""
        if not self._greeted:
            try:
                self._greeted = self._receive_answer(connection, 0) == READY
            except TimeoutError:
                return False
        return self._greeted

    def _receive_answer(self, connection: socket.socket, seconds: float) -> bytes:
        """The pending answer. Raises TimeoutError if it is late, OSError if it will never come."""
        connection.settimeout(seconds)
        try:
            answer = connection.recv(MAX_REQUEST_BYTES)
        except BlockingIOError:
            raise TimeoutError from None
        if not answer:
            raise ConnectionResetError("the GPU process closed the connection")
        connection.settimeout(self._timeout_s)
        self._answer_pending = False
        return answer

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self.lost = True
        self._connection, self._greeted, self._answer_pending = None, False, False

    def close(self) -> None:
        """Disconnect and free the memory, once the last answer in it is no longer used."""
        self._disconnect()
        os.close(self._fd)
