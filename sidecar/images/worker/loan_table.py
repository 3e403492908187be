"""Pure: which pieces of device memory are lent to which loan, for how long, and how much that is in all.

A loan is one answer of /v1/preprocess whose tensors stay on the GPU. It ends when its holder gives it back, when the connection that
holds it ends, or when its time is over, whichever is first; then all its pieces go back at once. Memory counts in whole grains, as the driver
gives it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

P = TypeVar("P")  # a piece of memory

MOST: Final = 64  # loans that are open at once
PIECES: Final = 1024  # pieces of all loans
NAME: Final = re.compile(r"[0-9a-f]{32}")


@dataclass(slots=True)
class _Loan(Generic[P]):
    until: float
    pieces: list[P] = field(default_factory=list)
    bytes: int = 0


class Loans(Generic[P]):
    """The open loans; together they hold at most `budget` bytes. Times are seconds on one clock."""

    def __init__(self, budget: int, grain: int) -> None:
        self._budget = budget
        self._grain = grain
        self._open: dict[str, _Loan[P]] = {}

    @property
    def held(self) -> int:
        """Bytes that are lent now."""
        return sum(loan.bytes for loan in self._open.values())

    def open(self, name: str, until: float) -> bool:
        """Begin a loan. False for a name that is none, or that is open already, and where too many are open."""
        if not NAME.fullmatch(name) or name in self._open or len(self._open) >= MOST:
            return False
        self._open[name] = _Loan(until)
        return True

    def lend(self, name: str, size: int, allocate: Callable[[int], P | None]) -> P | None:
        """A piece of at least `size` bytes for an open loan; None where it is not open, or the memory is not there."""
        loan = self._open.get(name)
        whole = -(-size // self._grain) * self._grain
        pieces = sum(len(loan.pieces) for loan in self._open.values())
        if loan is None or size < 1 or pieces >= PIECES or self.held + whole > self._budget:
            return None
        piece = allocate(whole)
        if piece is not None:
            loan.pieces.append(piece)
            loan.bytes += whole
        return piece

    def end(self, name: str) -> list[P]:
        """The pieces of a loan that is over; none where it was not open."""
        loan = self._open.pop(name, None)
        return loan.pieces if loan is not None else []

    def due(self, now: float) -> list[str]:
        """The loans whose time is over."""
        return [name for name, loan in self._open.items() if loan.until <= now]

    def wait(self, now: float) -> float | None:
        """Seconds until the next loan's time is over; None where none is open."""
        return max(0.0, min(loan.until for loan in self._open.values()) - now) if self._open else None
