"""Show usage: requests, model units, tokens and dollars per tenant, model and outcome.

    sidecar usage --since 24h --by tenant,outcome --dollars-per-gpu-hour 2.50

The records are read from a sidecar's state directory, while it may be running. Requests that were not `ok` count as
wasted: the GPU worked on them, and no one got the response.
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
from pathlib import Path
from typing import Any, Final

from sidecar.errors import SidecarError
from sidecar.flags import directory, flag, number, one_of, parser
from sidecar.report.usage_query import GROUPS, read
from sidecar.report.usage_rows import UsageSums
from sidecar.report.usage_store import USAGE_FILE

SECONDS_PER_UNIT: Final = {"m": 60, "h": 3600, "d": 86_400}

Row = tuple[tuple[Any, ...], UsageSums]


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
    since: str = flag("24h", span, "How far to look back")
    by: str = flag("tenant,model", groups, "What to sum by")
    format: str = flag("table", one_of("table", "csv", "json"), "Form of the answer")
    dollars_per_gpu_hour: float = flag(0.0, number(0, 10_000, "dollars"), "Price of a GPU hour")


class NoUsageRecords(SidecarError):
    """There are no usage records to read."""

    code = "no_records"


def main(settings: UsageSettings) -> int:
    """Print the report. Returns 0. Raises NoUsageRecords."""
    path, until = Path(settings.state_dir) / USAGE_FILE, time.time() + 60
    since, by = until - 60 - parse_span(settings.since), tuple(filter(None, settings.by.split(",")))
    try:
        found, outcomes = (read(path, since, until, names) for names in (by, ("outcome",)))
    except FileNotFoundError:
        why = f"no usage records in {settings.state_dir}; name the state directory of a sidecar"
        raise NoUsageRecords(f"--state-dir: {why}") from None
    except (OSError, sqlite3.Error) as e:
        raise NoUsageRecords(f"--state-dir: the usage records {path} cannot be read: {e}") from None
    wasted = sum(sums.gpu_seconds for (outcome,), sums in outcomes if outcome != "ok")
    rows = [line(by, key, sums, settings.dollars_per_gpu_hour) for key, sums in found]
    FORMATS[settings.format](rows, summary(found, wasted, settings.dollars_per_gpu_hour))
    return 0


def line(by: tuple[str, ...], key: tuple[Any, ...], sums: UsageSums, price: float) -> dict[str, Any]:
    """One row of the report."""
    numbers = {name: round(value, 6) if isinstance(value, float) else value for name, value in asdict(sums).items()}
    dollars = {"dollars": round(sums.gpu_seconds / 3600 * price, 6)} if price else {}
    return dict(zip(by, key, strict=False)) | numbers | dollars


def summary(rows: Sequence[Row], wasted: float, price: float) -> str:
    """The last line: the total and its wasted share."""
    requests, mu, seconds = (sum(getattr(s, name) for _, s in rows) for name in ("requests", "mu", "gpu_seconds"))
    if not requests:
        return "no requests in this time"
    cost = f", ${seconds / 3600 * price:.2f}" if price else ""
    share = wasted / seconds if seconds else 0.0
    return f"{requests} requests, {mu:.1f} MU, {seconds:.0f} GPU seconds{cost}; {share:.1%} wasted (not ok)"


def as_table(rows: Sequence[dict[str, Any]], total: str) -> None:
    """Print aligned columns."""
    if rows:
        texts = [list(rows[0]), *([_short(value) for value in row.values()] for row in rows)]
        widths = [max(len(line[i]) for line in texts) for i in range(len(texts[0]))]
        sides = [str.ljust if isinstance(value, str) else str.rjust for value in rows[0].values()]
        for cells in texts:
            print("  ".join(side(cell, w) for side, cell, w in zip(sides, cells, widths, strict=True)))
    print(total)


def as_csv(rows: Sequence[dict[str, Any]], total: str) -> None:
    """Print CSV. A name that starts like a spreadsheet formula is quoted as text."""
    writer = csv.writer(sys.stdout)
    if rows:
        writer.writerow(rows[0])
        writer.writerows([_text(value) for value in row.values()] for row in rows)


def as_json(rows: Sequence[dict[str, Any]], total: str) -> None:
    """Print JSON."""
    print(json.dumps(rows, indent=1))


FORMATS: Final = {"table": as_table, "csv": as_csv, "json": as_json}


def _short(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else "".join(c if c.isprintable() else "?" for c in str(value))


def _text(value: Any) -> Any:
    return "'" + value if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value
