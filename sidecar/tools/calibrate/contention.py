"""How long the engine had to wait for a core that something else had, where it runs on this machine.

A core that others use makes a CPU engine slow and its requests look expensive; a GPU's launches come late, too. Linux counts for each
thread how long it ran and how long it was ready and had no core (/proc/PID/task/TID/schedstat). Of the thread that ran most, which is
the engine's loop, the wait is what the machine took, not the request. Where nothing can be read, nothing was waited.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from sidecar.readings import Absent
from sidecar.signals import engine_processes

PROC: Final = Path("/proc")
MAX_WAITED_SHARE: Final = 0.95  # of the time: what is left is no measurement

Times = Mapping[str, tuple[float, float]]  # thread -> seconds that it ran, and that it waited


class Cores:
    """The engine's threads. Blocks for some milliseconds."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids = tuple(pids)
        self._began, self._before = time.monotonic(), self._read()

    def mark(self) -> None:
        """Count from here."""
        self._began, self._before = time.monotonic(), self._read()

    def waited(self) -> float:
        """The share of the time since the mark in which the busiest thread waited for a core."""
        return share(self._before, self._read(), time.monotonic() - self._began)

    def _read(self) -> dict[str, tuple[float, float]]:
        found = {}
        for pid in self._pids:
            with contextlib.suppress(OSError, ValueError, IndexError):
                for thread in (PROC / str(pid) / "task").iterdir():
                    ran, waited, *_ = (thread / "schedstat").read_text().split()
                    found[thread.name] = int(ran) / 1e9, int(waited) / 1e9
        return found


def pids_of(engine: str) -> tuple[int, ...]:
    """The engine's processes; none where they cannot be seen."""
    found = engine_processes.find(engine)
    return () if isinstance(found, Absent) else tuple(process.pid for process in found)


def share(before: Times, after: Times, seconds: float) -> float:
    """Of two readings, `seconds` apart: what part of it the thread that ran most waited."""
    differences = [
        (ran - before[thread][0], waited - before[thread][1])
        for thread, (ran, waited) in after.items()
        if thread in before
    ]
    _, waited = max(differences, default=(0.0, 0.0))
    return min(MAX_WAITED_SHARE, max(0.0, waited / seconds)) if seconds > 0 else 0.0
