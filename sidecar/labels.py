"""Pure: texts that clients choose, made safe as labels.

Rules: a label is printable, at most `max_length` characters, and one of at most `limit` values; later values are `other`.
The first values win, because a label that changes its meaning later would break every rate over it.
"""

from __future__ import annotations

from typing import Final

OTHER: Final = "other"
NONE: Final = "none"  # an empty label would read as a missing one


def printable(text: str, max_length: int = 64) -> str:
    """`text` with everything unprintable as `?`, cut to `max_length` characters; `none` where nothing is left."""
    cut = text.strip()[:max_length]
    return "".join(c if c.isprintable() else "?" for c in cut) or NONE


class BoundedLabels:
    """Maps each text to a label, and at most `limit` of them to labels of their own."""

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
