"""One JSON line for each settled request, in `requests.jsonl` of the state directory: numbers and labels, no content.

    add (each settlement, in memory) -> take, about once a second -> write

Rules:
- Bounded: the file is renamed to `requests.jsonl.1`, in place of the one before, at half of `max_bytes`.
- A batch is written whole or not at all. kill -9 loses at most the unwritten batch, and leaves whole lines: a part of
  one is cut off before the next batch.
- Only what usage records count is added (UsageStore.add), so a settlement that a relay repeats has one line.
- What cannot be written is kept in memory, bounded; the oldest are dropped first, and counted.
- `write` does disk I/O: call it off the event loop, one at a time.
"""

from __future__ import annotations

import os
import stat
from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec

from sidecar.load.ledger import Settlement
from sidecar.report.usage_rows import UsageKey, UsageSums, tokens_by_kind
from sidecar.runtime import safe_files

LOG_FILE: Final = "requests.jsonl"
MAX_PENDING: Final = 50_000  # about 20 MB of lines
MAX_TAIL_BYTES: Final = 1 << 20  # in which the last whole line ends

_encode: Final = msgspec.json.Encoder().encode


class RequestLog:
    """The log of one sidecar."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.path = folder / LOG_FILE
        self._max_file_bytes = max_bytes // 2
        self._pending: deque[bytes] = deque()

    def add(self, settlement: Settlement, key: UsageKey, sums: UsageSums, wall: float) -> int:
        """Add a request that was settled at `wall` (seconds since 1970). Returns how many lines were dropped for it."""
        self._pending.append(_encode(line(settlement, key, sums, wall)) + b"\n")
        return self._bound()

    def take(self) -> list[bytes]:
        """Remove and return what is pending. Pass it to `write`, or back to `restore`."""
        taken, self._pending = list(self._pending), deque()
        return taken

    def restore(self, taken: list[bytes]) -> int:
        """Make lines pending again after a failed write. Returns how many were dropped."""
        self._pending.extendleft(reversed(taken))
        return self._bound()

    def _bound(self) -> int:
        dropped = max(0, len(self._pending) - MAX_PENDING)
        for _ in range(dropped):
            self._pending.popleft()
        return dropped

    def write(self, taken: list[bytes]) -> None:
        """Append lines. If this raises OSError, none of them was written."""
        data = b"".join(taken)
        fd = _opened(self.path)
        try:
            size = _cut_part(fd)
            if size and size + len(data) > self._max_file_bytes:
                os.close(fd)
                self.path.replace(self.path.with_name(self.path.name + ".1"))
                fd = _opened(self.path)
                size = 0
            try:
                written = 0
                while written < len(data):
                    written += os.write(fd, data[written:])
            except OSError:
                os.ftruncate(fd, size)
                raise
        finally:
            os.close(fd)


def line(settlement: Settlement, key: UsageKey, sums: UsageSums, wall: float) -> dict[str, Any]:
    """What the log says of a request."""
    admitted, settled = settlement.admitted, settlement.settled
    return {
        "id": admitted.id,
        "trace_id": admitted.trace.trace_id if admitted.trace else None,
        "at": datetime.fromtimestamp(wall, UTC).isoformat(timespec="milliseconds"),
        "tenant": key.tenant,
        "model": key.model,
        "route": admitted.route,
        "stream": admitted.stream,
        "outcome": key.outcome,
        "status": settled.status,
        "error": settled.error,
        "seconds": round(sums.seconds, 6),
        "first_token_seconds": None if settled.first_at is None else round(settled.first_at - admitted.at, 6),
        "tokens": tokens_by_kind(sums),
        "images": sums.images,
        "estimated": not settlement.told,
        "mu": round(sums.mu, 6),
        "gpu_seconds": round(sums.gpu_seconds, 6),
        "dollars": round(sums.dollars, 9),
        "joules": None if sums.joules is None else round(sums.joules, 3),
        **key.rate._asdict(),
    }


def _opened(path: Path) -> int:
    """The file for appending, made if there is none. Raises OSError if a link or anything else is in its place."""
    fd = os.open(
        path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, safe_files.READABLE
    )
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(f"{path} is not a file")
    return fd


def _cut_part(fd: int) -> int:
    """Cut off a line that has no end, from a process that was killed. Returns the size of the file."""
    size = os.fstat(fd).st_size
    start = max(0, size - MAX_TAIL_BYTES)
    tail = os.pread(fd, size - start, start) if size and os.pread(fd, 1, size - 1) != b"\n" else b""
    if tail:
        size = start + tail.rfind(b"\n") + 1
        os.ftruncate(fd, size)
    return size
