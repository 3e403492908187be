"""Pure: labels from texts that clients choose.

Rules: a label is printable and has at most `max_length` characters. Of one set there are at most `limit` labels; later
ones become `other`. The first ones win, which suits texts of few kinds, such as formats and stages. The names of
tenants and models, which clients invent, are bounded in sidecar/load/client_labels.py.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

OTHER: Final = "other"
NONE: Final = "none"  # an empty label would read as a missing one
DEFAULT_TENANT: Final = "default"  # of requests that name none


@lru_cache(maxsize=4096)  # a few names recur
def printable(text: str, max_length: int = 64) -> str:
    """`text` cut to `max_length` characters, with `?` for unprintable ones; `none` if it is empty."""
    cut = text.strip()[:max_length].rstrip()  # so that a label is the label of itself
    return "".join(c if c.isprintable() else "?" for c in cut) or NONE


class BoundedLabels:
    """Maps texts to labels, at most `limit` of them to labels of their own."""

    def __init__(self, limit: int, max_length: int = 64) -> None:
        self._limit = limit
        self._max_length = max_length
        self._known: set[str] = set()

    def __call__(self, text: str) -> str:
        label = printable(text, self._max_length)
        if label in self._known:
            return label
        if len(self._known) >= self._limit:
            return OTHER
        self._known.add(label)
        return label
