"""Whether a directory is the sidecar's alone. Another user who may write there could pass off a verdict as its own.

Rules: it belongs to the sidecar's user or to root, and no one else may write to it. A volume that is mounted there is
trusted whoever may write: Kubernetes makes an emptyDir writable for all, and whoever mounts it shares the pod's fate.
The places where every program writes are never trusted, mounted or not.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

SHARED_PLACES: Final = ("/tmp", "/var/tmp", "/dev/shm")
_MOUNTS: Final = Path("/proc/self/mountinfo")
_MOUNT_POINT_FIELD: Final = 4


def why_shared(path: Path) -> str:
    """Why others could change the files of a directory, and what to do; "" if they cannot. Raises OSError."""
    place = path.resolve()
    if str(place) in SHARED_PLACES:
        return f"every program may write to {path}; name a directory below it"
    for found in (path.lstat(), place.stat()):  # whoever owns a link decides where it leads
        if found.st_uid not in (os.geteuid(), 0) and not is_mount_point(place):
            return f"{path} belongs to another user (uid {found.st_uid}); chown it, or name another directory"
    if place.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not is_mount_point(place):
        return f"other users may write to {path}; run chmod go-w {path}, or name another directory"
    return ""


def is_mount_point(place: Path, mounts: Path = _MOUNTS) -> bool:
    """Whether a volume is mounted at a resolved path, from the same file system or another."""
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return place.is_mount()
    return any(_unescape(line.split()[_MOUNT_POINT_FIELD]) == str(place) for line in lines)


def _unescape(text: str) -> str:
    for octal, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(octal, char)
    return text
