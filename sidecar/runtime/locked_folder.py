"""Folders that live as long as the process that made them: where it was killed, the next start removes them.

A process holds the lock in its folder, and so do those it forks. A folder whose lock no one holds has no owner.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

LOCK_NAME: Final = "lock"


def make(parent: str, prefix: str) -> tuple[str, int]:
    """Create a folder and lock it. Returns its path and the lock's descriptor. Raises OSError."""
    while True:
        path = tempfile.mkdtemp(prefix=prefix, dir=parent)  # mode 0700
        try:
            fd = os.open(Path(path) / LOCK_NAME, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError:
            shutil.rmtree(path, ignore_errors=True)
            raise
        if os.fstat(fd).st_nlink:
            return path, fd
        os.close(fd)  # another process that was starting took the lock first and swept the folder


def remove(path: str, lock: int) -> None:
    """Remove a folder that `make` created."""
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)


def sweep(parent: str, prefix: str) -> None:
    """Remove the folders of this user whose owners are gone."""
    for folder in Path(parent).glob(prefix + "*"):
        # an OSError: it is locked, another user's, or being created
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            if folder.lstat().st_uid != os.geteuid():
                continue
            fd = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
