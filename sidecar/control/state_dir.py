"""The state directory: verdict.json, replaced atomically at least once a second, and `stalled`, present while that
holds.

Readers are exec probes in other containers. They fail open when the sidecar is gone, because then the files grow old.
"""

from __future__ import annotations

import json
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from sidecar.control.private_dir import why_shared
from sidecar.errors import StartError
from sidecar.health import probes
from sidecar.runtime import safe_files

VERDICT = "verdict.json"
STALLED = "stalled"


class StateDir:
    """Owns the files of a state directory. `write` is quick but touches a disk: call it off the event loop."""

    def __init__(self, path: str) -> None:
        named = Path(path)
        try:
            named.mkdir(mode=0o755, parents=True, exist_ok=True)
            shared = why_shared(named)
            self.path = named.resolve()
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as e:
            remedy = "mount an emptyDir there, or choose another directory"
            raise StartError(f"--state-dir: cannot write to {path} ({e.strerror}); {remedy}") from None
        if shared:
            raise StartError(f"--state-dir: {shared}")

    def sweep(self) -> None:
        """Remove what a process that was killed had begun to write. Raises OSError."""
        for scratch in self.path.rglob(safe_files.SCRATCH_PATTERN):
            scratch.unlink(missing_ok=True)

    def write(self, state: probes.ProbeState, now_wall: float) -> None:
        """Replace verdict.json and touch or remove `stalled`. Raises OSError.

        Something may have removed the directory (a cleaner of /run or /tmp): without a verdict exec probes would pass.
        """
        if not self.path.exists():
            self.path.mkdir(mode=0o755)
        stalled = self.path / STALLED  # first: it has no content, so a full disk does not silence it
        if probes.passes("live", state):
            stalled.unlink(missing_ok=True)
        else:
            safe_files.touch(stalled)
        self.replace(VERDICT, probes.file_body(state, now_wall))

    def replace(self, name: str, content: Any) -> int:
        """Write JSON to `name` atomically: a reader sees the old or the new content. Returns its size in bytes."""
        target, data = self.path / name, json.dumps(content).encode()
        if target.parent != self.path:
            safe_files.make_folder(target.parent)
        safe_files.replace(target, data)
        return len(data)

    def load(self, name: str, limit: int) -> Any:
        """The JSON of a file of at most `limit` bytes; None where it is missing. Raises OSError, ValueError."""
        try:
            return json.loads(safe_files.read(self.path / name, limit))
        except FileNotFoundError:
            return None

    def clear(self) -> None:
        """On a clean exit: remove `stalled`. Where that fails it grows old, and then fails no probe."""
        with suppress(OSError):
            (self.path / STALLED).unlink(missing_ok=True)


def read(path: str) -> tuple[Any, float | None]:
    """The content of the verdict file and its age in seconds; (None, None) without a file."""
    file = Path(path) / VERDICT
    try:
        age = time.time() - file.stat().st_mtime
        return json.loads(file.read_text()), age
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError):
        return None, 0.0
