"""The steps of the engine's cores, as the plug-in in vLLM writes them: a small file in memory for each core.

Rules: only files of the plug-in that lies in this sidecar's state directory, by the folder in their names, and only
while the core lives. A file that changes while it is read is read again. Other forms and impossible numbers are absent.
"""

from __future__ import annotations

import struct
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from sidecar.readings import Absent, CoreSteps, Reading, Value
from sidecar.runtime.locked_marks import read_marks
from sidecar.runtime.plugin_folders import PLUGIN_FOLDER, STEPS_FOLDER

# Where the plug-in writes if the state directory is no memory, or read-only for the engine.
SHM_FOLDER: Final = "/dev/shm"
PREFIX: Final = "sidecar-steps-"
MAGIC: Final = b"SCSTEPS1"
FORM: Final = struct.Struct("<8sQQQQQQQQ")
MAX_COUNT: Final = 1 << 53
ATTEMPTS: Final = 3
MAX_AHEAD_S: Final = 1.0
NO_STEPS: Final = Absent("no engine with the sidecar's plug-in reports its steps")


class EngineSteps:
    """Reads the files of one sidecar. `refresh` touches a file system in memory: call it off the event loop."""

    def __init__(self, state_dir: Path, shm: str = SHM_FOLDER) -> None:
        self._state_dir = state_dir
        self._shm = shm
        self._reading: Reading[tuple[CoreSteps, ...]] = NO_STEPS

    def read(self) -> Reading[tuple[CoreSteps, ...]]:
        """The last reading."""
        return self._reading

    def refresh(self) -> None:
        """Read all cores. Never raises."""
        cores: dict[int, CoreSteps] = {}
        for _ in range(ATTEMPTS):  # again only where a write was under way
            whole = True
            now = time.monotonic()
            for content in self._contents():
                core = parse(content, now)
                whole = whole and core is not None
                if core is not None:
                    cores[core.pid] = core
            if whole:
                break
        self._reading = Value(tuple(cores.values()), time.monotonic()) if cores else NO_STEPS

    def _contents(self) -> list[bytes]:
        with suppress(OSError):
            place = (self._state_dir / PLUGIN_FOLDER).stat()
            prefix = f"{PREFIX}{place.st_dev:x}-{place.st_ino:x}-"
            return [
                text for folder in (self._state_dir / STEPS_FOLDER, self._shm) for text in read_marks(folder, prefix)
            ]
        return []


def parse(content: bytes, now: float) -> CoreSteps | None:
    """The numbers of one file; None where they are of another form, impossible, or half written."""
    if len(content) < FORM.size:
        return None
    magic, pid, steps, tokens, last, running, waiting, nanoseconds, again = FORM.unpack_from(content)
    numbers = (pid, steps, tokens, last, running, waiting)
    at = nanoseconds / 1e9
    if magic != MAGIC or steps != again or max(numbers) > MAX_COUNT or at > now + MAX_AHEAD_S:
        return None
    return CoreSteps(pid, steps, tokens, last, running, waiting, min(at, now))
