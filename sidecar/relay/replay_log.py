"""Pure: what a control process must be told of a relay's requests, when it is new and the relay is not.

Every fact on its way to control passes here. Kept are, of each open request, its admission, its first token, the sum of
its deliveries, and whether its client is slow to read; of the engine, the orders that stopped it, and such calls that
are with it; and the requests that settled, until control says that it has booked them. Sent again in the order of their
times, they give a new control process the same ledger. What the last one had booked and not yet said so goes to
both; to one, each request settles once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from sidecar.events import (
    Admitted,
    Delivered,
    Directing,
    EnginePauseChanged,
    Event,
    FirstToken,
    RequestBlocked,
    Settled,
)

MAX_SETTLED: Final = 10_000  # settlements kept for a control process that does not come; about 10 MB


@dataclass(slots=True)
class _Request:
    admitted: Admitted
    first: FirstToken | None = None
    delivered: Delivered | None = None
    pressed: RequestBlocked | None = None

    def facts(self) -> Iterator[Event]:
        yield self.admitted
        for fact in (self.first, self.delivered, self.pressed):
            if fact is not None:
                yield fact


class ReplayLog:
    """One per relay process. `note` each fact that is sent, in order."""

    def __init__(self) -> None:
        self._open: dict[str, _Request] = {}
        self._settled: deque[tuple[int, _Request, Settled]] = deque(maxlen=MAX_SETTLED)
        self._directed: dict[str, EnginePauseChanged] = {}
        self._directing: dict[int, Directing] = {}
        self._ends = 0  # settlements on this connection

    def note(self, fact: Event) -> None:
        """`fact` goes to the control process now, or would if there were one."""
        match fact:
            case Delivered():
                if (request := self._open.get(fact.id)) is not None:
                    request.delivered = _sum(request.delivered, fact)
            case Admitted():
                self._open[fact.id] = _Request(fact)
            case FirstToken():
                if (request := self._open.get(fact.id)) is not None:
                    request.first = fact
            case Settled():
                self._ends += 1
                if (request := self._open.pop(fact.id, None)) is not None:
                    self._settled.append((self._ends, request, fact))
            case RequestBlocked():
                if (request := self._open.get(fact.id)) is not None:
                    request.pressed = fact  # its end, too: since then the engine answers for the silence
            case EnginePauseChanged():
                self._directed.pop(fact.what, None)
                if fact.on:
                    self._directed[fact.what] = fact
            case Directing(on=True):
                self._directing[fact.id] = fact
            case Directing():
                self._directing.pop(fact.id, None)
            case _:
                pass

    def booked(self, count: int) -> None:
        """The control process has read the first `count` settlements of this connection."""
        while self._settled and self._settled[0][0] <= count:
            self._settled.popleft()

    def events(self) -> list[Event]:
        """All that a new control process must be told first, in order; from now on `booked` counts for its connection."""
        self._settled = deque(((n, r, end) for n, (_, r, end) in enumerate(self._settled, 1)), MAX_SETTLED)
        self._ends = len(self._settled)
        facts: list[Event] = [*self._directed.values(), *self._directing.values()]
        for request in self._open.values():
            facts += request.facts()
        for _, request, end in self._settled:
            facts += [*request.facts(), end]
        return sorted(facts, key=lambda fact: fact.at)  # stable: what is of one time keeps its order


def _sum(before: Delivered | None, fact: Delivered) -> Delivered:
    if before is None:
        return fact
    return replace(fact, tokens=before.tokens + fact.tokens, bytes=before.bytes + fact.bytes)
