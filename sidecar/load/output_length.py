"""Pure: how long answers will be. Decayed histograms of output tokens, blended from the particular to the general.

    prior <- model <- (model, size class) <- (tenant, model, size class)

Each level counts as much as it has seen lately: p = (n * own + BLEND_ANSWERS * p of the level above) / (n + BLEND_ANSWERS). Buckets are a quarter of an
octave wide; a size class is half an octave of prompt tokens, which tells agents from chat (benchmarks/estimates.py). An answer that its
client's limit cut off says only that it would have been at least so long: it is counted above that, as the blend has it there, and not at
all where that is true of almost every answer (as of `max_tokens=1`): it would only make the old ones fade. The table is
bounded and forgets what was used least recently.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil, exp, log
from operator import mul
from typing import Final, NamedTuple

_MAX_TOKENS: Final = 1 << 17  # tokens of the last bucket's beginning
BUCKET_STARTS: Final = tuple(
    sorted({ceil(2 ** (k / 4)) for k in range(4 * 17 + 1)})
)  # bucket b >= 1 begins at BUCKET_STARTS[b - 1]
BUCKET_COUNT: Final = len(BUCKET_STARTS) + 1  # bucket 0: no token at all
_ENDS: Final = (0, *(start - 1 for start in BUCKET_STARTS[1:]), _MAX_TOKENS)
_BEGINS: Final = (0, *BUCKET_STARTS)
MIDDLES: Final = tuple((a + b) / 2 for a, b in zip(_BEGINS, _ENDS, strict=True))

DECAY: Final = 0.99  # of all weights per answer: about the last 100 count
BLEND_ANSWERS: Final = 4.0  # answers that the level above is worth
MAX_TABLES: Final = 2048  # histograms kept, about 2 kB each
MIN_INFORMATIVE_SHARE: Final = (
    0.001  # share of answers below a cut at which it tells nothing that was not known: almost all go beyond it
)
_RESCALE: Final = 1e12

Key = tuple[str | int, ...]


def _prior() -> tuple[float, ...]:
    """Log-normal, as chat traces are: median 130 tokens (Azure 2023 conversation: 129), wider than any one service; mean 230."""
    weights = [0.0] + [
        exp(-0.5 * ((log(m) - log(130)) / 1.1) ** 2) * log((b + 1) / a)
        for a, b, m in zip(_BEGINS[1:], _ENDS[1:], MIDDLES[1:], strict=True)
    ]
    whole = sum(weights)
    return tuple(w / whole for w in weights)


PRIOR: Final = _prior()


class CensoredTail(NamedTuple):
    """Where an answer that was cut off in `bucket` would have ended: `shares` of that and all longer ones, which sum to `whole`, and to
    `tokens` times their middles."""

    bucket: int
    shares: Sequence[float]
    whole: float
    tokens: float


class LengthHistogram:
    """Weights by bucket; those of older answers fade. `count` is the effective number of answers, `tokens` the sum of all weights times the
    middles of their buckets. A list of weights is not changed once it is made: forecasts hold it."""

    __slots__ = ("scale", "tokens", "total", "weights")

    def __init__(self) -> None:
        self.weights = [0.0] * BUCKET_COUNT
        self.scale = 1.0  # what one answer weighs now: the newest grow, instead of all others shrinking
        self.total = self.tokens = 0.0

    @property
    def count(self) -> float:
        return self.total / self.scale

    def add(self, bucket: int) -> None:
        """Count one answer."""
        self.scale /= DECAY
        self.weights = self.weights.copy()
        self.weights[bucket] += self.scale
        self.total += self.scale
        self.tokens += self.scale * MIDDLES[bucket]
        self._rescale()

    def add_censored(self, beyond: CensoredTail) -> None:
        """Count one answer that was cut off."""
        self.scale /= DECAY
        each, old = self.scale / beyond.whole, self.weights
        fresh = [w + each * share for w, share in zip(old[beyond.bucket :], beyond.shares, strict=True)]
        self.weights = [*old[: beyond.bucket], *fresh]
        self.total += self.scale
        self.tokens += each * beyond.tokens
        self._rescale()

    def _rescale(self) -> None:
        if self.scale > _RESCALE:
            self.weights = [w / self.scale for w in self.weights]
            self.total /= self.scale
            self.tokens /= self.scale
            self.scale = 1.0


# times, weights, their sum, and the sum of them times their middles
Level = tuple[float, Sequence[float], float, float]
_EMPTY_LEVEL: Final[Level] = (0.0, PRIOR, 0.0, 0.0)
_PRIOR_TOKENS: Final = sum(map(mul, PRIOR, MIDDLES))


@dataclass(frozen=True, slots=True)
class OutputForecast:
    """The distribution of one answer's tokens, and at most `limit`: up to four levels, each `times` its weights; they sum to 1.

    They are added up only where they are needed, because this is on the path of every request.
    """

    levels: Sequence[Level]
    limit: int | None = None

    def shares(self, first: int = 0) -> list[float]:
        """The sum of the levels, by bucket, from bucket `first` on."""
        (a, ws, *_), (b, xs, *_), (c, ys, *_), (d, zs, *_) = (*self.levels, *[_EMPTY_LEVEL] * (4 - len(self.levels)))
        columns = zip(ws[first:], xs[first:], ys[first:], zs[first:], strict=True)
        return [a * w + b * x + c * y + d * z for w, x, y, z in columns]

    def below(self, bucket: int) -> float:
        """The share of the buckets before `bucket`."""
        return sum(times * sum(weights[:bucket]) for times, weights, _, _ in self.levels)

    def beyond(self, bucket: int) -> CensoredTail | None:
        """Where an answer that was cut off in `bucket` would have ended; None where none was ever so long."""
        shares = self.shares(bucket)
        whole = sum(shares)
        return CensoredTail(bucket, shares, whole, sum(map(mul, shares, MIDDLES[bucket:]))) if whole > 1e-9 else None

    def mean(self) -> float:
        """Expected tokens: E[min(X, limit)]."""
        if self.limit is None:
            return sum(times * tokens for times, _, _, tokens in self.levels)
        under = bisect_right(MIDDLES, self.limit)  # as many buckets are not cut
        return sum(level[0] * _capped(level, self.limit, under) for level in self.levels)

    def quantile(self, q: float) -> float:
        """Tokens that a share `q` of such answers does not exceed."""
        shares = self.shares()
        sums = list(accumulate(shares))
        bucket = min(bisect_left(sums, q * sums[-1]), BUCKET_COUNT - 1)
        below = sums[bucket - 1] if bucket else 0.0
        within = (q * sums[-1] - below) / shares[bucket] if shares[bucket] > 0 else 1.0
        # the tokens of a bucket are whole: spread from just below its first to its last
        tokens = _BEGINS[bucket] - 0.5 + within * (_ENDS[bucket] - _BEGINS[bucket] + 1) if bucket else 0.0
        return tokens if self.limit is None else min(tokens, self.limit)

    def remaining(self, delivered: Sequence[float]) -> list[float]:
        """Expected tokens still to come once so many have come: E[min(X, limit) - d | X > d]; at least 1 below the limit."""
        most = float("inf") if self.limit is None else float(self.limit)
        first = bisect_right(MIDDLES, min((d for d in delivered if d < most), default=_MAX_TOKENS))
        under = max(first, BUCKET_COUNT if self.limit is None else bisect_right(MIDDLES, most))
        shares = self.shares(first)[::-1]
        tokens = (*(most,) * (BUCKET_COUNT - under), *MIDDLES[first:under][::-1])
        masses = list(accumulate(shares))  # of the last 1, 2, ... buckets
        sums = list(accumulate(map(mul, shares, tokens)))
        return [_remaining(d, most - d, masses, sums) if d < most else 0.0 for d in delivered]


class OutputLengths:
    """What answers' lengths were lately."""

    def __init__(self, limit: int = MAX_TABLES) -> None:
        self._limit = limit
        self._tables: OrderedDict[Key, LengthHistogram] = OrderedDict()

    def __len__(self) -> int:
        return len(self._tables)

    def forecast(self, tenant: str, model: str, prompt: int, limit: int | None) -> OutputForecast:
        """The next answer to a prompt of `prompt` tokens, of which the client allows `limit`."""
        return self._forecast(_keys(tenant, model, prompt), limit)

    def _forecast(self, keys: Sequence[Key], limit: int | None = None) -> OutputForecast:
        rest = 1.0
        levels: list[Level] = []
        for key in keys:
            table = self._tables.get(key)
            if table is not None:
                known = table.count + BLEND_ANSWERS
                levels.append((rest / (table.scale * known), table.weights, table.total, table.tokens))
                rest *= BLEND_ANSWERS / known
        levels.append((rest, PRIOR, 1.0, _PRIOR_TOKENS))
        return OutputForecast(levels, limit)

    def learn(self, tenant: str, model: str, prompt: int, tokens: float, *, cut: bool = False) -> None:
        """An answer had `tokens`; `cut`: because its client allowed no more."""
        keys, bucket = _keys(tenant, model, prompt), bucket_of(tokens)
        beyond = None
        if cut:
            forecast = self._forecast(keys)
            if forecast.below(bucket) <= MIN_INFORMATIVE_SHARE:
                return
            beyond = forecast.beyond(bucket)
        for key in keys:
            table = self._tables.get(key)
            if table is None:
                table = self._tables[key] = LengthHistogram()
            if beyond is None:
                table.add(bucket)
            else:
                table.add_censored(beyond)
            self._tables.move_to_end(key)
        while len(self._tables) > self._limit:
            self._tables.popitem(last=False)


