"""Usage on disk: sums per minute, tenant, model, outcome, source and rate, in an SQLite file of the state directory.

    add (each settlement, in memory) -> take, about once a second -> write, one transaction -> rows (usage_query.py)

Rules:
- A batch is written whole or not at all, and kept in memory until then. kill -9 loses at most the unwritten batch.
- Nothing is counted twice. Recent request ids are written in the same transaction, because relays replay settlements
  that the previous control process may not have recorded.
- Minutes are summed up to quarters of an hour, of which the days of every time zone consist, after MINUTES_KEPT_S; rows
  that cost nothing, to hours after one. A file that is too large is summed up sooner. If still too large, it loses
  rows: those that cost nothing first, then the oldest. Pending rows are bounded likewise.
- Every row that is dropped is reported (Eviction).
- GPU time is counted as idle as it passes, also while the sidecar is restarted, and each request subtracts what it used
  from the idle time of its minute. So all rows together are the GPU time that passed. Idle time is negative where
  requests end that were longer than their minute, and in sum only if the coefficients are too high.
- What happened more than LATE_S ago is final: what could not be written until then counts when it is written.
- A file has an origin, a random number, by which copies of it are recognised (tools/usage_merge.py).
- No content, and no names except labels.
- `write` does disk I/O: call it off the event loop, one at a time.
"""

from __future__ import annotations

import contextlib
import logging
import math
import secrets
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Final

from sidecar.load.gpu_price import GpuPrice
from sidecar.report.usage_rows import (
    COUNTED,
    DAY_S,
    HOUR_S,
    MINUTE_S,
    NAMES,
    QUARTER_S,
    UNKNOWN,
    Eviction,
    PendingUsage,
    Rate,
    UsageKey,
    UsageSums,
    bound,
    idle_time,
    merge_evictions,
)
from sidecar.runtime import safe_files

USAGE_FILE: Final = "usage.db"
SQLITE_SUFFIXES: Final = ("", "-wal", "-shm", "-journal")  # of a database and what belongs to it
SCHEMA_VERSION: Final = 2
TIDY_INTERVAL_S: Final = HOUR_S
SEEN_IDS_S: Final = 120  # relays replay settlements that are about a second old
MAX_PENDING_ROWS: Final = 20_000  # about 6 MB
MAX_PENDING_IDS: Final = 100_000  # about 12 MB; or as many as end in SEEN_IDS_S
LATE_S: Final = HOUR_S
MAX_GAP_S: Final = HOUR_S  # between two processes of the sidecar, in which the GPUs were this pod's
MINUTES_KEPT_S: Final = 8 * DAY_S  # a week and a day: `--since 7d` is exact to the minute
# (age from which rows are summed up, to spans of), one after the other while the file is too large.
COARSER: Final = (
    *((DAY_S, QUARTER_S), (DAY_S, HOUR_S), (HOUR_S, QUARTER_S), (HOUR_S, HOUR_S)),
    (MINUTES_KEPT_S, DAY_S),
)
COSTS_NOTHING: Final = "mu = 0 AND gpu_seconds = 0"

_log = logging.getLogger(__name__)

_COLUMNS = ", ".join(NAMES)
_KEY = "at, span, tenant, model, outcome, source, rate"
_SCHEMA = (
    f"""CREATE TABLE IF NOT EXISTS usage (
    at INTEGER NOT NULL, span INTEGER NOT NULL, tenant TEXT NOT NULL, model TEXT NOT NULL, outcome TEXT NOT NULL,
    source TEXT NOT NULL, rate INTEGER NOT NULL, {_COLUMNS}, PRIMARY KEY ({_KEY})) WITHOUT ROWID""",
    """CREATE TABLE IF NOT EXISTS rate (id INTEGER PRIMARY KEY, fingerprint TEXT NOT NULL, gpus INTEGER NOT NULL,
    dollars_per_gpu_hour REAL NOT NULL, UNIQUE (fingerprint, gpus, dollars_per_gpu_hour))""",
    "CREATE TABLE IF NOT EXISTS origin (id TEXT PRIMARY KEY) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS counted (until REAL NOT NULL)",
    "CREATE TABLE IF NOT EXISTS seen (id TEXT PRIMARY KEY, at INTEGER NOT NULL) WITHOUT ROWID",
)
_ADDED = ", ".join(f"{name} = {name} + excluded.{name}" for name in COUNTED)
_ADDED += ", joules = coalesce(joules + excluded.joules, joules, excluded.joules)"
_ON_CONFLICT = f"ON CONFLICT ({_KEY}) DO UPDATE SET {_ADDED}"
_UPSERT = f"INSERT INTO usage ({_KEY}, {_COLUMNS}) VALUES ({', '.join('?' * (7 + len(NAMES)))}) {_ON_CONFLICT}"
_RATE_ID = "SELECT id FROM rate WHERE (fingerprint, gpus, dollars_per_gpu_hour) = (?, ?, ?)"

