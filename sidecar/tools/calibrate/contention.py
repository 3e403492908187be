"""How long an engine on this machine waited for a core that something else used.

Contention makes a CPU engine slow and its requests look expensive; kernel launches on a GPU are late, too. Linux counts
for each thread how long it ran and how long it was ready without a core (/proc/PID/task/TID/schedstat). The thread that
ran most is the engine's loop; its wait is charged to the machine, not to the request. If nothing can be read, the wait
is 0.
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
# Beyond this share, the rest is no measurement.
MAX_WAITED_SHARE: Final = 0.95

Times = Mapping[str, tuple[float, float]]  # thread -> seconds running and waiting


class Cores:
    """The engine's threads. Reading them blocks for some milliseconds."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids = tuple(pids)
        self.mark()

    def mark(self) -> None:
        """Start counting now."""
        self._began, self._before = time.monotonic(), self._read()

    def waited(self) -> float:
        """The share of the time since `mark` that the busiest thread waited for a core."""
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
    """The engine's processes; none if they are not visible."""
    found = engine_processes.find(engine)
    return () if isinstance(found, Absent) else tuple(process.pid for process in found)


def share(before: Times, after: Times, seconds: float) -> float:
    """The share of `seconds` between two readings that the busiest thread waited."""
    shared = ((now, before[thread]) for thread, now in after.items() if thread in before)
    _, waited = max(((now[0] - then[0], now[1] - then[1]) for now, then in shared), default=(0.0, 0.0))
    return min(MAX_WAITED_SHARE, max(0.0, waited / seconds)) if seconds > 0 else 0.0
