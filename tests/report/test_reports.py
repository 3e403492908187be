"""Reports for Prometheus and autoscalers, rendered from one Snapshot."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import openmetrics, parser
from prometheus_client.openmetrics import parser as openmetrics_parser

from sidecar.events import STATES, AbortRequests, CanaryResult, ImagePrepared, RequestSize, Verdict
from sidecar.load.cost_model import Coefficients
from sidecar.readings import Absent, Failed, GpuFaults, Value
from sidecar.report import load_json, prometheus
from sidecar.report.merged_page import merge_pages
from sidecar.report.metrics import METRICS, Metrics
from sidecar.report.prometheus import PLAIN_CONTENT_TYPE, MetricsPages
from sidecar.report.usage_rows import Eviction, Rate, UsageKey, UsageSums
from sidecar.snapshot import ShadowUse, Snapshot

from .snapshots import GPU, SNAPSHOT

ENGINE_PAGE = """# HELP vllm:num_requests_waiting Waiting.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{model_name="llama"} 3.0
"""
SECONDS = {"request": 2.0, "time_to_first_token": 0.2, "time_per_output_token": 0.01, "relay_overhead": 0.0003}


def full() -> Metrics:
    """Metrics with at least one series each."""
    meters = Metrics()
    meters.update(SNAPSHOT)
    row = UsageKey(0, 60, "acme", "llama", "ok", "told", Rate())
    meters.settled(row, UsageSums(1, 0.5, 1.0, 10, dollars=0.01), **SECONDS)
    meters.evicted(Eviction("size", 3, 5, 2.5, 8.0, 0, 60))
    meters.observe(ImagePrepared("r", 1.0, "jpeg", "ok", 0.03, (("decode", 0.006),), 1000, 3000))
    meters.observe(CanaryResult("ok", 10.0, 10.1, 8.0))
    meters.observe(Verdict("progressing", "bytes_delivered", "", 1.0, 1.0))
    meters.observe(AbortRequests(("r",), "stream_stuck"))
    return meters


def samples(text: str) -> dict[str, float]:
    """`name{labels}` -> value of a plain page."""
    return {n: float(v) for n, v in (line.rsplit(" ", 1) for line in text.splitlines() if line[:1] != "#")}


def page(snapshot: Snapshot) -> dict[str, float]:
    meters = Metrics()
    meters.update(snapshot)
    return samples(MetricsPages(meters.registry).text())


# --- Prometheus ---


def test_a_snapshot_is_shown_whole() -> None:
    """Gauges show the snapshot's numbers, with one series per verdict and per relay."""
    got = page(SNAPSHOT)
    assert got["sidecar_mu_in_flight"] == 3.2
    assert got["sidecar_mu_utilization_ratio"] == 0.41
    assert got["sidecar_tokens_delivered_total"] == 123456
    assert got["sidecar_progress_age_seconds"] == 0.25
    assert {state: got[f'sidecar_verdict{{verdict="{state}"}}'] for state in STATES} == {
        state: float(state == "progressing") for state in STATES
    }
    assert got['sidecar_loop_lag_seconds{process="control"}'] == 0.001
    assert got['sidecar_loop_lag_seconds{process="relay-1"}'] == 0.003
    assert got['sidecar_open_files{process="control"}'] == 30
    assert got['sidecar_open_files{process="relay-0"}'] == 90
    assert got['sidecar_max_open_files{process="relay-0"}'] == 4096
    assert 'sidecar_open_files{process="relay-1"}' not in got  # it has not said it yet
    assert got['sidecar_gpu_utilization_ratio{gpu="0"}'] == 0.93
    assert got['DCGM_FI_DEV_GPU_UTIL{UUID="GPU-0",gpu="0"}'] == 93
    assert got['sidecar_gpu_xid_errors_total{gpu="0",xid="79"}'] == 2
    assert got['sidecar_gpu_energy_joules_total{gpu="0"}'] == 9.5e6
    assert got['sidecar_gpu_slowdown{gpu="0",reason="power_cap"}'] == 1
    assert got['sidecar_gpu_slowdown{gpu="0",reason="thermal_hardware"}'] == 0
    assert got['sidecar_signal_up{signal="scrape"}'] == 1
    assert got['sidecar_signal_seconds{signal="gpu"}'] == 0.002
    assert got['sidecar_build_info{engine_kind="vllm",version="1.2.3"}'] == 1