def bucket_of(tokens: float) -> int:
    """The bucket of an answer."""
    return min(bisect_right(BUCKET_STARTS, tokens), BUCKET_COUNT - 1)


def size_class(prompt: int) -> int:
    """Half octaves of prompt tokens."""
    return int(2 * log(max(prompt, 1), 2))


def _keys(tenant: str, model: str, prompt: int) -> tuple[Key, Key, Key]:
    """From the particular to the general."""
    size = size_class(prompt)
    return (tenant, model, size), (model, size), (model,)


def _capped(level: Level, limit: int, under: int) -> float:
    """The sum of a level's weights times min(middle, limit); the first `under` middles are within it. Goes over the shorter side."""
    _, weights, total, tokens = level
    if under <= BUCKET_COUNT // 2:
        within = weights[:under]
        return float(sum(map(mul, within, MIDDLES)) + limit * (total - sum(within)))
    over = weights[under:]
    return float(tokens - sum(map(mul, over, MIDDLES[under:])) + limit * sum(over))


def _remaining(delivered: float, most: float, masses: list[float], sums: list[float]) -> float:
    """Tokens to come after `delivered`, at most `most`. `masses`, `sums`: of the last 1, 2, ... buckets."""
    longer = BUCKET_COUNT - bisect_right(MIDDLES, delivered)
    if longer == 0 or masses[longer - 1] <= 1e-9:  # longer than any before: as long again
        return min(max(1.0, delivered), most)
    return min(max(1.0, sums[longer - 1] / masses[longer - 1] - delivered), most)
