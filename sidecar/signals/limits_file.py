"""The file of tenants' limits: read again when it changes. The rules of its content: sidecar/load/tenant_limits.py.

A ConfigMap changes by its symlink, so what counts is the stat of the file behind it.
"""

from __future__ import annotations

from pathlib import Path

from sidecar.errors import UsageError
from sidecar.load.tenant_limits import MAX_LIMITS_FILE_BYTES, TenantLimits, parse

Stamp = tuple[int, int, int]


class LimitsFile:
    """One reader of the file at `path`."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._stamp: Stamp | None = None
        self._was_read = False

    def read_changed(self) -> TenantLimits | None:
        """The limits, if the file changed since the last call. Raises UsageError, once for each change."""
        stamp = _stamp_of(Path(self._path))
        if self._was_read and stamp == self._stamp:
            return None
        self._was_read, self._stamp = True, stamp
        return read_limits(self._path)


def read_limits(path: str) -> TenantLimits:
    """The limits in a file. Raises UsageError."""
    name = f"--tenant-limits {path}"
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MAX_LIMITS_FILE_BYTES + 1)
        text = raw.decode()
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else "not UTF-8"
        raise UsageError(f"{name}: cannot be read ({why})") from None
    if len(raw) > MAX_LIMITS_FILE_BYTES:
        raise UsageError(f"{name}: larger than {MAX_LIMITS_FILE_BYTES} bytes")
    return parse(text, name)


def _stamp_of(path: Path) -> Stamp | None:
    """A value that changes with the file; None if it does not exist."""
    try:
        at = path.stat()
    except OSError:
        return None
    return at.st_ino, at.st_mtime_ns, at.st_size
