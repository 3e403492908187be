"""Pure: orders that stop an engine's work on purpose (sleep, pause, profile, weight update), as the relay saw them pass.

Rules: an order holds until its opposite was taken, the engine was restarted, or a request that came after it got a token; and never
for longer than the cap, so that a lost `off` cannot hide a hang for ever. While tokens flow it exempts nothing: a profiler runs
beside work, a pause drains it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sidecar.facts import Directed

AFTER = 1.0  # seconds after an order from which an admission counts as later
STOPPING = ("engine_sleeping", "engine_paused", "weight_update")  # while these hold, a new request gets no token


@dataclass(slots=True)
class Orders:
    """The orders that hold, by code, and since when."""

    longest: float
    since: dict[str, float] = field(default_factory=dict)

    def book(self, fact: Directed) -> None:
        """An order was taken, or its opposite."""
        if fact.on:
            self.since[fact.what] = fact.at
        else:
            self.since.pop(fact.what, None)

    def served(self, admitted_at: float) -> None:
        """A request that was admitted then got its first token: what would have kept it back is over."""
        for what in STOPPING:
            if what in self.since and self.since[what] + AFTER < admitted_at:
                del self.since[what]

    def active(self, now: float) -> str | None:
        """The code of the order that exempts now; None where none holds, or all have held for too long."""
        self.since = {what: at for what, at in self.since.items() if now - at < self.longest}
        return next(iter(self.since), None)

    def clear(self) -> None:
        """The engine is another process."""
        self.since.clear()
