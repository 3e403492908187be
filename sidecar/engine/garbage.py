"""Pure: whether an engine that serves tokens serves garbage. A report, never a reason to kill.

All canaries of one engine process ask the same, greedily: their first token is the same each time, but for near ties that batching
decides. So an answer counts as garbage only after BASE canaries agreed on another one (SHARE of all so far), and only where
STRIKES in a row differ from it. What is garbage from the start, or only in long answers, is not seen; a canary has one token.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Final

BASE: Final = 8  # canaries before a majority is believed
SHARE: Final = 0.9  # of the canaries so far that a majority needs
STRIKES: Final = 5  # canaries in a row that differ
KINDS_OF_ANSWERS: Final = 16  # told apart; an engine with more has no majority


@dataclass(slots=True)
class Sameness:
    """The answers of one engine process, as short hashes. `garbage`: the last STRIKES differ from what it always said."""

    answers: Counter[str] = field(default_factory=Counter)
    strikes: int = 0
    garbage: bool = False

    def heard(self, digest: str) -> bool:
        """Book the answer of a canary that passed. Returns True when garbage has just begun."""
        if not digest:
            return False
        usual = self._usual()
        if usual is None or digest == usual:
            self._count(digest)
            self.strikes, self.garbage = 0, False
            return False
        self.strikes += 1
        begins = self.strikes >= STRIKES and not self.garbage
        self.garbage = self.garbage or begins
        return begins

    def forget(self) -> None:
        """The engine is another process, or has other weights."""
        self.answers.clear()
        self.strikes, self.garbage = 0, False

    def _usual(self) -> str | None:
        """What nearly all canaries said; None before it is known."""
        total = self.answers.total()
        if total < BASE:
            return None
        digest, count = self.answers.most_common(1)[0]
        return digest if count >= SHARE * total else None

    def _count(self, digest: str) -> None:
        if digest in self.answers or len(self.answers) < KINDS_OF_ANSWERS:
            self.answers[digest] += 1
