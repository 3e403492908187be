"""Pure: generated against delivered tokens: whether the engine works for the streams that are silent on the wire.

Rules:
- What the engine generates and no stream brings is for the silent ones: arguments of a tool call that a parser holds
  back, hidden thoughts, answers in one piece.
- The level rises by that surplus. It falls by MIN_SHARE of what one running sequence gets, for each silent stream.
  While it is above where it was when a stream last brought something, the engine works for that stream; next to others
  that bring all that is generated, it falls.
- One delivery event may hold several tokens: their mean number is measured while no stream is silent. A number that is
  too high would hide what the silent ones get. So it rises slowly, and falls at once when more came than was generated.
- A burst was generated before: of one delivery no more counts than MAX_BURST_S at the pace of a sequence.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

from sidecar.readings import EngineSample

# Of the mean tokens of a running sequence that a silent one must get: drafts are not accepted alike.
MIN_SHARE: Final = 0.25
MAX_BURST_S: Final = 4.0
# A reading of the counter holds for so long.
COUNTER_STALE_S: Final = 10.0
MIN_READ_INTERVAL_S: Final = 0.1
# Of the pace before, from reading to reading: the highest one lately bounds a burst.
PACE_DECAY: Final = 0.95
# Tokens, or steps, that canaries between two readings can account for.
MAX_CANARY_TOKENS: Final = 4
# Readings over which the tokens of an event are measured, the share of a higher number that is believed at once, and
# its bound.
WEIGHT_READINGS: Final = 30
WEIGHT_RISE: Final = 0.5
MAX_WEIGHT: Final = 8.0
# Of the delivered tokens, as generated: fewer cannot be.
MIN_GENERATED_SHARE: Final = 0.98
# Deliveries kept between two readings.
MAX_PENDING: Final = 1 << 14


@dataclass(slots=True)
class TokenBalance:
    """The balance of one engine.

    `read_at`: when a counter that moves while it generates was last read; None where it has none.

    `each`: tokens that one running sequence got so far, on average.
    """

    level: float = 0.0
    each: float = 0.0
    read_at: float | None = None
    _pace: float = 0.0  # tokens per second of one running sequence; 0 until the counter was seen to move
    _delivered: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=MAX_PENDING))  # (when, events)
    _weight: float = 1.0  # tokens of an event
    # Tokens and events of readings without silent streams, and of the others.
    _calm: list[tuple[float, float]] = field(default_factory=list)
    _other: list[tuple[float, float]] = field(default_factory=list)

    def has_counter(self, now: float) -> bool:
        """Whether the engine has a counter of what it generates, which has been seen to move."""
        return self._pace > 0 and self.read_at is not None and now - self.read_at <= COUNTER_STALE_S

    def delivered(self, events: int, at: float) -> None:
        """A stream brought so many events."""
        counted = min(events, MAX_BURST_S * self._pace) if self._pace else events
        if self._delivered and at - self._delivered[-1][0] < MIN_READ_INTERVAL_S:  # so that none is dropped
            at, counted = self._delivered[-1][0], counted + self._delivered.pop()[1]
        self._delivered.append((at, counted))

    def read(
        self,
        sample: EngineSample,
        at: float,
        before: EngineSample | None,
        *,
        moving: int,
        silent: int,
        waiting: int,
        canary: bool,
    ) -> None:
        """A new reading. Since the last one `moving` streams brought something; `silent` and `waiting` ones did not.

        `before`: the page of the same process before, None for a process's first one. Those that wait have had no first
        token. `canary`: one ran meanwhile.
        """
        events = 0.0
        while self._delivered and self._delivered[0][0] <= at:
            events += self._delivered.popleft()[1]
        since = self.read_at
        if sample.generation_tokens is None or sample.tokens_at_end:
            self.read_at = None
            return
        self.read_at = at
        if since is None or before is None or before.generation_tokens is None:
            return
        grown = sample.generation_tokens - before.generation_tokens
        grown = max(0.0, grown - (MAX_CANARY_TOKENS if canary else 0))
        running = max(1.0, moving + silent + waiting if sample.running is None else sample.running)
        pace = grown / running / max(at - since, MIN_READ_INTERVAL_S)
        self._pace = max(PACE_DECAY * self._pace if grown else self._pace, pace)
        self._measure_weight(grown, events, calm=not silent and not waiting and running <= moving)
        self.each += grown / running
        # Of those without a first token the engine works for at least one; the others may wait in the queue.
        due = max(silent, min(waiting, 1)) * grown / running
        self.level += grown - events * self._weight - MIN_SHARE * due

    def _measure_weight(self, tokens: float, events: float, *, calm: bool) -> None:
        readings = self._calm if calm else self._other
        readings.append((tokens, events))
        if len(readings) < WEIGHT_READINGS:
            return
        tokens, events = map(sum, zip(*readings, strict=True))
        readings.clear()
        if calm and events:
            found = min(tokens / events, MAX_WEIGHT)
            self._weight = min(found, self._weight + WEIGHT_RISE * (found - self._weight))
        elif tokens < MIN_GENERATED_SHARE * events * self._weight:
            self.level += events * (self._weight - 1.0)  # what it subtracted wrongly
            self._weight = 1.0
