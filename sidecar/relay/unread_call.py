"""Pure: a request that is passed on unread, and may be work of the engine: video generation, an API of tomorrow.

Rules: it is the engine's from the first byte that is sent until it ends, however it ends. Bytes of its answer are
progress, except those of an error, the comments that keep a stream of events alive, and an answer that takes no time: a
server gives those while its engine hangs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from sidecar.events import Delivered, RequestBlocked, UnreadRequest
from sidecar.relay.admission import BLOCKED_WRITE_S

# Pieces over a longer time are made while they are sent. A tokenizer's answer comes at once.
WHOLE_ANSWER_S: Final = 0.2
# What servers send into a silent stream (llama.cpp, vLLM's --sse-keep-alive-interval, Starlette's EventSourceResponse).
_KEEP_ALIVE: Final = re.compile(rb"(?::[^\n]*+\n|event: ?ping\r?\ndata:[^\n]*+\n|\r?\n)++")
_MAX_KEEP_ALIVE_BYTES: Final = 512


@dataclass(slots=True, eq=False)
class UnreadCall:
    """The state of one call. Times are monotonic seconds."""

    id: str
    path_class: str = ""  # "": no engine work
    status: int = 0  # the engine's
    answered_at: float | None = None  # the first byte of the answer's body came
    reading_since: float | None = None  # it waits for its client's upload
    writing_since: float | None = None  # it waits for its client to read
    blocked: bool = False
    unreported_bytes: int = 0

    def begin(self, now: float) -> UnreadRequest:
        """The engine gets the request."""
        return UnreadRequest(self.id, now, True, path_class=self.path_class)

    def receive(self, piece: bytes, now: float) -> bool:
        """A piece of the answer came. Returns whether it shows that the engine works."""
        if self.answered_at is None:
            self.answered_at = now
        self.unreported_bytes += len(piece)
        if len(piece) <= _MAX_KEEP_ALIVE_BYTES and _KEEP_ALIVE.fullmatch(piece):
            return False
        return self.status < 400 and now - self.answered_at >= WHOLE_ANSWER_S

    def report_delivered(self, now: float) -> Delivered:
        """The bytes that came since the last report."""
        size, self.unreported_bytes = self.unreported_bytes, 0
        return Delivered(self.id, now, 0, size)

    def check_client(self, now: float) -> RequestBlocked | None:
        """Mark a call that waits for its client."""
        waits = [since for since in (self.reading_since, self.writing_since) if since is not None]
        if self.blocked or not waits or now - min(waits) <= BLOCKED_WRITE_S:
            return None
        self.blocked = True
        return RequestBlocked(self.id, now, True)

    def resume(self, now: float) -> RequestBlocked | None:
        """The client has sent or taken a piece."""
        if not self.blocked or self.reading_since is not None or self.writing_since is not None:
            return None
        self.blocked = False
        return RequestBlocked(self.id, now, False)

    def end(self, now: float, *, begun: bool = True) -> UnreadRequest:
        """It is over. `begun`: its beginning was reported."""
        return UnreadRequest(self.id, now, False, self.status, "" if begun else self.path_class)
