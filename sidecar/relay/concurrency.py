"""How many requests are with the engine at once, where the operator said what it can run.

Rules: off by default; first come, first served; what waits is bounded in number; one place is left free, so that a canary finds
one. The limit is split evenly between relay processes, which know nothing of each other.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import Final

from sidecar.errors import QueueFull
from sidecar.relay.admission import Admission
from sidecar.relay.open_requests import OpenRequests

# Requests that wait for a place in one relay process; the next gets 429. Each keeps its connection and its body, and
# another replica serves the thousand-and-first sooner.
MAX_QUEUED: Final = 1000


class ConcurrencyLimit:
    """The places of one relay process. `places` 0: no limit."""

    def __init__(self, places: int, open_requests: OpenRequests, max_queued: int = MAX_QUEUED) -> None:
        self._free = asyncio.Semaphore(places) if places else None
        self._open_requests = open_requests
        self._max_queued = max_queued
        self.waiting = 0

    def acquire(self, admission: Admission) -> AbstractAsyncContextManager[None]:
        """A place, held for a block; waits for one. Raises QueueFull where too many wait already."""
        return nullcontext() if self._free is None else self._taken(self._free, admission)

    @asynccontextmanager
    async def _taken(self, free: asyncio.Semaphore, admission: Admission) -> AsyncIterator[None]:
        if free.locked():
            await self._wait(free, admission)
        else:
            await free.acquire()
        try:
            yield
        finally:
            free.release()

    async def _wait(self, free: asyncio.Semaphore, admission: Admission) -> None:
        if self.waiting >= self._max_queued:
            raise QueueFull("the engine is full and so is the queue before it; send the request again later")
        self.waiting += 1
        try:
            with self._open_requests.queueing(admission):
                await free.acquire()
        finally:
            self.waiting -= 1


def share_of(limit: int, workers: int, index: int) -> int:
    """The places of relay process `index`: its share of `limit` less the canary's; at least one. 0 where there is no limit."""
    if not limit:
        return 0
    share, rest = divmod(limit - 1, workers)
    return max(1, share + (index < rest))
