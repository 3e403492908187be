"""Pure: calls that stop an engine's work on purpose (sleep, pause, profile, weight update), as the relay saw them pass.

Rules:
- A pause counts once the engine accepted it with a 2xx. It holds until its opposite was accepted, the engine denies it
  when asked (/is_sleeping, /is_paused), the engine was restarted, or a later request got a token. It excuses no longer
  than the cap, so that a lost `off` cannot hide a hang forever. Age never starts work: until one of these ends the
  pause, no canary is sent, which may touch memory that the engine has released.
- While tokens flow nothing is exempt: a profiler runs next to work, and a pause drains it.
- A call without an answer may have stopped the engine already, or may be only a client's claim. It exempts while it is
  with the engine, at most for the cap within one silence, and never a silence that was in doubt before it came. If the
  engine accepts it, a new silence begins; otherwise the silence was never excused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from sidecar.events import CACHE_RESET, Directing, EnginePauseChanged

# Seconds after a pause from which an admission counts as later.
LATER_ADMISSION_S: Final = 1.0
# Seconds that a call must be with the engine before it excuses anything: one that the engine refuses is over by then.
MIN_CALL_S: Final = 1.0
# While these hold, a new request gets no token.
STOPPING: Final = ("engine_sleeping", "engine_paused", "weight_update")


@dataclass(slots=True)
class Exemptions:
    """The pauses in force, by code, and since when. `calls`: those with the engine now, by relay and its id."""

    cap: float
    since: dict[str, float] = field(default_factory=dict)
    calls: dict[tuple[int, int], Directing] = field(default_factory=dict)
    shown: set[str] = field(default_factory=set)  # those that the engine's own state shows
    relied: float = 0.0  # seconds for which only calls exempted, since the engine last did anything
    _relied_at: float = 0.0

    def pause(self, event: EnginePauseChanged) -> None:
        """The engine accepted a pause, or its opposite."""
        if event.on:
            self.since[event.what] = event.at
            (self.shown.add if event.shown else self.shown.discard)(event.what)
        else:
            self.since.pop(event.what, None)

    def call(self, relay: int, event: Directing) -> None:
        """A call is with the engine, or over."""
        if event.on:
            self.calls[relay, event.id] = event
            return
        self.calls.pop((relay, event.id), None)
        if event.taken and event.what in self.since:  # a part of a longer pause
            self.since[event.what] = event.at

    def is_stop_called(self) -> bool:
        """Whether a call is with the engine that may stop its work at any moment, or that a canary would foil."""
        return any(call.what in (*STOPPING, CACHE_RESET) for call in self.calls.values())

    def relay_lost(self, relay: int) -> None:
        """End the calls of a dead relay."""
        self.calls = {key: call for key, call in self.calls.items() if key[0] != relay}

    def under_way(self, now: float, elapsed: float, proof: float, doubted_at: float | None) -> str | None:
        """The code of a call that exempts now, and for the `elapsed` seconds since the last tick.

        `proof`: when the engine last did anything; `doubted_at`: since when it has been thought to hang, or None.
        """
        if proof > self._relied_at:
            self.relied = 0.0
        self.calls = {key: call for key, call in self.calls.items() if now - call.at < self.cap}
        until = now - MIN_CALL_S if doubted_at is None else min(now - MIN_CALL_S, doubted_at)
        pauses = (call for call in self.calls.values() if call.what != CACHE_RESET)
        what = next((call.what for call in pauses if call.at <= until), None)
        if what is None or self.relied >= self.cap:
            return None
        self.relied, self._relied_at = self.relied + elapsed, now
        return what

    def served(self, admitted_at: float) -> None:
        """End the pauses that would have held back a request admitted then: it got its first token."""
        for what in STOPPING:
            if what in self.since and self.since[what] + LATER_ADMISSION_S < admitted_at:
                del self.since[what]

    def deny(self, denied: Mapping[str, float]) -> None:
        """End the pauses that the engine itself denied later: it was resumed in a way that no relay saw accepted."""
        for what, at in denied.items():
            if what in self.shown and what in self.since and self.since[what] < at:
                del self.since[what]

    def active(self, now: float) -> str | None:
        """The code of the pause that exempts now; None where none holds, or all have held for too long."""
        return next((what for what, at in self.since.items() if now - at < self.cap), None)

    def are_stopping(self) -> bool:
        """Whether a pause is in force, however old, during which the engine must not be asked to work."""
        return any(what in self.since for what in STOPPING)

    def clear(self) -> None:
        """The engine is another process."""
        self.since.clear()