# The rows of version 1 as those of today. Its hours were in the same column as its minutes: a row is an hour if it
# starts one and is older than all rows that do not.
_V1_COLUMNS = ("requests", "mu", "gpu_seconds", "input_tokens", "cached_tokens", "output_tokens", "images", "seconds")
V1_ROWS: Final = f"""
SELECT at, CASE WHEN at % {HOUR_S} = 0 AND at < coalesce(
        (SELECT min(at) / {HOUR_S} * {HOUR_S} FROM usage WHERE at % {HOUR_S} != 0), at + 1)
    THEN {HOUR_S} ELSE {MINUTE_S} END AS span,
    tenant, model, outcome, '{UNKNOWN}' AS source,
    {", ".join(name if name in _V1_COLUMNS else f"0 AS {name}" for name in COUNTED)}, NULL AS joules FROM usage"""


class UsageStore:
    """The file of one sidecar, bounded by `days` and `max_bytes`."""

    def __init__(self, folder: Path, days: int, max_bytes: int) -> None:
        self.path = folder / USAGE_FILE
        self._days, self._max_bytes = days, max_bytes
        self._pending, self._tidied = PendingUsage(), 0.0
        self._seen, self._until = _left_by_former(self.path)
        self._elapsed_at: float | None = None

    def add(self, id: str, key: UsageKey, sums: UsageSums) -> bool:
        """Count the settlement of a request, unless it is on disk already. Returns True if it was counted."""
        if id in self._seen:
            return False
        self._pending.count(id, key, sums)
        return True

    def elapse(self, now: float, wall: float, price: GpuPrice, fingerprint: str) -> list[Eviction]:
        """Count the GPU time until now (monotonic seconds, and seconds since 1970). Call it about once a second.

        Returns what no longer has room in memory, as a write may hang for hours.
        """
        if self._elapsed_at is None:  # the previous process counted until then
            gap = wall - self._until
            seconds = gap if gap <= MAX_GAP_S else 0.0
        else:
            seconds = now - self._elapsed_at
        self._elapsed_at = now
        self._pending.add(idle_time(wall, max(0.0, seconds), price, fingerprint))
        return self._bound(MAX_PENDING_IDS)

    @property
    def is_due(self) -> bool:
        """Whether it is time to write: requests have ended, or a minute has passed without any."""
        return bool(self._pending.ids) or len(self._pending.sums) > 1

    def take(self) -> PendingUsage:
        """Remove and return the pending batch. Pass it to `write`, or back to `restore`."""
        taken, self._pending = self._pending, PendingUsage()
        return taken

    def restore(self, taken: PendingUsage) -> list[Eviction]:
        """Make a batch pending again after a failed write, bounded, as a disk may stay full."""
        taken.add(self._pending)
        self._pending = taken
        return self._bound()

    def _bound(self, most_ids: int = 0) -> list[Eviction]:
        """Bound what is pending; old ids are forgotten where there are more than `most_ids`."""
        pending = self._pending
        if len(pending.ids) > most_ids:
            newest = max(pending.ids.values())
            pending.ids = {id: at for id, at in pending.ids.items() if at >= newest - SEEN_IDS_S}
        pending.sums, evicted = bound(pending.sums, MAX_PENDING_ROWS)
        return evicted

    def write(self, taken: PendingUsage, wall: float) -> list[Eviction]:
        """Add a batch to the file, and tidy it now and then. If this raises, nothing was written."""
        try:
            return self._write(taken, wall)
        except sqlite3.DatabaseError as error:
            if type(error) is not sqlite3.DatabaseError:  # subclasses are full or locked disks, and bugs
                raise
            self._put_aside()
            return self._write(taken, wall)

    def _write(self, taken: PendingUsage, wall: float) -> list[Eviction]:
        with _opened(self.path) as db:
            with db:
                db.execute("BEGIN IMMEDIATE")
                rates = {rate: _rate_id(db, rate) for rate in {key.rate for key in taken.sums}}
                keys = {key: final_key(key, wall) for key in taken.sums}
                rows = [(*keys[key][:-1], rates[key.rate], *astuple(sums)) for key, sums in taken.sums.items()]
                db.executemany(_UPSERT, rows)
                if taken.until:
                    db.execute("DELETE FROM counted")
                    db.execute("INSERT INTO counted VALUES (?)", (taken.until,))
                db.executemany("INSERT OR REPLACE INTO seen VALUES (?, ?)", taken.ids.items())
                db.execute("DELETE FROM seen WHERE at < ?", (int(wall) - SEEN_IDS_S,))
            # Also when full, but at most once a minute: the labels of clients are bounded, but not few.
            since = wall - self._tidied
            if since >= TIDY_INTERVAL_S or (since >= MINUTE_S and _used_bytes(db) > self._max_bytes):
                self._tidied = wall
                try:
                    return tidy(db, wall, self._days, self._max_bytes)
                except sqlite3.OperationalError as error:  # not raised, or the batch would be written again
                    _log.warning("cannot tidy usage records, retrying later: %s", error)
        return []

    def _put_aside(self) -> None:
        _log.error("usage records are damaged, renaming the file to %s.damaged", self.path.name)
        for suffix in SQLITE_SUFFIXES[1:]:
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
        self.path.replace(self.path.with_name(self.path.name + ".damaged"))


