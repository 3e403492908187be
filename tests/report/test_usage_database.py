"""Usage records in a real PostgreSQL server: each row once, through outages, kills and two writers at a time."""

from __future__ import annotations

import random
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from sidecar.report.usage_database import DatabaseWrite, UsageDatabase
from sidecar.report.usage_query import all_rows
from sidecar.report.usage_rows import DAY_S, HOUR_S, PendingUsage, Rate, UsageKey, UsageSums, idle_key
from sidecar.report.usage_store import UsageStore

from ..postgres_server import PostgresServer

NOON = 1_800_014_400  # a full hour: 2027-01-15 12:00 UTC
RATE = Rate("llama-h100", 8, 2.5)
NUMBERS = ("requests", "mu", "gpu_seconds", "input_tokens", "output_tokens", "dollars")


class Pod:
    """The records of one sidecar, and its way to the database."""

    def __init__(self, folder: Path, url: str, name: str = "pod-0") -> None:
        self.folder = folder / name
        self.folder.mkdir()
        self.store, self.count = UsageStore(self.folder, 35, 64 << 20), 0
        self.database, self.name = UsageDatabase(url, name), name

    def use(self, at: int, tenant: str = "a", requests: int = 1) -> None:
        """Requests end at `at`, a minute of all GPUs passes."""
        batch, minute = PendingUsage(until=at), at // 60 * 60
        for _ in range(requests):
            self.count += 1
            key = UsageKey(minute, 60, tenant, "m", "ok", "told", RATE)
            batch.count(f"{self.name}-{self.count}", key, UsageSums(1, 2.0, 8.0, 100, 0, 40, dollars=8 / 3600 * 2.5))
        batch.add(PendingUsage({idle_key(minute, RATE): UsageSums(gpu_seconds=480.0, dollars=480 / 3600 * 2.5)}))
        self.store.write(batch, at)

    def write(self, now: float, timeout: int = 30) -> DatabaseWrite:
        return self.database.write(self.store.path, now, timeout)

    def sums(self) -> dict[str, float]:
        found = UsageSums()
        for _, sums in all_rows(self.store.path):
            found.add(sums)
        return {name: getattr(found, name) for name in NUMBERS}


class Reader:
    """What a biller sees."""

    def __init__(self, url: str) -> None:
        import psycopg

        self.db = psycopg.connect(url, autocommit=True)

    def sums(self, where: str = "true") -> dict[str, float]:
        query = f"SELECT {', '.join(f'coalesce(sum({name}), 0)' for name in NUMBERS)} FROM sidecar_usage WHERE {where}"
        return dict(zip(NUMBERS, map(float, self.db.execute(query).fetchone() or ()), strict=True))

    def rows(self) -> list[tuple[Any, ...]]:
        return self.db.execute('SELECT * FROM sidecar_usage ORDER BY "start", id').fetchall()


@pytest.fixture
def reader(postgres: PostgresServer) -> Iterator[Reader]:
    found = Reader(postgres.url)
    yield found
    found.db.close()


def test_rows_are_written_once(postgres: PostgresServer, reader: Reader, tmp_path: Path) -> None:
    """Written twice, and again after more requests, the database has the sums of the file; the mark stays behind."""
    pod = Pod(tmp_path, postgres.url)
    for minute in range(0, 5 * 60, 7):
        pod.use(NOON + minute * 60, "ab"[minute % 2])
    first = pod.write(NOON + 5 * HOUR_S)
    assert first.until == NOON + 4 * HOUR_S, "the hour before may still get rows"
    rows = reader.rows()
    assert reader.sums() == pytest.approx(pod.sums(), abs=1e-4)
    again = pod.write(NOON + 5 * HOUR_S)
    assert reader.rows() == rows and 0 < again.rows < first.rows, "final hours are not written again"
    pod.use(NOON + 5 * HOUR_S - 60, "a", requests=9)
    pod.write(NOON + 5 * HOUR_S + 120)
    assert reader.sums() == pytest.approx(pod.sums(), abs=1e-4)
    invoice = reader.sums('"start" < to_timestamp(%d)' % (NOON + HOUR_S))  # noqa: UP031  SQL in an f-string has braces
    assert invoice["gpu_seconds"] == pytest.approx(9 * 480.0), "used and idle: nine minutes of the first hour"


def test_an_outage_is_caught_up(postgres: PostgresServer, tmp_path: Path) -> None:
    """Three days without a server: the pod keeps its records, and then everything is there once."""
    import psycopg

    pod, server = Pod(tmp_path, postgres.url), postgres
    pod.use(NOON)
    pod.write(NOON + 60)
    server.stop()
    for hour in range(72):
        pod.use(NOON + hour * HOUR_S + 120, "abc"[hour % 3], requests=2)
        if hour % 24 == 0:
            with pytest.raises(psycopg.OperationalError) as failed:
                pod.write(NOON + hour * HOUR_S + 180)
            assert "secret-word" not in pod.database.explain(failed.value)
    server.start()
    done = pod.write(NOON + 72 * HOUR_S)
    assert done.until == NOON + 71 * HOUR_S
    with closing(Reader(server.url).db) as db:
        found = db.execute("SELECT count(*), count(DISTINCT id), sum(requests), sum(gpu_seconds) FROM sidecar_usage")
        rows, ids, requests, gpu_seconds = found.fetchone()
    assert (rows, requests) == (ids, 1 + 2 * 72) and gpu_seconds == pytest.approx(73 * 480.0)


