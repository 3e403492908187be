"""Metrics: names of the contract, counters, histograms, and bounded labels."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from sidecar.events import CanaryResult, ImagePrepared, Verdict
from sidecar.health.kill_policy import KILL_REASONS
from sidecar.health.reasons import REASON_TEXTS
from sidecar.labels import NONE, OTHER, BoundedLabels, printable
from sidecar.load.client_labels import ClientLabels
from sidecar.report.metrics import METRICS, Metrics
from sidecar.report.prometheus import MetricsPages
from sidecar.report.usage_rows import Eviction, Rate, UsageKey, UsageSums
from sidecar.snapshot import CanaryUse

from .snapshots import SNAPSHOT

# Users' dashboards and routers depend on these; a change here breaks them.
CONTRACT = re.findall(
    r"\S+",
    """
sidecar_mu_in_flight sidecar_mu_max_in_flight sidecar_mu_per_minute sidecar_mu_max_per_minute
sidecar_mu_utilization_ratio sidecar_mu_total{tenant,model,outcome} sidecar_mu_coefficients_stale
sidecar_prefill_tokens_in_flight sidecar_decode_tokens_in_flight sidecar_tokens_delivered_total
sidecar_requests_in_flight sidecar_requests_total{tenant,model,outcome}
sidecar_time_to_first_token_seconds sidecar_time_per_output_token_seconds sidecar_request_seconds
sidecar_relay_overhead_seconds sidecar_verdict{verdict} sidecar_verdict_changes_total{to,reason}
sidecar_progress_age_seconds sidecar_silence_allowed_seconds sidecar_canary_seconds sidecar_canaries_total{outcome}
sidecar_images_total{format,outcome,reason} sidecar_image_seconds{stage} sidecar_image_bytes_total{direction}
sidecar_gpu_utilization_ratio{gpu} sidecar_gpu_memory_used_bytes{gpu} sidecar_gpu_power_watts{gpu}
sidecar_gpu_xid_errors_total{gpu,xid} sidecar_signal_up{signal} sidecar_signal_seconds{signal}
sidecar_loop_lag_seconds{process} sidecar_cost_dollars_total{tenant,model} sidecar_build_info
sidecar_open_files{process} sidecar_max_open_files{process}
""",
)


def page(meters: Metrics) -> str:
    return MetricsPages(meters.registry, seconds=0).text()


def series(meters: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample of the page, as a scraper reads it."""
    families = text_string_to_metric_families(page(meters))
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset(labels.items())


def settle(
    meters: Metrics,
    tenant: str = "acme",
    model: str = "llama",
    outcome: str = "ok",
    sums: UsageSums | None = None,
    **seconds: float,
) -> None:
    key_ = UsageKey(0, 60, tenant, model, outcome, "told", Rate())
    meters.settled(key_, sums or UsageSums(mu=0.5), **{"request": 2.0, **seconds})


@pytest.mark.parametrize("written", CONTRACT)
def test_every_metric_of_the_contract_is_declared_and_rendered(written: str) -> None:
    """Each name of the contract is in the table with the contract's labels, and has HELP and TYPE on the first page."""
    name, _, labels = written.rstrip("}").partition("{")
    metric = next(m for m in METRICS if m.name == name)
    if labels:
        assert metric.labels == tuple(labels.split(","))
    text = page(Metrics())
    assert f"# HELP {name} " in text
    assert f"# TYPE {name} {metric.kind}\n" in text


# What field reports asked for after the document was written.
SINCE_THEN = ("sidecar_open_files{process}", "sidecar_max_open_files{process}")

LABELLED_SINCE = {"sidecar_images_total{format,outcome}": "sidecar_images_total{format,outcome,reason}"}


def test_the_contract_here_is_the_written_one(requires: Callable[[str], Path]) -> None:
    """The list above is the one of the design document, and what came since."""
    document = requires("../shared/design/contract.md").read_text()
    section = document.partition("## Metric names")[2].partition("\n\n")[0]
    names = [re.sub(r"\{verdict\}.*", "{verdict}", n) for n in re.findall(r"`(sidecar_[^`]+)`", section)]
    assert sorted(LABELLED_SINCE.get(name, name) for name in (*names, *SINCE_THEN)) == sorted(CONTRACT)


