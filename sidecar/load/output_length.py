"""Pure: how long answers will be. Decayed histograms of output tokens, blended from the specific to the general.

    prior <- the model's typical tenant <- the same in the size class <- (tenant, model) <- (tenant, model, size class)

Rules:
- A level counts by its recent answers: p = (n * own + BLEND_ANSWERS * p of the level above) / (n + BLEND_ANSWERS).
- The typical tenant is the one with the median length of recent ones (tenant_means). So what one tenant alone has
  shown is not expected of another, however much it sends.
- Buckets are a quarter of an octave wide. A size class is half an octave of prompt tokens, which separates agents from
  chat (benchmarks/estimates.py).
- An answer cut off by its client's limit is only known to be at least that long. It is spread over the longer buckets
  as the blend has them, and ignored if nearly all answers are that long (`max_tokens=1`).
- The table is bounded; the least recently used histogram is evicted.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from math import ceil, exp, log
from operator import mul
from typing import Final, NamedTuple

import msgspec

from sidecar.load.tenant_means import Votes, size_class

# Bucket 0 is an answer without tokens; bucket b >= 1 begins at BUCKET_STARTS[b - 1], the last one at _MAX_TOKENS.
_MAX_TOKENS: Final = 1 << 17
BUCKET_STARTS: Final = tuple(sorted({ceil(2 ** (k / 4)) for k in range(4 * 17 + 1)}))
BUCKET_COUNT: Final = len(BUCKET_STARTS) + 1
_ENDS: Final = (0, *(start - 1 for start in BUCKET_STARTS[1:]), _MAX_TOKENS)
_BEGINS: Final = (0, *BUCKET_STARTS)
MIDDLES: Final = tuple((a + b) / 2 for a, b in zip(_BEGINS, _ENDS, strict=True))

DECAY: Final = 0.99  # of all weights per answer: about the last 100 count
BLEND_ANSWERS: Final = 4.0  # that the level above counts as
MAX_TABLES: Final = 2048  # about 2 kB each
# If fewer answers than this share are shorter than a limit, an answer that reached the limit is no information.
MIN_INFORMATIVE_SHARE: Final = 0.001
_MAX_SCALE: Final = 1e12

Key = tuple[str | int, ...]


# Log-normal, as chat traces are: median 130 tokens (Azure 2023 conversation: 129), mean 230; a wide one.
_WEIGHTS: Final = [0.0] + [
    exp(-0.5 * ((log(m) - log(130)) / 1.1) ** 2) * log((b + 1) / a)
    for a, b, m in zip(_BEGINS[1:], _ENDS[1:], MIDDLES[1:], strict=True)
]
PRIOR: Final = tuple(w / sum(_WEIGHTS) for w in _WEIGHTS)


class CensoredTail(NamedTuple):
    """Where an answer cut off in a bucket would have ended: `shares` of that bucket and all longer ones.

    The shares sum to `whole`, and times the middles of their buckets to `tokens`.
    """

    shares: Sequence[float]
    whole: float
    tokens: float


class LengthHistogram:
    """Decayed weights by bucket. `tokens` is the sum of the weights times the middles of their buckets.

    A list of weights is never changed in place, as forecasts refer to it.
    """

    __slots__ = ("scale", "tokens", "total", "weights")

    def __init__(self) -> None:
        self.weights = [0.0] * BUCKET_COUNT
        self.scale = 1.0  # weight of a new answer, which grows instead of all others shrinking
        self.total = self.tokens = 0.0

    def mean(self) -> float:
        """Expected tokens, by its own answers and the prior alone."""
        prior = self.scale * BLEND_ANSWERS
        return (self.tokens + prior * _PRIOR_TOKENS) / (self.total + prior)

    def add(self, bucket: int, tail: CensoredTail | None = None) -> None:
        """Count one answer, with the tail if it was cut off."""
        self.scale /= DECAY
        self.total += self.scale
        if tail is None:
            self.weights = self.weights.copy()
            self.weights[bucket] += self.scale
            self.tokens += self.scale * MIDDLES[bucket]
        else:
            each, old = self.scale / tail.whole, self.weights
            longer = [w + each * share for w, share in zip(old[bucket:], tail.shares, strict=True)]
            self.weights = [*old[:bucket], *longer]
            self.tokens += each * tail.tokens
        if self.scale > _MAX_SCALE:
            self.weights = [w / self.scale for w in self.weights]
            self.total /= self.scale
            self.tokens /= self.scale
            self.scale = 1.0


# Factor, weights, their sum, and the sum of the weights times their middles.
Level = tuple[float, Sequence[float], float, float]
_EMPTY_LEVEL: Final[Level] = (0.0, PRIOR, 0.0, 0.0)
_LEVEL_COUNT: Final = 5
_PRIOR_TOKENS: Final[float] = sum(map(mul, PRIOR, MIDDLES))


class OutputForecast(msgspec.Struct, frozen=True):
    """The distribution of one answer's tokens, capped at `limit`: the sum of up to five levels, factor times weights.

    The levels are summed up only where needed, as every request computes a forecast.
    """

    levels: Sequence[Level]
    limit: int | None = None

    def shares(self, first: int = 0) -> list[float]:
        """The sum of the levels, by bucket, from bucket `first` on."""
        levels = *self.levels, *[_EMPTY_LEVEL] * (_LEVEL_COUNT - len(self.levels))
        (a, vs, *_), (b, ws, *_), (c, xs, *_), (d, ys, *_), (e, zs, *_) = levels
        columns = zip(vs[first:], ws[first:], xs[first:], ys[first:], zs[first:], strict=True)
        return [a * v + b * w + c * x + d * y + e * z for v, w, x, y, z in columns]

    def below(self, bucket: int) -> float:
        return sum(times * sum(weights[:bucket]) for times, weights, _, _ in self.levels)

    def tail(self, bucket: int) -> CensoredTail | None:
        """Where an answer cut off in `bucket` would have ended; None if none was ever that long."""
        shares = self.shares(bucket)
        whole = sum(shares)
        return CensoredTail(shares, whole, sum(map(mul, shares, MIDDLES[bucket:]))) if whole > 1e-9 else None

    def mean(self) -> float:
        """Expected tokens: E[min(X, limit)]."""
        if self.limit is None:
            return sum(times * tokens for times, _, _, tokens in self.levels)
        under = bisect_right(MIDDLES, self.limit)  # number of buckets within the limit
        return sum(level[0] * _capped(level, self.limit, under) for level in self.levels)

    def quantile(self, q: float) -> float:
        """Tokens that a share `q` of the answers does not exceed."""
        shares = self.shares()
        sums = list(accumulate(shares))
        bucket = min(bisect_left(sums, q * sums[-1]), BUCKET_COUNT - 1)
        below = sums[bucket - 1] if bucket else 0.0
        within = (q * sums[-1] - below) / shares[bucket] if shares[bucket] > 0 else 1.0
        # A bucket holds whole numbers: interpolate from half below its first to half above its last.
        tokens = _BEGINS[bucket] - 0.5 + within * (_ENDS[bucket] - _BEGINS[bucket] + 1) if bucket else 0.0
        return tokens if self.limit is None else min(tokens, self.limit)

    def remaining(self, delivered: Sequence[float]) -> list[float]:
        """Expected remaining tokens for each `d` delivered: E[min(X, limit) - d | X > d], at least 1 if d < limit."""
        most = float("inf") if self.limit is None else float(self.limit)
        first = bisect_right(MIDDLES, min((d for d in delivered if d < most), default=_MAX_TOKENS))
        under = max(first, BUCKET_COUNT if self.limit is None else bisect_right(MIDDLES, most))
        shares = self.shares(first)[::-1]
        tokens = (*(most,) * (BUCKET_COUNT - under), *MIDDLES[first:under][::-1])
        masses = list(accumulate(shares))  # sums over the last 1, 2, ... buckets
        sums = list(accumulate(map(mul, shares, tokens)))
        return [_remaining(d, most - d, masses, sums) if d < most else 0.0 for d in delivered]


class OutputLengths:
    """The lengths of recent answers."""

    def __init__(self, limit: int = MAX_TABLES) -> None:
        self._limit = limit
        self._tables: OrderedDict[Key, LengthHistogram] = OrderedDict()
        self._typical: OrderedDict[Key, Votes] = OrderedDict()  # "" is the prior

    def __len__(self) -> int:
        return len(self._tables) + len(self._typical)

    def forecast(self, tenant: str, model: str, prompt: int, limit: int | None) -> OutputForecast:
        """Forecast the answer to a prompt of `prompt` tokens, of which the client allows `limit`."""
        rest = 1.0
        levels: list[Level] = []
        keys = _keys(model, prompt)
        names = [(tenant, *key) for key in keys]
        found = [(self._typical.get(key), key) for key in keys]
        names += [(votes.median[1], *key) for votes, key in found if votes is not None and votes.median[1] != tenant]
        for name in names:
            if (table := self._tables.get(name)) is not None:
                known = table.total / table.scale + BLEND_ANSWERS  # the effective number of answers
                levels.append((rest / (table.scale * known), table.weights, table.total, table.tokens))
                rest *= BLEND_ANSWERS / known
        levels.append((rest, PRIOR, 1.0, _PRIOR_TOKENS))
        return OutputForecast(levels, limit)

    def learn(self, tenant: str, model: str, prompt: int, tokens: float, *, cut: bool = False) -> None:
        """Learn that an answer had `tokens`; `cut`: it reached its client's limit."""
        bucket, tail = bucket_of(tokens), None
        if cut:
            forecast = self.forecast(tenant, model, prompt, None)
            if forecast.below(bucket) <= MIN_INFORMATIVE_SHARE:
                return
            tail = forecast.tail(bucket)
        for key in _keys(model, prompt):
            own = tenant, *key
            if (table := self._tables.get(own)) is None:
                table = self._tables[own] = LengthHistogram()
            table.add(bucket, tail)
            self._tables.move_to_end(own)
            if (votes := self._typical.get(key)) is None:
                votes = self._typical[key] = Votes(_PRIOR_TOKENS)
            votes.cast(tenant, table.mean())
            self._typical.move_to_end(key)
        while len(self._tables) > self._limit:
            self._tables.popitem(last=False)
        while len(self._typical) > self._limit:
            self._typical.popitem(last=False)


