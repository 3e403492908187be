"""Pure: what canaries cost, and whether an engine that serves tokens serves garbage.

Garbage is a report, never a reason to kill. All canaries of one engine process ask the same, greedily: their first token is the
same each time, but for near ties that batching decides. So an answer counts only after BASE canaries agreed on another one (SHARE
of all so far), and only where STRIKES in a row differ from it. What is garbage from the start, or only in long answers, or while
users' work leaves no room for canaries, is not seen.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from sidecar.events import CanaryResult, RequestSize
from sidecar.load import cost_model
from sidecar.snapshot import CanaryUse

BASE: Final = 8  # canaries before a majority is believed
SHARE: Final = 0.9  # of the canaries so far that a majority needs
STRIKES: Final = 5  # canaries in a row that differ: 35 s of an idle engine
ANSWERS: Final = 16  # told apart; an engine with more has no majority

GARBAGE: Final = (
    f"the last {STRIKES} canaries answered otherwise than all before them: the engine may compute garbage; "
    "nothing is restarted for it"
)


@dataclass(slots=True)
class GarbageDetector:
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
        """The engine is another process, or may have other weights."""
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
        if digest in self.answers or len(self.answers) < ANSWERS:
            self.answers[digest] += 1


@dataclass(slots=True)
class CanaryStats:
    """The canaries that passed since our start: never counted as a tenant's work, so counted here."""

    co: cost_model.Coefficients
    count: int = 0
    mu: float = 0.0
    tokens: int = 0
    sameness: GarbageDetector = field(default_factory=GarbageDetector)
    model: str = ""  # of the last one: others answer otherwise

    def passed(self, result: CanaryResult) -> bool:
        """Book one. Returns True when its answer makes it garbage."""
        if result.model != self.model:
            self.model = result.model
            self.sameness.forget()
        output = 1 if result.digest else 0  # an embedding has no output tokens
        self.count += 1
        self.mu += cost_model.mu(RequestSize(uncached=result.prompt_tokens, output=output), self.co)
        self.tokens += result.prompt_tokens + output
        return self.sameness.heard(result.digest)

    def use(self) -> CanaryUse:
        """For reports."""
        return CanaryUse(self.count, self.mu, self.tokens, self.sameness.garbage)
