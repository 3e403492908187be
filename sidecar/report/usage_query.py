"""Sums of usage records over a range of time, by names and by days or hours of a time zone.

Rules:
- A range includes its start and excludes its end, and adjacent ranges add up: a row that an end of the range cuts, or
  the end of a day, is divided by time, each of its counts to whole numbers.
- Days and hours of every time zone consist of quarters of an hour, so only rows of an hour can be cut by one.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import Any, Final

from sidecar.report.usage_rows import HOUR_S, NAMES, QUARTER_S, Rate, UsageKey, UsageSums, cut
from sidecar.report.usage_store import V1_ROWS, connect_to_read

_NAMED: Final = ("tenant", "model", "outcome", "source", "fingerprint", "gpus", "dollars_per_gpu_hour")
_TIMES: Final[Mapping[str, Callable[[datetime], str]]] = {
    "day": lambda at: at.strftime("%Y-%m-%d"),
    "hour": lambda at: at.strftime("%Y-%m-%dT%H:00") + _offset(at),
}
GROUPS: Final = (*_NAMED, *_TIMES)  # the values of `sidecar usage --by`

Row = tuple[tuple[Any, ...], UsageSums]
EMPTY_ROW: Final = UsageKey(0, HOUR_S, "", "", "", "", Rate()), UsageSums()

_COLUMNS = ", ".join(NAMES)
_SUMMED = ", ".join(f"sum({name})" for name in NAMES)
_RATES = ", fingerprint, gpus, dollars_per_gpu_hour"
_ROWS: Final[Mapping[int, str]] = {
    1: f"(SELECT *, '' AS fingerprint, 1 AS gpus, 0.0 AS dollars_per_gpu_hour FROM ({V1_ROWS}))",
    2: f"(SELECT at, span, tenant, model, outcome, source, {_COLUMNS}{_RATES} FROM usage JOIN rate ON rate = rate.id)",
}


def read(path: Path, since: float, until: float, by: tuple[str, ...], zone: tzinfo = UTC) -> list[Row]:
    """Sums of [since, until), seconds since 1970, grouped by some of GROUPS: times in order, then largest first.

    Raises OSError or sqlite3.Error.
    """
    first, last = int(since), int(until)
    groups: dict[tuple[Any, ...], UsageSums] = {}
    with _opened(path) as (db, rows):
        db.create_function("local_time", 2, lambda at, name: _time(at, name, zone), deterministic=True)
        times = [name for name in by if name in _TIMES]
        # A row of an hour may be part of two hours, or days, of a zone.
        divided = (
            " OR ".join(f"local_time(at, '{name}') != local_time(at + span - 1, '{name}')" for name in times) or "false"
        )
        whole = f"at >= ? AND at + span <= ? AND NOT (span > {QUARTER_S} AND ({divided}))"
        columns = ", ".join(f"local_time(at, '{name}')" if name in times else name for name in by) or "'all'"
        width = max(len(by), 1)
        numbers = ", ".join(str(n + 1) for n in range(width))
        query = f"SELECT {columns}, {_SUMMED} FROM {rows} WHERE {whole} GROUP BY {numbers}"
        for row in db.execute(query, (first, last)):
            groups[row[:width]] = UsageSums(*row[width:])
        named = ", ".join(f"'{name}'" if name in times else name for name in by) or "'all'"
        query = f"SELECT at, span, {named}, {_COLUMNS} FROM {rows} WHERE at < ? AND at + span > ? AND NOT ({whole})"
        for at, span, *rest in db.execute(query, (last, first, first, last)):
            for start, end in _pieces(max(at, first), min(at + span, last), cut_quarters=bool(times)):
                names = zip(by or ("all",), rest[:width], strict=True)
                key = tuple(_time(start, name, zone) if name in times else value for name, value in names)
                groups.setdefault(key, UsageSums()).add(cut(UsageSums(*rest[width:]), at, span, start, end))
    timed = [n for n, name in enumerate(by) if name in _TIMES]
    return sorted(groups.items(), key=lambda row: ([row[0][n] for n in timed], -row[1].mu))


@dataclass(frozen=True, slots=True)
class Provenance:
    """Whose rows a file holds, by random numbers, and until when it counted GPU time; both unknown in old files."""

    origins: frozenset[str]
    until: float


def provenance(path: Path) -> Provenance:
    """Raises OSError or sqlite3.Error."""
    with _opened(path) as (db, _):
        try:
            origins = frozenset(id for (id,) in db.execute("SELECT id FROM origin"))
            row = db.execute("SELECT until FROM counted").fetchone()
        except sqlite3.OperationalError:  # a file of version 1
            return Provenance(frozenset(), 0.0)
        return Provenance(origins, float(row[0]) if row else 0.0)


def all_rows(path: Path) -> Iterator[tuple[UsageKey, UsageSums]]:
    """Every row. Raises OSError or sqlite3.Error."""
    with _opened(path) as (db, rows):
        yield from map(_key_and_sums, db.execute(f"SELECT at, span, {', '.join(_NAMED)}, {_COLUMNS} FROM {rows}"))


def hours(path: Path, since: int, until: int) -> list[tuple[UsageKey, UsageSums]]:
    """The rows of [since, until), summed up to hours from `since`, which begins a quarter of an hour.

    A row of an hour that is part of two of these is divided by time; one of a day stays one, cut by the range. Raises
    OSError or sqlite3.Error.
    """
    names, first = ", ".join(_NAMED), since % HOUR_S
    hour = f"(at - {first}) / {HOUR_S} * {HOUR_S} + {first}, {HOUR_S}, {names}"
    longest = QUARTER_S if first else HOUR_S  # that no end of an hour cuts
    found: dict[UsageKey, UsageSums] = {}
    with _opened(path) as (db, rows):
        query = (
            f"SELECT {hour}, {_SUMMED} FROM {rows} WHERE at >= ? AND at < ? AND span <= {longest} GROUP BY 1, {names}"
        )
        found.update(map(_key_and_sums, db.execute(query, (since, until))))
        query = f"SELECT at, span, {names}, {_COLUMNS} FROM {rows} WHERE at < ? AND at + span > ? AND span > {longest}"
        for key, sums in map(_key_and_sums, db.execute(query, (until, since))):
            start, end = max(key.at, since), min(key.at + key.span, until)
            pieces = [(start, end, key._replace(at=start, span=end - start))]
            if key.span <= HOUR_S:
                pieces = [
                    (a, b, key._replace(at=since + (a - since) // HOUR_S * HOUR_S)) for a, b in _pieces(start, end)
                ]
            for a, b, new in pieces:
                found.setdefault(new, UsageSums()).add(cut(sums, key.at, key.span, a, b))
    return list(found.items())


def first_hour(path: Path, otherwise: int) -> int:
    """The full hour of UTC in which the oldest row begins. Raises OSError or sqlite3.Error."""
    with _opened(path) as (db, rows):
        (first,) = db.execute(f"SELECT min(at) FROM {rows}").fetchone()
    return otherwise if first is None else int(first) // HOUR_S * HOUR_S


def _key_and_sums(row: tuple[Any, ...]) -> tuple[UsageKey, UsageSums]:
    at, span, tenant, model, outcome, source, fingerprint, gpus, price, *sums = row
    return UsageKey(at, span, tenant, model, outcome, source, Rate(fingerprint, gpus, price)), UsageSums(*sums)


def _pieces(start: int, end: int, *, cut_quarters: bool = True) -> Iterator[tuple[int, int]]:
    """A span of seconds, cut at each quarter of an hour if that is asked for."""
    while start < end:
        following = min(end, (start // QUARTER_S + 1) * QUARTER_S) if cut_quarters else end
        yield start, following
        start = following


def _time(at: int, name: str, zone: tzinfo) -> str:
    return _TIMES[name](datetime.fromtimestamp(at, zone))


def _offset(at: datetime) -> str:
    text = at.strftime("%z")
    return "Z" if text == "+0000" else f"{text[:3]}:{text[3:5]}"


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[sqlite3.Connection, str]]:
    """The file, and the SQL of its rows."""
    if not path.is_file():
        raise FileNotFoundError(path)
    with contextlib.closing(connect_to_read(path, timeout=5)) as db:
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version not in _ROWS:
            raise sqlite3.OperationalError(f"they are of another version ({version})")
        db.execute("BEGIN")  # all queries see one state of the file
        yield db, _ROWS[version]
