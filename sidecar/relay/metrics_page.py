"""The merged metrics page of a relay, requested from the control process at most once a second."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

from sidecar.events import Event, MetricsPage, MetricsPageRequested
from sidecar.report.merged_page import merge_pages

PAGE_FRESH_S: Final = 1.0
PAGE_TIMEOUT_S: Final = 1.0
MAX_BYTES: Final = 16 << 20  # of an engine's page
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


def join(engines: bytes, ours: bytes) -> bytes:
    """The engine's page and ours as one."""
    return merge_pages(engines.decode("utf-8", "replace"), ours.decode()).encode()


class MergedMetricsPage:
    """One per relay process. `emit` sends MetricsPageRequested; the answer comes by `put`."""

    def __init__(self, emit: Callable[[Event], None]) -> None:
        self._emit = emit
        self._page: bytes | None = None
        self._received_at = 0.0
        self._requested: asyncio.Future[bytes] | None = None

    def put(self, page: MetricsPage) -> None:
        """The control process sent a page."""
        self._page, self._received_at = page.text.encode(), time.monotonic()
        if self._requested is not None and not self._requested.done():
            self._requested.set_result(self._page)
        self._requested = None

    async def get(self) -> bytes | None:
        """A fresh page, or None if control does not answer in time. Concurrent callers share one request."""
        if self._page is not None and time.monotonic() - self._received_at < PAGE_FRESH_S:
            return self._page
        if self._requested is None:
            self._requested = asyncio.get_running_loop().create_future()
            self._emit(MetricsPageRequested(time.monotonic()))
        requested = self._requested
        done, _ = await asyncio.wait((requested,), timeout=PAGE_TIMEOUT_S)
        if done:
            return requested.result()
        if self._requested is requested:  # ask again next time: the request may have been lost
            self._requested = None
        return None
