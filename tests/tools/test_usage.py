"""`sidecar usage`: usage as a table, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import time
from pathlib import Path
from typing import Any

import pytest

from sidecar.__main__ import run
from sidecar.report.usage_store import Key, PendingUsage, UsageStore, UsageSums


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten requests of one tenant, of which two stalled, and one of a tenant with a hostile name, in the last hour."""
    now = time.time() - 600
    minute = int(now) // 60 * 60
    rows: dict[Key, UsageSums] = {
        (minute, "shop", "llama", "ok"): UsageSums(8, 16.0, 3600.0, 800, 80, 400, 0, 20.0),
        (minute, "shop", "llama", "stalled"): UsageSums(2, 4.0, 900.0, 200, 0, 10, 0, 90.0),
        (minute, "=cmd()\x1b[31m", "llama", "ok"): UsageSums(1, 0.5, 100.0, 10, 0, 5, 2, 1.0),
    }
    UsageStore(tmp_path, 1000.0, 35, 1 << 20).write(PendingUsage(rows, {"1": minute}), now)
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
    "flags", [("--since", "5"), ("--by", "colour"), ("--by", "tenant,tenant"), ("--format", "xml")], ids=str
)
def test_wrong_flags_end_with_2(capsys: Any, folder: Path, flags: tuple[str, str]) -> None:
    """One line that names the flag."""
    assert run(["usage", "--state-dir", str(folder), *flags]) == 2
    assert flags[0] in capsys.readouterr().err
