"""Prepared images by their content, and on their way to the engine: a folder in shared memory that all relay processes share.

A key is the hash of the bytes that came, of what is wanted, of the processor's fingerprint and of the tenant, under a secret of
this sidecar: nobody can learn by timing whether another tenant has sent an image. An entry is one frame of jobs.py. A hit is
mapped, not copied; an entry that is evicted meanwhile stays mapped.

What is handed over has a random name of its own: a second link to an entry, or a file of its own; its reader removes it. For what may
never be read there is a bound, too.

Rules: whatever goes wrong with an entry is a miss, never an error; entries appear whole or not at all; the oldest used ones go
when the folder is full; nothing outlives the sidecar (`sweep` removes what a crash left). All of it touches memory only, yet call
`put` and `hand_over` off the event loop: they copy and may evict.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sidecar.images.protocol import PREFIX, Data, FrameError, ImageDone, head, lengths, parse

# The folder in memory that prepared images lie in. Linux and Kubernetes have shared memory there and nowhere else, and vLLM's plugin looks
# there too (plugins/vllm).
SHM_DIR: Final = "/dev/shm"
PREFIXED: Final = "sidecar-images-"
OUT: Final = "out-"
UNREAD: Final = 600.0  # seconds after which a file that was handed over and never read is removed
WAITING: Final = 1 << 30  # bytes that may wait for readers who may never come
LOCK: Final = "lock"
ROOM: Final = 0.9  # share of the bound that an eviction leaves in use
KNOWN: Final = 1024  # records that a process keeps parsed, about 1 kB each: parsing took a fifth of a hit


@dataclass(frozen=True, slots=True)
class _Entry:
    """What file `inode` holds, which is never written again: a record, and from `start` on its payload."""

    inode: int
    record: ImageDone
    start: int


@dataclass(frozen=True, slots=True)
class SharedFile:
    """A file for another process: its folder's name and its own; the content begins `offset` bytes into its `size`."""

    folder: str
    name: str
    offset: int
    size: int

    def url(self, height: int, width: int) -> str:
        """Where vLLM's plugin finds RGB pixels (plugins/vllm)."""
        return f"sidecar-shm://{self.folder}/{self.name}?h={height}&w={width}&o={self.offset}"


