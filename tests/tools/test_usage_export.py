"""`sidecar usage export` and `merge`: the same rows each time, every row once, sums that stay the same."""

from __future__ import annotations

import csv
import io
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from sidecar.__main__ import run
from sidecar.report.usage_query import all_rows, read
from sidecar.report.usage_rows import DAY_S, HOUR_S, PendingUsage, Rate, UsageKey, UsageSums, idle_key
from sidecar.report.usage_store import USAGE_FILE, UsageStore
from sidecar.tools.usage_export import ExportSettings, export_range

RATE = Rate("llama-h100", 8, 2.5)
NOW = time.time()
FINAL = int(NOW - HOUR_S) // HOUR_S * HOUR_S  # the end of the last final hour
TENANTS = ("acme", "=shop", "acme")
# FOCUS 1.4, "Cost and Usage": the columns of feature level Mandatory, and those that must not be null.
MANDATORY = (
    *("BilledCost", "BillingAccountId", "BillingAccountName", "BillingCurrency", "BillingPeriodEnd"),
    *("BillingPeriodStart", "ChargeCategory", "ChargeClass", "ChargeDescription", "ChargePeriodEnd"),
    *("ChargePeriodStart", "ContractedCost", "EffectiveCost", "HostProviderName", "InvoiceIssuerName", "ListCost"),
    *("PricingQuantity", "PricingUnit", "ServiceCategory", "ServiceName", "ServiceProviderName"),
)
NOT_NULL = [name for name in MANDATORY if name not in ("ChargeClass",)]


