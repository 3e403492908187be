"""Pure: which tenants and models have labels of their own, however many names clients invent.

    accept (the engine answered 2xx) -> the name gains weight -> a label, while it is among the heaviest ones

Rules:
- A name gets a label only by requests that the engine accepted. Until then it is `other`.
- Names that an operator or the engine gave (tenant limits, the list of models) always have one, beyond `limit`. Those
  that are no longer given are names like any other: at the next `accept`, the lightest ones beyond `limit` lose theirs.
- The weight of a name is its MU, halved every HALF_LIFE_S. A name without a label replaces the lightest one once
  it weighs twice as much. So names displaced by an attack return.
- A pair of tenant and model beyond the bound of pairs is (tenant, `other`).
- `accept` returns whether a name lost its label. Sums kept by label must then be added to those of `of`: a sum over all
  labels never falls.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Final, Generic, TypeVar

from sidecar.labels import OTHER, printable

HALF_LIFE_S: Final = 6 * 3600.0
REPLACE_RATIO: Final = 2.0  # of weights: two names of about the same weight must not replace each other in turns
MIN_WEIGHT: Final = 1e-3  # of a request that cost nothing
# (tenant, model) pairs per tenant: at most 600 series per metric, rendered in 12 ms.
MAX_PAIRS_PER_TENANT: Final = 2
MAX_GIVEN_PAIRS_PER_TENANT: Final = 20  # of a given tenant and a given model
MAX_WAITING: Final = 1000  # names without a label whose weight is known
WAITING_DROPPED: Final = (
    100  # of these, the lightest, when there is no more room: at once, as finding them takes a sort
)
MAX_HALVINGS: Final = 256.0  # after which weights are scaled down

N = TypeVar("N", bound=Hashable)
P = TypeVar("P")
V = TypeVar("V")


class HeaviestNames(Generic[N]):
    """The `limit` heaviest names, and those in `given`. Weights only grow; the caller scales what it adds."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._weights: dict[N, float] = {}
        self._waiting: dict[N, float] = {}
        self._lightest = 0.0  # a lower bound of the weights of names that are not given
        self.given: frozenset[N] = frozenset()

    def __contains__(self, name: N) -> bool:
        return name in self._weights or name in self.given

    def add(self, name: N, weight: float) -> N | None:
        """Add to a name's weight. Returns the name that lost its place to it."""
        if name in self._weights:
            self._weights[name] += weight
            return None
        weight += self._waiting.pop(name, 0.0)
        others = len(self._weights) - len(self._weights.keys() & self.given)
        if name in self.given or others < self._limit:
            self._weights[name] = weight
            return None
        if weight > REPLACE_RATIO * self._lightest:
            lightest = min((other for other in self._weights if other not in self.given), key=self._weights.__getitem__)
            self._lightest = self._weights[lightest]
            if weight > REPLACE_RATIO * self._lightest:
                self._weights[name] = weight
                self._wait(lightest, self._weights.pop(lightest))
                return lightest
        self._wait(name, weight)
        return None

    def drop(self, is_over: Callable[[N], bool]) -> None:
        """Remove every name for which this is true."""
        self._weights = {name: weight for name, weight in self._weights.items() if not is_over(name)}
        self._lightest = 0.0

    def trim(self) -> list[N]:
        """Take the places of the lightest names beyond the limit, as fewer are given. Returns these names."""
        others = sorted((name for name in self._weights if name not in self.given), key=self._weights.__getitem__)
        lost = others[: max(0, len(others) - self._limit)]
        for name in lost:
            self._wait(name, self._weights.pop(name))
        self._lightest = 0.0
        return lost

    def scale(self, by: float) -> None:
        self._lightest *= by
        for weights in (self._weights, self._waiting):
            weights.update({name: weight * by for name, weight in weights.items()})

    def _wait(self, name: N, weight: float) -> None:
        if len(self._waiting) >= MAX_WAITING:
            for lightest in sorted(self._waiting, key=self._waiting.__getitem__)[:WAITING_DROPPED]:
                del self._waiting[lightest]
        self._waiting[name] = weight


