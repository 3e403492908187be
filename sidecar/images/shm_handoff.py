"""What lies in shared memory for another process to read: an engine that takes a request's pixels, a client that takes tensors.

Rules: what was handed over for a request goes with it; tensors, whose reader may never come, go after UNREAD. A request that is
cancelled while a thread still writes for it leaves nothing there either.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Final

from sidecar.errors import ImagesBusy
from sidecar.images.protocol import Data
from sidecar.images.shm_cache import ImageCache, SharedFile

UNREAD_TIMEOUT_S: Final = (
    60.0  # seconds that tensors wait for their reader: as long as sidecar.client.preprocess waits for an answer
)
FULL: Final = "shared memory is full; try again shortly"
NO_ROOM: Final = (
    "shared memory has no room for these tensors; read and remove those that were handed over before, try again shortly, "
    "or leave x-sidecar-handoff out"
)


class ShmHandoff:
    """All that one relay process has handed over in the folder of `cache`."""

    def __init__(self, cache: ImageCache) -> None:
        self._cache = cache
        self._of: dict[str, list[SharedFile]] = {}

    async def pixels(self, request: str, payload: Data, key: str) -> SharedFile:
        """For the engine's answer to `request`, until its `release`. `key`: the entry that may hold the same. Raises ImagesBusy."""
        handed = await self._written(partial(self._cache.export, payload, key=key), FULL)
        self._of.setdefault(request, []).append(handed)
        return handed

    async def tensors(self, *pieces: Data) -> SharedFile:
        """For a client, who removes the file. Raises ImagesBusy."""
        handed = await self._written(partial(self._cache.share, *pieces), NO_ROOM)
        asyncio.get_running_loop().call_later(UNREAD_TIMEOUT_S, self._cache.unlink_shared, handed)
        return handed

    def release(self, request: str) -> None:
        """A request has ended: nobody reads any more what was handed over for it."""
        for handed in self._of.pop(request, ()):
            self._cache.unlink_shared(handed)

    async def _written(self, write: Callable[[], SharedFile], full: str) -> SharedFile:
        writing = asyncio.get_running_loop().run_in_executor(None, write)
        try:
            return await asyncio.shield(writing)
        except asyncio.CancelledError:
            writing.add_done_callback(self._unwanted)
            raise
        except OSError:
            raise ImagesBusy(full) from None

    def _unwanted(self, written: asyncio.Future[SharedFile]) -> None:
        if not written.cancelled() and written.exception() is None:
            self._cache.unlink_shared(written.result())
