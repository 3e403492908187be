"""Show usage: requests, model units, tokens and dollars per tenant, model and outcome.

    sidecar usage --since 24h --by tenant,outcome --dollars-per-gpu-hour 2.50
    sidecar usage --from 2026-11-01 --until 2026-12-01 --tz Europe/Berlin --by tenant,day

The records are read from a sidecar's state directory, while it may be running. Requests that were not `ok` count as
wasted: the GPU worked on them, and no client got the response. Idle is the GPU time that no request used: all rows
together are the hours of the GPUs. A range of time includes its start and excludes its end, so
days, months and any other ranges that follow each other add up.
"""

from __future__ import annotations

import csv
import json
import re
import sqlite3
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import Any, Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from sidecar.errors import SidecarError, UsageError
from sidecar.flags import directory, flag, number, one_of, parser
from sidecar.report.usage_query import GROUPS, Row, read
from sidecar.report.usage_rows import HOUR_S, IDLE, MINUTE_S, NO_CLIENT, UsageSums
from sidecar.report.usage_store import USAGE_FILE

SECONDS_PER_UNIT: Final = {"m": 60, "h": 3600, "d": 86_400}


def parse_span(span: str) -> int:
    """Parse a time such as 90m, 24h, 7d into seconds. Raises ValueError."""
    match = re.fullmatch(r"(\d{1,6})([mhd])", span)
    if not match:
        raise ValueError
    return int(match[1]) * SECONDS_PER_UNIT[match[2]]


@parser("a time such as 90m, 24h or 7d", "TIME")
def span(value: str) -> str:
    parse_span(value)
    return value


@parser("a date or time such as 2026-11-01, 2026-11-01T06:30 or 2026-11-01T06:30+02:00", "TIME")
def moment(value: str) -> str:
    datetime.fromisoformat(value)
    return value


@parser("a time zone such as UTC or Europe/Berlin", "ZONE")
def time_zone(value: str) -> str:
    zone_of(value)
    return value


def zone_of(name: str) -> tzinfo:
    """A time zone by its IANA name. Raises ValueError, also if this machine has no time zone data except UTC."""
    try:
        return UTC if name == "UTC" else ZoneInfo(name)
    except (ZoneInfoNotFoundError, OSError):
        raise ValueError from None


@parser("some of " + ",".join(GROUPS), "NAMES")
def groups(value: str) -> str:
    names = [name for name in value.split(",") if name]
    if set(names) - set(GROUPS) or len(set(names)) != len(names):
        raise ValueError
    return ",".join(names)


@dataclass(frozen=True, slots=True)
class UsageSettings:
    """Settings of `sidecar usage`."""

    state_dir: str = flag("/run/sidecar", directory, "State directory of the sidecar")
    since: str = flag("", span, "Length of the range before --until, or before now; without --from: 24h")
    from_: str = flag("", moment, "Start of the range, in --tz unless it has an offset")
    until: str = flag("", moment, "End of the range, exclusive; none: now")
    tz: str = flag("UTC", time_zone, "Time zone of --from, --until, and of days and hours")
    by: str = flag("tenant,model", groups, "What to sum by")
    format: str = flag("table", one_of("table", "csv", "json"), "Form of the answer")
    dollars_per_gpu_hour: float = flag(
        0.0, number(0, 10_000, "dollars"), "Price of an hour of one GPU; 0: the sidecar's at the time"
    )


class NoUsageRecords(SidecarError):
    """There are no usage records to read."""

    code = "no_records"


def main(settings: UsageSettings, as_json: bool = False) -> int:
    """Print the report. Returns 0. Raises NoUsageRecords and UsageError."""
    path, by = Path(settings.state_dir) / USAGE_FILE, tuple(filter(None, settings.by.split(",")))
    since, until = time_range(settings, time.time())
    try:
        found, outcomes = (read(path, since, until, names, zone_of(settings.tz)) for names in (by, ("outcome",)))
    except FileNotFoundError:
        why = f"no usage records in {settings.state_dir}; name the state directory of a sidecar"
        raise NoUsageRecords(f"--state-dir: {why}") from None
    except (OSError, sqlite3.Error) as e:
        raise NoUsageRecords(f"--state-dir: the usage records {path} cannot be read: {e}") from None
    wasted, idle = 0.0, 0.0
    for (outcome,), sums in outcomes:
        wasted += sums.gpu_seconds if outcome not in ("ok", IDLE) else 0.0
        idle += sums.gpu_seconds if outcome == IDLE else 0.0
    for _, sums in found:
        price = settings.dollars_per_gpu_hour
        sums.dollars = sums.gpu_seconds / HOUR_S * price if price else sums.dollars
    priced = any(sums.dollars for _, sums in found)
    write = FORMATS["json" if as_json else settings.format]
    write([line(by, key, sums, priced=priced) for key, sums in found], summary(found, wasted, idle))
    return 0


