"""Pure: how long answers will be. Decayed histograms of output tokens, blended from the particular to the general.

    prior <- model <- (model, size class) <- (tenant, model, size class)

Each level counts as much as it has seen lately: p = (n * own + BLEND * p of the level above) / (n + BLEND). Buckets are a quarter of an
octave wide; a size class is half an octave of prompt tokens, which tells agents from chat (benchmarks/estimates.py). An answer that its
client's limit cut off says only that it would have been at least so long: it is counted above that, as the blend has it there. The table
is bounded and forgets what was used least recently.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import ceil, exp, log
from operator import mul
from typing import Final

_MOST: Final = 1 << 17  # tokens of the last bucket's beginning
STARTS: Final = tuple(sorted({ceil(2 ** (k / 4)) for k in range(4 * 17 + 1)}))  # bucket b >= 1 begins at STARTS[b - 1]
BUCKETS: Final = len(STARTS) + 1  # bucket 0: no token at all
_ENDS: Final = (0, *(start - 1 for start in STARTS[1:]), _MOST)
_BEGINS: Final = (0, *STARTS)
_MIDDLES: Final = tuple((a + b) / 2 for a, b in zip(_BEGINS, _ENDS, strict=True))

DECAY: Final = 0.99  # of all weights per answer: about the last 100 count
BLEND: Final = 4.0  # answers that the level above is worth
TABLES: Final = 2048  # histograms kept, about 2 kB each
_RESCALE: Final = 1e12

Key = tuple[str | int, ...]


def _prior() -> tuple[float, ...]:
    """Log-normal, as chat traces are: median 130 tokens (Azure 2023 conversation: 129), wider than any one service; mean 230."""
    weights = [0.0] + [
        exp(-0.5 * ((log(m) - log(130)) / 1.1) ** 2) * log((b + 1) / a)
        for a, b, m in zip(_BEGINS[1:], _ENDS[1:], _MIDDLES[1:], strict=True)
    ]
    whole = sum(weights)
    return tuple(w / whole for w in weights)


PRIOR: Final = _prior()


class Histogram:
    """Weights by bucket; those of older answers fade. `count` is the effective number of answers."""

    __slots__ = ("_scale", "_total", "weights")

    def __init__(self) -> None:
        self.weights = [0.0] * BUCKETS
        self._scale = 1.0  # what one answer weighs now: the newest grow, instead of all others shrinking
        self._total = 0.0

    @property
    def count(self) -> float:
        return self._total / self._scale

    @property
    def scale(self) -> float:
        return self._scale

    def add(self, buckets: Sequence[tuple[int, float]]) -> None:
        """Count one answer: (bucket, share) with shares that sum to 1."""
        self._scale /= DECAY
        for bucket, share in buckets:
            self.weights[bucket] += share * self._scale
        self._total += self._scale
        if self._scale > _RESCALE:
            self.weights = [w / self._scale for w in self.weights]
            self._total /= self._scale
            self._scale = 1.0


@dataclass(frozen=True, slots=True)
class Forecast:
    """The distribution of one answer's tokens: `shares` by bucket, which sum to 1, and at most `limit` tokens."""

    shares: Sequence[float]
    limit: int | None = None

    def mean(self) -> float:
        """Expected tokens: E[min(X, limit)]."""
        return float(sum(map(mul, self.shares, _capped(self.limit))))

    def quantile(self, q: float) -> float:
        """Tokens that a share `q` of such answers does not exceed."""
        sums = list(accumulate(self.shares))
        bucket = min(bisect_left(sums, q * sums[-1]), BUCKETS - 1)
        below = sums[bucket - 1] if bucket else 0.0
        within = (q * sums[-1] - below) / self.shares[bucket] if self.shares[bucket] > 0 else 1.0
        # the tokens of a bucket are whole: spread from just below its first to its last
        tokens = _BEGINS[bucket] - 0.5 + within * (_ENDS[bucket] - _BEGINS[bucket] + 1) if bucket else 0.0
        return tokens if self.limit is None else min(tokens, self.limit)

    def left(self, delivered: Sequence[float]) -> list[float]:
        """Expected tokens still to come once so many have come: E[min(X, limit) - d | X > d]; at least 1 below the limit."""
        masses = list(accumulate(reversed(self.shares)))  # of the last 1, 2, ... buckets
        sums = list(accumulate(map(mul, reversed(self.shares), reversed(_capped(self.limit)))))
        return [self._left(d, masses, sums) for d in delivered]

    def _left(self, delivered: float, masses: list[float], sums: list[float]) -> float:
        most = float("inf") if self.limit is None else self.limit - delivered
        if most <= 0:
            return 0.0
        longer = BUCKETS - bisect_right(_MIDDLES, delivered)
        if longer == 0 or masses[longer - 1] <= 1e-9:  # longer than any before: as long again
            return min(max(1.0, delivered), most)
        return min(max(1.0, sums[longer - 1] / masses[longer - 1] - delivered), most)