def bucket_of(tokens: float) -> int:
    return min(bisect_right(BUCKET_STARTS, tokens), BUCKET_COUNT - 1)


def _keys(model: str, prompt: int) -> tuple[Key, Key]:
    """Keys that distinguish a tenant's answers, from specific to general."""
    return (model, size_class(prompt)), (model,)


def _capped(level: Level, limit: int, under: int) -> float:
    """The sum of weights times min(middle, limit), over the shorter side; the first `under` middles are within it."""
    _, weights, total, tokens = level
    if under <= BUCKET_COUNT // 2:
        within = weights[:under]
        return float(sum(map(mul, within, MIDDLES), 0.0) + limit * (total - sum(within, 0.0)))
    over = weights[under:]
    return float(tokens - sum(map(mul, over, MIDDLES[under:]), 0.0) + limit * sum(over, 0.0))


def _remaining(delivered: float, most: float, masses: list[float], sums: list[float]) -> float:
    """Tokens after `delivered`, at most `most`. `masses`, `sums`: over the last 1, 2, ... buckets."""
    longer = BUCKET_COUNT - bisect_right(MIDDLES, delivered)
    if longer == 0 or masses[longer - 1] <= 1e-9:  # longer than all before: expect as many more
        return min(max(1.0, delivered), most)
    return min(max(1.0, sums[longer - 1] / masses[longer - 1] - delivered), most)
