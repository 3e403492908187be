"""Merge the usage records of several sidecars into one file.

    sidecar usage merge --into all pod-0/usage.db pod-1/usage.db pod-2.jsonl
    sidecar usage --state-dir all --from 2026-11-01 --until 2026-12-01 --by tenant

Rules: a file is a sidecar's `usage.db`, or JSON lines of `sidecar usage export`. Nothing is counted twice: of several
copies of one sidecar's file the newest counts, a row of exports counts once, and not at all next to the file that it is
from. The result is rewritten each time, but never replaces records that it does not hold.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sidecar.errors import UsageError
from sidecar.flags import argument, directory, flag, parser
from sidecar.report import usage_export
from sidecar.report.usage_query import Provenance, all_rows, provenance
from sidecar.report.usage_rows import PendingUsage, UsageKey, UsageSums
from sidecar.report.usage_store import SQLITE_SUFFIXES, USAGE_FILE, UsageStore, set_origins
from sidecar.tools.usage import NoUsageRecords

BATCH_ROWS: Final = 10_000
SQLITE_HEAD: Final = b"SQLite format 3\0"
DAYS: Final = 36_500  # the result is not bounded
MAX_BYTES: Final = 1 << 50


@parser("files that exist", "FILE...")
def files(value: str) -> str:
    if not value or not all(Path(name).is_file() for name in value.split(",")):
        raise ValueError
    return value


@dataclass(frozen=True, slots=True)
class MergeSettings:
    """Settings of `sidecar usage merge`."""

    files: str = argument(files, "usage.db of sidecars, and JSON lines of their exports")
    into: str = flag("", directory, "Directory to write usage.db to, for --state-dir of other commands")


def main(settings: MergeSettings, as_json: bool = False) -> int:
    """Write the merged file. Returns 0. Raises NoUsageRecords and UsageError."""
    if not settings.files or not settings.into:
        raise UsageError("give the files to merge, and a directory for the result with --into")
    paths = [Path(name) for name in settings.files.split(",")]
    databases = [path for path in paths if _is_database(path)]
    try:
        whose = newest({path: provenance(path) for path in databases})
        folder = Path(settings.into)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as made:
            store = UsageStore(Path(made), DAYS, MAX_BYTES)
            for path in whose:
                _copy(all_rows(path), store)
            known = frozenset[str]().union(*(of.origins for of in whose.values()))
            exported = _Exports(known)
            for path in paths:
                if path not in databases:
                    _copy(exported.rows(path), store)
            store.write(PendingUsage(), 0.0)  # also where there is no row
            set_origins(store.path, known | exported.origins)
            require_replaceable(folder / USAGE_FILE, known | exported.origins)
            for suffix in SQLITE_SUFFIXES:  # files of an earlier result
                (folder / (USAGE_FILE + suffix)).unlink(missing_ok=True)
            shutil.move(store.path, folder / USAGE_FILE)
    except (OSError, sqlite3.Error) as e:
        raise NoUsageRecords(f"usage records cannot be merged: {e}") from None
    written, sidecars = str(folder / USAGE_FILE), len(known | exported.origins)
    if as_json:
        print(json.dumps({"written": written, "sidecars": sidecars}, indent=1))
    else:
        print(f"written: {written}, the records of {sidecars} sidecar(s)", file=sys.stderr)
    return 0


def newest(found: dict[Path, Provenance]) -> dict[Path, Provenance]:
    """The files to read: of copies of one file the newest. Raises UsageError where files share a part of their rows."""
    chosen: dict[Path, Provenance] = {}
    for path, of in found.items():
        same = [other for other, its in chosen.items() if of.origins & its.origins]
        if any(chosen[other].origins != of.origins for other in same):
            raise UsageError(
                f"{path} and {same[0]} overlap: both hold records of the same sidecar; use only one of them"
            )
        if not same:
            chosen[path] = of
        elif of.until > chosen[same[0]].until:
            del chosen[same[0]]
            chosen[path] = of
    return chosen


def require_replaceable(path: Path, merged: frozenset[str]) -> None:
    """Raises UsageError where a file holds records of a sidecar that was not merged: it may be that one's own."""
    if path.exists() and not provenance(path).origins <= merged:
        raise UsageError(f"--into: {path} holds records that are in none of the files; name another directory")


class _Exports:
    """Rows of exports: each id once, and none of the origins in `known`."""

    def __init__(self, known: frozenset[str]) -> None:
        self._known = known
        self._seen: set[str] = set()
        self.origins: set[str] = set()

    def rows(self, path: Path) -> Iterator[tuple[UsageKey, UsageSums]]:
        """The rows of a file that are new. Raises UsageError."""
        with path.open() as file:
            for number, line in enumerate(file, 1):
                try:
                    id, origin, key, sums = usage_export.parse(json.loads(line))
                except (ValueError, LookupError, TypeError, RecursionError):
                    raise UsageError(f"{path}, line {number}: not a row of `sidecar usage export`") from None
                if id not in self._seen and not self._known.intersection(origin.split("+")):
                    self._seen.add(id)
                    self.origins.update(origin.split("+"))
                    yield key, sums


def _copy(rows: Iterator[tuple[UsageKey, UsageSums]], store: UsageStore) -> None:
    """Write rows in batches, as a file may not fit into memory."""
    batch = PendingUsage()
    for key, sums in rows:
        batch.add(PendingUsage({key: sums}))
        if len(batch.sums) >= BATCH_ROWS:
            store.write(batch, 0.0)  # at 0 no row is late
            batch = PendingUsage()
    store.write(batch, 0.0)


def _is_database(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(SQLITE_HEAD)) == SQLITE_HEAD
