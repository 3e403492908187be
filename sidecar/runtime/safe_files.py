"""Files in a directory where someone else may write: nothing is followed, nothing of others is opened for writing.

A link in the place of a folder or a file raises OSError (ELOOP, ENOTDIR), except where the file is replaced: then the
link goes, and what it pointed to stays as it was.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

# The engine's container often runs as another user.
READABLE: Final = 0o644
# Of files that are not whole yet: `.verdict.json.9f2c...tmp`.
SCRATCH_PATTERN: Final = ".*.tmp"
_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def replace(path: Path, data: bytes) -> None:
    """Write a file atomically: a reader sees the old or the new content."""
    with _folder(path.parent) as folder:
        scratch = f".{path.name}.{os.urandom(8).hex()}.tmp"
        try:
            with os.fdopen(os.open(scratch, _NEW, READABLE, dir_fd=folder), "wb") as file:
                os.fchmod(file.fileno(), READABLE)
                file.write(data)
            os.replace(scratch, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        except OSError:
            with suppress(OSError):
                os.unlink(scratch, dir_fd=folder)
            raise


def touch(path: Path) -> None:
    """Make a file exist, empty, with the present as its time. A link there is removed."""
    with _folder(path.parent) as folder:
        for flags in (os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, _NEW):
            try:
                fd = os.open(path.name, flags, READABLE, dir_fd=folder)
            except FileNotFoundError:
                continue
            except OSError as e:
                if e.errno != errno.ELOOP:
                    raise
                os.unlink(path.name, dir_fd=folder)
                continue
            os.utime(fd)
            os.close(fd)
            return


def read(path: Path, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes. Raises OSError, ValueError."""
    with _folder(path.parent) as folder:
        fd = os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ValueError("not a file")
            data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"more than {limit} bytes")
    return data


def make_folder(path: Path) -> None:
    """Make a folder if there is none. Raises OSError where something else is in its place."""
    with suppress(FileExistsError):
        path.mkdir()
    with _folder(path):
        pass


def require_no_link(path: Path) -> None:
    """Raise OSError if a path is a symbolic link: for libraries that would follow it."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


@contextmanager
def _folder(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