def final_key(key: UsageKey, wall: float) -> UsageKey:
    """The row in which usage counts that is written at `wall`."""
    if key.at + key.span > wall - LATE_S:
        return key
    return key._replace(at=int(wall) // MINUTE_S * MINUTE_S, span=MINUTE_S)


def set_origins(path: Path, origins: Iterable[str]) -> None:
    """Record whose rows a file holds. Raises sqlite3.Error."""
    with _opened(path) as db, db:
        db.execute("BEGIN IMMEDIATE")
        db.execute("DELETE FROM origin")
        db.executemany("INSERT INTO origin VALUES (?)", [(origin,) for origin in origins])


def tidy(db: sqlite3.Connection, wall: float, days: int, max_bytes: int) -> list[Eviction]:
    """Drop rows that are too old, sum up old ones, and while the file is too large sum up and drop more."""
    now = int(wall)
    evicted = _drop(db, "age", "at < ?", (now - days * DAY_S,))
    _sum_up(db, now - HOUR_S, HOUR_S, COSTS_NOTHING)
    _sum_up(db, now - MINUTES_KEPT_S, QUARTER_S)
    for age, span in COARSER:
        if _used_bytes(db) > max_bytes:
            _sum_up(db, now - age, span)
    for where in (COSTS_NOTHING, "true"):
        while (
            _used_bytes(db) > max_bytes
            and (count := db.execute(f"SELECT count(*) FROM usage WHERE {where}").fetchone()[0]) > 1
        ):
            oldest = f"SELECT at FROM usage WHERE {where} ORDER BY at LIMIT 1 OFFSET {count // 10}"
            evicted += _drop(db, "size", f"{where} AND at <= ({oldest})")
    db.execute("DELETE FROM rate WHERE id NOT IN (SELECT rate FROM usage)")
    db.executescript("PRAGMA incremental_vacuum")  # `execute` would stop after the first page
    return merge_evictions(evicted)


def _drop(db: sqlite3.Connection, why: str, where: str, values: tuple[int, ...] = ()) -> list[Eviction]:
    """Delete rows. Returns what that lost: the rows that cost nothing, and the others."""
    lost = "count(*), total(requests), total(mu), total(gpu_seconds), min(at), max(at)"
    with db:
        db.execute("BEGIN IMMEDIATE")
        query = f"SELECT {lost} FROM usage WHERE {where} GROUP BY {COSTS_NOTHING}"
        found = [Eviction(why, rows, int(requests), *rest) for rows, requests, *rest in db.execute(query, values)]
        db.execute(f"DELETE FROM usage WHERE {where}", values)
    return found


def _sum_up(db: sqlite3.Connection, before: int, span: int, where: str = "true") -> None:
    """Sum up the shorter rows that ended before a time to rows of `span` seconds."""
    before = before // span * span
    finer = f"at < {before} AND span < {span} AND {where}"
    names = "tenant, model, outcome, source, rate"
    with db:
        db.execute("BEGIN IMMEDIATE")
        db.execute(
            f"CREATE TEMP TABLE coarse AS SELECT at / {span} * {span} AS at, {span} AS span, {names}, "
            f"{', '.join(f'sum({name}) AS {name}' for name in NAMES)} FROM usage WHERE {finer} GROUP BY 1, {names}"
        )
        db.execute(f"DELETE FROM usage WHERE {finer}")
        db.execute(f"INSERT INTO usage ({_KEY}, {_COLUMNS}) SELECT * FROM coarse WHERE true {_ON_CONFLICT}")
        db.execute("DROP TABLE coarse")


def _rate_id(db: sqlite3.Connection, rate: Rate) -> int:
    db.execute("INSERT OR IGNORE INTO rate (fingerprint, gpus, dollars_per_gpu_hour) VALUES (?, ?, ?)", rate)
    return int(db.execute(_RATE_ID, rate).fetchone()[0])


def connect_to_read(path: Path, timeout: float) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=timeout)


