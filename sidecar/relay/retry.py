"""Requests of which nothing was answered when the engine stalled: kept, and sent once more after its recovery.

Rules: off by default; only work that leaves nothing behind in the engine; bodies are kept within a bound over all requests and
only until the answer begins; a client that leaves meanwhile, or a drain, ends the wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Final

from sidecar.errors import EngineStalled
from sidecar.relay.admission import Admission
from sidecar.relay.engine_io import BodyPayload
from sidecar.relay.open_requests import OpenRequests

KEPT_BYTES: Final = 256 << 20  # of bodies, in one relay process
# `responses` may be stored, and continued by its id
_REPEATABLE: Final = frozenset((
    "chat", "completions", "messages", "generate", "embeddings", "rerank", "score", "pooling", "classify", "audio",
))  # fmt: skip


class Retries:
    """The requests of one relay process that may be sent twice. `seconds`: the longest wait; 0: none is."""

    def __init__(self, desk: OpenRequests, seconds: float, limit: int = KEPT_BYTES) -> None:
        self._desk = desk
        self._seconds = seconds
        self._left = limit

    @property
    def on(self) -> bool:
        """Whether anything is sent twice at all."""
        return self._seconds > 0

    def keeping(self, admission: Admission, data: BodyPayload) -> AbstractContextManager[None]:
        """Keep `data` until the answer begins or the block ends, where that is allowed and there is room."""
        data.kept = self.on and admission.route in _REPEATABLE and (data.size or 0) <= self._left
        return self._kept(admission, data) if data.kept else nullcontext()

    @contextmanager
    def _kept(self, admission: Admission, data: BodyPayload) -> Iterator[None]:
        size = data.size or 0
        self._left -= size

        def drop() -> None:
            if data.kept:
                data.drop()
                self._left += size

        admission.on_begun = drop
        try:
            yield
        finally:
            drop()

    async def recovered(self, admission: Admission, error: EngineStalled) -> None:
        """Returns when the engine is well again. Raises `error` when it takes too long, or when we drain."""
        with admission.waiting():
            try:
                async with asyncio.timeout(self._seconds):
                    well = await self._desk.wait_until_healthy()
            except TimeoutError:
                well = False
        if not well:
            raise error
        admission.again()
