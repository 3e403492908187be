"""Decide whether images may go to vLLM through shared memory: a running vLLM must use the plugin and read the files.

The plugin (plugins/vllm) writes a mark file into the shared folder and locks it while its process runs. A locked mark
therefore shows that the plugin is installed, that both containers share the folder, and that the engine is alive. The
sidecar only queries the lock and never takes it, so it cannot block an engine.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import stat
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

from sidecar.images.shm_cache import SHM_DIR

MARK_PREFIX: Final = "sidecar-plugin-"
URL_VERSION: Final = 1
CONNECTOR_NAME: Final = "inference_sidecar"
CHECK_INTERVAL_S: Final = 1.0
MAX_MARKS: Final = 64  # one per user that an engine has run as
MAX_MARK_BYTES: Final = 4096
REMEDY: Final = (
    "install plugins/vllm into vLLM's environment, start it with VLLM_MEDIA_CONNECTOR=inference_sidecar, and mount one "
    f"folder at {SHM_DIR} in both containers"
)
_FLOCK_FORMAT: Final = "hhqqi"  # struct flock: type, whence, start, length, pid

_log = logging.getLogger("sidecar")


@dataclass(frozen=True, slots=True)
class PluginStatus:
    """The state of the plugin. `why`: the reason that images cannot go through shared memory, or ""."""

    why: str
    version: str = ""


def read_status(shm: str) -> PluginStatus:
    """The plugin's state by the marks in the folder `shm`. Never raises, never waits."""
    last = PluginStatus("no vLLM with the sidecar's plugin uses this folder")
    with contextlib.suppress(OSError):
        for path in islice(Path(shm).glob(MARK_PREFIX + "*"), MAX_MARKS):
            last = _read_mark(path) or last
            if not last.why:
                break
    return last


def check_mark(text: bytes, user: int) -> PluginStatus:
    """The plugin's state by a mark, for a sidecar that runs as `user`."""
    try:
        mark: Any = json.loads(text)
        version, form = str(mark["version"])[:20], mark["form"]
        connector, owner, reads_all = str(mark["connector"])[:40], int(mark["user"]), bool(mark["reads_all"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return PluginStatus("the mark of vLLM's plugin cannot be read")
    if form != URL_VERSION:
        return PluginStatus(f"vLLM's plugin {version!a} does not match this sidecar's version", version)
    if connector != CONNECTOR_NAME:
        return PluginStatus(f"vLLM has the plugin, but VLLM_MEDIA_CONNECTOR is {connector!a}", version)
    if owner != user and not reads_all:
        return PluginStatus(f"vLLM runs as user {owner} and may not read the files of user {user}", version)
    return PluginStatus("", version)


def _read_mark(path: Path) -> PluginStatus | None:
    """The plugin's state by one mark; None if the process that wrote it has exited."""
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        if stat.S_ISREG(os.fstat(fd).st_mode) and _is_locked(fd):
            return check_mark(os.pread(fd, MAX_MARK_BYTES, 0), os.geteuid())
    return None


def _is_locked(fd: int) -> bool:
    """True if a running process holds a lock on the file."""
    request = struct.pack(_FLOCK_FORMAT, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, request)
    return bool(struct.unpack(_FLOCK_FORMAT, answer)[0] != fcntl.F_UNLCK)


class PluginWatch:
    """Called for each request with images: True if they may go through the folder `shm`. Logs changes."""

    def __init__(self, shm: str = SHM_DIR, now: Callable[[], float] = time.monotonic) -> None:
        self._shm = shm
        self._now = now
        self._checked_at = float("-inf")
        self._status: PluginStatus | None = None

    def __call__(self) -> bool:
        now = self._now()
        if now - self._checked_at >= CHECK_INTERVAL_S or self._status is None:
            before, self._status, self._checked_at = self._status, read_status(self._shm), now
            if before != self._status and self._status.why:
                _log.warning("images go inline, not through %s: %s; %s", self._shm, self._status.why, REMEDY)
            elif before != self._status:
                _log.info("images go through %s: vLLM has plugin %s", self._shm, self._status.version)
        return not self._status.why
