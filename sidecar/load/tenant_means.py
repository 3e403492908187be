"""Pure: a number learned per tenant and blended with what its tenants have in common, by evidence.

    own    = (decayed sum of the tenant's observations + PRIOR * common) / (their weight + PRIOR)
    common = the median over recent tenants, of whom `start` counts as PRIOR_VOTES

Rules:
- Each tenant has one vote, shrunk toward `start` while it has shown little. So no tenant moves another's number on its
  own, however much it sends, and several move it within `bounds` only: a client may invent tenants.
- Tables are bounded; the least recently used entry is evicted.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from math import log2
from typing import Final

DECAY: Final = 0.95  # of all weights per observation: the last 20 count
PRIOR_VOTES: Final = 2  # of `start`: one tenant alone never moves the median
MAX_VOTERS: Final = 63  # recent tenants of one key; enough for a median, and sorted in microseconds
VOTES_PER_COUNT: Final = 16  # between two counts of the same tenants' votes


@dataclass(frozen=True, slots=True)
class Prior:
    """Where a number begins, what weight that has next to observations, and what the common value stays within."""

    start: float
    weight: float
    bounds: tuple[float, float]


@dataclass(slots=True)
class DecayedSum:
    """The decayed sum of observations `value`, and of their weights."""

    value: float = 0.0
    weight: float = 0.0

    def add(self, value: float, weight: float) -> None:
        self.value = DECAY * self.value + value * weight
        self.weight = DECAY * self.weight + weight

    def mean(self, prior: float, prior_weight: float) -> float:
        """Their mean, with a prior that counts as `prior_weight`."""
        return (self.value + prior * prior_weight) / (self.weight + prior_weight)


class Votes:
    """The values of the tenants seen recently, next to PRIOR_VOTES of a prior. `median`: that of (value, tenant)."""

    __slots__ = ("_count", "_prior", "_values", "median")

    def __init__(self, prior: float) -> None:
        self._prior = prior
        self._values: OrderedDict[str, float] = OrderedDict()
        self._count = 0
        self.median = prior, ""

    def cast(self, tenant: str, value: float) -> None:
        """Set a tenant's value. The median is recomputed for each further voter, and every few votes."""
        voters = len(self._values)
        self._values[tenant] = value
        self._values.move_to_end(tenant)
        if len(self._values) > MAX_VOTERS:  # then nearly every request may be a new tenant's
            self._values.popitem(last=False)
        self._count += 1
        if len(self._values) > voters or self._count % VOTES_PER_COUNT == 0:
            cast = [(v, name) for name, v in self._values.items()]
            self.median = sorted(cast + [(self._prior, "")] * PRIOR_VOTES)[(len(cast) + PRIOR_VOTES - 1) // 2]


class TenantMeans:
    """Means by tenant and key (a model, and whatever else distinguishes its requests)."""

    def __init__(self, prior: Prior, limit: int) -> None:
        self._prior, self._limit = prior, limit
        self._own: OrderedDict[tuple[str, Hashable], DecayedSum] = OrderedDict()
        self._votes: OrderedDict[Hashable, Votes] = OrderedDict()

    def __len__(self) -> int:
        return len(self._own) + len(self._votes)

    def get(self, tenant: str, key: Hashable) -> float:
        """The expected value for a tenant's next request."""
        votes, (low, high) = self._votes.get(key), self._prior.bounds
        common = self._prior.start if votes is None else min(high, max(low, votes.median[0]))
        own = self._own.get((tenant, key))
        return common if own is None else own.mean(common, self._prior.weight)

    def add(self, tenant: str, key: Hashable, value: float, weight: float = 1.0) -> None:
        """Learn one observation."""
        prior, name = self._prior, (tenant, key)
        if (own := self._own.get(name)) is None:
            own = self._own[name] = DecayedSum()
        own.add(value, weight)
        if (votes := self._votes.get(key)) is None:
            votes = self._votes[key] = Votes(prior.start)
        votes.cast(tenant, own.mean(prior.start, prior.weight))
        self._own.move_to_end(name)
        self._votes.move_to_end(key)
        if len(self._own) > self._limit:
            self._own.popitem(last=False)
        if len(self._votes) > self._limit:
            self._votes.popitem(last=False)

    def forget(self, tenant: str, key: Hashable) -> None:
        """Drop what was learned from a tenant; its vote stays until its next observation."""
        self._own.pop((tenant, key), None)

    def clear(self) -> None:
        """Drop everything."""
        self._own.clear()
        self._votes.clear()


def size_class(prompt: int) -> int:
    """The half octave of a prompt's tokens: it separates agents from chat (benchmarks/estimates.py)."""
    return int(2 * log2(max(prompt, 1)))
