"""The cache of prepared images, and files for other processes: one folder in shared memory for all relay processes.

A key is a hash of the received bytes, the kind of result, the processor's fingerprint and the tenant, keyed by a secret
of this sidecar: response times do not reveal whether another tenant has sent an image. An entry is one frame of
protocol.py. A hit is mapped, not copied, and stays mapped if the entry is evicted. A file for another process has a
random name: a second link to an entry, or a separate file. Its reader unlinks it; unread files are bounded.

Rules: a problem with an entry is a miss, never an error. Entries appear whole or not at all. A full folder evicts the
least recently used entries. Nothing outlives the sidecar: the next start removes what a crash left. Call `put`,
`export` and `share` off the event loop: they copy and may evict.
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
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sidecar.images.protocol import PREFIX, Data, FrameError, ImageDone, decode_header, decode_prefix, encode_head
from sidecar.runtime import locked_folder

# Where Linux and Kubernetes mount shared memory, and where vLLM's plugin looks (plugins/vllm).
SHM_DIR: Final = "/dev/shm"
FOLDER_PREFIX: Final = "sidecar-images-"
SHARED_PREFIX: Final = "out-"
UNREAD_TIMEOUT_S: Final = 600.0  # after which an exported file that no one has read is removed
MAX_UNREAD_BYTES: Final = 1 << 30  # total of shared files that may wait for readers that may never come
EVICTION_TARGET: Final = 0.9  # fraction of the limit that an eviction leaves in use
MAX_PARSED_ENTRIES: Final = 1024  # per process, about 1 kB each: parsing took a fifth of the time of a hit


@dataclass(frozen=True, slots=True)
class SharedFile:
    """A file for another process: its folder's name and its own; the content begins `offset` bytes into its `size`."""

    folder: str
    name: str
    offset: int
    size: int

    def url(self, height: int, width: int) -> str:
        """The URL by which vLLM's plugin finds RGB pixels (plugins/vllm)."""
        return f"sidecar-shm://{self.folder}/{self.name}?h={height}&w={width}&o={self.offset}"