def fill(folder: Path, hours: int = 3, seed: int = 1) -> Path:
    """A pod's records: each minute of the last final hours and the present one, one request, idle time."""
    batch = PendingUsage(until=NOW)
    for minute in range(FINAL - hours * HOUR_S, int(NOW) // 60 * 60, 60):
        tenant = TENANTS[(minute // 60 + seed) % 3]
        key = UsageKey(minute, 60, tenant, "llama", "ok", "told", RATE)
        sums = UsageSums(1, 1.5, 0.1 * seed + 60.0, 1000, 400, 50, dollars=(0.1 * seed + 60.0) / 3600 * 2.5)
        whole = UsageSums(gpu_seconds=480.0, dollars=480.0 / 3600 * 2.5)
        batch.count(str(minute), key, sums)
        batch.add(PendingUsage({idle_key(minute, RATE): whole}))
    folder.mkdir(exist_ok=True)
    store = UsageStore(folder, 35, 64 << 20)
    store.write(batch, FINAL - hours * HOUR_S)
    return store.path


@pytest.fixture
def export(capsys: Any, tmp_path: Path) -> Callable[..., str]:
    def exported(folder: Path, *flags: str) -> str:
        until = () if "--until" in flags else ("--until", time.strftime("%Y-%m-%dT%H:00", time.gmtime(FINAL)))
        assert run(["usage", "export", "--state-dir", str(folder), "--pod", folder.name, *flags, *until]) == 0
        return str(capsys.readouterr().out)

    return exported


def total(path: Path) -> dict[tuple[Any, ...], UsageSums]:
    return dict(read(path, 0, 2e9, ("tenant", "outcome")))


def test_an_export_is_the_same_again(export: Callable[..., str], tmp_path: Path) -> None:
    """Twice gives the same rows, also after minutes were summed up."""
    path = fill(tmp_path / "pod")
    first = export(tmp_path / "pod")
    rows = [json.loads(line) for line in first.splitlines()]
    assert {row["start"] for row in rows} == {
        time.strftime("%Y-%m-%dT%H:00:00Z", time.gmtime(FINAL - n * HOUR_S)) for n in (1, 2, 3)
    }
    assert len({row["id"] for row in rows}) == len(rows) == 9
    UsageStore(tmp_path / "pod", 35, 64 << 20).write(PendingUsage(), FINAL + 9 * DAY_S)
    assert {key.span for key, _ in all_rows(path)} == {900}, "minutes were summed up"
    assert export(tmp_path / "pod") == first


@pytest.mark.parametrize(
    ("flags", "mark", "first", "last"),
    [
        ({}, "1970-01-01T00:00", "1970-01-01T00:00", "2026-11-30T11:00"),
        ({"until": "2026-12-01"}, "2026-11-30T09:00", "2026-11-30T09:00", "2026-11-30T11:00"),
        (
            {"from_": "2026-11-01", "until": "2026-11-02", "tz": "Europe/Berlin"},
            "",
            "2026-10-31T23:00",
            "2026-11-01T23:00",
        ),
    ],
)
def test_only_final_hours_are_exported(flags: dict[str, str], mark: str, first: str, last: str) -> None:
    """At 12:59 the hour until 11:00 is final, that until 12:00 is not: usage may still be written late."""
    now, since_mark = (
        int(datetime.fromisoformat(f"{at}+00:00").timestamp()) for at in ("2026-11-30T12:59", mark or first)
    )
    since, until = export_range(ExportSettings(**flags), since_mark, now)  # type: ignore[arg-type]
    shown = [datetime.fromtimestamp(at, UTC).isoformat(timespec="minutes")[:16] for at in (since, until)]
    assert shown == [first, last]


def test_a_mark_goes_on_from_the_last_export(export: Callable[..., str], tmp_path: Path) -> None:
    """Each final hour is exported once; an export that failed is repeated."""
    fill(tmp_path / "pod")
    mark, out = tmp_path / "mark", tmp_path / "rows.jsonl"
    whole = export(tmp_path / "pod")
    flags = ("--mark", str(mark), "--out", str(out))
    export(tmp_path / "pod", *flags, "--until", time.strftime("%Y-%m-%dT%H:00", time.gmtime(FINAL - HOUR_S)))
    first = out.read_text()
    assert run(["usage", "export", "--state-dir", str(tmp_path / "nothing"), *flags]) == 1
    export(tmp_path / "pod", *flags)
    assert first and out.read_text() and first + out.read_text() == whole
    export(tmp_path / "pod", *flags)
    assert out.read_text() == ""


def test_days_are_not_exported_as_hours(export: Callable[..., str], capsys: Any, tmp_path: Path) -> None:
    """Hours that a full file summed up to days are written once, as days, and only where no export had their hours."""
    pod, mark, again = tmp_path / "pod", tmp_path / "mark", tmp_path / "again"
    path = fill(pod, hours=200)
    end = FINAL // DAY_S * DAY_S
    whole = sum(sums.gpu_seconds for key, sums in all_rows(path) if key.at < end)
    half, until = (time.strftime("%Y-%m-%dT%H:00", time.gmtime(at)) for at in (end - 30 * HOUR_S, end))
    first = [json.loads(row) for row in export(pod, "--mark", str(mark), "--until", half).splitlines()]
    UsageStore(pod, 60, 64 << 10).write(PendingUsage(), FINAL + 40 * DAY_S)  # too full, in 40 days
    assert DAY_S in {key.span for key, _ in all_rows(path)}
    assert run(["usage", "export", "--state-dir", str(pod)]) == 2
    assert "kept by the day" in capsys.readouterr().err
    second = [json.loads(row) for row in export(pod, "--mark", str(mark), "--until", until).splitlines()]
    assert first and second and not {row["id"] for row in first} & {row["id"] for row in second}
    ends = {row["end"] for row in first} & {row["start"] for row in second}
    assert len(ends) == 1, "the second begins where the first ended"
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in (*first, *second)))
    assert run(["usage", "merge", "--into", str(again), str(rows)]) == 0
    merged = sum(sums.gpu_seconds for sums in total(again / USAGE_FILE).values())
    assert merged == pytest.approx(whole)


def test_focus_rows_are_whole(export: Callable[..., str], tmp_path: Path) -> None:
    """Every mandatory column of FOCUS 1.4, quantities times prices are costs, and the sum is the invoice."""
    fill(tmp_path / "pod")
    rows = list(csv.DictReader(io.StringIO(export(tmp_path / "pod", "--format", "focus"))))
    assert set(MANDATORY) <= set(rows[0]) and len(rows) == 9
    assert all(name.startswith("x_") or name[0].isupper() for name in rows[0])
    for row in rows:
        assert all(row[name] for name in NOT_NULL)
        assert float(row["PricingQuantity"]) * float(row["ListUnitPrice"]) == pytest.approx(
            float(row["ListCost"]), abs=1e-5
        )
        assert row["BillingPeriodStart"] <= row["ChargePeriodStart"] < row["ChargePeriodEnd"] <= row["BillingPeriodEnd"]
        assert (row["SubAccountId"] == "") == (row["x_Outcome"] == "idle")
    assert sum(float(row["BilledCost"]) for row in rows) == pytest.approx(3 * 8 * 2.5, abs=1e-4)
    assert {row["SubAccountId"] for row in rows} == {"", "acme", "'=shop"}


def test_an_empty_export_has_a_head(export: Callable[..., str], tmp_path: Path) -> None:
    """A file that a loader can read."""
    fill(tmp_path / "pod", hours=1)
    text = export(tmp_path / "pod", "--format", "focus", "--until", "2020-01-01")
    assert text.startswith("BilledCost,") and text.count("\n") == 1


def test_three_pods_are_merged_to_their_sum(export: Callable[..., str], tmp_path: Path) -> None:
    """From files, from exports, from copies of both in any order: each row once."""
    pods = [fill(tmp_path / f"pod-{n}", seed=n) for n in range(3)]
    wanted: dict[tuple[Any, ...], UsageSums] = {}
    for path in pods:
        for key, sums in total(path).items():
            wanted.setdefault(key, UsageSums()).add(sums)
    old = tmp_path / "old.db"
    shutil.copy(pods[0], old)
    store = UsageStore(tmp_path / "pod-0", 35, 64 << 20)
    newer = UsageKey(int(NOW) // 60 * 60, 60, "acme", "llama", "ok", "told", RATE)
    store.write(PendingUsage({newer: UsageSums(1, 1.5)}, until=NOW + 60), NOW)
    wanted["acme", "ok"].add(UsageSums(1, 1.5))
    rows = tmp_path / "pod-1.jsonl"
    rows.write_text(export(tmp_path / "pod-1"))
    for given in ((old, *pods), (*pods, rows, rows, old)):
        for _ in range(2):
            assert run(["usage", "merge", "--into", str(tmp_path / "all"), *map(str, given)]) == 0
            merged = total(tmp_path / "all" / USAGE_FILE)
            assert merged.keys() == wanted.keys()
            for key, sums in wanted.items():
                assert merged[key].requests == sums.requests
                assert (merged[key].mu, merged[key].dollars) == pytest.approx((sums.mu, sums.dollars))


def test_exports_alone_are_merged(export: Callable[..., str], tmp_path: Path) -> None:
    """Overlapping exports count each row once; the sum is that of the final hours, and can be shown and exported."""
    fill(tmp_path / "pod")
    early = time.strftime("%Y-%m-%dT%H:00", time.gmtime(FINAL - HOUR_S))
    parts = {"a": export(tmp_path / "pod"), "b": export(tmp_path / "pod", "--until", early)}
    for name, text in parts.items():
        (tmp_path / name).write_text(text)
    assert run(["usage", "merge", "--into", str(tmp_path / "all"), str(tmp_path / "b"), str(tmp_path / "a")]) == 0
    merged = total(tmp_path / "all" / USAGE_FILE)
    assert sum(sums.gpu_seconds for sums in merged.values()) == pytest.approx(3 * 8 * HOUR_S)
    assert export(tmp_path / "all", "--pod", "pod") == parts["a"]
    assert run(["usage", "--state-dir", str(tmp_path / "all"), "--from", "2020-01-01", "--by", "tenant"]) == 0


def test_what_cannot_be_merged_is_named(capsys: Any, tmp_path: Path) -> None:
    """An invalid file, a merged file next to a part of it, and flags before the command."""
    path = fill(tmp_path / "pod")
    (tmp_path / "text").write_text("{}\n")
    into = ("--into", str(tmp_path / "all"))
    assert run(["usage", "merge", *into, str(tmp_path / "text")]) == 2
    assert "line 1" in capsys.readouterr().err
    row = {**asdict(UsageSums()), "id": "1", "origin": "o", "start": "2026-11-01T00:00:00Z", "requests": None}
    names = dict.fromkeys(("tenant", "model", "outcome", "source", "fingerprint", "gpus", "dollars_per_gpu_hour"), "1")
    (tmp_path / "text").write_text(json.dumps(row | names) + "\n")
    assert run(["usage", "merge", *into, str(tmp_path / "text")]) == 2
    assert "line 1" in capsys.readouterr().err
    other = fill(tmp_path / "other")
    assert run(["usage", "merge", *into, str(path), str(other)]) == 0
    assert run(["usage", "merge", "--into", str(tmp_path / "x"), str(path), str(tmp_path / "all" / USAGE_FILE)]) == 2
    assert "hold records of the same sidecar" in capsys.readouterr().err
    assert run(["usage", "merge", *into]) == 2
    assert run(["usage", "--state-dir", "x", "merge", *into, str(path)]) == 2
    assert "after its name" in capsys.readouterr().err


def test_a_merge_replaces_a_former_result_only(capsys: Any, tmp_path: Path) -> None:
    """Not the records of a sidecar whose state directory is named for the result by mistake."""
    pods, into = [fill(tmp_path / name) for name in ("a", "b")], ("--into", str(tmp_path / "all"))
    for _ in range(2):
        assert run(["usage", "merge", *into, *map(str, pods)]) == 0
    before = total(pods[1])
    assert run(["usage", "merge", "--into", str(tmp_path / "b"), str(pods[0])]) == 2
    assert "name another directory" in capsys.readouterr().err
    assert total(pods[1]) == before