def test_every_metric_has_a_series_once_everything_has_happened() -> None:
    """Every declared metric has a series."""
    got = samples(MetricsPages(full().registry).text())
    for metric in METRICS:
        assert [n for n in got if n.partition("{")[0] in (metric.name, metric.name + "_bucket")], metric.name


def test_what_was_not_read_is_never_a_zero() -> None:
    """Absent has no series, failed is `up 0` without values, and a failed number of a GPU is omitted alone."""
    gpu = replace(GPU, power=Failed("x"), utilization=Absent("MIG"))
    got = page(replace(SNAPSHOT, engine=Absent("no page"), own=Failed("x"), gpus=Value((gpu,), 1.0), progress_age=None))
    assert not [n for n in got if 'signal="scrape"' in n or n.startswith(("sidecar_progress_age", "sidecar_gpu_power"))]
    assert got['sidecar_signal_up{signal="process"}'] == 0
    assert 'sidecar_signal_seconds{signal="process"}' not in got
    assert got['sidecar_gpu_memory_used_bytes{gpu="0"}'] == 1 << 30
    assert got['sidecar_signal_up{signal="gpu"}'] == 1
    assert "sidecar_gpu_utilization_ratio" not in str(got)


def test_what_a_gpu_does_and_needs() -> None:
    """Shares and bytes by GPM, faults by the driver; what it does not report has no series."""
    got = page(SNAPSHOT)
    assert got['sidecar_gpu_tensor_ratio{gpu="0"}'] == 0.4 and got['sidecar_gpu_nvlink_bytes{gpu="0"}'] == 2e8
    assert got['sidecar_gpu_recovery_action{action="gpu_reset",gpu="0"}'] == 1
    assert got['sidecar_gpu_recovery_action{action="none",gpu="0"}'] == 0
    assert got['sidecar_gpu_row_remap{gpu="0",state="pending"}'] == 1
    assert got['sidecar_gpu_events_total{gpu="0",severity="fatal"}'] == 1
    unknown = replace(GPU, activity=Absent("older"), faults=Value(GpuFaults(ecc_uncorrected=0), 99.0), events=())
    got = page(replace(SNAPSHOT, gpus=Value((unknown,), 99.0)))
    assert got['sidecar_gpu_ecc_uncorrected_total{gpu="0"}'] == 0
    names = ("tensor", "dram", "nvlink", "row_remap", "recovery", "events")
    assert not [name for name in got if name.startswith(tuple(f"sidecar_gpu_{part}" for part in names))]


def test_the_slices_of_a_gpu_are_told_apart() -> None:
    """Two MIG slices of GPU 0 are two series of each number, labeled by index."""
    slices = tuple(replace(GPU, mig=place, uuid=f"MIG-{place}", utilization=Absent("MIG")) for place in (0, 2))
    got = page(replace(SNAPSHOT, gpus=Value(slices, 1.0)))
    assert [n for n in got if n.startswith("sidecar_gpu_memory_used")] == [
        'sidecar_gpu_memory_used_bytes{gpu="0:0"}',
        'sidecar_gpu_memory_used_bytes{gpu="0:2"}',
    ]
    assert "sidecar_gpu_utilization_ratio" not in str(got)


def test_gpus_that_all_fail_are_a_signal_that_is_down_and_keep_their_xids() -> None:
    """GPUs that do not answer are `up 0`; their XID errors stay."""
    why = Failed("lost")
    lost = replace(GPU, utilization=why, memory_used=why, memory_total=why, power=why, temperature=why)
    got = page(replace(SNAPSHOT, gpus=Value((lost,), 1.0)))
    assert got['sidecar_signal_up{signal="gpu"}'] == 0
    assert got['sidecar_gpu_xid_errors_total{gpu="0",xid="79"}'] == 2


