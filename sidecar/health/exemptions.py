"""Pure: orders that stop an engine's work on purpose (sleep, pause, profile, weight update), as the relay saw them pass.

Rules: an order counts when the engine took it, with a 2xx, and holds until its opposite was taken, the engine was
restarted, or a request that came after it got a token; never for longer than the cap, so that a lost `off` cannot hide
a hang forever. While tokens flow it exempts nothing: a profiler runs next to work, a pause drains it.

A call that is not answered yet may stop the engine already, or be a client's word only. It exempts while it is with the
engine, for no longer than the cap in one silence, and not one that was in doubt before it came. If the engine takes it,
a new silence begins; else the silence was never excused.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sidecar.events import Directing, EnginePauseChanged

AFTER = 1.0  # seconds after an order from which an admission counts as later
LONG = 1.0  # seconds for which a call must be with the engine to excuse anything: one that it refuses is over by then
STOPPING = ("engine_sleeping", "engine_paused", "weight_update")  # while these hold, a new request gets no token


@dataclass(slots=True)
class Exemptions:
    """The orders that hold, by code, and since when. `calls`: those that are with the engine, by relay and its id."""

    longest: float
    since: dict[str, float] = field(default_factory=dict)
    calls: dict[tuple[int, int], Directing] = field(default_factory=dict)
    relied: float = 0.0  # seconds for which nothing but calls exempted, since the engine last did anything
    _relied_at: float = 0.0

    def pause(self, fact: EnginePauseChanged) -> None:
        """An order was taken, or its opposite."""
        if fact.on:
            self.since[fact.what] = fact.at
        else:
            self.since.pop(fact.what, None)

    def call(self, relay: int, fact: Directing) -> None:
        """A call is with the engine, or over."""
        if fact.on:
            self.calls[relay, fact.id] = fact
            return
        self.calls.pop((relay, fact.id), None)
        if fact.taken and fact.what in self.since:  # a part of a longer stop
            self.since[fact.what] = fact.at

    def relay_lost(self, relay: int) -> None:
        """Its calls are over."""
        self.calls = {key: call for key, call in self.calls.items() if key[0] != relay}

    def under_way(self, now: float, elapsed: float, proof: float, doubted_at: float | None) -> str | None:
        """The code of a call that exempts now, and for the `elapsed` seconds since the last look.

        `proof`: when the engine last did anything; `doubted_at`: since when it has been thought to hang, or None.
        """
        if proof > self._relied_at:
            self.relied = 0.0
        self.calls = {key: call for key, call in self.calls.items() if now - call.at < self.longest}
        until = now - LONG if doubted_at is None else min(now - LONG, doubted_at)
        what = next((call.what for call in self.calls.values() if call.at <= until), None)
        if what is None or self.relied >= self.longest:
            return None
        self.relied, self._relied_at = self.relied + elapsed, now
        return what

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
