"""Pure: what a new control process must receive from a relay that outlived the last one.

Every event on its way to control passes here. Kept are: of each open request its admission, its first token, the sum
of its deliveries, and whether its client is slow to read; of the engine, the calls that paused it, and those still
open; and settled requests, until control acknowledges them. Replayed in the order of their times, they give a new
control process the same ledger. What the last one had recorded without acknowledging goes to both; in each, a request
settles once.
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

# Settlements kept while there is no control process; about 10 MB.
MAX_SETTLED: Final = 10_000


@dataclass(slots=True)
class _Request:
    admitted: Admitted
    first: FirstToken | None = None
    delivered: Delivered | None = None
    blocked: RequestBlocked | None = None

    def events(self) -> Iterator[Event]:
        yield self.admitted
        for event in (self.first, self.delivered, self.blocked):
            if event is not None:
                yield event


class ReplayLog:
    """One per relay process. Call `note` with each event that is sent, in order."""

    def __init__(self) -> None:
        self._open: dict[str, _Request] = {}
        self._settled: deque[tuple[int, _Request, Settled]] = deque(maxlen=MAX_SETTLED)
        self._paused: dict[str, EnginePauseChanged] = {}
        self._pause_calls: dict[int, Directing] = {}
        self._settled_count = 0  # on this connection

    def note(self, event: Event) -> None:
        """`event` is sent to the control process now, if there is one."""
        match event:
            case Delivered():
                if (request := self._open.get(event.id)) is not None:
                    request.delivered = _add(request.delivered, event)
            case Admitted():
                self._open[event.id] = _Request(event)
            case FirstToken():
                if (request := self._open.get(event.id)) is not None:
                    request.first = event
            case Settled():
                self._settled_count += 1
                if (request := self._open.pop(event.id, None)) is not None:
                    self._settled.append((self._settled_count, request, event))
            case RequestBlocked():
                if (request := self._open.get(event.id)) is not None:
                    request.blocked = event  # also its end: from then on silence is the engine's
            case EnginePauseChanged():
                self._paused.pop(event.what, None)
                if event.on:
                    self._paused[event.what] = event
            case Directing(on=True):
                self._pause_calls[event.id] = event
            case Directing():
                self._pause_calls.pop(event.id, None)
            case _:
                pass

    def ack(self, count: int) -> None:
        """The control process has recorded the first `count` settlements of this connection."""
        while self._settled and self._settled[0][0] <= count:
            self._settled.popleft()

    def events(self) -> list[Event]:
        """Everything that a new control process needs, in order; from now on `ack` counts for its connection."""
        self._settled = deque(
            ((number, request, settled) for number, (_, request, settled) in enumerate(self._settled, 1)), MAX_SETTLED
        )
        self._settled_count = len(self._settled)
        events: list[Event] = [*self._paused.values(), *self._pause_calls.values()]
        for request in self._open.values():
            events += request.events()
        for _, request, settled in self._settled:
            events += [*request.events(), settled]
        return sorted(events, key=lambda event: event.at)  # stable: events of one time keep their order


def _add(before: Delivered | None, event: Delivered) -> Delivered:
    if before is None:
        return event
    return replace(event, tokens=before.tokens + event.tokens, bytes=before.bytes + event.bytes)