@pytest.mark.parametrize("meters", [full(), Metrics()], ids=["full", "empty"])
def test_promtool_has_nothing_to_say(requires: Callable[[str], Path], meters: Metrics) -> None:
    """`promtool check metrics` accepts the page, alone and merged with an engine's, without warnings."""
    for text in (
        MetricsPages(meters.registry).text(),
        merge_pages(ENGINE_PAGE.replace("vllm:", "vllm_"), MetricsPages(meters.registry).text()),
    ):
        check = subprocess.run(
            [requires("promtool"), "check", "metrics"], input=text, capture_output=True, text=True, timeout=60
        )
        assert (check.returncode, check.stdout + check.stderr) == (0, "")


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("", PLAIN_CONTENT_TYPE),
        ("*/*", PLAIN_CONTENT_TYPE),
        ("text/html", PLAIN_CONTENT_TYPE),
        ("application/openmetrics-text; version=abc", PLAIN_CONTENT_TYPE),
        ("application/openmetrics-text; version=", openmetrics.exposition.CONTENT_TYPE_LATEST),
        (
            "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,text/plain;version=0.0.4;q=0.3",
            "application/openmetrics-text; version=1.0.0; charset=utf-8; escaping=allow-utf-8",
        ),
    ],
)
def test_the_format_is_the_clients_choice(accept: str, content_type: str) -> None:
    """Each Accept header gets a page that the parser of its Content-Type reads; an invalid one gets plain text."""
    body, got = MetricsPages(full().registry).render(accept)
    assert got == content_type
    parse = openmetrics_parser if "openmetrics" in got else parser
    names = {family.name for family in parse.text_string_to_metric_families(body.decode())}
    assert {"sidecar_mu_in_flight", "sidecar_mu", "sidecar_request_seconds"} <= names


def test_a_page_is_rendered_once_a_second_however_often_it_is_asked_for() -> None:
    """A page is cached for a second, and the number of cached formats is bounded."""
    now = 0.0
    meters = full()
    pages = MetricsPages(meters.registry, clock=lambda: now)
    first, _ = pages.render()
    meters.update(replace(SNAPSHOT, progress_age=7.5))
    now = 0.99
    assert pages.render()[0] is first
    now = 1.0
    assert samples(pages.text())["sidecar_progress_age_seconds"] == 7.5
    for n in range(100):
        pages.render(f"application/openmetrics-text; version=1.{n}.0")
    assert len(pages._kept) <= prometheus.MAX_CACHED_FORMATS


def test_a_merged_page_is_the_engines_then_ours() -> None:
    """The engine's text is kept byte for byte except for the EOF marker, and the whole page can be parsed."""
    ours = MetricsPages(full().registry).text()
    assert merge_pages(ENGINE_PAGE, ours) == ENGINE_PAGE + ours
    assert merge_pages(ENGINE_PAGE.rstrip() + "\n# EOF", ours) == ENGINE_PAGE + ours
    assert merge_pages(None, ours) == merge_pages("", ours) == ours
    names = {family.name for family in parser.text_string_to_metric_families(merge_pages(ENGINE_PAGE, ours))}
    assert {"vllm:num_requests_waiting", "sidecar_mu_utilization_ratio"} <= names


def test_an_engine_behind_a_sidecar_does_not_double_our_families() -> None:
    """Series under the sidecar's names on the engine's page are dropped, all others stay."""
    ours = MetricsPages(full().registry).text()
    assert merge_pages(ours + ENGINE_PAGE + ours.rstrip(), ours) == ENGINE_PAGE + ours


# --- GET /load ---


def test_load_in_thousandths_for_sharders_that_count_in_whole_numbers() -> None:
    """With `unit=milli` MU are integers, and the hint is the maximum in flight; all else is unchanged."""
    plain, milli = load_json.render(SNAPSHOT), load_json.render(SNAPSHOT, "milli")
    names = ("in_flight", "max_in_flight", "per_minute", "max_per_minute")
    assert all(milli["mu"][n] == round(1000 * plain["mu"][n]) and isinstance(milli["mu"][n], int) for n in names)
    assert milli["mu"]["max_load_hint"] == milli["mu"]["max_in_flight"] and milli["mu"]["unit"] == "milli"
    assert {**milli, "mu": 0} == {**plain, "mu": 0} and load_json.render(SNAPSHOT, "mega") == plain


