"""Pure: the share of a prompt that the engine's prefix cache will hold, learned from the usage of earlier answers.

    common <- (tenant, model) <- (tenant, model, size class)

Rules:
- A size class is half an octave of prompt tokens, as for output lengths: it separates agents, whose prompts are long
  and cached, from chat.
- A share that collapses is dropped at once: after misses in a row that would come about less than once in
  1 / IMPROBABLE times, given how often a request of this class has missed so far. Half of what was expected is a miss.
- The engine's own counters are a second source. If their share of cached tokens falls to a fraction of what it was, the
  cache was emptied: all learned shares are dropped before an answer shows it. A restarted engine has an empty cache.
- Tables are bounded; the least recently used entry is evicted.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

from sidecar.load.tenant_means import DECAY, DecayedSum, Prior, TenantMeans, size_class

PRIOR: Final = Prior(start=0.0, weight=1.0, bounds=(0.0, 1.0))
OWN_PRIOR_WEIGHT: Final = 1.0  # of the level above, in requests
MISS_SHARE: Final = 0.5  # of the expected share; less is a miss
MIN_EXPECTED: Final = 0.1  # a smaller share cannot collapse
IMPROBABLE: Final = 0.05
MAX_TABLES: Final = 2048
COLLAPSE_SHARE: Final = 0.5  # of the engine's earlier share; less is a cache that was emptied
MIN_ASKED_TOKENS: Final = 65_536  # between two readings of the share: several long prompts, not a single new one
ENGINE_WEIGHT: Final = 0.1  # of one reading in the engine's usual share


@dataclass(slots=True)
class _ClassShare:
    """One size class of one tenant: its shares, and how often it missed. `run` counts misses in a row."""

    shares: DecayedSum = field(default_factory=DecayedSum)
    misses: DecayedSum = field(default_factory=DecayedSum)
    run: int = 0


class EngineCache:
    """The share of prompt tokens recently found in the engine's cache, from its counters."""

    def __init__(self) -> None:
        self._asked = self._found = 0.0
        self._has_mark = False
        self.share: float | None = None

    def read(self, asked: float | None, found: float | None) -> None:
        """Add a reading: prompt tokens looked up since the engine's start, and those found; None if not counted."""
        if asked is None or found is None:
            self._has_mark, self.share = False, None
        elif not self._has_mark or asked < self._asked or found < self._found:  # the engine restarted
            self._asked, self._found, self._has_mark, self.share = asked, found, True, None
        elif asked - self._asked >= MIN_ASKED_TOKENS:
            self.share = min(1.0, (found - self._found) / (asked - self._asked))
            self._asked, self._found = asked, found


class CachedShares:
    """Expected shares of prompts in the engine's prefix cache."""

    def __init__(self, limit: int = MAX_TABLES) -> None:
        self._limit = limit
        self._classes: OrderedDict[tuple[str, str, int], _ClassShare] = OrderedDict()
        self._tenants = TenantMeans(PRIOR, limit)
        self._process = 0
        self._engine_share: float | None = None  # the usual one

    def __len__(self) -> int:
        return len(self._classes) + len(self._tenants)

    def expected(self, tenant: str, model: str, prompt: int) -> float:
        """The share 0..1 of a prompt of `prompt` tokens that will come from the cache."""
        above = self._tenants.get(tenant, model)
        own = self._classes.get((tenant, model, size_class(prompt)))
        return above if own is None else own.shares.mean(above, OWN_PRIOR_WEIGHT)

    def learn(self, tenant: str, model: str, prompt: int, cached: int) -> None:
        """Learn that `cached` of `prompt` tokens came from the cache."""
        if prompt <= 0:
            return
        share = min(1.0, max(0.0, cached / prompt))
        key, expected = (tenant, model, size_class(prompt)), self.expected(tenant, model, prompt)
        if not cached and not expected:
            return  # as on most engines
        if (own := self._classes.get(key)) is None:
            own = self._classes[key] = _ClassShare()
        is_miss = share < MISS_SHARE * expected and expected >= MIN_EXPECTED
        own.run = own.run + 1 if is_miss else 0
        if is_miss and _miss_rate(own.misses) ** own.run < IMPROBABLE:
            own.shares = DecayedSum()
            self._tenants.forget(tenant, model)
        own.misses.add(float(is_miss), 1.0)
        own.shares.add(share, 1.0)
        self._tenants.add(tenant, model, share)
        self._classes.move_to_end(key)
        if len(self._classes) > self._limit:
            self._classes.popitem(last=False)

    def on_engine(self, process: int, share: float | None) -> None:
        """Update the engine's state: its process, as a number that grows, and the share of prompt tokens that
        its counters show as recently cached; None without them."""
        if process != self._process:
            self._process, self._engine_share = process, None
            self._forget()
        if share is None:
            return
        usual = self._engine_share
        if usual is None:
            self._engine_share = share
        elif usual >= MIN_EXPECTED and share < COLLAPSE_SHARE * usual:
            self._engine_share = share
            self._forget()
        else:
            self._engine_share = usual + ENGINE_WEIGHT * (share - usual)

    def _forget(self) -> None:
        self._classes.clear()
        self._tenants.clear()


def _miss_rate(misses: DecayedSum) -> float:
    """Miss rate, starting at one half; with DECAY's memory of 20 requests it can fall below IMPROBABLE."""
    return misses.mean(0.5, 1.0)


assert 0.5 / (1 / (1 - DECAY) + 1) < IMPROBABLE, "one miss must be able to count as a collapse"
