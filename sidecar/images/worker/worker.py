"""An image worker: a forked process that accepts connections from the shared listening socket and does one job on each.

Rules: no job outlives its deadline, nor the CPU time that its size explains. Both are timers whose signal keeps its
default action, so that they also end C code that never returns: the relay sees the connection break, and the server
forks another worker. The process has bounded memory and few files, writes none, leaves no core, has no privileges, and
dies with its server. A relay that is slow to send or to read is disconnected.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from sidecar.images import protocol
from sidecar.images.protocol import Data, Frame, FrameError, ImageJob, ImageLimits, VideoJob, WorkerReady, encode_head
from sidecar.images.worker import sandbox
from sidecar.runtime.prctl import die_with

PrepareImage = Callable[[ImageJob, bytearray, memoryview | None], tuple[Frame, Data]]
Prepare = Callable[[ImageJob | VideoJob, bytearray, memoryview | None], tuple[Frame, Data]]

CLIENT_TIMEOUT_S = 10.0  # in which a relay must send or read
JOBS_PER_LIFE = 5_000  # a new process then takes over, so that no leak of a codec grows forever
# Of one job. The slowest sound files (16-bit PNG, lossless WebP, many tiles) take 0.1 µs per pixel.
CPU_BASE_S, CPU_PER_PIXEL_S, MAX_CPU_S = 1.5, 0.25e-6, 8.0
CPU_PER_LIFE_S = 3600  # 5,000 large photographs take 250 s: this ends a worker that has been taken over
MAX_OPEN_FILES = 64
BYTES_PER_PIXEL = 40  # the worst case: Pillow's RGBA, its flattened copy, the tensor, and its fp32 patches
RETAINED_BYTES = 128 << 20  # freed memory that is kept: 12 megapixels are 36 MB, their patches up to 23 MB
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h

_MAP_FAILED = ctypes.c_void_p(-1).value
_libc = ctypes.CDLL(None)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def serve(
    listening: socket.socket, prepare: Prepare, limits: ImageLimits, is_worn: Callable[[], bool] = lambda: False
) -> int:
    """Serve JOBS_PER_LIFE connections; fewer if the worker is worn out, by `is_worn` or its CPU time. Returns 0."""
    for _ in range(JOBS_PER_LIFE):
        connection, _ = listening.accept()
        with connection, contextlib.suppress(OSError, FrameError):  # the relay has exited, or sent no job
            connection.settimeout(CLIENT_TIMEOUT_S)
            _serve_one(connection, prepare, limits)
        if is_worn() or time.process_time() > CPU_PER_LIFE_S / 2:
            break
    return 0


def _serve_one(connection: socket.socket, prepare: Prepare, limits: ImageLimits) -> None:
    connection.sendall(encode_head(WorkerReady()))
    with contextlib.ExitStack() as stack:
        # at most the largest image as base64, including line ends
        job, payload, file = _receive(connection, limits.max_bytes * 3 // 2 + 1024, stack)
        into = stack.enter_context(_mapped(file, job.file_bytes)) if job.file_bytes else None
        limit_cpu(0)
        with deadline(job.seconds):
            answer, out = prepare(job, payload, into)
    connection.sendall(encode_head(answer, len(out)))
    connection.sendall(out)


def _receive(
    connection: socket.socket, max_payload: int, stack: contextlib.ExitStack
) -> tuple[ImageJob | VideoJob, bytearray, int]:
    """One job, its payload, and its open file, or -1; `stack` closes that. Raises FrameError or OSError."""
    start, files, _, _ = socket.recv_fds(connection, protocol.PREFIX.size, 1)
    for file in files:
        stack.callback(os.close, file)
    if not start:
        raise ConnectionResetError("the relay closed the connection")
    header, size = protocol.decode_prefix(_read_exactly(connection, protocol.PREFIX.size, start), max_payload)
    job = protocol.decode_header(_read_exactly(connection, header))
    if not isinstance(job, ImageJob | VideoJob) or (job.file_bytes and len(files) != 1):
        raise FrameError("not a job")
    return job, _read_exactly(connection, size), files[0] if files else -1


@contextlib.contextmanager
def _mapped(file: int, size: int) -> Iterator[memoryview]:
    """The first `size` bytes of an open file in shared memory. Raises FrameError if it has fewer.

    By the C library, since Python's `mmap` asks for the file's state and duplicates its descriptor, which the sandbox
    does not allow.
    """
    if os.lseek(file, 0, os.SEEK_END) < size:
        raise FrameError("not the file of this job")
    # its pages exist already (shm_cache.reserve): they are mapped at once, not with one fault each
    flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
    address = _libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, file, 0)
    if address in (None, _MAP_FAILED):
        raise FrameError("the file of this job cannot be mapped")
    try:
        yield memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")
    finally:
        _libc.munmap(address, size)


def _read_exactly(connection: socket.socket, size: int, start: bytes = b"") -> bytearray:
    """The next `size` bytes, of which `start` was read before."""
    data = bytearray(size)
    data[: len(start)] = start
    view = memoryview(data)[len(start) :]
    while view:
        received = connection.recv_into(view)
        if not received:
            raise ConnectionResetError("the relay closed the connection")
        view = view[received:]
    return data


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Kill this process if the block takes longer."""
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)


def limit_cpu(pixels: int) -> None:
    """Kill this process if it uses more CPU time from now on than an image of this size may take.

    It counts the time of all threads, and not that in which a busy machine lets others run. The deadline ends the job
    in any case.
    """
    signal.setitimer(signal.ITIMER_PROF, min(CPU_BASE_S + CPU_PER_PIXEL_S * pixels, MAX_CPU_S))


def confine(limits: ImageLimits, descriptors: Iterable[int]) -> tuple[str, ...]:
    """Limit the process to what a worker needs; `descriptors` stay open. Returns what could not be done, in words.

    The log keeps its descriptor.
    """
    _retain_freed_memory()
    _silence_stderr()
    _lower_limit(resource.RLIMIT_CPU, CPU_PER_LIFE_S)
    _lower_limit(resource.RLIMIT_CORE, 0)
    _lower_limit(resource.RLIMIT_FSIZE, 0)
    _lower_limit(resource.RLIMIT_NOFILE, MAX_OPEN_FILES)
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])  # of address space in use now
        _lower_limit(resource.RLIMIT_AS, pages * resource.getpagesize() + memory_bound(limits))
    return sandbox.enter((*descriptors, sys.stderr.fileno()))


def bind_to(server: int) -> None:
    """Die with the server, ignore Ctrl-C, drop all privileges, and let a deadline's signal kill this process."""
    for limit in (signal.SIGALRM, signal.SIGPROF, signal.SIGXCPU):
        signal.signal(limit, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with(server)
    if sys.platform == "linux":
        sandbox.drop_capabilities()


def _retain_freed_memory() -> None:
    """Reuse freed memory (glibc): the first touch of fresh pages takes a third of a decoder's time."""
    with contextlib.suppress(AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, RETAINED_BYTES)


def _silence_stderr() -> None:
    """Discard what codecs write to file 2 for every damaged image; the log keeps a copy of the descriptor."""
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)


def memory_bound(limits: ImageLimits) -> int:
    """Bytes that one job may allocate."""
    return (256 << 20) + 4 * limits.max_bytes + BYTES_PER_PIXEL * limits.max_pixels


def _lower_limit(what: int, maximum: int) -> None:
    hard = resource.getrlimit(what)[1]
    maximum = maximum if hard == resource.RLIM_INFINITY else min(maximum, hard)
    resource.setrlimit(what, (maximum, maximum))
