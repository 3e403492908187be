"""Files in shared memory for another process: pixels for an engine, tensors for a client.

Rules: a request's pixels are removed when it ends. Tensors expire, because their reader may never come. A request that
is cancelled while a thread is writing for it leaves no file behind.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

from sidecar.errors import ImagesBusy
from sidecar.images.protocol import Data
from sidecar.images.shm_cache import ImageCache, SharedFile

# Tensors of requests in flight in one relay process: 14 images at Qwen2.5-VL's limit. What comes then passes.
MAX_TENSOR_FILE_BYTES: Final = 1 << 30
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
        self._tensor_files: dict[SharedFile, int] = {}
        self._tensor_bytes = 0  # of files for engines, whose requests are in flight

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

    @asynccontextmanager
    async def open_file(self, request: str, size: int) -> AsyncIterator[tuple[SharedFile, int]]:
        """A file for `size` bytes of tensors, and its open descriptor; kept until `release(request)`.

        It is removed at once if the block raises. Raises ImagesBusy if too much waits for engines.
        """
        if self._tensor_bytes + size > MAX_TENSOR_FILE_BYTES:
            raise ImagesBusy(SHM_FULL, "shm_full")
        self._tensor_bytes += size
        try:
            task = asyncio.get_running_loop().run_in_executor(None, self._cache.reserve, size)
            try:
                file, fd = await asyncio.shield(task)
            except asyncio.CancelledError:
                task.add_done_callback(self._close_late)
                raise
            except OSError:
                raise ImagesBusy(SHM_FULL, "shm_full") from None
            try:
                yield file, fd
            except BaseException:
                self._cache.unlink_shared(file)
                raise
            finally:
                os.close(fd)
        except BaseException:
            self._tensor_bytes -= size
            raise
        self._files.setdefault(request, []).append(file)
        self._tensor_files[file] = size

    def release(self, request: str) -> None:
        """Unlink the files of a request that has ended."""
        for file in self._files.pop(request, ()):
            self._tensor_bytes -= self._tensor_files.pop(file, 0)
            self._cache.unlink_shared(file)

    def _close_late(self, reserved: asyncio.Future[tuple[SharedFile, int]]) -> None:
        if not reserved.cancelled() and reserved.exception() is None:
            file, fd = reserved.result()
            os.close(fd)
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