def _left_by_former(path: Path) -> tuple[frozenset[str], float]:
    """The ids that an earlier process wrote, and until when it counted GPU time (-inf: unknown)."""
    seen: frozenset[str] = frozenset()
    if not path.is_file():
        return seen, -math.inf
    try:
        with contextlib.closing(connect_to_read(path, timeout=1)) as db:
            seen = frozenset(id for (id,) in db.execute("SELECT id FROM seen"))
            row = db.execute("SELECT until FROM counted").fetchone()  # a file of version 1 has no such table
            return seen, -math.inf if row is None else float(row[0])
    except sqlite3.Error:
        return seen, -math.inf


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    for suffix in SQLITE_SUFFIXES:
        safe_files.require_no_link(path.with_name(path.name + suffix))
    with contextlib.closing(sqlite3.connect(path, timeout=5, isolation_level=None)) as db:
        settings = ("auto_vacuum = INCREMENTAL", "journal_mode = WAL", "synchronous = NORMAL", "temp_store = MEMORY")
        for setting in settings:
            db.execute(f"PRAGMA {setting}")
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, 1, SCHEMA_VERSION):
            raise sqlite3.DatabaseError(f"usage records of unknown version {version}")
        if version == 1:
            _upgrade(db)
        elif version == 0:
            _create(db)
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        yield db


def _create(db: sqlite3.Connection) -> None:
    for statement in _SCHEMA:
        db.execute(statement)
    if db.execute("SELECT count(*) FROM origin").fetchone()[0] == 0:
        db.execute("INSERT INTO origin VALUES (?)", (secrets.token_hex(8),))


def _upgrade(db: sqlite3.Connection) -> None:
    """Make a file of version 1 one of today, in one transaction. Its rows have no rate."""
    with db:
        db.execute("BEGIN IMMEDIATE")
        db.execute(f"CREATE TEMP TABLE former AS {V1_ROWS}")
        db.execute("DROP TABLE usage")
        _create(db)
        rate = _rate_id(db, Rate())
        names = f"at, span, tenant, model, outcome, source, {rate}, {_COLUMNS}"
        db.execute(f"INSERT INTO usage ({_KEY}, {_COLUMNS}) SELECT {names} FROM former")
        db.execute("DROP TABLE former")
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    _log.info("upgraded usage records of an earlier version")


def _used_bytes(db: sqlite3.Connection) -> int:
    names = "page_count", "freelist_count", "page_size"
    pages, free, size = (int(db.execute(f"PRAGMA {name}").fetchone()[0]) for name in names)
    return (pages - free) * size
