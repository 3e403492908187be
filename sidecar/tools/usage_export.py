"""Write usage records by the hour as JSON lines, CSV or FOCUS 1.4.

    sidecar usage export --format focus --from 2026-11-01 --until 2026-12-01 --out november.csv
    sidecar usage export --format jsonl --mark /var/lib/billing/pod-0.mark --out pod-0-$(date +%s).jsonl

Rules:
- Only hours that are final are written: those that ended more than an hour ago. So an hour exported twice is the same
  twice, and each row has an id.
- With --mark, only hours since the last export are written; the mark moves after the rows are written, so that an
  export that failed is repeated.
- A file that was too full holds rows of days instead of old hours (--usage-bytes). With --mark they are written as rows
  of a day, as they were never written as hours. Without it they are refused: an earlier export may hold their hours,
  and what adds up rows by their ids would count them twice.
"""

from __future__ import annotations

import csv
import json
import os
import socket
import sqlite3
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, TextIO

from sidecar.errors import UsageError
from sidecar.flags import directory, file_path, flag, one_of, text
from sidecar.report.usage_export import ExportRow, exporter_of, final_until, focus, record
from sidecar.report.usage_query import EMPTY_ROW, hours, provenance
from sidecar.report.usage_rows import HOUR_S, QUARTER_S, UsageKey
from sidecar.report.usage_store import USAGE_FILE
from sidecar.settings import require_writable
from sidecar.tools.usage import NoUsageRecords, as_text, moment, seconds_of, time_zone, zone_of


@dataclass(frozen=True, slots=True)
class ExportSettings:
    """Settings of `sidecar usage export`."""

    state_dir: str = flag("/run/sidecar", directory, "State directory of the sidecar")
    format: str = flag(
        "jsonl", one_of("jsonl", "csv", "focus"), "Form of the rows; focus: CSV with FOCUS 1.4's columns"
    )
    out: str = flag("", file_path, "File to write; none: standard output")
    mark: str = flag("", file_path, "File that stores the end of the last export, to continue from there")
    from_: str = flag("", moment, "Start, a full hour; none: from --mark, else the oldest record")
    until: str = flag("", moment, "End, a full hour; at most, and by default, the last final hour")
    tz: str = flag("UTC", time_zone, "Time zone of --from and --until")
    pod: str = flag("", text, "Name of the pod in the rows; none: POD_NAME, or the host's")
    account: str = flag("self-hosted", text, "Billing account in FOCUS")
    provider: str = flag("self-hosted", text, "Provider and issuer of the invoice in FOCUS")
    currency: str = flag("USD", text, "Currency of the prices, in FOCUS")


def main(settings: ExportSettings) -> int:
    """Write the rows. Returns 0. Raises NoUsageRecords and UsageError."""
    if settings.mark and settings.from_:
        raise UsageError("--mark and --from: use only one of them")
    for name, file in (("out", settings.out), ("mark", settings.mark)):
        if file:
            require_writable(name, file)
    since, until = export_range(settings, _read_mark(settings.mark), time.time())
    path = Path(settings.state_dir) / USAGE_FILE
    try:
        pod = settings.pod or os.environ.get("POD_NAME") or socket.gethostname()
        by = exporter_of(provenance(path), pod, settings.account, settings.provider, settings.currency)
        kept = hours(path, since, until) if since < until else []
    except (OSError, sqlite3.Error) as e:
        raise NoUsageRecords(f"--state-dir: the usage records {path} cannot be read: {e}") from None
    if not settings.mark:
        require_hours([key for key, _ in kept])
    found = [record(key, sums, by) for key, sums in kept]
    found.sort(key=lambda row: (row["start"], row["id"]))
    rows = [focus(row, by) for row in found] if settings.format == "focus" else found
    empty = record(*EMPTY_ROW, by)
    head = list(focus(empty, by) if settings.format == "focus" else empty)
    if settings.out:
        with Path(settings.out).open("w", newline="") as out:
            FORMATS[settings.format](rows, head, out)
            out.flush()
            os.fsync(out.fileno())
    else:
        FORMATS[settings.format](rows, head, sys.stdout)
        sys.stdout.flush()
    if settings.mark:
        _write_mark(settings.mark, max(since, until))
    return 0


def export_range(settings: ExportSettings, mark: int, now: float) -> tuple[int, int]:
    """The full hours to export, in seconds since 1970; without those that are not final yet. Raises UsageError."""
    zone = zone_of(settings.tz)
    since = seconds_of(settings.from_, zone) if settings.from_ else mark
    first = since % HOUR_S  # hours of a zone may begin at a half or a quarter of one of UTC
    final = (final_until(now) - first) // HOUR_S * HOUR_S + first
    until = seconds_of(settings.until, zone) if settings.until else final
    if first % QUARTER_S or (until - since) % HOUR_S:
        raise UsageError("--from and --until: name full hours of --tz")
    return since, min(until, final)


def require_hours(keys: Sequence[UsageKey]) -> None:
    """Raises UsageError where rows are sums of days: they cannot be written as the hours that they were."""
    days = [key.at + key.span for key in keys if key.span > HOUR_S]
    if days:
        until = datetime.fromtimestamp(max(days), UTC)
        raise UsageError(
            f"the records until {until:%Y-%m-%dT%H:%MZ} are kept by the day, as the file was too full; "
            f"use --from {until:%Y-%m-%dT%H:%M}, or --mark, which writes them once, as days"
        )


def as_json_lines(rows: Sequence[ExportRow], head: Sequence[str], file: TextIO) -> None:
    file.writelines(json.dumps(row) + "\n" for row in rows)


def as_csv(rows: Sequence[ExportRow], head: Sequence[str], file: TextIO) -> None:
    """CSV, with a header even if there are no rows. A name that starts like a spreadsheet formula is quoted."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(head)
    writer.writerows([as_text(value) for value in row.values()] for row in rows)


FORMATS: Final = {"jsonl": as_json_lines, "csv": as_csv, "focus": as_csv}


def _read_mark(name: str) -> int:
    """Seconds since 1970; 0 where there is no mark yet. Raises UsageError."""
    if not name or not Path(name).exists():
        return 0
    try:
        return int(datetime.fromisoformat(Path(name).read_text().strip()).timestamp())
    except (OSError, ValueError):
        raise UsageError(f"--mark: {name} is not a mark of an export; remove it to export everything") from None


def _write_mark(name: str, until: int) -> None:
    """Replace the mark, whole or not at all."""
    next_mark = Path(f"{name}.next")
    next_mark.write_text(datetime.fromtimestamp(until, UTC).isoformat() + "\n")
    next_mark.replace(name)
