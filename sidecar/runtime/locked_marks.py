"""Small files that another process keeps locked while it runs: their contents, and none of one that has ended.

The lock is only queried, never taken, so nothing here can block who holds it. No link is followed. Never waits.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Final

MAX_MARKS: Final = 64
MAX_MARK_BYTES: Final = 4096
_FLOCK_FORMAT: Final = "hhqqi"  # struct flock: type, whence, start, length, pid


def read_marks(folder: str | Path, prefix: str) -> Iterator[bytes]:
    """The contents of the files in a folder whose names begin so and whose processes run."""
    with contextlib.suppress(OSError):
        for path in islice(Path(folder).glob(prefix + "*"), MAX_MARKS):
            if (content := _read_mark(path)) is not None:
                yield content


def _read_mark(path: Path) -> bytes | None:
    """The content of one file; None if the process that wrote it has exited."""
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        if stat.S_ISREG(os.fstat(fd).st_mode) and _is_locked(fd):
            return os.pread(fd, MAX_MARK_BYTES, 0)
    return None


def _is_locked(fd: int) -> bool:
    """True if a running process holds a lock on the file."""
    request = struct.pack(_FLOCK_FORMAT, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, request)
    return bool(struct.unpack(_FLOCK_FORMAT, answer)[0] != fcntl.F_UNLCK)
