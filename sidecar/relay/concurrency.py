"""A limit on the requests that the engine has at once (--max-concurrent).

Rules: off by default. First come, first served; the queue is bounded. One slot is left free for the canary. The limit
is split evenly between relay processes, which do not coordinate.
"""

from __future__ import annotations

import asyncio
from typing import Final

from sidecar.errors import QueueFull
from sidecar.relay.admission import Admission
from sidecar.relay.open_requests import OpenRequests

# Queue length per relay process; further requests get 429. Each queued request keeps its connection and its body, and
# another replica serves the thousand-and-first sooner.
MAX_QUEUED: Final = 1000


class ConcurrencyLimit:
    """The slots of one relay process. 0 slots: no limit."""

    def __init__(self, slots: int, open_requests: OpenRequests, max_queued: int = MAX_QUEUED) -> None:
        self._free = asyncio.Semaphore(slots) if slots else None
        self._open_requests = open_requests
        self._max_queued = max_queued
        self._waiting = 0

    async def acquire(self, admission: Admission) -> None:
        """Acquire a slot, waiting for one if needed. Raises QueueFull if the queue is full."""
        if (free := self._free) is None:
            return
        if not free.locked():
            await free.acquire()
        elif self._waiting >= self._max_queued:
            raise QueueFull("the engine is full and so is the queue before it; send the request again later")
        else:
            self._waiting += 1
            try:
                with self._open_requests.queueing(admission):
                    await free.acquire()
            finally:
                self._waiting -= 1

    def release(self) -> None:
        """Release the slot."""
        if self._free is not None:
            self._free.release()


def share_of(limit: int, workers: int, index: int) -> int:
    """Slots of relay process `index`: its share of `limit` minus the canary's, at least one. 0: no limit."""
    if not limit:
        return 0
    share, rest = divmod(limit - 1, workers)
    return max(1, share + (index < rest))
