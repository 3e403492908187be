"""Pure: how much of a prompt an engine can have computed, for requests that end before their first token.

    capacity: the seconds that pass while requests wait for their first token, times the speed of prefill
    a first token: its whole prompt was computed, and nothing yet of those that came later
    left before it: what there is of the capacity goes to those that came earlier, then to this one

Rules:
- Engines serve first come, first served. A request that is overtaken waits for something else, and an answer in one
  piece was computed when a later one gets its first token.
- The speed is measured at each first token: seconds of prefill by the cost model, over the seconds of waiting since the
  one before. It starts at that of the cost model, and follows the last MEMORY_S seconds of waiting. Silence teaches
  nothing, as a long prompt needs a long time.
- What is charged of prompts that never got a first token is never more than the engine can have done in that time.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Final

MEMORY_S: Final = 60.0  # of waiting
PRIOR_S: Final = 1.0  # weight of the cost model's speed, in seconds of waiting
MAX_SPEED: Final = 16.0  # what was cached is computed in no time


@dataclass(slots=True)
class _Waiting:
    prefill: float  # seconds, by the cost model
    shows: bool  # its first token will be seen: it is a stream


class PrefillQueue:
    """Requests that the engine has, before their first token, in order of arrival."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[Hashable, _Waiting] = OrderedDict()
        self._computed: set[Hashable] = set()  # answers in one piece that are under way
        self._streams = 0  # of those that wait
        self._spare = 0.0  # seconds of prefill that can have been done, and are not used up
        self._at = 0.0
        self._since = 0.0  # the last first token, or when streams began to wait
        self._done = self._busy = PRIOR_S  # decayed

    @property
    def speed(self) -> float:
        """Seconds of prefill, by the cost model, that the engine does in a second."""
        return self._done / max(self._busy, self._done / MAX_SPEED, 1e-9)

    def enter(self, key: Hashable, prefill: float, now: float, *, shows: bool) -> None:
        """The engine got a request, of `prefill` seconds by the cost model. `shows`: its first token will be seen."""
        self._advance(now)
        if shows and not self._streams:
            self._since = self._at
        self._waiting[key] = _Waiting(prefill, shows)
        self._streams += shows

    def begin(self, key: Hashable, now: float) -> None:
        """Its first token came, or all of its answer: its prompt was computed."""
        self._advance(now)
        waiting = self._waiting.get(key)
        if waiting is None or not waiting.shows:
            self._leave(key)
            return
        is_overtaking = False
        for other in [*itertools.takewhile(lambda other: other != key, self._waiting)]:
            if self._waiting[other].shows:
                is_overtaking = True
            else:
                self._leave(other)
                self._computed.add(other)
        self._leave(key)
        self._spare = max(0.0, self._spare - waiting.prefill) if is_overtaking else 0.0
        waited, self._since = self._at - self._since, self._at
        kept = max(0.0, 1 - waited / MEMORY_S)
        self._done, self._busy = self._done * kept + waiting.prefill, self._busy * kept + waited

    def drop(self, key: Hashable, now: float) -> float:
        """It ended before its first token. Returns the share of its prompt that can have been computed, from 0 to 1."""
        self._advance(now)
        ahead = 0.0
        for other, earlier in self._waiting.items():
            if other == key or ahead >= self._spare:
                break
            ahead += earlier.prefill
        waiting = self._leave(key)
        if waiting is None or waiting.prefill <= 0:
            return 1.0
        can = min(waiting.prefill, max(0.0, self._spare - ahead))
        self._spare -= can
        return can / waiting.prefill

    def forget(self, key: Hashable, now: float) -> None:
        """It ended without any engine work."""
        self._advance(now)
        self._leave(key)

    def _leave(self, key: Hashable) -> _Waiting | None:
        self._computed.discard(key)
        waiting = self._waiting.pop(key, None)
        self._streams -= waiting is not None and waiting.shows
        return waiting

    def _advance(self, now: float) -> None:
        passed, self._at = max(0.0, now - self._at), max(self._at, now)
        self._spare = self._spare + passed * self.speed if self._waiting else 0.0


class LeftPrompts:
    """The same bound where requests are seen only at their end: all that left share the elapsed time.

    It cannot know what the engine did for others, so it charges more than a PrefillQueue.
    """

    def __init__(self) -> None:
        self._until = 0.0  # the engine's time is used up to here

    def share(self, prefill: float, sent_at: float, at: float) -> float:
        """The share of a prompt of `prefill` seconds that can have been computed from `sent_at` to `at`."""
        begin = max(self._until, sent_at)
        can = min(prefill, max(0.0, at - begin))
        self._until = begin + can
        return can / prefill if prefill > 0 else 1.0
