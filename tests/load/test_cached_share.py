"""Cached shares of prompts: learned, blended, and dropped when they collapse."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from sidecar.load.cached_share import MIN_ASKED_TOKENS, CachedShares, EngineCache

PROMPT = 12_000


def taught(shares: list[float], prompt: int = PROMPT) -> CachedShares:
    learned = CachedShares()
    for share in shares:
        learned.learn("t", "m", prompt, int(share * prompt))
    return learned


def test_nothing_is_expected_of_what_was_never_seen() -> None:
    """Without history nothing is cached, and one tenant's cache is no evidence for another's."""
    learned = taught([0.95] * 50)
    assert CachedShares().expected("t", "m", PROMPT) == 0.0
    assert learned.expected("new", "m", PROMPT) == 0.0
    assert learned.expected("t", "other", PROMPT) == 0.0


def test_a_share_is_learned_within_a_few_answers() -> None:
    """After five answers with 95 % cached, 75 % is expected; after twenty, 90 %; of longer prompts as well."""
    assert taught([0.95] * 5).expected("t", "m", PROMPT) > 0.75
    assert 0.9 < taught([0.95] * 20).expected("t", "m", PROMPT) <= 0.95
    assert taught([0.95] * 20).expected("t", "m", 4 * PROMPT) > 0.85  # another size class: the tenant's own


def test_chat_and_agents_of_one_tenant_are_apart() -> None:
    """Short prompts without a cached part and long ones with one keep their own shares."""
    learned = CachedShares()
    for _ in range(50):
        learned.learn("t", "m", 300, 0)
        learned.learn("t", "m", PROMPT, int(0.9 * PROMPT))
    assert learned.expected("t", "m", 300) < 0.05
    assert learned.expected("t", "m", PROMPT) > 0.85


def test_a_collapse_is_dropped_at_once() -> None:
    """After one answer without anything cached, nothing is expected any more; and it is learned again as fast."""
    learned = taught([0.95] * 40)
    learned.learn("t", "m", PROMPT, 0)
    assert learned.expected("t", "m", PROMPT) < 0.05
    for _ in range(6):
        learned.learn("t", "m", PROMPT, int(0.95 * PROMPT))
    assert learned.expected("t", "m", PROMPT) > 0.7


def test_misses_that_are_usual_are_no_collapse() -> None:
    """Where every fourth request begins a conversation, the mean is expected, whatever the last request."""
    rng, learned, off = random.Random(1), CachedShares(), []
    for n in range(2000):
        learned.learn("t", "m", PROMPT, 0 if rng.random() < 0.25 else int(0.95 * PROMPT))
        if n > 100:
            off.append(learned.expected("t", "m", PROMPT) - 0.75 * 0.95)
    assert abs(sum(off) / len(off)) < 0.08


def test_an_emptied_cache_is_known_by_the_engines_counters() -> None:
    """The engine's share of cached tokens collapses: everything is dropped; a slow change drops nothing."""
    learned = taught([0.95] * 40)
    for share in (0.6, 0.6, 0.5, 0.45, 0.4, None):
        learned.on_engine(0, share)
    assert learned.expected("t", "m", PROMPT) > 0.9
    learned.on_engine(0, 0.05)
    assert learned.expected("t", "m", PROMPT) == 0.0


def test_a_new_process_of_the_engine_has_nothing_cached() -> None:
    """A restart of the engine empties its cache, whatever it counts."""
    learned = taught([0.95] * 40)
    learned.on_engine(0, None)
    assert learned.expected("t", "m", PROMPT) > 0.9
    learned.on_engine(1, None)
    assert learned.expected("t", "m", PROMPT) == 0.0


def test_the_engines_counters_give_the_recent_share() -> None:
    """The share is of the tokens since the last reading of enough of them; a restart or a missing counter has none."""
    cache, tokens = EngineCache(), MIN_ASKED_TOKENS
    seen = []
    for asked, found in ((0, 0), (tokens, tokens // 2), (tokens + 5, tokens // 2), (2 * tokens, tokens // 2), (7, 3)):
        cache.read(asked, found)
        seen.append(cache.share)
    assert seen == [None, 0.5, 0.5, 0.0, None]
    cache.read(7 + tokens, 3)
    cache.read(None, None)
    assert cache.share is None


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(-5, 300_000), st.integers(-5, 400_000)), max_size=100))
def test_a_share_is_a_share(answers: list[tuple[str, int, int]]) -> None:
    """Whatever an engine reports, an expected share is between 0 and 1, and the tables are bounded."""
    learned = CachedShares(limit=8)
    for tenant, prompt, cached in answers:
        learned.learn(tenant, "m", prompt, cached)
        assert 0.0 <= learned.expected(tenant, "m", prompt) <= 1.0
    assert len(learned) <= 24