class ImageCache:
    """One folder. `secret` must be the same in all processes that share it."""

    def __init__(self, folder: str, most_bytes: int, secret: bytes) -> None:
        self._folder = Path(folder)
        self._most = most_bytes
        self._secret = secret
        self._known: dict[str, _Entry] = {}  # of entries that were read lately

    def key(self, data: Data, *parts: str) -> str:
        """The name of an image's result; `parts`: all else that it depends on.

        SHA-256, because processors since 2019 have instructions for it: 0.6 ms per MB, half of BLAKE2b's.
        """
        digest = hashlib.sha256(self._secret)
        for text in (part.encode() for part in parts):
            digest.update(len(text).to_bytes(4) + text)
        digest.update(data)
        return digest.hexdigest()

    def get(self, key: str) -> tuple[ImageDone, memoryview] | None:
        """The entry's record and payload; None where there is none."""
        try:
            fd = os.open(f"{self._folder}/{key}", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            with contextlib.suppress(OSError):
                os.utime(fd)
            content = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
            entry, inode = self._known.get(key), os.fstat(fd).st_ino
            if entry is None or entry.inode != inode:
                entry = self._read(content, inode)
                if len(self._known) >= KNOWN:
                    self._known.clear()
                self._known[key] = entry
            return entry.record, memoryview(content)[entry.start :]
        except (OSError, ValueError, FrameError):
            return None
        finally:
            os.close(fd)

    def _read(self, content: mmap.mmap, inode: int) -> _Entry:
        """Raises FrameError where it is none of ours."""
        header, payload = lengths(content[: PREFIX.size], self._most)
        start = PREFIX.size + header
        record = parse(content[PREFIX.size : start])
        if not isinstance(record, ImageDone) or len(content) != start + payload:
            raise FrameError("not a whole entry")
        return _Entry(inode, record, start)

    def put(self, key: str, done: ImageDone, payload: Data) -> None:
        """Keep an entry, and evict what is over the bound. One that is too large by itself is not kept."""
        first = head(done, len(payload))
        size = len(first) + len(payload)
        if size > self._most // 4:
            return
        scratch = self._folder / f".{key}.{secrets.token_hex(4)}"
        try:
            with self._alone():
                self._evict(size)
                fd = _create(scratch, size)
            _fill(fd, scratch, first, payload)
            with self._alone():
                scratch.rename(self._folder / key)
        except OSError:  # the folder is gone, shared memory is full, or others have evicted it already
            scratch.unlink(missing_ok=True)

    def export(self, *pieces: Data, key: str = "") -> SharedFile:
        """A file of a random name with `pieces`; where the entry `key` holds them, a link to it. Raises OSError."""
        path = self._folder / (OUT + secrets.token_hex(16))
        size = sum(map(len, pieces))
        try:
            os.link(self._folder / key, path)
            whole = path.stat().st_size
        except OSError:
            whole = size
            _fill(_create(path, size), path, *pieces)
        return SharedFile(self._folder.name, path.name, whole - size, whole)

    def share(self, *pieces: Data) -> SharedFile:
        """The same for a reader who may never come. Raises OSError also where too much waits for its reader."""
        path = self._folder / (OUT + secrets.token_hex(16))
        size = sum(map(len, pieces))
        with self._alone():
            waiting = sum(s.st_size for s, name in self._files() if name.startswith(OUT) and s.st_nlink == 1)
            if waiting + size > WAITING or size > shutil.disk_usage(self._folder).free // 2:
                raise OSError(errno.ENOSPC, "too much waits for its readers")
            fd = _create(path, size)
        _fill(fd, path, *pieces)
        return SharedFile(self._folder.name, path.name, 0, size)

    def unlink_shared(self, handed: SharedFile) -> None:
        """Remove what was handed over, where its reader has not."""
        (self._folder / handed.name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else counts, reserves or renames in this folder meanwhile. A holder that dies gives it back."""
        fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _files(self) -> Iterator[tuple[os.stat_result, str]]:
        """All files but the lock; what was handed over and never read is removed."""
        now = time.time()
        with os.scandir(self._folder) as found:
            for entry in found:
                try:
                    stat = entry.stat()
                except FileNotFoundError:  # another worker renamed it, or its reader removed it
                    continue
                if entry.name.startswith(OUT) and now - stat.st_ctime > UNREAD:
                    Path(entry.path).unlink(missing_ok=True)
                elif entry.name != LOCK:
                    yield stat, entry.name

    def _evict(self, coming: int) -> None:
        entries = [(stat, name) for stat, name in self._files() if not name.startswith(OUT)]
        used = sum(stat.st_size for stat, _ in entries)
        if used + coming <= self._most:
            return
        for stat, name in sorted(entries, key=lambda entry: entry[0].st_mtime):
            if used + coming <= self._most * ROOM:
                break
            (self._folder / name).unlink(missing_ok=True)
            used -= stat.st_size


class CacheFolder:
    """The folder, made for one run and locked for as long. `path` is "" where there is no room for one; `why` says what failed.

    `needed`: it is made even where nothing is to be kept.
    """

    def __init__(self, shm: str, most_bytes: int, *, needed: bool = False) -> None:
        self.path, self.bytes, self.why = "", 0, ""
        self._lock = -1
        try:
            sweep(shm)
            free = shutil.disk_usage(shm).free
            self.bytes = min(most_bytes, free // 2)  # engines need shared memory, too
            if self.bytes > 0 or needed:
                self.path, self._lock = _locked(shm)
        except OSError as e:
            self.path, self.bytes, self.why = "", 0, e.strerror or type(e).__name__

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


def _locked(shm: str) -> tuple[str, int]:
    """A new folder and the file by which it is locked. Raises OSError."""
    while True:
        path = tempfile.mkdtemp(prefix=PREFIXED, dir=shm)  # mode 0700
        try:
            fd = os.open(Path(path) / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError:
            shutil.rmtree(path, ignore_errors=True)
            raise
        if os.fstat(fd).st_nlink:
            return path, fd
        os.close(fd)  # another sidecar that starts had the lock first, and swept the folder


def _create(path: Path, size: int) -> int:
    """A new file that counts as `size` bytes from now on; its memory is taken as it is filled."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, size)
    except OSError:
        os.close(fd)
        path.unlink(missing_ok=True)
        raise
    return fd


def _fill(fd: int, path: Path, *pieces: Data) -> None:
    """Write all of it. Raises OSError, and leaves no part of it behind."""
    try:
        for piece in pieces:
            _write(fd, piece)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


def _write(fd: int, data: Data) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
