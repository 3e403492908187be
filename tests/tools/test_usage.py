"""`sidecar usage`: usage as a table, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from sidecar.__main__ import run
from sidecar.report.usage_rows import HOUR_S, PendingUsage, Rate, UsageKey, UsageSums
from sidecar.report.usage_store import UsageStore
from sidecar.tools.usage import UsageSettings, time_range

# Summer time ends in it.
BERLIN_DAY_OF_25_HOURS = ("2026-10-24T22:00+00:00", "2026-10-25T23:00+00:00")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten requests of one tenant, of which two stalled, and one of a tenant with a hostile name, in the last hour."""
    now = time.time() - 600
    minute = int(now) // 60 * 60
    rate = Rate("llama-h100", 1, 2.5)
    rows = {
        UsageKey(minute, 60, "shop", "llama", "ok", "told", rate): UsageSums(8, 16.0, 3600.0, 800, 80, 400, 0, 20.0),
        UsageKey(minute, 60, "shop", "llama", "stalled", "told", rate): UsageSums(2, 4.0, 900.0, 200, 0, 10, 0, 90.0),
        UsageKey(minute, 60, "=cmd()\x1b[31m", "llama", "ok", "told", rate): UsageSums(1, 0.5, 100.0, 10, 0, 5, 2, 1.0),
    }
    UsageStore(tmp_path, 35, 1 << 20).write(PendingUsage(rows, {"1": minute}), now)
    return tmp_path


def ask(capsys: Any, folder: Path, *flags: str) -> str:
    assert run(["usage", "--state-dir", str(folder), *flags]) == 0
    return str(capsys.readouterr().out)


def test_a_table_for_people(capsys: Any, folder: Path) -> None:
    """Largest first, dollars of GPU time, and what was wasted; no control characters reach the terminal."""
    out = ask(capsys, folder, "--dollars-per-gpu-hour", "2")
    lines = out.splitlines()
    assert lines[0].split()[:3] == ["tenant", "model", "requests"] and lines[1].startswith("shop")
    assert lines[1].split()[-1] == "2.50", "4500 GPU seconds at $2 an hour"
    assert lines[-1] == "11 requests, 20.5 MU, 4600 GPU seconds, $2.56; 19.6% wasted (not ok)"
    assert "\x1b" not in out


def test_csv_for_spreadsheets(capsys: Any, folder: Path) -> None:
    """A name that looks like a formula is text."""
    rows = list(csv.DictReader(io.StringIO(ask(capsys, folder, "--format", "csv", "--by", "tenant,outcome"))))
    assert [(r["tenant"][:5], r["outcome"], r["requests"]) for r in rows] == [
        ("shop", "ok", "8"),
        ("shop", "stalled", "2"),
        ("'=cmd", "ok", "1"),
    ]


def test_json_for_programs(capsys: Any, folder: Path) -> None:
    """Plain numbers; without a price there are no dollars."""
    (row,) = json.loads(ask(capsys, folder, "--format", "json", "--by", "model"))
    assert (row["model"], row["requests"], row["output_tokens"]) == ("llama", 11, 415) and "dollars" not in row


def test_another_time_is_empty(capsys: Any, folder: Path) -> None:
    """Only what is selected is counted."""
    assert ask(capsys, folder, "--since", "1m") == "no requests in this time\n"


def test_no_records_is_said(capsys: Any, tmp_path: Path) -> None:
    """A wrong directory ends with 1 and one line that says what to do."""
    assert run(["usage", "--state-dir", str(tmp_path)]) == 1
    assert "name the state directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ("--since", "5"),
        ("--by", "colour"),
        ("--by", "tenant,tenant"),
        ("--format", "xml"),
        ("--from", "yesterday"),
        ("--until", "2020-01-01", "--from", "2020-01-01"),
        ("--tz", "Europe/Atlantis"),
        ("--since", "1h", "--from", "2026-11-01"),
    ],
    ids=str,
)
def test_wrong_flags_end_with_2(capsys: Any, folder: Path, flags: tuple[str, ...]) -> None:
    """One line that names the flag."""
    assert run(["usage", "--state-dir", str(folder), *flags]) == 2
    assert flags[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "first", "last"),
    [
        ({"from_": "2026-11-01", "until": "2026-12-01"}, "2026-11-01T00:00+00:00", "2026-12-01T00:00+00:00"),
        ({"from_": "2026-10-25", "until": "2026-10-26", "tz": "Europe/Berlin"}, *BERLIN_DAY_OF_25_HOURS),
        ({"from_": "2026-11-02T06:30+05:45"}, "2026-11-02T00:45+00:00", "2026-11-30T12:35+00:00"),
        ({"since": "48h"}, "2026-11-28T12:34+00:00", "2026-11-30T12:35+00:00"),
        ({"since": "90m", "until": "2026-11-02T00:00"}, "2026-11-01T22:30+00:00", "2026-11-02T00:00+00:00"),
        ({}, "2026-11-29T12:34+00:00", "2026-11-30T12:35+00:00"),
    ],
)
def test_a_range_follows_from_the_flags(flags: dict[str, str], first: str, last: str) -> None:
    """Dates of a time zone, to the minute; what happens now is part of what happened until now."""
    now = datetime.fromisoformat("2026-11-30T12:34:56+00:00").timestamp()
    since, until = time_range(UsageSettings(**flags), now)  # type: ignore[arg-type]
    shown = [datetime.fromtimestamp(at, UTC).isoformat(timespec="minutes") for at in (since, until)]
    assert shown == [first, last]


def test_days_of_a_time_zone(capsys: Any, tmp_path: Path) -> None:
    """Each request of two days is on the day that it was in Kathmandu (+05:45), also in rows of an hour."""
    start = int(datetime.fromisoformat("2026-11-01T00:00+05:45").timestamp())
    rows = {
        UsageKey(start - 15 * 60 + HOUR_S * n, HOUR_S, "a", "m", "ok", "told", Rate()): UsageSums(100, 10.0)
        for n in range(48)
    }
    UsageStore(tmp_path, 3660, 1 << 20).write(PendingUsage(rows), start)
    flags = (
        "--from",
        "2026-10-31",
        "--until",
        "2026-11-04",
        "--tz",
        "Asia/Kathmandu",
        "--format",
        "json",
        "--by",
        "day",
    )
    days = {row["day"]: row["requests"] for row in json.loads(ask(capsys, tmp_path, *flags))}
    assert days == {"2026-10-31": 25, "2026-11-01": 2400, "2026-11-02": 2375}


def test_the_price_at_the_time_is_the_default(capsys: Any, tmp_path: Path) -> None:
    """Dollars are those of each row's own price, unless another is given."""
    at = int(time.time()) // 60 * 60
    rows = {
        UsageKey(at, 60, "a", "m", "ok", "told", Rate("f", 8, price)): UsageSums(
            1, 1.0, 7200.0, dollars=7200 / 3600 * price
        )
        for price in (2.0, 3.0)
    }
    UsageStore(tmp_path, 35, 1 << 20).write(PendingUsage(rows), at)
    asked = [("--format", "json"), ("--format", "json", "--dollars-per-gpu-hour", "1")]
    assert [json.loads(ask(capsys, tmp_path, *flags))[0]["dollars"] for flags in asked] == [10.0, 4.0]
