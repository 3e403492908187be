"""Files in shared memory for another process: pixels for an engine, tensors for a client.

Rules: a request's pixels are removed when it ends. Tensors expire, because their reader may never come. A request that
is cancelled while a thread is writing for it leaves no file behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Final

from sidecar.errors import ImagesBusy
from sidecar.images.protocol import Data
from sidecar.images.shm_cache import ImageCache, SharedFile

UNREAD_TIMEOUT_S: Final = 60.0  # as long as sidecar.client waits for a response
SHM_FULL: Final = "shared memory is full; try again shortly"
NO_SHM_FOR_TENSORS: Final = (
    "shared memory has no room for these tensors; read and unlink earlier ones, try again shortly, "
    "or omit x-sidecar-handoff"
)


class ShmHandoff:
    """The files that one relay process has shared in the folder of `cache`."""

    def __init__(self, cache: ImageCache) -> None:
        self._cache = cache
        self._files: dict[str, list[SharedFile]] = {}

    async def pixels(self, request: str, payload: Data, key: str) -> SharedFile:
        """Share pixels until `release(request)`. `key`: an entry with the same content. Raises ImagesBusy."""
        file = await self._write(partial(self._cache.export, payload, key=key), SHM_FULL)
        self._files.setdefault(request, []).append(file)
        return file

    async def tensors(self, *pieces: Data) -> SharedFile:
        """Share tensors with a client, which unlinks the file. Raises ImagesBusy."""
        file = await self._write(partial(self._cache.share, *pieces), NO_SHM_FOR_TENSORS)
        asyncio.get_running_loop().call_later(UNREAD_TIMEOUT_S, self._cache.unlink_shared, file)
        return file

    def release(self, request: str) -> None:
        """Unlink the files of a request that has ended."""
        for file in self._files.pop(request, ()):
            self._cache.unlink_shared(file)

    async def _write(self, write: Callable[[], SharedFile], error: str) -> SharedFile:
        task = asyncio.get_running_loop().run_in_executor(None, write)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(self._unlink_late)
            raise
        except OSError:
            raise ImagesBusy(error, "shm_full") from None

    def _unlink_late(self, written: asyncio.Future[SharedFile]) -> None:
        if not written.cancelled() and written.exception() is None:
            self._cache.unlink_shared(written.result())