def test_load_is_the_contracts_object() -> None:
    """Keys and values are those of the contract, plus further readings of each GPU."""
    assert load_json.render(SNAPSHOT) == {
        "mu": {
            "in_flight": 3.2,
            "max_in_flight": 12.0,
            "per_minute": 41.0,
            "max_per_minute": 100.0,
            "utilization": 0.41,
            "limited_by": "flow",
            "parts": {
                "stock": 0.27,
                "flow": 0.41,
                "kv": None,
                "kv_absent": "not reported by the engine",
                "queue": 0.02,
                "ttft": 0.1,
            },
        },
        "tokens": {"prefill_in_flight": 5120, "decode_in_flight": 900, "delivered_total": 123456, "cached_share": 0.4},
        "requests": {"in_flight": 7, "waiting": 2},
        "objectives": {"seconds": 10.0, "ttft_seconds": 2.0},
        "predicted": {
            "ttft_seconds": 0.6,
            "tpot_seconds": 0.03,
            "wait_seconds": 0.2,
            "of": {"in": 3500, "cached": 0},
            "typical_ttft_seconds": 0.4,
            "error": {"median": 0.06, "p90": 0.21, "first_tokens": 120},
        },
        "gpu": [
            {
                "index": 0,
                "mig": None,
                "name": "H100",
                "utilization": 0.93,
                "memory_used_bytes": 1 << 30,
                "memory_total_bytes": 80 << 30,
                "power_watts": 640.5,
                "energy_joules": 9.5e6,
                "temperature_celsius": 61.0,
                "sm_clock_hertz": 1_980_000_000,
                "slowdowns": ("power_cap",),
                "processes": 2,
            }
        ],
        "coefficients": {
            "fingerprint": "llama-h100",
            "stale": False,
            "source": "calibrated",
            "margin": 0.2,
            "slowness": 1.0,
            "unit_ms": {"decode": 60.0},
            "line_ms": {"alpha": 0.1},
            "shadow": None,
            "shadow_absent": "3 windows of work so far",
        },
        "verdict": "progressing",
    }


def test_load_predicts_a_request_of_a_given_size() -> None:
    """The time to first token grows with the prompt that must be computed, along the line of the forecast."""
    co = Coefficients()
    size = RequestSize(1000, 3000)
    predicted = load_json.render(SNAPSHOT, "", size, co)["predicted"]
    prefill = (co.k + 1000 * co.a + 1000 * co.b * 3500) / 1000
    assert predicted["ttft_seconds"] == pytest.approx(0.25 + 2.0 * prefill + 0.01)
    assert predicted["of"] == {"in": 4000, "cached": 3000}


def test_load_says_why_a_value_is_missing() -> None:
    """A value that was not read is null with its reason, for all GPUs and for one number of one GPU."""
    none = load_json.render(replace(SNAPSHOT, gpus=Absent("no driver")))
    assert (none["gpu"], none["gpu_absent"]) == (None, "no driver")
    failed = load_json.render(replace(SNAPSHOT, gpus=Failed("NVML hangs")))
    assert (failed["gpu"], failed["gpu_absent"]) == (None, "failed: NVML hangs")
    (gpu,) = load_json.render(replace(SNAPSHOT, gpus=Value((replace(GPU, power=Absent("MIG")),), 1.0)))["gpu"]
    assert (gpu["power_watts"], gpu["power_watts_absent"], gpu["utilization"]) == (None, "MIG", 0.93)
    assert json.loads(json.dumps(none)) == none


def test_load_tells_of_stale_coefficients_what_they_should_be() -> None:
    """Stale coefficients come with the reason, and the re-fit with its error."""
    shadow = ShadowUse((("a", 0.3), ("d", 5.0)), 66.0, 40, 0.05)
    told = load_json.render(replace(SNAPSHOT, prices=replace(SNAPSHOT.prices, stale="slower", shadow=shadow)))
    assert told["coefficients"]["stale_reason"] == "slower"
    assert told["coefficients"]["shadow"] == {"a": 0.3, "d": 5.0, "max_per_minute": 66.0, "windows": 40, "error": 0.05}
