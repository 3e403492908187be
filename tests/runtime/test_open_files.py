"""File descriptors: the limit that a process takes, and what of it connections may have."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys

import pytest

from sidecar.runtime import open_files

RAISED = """
import resource, sys
from sidecar.runtime import open_files
hard = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
open_files.raise_limit()
print(open_files.limit())
"""


@pytest.mark.parametrize("hard", [256, 512])
def test_a_process_takes_what_it_may(hard: int) -> None:
    """The soft limit becomes the hard one."""
    done = subprocess.run([sys.executable, "-c", RAISED, str(hard)], capture_output=True, text=True, check=True)
    assert int(done.stdout) == hard


def test_a_limit_is_never_lowered() -> None:
    """One above our own bound stays."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_files.raise_limit()
    after = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        assert after[0] >= before[0] and after[1] == before[1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_open_files_are_counted() -> None:
    """One more when one more is open."""
    before = open_files.count()
    fds = [os.open(os.devnull, os.O_RDONLY) for _ in range(5)]
    try:
        assert open_files.count() - before == 5
    finally:
        for fd in fds:
            os.close(fd)


@pytest.mark.parametrize(("limit", "connections"), [(16, 6), (256, 96), (1024, 480), (1 << 20, 524_256)])
def test_connections_leave_files_for_everything_else(limit: int, connections: int) -> None:
    """Two files each, and a reserve that small limits make small; never none."""
    assert open_files.max_connections(limit) == connections
    assert 2 * connections < limit
    assert open_files.max_connections(1) == 1


def test_an_exhausted_limit_is_known_behind_other_errors() -> None:
    """Libraries wrap what the kernel said; another error of the kernel is another one."""
    wrapped = RuntimeError("connector")
    wrapped.__cause__ = OSError(errno.EMFILE, "x")
    assert open_files.is_exhausted(wrapped)
    assert open_files.is_exhausted(OSError(errno.ENFILE, "x"))
    assert not open_files.is_exhausted(OSError(errno.ECONNREFUSED, "x"))
