"""Log lines that would repeat for as long as a fault lasts: one a minute per kind, with the number left out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

LINE_INTERVAL_S: Final = 60.0


@dataclass(slots=True)
class _Kind:
    logged_at: float
    left_out: int = 0


class LimitedLog:
    """Lines of one logger. A kind is a fixed word of the caller, never a text that a client can choose."""

    def __init__(self, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._clock = clock
        self._kinds: dict[str, _Kind] = {}

    def error(self, kind: str, text: str, *args: object) -> None:
        """Log an error, or count it if one of its kind was logged within LINE_INTERVAL_S."""
        self._write(logging.ERROR, kind, text, args)

    def warning(self, kind: str, text: str, *args: object) -> None:
        """The same for a warning."""
        self._write(logging.WARNING, kind, text, args)

    def _write(self, level: int, kind: str, text: str, args: tuple[object, ...]) -> None:
        now, before = self._clock(), self._kinds.get(kind)
        if before is not None and now - before.logged_at < LINE_INTERVAL_S:
            before.left_out += 1
            return
        left_out = f" ({before.left_out} more since the last such line)" if before and before.left_out else ""
        self._kinds[kind] = _Kind(now)
        self._log.log(level, f"{text}{left_out}", *args)
