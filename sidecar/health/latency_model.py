"""Pure: what this engine has taught: its gaps, its speed against the coefficients, and whether others use it.

Rules:
- All fields are plain numbers, so that they can be saved over a restart.
- What is learned is a percentile, never a maximum: one hiccup does not lengthen every later patience.
- Gaps decay with the time that the engine worked, not with the clock.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import sqrt
from statistics import median
from typing import Final

# Work in which a learned gap loses half its weight.
GAP_HALF_LIFE_S: Final = 600.0
# Per output token, before any was measured.
TOKEN_SECONDS: Final = 0.05
# No hardware gives one stream more tokens than one per so long: what comes faster was held back before.
MIN_TOKEN_S: Final = 0.001
MAX_TOKEN_S: Final = 60.0
# Weight of one stream in the time per token.
TOKEN_WEIGHT: Final = 0.1
MAX_PREFILLS: Final = 64
# Observations from which a line is drawn: three in each third; and how much longer the longest third must be than the
# shortest.
MIN_LINE_PREFILLS: Final = 9
MIN_LINE_SPREAD: Final = 1.5
# Without a line, the ratio of a shorter predicted prefill is taken over this.
SHORT_PREFILL_S: Final = 0.05
# Times the median prefill that any one of them can weigh.
MAX_PREFILL_WEIGHT: Final = 4.0
MIN_PREFILL_S: Final = 0.001
# Share of the prefills' weight that must be no slower than what is learned.
SLOWNESS_QUANTILE: Final = 0.9
MAX_SLOWNESS: Final = 1000.0
# Until a line could be drawn, a machine may be this much slower than the coefficients.
UNKNOWN_SLOWNESS: Final = 10.0
# Standard errors by which a line's overhead is taken lower than it seems.
OVERHEAD_STANDARD_ERRORS: Final = 2.0

# A machine of which nothing was measured may be so much slower than the coefficients: a CPU with a large model is, next
# to the H100 that they assume. A prompt of a thousand tokens then reaches the cap.
UNMEASURED_SLOWNESS: Final = 5000.0
# What was measured holds for prompts that are so many times longer; with a line through several sizes, more.
MEASURED_REACH: Final = 4.0
LINE_REACH: Final = 32.0
# Seconds per output token where none was measured.
UNMEASURED_TOKEN_S: Final = 1.0
# Answers of a route from which its times are known, those that are kept, and the margin over the longest.
MIN_ROUTE_TIMES: Final = 5
MAX_ROUTE_TIMES: Final = 32
ROUTE_MARGIN: Final = 3.0

Prefill = tuple[float, float]  # seconds that the cost model predicted, and that it took


@dataclass(slots=True)
class LatencyModel:
    """A first token takes `slowness` x its predicted prefill + `overhead` seconds, nine times in ten.

    `gap`: the longest silence that ended well; `whole_gap`: of those with an answer in one piece outstanding, whose
    length explains them and says nothing about streams. `foreign`: this engine has done work that did not pass the
    relay. `answers`: seen to begin or, without tokens, to end. `concurrent`: so many requests were computed
    at once. `one_by_one`: canaries in a row that were answered only after a user was.
    `token_times`: streams that were timed. `routes`: seconds that answers without tokens took per model unit, by route.
    `start_seconds`: the longest start of the engine, 0 before any. `measured_to`: predicted seconds of the longest
    prefill of which something is known.
    """

    first_tokens: int = 0
    gap: float = 0.0
    whole_gap: float = 0.0
    prefills: deque[Prefill] = field(default_factory=lambda: deque(maxlen=MAX_PREFILLS))
    slowness: float = UNKNOWN_SLOWNESS
    overhead: float = 0.0
    fitted_at: int = 0  # first tokens at the last fit
    token_seconds: float = TOKEN_SECONDS
    foreign: bool = False
    at: float = 0.0
    answers: int = 0
    concurrent: int = 0
    one_by_one: int = 0
    token_times: int = 0
    routes: dict[str, list[float]] = field(default_factory=dict)
    measured_to: float = 0.0
    start_seconds: float = 0.0

    def __post_init__(self) -> None:
        # Saved state has the items, not the bound.
        self.prefills = deque(self.prefills, maxlen=MAX_PREFILLS)

    def decay(self, now: float, *, working: bool) -> None:
        """Let the learned gaps lose weight with the time that the engine worked."""
        if working:
            kept = 0.5 ** (max(0.0, now - self.at) / GAP_HALF_LIFE_S)
            self.gap *= kept
            self.whole_gap *= kept
        self.at = now

    def silence(self, seconds: float, *, whole: bool) -> None:
        """A silence ended well. `whole`: an answer in one piece was outstanding in it."""
        if whole:
            self.whole_gap = max(self.whole_gap, seconds)
        else:
            self.gap = max(self.gap, seconds)

    def first_token(self, seconds: float, prefill: float) -> None:
        """A prefill took `seconds`; the cost model had predicted `prefill`."""
        self.first_tokens += 1
        self.prefills.append((prefill, seconds))

    def refit(self) -> None:
        """Fit slowness and overhead to the first tokens so far; cheap where none is new."""
        if self.fitted_at != self.first_tokens:
            self.fitted_at = self.first_tokens
            self.slowness, self.overhead = fit_slowness(self.prefills)
            self.measured_to = reach(self.prefills)

    def token_time(self, seconds: float) -> None:
        """Mean time per output token of a stream that ended. Kept at twice the mean: answers differ."""
        if MIN_TOKEN_S <= seconds < MAX_TOKEN_S:
            self.token_seconds += TOKEN_WEIGHT * (2 * seconds - self.token_seconds)
            self.token_times += 1

    @property
    def longest_token(self) -> float:
        """Seconds per output token that an unseen answer may take."""
        return self.token_seconds if self.token_times else UNMEASURED_TOKEN_S

    def route_time(self, route: str, seconds: float) -> None:
        """An answer without tokens took so long, per unit of its size."""
        times = self.routes.setdefault(route, [])
        times.append(seconds)
        del times[:-MAX_ROUTE_TIMES]

    def route_seconds(self, route: str, unknown: float) -> float:
        """What an answer of this route may take per unit of its size; `unknown` before enough were seen."""
        times = self.routes.get(route, [])
        return ROUTE_MARGIN * max(times) if len(times) >= MIN_ROUTE_TIMES else unknown

    def start_time(self, seconds: float) -> None:
        """The engine has started, and served its first token after so long."""
        self.start_seconds = max(self.start_seconds, seconds)

    def slowest(self, prefill: float) -> float:
        """The longest that a prefill of about this size, or its share of a longer one, took lately, in seconds.

        It counts where the others may have come from a cache of which the engine says nothing.
        """
        likes = (seen for seen in self.prefills if prefill <= MEASURED_REACH * seen[0])
        return max((took * min(1.0, prefill / max(predicted, MIN_PREFILL_S)) for predicted, took in likes), default=0.0)

    def seconds(self, prefill: float) -> float:
        """What a prefill takes here that the cost model predicts at `prefill` seconds."""
        return self.slowness * prefill + self.overhead if prefill else 0.0


def fit_slowness(seen: Sequence[Prefill]) -> tuple[float, float]:
    """Slowness (>= 1) and overhead (seconds) that cover nine in ten of the prefills, weighted by their predicted time.

    Long prefills decide, because short ones are mostly overhead and noise. What cannot be told apart counts as
    slowness: a machine must not be killed for being slow.
    """
    if not seen:
        return UNKNOWN_SLOWNESS, 0.0
    overhead = fit_overhead(seen)
    shortest = 0.0 if overhead is not None else SHORT_PREFILL_S
    fixed = overhead or 0.0
    max_weight = MAX_PREFILL_WEIGHT * max(MIN_PREFILL_S, median(predicted for predicted, _ in seen))
    ratios = sorted(
        (
            max(0.0, took - fixed) / max(predicted, shortest, MIN_PREFILL_S),
            min(max(predicted, MIN_PREFILL_S), max_weight),
        )
        for predicted, took in seen
    )
    weights = list(accumulate(weight for _, weight in ratios))
    ratio = ratios[bisect_left(weights, SLOWNESS_QUANTILE * weights[-1])][0]
    min_slowness = 1.0 if len(seen) >= MIN_LINE_PREFILLS else UNKNOWN_SLOWNESS
    return min(MAX_SLOWNESS, max(min_slowness, ratio)), fixed


def reach(seen: Sequence[Prefill]) -> float:
    """The longest predicted prefill that is comparable with those seen, in seconds; 0 before any."""
    longest = max((predicted for predicted, _ in seen), default=0.0)
    return longest * (LINE_REACH if fit_overhead(seen) is not None else MEASURED_REACH)


def fit_overhead(seen: Sequence[Prefill]) -> float | None:
    """Fixed seconds of a first token, as few as the observations allow; None where sizes are too alike.

    A resistant line (Tukey 1970) through the medians of the shortest and the longest third: an outlier cannot tilt it.
    """
    if len(seen) < MIN_LINE_PREFILLS:
        return None
    ranked = sorted(seen)
    third = len(ranked) // 3
    low, high = ranked[:third], ranked[-third:]
    x1, x2 = median(x for x, _ in low), median(x for x, _ in high)
    if x2 < MIN_LINE_SPREAD * x1 or x2 <= x1:
        return None
    slope = (median(y for _, y in high) - median(y for _, y in low)) / (x2 - x1)
    rests = [y - slope * x for x, y in ranked]
    middle = median(rests)
    noise = 1.5 * median(abs(r - middle) for r in rests)
    error = 1.9 * noise * sqrt(2 / third) * x1 / (x2 - x1) + noise / sqrt(third)
    fastest = sorted(y for _, y in seen)[len(seen) // 10]
    return max(0.0, min(middle - OVERHEAD_STANDARD_ERRORS * error, fastest))
