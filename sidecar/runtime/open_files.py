"""File descriptors: the limit of a process, what may be spent on connections, and how many are open.

Rule: connections get a part of the limit only, so that a process can always write its files and reach the engine.
"""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Final

# What a process needs besides connections: its sockets, files, logs, libraries.
RESERVED_FILES: Final = 64
FILES_PER_REQUEST: Final = 2  # the client's connection and the engine's
# Some runtimes set a limit of a billion; programs that prepare for each of them would take minutes.
MAX_LIMIT: Final = 1 << 20
SCARCE_SHARE: Final = 0.9
EXHAUSTED: Final = (errno.EMFILE, errno.ENFILE)  # of the process, of the machine
EXHAUSTED_TEXT: Final = "the sidecar has no file descriptors left: raise its limit (ulimit -n)"
_OPEN_FILES: Final = Path("/proc/self/fd")


def raise_limit() -> None:
    """Allow this process, and those it starts, as many files as it may allow itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < attainable():
        resource.setrlimit(resource.RLIMIT_NOFILE, (attainable(), hard))


def attainable() -> int:
    """How many files this process may allow itself."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_LIMIT if hard == resource.RLIM_INFINITY else min(hard, MAX_LIMIT)


def limit() -> int:
    """How many files this process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_LIMIT if soft == resource.RLIM_INFINITY else soft


def count() -> int:
    """How many files this process has open; 0 where that cannot be read."""
    try:
        # since Linux 6.2 the folder's size is their number; listing thousands of them would take milliseconds
        return _OPEN_FILES.stat().st_size or sum(1 for _ in _OPEN_FILES.iterdir())
    except OSError as e:
        return limit() if is_exhausted(e) else 0


def is_scarce(open_: int, allowed: int) -> bool:
    """Whether a process is about to run out of files."""
    return open_ > SCARCE_SHARE * allowed


def max_connections(nofile_limit: int) -> int:
    """How many client connections a relay can serve, each with one to the engine, under a limit of open files."""
    reserved = min(RESERVED_FILES, nofile_limit // 4)
    return max(1, (nofile_limit - reserved) // FILES_PER_REQUEST)


def is_exhausted(error: BaseException) -> bool:
    """Whether an error means that there are no file descriptors left."""
    return any(isinstance(cause, OSError) and cause.errno in EXHAUSTED for cause in _causes(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