class Outputs:
    """What answers' lengths were lately."""

    def __init__(self, limit: int = TABLES) -> None:
        self._limit = limit
        self._tables: OrderedDict[Key, Histogram] = OrderedDict()

    def __len__(self) -> int:
        return len(self._tables)

    def forecast(self, tenant: str, model: str, prompt: int, limit: int | None) -> Forecast:
        """The next answer to a prompt of `prompt` tokens, of which the client allows `limit`."""
        rest = 1.0
        parts: list[tuple[float, Sequence[float]]] = [(0.0, PRIOR)] * 3
        for n, key in enumerate(reversed(_keys(tenant, model, prompt))):
            table = self._tables.get(key)
            if table is not None:
                parts[n] = (rest / (table.scale * (table.count + BLEND)), table.weights)
                rest *= BLEND / (table.count + BLEND)
        (a, ws), (b, xs), (c, ys) = parts
        # one pass over all levels: this is on the path of every request
        return Forecast([a * w + b * x + c * y + rest * z for w, x, y, z in zip(ws, xs, ys, PRIOR, strict=True)], limit)

    def learn(self, tenant: str, model: str, prompt: int, tokens: float, *, cut: bool = False) -> None:
        """An answer had `tokens`; `cut`: because its client allowed no more."""
        buckets = self._beyond(tenant, model, prompt, tokens) if cut else ((bucket_of(tokens), 1.0),)
        for key in _keys(tenant, model, prompt):
            table = self._tables.get(key)
            if table is None:
                table = self._tables[key] = Histogram()
            table.add(buckets)
            self._tables.move_to_end(key)
        while len(self._tables) > self._limit:
            self._tables.popitem(last=False)

    def _beyond(self, tenant: str, model: str, prompt: int, tokens: float) -> Sequence[tuple[int, float]]:
        """Where an answer that was cut at `tokens` would have ended."""
        at = bucket_of(tokens)
        shares = self.forecast(tenant, model, prompt, None).shares[at:]
        mass = sum(shares)
        return [(at + n, share / mass) for n, share in enumerate(shares)] if mass > 1e-9 else [(at, 1.0)]


def bucket_of(tokens: float) -> int:
    """The bucket of an answer."""
    return min(bisect_right(STARTS, tokens), BUCKETS - 1)


def size_class(prompt: int) -> int:
    """Half octaves of prompt tokens."""
    return int(2 * log(max(prompt, 1), 2))


def _keys(tenant: str, model: str, prompt: int) -> tuple[Key, Key, Key]:
    size = size_class(prompt)
    return (model,), (model, size), (tenant, model, size)


@lru_cache(maxsize=256)  # clients have few habits; and a flood of limits costs what it did before
def _capped(limit: int | None) -> Sequence[float]:
    """The middle of each bucket, at most `limit`."""
    if limit is None:
        return _MIDDLES
    first = bisect_right(_MIDDLES, limit)
    return (*_MIDDLES[:first], *(float(limit) for _ in range(BUCKETS - first)))
