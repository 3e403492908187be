"""Usage on disk: sums per minute, tenant, model and outcome, in an SQLite file of the state directory.

    add (each settlement, in memory) -> take, about once a second -> write, one transaction -> rows

Rules:
- A batch is written whole or not at all, and kept in memory until then. kill -9 loses at most the unwritten batch.
- Nothing is counted twice. Recent request ids are written in the same transaction, because relays replay settlements
  that the previous control process may not have recorded.
- Minutes older than a day are summed up to hours. Rows beyond the bounds of age or size are dropped, oldest first,
  pending ones too.
- No content, and no names except labels.
- `write` does disk I/O: call it off the event loop, one at a time.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from sidecar.load.ledger import Settlement
from sidecar.runtime import safe_files

USAGE_FILE: Final = "usage.db"
SQLITE_SUFFIXES: Final = ("", "-wal", "-shm", "-journal")  # of a database and what belongs to it
SCHEMA_VERSION: Final = 1
MINUTE_S, HOUR_S, DAY_S = 60, 3600, 86_400
TIDY_INTERVAL_S: Final = HOUR_S
SEEN_IDS_S: Final = 120  # relays replay settlements that are about a second old
MAX_PENDING_ROWS: Final = 20_000  # about 6 MB

# The values of `sidecar usage --by`, and their SQL.
GROUP_COLUMNS: Final[Mapping[str, str]] = {
    **{name: name for name in ("tenant", "model", "outcome")},
    "day": "strftime('%Y-%m-%d', at, 'unixepoch')",
    "hour": "strftime('%Y-%m-%dT%H:00Z', at, 'unixepoch')",
}

_log = logging.getLogger(__name__)

Key = tuple[int, str, str, str]  # start of the minute (seconds since 1970), tenant, model, outcome


@dataclass(slots=True)
class UsageSums:
    """Sums of usage. `gpu_seconds` is by the cost model; `seconds` is the time from admission to settlement."""

    requests: int = 0
    mu: float = 0.0
    gpu_seconds: float = 0.0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    images: int = 0
    seconds: float = 0.0

    def add(self, other: UsageSums) -> None:
        for name in NAMES:
            setattr(self, name, getattr(self, name) + getattr(other, name))


NAMES: Final = tuple(f.name for f in fields(UsageSums))
_COLUMNS = ", ".join(NAMES)
_ADDED = ", ".join(f"{name} = {name} + excluded.{name}" for name in NAMES)
_SUMMED = ", ".join(f"sum({name})" for name in NAMES)
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS usage (
    at INTEGER NOT NULL, tenant TEXT NOT NULL, model TEXT NOT NULL, outcome TEXT NOT NULL, {_COLUMNS},
    PRIMARY KEY (at, tenant, model, outcome)) WITHOUT ROWID"""
_SEEN = "CREATE TABLE IF NOT EXISTS seen (id TEXT PRIMARY KEY, at INTEGER NOT NULL) WITHOUT ROWID"
_UPSERT = f"""
INSERT INTO usage (at, tenant, model, outcome, {_COLUMNS}) VALUES (?, ?, ?, ?, {", ".join("?" * len(NAMES))})
ON CONFLICT (at, tenant, model, outcome) DO UPDATE SET {_ADDED}"""


@dataclass(slots=True)
class PendingUsage:
    """Settlements that are not on disk yet: their sums, and their request ids with the times of settlement."""

    sums: dict[Key, UsageSums] = field(default_factory=dict)
    ids: dict[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.ids)

    def add(self, other: PendingUsage) -> None:
        for key, sums in other.sums.items():
            self.sums.setdefault(key, UsageSums()).add(sums)
        self.ids |= other.ids


class UsageStore:
    """The file of one sidecar. `unit_ms`: GPU milliseconds of one MU; `days` and `max_bytes` bound the file."""

    def __init__(self, folder: Path, unit_ms: float, days: int, max_bytes: int) -> None:
        self.path = folder / USAGE_FILE
        self._unit_ms, self._days, self._max_bytes = unit_ms, days, max_bytes
        self._pending, self._tidied = PendingUsage(), 0.0
        self._seen = _seen(self.path)  # by the previous process

    def add(self, settlement: Settlement, wall: float) -> None:
        """Count a settlement at `wall` (seconds since 1970), unless it is on disk already."""
        if settlement.admitted.id in self._seen:
            return
        key = int(wall) // MINUTE_S * MINUTE_S, settlement.tenant, settlement.model, settlement.settled.outcome
        work, mu, seconds = settlement.work, settlement.mu, settlement.settled.at - settlement.admitted.at
        tokens = work.uncached + work.cached, work.cached, settlement.delivered
        sums = UsageSums(1, mu, mu * self._unit_ms / 1000, *tokens, work.images, seconds)
        self._pending.add(PendingUsage({key: sums}, {settlement.admitted.id: int(wall)}))

    def take(self) -> PendingUsage:
        """Remove and return the pending batch. Pass it to `write`, or back to `restore`."""
        taken, self._pending = self._pending, PendingUsage()
        return taken

    def restore(self, taken: PendingUsage) -> None:
        """Make a batch pending again after a failed write, bounded, as a disk may stay full."""
        taken.add(self._pending)
        newest = max(taken.ids.values(), default=0)
        ids = {id: at for id, at in taken.ids.items() if at >= newest - SEEN_IDS_S}
        self._pending = PendingUsage(_bound_rows(taken.sums), ids)

    def write(self, taken: PendingUsage, wall: float) -> None:
        """Add a batch to the file, and tidy it now and then. If this raises, nothing was written."""
        try:
            self._write(taken, wall)
        except sqlite3.DatabaseError as error:
            if type(error) is not sqlite3.DatabaseError:  # subclasses are full or locked disks, and bugs
                raise
            self._put_aside()
            self._write(taken, wall)

    def _write(self, taken: PendingUsage, wall: float) -> None:
        with _opened(self.path) as db:
            with db:
                db.execute("BEGIN IMMEDIATE")
                db.executemany(_UPSERT, [(*key, *astuple(sums)) for key, sums in taken.sums.items()])
                db.executemany("INSERT OR REPLACE INTO seen VALUES (?, ?)", taken.ids.items())
                db.execute("DELETE FROM seen WHERE at < ?", (int(wall) - SEEN_IDS_S,))
            # Also when full, but at most once a minute: clients can create tenants quickly.
            since = wall - self._tidied
            if since >= TIDY_INTERVAL_S or (since >= MINUTE_S and _used_bytes(db) > self._max_bytes):
                self._tidied = wall
                try:
                    tidy(db, wall, self._days, self._max_bytes)
                except sqlite3.OperationalError as error:  # not raised, or the batch would be written again
                    _log.warning("cannot tidy usage records, retrying later: %s", error)

    def _put_aside(self) -> None:
        _log.error("usage records are damaged, renaming the file to %s.damaged", self.path.name)
        for suffix in SQLITE_SUFFIXES[1:]:
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
        self.path.replace(self.path.with_name(self.path.name + ".damaged"))


