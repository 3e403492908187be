"""Pure: whether an engine that serves tokens serves garbage.

Rules: garbage is reported and never a reason to kill. All canaries of one engine process ask the same, greedily: their
first token is the same each time, except for near ties that batching decides. So an answer counts only after
MIN_CANARIES agreed on another one (MAJORITY of all so far), and only if STRIKES in a row differ from it. Not detected:
garbage from the start, garbage only in long answers, and garbage while users' work leaves no room for canaries.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Final

# Canaries before a majority is believed, and the share of all that it needs.
MIN_CANARIES: Final = 8
MAJORITY: Final = 0.9
# Canaries in a row that differ: 35 s of an idle engine.
STRIKES: Final = 5
# Different answers kept; an engine with more has no majority.
MAX_ANSWERS: Final = 16

GARBAGE: Final = (
    f"the last {STRIKES} canaries answered differently from all before them: the engine may compute garbage; "
    "nothing is restarted for it"
)


@dataclass(slots=True)
class GarbageDetector:
    """The answers of one engine process, as short hashes. `found`: the last STRIKES differ from the usual answer."""

    answers: Counter[str] = field(default_factory=Counter)
    strikes: int = 0
    found: bool = False
    model: str = ""  # of the last canary: another model has other answers

    def observe(self, digest: str, model: str = "") -> bool:
        """Count the answer of a canary that passed. Returns True when garbage has just begun."""
        if model != self.model:
            self.model = model
            self.reset()
        if not digest:
            return False
        usual = self._usual()
        if usual is None or digest == usual:
            if digest in self.answers or len(self.answers) < MAX_ANSWERS:
                self.answers[digest] += 1
            self.strikes, self.found = 0, False
            return False
        self.strikes += 1
        begins = self.strikes >= STRIKES and not self.found
        self.found |= begins
        return begins

    def reset(self) -> None:
        """The engine is another process, or may have other weights."""
        self.answers.clear()
        self.strikes, self.found = 0, False

    def _usual(self) -> str | None:
        """The answer of nearly all canaries; None before it is known."""
        total = self.answers.total()
        if total < MIN_CANARIES:
            return None
        digest, count = self.answers.most_common(1)[0]
        return digest if count >= MAJORITY * total else None
