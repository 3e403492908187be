"""What an event of a stream is worth."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.load.event_tokens import MAX_KEYS, MAX_RATIO, EventTokens


def test_it_is_one_until_streams_show_otherwise() -> None:
    """A short stream alone proves less than a longer one, each model for itself."""
    events = EventTokens()
    events.learn("t", "m", 12, 3)
    assert 1 < events.get("t", "m") < 4
    events.learn("t", "m", 400, 100)
    assert events.get("t", "m") == pytest.approx(4, rel=0.1)
    assert events.get("t", "other") == 1


def test_it_follows_its_model() -> None:
    """After speculative decoding was switched off, some streams later an event is a token again."""
    events = EventTokens()
    for tokens in (*[400] * 20, *[100] * 100):
        events.learn("t", "m", tokens, 100)
    assert events.get("t", "m") == pytest.approx(1, abs=0.02)


def test_no_stream_rules() -> None:
    """One absurd stream among ordinary ones moves it by a bounded part."""
    events = EventTokens()
    for _ in range(40):
        events.learn("t", "m", 500, 500)
    events.learn("t", "m", 10**9, 10**6)
    assert events.get("t", "m") < 1 + 0.1 * MAX_RATIO


def test_a_tenant_has_what_its_own_streams_taught() -> None:
    """And a new one what several tenants of its model have in common: one alone moves no one."""
    events = EventTokens()
    events.learn("a", "m", 100, 100)
    for _ in range(50):
        events.learn("b", "m", 6000, 100)
    assert events.get("a", "m") == events.get("c", "m") == 1
    assert events.get("b", "m") == pytest.approx(60, rel=0.01)
    for tenant in ("d", "e", "f"):
        events.learn(tenant, "m", 4000, 1000)
    assert events.get("c", "m") == pytest.approx(4, rel=0.1)


@given(st.lists(st.tuples(st.text(max_size=2), st.integers(-1, 1 << 40), st.integers(-1, 1 << 20)), max_size=40))
def test_it_is_bounded(streams: list[tuple[str, int, int]]) -> None:
    """Whatever streams report."""
    events = EventTokens()
    for model, tokens, count in streams:
        events.learn("t", model, tokens, count)
        assert 1 / MAX_RATIO <= events.get("t", model) <= MAX_RATIO
    for n in range(MAX_KEYS):
        events.learn("t", f"model {n}", 40, 10)
    assert events.get("t", f"model {MAX_KEYS - 1}") == pytest.approx(4, rel=0.5)
    assert len(events._means) == 2 * MAX_KEYS  # each model's and its only tenant's