def _bound_rows(sums: dict[Key, UsageSums]) -> dict[Key, UsageSums]:
    """At most MAX_PENDING_ROWS sums: if there are more, sum up to hours, then keep the newest."""
    if len(sums) <= MAX_PENDING_ROWS:
        return sums
    hours = PendingUsage()
    for (at, tenant, model, outcome), one in sums.items():
        hours.add(PendingUsage({(at // HOUR_S * HOUR_S, tenant, model, outcome): one}))
    return dict(sorted(hours.sums.items(), key=lambda row: row[0])[-MAX_PENDING_ROWS:])


def tidy(db: sqlite3.Connection, wall: float, days: int, max_bytes: int) -> None:
    """Sum old minutes up to hours, drop rows that are too old, and the oldest tenth while the file is too large."""
    aged = int(wall - DAY_S) // HOUR_S * HOUR_S
    with db:
        db.execute("BEGIN IMMEDIATE")
        db.execute("DELETE FROM usage WHERE at < ?", (int(wall) - days * DAY_S,))
        hours = f"SELECT at / {HOUR_S} * {HOUR_S}, tenant, model, outcome, {_SUMMED} FROM usage"
        old = db.execute(f"{hours} WHERE at < ? GROUP BY 1, 2, 3, 4", (aged,)).fetchall()
        db.execute("DELETE FROM usage WHERE at < ?", (aged,))
        db.executemany(_UPSERT, old)
    while _used_bytes(db) > max_bytes and (count := db.execute("SELECT count(*) FROM usage").fetchone()[0]) > 1:
        with db:
            db.execute("BEGIN IMMEDIATE")
            row = db.execute("SELECT at FROM usage ORDER BY at LIMIT 1 OFFSET ?", (count // 10,)).fetchone()
            db.execute("DELETE FROM usage WHERE at <= ?", row)
    db.execute("PRAGMA incremental_vacuum")


def read(path: Path, since: float, until: float, by: tuple[str, ...]) -> list[tuple[tuple[Any, ...], UsageSums]]:
    """Sums of [since, until), grouped by keys of GROUP_COLUMNS, largest first. Raises OSError or sqlite3.Error."""
    if not path.is_file():
        raise FileNotFoundError(path)
    width = max(len(by), 1)
    groups = ", ".join(GROUP_COLUMNS[name] for name in by) or "'all'"
    numbers = ", ".join(str(i + 1) for i in range(width))
    order = ", ".join([*(str(i + 1) for i, name in enumerate(by) if name in ("day", "hour")), "sum(mu) DESC"])
    query = f"SELECT {groups}, {_SUMMED} FROM usage WHERE at >= ? AND at < ? GROUP BY {numbers} ORDER BY {order}"
    with contextlib.closing(_connect_to_read(path, timeout=5)) as db:
        found = db.execute(query, (int(since), int(until))).fetchall()
    return [(row[:width], UsageSums(*row[width:])) for row in found]


def _connect_to_read(path: Path, timeout: float) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=timeout)


def _seen(path: Path) -> frozenset[str]:
    """Ids that an earlier process wrote; none if there is no readable file."""
    if not path.is_file():
        return frozenset()
    try:
        with contextlib.closing(_connect_to_read(path, timeout=1)) as db:
            return frozenset(id for (id,) in db.execute("SELECT id FROM seen"))
    except sqlite3.Error:
        return frozenset()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    for suffix in SQLITE_SUFFIXES:
        safe_files.require_no_link(path.with_name(path.name + suffix))
    with contextlib.closing(sqlite3.connect(path, timeout=5, isolation_level=None)) as db:
        for setting in ("auto_vacuum = INCREMENTAL", "journal_mode = WAL", "synchronous = NORMAL"):
            db.execute(f"PRAGMA {setting}")
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, SCHEMA_VERSION):
            raise sqlite3.DatabaseError(f"usage records of unknown version {version}")
        for statement in (_SCHEMA, _SEEN, f"PRAGMA user_version = {SCHEMA_VERSION}"):
            db.execute(statement)
        yield db


def _used_bytes(db: sqlite3.Connection) -> int:
    names = "page_count", "freelist_count", "page_size"
    pages, free, size = (int(db.execute(f"PRAGMA {name}").fetchone()[0]) for name in names)
    return (pages - free) * size
