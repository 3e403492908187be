"""Looks at the engine's processes while the engine is suspect, every three seconds: which hang is it, and is it proved?

- Nothing is read while the engine is healthy. One look at a time, bounded in time, processes, threads and bytes.
- Nothing touches the engine's processes: py-spy reads their memory and stops none.
- A sign that cannot be read is absent; where no process can be seen, all of them are, with the reason.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from sidecar.events import State
from sidecar.health.hang_classes import LONG_DOUBT_S, LOOK_INTERVAL_S, MAX_LOOK_GAP_S, SELDOM_INTERVAL_S
from sidecar.readings import Absent, Failed, HangSigns, Reading, Value
from sidecar.runtime import safe_files
from sidecar.signals import engine_processes, stack_dump
from sidecar.signals.hang_signs import MemoryLook, TreeLook, is_steady, key_processes, signs_of
from sidecar.signals.process_examiner import MAX_DUMPED_PROCESSES, HangProofThread, dump_all
from sidecar.signals.process_state import EngineProcess

NOT_SUSPECT: Final = Absent("the engine's processes are looked at while it is suspect")
MAX_FILE_BYTES: Final = 4096
GROUPS: Final = "sys/fs/cgroup"

_log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class HangWatch:
    """A series of looks at the processes behind an engine's URL. `read` gives its signs; `due` says when to look."""

    engine: str
    interval_s: float = LOOK_INTERVAL_S
    locate_py_spy: Callable[[], str | None] = stack_dump.locate
    _thread: HangProofThread = field(default_factory=HangProofThread, init=False)
    _first: TreeLook | None = field(default=None, init=False)
    _last: TreeLook | None = field(default=None, init=False)
    _steady: bool = field(default=True, init=False)
    _signs: Reading[HangSigns] = field(default=NOT_SUSPECT, init=False)
    _due: float = field(default=0.0, init=False)
    _since: float | None = field(default=None, init=False)  # of the doubt
    _said: str = field(default="", init=False)

    def read(self) -> Reading[HangSigns]:
        """The signs of the series so far."""
        return self._signs

    def is_due(self, now: float, state: State) -> bool:
        """Whether to look now. Without a suspicion the series is over; what was seen until a stall is kept."""
        if state not in ("suspect", "stalled"):
            self._first = self._last = None
            self._signs = NOT_SUSPECT
            self._since = None
        if state != "suspect" or now < self._due:
            return False
        self._since = now if self._since is None else self._since
        is_long = now - self._since >= LONG_DOUBT_S
        self._due = now + (SELDOM_INTERVAL_S if is_long else self.interval_s)
        return True

    async def look(self) -> None:
        """One look. Never raises."""
        found = await self._thread.run(lambda: self._read_processes())
        if not isinstance(found, TreeLook):
            self._break_off(found)
            return
        dumped = key_processes(found.processes)[:MAX_DUMPED_PROCESSES]
        stacks = await dump_all(dumped, self.locate_py_spy())
        self._add(TreeLook(found.at, found.processes, found.looks, stacks, found.memory))

    def _read_processes(self) -> TreeLook | Absent | Failed:
        """The tree, with what was in it before: who ended since is part of the evidence."""
        found = engine_processes.find(self.engine)
        if isinstance(found, Absent):
            return found
        known = self._first.processes if self._first is not None else ()
        pids = {process.pid for process in found}
        every = (*found, *(process for process in key_processes(known) if process.pid not in pids))
        looks = {process.pid: engine_processes.look(process) for process in every}
        return TreeLook(time.monotonic(), every, looks, {}, _read_memory(every))

    def _break_off(self, why: Absent | Failed) -> None:
        self._first = self._last = None
        self._signs = why
        text = why.reason if isinstance(why, Absent) else why.error
        if text != self._said:
            self._said = text
            _log.info("no evidence from the engine's processes: %s", text)

    def _add(self, look: TreeLook) -> None:
        """Continue the series, or begin another."""
        before = self._last
        if self._first is None or before is None or look.at - before.at > MAX_LOOK_GAP_S:
            self._first, self._last, self._steady = look, look, True
            self._signs = Value(signs_of(look, look, look, steady=True), look.at)
            return
        self._steady = self._steady and is_steady(before, look)
        self._last = look
        signs = signs_of(self._first, before, look, steady=self._steady)
        if signs.cpu not in ("none", None) or not self._steady:  # what it proves begins with its end
            self._first, self._steady = look, True
        self._signs = Value(signs, look.at)


def _read_memory(processes: tuple[EngineProcess, ...]) -> MemoryLook:
    """Pressure, killed processes and the freezer of the engine's control group, else of the machine."""
    folders: list[Path] = []
    for process in processes[:1]:
        root = engine_processes.PROC / str(process.pid)
        with suppress(OSError, ValueError):
            lines = (root / "cgroup").read_text("utf-8", "replace").splitlines()
            own = next((line.partition("::")[2].strip("/") for line in lines if line.startswith("0::")), "")
            mounted = root / "root" / GROUPS
            folders += [mounted, *([mounted / own] if own and ".." not in own.split("/") else [])]
    pressure = next(filter(None, (_read(folder / "memory.pressure") for folder in reversed(folders))), "")
    events = next(filter(None, (_read(folder / "memory.events") for folder in reversed(folders))), "")
    group = next(filter(None, (_read(folder / "cgroup.events") for folder in reversed(folders))), "")
    stalled = _field(pressure or _read(engine_processes.PROC / "pressure" / "memory"), "full", "avg10")
    killed, frozen = _count(events, "oom_kill"), _count(group, "frozen")
    return MemoryLook(None if stalled is None else stalled / 100, killed, None if frozen is None else bool(frozen))


def _read(path: Path) -> str:
    with suppress(OSError, ValueError):
        return safe_files.read(path, MAX_FILE_BYTES).decode("ascii", "replace")
    return ""


def _count(text: str, name: str) -> int | None:
    """The number after a name, of a file with one a line."""
    with suppress(ValueError, IndexError):
        return next((int(line.split()[1]) for line in text.splitlines() if line.split()[:1] == [name]), None)
    return None


def _field(text: str, line: str, name: str) -> float | None:
    """`full avg10=0.12 ...` -> 0.12."""
    for words in (each.split() for each in text.splitlines()):
        if words[:1] == [line]:
            with suppress(ValueError):
                return next((float(word.partition("=")[2]) for word in words if word.startswith(f"{name}=")), None)
    return None
