"""Pure: whether an engine that has served refuses everything now: its worker is lost behind a front that lives.

Rules:
- A refusal is a 404 or a 5xx to a user's request before any byte, or a canary that has passed before and is rejected
  now. 429 and 503 are refusals only while the engine has nothing to do.
- Anything served ends it, and so does a request that was open at the engine for long: it was not refused.
- Users alone may all be wrong; canaries refused with them, or 5xx to many users where no canary passes, are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sidecar.events import CanaryResult, Settled

BUSY_STATUSES: Final = (429, 503)
# Refused canaries in a row, or where none passes users' requests, before everything counts as refused.
MIN_CANARIES: Final = 2
MIN_USERS: Final = 5


@dataclass(slots=True)
class RefusedWork:
    """What was refused since anything was last served. `since`: the first refusal."""

    since: float | None = None
    canaries: int = 0
    users: int = 0  # with 5xx

    def served(self) -> None:
        """A user or a canary got something."""
        self.since, self.canaries, self.users = None, 0, 0

    def canary(self, result: CanaryResult, *, idle: bool) -> None:
        """A canary ended. `idle`: the engine has nothing to do."""
        if result.outcome == "ok":
            self.served()
        elif (result.outcome == "rejected" and result.known) or (result.outcome == "busy" and idle):
            self.canaries += 1
            self._refused(result.ended)

    def settle(self, event: Settled, *, idle: bool) -> None:
        """A request of a user ended."""
        if event.outcome == "ok" or event.delivered_tokens:
            self.served()
            return
        is_busy = event.status in BUSY_STATUSES
        if (
            event.sent_at is None
            or not (event.status == 404 or event.status >= 500 or is_busy)
            or (is_busy and not idle)
        ):
            return
        self.users += event.status >= 500
        self._refused(event.at)

    def seconds(self, now: float, floor: float, *, can_ask: bool | None, open_for: float | None) -> float | None:
        """For how long everything has been refused; None before that is known for `floor` seconds.

        `open_for`: for how long requests have been open at the engine in silence, None where none is.
        """
        if open_for is not None:
            if open_for > floor:
                self.served()
            return None
        is_known = self.canaries >= MIN_CANARIES or (can_ask is False and self.users >= MIN_USERS)
        if self.since is None or not is_known or now - self.since < floor:
            return None
        return now - self.since

    def _refused(self, at: float) -> None:
        if self.since is None:
            self.since = at
