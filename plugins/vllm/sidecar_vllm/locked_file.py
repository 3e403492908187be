"""Files that this process holds a lock on, so that the sidecar sees that it lives; the lock ends with the process."""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path


def open_locked(path: Path) -> int:
    """Open a file, made where there is none, and lock it. Returns the descriptor. Raises OSError; follows no link."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0))
    os.fchmod(fd, 0o644)  # regardless of the umask: it holds no secret
    return fd
