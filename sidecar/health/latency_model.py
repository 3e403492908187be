"""Pure: what this engine has taught of itself: its gaps, its speed against the coefficients, whom it serves.

Rules: all fields are plain numbers, so that they can be kept over a restart; what is learned is a percentile, never a maximum, so
that one hiccup does not lengthen every later patience; gaps fade with the time that the engine worked, not with the clock.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import sqrt
from statistics import median

GAP_HALF_LIFE_S = 600.0  # seconds of work in which a learned gap loses half its weight
TOKEN_SECONDS = 0.05  # seconds per output token, before any was measured
LONGEST_ANSWER = 1 << 17  # tokens that an answer without max_tokens may have: models of today give no longer ones
LEAST_TOKEN = 0.001  # seconds; no hardware gives one stream more tokens: what comes faster was held back before
MAX_PREFILLS = 64  # prefills kept
MIN_LINE_PREFILLS = 9  # observations from which a line is drawn: three in each third
MIN_LINE_SPREAD = 1.5  # times that the longest third must be as long as the shortest: else no line can be told
SHORT_PREFILL_S = 0.05  # seconds of predicted prefill; without a line, the ratio of a shorter one is taken over this
MAX_PREFILL_WEIGHT = 4.0  # times the median prefill that any one of them can weigh
MIN_PREFILL_S = 0.001  # seconds; no prefill is shorter
SLOWNESS_QUANTILE = 0.9  # the share of the prefills' weight that must be no slower than what is learned
MAX_SLOWNESS = 1000.0
UNKNOWN_SLOWNESS = 10.0  # until a line could be drawn, a machine may be this much slower than the coefficients
OVERHEAD_STANDARD_ERRORS = 2.0  # standard errors by which a line's overhead is taken lower than it seems

Prefill = tuple[float, float]  # seconds that the cost model said, and that it took


@dataclass(slots=True)
class LatencyModel:
    """`slowness` and `overhead`: a first token takes slowness x its predicted prefill + overhead seconds, nine times in ten.

    `gap`: the longest silence that ended well; `whole_gap`: of those in which an answer in one piece was outstanding,
    whose length explains them: they are no measure of how long a stream may be silent.
    `foreign`: this engine has done work that came by another way than the relay.
    """

    first_tokens: int = 0
    gap: float = 0.0
    whole_gap: float = 0.0
    prefills: deque[Prefill] = field(default_factory=lambda: deque(maxlen=MAX_PREFILLS))
    slowness: float = UNKNOWN_SLOWNESS
    overhead: float = 0.0
    fitted_at: int = 0  # first tokens when the two were made
    token_seconds: float = TOKEN_SECONDS
    foreign: bool = False
    at: float = 0.0

    def __post_init__(self) -> None:
        # saved state brings back the items, not the bound
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
        """A prefill took `seconds`; the cost model had said `prefill`."""
        self.first_tokens += 1
        self.prefills.append((prefill, seconds))

    def refit(self) -> None:
        """Bring slowness and overhead up to the first tokens so far; cheap where none is new."""
        if self.fitted_at != self.first_tokens:
            self.fitted_at = self.first_tokens
            self.slowness, self.overhead = fit_slowness(self.prefills)

    def token_time(self, seconds: float) -> None:
        """Mean time per output token of a stream that ended. Kept at twice the mean: answers differ."""
        if LEAST_TOKEN <= seconds < 60:
            self.token_seconds += 0.1 * (2 * seconds - self.token_seconds)

    def seconds(self, prefill: float) -> float:
        """What a prefill that the cost model puts at `prefill` seconds takes here."""
        return self.slowness * prefill + self.overhead if prefill else 0.0


def fit_slowness(seen: Sequence[Prefill]) -> tuple[float, float]:
    """Slowness (>= 1) and overhead (seconds) that hold nine in ten of the prefills, each weighed by its predicted time.

    Long prefills decide, because short ones are mostly overhead and noise. What cannot be told apart is held to be slowness: a
    machine must not be killed for being slow.
    """
    if not seen:
        return UNKNOWN_SLOWNESS, 0.0
    overhead = fit_overhead(seen)
    shortest = 0.0 if overhead is not None else SHORT_PREFILL_S
    fixed = overhead or 0.0
    most = MAX_PREFILL_WEIGHT * max(MIN_PREFILL_S, median(said for said, _ in seen))
    ratios = sorted(
        (max(0.0, took - fixed) / max(said, shortest, MIN_PREFILL_S), min(max(said, MIN_PREFILL_S), most))
        for said, took in seen
    )
    weights = list(accumulate(w for _, w in ratios))
    ratio = ratios[bisect_left(weights, SLOWNESS_QUANTILE * weights[-1])][0]
    least = 1.0 if len(seen) >= MIN_LINE_PREFILLS else UNKNOWN_SLOWNESS
    return min(MAX_SLOWNESS, max(least, ratio)), fixed


def fit_overhead(seen: Sequence[Prefill]) -> float | None:
    """Fixed seconds of a first token, as few as the observations allow; None where sizes are too alike to tell.

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
