"""Metrics pages: the sidecar's series as text.

A page is rendered at most once a second and format, however often it is scraped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, choose_encoder, generate_latest

PLAIN_CONTENT_TYPE: Final = CONTENT_TYPE_PLAIN_0_0_4
MAX_CACHED_FORMATS: Final = 4  # a client may name any version, so their number has no other bound


class MetricsPages:
    """The metrics of one registry as bytes, cached for `seconds`."""

    def __init__(
        self, registry: CollectorRegistry, *, seconds: float = 1.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._registry, self._seconds, self._clock = registry, seconds, clock
        self._kept: dict[str, tuple[float, bytes]] = {}

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """The page and its Content-Type for an `Accept` header."""
        try:
            encoder, content_type = choose_encoder(accept)
        except (TypeError, ValueError):  # a version that is not a number: plain text, never an error
            encoder, content_type = generate_latest, PLAIN_CONTENT_TYPE
        now = self._clock()
        kept = self._kept.get(content_type)
        if kept is not None and now - kept[0] < self._seconds:
            return kept[1], content_type
        page = encoder(self._registry)
        if len(self._kept) >= MAX_CACHED_FORMATS:
            self._kept.clear()
        self._kept[content_type] = now, page
        return page, content_type

    def text(self) -> str:
        return self.render()[0].decode()
