"""Whether a process of the sidecar's own uses the GPU, and when one last failed: a file that two processes share.

The image server's first process writes it. Control reads it when the driver reports an XID error, which names no
process. Times are of the machine's monotonic clock.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

FILE_NAME: Final = "gpu-use"
MAX_BYTES: Final = 64


@dataclass(frozen=True, slots=True)
class OwnGpuUse:
    """`running`: a process may hold a context; `failed_at`: when one last ended by a fault, None for never."""

    running: bool = False
    failed_at: float | None = None


UNUSED: Final = OwnGpuUse()


def next_to(socket: str) -> Path:
    """The file's place in the folder of the sidecar's sockets."""
    return Path(socket).with_name(FILE_NAME)


def write(path: Path, use: OwnGpuUse) -> None:
    """Replace the file in one step. A folder that is gone or full is no error."""
    new = path.with_suffix(".new")
    with suppress(OSError):
        new.write_text(f"{int(use.running)} {'' if use.failed_at is None else use.failed_at}", "ascii")
        new.replace(path)


def read(path: Path) -> OwnGpuUse:
    """What was written last; UNUSED where nothing can be read."""
    with suppress(OSError, ValueError):
        with path.open("rb") as file:
            running, _, failed = file.read(MAX_BYTES).decode("ascii").partition(" ")
        return OwnGpuUse(running == "1", float(failed) if failed else None)
    return UNUSED
