"""Usage records in PostgreSQL, for bills that outlive the pod: the rows of exports, in the table `sidecar_usage`.

    hours of usage.db (usage_query.py) -> export rows (usage_export.py) -> upsert by id, one transaction with the mark

Rules:
- usage.db stays the store. What the database cannot take waits there, within the bounds of the file; after an outage
  everything since the mark is written.
- A row is written as its sum so far, not as an addition, so writing it twice changes nothing. The mark of a file, in
  `sidecar_usage_mark`, is the time before which its hours are final and written.
- The hours since the mark are written each minute, so a pod that is lost with its volume loses a minute at most.
- Rows that usage.db had to drop stay in the database: the requests of a row never become fewer.
- A row of a day, of a file that was too full, replaces the hours of this day that were written before.
- `write` blocks: call it in a thread. Connections, locks and statements have timeouts. One connection for each write:
  a thousand pods that keep one would use up the server's.
- The URL has a password, and is never logged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sidecar.report import usage_query
from sidecar.report.usage_export import Exporter, ExportRow, exporter_of, final_until, record
from sidecar.report.usage_rows import DAY_S, HOUR_S

if TYPE_CHECKING:
    import psycopg

CHUNK_S: Final = DAY_S  # of one transaction, after an outage: whole days, which rows of a day are
STATEMENT_TIMEOUT_S: Final = 30
CONNECT_TIMEOUT_S: Final = 5
LOCK_ID: Final = 0x73696465  # of the transaction that makes the tables

_TYPES: Final = {str: "text", int: "bigint", float: "double precision"}
_TIMES: Final = ("start", "end")
_IDENTITY: Final = ("id", "origin", "pod", *_TIMES)


@dataclass(frozen=True, slots=True)
class DatabaseWrite:
    """What one write has done: rows, and until when the hours are final and written (seconds since 1970)."""

    rows: int
    until: int


class UsageDatabase:
    """The database that --usage-url names, for the records of one file."""

    def __init__(self, url: str, pod: str) -> None:
        self._url, self._pod = url, pod

    def write(self, path: Path, now: float, timeout: int = STATEMENT_TIMEOUT_S) -> DatabaseWrite:
        """Write the hours of usage.db since the mark. Raises OSError, sqlite3.Error, psycopg.Error."""
        by = exporter_of(usage_query.provenance(path), self._pod)
        rows, end = 0, int(now) // HOUR_S * HOUR_S + HOUR_S
        with _connected(self._url, timeout) as db:
            _require_tables(db, timeout)
            while True:
                with _transaction(db, timeout):
                    # One writer of a file at a time, which reads the file after the one before has written.
                    db.execute("SELECT pg_advisory_xact_lock(hashtext(%s))", (by.origin,))
                    start = self._mark(db, by, path, end)
                    until = min(end, start // CHUNK_S * CHUNK_S + CHUNK_S)
                    rows += _upsert(db, path, start, until, by)
                    mark = max(start, min(until, final_until(now)))
                    db.execute(_SET_MARK, (by.origin, by.pod, _time(mark)))
                if until >= end:
                    return DatabaseWrite(rows, mark)

    def check(self, timeout: int = CONNECT_TIMEOUT_S) -> None:
        """Connect, and make the tables unless they exist. Raises psycopg.Error."""
        with _connected(self._url, timeout) as db:
            _require_tables(db, timeout)

    def explain(self, error: Exception) -> str:
        """An error as a line for the log, without the password."""
        import psycopg
        from psycopg import conninfo

        try:
            password = conninfo.conninfo_to_dict(self._url).get("password")
        except psycopg.ProgrammingError:  # its text quotes the URL
            return "libpq cannot read the URL"
        text = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        return text.replace(str(password), "***") if password else text

    def _mark(self, db: psycopg.Connection[Any], by: Exporter, path: Path, end: int) -> int:
        found = db.execute("SELECT until FROM sidecar_usage_mark WHERE origin = %s", (by.origin,)).fetchone()
        if found is not None:
            return int(found[0].timestamp())
        return usage_query.first_hour(path, end)


def _sql_columns() -> dict[str, str]:
    row = record(*usage_query.EMPTY_ROW, Exporter("", ""))
    types = {
        name: "timestamptz" if name in _TIMES else _TYPES[type(value)]
        for name, value in row.items()
        if value is not None
    }
    return {name: types.get(name, "double precision") for name in row}  # joules can be unknown


_COLUMNS: Final = _sql_columns()
_NAMES: Final = ", ".join(f'"{name}"' for name in _COLUMNS)
_TABLES: Final = (
    f"""CREATE TABLE IF NOT EXISTS sidecar_usage ({
        ", ".join(
            f'"{name}" {kind}{" PRIMARY KEY" if name == "id" else "" if name == "joules" else " NOT NULL"}'
            for name, kind in _COLUMNS.items()
        )
    })""",
    'CREATE INDEX IF NOT EXISTS sidecar_usage_by_start ON sidecar_usage ("start", tenant)',
    """CREATE TABLE IF NOT EXISTS sidecar_usage_mark (origin text PRIMARY KEY, pod text NOT NULL,
    until timestamptz NOT NULL)""",
)
_UPSERT: Final = f"""INSERT INTO sidecar_usage ({_NAMES}) VALUES ({", ".join(f"%({name})s" for name in _COLUMNS)})
    ON CONFLICT (id) DO UPDATE SET {", ".join(f'"{n}" = excluded."{n}"' for n in _COLUMNS if n not in _IDENTITY)}
    WHERE excluded.requests >= sidecar_usage.requests"""
_REPLACE: Final = """DELETE FROM sidecar_usage
    WHERE origin = %(origin)s AND "start" >= %(start)s AND "end" <= %(end)s AND "end" - "start" <= interval '1 hour'"""
_SET_MARK: Final = """INSERT INTO sidecar_usage_mark VALUES (%s, %s, %s)
    ON CONFLICT (origin) DO UPDATE SET until = greatest(sidecar_usage_mark.until, excluded.until), pod = excluded.pod"""


def _upsert(db: psycopg.Connection[Any], path: Path, start: int, until: int, by: Exporter) -> int:
    found = usage_query.hours(path, start, until)
    if start % DAY_S and any(key.span > HOUR_S for key, _ in found):
        found = usage_query.hours(path, start // DAY_S * DAY_S, until)
    rows: list[ExportRow] = [record(key, sums, by) for key, sums in found]
    days = {(row["start"], row["end"]): row for (key, _), row in zip(found, rows, strict=True) if key.span > HOUR_S}
    with db.cursor() as cursor:
        if days:
            cursor.executemany(_REPLACE, list(days.values()))
        if rows:
            cursor.executemany(_UPSERT, rows)
    return len(rows)


@contextlib.contextmanager
def _connected(url: str, timeout: int) -> Iterator[psycopg.Connection[Any]]:
    """A connection that ends within bounds wherever the server or the network hangs."""
    import psycopg

    bounds = {
        "connect_timeout": min(timeout, CONNECT_TIMEOUT_S),
        "tcp_user_timeout": timeout * 1000,
        "keepalives_idle": timeout,
        "keepalives_interval": 1,
        "keepalives_count": 3,
    }
    # No prepared statements: poolers such as PgBouncer may give each transaction to another server process.
    with psycopg.connect(
        url, autocommit=True, prepare_threshold=None, application_name="inference-sidecar", **bounds
    ) as db:
        yield db


@contextlib.contextmanager
def _transaction(db: psycopg.Connection[Any], timeout: int) -> Iterator[None]:
    with db.transaction():
        db.execute(f"SET LOCAL statement_timeout = {timeout * 1000}")  # of each statement, waits for locks included
        yield


def _require_tables(db: psycopg.Connection[Any], timeout: int) -> None:
    """Make the tables unless they exist: then no privilege to make any is needed."""
    query = "SELECT to_regclass('sidecar_usage') IS NOT NULL AND to_regclass('sidecar_usage_mark') IS NOT NULL"
    with _transaction(db, timeout):
        row = db.execute(query).fetchone()
        if row is not None and row[0]:
            return
        db.execute("SELECT pg_advisory_xact_lock(%s)", (LOCK_ID,))  # many pods start at once
        for statement in _TABLES:
            db.execute(statement)


def _time(at: int) -> datetime:
    return datetime.fromtimestamp(at, UTC)