def test_a_settled_request_is_counted_by_tenant_model_and_outcome() -> None:
    """Requests, MU and dollars add up per label set, and times go into their histograms."""
    meters = Metrics()
    seconds = {"time_to_first_token": 0.2, "time_per_output_token": 0.012, "relay_overhead": 0.0003}
    settle(meters, sums=UsageSums(mu=0.5, dollars=0.01), **seconds)
    settle(meters, sums=UsageSums(mu=0.25, dollars=0.02))
    settle(meters, outcome="client_cancelled", sums=UsageSums(mu=0.1), request=1.0)
    got = series(meters)
    ok = {"tenant": "acme", "model": "llama", "outcome": "ok"}
    assert got[key("sidecar_requests_total", **ok)] == 2
    assert got[key("sidecar_mu_total", **ok)] == 0.75
    assert got[key("sidecar_mu_total", **ok | {"outcome": "client_cancelled"})] == 0.1
    assert got[key("sidecar_cost_dollars_total", tenant="acme", model="llama")] == pytest.approx(0.03)
    assert got[key("sidecar_request_seconds_count")] == 3
    assert got[key("sidecar_request_seconds_sum")] == 5.0
    assert got[key("sidecar_time_to_first_token_seconds_count")] == 1
    assert got[key("sidecar_time_per_output_token_seconds_bucket", le="0.01")] == 0
    assert got[key("sidecar_time_per_output_token_seconds_bucket", le="0.015")] == 1
    assert got[key("sidecar_relay_overhead_seconds_bucket", le="0.0005")] == 1


def test_a_token_is_of_one_kind() -> None:
    """Those of media are no text, what was cached is not new, and all kinds together are input and output."""
    meters = Metrics()
    many = {"cached_tokens": 400, "output_tokens": 50, "image_tokens": 300, "audio_tokens": 20, "video_tokens": 0}
    settle(meters, sums=UsageSums(requests=1, input_tokens=1000, **many))  # type: ignore[arg-type]
    found = {dict(labels)["kind"]: n for (name, labels), n in series(meters).items() if name == "sidecar_tokens_total"}
    assert found == {"new": 280, "cached": 400, "out": 50, "image": 300, "audio": 20}


def test_dropped_usage_records_are_counted() -> None:
    """By the reason, and whether they were billable."""
    meters = Metrics()
    meters.evicted(Eviction("size", 40, 900, 0.0, 0.0, 0, 60))
    meters.evicted(Eviction("size", 3, 5, 2.5, 8.0, 0, 60))
    got = series(meters)
    rows = "sidecar_usage_evicted_rows_total"
    assert got[key(rows, why="size", billable="no")] == 40 and got[key(rows, why="size", billable="yes")] == 3
    assert got[key("sidecar_usage_evicted_mu_total", why="size")] == 2.5


def test_kills_are_counted_by_reason_from_zero_on() -> None:
    """Every reason has its series from the start, so that a rate sees the first kill; their sum is all kills."""
    meters = Metrics()
    meters.update(replace(SNAPSHOT, kills=3, kills_by_reason=(("no_progress", 2), ("other", 1))))
    got = {dict(labels)["reason"]: n for (name, labels), n in series(meters).items() if name == "sidecar_kills_total"}
    assert set(got) == {*KILL_REASONS} and sum(got.values()) == 3
    assert got["no_progress"] == 2 and got["other"] == 1 and got["gpu_fault"] == 0


def test_without_a_price_there_is_no_cost_series() -> None:
    """A cost of 0 has no series of dollars."""
    meters = Metrics()
    settle(meters)
    assert not [name for name, _ in series(meters) if name.startswith("sidecar_cost")]


@given(st.lists(st.floats(0, 1e5), max_size=50))
def test_a_histogram_is_cumulative_and_complete(values: list[float]) -> None:
    """Each bucket counts the values up to its bound, +Inf counts all, and the sum is right."""
    meters = Metrics()
    for value in values:
        settle(meters, request=value)
    got = series(meters)
    buckets = {dict(labels)["le"]: n for (name, labels), n in got.items() if name == "sidecar_request_seconds_bucket"}
    assert all(n == sum(v <= float(le) for v in values) for le, n in buckets.items())
    assert buckets["+Inf"] == got[key("sidecar_request_seconds_count")] == len(values)
    assert got[key("sidecar_request_seconds_sum")] == pytest.approx(sum(values))


