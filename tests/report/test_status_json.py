"""What `GET /status` answers, and the percentiles in it."""

from __future__ import annotations

import json
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from sidecar.load.recent_times import MAX_VALUES, WINDOW_S, RecentTimes
from sidecar.readings import Absent
from sidecar.report import status_json
from sidecar.snapshot import Percentiles, PodNames, RecentLatencies, TenantUse

from .conftest import verdict
from .snapshots import SNAPSHOT


def test_a_status_has_what_is_asked_first() -> None:
    """Where, what, since when, whether it serves, and how long users wait."""
    shown = status_json.render(
        replace(
            SNAPSHOT,
            place=PodNames("llm-0", "serving", "node-7"),
            models=("qwen", "lora"),
            engine_version="0.32",
            probes=(("live", True), ("ready", False)),
            latencies=RecentLatencies(Percentiles(0.2, 0.9, 30)),
        )
    )
    assert (shown["pod"], shown["namespace"], shown["node"]) == ("llm-0", "serving", "node-7")
    assert (shown["engine"], shown["engine_version"], shown["models"]) == ("vllm", "0.32", ["qwen", "lora"])
    assert (shown["state"], shown["at"] - shown["since"]) == ("progressing", 10.0)
    assert shown["probes"] == {"live": True, "ready": False}
    assert shown["first_token"] == {"p50": 0.2, "p95": 0.9, "count": 30} and shown["output_token"] is None
    json.dumps(shown, allow_nan=False)


def test_lists_are_bounded_and_absence_has_a_reason() -> None:
    """Many tenants and changes are cut to the largest and the newest; a missing GPU says why."""
    tenants = tuple(TenantUse(f"t{n}", 0, 0.0, float(n), 1, 1, ()) for n in range(100))
    changes = tuple(verdict(since=-n) for n in range(50))
    shown = status_json.render(replace(SNAPSHOT, tenants=tenants, changes=changes, gpus=Absent("no driver")))
    assert [use["tenant"] for use in shown["tenants"]][:2] == ["t99", "t98"]
    assert len(shown["tenants"]) == status_json.MAX_TENANTS and len(shown["changes"]) == status_json.MAX_CHANGES
    assert (shown["gpus"], shown["gpus_absent"]) == (None, "no driver")


@given(st.lists(st.floats(0.001, 100), min_size=2, max_size=300))
def test_percentiles_are_values_that_were_seen(values: list[float]) -> None:
    """Half is at most the median and 95 of 100 at most p95, and no smaller value of them would do."""
    recent = RecentTimes()
    for value in values:
        recent.add(10.0, value)
    found = recent.percentiles(11.0)
    assert found is not None and found.count == len(values)
    for share, percentile in ((50, found.p50), (95, found.p95)):
        assert 100 * sum(value <= percentile for value in values) >= share * len(values)
        assert 100 * sum(value < percentile for value in values) < share * len(values)


def test_old_times_leave_and_their_number_is_bounded() -> None:
    """After a minute without a value there is no percentile, and memory holds the newest values only."""
    recent = RecentTimes()
    assert recent.percentiles(0.0) is None
    for at in range(3 * MAX_VALUES):
        recent.add(at / 1000, 1.0)
    found = recent.percentiles(3.0)
    assert found == Percentiles(1.0, 1.0, MAX_VALUES)
    assert recent.percentiles(4.0 + WINDOW_S) is None
