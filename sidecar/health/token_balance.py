"""Pure: generated against delivered tokens: whether the engine works for the streams that are silent on the wire.

Rules:
- What the engine generates and no stream brings is for the silent ones: arguments of a tool call that a parser holds
  back, hidden thoughts, answers in one piece.
- The level rises by that surplus, and falls by SHARE of what one running sequence gets for each silent stream. While it
  rises above where it stood when a stream last brought something, that stream is worked for; next to others that bring
  all that is generated, it falls.
- One event may hold several tokens: their mean number is measured while no stream is silent. One that is too high would
  hide what the silent ones get: it rises slowly and falls at once, to one where more came than was generated.
- A burst was generated before: of one delivery no more counts than BURST seconds at the pace of a sequence.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from sidecar.readings import EngineSample

SHARE = 0.25  # of the mean tokens of a running sequence, that a silent one must get: drafts are not accepted alike
BURST = 4.0  # seconds
COUNTED = 10.0  # seconds for which a reading of the counter holds
LEAST = 0.1  # seconds between two readings, at least
FADE = 0.95  # of the pace that was, from reading to reading: the highest one lately bounds a burst
CANARIES = 4  # tokens, or steps, that canaries between two readings can account for
WINDOW = 30  # readings over which the tokens of an event are measured
RISE = 0.5  # of a higher number that is believed at once
MOST = 8.0  # tokens of an event
WRONG = 0.98  # of the tokens that were delivered, as generated: fewer cannot be
PENDING = 1 << 14  # deliveries kept between two readings


@dataclass(slots=True)
class TokenBalance:
    """Of one engine. `read_at`: when a counter that moves while it generates was last read; None where it has none.

    `each`: tokens that one running sequence got so far, on average.
    """

    level: float = 0.0
    each: float = 0.0
    read_at: float | None = None
    _generated: float = 0.0
    _pace: float = 0.0  # tokens per second of one running sequence; 0 until the counter was seen to move
    _delivered: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=PENDING))  # (when, events)
    _weight: float = 1.0  # tokens of an event
    # Tokens and events of readings without silent streams, and of the others.
    _calm: list[tuple[float, float]] = field(default_factory=list)
    _other: list[tuple[float, float]] = field(default_factory=list)

    def has_counter(self, now: float) -> bool:
        """Whether what the engine generates is known from its counter, which has been seen to move."""
        return self._pace > 0 and self.read_at is not None and now - self.read_at <= COUNTED

    def delivered(self, events: int, at: float) -> None:
        """A stream brought so many events."""
        self._delivered.append((at, min(events, BURST * self._pace) if self._pace else events))

    def read(self, sample: EngineSample, at: float, *, moving: int, silent: int, waiting: int, canary: bool) -> None:
        """A new reading. Since the last one `moving` streams brought something; `silent` and `waiting` ones did not.

        Those that wait have had no first token. `canary`: one ran meanwhile.
        """
        events = 0.0
        while self._delivered and self._delivered[0][0] <= at:
            events += self._delivered.popleft()[1]
        before, since = self._generated, self.read_at
        if sample.generation_tokens is None or sample.tokens_at_end:
            self.read_at = None
            return
        self._generated, self.read_at = sample.generation_tokens, at
        if since is None or self._generated < before:  # the first, or another process
            return
        grown = max(0.0, self._generated - before - (CANARIES if canary else 0))
        running = max(1.0, moving + silent + waiting if sample.running is None else sample.running)
        self._pace = max(FADE * self._pace if grown else self._pace, grown / running / max(at - since, LEAST))
        self._weigh(grown, events, calm=not silent and not waiting and running <= moving)
        self.each += grown / running
        # Of those without a first token at least one is worked for; the others may wait in the queue.
        due = max(silent, min(waiting, 1)) * grown / running
        self.level += grown - events * self._weight - SHARE * due

    def _weigh(self, tokens: float, events: float, *, calm: bool) -> None:
        """Measure the tokens of an event."""
        readings = self._calm if calm else self._other
        readings.append((tokens, events))
        if len(readings) < WINDOW:
            return
        tokens, events = map(sum, zip(*readings, strict=True))
        readings.clear()
        if calm and events:
            found = min(tokens / events, MOST)
            self._weight = min(found, self._weight + RISE * (found - self._weight))
        elif tokens < WRONG * events * self._weight:
            self.level += events * (self._weight - 1.0)  # what it took wrongly
            self._weight = 1.0