def test_a_transaction_that_breaks_leaves_nothing(postgres: PostgresServer, reader: Reader, tmp_path: Path) -> None:
    """A writer that waits for a lock gives up within its timeout, with no part of its rows written."""
    import psycopg

    pod = Pod(tmp_path, postgres.url)
    pod.use(NOON)
    pod.write(NOON + 60)
    before = reader.rows()
    pod.use(NOON + 60, "b")
    with psycopg.connect(postgres.url) as other:
        other.execute("LOCK TABLE sidecar_usage_mark IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(psycopg.errors.QueryCanceled):
            pod.write(NOON + 120, timeout=1)
    assert reader.rows() == before
    pod.write(NOON + 120)
    assert reader.sums() == pytest.approx(pod.sums(), abs=1e-4)


def test_pods_write_at_the_same_time(postgres: PostgresServer, reader: Reader, tmp_path: Path) -> None:
    """Eight pods make the tables at once, two writers of each file overlap: the sums are those of the files."""
    pods = [Pod(tmp_path, postgres.url, f"pod-{n}") for n in range(8)]
    rng, failed = random.Random(3), list[BaseException]()
    for pod in pods:
        pod.use(NOON, requests=rng.randrange(1, 5))

    def work(pod: Pod) -> None:
        try:
            pod.write(NOON + 60)
        except BaseException as e:  # noqa: BLE001  reported by the test
            failed.append(e)

    threads = [threading.Thread(target=work, args=(pod,)) for pod in pods for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    total = {name: sum(pod.sums()[name] for pod in pods) for name in NUMBERS}
    assert reader.sums() == pytest.approx(total, abs=1e-4)
    assert reader.db.execute("SELECT count(*) FROM sidecar_usage_mark").fetchone() == (8,)


def test_dropped_rows_stay(postgres: PostgresServer, reader: Reader, tmp_path: Path) -> None:
    """What a full file dropped before its hours were final is still billed."""
    pod = Pod(tmp_path, postgres.url)
    pod.use(NOON, requests=5)
    pod.use(NOON + 60, "b")
    pod.write(NOON + 120)
    with closing(sqlite3.connect(pod.store.path)) as db, db:
        db.execute("DELETE FROM usage WHERE tenant = 'a'")
    pod.use(NOON + 180, "a", requests=2)
    pod.write(NOON + 240)
    assert reader.sums("tenant = 'a'")["requests"] == 5, "the larger of both"
    assert reader.sums("tenant = 'b'")["requests"] == 1


def test_a_day_replaces_its_hours(postgres: PostgresServer, reader: Reader, tmp_path: Path) -> None:
    """After an outage in which the file was summed up to days, each request is there once, those before it included."""
    pod = Pod(tmp_path, postgres.url)
    for hour in range(200):
        pod.use(NOON + hour * HOUR_S + 60, "abc"[hour % 3])
        if hour in (28, 30):
            pod.write(NOON + hour * HOUR_S + 120)  # the last write in the evening of the second day
    assert reader.sums()["requests"] == 31
    late = NOON + 40 * DAY_S
    UsageStore(pod.folder, 60, 40 << 10).write(PendingUsage(), late)
    assert DAY_S in {key.span for key, _ in all_rows(pod.store.path)}, "hours would not fit"
    assert pod.write(late).until == late - HOUR_S
    assert reader.sums() == pytest.approx(pod.sums(), abs=1e-4) and reader.sums()["requests"] == 200
    assert reader.sums('"end" - "start" = interval \'1 hour\'')["requests"] == 12, "of the first day"
    before = reader.rows()
    pod.write(late)
    assert reader.rows() == before


def test_a_role_without_privileges_on_the_schema(postgres: PostgresServer, reader: Reader, tmp_path: Path) -> None:
    """Tables that an administrator made are enough."""
    Pod(tmp_path, postgres.url, "maker").database.check()
    reader.db.execute("DROP ROLE IF EXISTS writer")
    reader.db.execute("CREATE ROLE writer LOGIN")
    try:
        reader.db.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON sidecar_usage, sidecar_usage_mark TO writer")
        pod = Pod(tmp_path, postgres.url.replace("postgres:secret-word", "writer"))
        pod.use(NOON)
        assert pod.write(NOON + 60).rows == 2
    finally:
        reader.db.execute("DROP OWNED BY writer")
        reader.db.execute("DROP ROLE writer")