class ClientLabels:
    """The labels of tenants, models, and pairs of them. Times are monotonic seconds."""

    def __init__(self, limit: int) -> None:
        self._tenants: HeaviestNames[str] = HeaviestNames(limit)
        self._models: HeaviestNames[str] = HeaviestNames(limit)
        self._pairs: HeaviestNames[tuple[str, str]] = HeaviestNames(MAX_PAIRS_PER_TENANT * limit)
        self._max_given_pairs = MAX_GIVEN_PAIRS_PER_TENANT * limit
        self._since: float | None = None
        self._is_trimmed = True  # since names were last given

    def give(self, *, tenants: Iterable[str] | None = None, models: Iterable[str] | None = None) -> None:
        """Replace the names that always have a label."""
        for names, given in ((self._tenants, tenants), (self._models, models)):
            if given is not None:
                names.given = frozenset(map(printable, given))
                self._is_trimmed = False

    def of(self, tenant: str, model: str) -> tuple[str, str]:
        """The labels of a client's names; earlier labels are mapped to their current ones."""
        tenant, model = printable(tenant), printable(model)
        pair = tenant if tenant in self._tenants else OTHER, model if model in self._models else OTHER
        return pair if OTHER in pair or pair in self._pairs else (pair[0], OTHER)

    def tenant(self, tenant: str) -> str:
        """The label of a tenant."""
        return self.of(tenant, OTHER)[0]

    def accept(self, tenant: str, model: str, mu: float, now: float) -> bool:
        """Count a request that the engine accepted. True if a name or pair lost its label."""
        tenant, model = printable(tenant), printable(model)
        weight = max(mu, MIN_WEIGHT) * self._growth(now)
        has_lost = not self._is_trimmed and self._trim()
        lost = self._tenants.add(tenant, weight), self._models.add(model, weight)
        if lost != (None, None):
            self._pairs.drop(lambda pair: pair[0] == lost[0] or pair[1] == lost[1])
            has_lost = True
        if tenant not in self._tenants or model not in self._models:
            return has_lost
        pair = tenant, model
        if self._is_given(pair) and len(self._pairs.given) < self._max_given_pairs:
            self._pairs.given |= {pair}
        return self._pairs.add(pair, weight) is not None or has_lost

    def _trim(self) -> bool:
        """Hold the limits for names that are no longer given. True if a name or pair lost its label."""
        self._is_trimmed = True
        tenants, models = set(self._tenants.trim()), set(self._models.trim())
        self._pairs.drop(lambda pair: pair[0] in tenants or pair[1] in models)
        self._pairs.given = frozenset(filter(self._is_given, self._pairs.given))
        return bool(self._pairs.trim() or tenants or models)

    def _is_given(self, pair: tuple[str, str]) -> bool:
        return pair[0] in self._tenants.given and pair[1] in self._models.given

    def _growth(self, now: float) -> float:
        """What a weight of 1 adds now: instead of halving old weights, new ones weigh more."""
        if self._since is None:
            self._since = now
        halvings = max(0.0, now - self._since) / HALF_LIFE_S
        if halvings > MAX_HALVINGS:
            for scale in (self._tenants.scale, self._models.scale, self._pairs.scale):
                scale(0.5**MAX_HALVINGS)
            self._since += MAX_HALVINGS * HALF_LIFE_S
            return self._growth(now)
        return float(2.0**halvings)


def fold(sums: dict[P, V], key: Callable[[P], P], add: Callable[[V, V], V]) -> dict[P, V]:
    """The sums by the keys that theirs have become; those of one key are added."""
    folded: dict[P, V] = {}
    for old, value in sums.items():
        new = key(old)
        folded[new] = add(folded[new], value) if new in folded else value
    return folded
