"""Pure: what a new control process must receive from a relay that outlived the last one.

Every event on its way to control passes here. Kept are: of each open request its admission, its first token, the sum
of its deliveries, and whether its client is slow to read; of each open call that was passed on unread the same, less
the first token; of the engine, the calls that paused it, and those still open; and settled requests, until control
acknowledges them. Replayed in the order of their times, they give a new control process the same ledger. What the last
one had recorded without acknowledging goes to both; in each, a request settles once.
"""

from __future__ import annotations

from collections import deque
from itertools import chain
from typing import Final

from msgspec import structs

from sidecar.events import (
    Admitted,
    Delivered,
    Directing,
    EnginePauseChanged,
    Event,
    FirstToken,
    RequestBlocked,
    Settled,
    UnreadRequest,
)

MAX_SETTLED: Final = 10_000  # settlements kept while there is no control process; about 10 MB


class ReplayLog:
    """One per relay process. Call `note` with each event that is sent, in order."""

    def __init__(self) -> None:
        self._open: dict[str, dict[type[Event], Event]] = {}
        self._settled: deque[tuple[int, list[Event]]] = deque(maxlen=MAX_SETTLED)
        self._pauses: dict[str | int, EnginePauseChanged | Directing] = {}  # by code, and by call
        self._settled_count = 0  # on this connection

    def note(self, event: Event) -> None:
        """`event` is sent to the control process now, if there is one."""
        match event:
            case Delivered() | FirstToken() | RequestBlocked():  # also its end: from then on silence is the engine's
                if (request := self._open.get(event.id)) is not None:
                    before = request.get(type(event))
                    if isinstance(event, Delivered) and isinstance(before, Delivered):
                        event = structs.replace(
                            event, tokens=before.tokens + event.tokens, bytes=before.bytes + event.bytes
                        )
                    request[type(event)] = event
            case Admitted():
                self._open[event.id] = {Admitted: event}
            case UnreadRequest():  # OpenRequests bounds how many are open
                self._open.pop(event.id, None)
                if event.on:
                    self._open[event.id] = {UnreadRequest: event}
            case Settled():
                self._settled_count += 1
                if (request := self._open.pop(event.id, None)) is not None:
                    self._settled.append((self._settled_count, [*request.values(), event]))
            case EnginePauseChanged() | Directing():
                key = event.what if isinstance(event, EnginePauseChanged) else event.id
                self._pauses.pop(key, None)
                if event.on:
                    self._pauses[key] = event

    def ack(self, count: int) -> None:
        """The control process has recorded the first `count` settlements of this connection."""
        while self._settled and self._settled[0][0] <= count:
            self._settled.popleft()

    def events(self) -> list[Event]:
        """Everything that a new control process needs, in order; from now on `ack` counts for its connection."""
        self._settled = deque(((n, events) for n, (_, events) in enumerate(self._settled, 1)), MAX_SETTLED)
        self._settled_count = len(self._settled)
        requests = [*(request.values() for request in self._open.values()), *(events for _, events in self._settled)]
        # stable: events of one time keep their order
        return sorted(chain(self._pauses.values(), *requests), key=lambda event: event.at)