def time_range(settings: UsageSettings, now: float) -> tuple[int, int]:
    """The range to show in seconds since 1970. Without --until it includes the minute of `now`. Raises UsageError."""
    if settings.from_ and settings.since:
        raise UsageError("--since and --from: use only one of them")
    zone, minute = zone_of(settings.tz), int(now) // MINUTE_S * MINUTE_S
    until = seconds_of(settings.until, zone) if settings.until else minute + MINUTE_S
    if settings.from_:
        since = seconds_of(settings.from_, zone)
    else:
        since = (until if settings.until else minute) - parse_span(settings.since or "24h")
    if since >= until:
        raise UsageError("--until must be later than --from")
    return since, until


def seconds_of(text: str, zone: tzinfo) -> int:
    """A date or time in seconds since 1970; in `zone` where it names no offset."""
    at = datetime.fromisoformat(text)
    return int((at if at.tzinfo else at.replace(tzinfo=zone)).timestamp())


def line(by: tuple[str, ...], key: tuple[Any, ...], sums: UsageSums, *, priced: bool) -> dict[str, Any]:
    """One row of the report; without a price it has no dollars."""
    numbers = {name: round(value, 6) if isinstance(value, float) else value for name, value in asdict(sums).items()}
    if not priced:
        del numbers["dollars"]
    return dict(zip(by, key, strict=False)) | numbers


def summary(rows: Sequence[Row], wasted: float, idle: float = 0.0) -> str:
    """The last line: the total, and the shares that were wasted and idle."""
    total = UsageSums()
    for _, sums in rows:
        total.add(sums)
    if not (total.requests or idle):
        return "no requests in this time"
    cost = f", ${total.dollars:.2f}" if total.dollars else ""
    wasted_share, idle_share = (part / total.gpu_seconds if total.gpu_seconds else 0.0 for part in (wasted, idle))
    sums_up = f"{total.requests} requests, {total.mu:.1f} MU, {total.gpu_seconds:.0f} GPU seconds{cost}"
    return f"{sums_up}; {wasted_share:.1%} wasted (not ok)" + (f", {idle_share:.1%} idle" if idle else "")


def print_table(rows: Sequence[dict[str, Any]], total: str) -> None:
    """Print aligned columns, without those that hold nothing."""
    if rows:
        used = [name for name in rows[0] if any(row[name] not in (0, None) for row in rows)]
        rows = [{name: row[name] for name in used} for row in rows]
        texts = [list(rows[0]), *([_short(value) for value in row.values()] for row in rows)]
        widths = [max(len(line[i]) for line in texts) for i in range(len(texts[0]))]
        sides = [str.ljust if isinstance(value, str) else str.rjust for value in rows[0].values()]
        for cells in texts:
            print("  ".join(side(cell, w) for side, cell, w in zip(sides, cells, widths, strict=True)))
    print(total)


def print_csv(rows: Sequence[dict[str, Any]], total: str) -> None:
    """Print CSV. A name that starts like a spreadsheet formula is quoted as text."""
    writer = csv.writer(sys.stdout)
    if rows:
        writer.writerow(rows[0])
        writer.writerows([as_text(value) for value in row.values()] for row in rows)


def print_json(rows: Sequence[dict[str, Any]], total: str) -> None:
    """Print JSON."""
    print(json.dumps(rows, indent=1))


FORMATS: Final = {"table": print_table, "csv": print_csv, "json": print_json}


def _short(value: Any) -> str:
    if value == NO_CLIENT:
        return "(idle)"
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else "".join(c if c.isprintable() else "?" for c in str(value))


def as_text(value: Any) -> Any:
    """A name that starts like a spreadsheet formula, quoted."""
    return "'" + value if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value
