"""Prepared images by their content: a bounded folder in shared memory that all relay processes read and write.

A key is the hash of the bytes that came, of what is wanted, of the processor's fingerprint and of the tenant, under a secret of
this sidecar: nobody can learn by timing whether another tenant has sent an image. An entry is one frame of jobs.py. A hit is
mapped, not copied; an entry that is evicted meanwhile stays mapped.

Rules: whatever goes wrong is a miss, never an error; entries appear whole or not at all; the oldest used ones go when the folder
is full; nothing outlives the sidecar (`sweep` removes what a crash left). `get` and `put` touch memory only, yet call `put` off
the event loop: it copies and may evict.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

from sidecar.jobs import PREFIX, Data, Done, FrameError, head, lengths, parse

PREFIXED: Final = "sidecar-images-"
LOCK: Final = "lock"
ROOM: Final = 0.9  # share of the bound that an eviction leaves in use


class ImageCache:
    """One folder. `secret` must be the same in all processes that share it."""

    def __init__(self, folder: str, most_bytes: int, secret: bytes) -> None:
        self._folder = Path(folder)
        self._most = most_bytes
        self._secret = secret

    def key(self, data: Data, *parts: str) -> str:
        """The name of an image's result; `parts`: all else that it depends on.

        SHA-256, because processors since 2019 have instructions for it: 0.6 ms per MB, half of BLAKE2b's.
        """
        digest = hashlib.sha256(self._secret)
        for text in (part.encode() for part in parts):
            digest.update(len(text).to_bytes(4) + text)
        digest.update(data)
        return digest.hexdigest()

    def get(self, key: str) -> tuple[Done, memoryview] | None:
        """The entry's record and payload; None where there is none."""
        try:
            fd = os.open(self._folder / key, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            with contextlib.suppress(OSError):
                os.utime(fd)
            content = memoryview(mmap.mmap(fd, 0, prot=mmap.PROT_READ))
            header, payload = lengths(content[: PREFIX.size], self._most)
            record = parse(bytes(content[PREFIX.size : PREFIX.size + header]))
            start = PREFIX.size + header
            if not isinstance(record, Done) or len(content) != start + payload:
                return None
            return record, content[start:]
        except (OSError, ValueError, FrameError):
            return None
        finally:
            os.close(fd)

    def put(self, key: str, done: Done, payload: Data) -> None:
        """Keep an entry, and evict what is over the bound. One that is too large by itself is not kept."""
        first = head(done, len(payload))
        size = len(first) + len(payload)
        if size > self._most // 4:
            return
        scratch = self._folder / f".{key}.{os.getpid()}"
        try:
            self._evict(size)
            fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "wb", buffering=0) as file:
                _write(file.fileno(), first)
                _write(file.fileno(), payload)
            scratch.rename(self._folder / key)
        except OSError:  # the folder is gone, or shared memory is full
            scratch.unlink(missing_ok=True)

    def _evict(self, coming: int) -> None:
        entries = [(e.stat(), e.name) for e in os.scandir(self._folder) if e.name != LOCK]
        used = sum(s.st_size for s, _ in entries)
        if used + coming <= self._most:
            return
        for stat, name in sorted(entries, key=lambda entry: entry[0].st_mtime):
            if used + coming <= self._most * ROOM:
                break
            with contextlib.suppress(FileNotFoundError):
                (self._folder / name).unlink()
            used -= stat.st_size


class Folder:
    """The folder, made for one run and locked for as long. `path` is "" where there is no room for one."""

    def __init__(self, shm: str, most_bytes: int) -> None:
        self.path, self.bytes = "", 0
        self._lock = -1
        try:
            sweep(shm)
            free = shutil.disk_usage(shm).free
            self.bytes = min(most_bytes, free // 2)  # engines need shared memory, too
            if self.bytes > 0:
                self.path = tempfile.mkdtemp(prefix=PREFIXED, dir=shm)  # mode 0700
                self._lock = os.open(Path(self.path) / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
                fcntl.flock(self._lock, fcntl.LOCK_EX)
        except OSError:
            self.path, self.bytes = "", 0

    def close(self) -> None:
        """Remove it."""
        if self.path:
            shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)


def sweep(shm: str) -> None:
    """Remove folders of ours whose sidecar is gone: nobody holds their lock."""
    for folder in Path(shm).glob(PREFIXED + "*"):
        try:
            fd = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue  # another user's, or one that is just being made
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue
        finally:
            os.close(fd)


def _write(fd: int, data: Data) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
