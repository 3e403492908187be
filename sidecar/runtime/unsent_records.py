"""Records on their way to another process, in memory that outlives the one that writes them.

A relay gathers records for some milliseconds before it sends them. It keeps them here, too: in a file that is mapped
into memory, so that what was written stays when the process is killed, without a system call. Whoever reads the other
end of the connection knows how many bytes it received, and takes what is missing from the file.

The file holds two numbers and then bytes of the stream: the position in the stream of the first byte, and how many
there are. A number is written after the bytes that it counts, and in one store: a reader after a kill sees whole lines.
"""

from __future__ import annotations

import mmap
import os
from contextlib import suppress
from pathlib import Path
from typing import Final

HEAD_BYTES: Final = 16
MAX_BYTES: Final = 1 << 20  # a thousand records and more; pages that were never written take no memory
_START, _LENGTH = 0, 1


class UnsentRecords:
    """The writer's side, for the connections of one process, one after the other."""

    def __init__(self, file_path: str) -> None:
        """Make the file, in a folder that is the sidecar's alone. Raises OSError."""
        Path(file_path).unlink(missing_ok=True)  # of an earlier process with the same id
        fd = os.open(file_path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, HEAD_BYTES + MAX_BYTES)
            self._memory = mmap.mmap(fd, HEAD_BYTES + MAX_BYTES)
        finally:
            os.close(fd)
        self._head = memoryview(self._memory)[:HEAD_BYTES].cast("Q")
        self._end = HEAD_BYTES

    def begin(self) -> None:
        """A connection begins: nothing was sent on it."""
        self._head[_LENGTH] = self._head[_START] = 0
        self._end = HEAD_BYTES

    def keep(self, line: bytes) -> bool:
        """Add a line; False if it finds no room."""
        end = self._end + len(line)
        if end > HEAD_BYTES + MAX_BYTES:
            return False
        self._memory[self._end : end] = line
        self._end = end
        self._head[_LENGTH] = end - HEAD_BYTES
        return True

    def forget(self, sent: int) -> None:
        """All that was kept is with the kernel, `sent` bytes of the connection in all."""
        self._head[_LENGTH] = 0
        self._head[_START] = sent
        self._end = HEAD_BYTES


def path(socket: str, pid: int) -> str:
    """The file of a process, next to the Unix socket over which it sends."""
    return f"{socket}.{pid}"


def rest(file_path: str, received: int) -> bytes:
    """What a process that has ended wrote after the first `received` bytes of its connection; removes the file."""
    try:
        fd = os.open(file_path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            content = file.read(HEAD_BYTES + MAX_BYTES)
    except OSError:
        return b""  # it made none
    with suppress(OSError):
        Path(file_path).unlink()
    start, length = (int.from_bytes(content[at : at + 8], "little") for at in (0, 8))
    if start > received:  # what lies between was never sent: what follows begins with a whole line
        return b"\n" + content[HEAD_BYTES : HEAD_BYTES + length]
    return content[HEAD_BYTES + received - start : HEAD_BYTES + length]
