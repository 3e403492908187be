"""Names of tenants and models: bounded, assigned by accepted requests only, and restored after an attack."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sidecar import labels as texts
from sidecar.labels import OTHER
from sidecar.load.client_labels import (
    HALF_LIFE_S,
    MAX_GIVEN_PAIRS_PER_TENANT,
    MAX_HALVINGS,
    MAX_PAIRS_PER_TENANT,
    MAX_WAITING,
    ClientLabels,
)

LIMIT = 5


def test_given_names_always_have_a_label() -> None:
    """Also before their first request, beyond the bound, and while an attack holds every other label."""
    labels = ClientLabels(LIMIT)
    labels.give(tenants=[f"customer-{n}" for n in range(3 * LIMIT)], models=["llama", "qwen"])
    for n in range(2601):
        labels.accept(f"invented-{n}", f"made-up-{n}", 1e6, float(n))
    for n in range(3 * LIMIT):
        labels.accept(f"customer-{n}", "llama", 0.1, 3000.0)
        assert labels.of(f"customer-{n}", "llama") == (f"customer-{n}", "llama")
    assert labels.of("customer-1", "qwen") == ("customer-1", OTHER), "this pair has had no request that was accepted"


def test_names_come_back_after_an_attack_with_accepted_requests() -> None:
    """An attack of a minute holds all labels; who works on has its own again within minutes."""
    labels, now = ClientLabels(LIMIT), 0.0
    labels.give(models=["llama"])
    for n in range(2601):
        labels.accept(f"invented-{n}", "llama", 1.0, now)
        now += 60 / 2601
    assert labels.of("acme", "llama") == (OTHER, "llama")
    for _ in range(10):
        labels.accept("acme", "llama", 1.0, now)
        now += 30.0
    assert labels.of("acme", "llama") == ("acme", "llama")


def test_a_steady_tenant_keeps_its_label_under_an_attack() -> None:
    """Thousands of new names, each accepted once, displace no label that has more use than each of them."""
    labels = ClientLabels(LIMIT)
    for _ in range(3):
        labels.accept("acme", "llama", 1.0, 0.0)
    for n in range(5000):
        labels.accept(f"invented-{n}", f"made-up-{n}", 1.0, n / 43)
    assert labels.of("acme", "llama") == ("acme", "llama")


def test_a_busy_name_replaces_the_label_of_one_long_unused() -> None:
    """Weight halves with time, over years of uptime too."""
    labels, now = ClientLabels(1), 0.0
    for year in range(3):
        labels.accept(f"tenant-{year}", "m", 1000.0, now)
        labels.accept(f"tenant-{year}", "m", 1000.0, now)
        assert labels.of(f"tenant-{year}", "m") == (f"tenant-{year}", "m")
        now += 1.5 * MAX_HALVINGS * HALF_LIFE_S


def test_a_lost_label_gives_back_its_pairs() -> None:
    """Pairs of a name without a label leave room for those of names that have one."""
    labels = ClientLabels(1)
    for model in ("a", "b"):
        labels.accept("old", model, 1.0, 0.0)
    labels.accept("new", "a", 100.0, 1.0)
    assert labels.of("new", "a") == ("new", "a")
    assert labels.of("old", "a") == (OTHER, "a")


NAMES = st.text("abc\u202e ", max_size=3)


@given(st.lists(st.tuples(NAMES, NAMES, st.floats(0, 100), st.floats(0, 40_000), st.booleans()), max_size=80))
def test_labels_are_bounded_stable_and_labels_of_themselves(
    requests: list[tuple[str, str, float, float, bool]],
) -> None:
    """For any sequence of requests; labels change only when `accept` returns True."""
    limit, now = 2, 0.0
    labels = ClientLabels(limit)
    labels.give(tenants=["given"], models=["m"])
    shown: set[tuple[str, str]] = set()
    for tenant, model, mu, step, accepted in requests:
        now += step
        if accepted and labels.accept(tenant, model, mu, now):
            shown = {labels.of(*pair) for pair in shown}
        shown |= {labels.of(t, m) for t, m, *_ in requests}
        assert all(labels.of(*pair) == pair for pair in shown), "only accept removes a label, and reports it"
        tenants, models = ({pair[i] for pair in shown} - {OTHER} for i in (0, 1))
        assert len(tenants) <= limit + 1 and len(models) <= limit + 1
        named = [pair for pair in shown if OTHER not in pair]
        assert len(named) <= (MAX_PAIRS_PER_TENANT + MAX_GIVEN_PAIRS_PER_TENANT) * limit


def test_memory_is_bounded() -> None:
    """Of names without a label only the heaviest ones are remembered."""
    labels = ClientLabels(LIMIT)
    for n in range(3 * MAX_WAITING):
        labels.accept(f"invented-{n}", f"made-up-{n}", 1.0, 0.0)
    held = [labels._tenants._waiting, labels._models._waiting, labels._pairs._waiting]
    assert all(len(names) <= MAX_WAITING for names in held)


def test_names_that_are_no_longer_given_are_bounded() -> None:
    """An engine that loads one adapter after the other for years leaves no more names and pairs than others do."""
    labels, shown = ClientLabels(LIMIT), set[tuple[str, str]]()
    labels.give(tenants=["acme"])
    for n in range(100):
        labels.give(models=[f"adapter-{n}"])
        for tenant in ("acme", "guest"):
            if labels.accept(tenant, f"adapter-{n}", 1.0, float(n)):
                shown = {labels.of(*pair) for pair in shown}
            shown |= {labels.of(*pair) for pair in [*shown, (tenant, f"adapter-{n}")]}
            assert labels.of("acme", f"adapter-{n}") == ("acme", f"adapter-{n}")
        assert len(shown) <= 3 * (LIMIT + 2)
    assert all(labels.of(*pair) == pair for pair in shown)


def test_long_texts_are_not_remembered() -> None:
    """Thousands of paths of 100 KiB would be hundreds of megabytes."""
    text = "/" + "x" * texts.MAX_REMEMBERED_CHARS
    before = texts._remembered.cache_info().currsize
    assert texts.printable(text) == text[:64]
    assert texts._remembered.cache_info().currsize == before