@pytest.mark.parametrize(("usable", "shown"), [(None, None), (True, 1.0), (False, 0.0)])
def test_whether_a_canary_passes_is_a_gauge(usable: bool | None, shown: float | None) -> None:
    """It is absent until it is known."""
    meters = Metrics()
    meters.update(replace(SNAPSHOT, canaries=CanaryUse(usable=usable)))
    assert series(meters).get(key("sidecar_canary_usable")) == shown


def test_images_canaries_and_verdict_changes_are_counted() -> None:
    """Each record counts in its counter and, if it has a duration, in its histogram."""
    meters = Metrics()
    meters.observe(ImagePrepared("r", 1.0, "jpeg", "ok", 0.03, (("decode", 0.006), ("resize", 0.004)), 1000, 3000))
    meters.observe(CanaryResult("starved", 10.0, 18.0, 8.0))
    meters.observe(Verdict("stalled", "no_progress", "", 1.0, 1.0))
    got = series(meters)
    assert got[key("sidecar_images_total", format="jpeg", outcome="ok", reason="")] == 1
    assert got[key("sidecar_image_bytes_total", direction="in")] == 1000
    assert got[key("sidecar_image_bytes_total", direction="out")] == 3000
    assert got[key("sidecar_image_seconds_sum", stage="decode")] == 0.006
    assert got[key("sidecar_image_seconds_sum", stage="total")] == 0.03
    assert got[key("sidecar_canaries_total", outcome="starved")] == 1
    assert got[key("sidecar_canary_seconds_sum")] == 8.0
    assert got[key("sidecar_verdict_changes_total", to="stalled", reason="no_progress")] == 1


def test_a_doubt_names_its_reason_while_it_lasts() -> None:
    """Every reason has a series; that of a stall keeps its own while the kill is held back; health has none."""
    meters = Metrics()
    held = Verdict("stalled", "kill_interval", "", 1.0, 1.0, {"cause": "work_unserved"})
    for verdict, found in ((held, ["work_unserved"]), (Verdict("idle", "no_work", "", 1.0, 1.0), [])):
        meters.update(replace(SNAPSHOT, verdict=verdict))
        doubts = {
            dict(labels)["reason"]: on for (name, labels), on in series(meters).items() if name == "sidecar_doubt"
        }
        assert sorted(doubts) == sorted(REASON_TEXTS) and [reason for reason, on in doubts.items() if on] == found


def test_a_hostile_label_cannot_break_the_page() -> None:
    """Quotes, backslashes and line ends in a tenant's name are escaped or replaced, in one parseable sample."""
    meters, labels = Metrics(), ClientLabels(5)
    tenant, model = 'a"} 1\nsidecar_verdict{verdict="dead\\', "\x00\u202e"
    labels.accept(tenant, model, 1.0, 0.0)
    settle(meters, *labels.of(tenant, model))
    (shown,) = [dict(labels) for name, labels in series(meters) if name == "sidecar_requests_total"]
    assert shown == {"tenant": 'a"} 1?sidecar_verdict{verdict="dead\\', "model": "??", "outcome": "ok"}


@given(st.lists(st.text(max_size=100), max_size=60), st.integers(1, 10))
def test_bounded_is_stable_and_bounded(texts: list[str], limit: int) -> None:
    """There are at most `limit` labels and `other`; a text keeps its label; labels are printable, short, not empty."""
    bounded = BoundedLabels(limit, max_length=20)
    first = [bounded(text) for text in texts]
    assert len({label for label in first if label != OTHER}) <= limit
    again = [bounded(text) for text in texts]
    assert [b for a, b in zip(first, again, strict=True) if a != OTHER] == [a for a in first if a != OTHER]
    assert all(label.isprintable() and 0 < len(label) <= 20 for label in first)


def test_nothing_is_a_label_of_its_own() -> None:
    """An empty or blank name reads as `none`, because an empty label would be a missing one."""
    assert (printable(""), printable(" \t\n"), printable("a" * 65)) == (NONE, NONE, "a" * 64)
    assert printable("a" * 63 + " b") == printable(printable("a" * 63 + " b")), "a label is its own label"
