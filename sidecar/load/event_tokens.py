"""Pure: how many tokens an event of a stream holds, learned from streams that ended with a usage.

One for most engines, and more with speculative decoding or where events are sent at intervals. A stream that its
client leaves has no usage: its events are counted, and are worth what those of its tenant and model were, or else of
its model.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

MAX_KEYS: Final = 1024  # of tenants and models
MIN_EVENTS: Final = 8  # before the ratio is believed
MAX_WEIGHT: Final = 512  # events of one stream, so that no stream dominates
MAX_RATIO: Final = 64.0
_KEPT: Final = 0.95  # at each stream
_ANYONE: Final = ""

Key = tuple[str, str]  # tenant, model


class EventTokens:
    """Decayed sums of tokens and events; the least recently used one is evicted."""

    def __init__(self) -> None:
        self._sums: OrderedDict[Key, tuple[float, float]] = OrderedDict()

    def get(self, tenant: str, model: str) -> float:
        """Tokens of an event."""
        for key in ((tenant, model), (_ANYONE, model)):
            tokens, events = self._sums.get(key, (0.0, 0.0))
            if events >= MIN_EVENTS:
                return tokens / events
        return 1.0

    def learn(self, tenant: str, model: str, tokens: int, events: int) -> None:
        """A stream of `events` ended, and had `tokens`."""
        if events <= 0 or tokens <= 0:
            return
        weight = min(events, MAX_WEIGHT)
        ratio = min(MAX_RATIO, max(1 / MAX_RATIO, tokens / events))
        for key in {(tenant, model), (_ANYONE, model)}:
            before, seen = self._sums.get(key, (0.0, 0.0))
            self._sums[key] = _KEPT * before + ratio * weight, _KEPT * seen + weight
            self._sums.move_to_end(key)
            if len(self._sums) > MAX_KEYS:
                self._sums.popitem(last=False)