class ImageCache:
    """The cache in one folder. `secret` must be the same in all processes that share it."""

    def __init__(self, folder: str, max_bytes: int, secret: bytes) -> None:
        self._folder = Path(folder)
        self._max_bytes = max_bytes
        self._secret = secret
        self._mode = 0o600
        with contextlib.suppress(OSError):  # a folder that is gone is a miss at each use
            self._mode |= self._folder.stat().st_mode & 0o040
        # by key and inode, as a file never changes: its record, and where its payload starts
        self._parsed: dict[tuple[str, int], tuple[ImageDone, int]] = {}

    def key(self, data: Data, *parts: str) -> str:
        """The key of an image's result; `parts`: everything else that it depends on.

        SHA-256, because processors since 2019 have instructions for it: 0.6 ms per MB, half of BLAKE2b's time.
        """
        digest = hashlib.sha256(self._secret)
        for text in (part.encode() for part in parts):
            digest.update(len(text).to_bytes(4) + text)
        digest.update(data)
        return digest.hexdigest()

    def get(self, key: str) -> tuple[ImageDone, memoryview] | None:
        """The entry's record and payload, or None."""
        try:
            fd = os.open(f"{self._folder}/{key}", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            with contextlib.suppress(OSError):
                os.utime(fd)
            content = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
            file = key, os.fstat(fd).st_ino
            if file not in self._parsed:
                if len(self._parsed) >= MAX_PARSED_ENTRIES:
                    self._parsed.clear()
                self._parsed[file] = self._read(content)
            record, start = self._parsed[file]
            return record, memoryview(content)[start:]
        except (OSError, ValueError, FrameError):
            return None
        finally:
            os.close(fd)

    def _read(self, content: mmap.mmap) -> tuple[ImageDone, int]:
        """Parse an entry. Raises FrameError if it is invalid."""
        header, payload = decode_prefix(content[: PREFIX.size], self._max_bytes)
        start = PREFIX.size + header
        record = decode_header(content[PREFIX.size : start])
        if not isinstance(record, ImageDone) or len(content) != start + payload:
            raise FrameError("incomplete entry")
        return record, start

    def put(self, key: str, done: ImageDone, payload: Data) -> None:
        """Store an entry and evict others if needed. An entry of more than a quarter of the limit is not stored."""
        first = encode_head(done, len(payload))
        size = len(first) + len(payload)
        if size > self._max_bytes // 4:
            return
        scratch = self._folder / f".{key}.{secrets.token_hex(4)}"
        try:
            with self._exclusive():
                self._evict(size)
                fd = _create(scratch, size, self._mode)
            _fill(fd, scratch, first, payload)
            with self._exclusive():
                scratch.rename(self._folder / key)
        except OSError:  # the folder is gone, shared memory is full, or the file is already evicted
            scratch.unlink(missing_ok=True)

    def export(self, *pieces: Data, key: str = "") -> SharedFile:
        """A new file with `pieces`: a link to the entry `key` if that still exists. Raises OSError."""
        path = self._folder / (SHARED_PREFIX + secrets.token_hex(16))
        size = sum(map(len, pieces))
        try:
            os.link(self._folder / key, path)
            whole = path.stat().st_size
        except OSError:
            whole = size
            _fill(_create(path, size, self._mode), path, *pieces)
        return SharedFile(self._folder.name, path.name, whole - size, whole)

    def share(self, *pieces: Data) -> SharedFile:
        """A new file for a reader that may never come. Raises OSError, also if too much is unread."""
        path = self._folder / (SHARED_PREFIX + secrets.token_hex(16))
        size = sum(map(len, pieces))
        with self._exclusive():
            unread = sum(s.st_size for s, name in self._files() if name.startswith(SHARED_PREFIX) and s.st_nlink == 1)
            if unread + size > MAX_UNREAD_BYTES or size > shutil.disk_usage(self._folder).free // 2:
                raise OSError(errno.ENOSPC, "too many unread bytes")
            fd = _create(path, size, self._mode)
        _fill(fd, path, *pieces)
        return SharedFile(self._folder.name, path.name, 0, size)

    def reserve(self, size: int) -> tuple[SharedFile, int]:
        """A new file of `size` bytes whose memory is allocated, and its open descriptor. Raises OSError if too little.

        A worker that wrote to a file without memory behind it would die of SIGBUS where shared memory is full.
        """
        path = self._folder / (SHARED_PREFIX + secrets.token_hex(16))
        if size > shutil.disk_usage(self._folder).free // 2:
            raise OSError(errno.ENOSPC, "too little shared memory")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(fd, self._mode)
            os.posix_fallocate(fd, 0, size)
        except OSError:
            os.close(fd)
            path.unlink(missing_ok=True)
            raise
        return SharedFile(self._folder.name, path.name, 0, size), fd

    def unlink_shared(self, file: SharedFile) -> None:
        """Unlink a shared file if its reader has not done so."""
        (self._folder / file.name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Lock the folder against counting, reserving and renaming by others. A holder that dies releases the lock."""
        fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _files(self) -> Iterator[tuple[os.stat_result, str]]:
        """All files but the lock; expired unread files are removed."""
        now = time.time()
        with os.scandir(self._folder) as found:
            for entry in found:
                try:
                    status = entry.stat()
                except FileNotFoundError:  # another worker renamed it, or its reader removed it
                    continue
                if entry.name.startswith(SHARED_PREFIX) and now - status.st_ctime > UNREAD_TIMEOUT_S:
                    Path(entry.path).unlink(missing_ok=True)
                elif entry.name != locked_folder.LOCK_NAME:
                    yield status, entry.name

    def _evict(self, incoming: int) -> None:
        entries = [(found, name) for found, name in self._files() if not name.startswith(SHARED_PREFIX)]
        used = sum(found.st_size for found, _ in entries) + incoming
        if used <= self._max_bytes:
            return
        for found, name in sorted(entries, key=lambda entry: entry[0].st_mtime):
            if used > self._max_bytes * EVICTION_TARGET:
                (self._folder / name).unlink(missing_ok=True)
                used -= found.st_size


class CacheFolder:
    """A folder that is created for one run and locked during it. `path` is "" if there is no room; `why`: what failed.

    `needed`: create it even if nothing is to be cached.
    """

    def __init__(self, shm: str, max_bytes: int, *, needed: bool = False) -> None:
        self.path, self.bytes, self.why = "", 0, ""
        self._lock = -1
        try:
            locked_folder.sweep(shm, FOLDER_PREFIX)
            free = shutil.disk_usage(shm).free
            self.bytes = min(max_bytes, free // 2)  # engines need shared memory, too
            if self.bytes > 0 or needed:
                self.path, self._lock = locked_folder.make(shm, FOLDER_PREFIX)
                if shared_group(shm) >= 0:  # the folder has it already; its members read files, and unlink them
                    Path(self.path).chmod(0o2770)
        except OSError as e:
            self.path, self.bytes, self.why = "", 0, e.strerror or type(e).__name__

    def close(self) -> None:
        """Remove it."""
        if self.path:
            locked_folder.remove(self.path, self._lock)


def shared_group(shm: str) -> int:
    """The group that may read what is handed over: that of a volume with a group of its own (fsGroup); else -1."""
    found = Path(shm).stat()
    is_member = found.st_gid in {os.getegid(), *os.getgroups()}
    return found.st_gid if found.st_mode & stat.S_ISGID and is_member else -1


def _create(path: Path, size: int, mode: int) -> int:
    """Create a file of `size` bytes; its memory is allocated as it is written."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(fd, mode)  # regardless of the umask
        os.ftruncate(fd, size)
    except OSError:
        os.close(fd)
        path.unlink(missing_ok=True)
        raise
    return fd


def _fill(fd: int, path: Path, *pieces: Data) -> None:
    """Write all pieces. Raises OSError, and then leaves no file behind."""
    try:
        with os.fdopen(fd, "wb") as file:
            file.writelines(pieces)
    except OSError:
        path.unlink(missing_ok=True)
        raise
