"""How many bytes of memory may be used: the limit of the cgroup, or of the machine."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

_FILES: Final = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory_limit(files: tuple[str, ...] = _FILES) -> int:
    """Bytes that this container may use: what the first file that names a limit says, at most the machine's memory."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for file in files:
        with suppress(OSError, ValueError):
            return min(machine, int(Path(file).read_text()))
    return machine
