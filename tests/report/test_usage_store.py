"""Usage on disk: sums that add up despite kills, damage or a full disk, within their bounds."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.load.gpu_price import GpuPrice
from sidecar.report import usage_store
from sidecar.report.usage_query import GROUPS, read
from sidecar.report.usage_rows import DAY_S, HOUR_S, PendingUsage, Rate, UsageKey, UsageSums
from sidecar.report.usage_store import USAGE_FILE, UsageStore

NOW = 1_800_000_000.0  # a full hour
RATE = Rate("llama-h100", 8, 2.5)

COUNTER = itertools.count()


def fresh(folder: Path, days: int = 35, most: int = 64 << 20) -> UsageStore:
    return UsageStore(folder, days, most)


def put(kept: UsageStore, at: float, tenant: str = "a", outcome: str = "ok", mu: float = 2.0, id: str = "") -> None:
    """Add the settlement of one request of 100 tokens in and 40 out, at `at`."""
    key = UsageKey(int(at) // 60 * 60, 60, tenant, "m", outcome, "told", RATE)
    sums = UsageSums(1, mu, 0.0, 100, 10, 40, 1, 4.0) if mu else UsageSums(1)
    kept.add(id or f"{os.getpid()}-{next(COUNTER)}", key, sums)


def total(folder: Path) -> UsageSums:
    rows = read(folder / USAGE_FILE, 0, NOW * 2, ())
    return rows[0][1] if rows else UsageSums()


def count(folder: Path, where: str = "true") -> int:
    with contextlib.closing(sqlite3.connect(folder / USAGE_FILE)) as db:
        return int(db.execute(f"SELECT count(*) FROM usage WHERE {where}").fetchone()[0])


def test_settlements_add_up_by_minute_tenant_and_outcome(tmp_path: Path) -> None:
    """Two batches of the same minute are one row; another tenant, outcome or minute is another."""
    kept = fresh(tmp_path)
    for tenant, outcome, at in (("a", "ok", 0), ("a", "ok", 30), ("a", "stalled", 0), ("b", "ok", 61)):
        put(kept, NOW + at, tenant, outcome)
        kept.write(kept.take(), NOW)
    rows = dict(read(tmp_path / USAGE_FILE, NOW, NOW + 120, ("tenant", "outcome")))
    assert {key: sums.requests for key, sums in rows.items()} == {("a", "ok"): 2, ("a", "stalled"): 1, ("b", "ok"): 1}
    assert rows["a", "ok"] == UsageSums(2, 4.0, 0.0, 200, 20, 80, 2, 8.0)
    assert read(tmp_path / USAGE_FILE, NOW + 60, NOW + 120, ("tenant",))[0][0] == ("b",)
    assert count(tmp_path) == 3


def test_what_could_not_be_written_is_written_later_once(tmp_path: Path) -> None:
    """After the folder was gone for a while, every settlement is written exactly once."""
    kept = fresh(tmp_path / "later")
    put(kept, NOW)
    taken = kept.take()
    with pytest.raises(sqlite3.OperationalError):
        kept.write(taken, NOW)
    kept.restore(taken)
    put(kept, NOW)
    (tmp_path / "later").mkdir()
    kept.write(kept.take(), NOW)
    assert total(tmp_path / "later").requests == 2


@settings(max_examples=25)
@given(batches=st.lists(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 9)), max_size=9), max_size=6))
def test_sums_are_conserved(tmp_path_factory: pytest.TempPathFactory, batches: list[list[tuple[str, float]]]) -> None:
    """Whatever is added in whatever batches, tidied or not, is read back."""
    folder = tmp_path_factory.mktemp("usage")
    kept = fresh(folder)
    for i, batch in enumerate(batches):
        for tenant, mu in batch:
            put(kept, NOW + 7 * HOUR_S * i, tenant, mu=mu)
        kept.write(kept.take(), NOW + 7 * HOUR_S * i)
    wanted = [mu for batch in batches for _, mu in batch]
    if wanted:
        assert total(folder).requests == len(wanted)
        assert total(folder).mu == pytest.approx(sum(wanted))


def test_old_minutes_become_quarters_of_an_hour_and_old_days_go(tmp_path: Path) -> None:
    """Minutes are kept for a week; summing up keeps the sums; rows beyond the retention are dropped and reported."""
    kept = fresh(tmp_path, days=12)
    for minute in range(120):
        put(kept, NOW + 60 * minute)
    kept.write(kept.take(), NOW)
    kept.write(PendingUsage(), NOW + 7 * DAY_S)
    assert count(tmp_path) == 120
    kept.write(PendingUsage(), NOW + 9 * DAY_S)
    assert count(tmp_path) == 8
    assert total(tmp_path).requests == 120
    [gone] = kept.write(PendingUsage(), NOW + 14 * DAY_S)
    assert (gone.why, gone.rows, gone.requests, gone.mu, gone.is_billable) == ("age", 8, 120, 240.0, True)
    assert total(tmp_path).requests == 0


def test_requests_that_cost_nothing_are_summed_up_after_an_hour(tmp_path: Path) -> None:
    """Rejected requests need one row per hour and label, however many there are."""
    kept = fresh(tmp_path)
    for minute in range(180):
        for _ in range(3):
            put(kept, NOW + 60 * minute, outcome="rejected", mu=0.0)
    kept.write(kept.take(), NOW)
    kept.write(PendingUsage(), NOW + 4 * HOUR_S)
    assert count(tmp_path) == 3 and total(tmp_path).requests == 540


def test_the_file_is_bounded_and_reports_what_it_lost(tmp_path: Path) -> None:
    """Beyond the size bound the oldest rows are dropped, the newest stay; what was dropped and what is left add up."""
    kept, evicted = fresh(tmp_path, most=200_000), []
    for hour in range(10):
        for i in range(500):
            put(kept, NOW + HOUR_S * hour, f"tenant-{i}")
        evicted += kept.write(kept.take(), NOW + HOUR_S * hour)
    evicted += kept.write(PendingUsage(), NOW + 11 * HOUR_S)
    assert (tmp_path / USAGE_FILE).stat().st_size < 600_000
    assert read(tmp_path / USAGE_FILE, NOW + 9 * HOUR_S, NOW + 10 * HOUR_S, ())[0][1].requests == 500
    assert evicted and all(gone.why == "size" and gone.is_billable for gone in evicted)
    assert sum(gone.requests for gone in evicted) + total(tmp_path).requests == 5000
    assert sum(gone.mu for gone in evicted) + total(tmp_path).mu == pytest.approx(10_000)


def test_the_file_gets_smaller_with_its_rows(tmp_path: Path) -> None:
    """The disk gets back what rows took that are too old."""
    kept = fresh(tmp_path)
    for i in range(2000):
        put(kept, NOW, f"tenant-{i}")
    kept.write(kept.take(), NOW)
    with contextlib.closing(sqlite3.connect(tmp_path / USAGE_FILE)) as db:
        full = db.execute("PRAGMA page_count").fetchone()[0]
        kept.write(PendingUsage(), NOW + 36 * DAY_S)
        pages, free = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count"))
    assert free == 0 and pages < full / 3


def test_rejected_requests_push_out_no_bill(tmp_path: Path) -> None:
    """A month of bills stays, summed up, while rejected requests of many clients fill the file for hours."""
    kept, evicted = fresh(tmp_path, most=400_000), []
    for hour in range(30 * 24):
        put(kept, NOW + HOUR_S * hour)
    kept.write(kept.take(), NOW)
    start = NOW + 30 * DAY_S
    for minute in range(150):
        for client in range(100):
            put(kept, start + 60 * minute, f"tenant-{client}", "rejected", mu=0.0)
        evicted += kept.write(kept.take(), start + 60 * minute)
    assert (tmp_path / USAGE_FILE).stat().st_size < 1_200_000
    assert total(tmp_path).mu == pytest.approx(2.0 * 30 * 24)
    assert not [gone for gone in evicted if gone.is_billable]


def test_bills_are_summed_up_before_any_is_dropped(tmp_path: Path) -> None:
    """A file that is too large loses minutes of the past, not money."""
    kept, evicted = fresh(tmp_path, most=150_000), []
    for minute in range(3 * 24 * 60):
        put(kept, NOW + 60 * minute)
        if minute % 60 == 59:
            evicted += kept.write(kept.take(), NOW + 60 * minute)
    assert not evicted and total(tmp_path).requests == 3 * 24 * 60
    assert count(tmp_path, "span = 60") >= 60, "the newest are still minutes"
    assert (tmp_path / USAGE_FILE).stat().st_size < 450_000


@pytest.mark.parametrize("damage", [b"no database", b"SQLite format 3\0" + b"\xff" * 4096], ids=["text", "pages"])
def test_a_damaged_file_is_put_aside(tmp_path: Path, damage: bytes) -> None:
    """A damaged file is renamed, and usage continues in a new one."""
    (tmp_path / USAGE_FILE).write_bytes(damage)
    kept = fresh(tmp_path)
    put(kept, NOW)
    kept.write(kept.take(), NOW)
    assert total(tmp_path).requests == 1
    assert (tmp_path / (USAGE_FILE + ".damaged")).read_bytes() == damage


def test_damage_that_shows_later_is_put_aside_too(tmp_path: Path) -> None:
    """A file damaged while the sidecar runs is renamed; the batch is in the new file, once."""
    kept = fresh(tmp_path)
    for i in range(2000):
        put(kept, NOW, f"tenant-{i}")
    kept.write(kept.take(), NOW)
    pages = (tmp_path / USAGE_FILE).read_bytes()
    (tmp_path / USAGE_FILE).write_bytes(pages[:8192] + b"\xff" * (len(pages) - 8192))
    for _ in range(2):
        put(kept, NOW)
        kept.write(kept.take(), NOW)
    assert total(tmp_path).requests == 2
    assert (tmp_path / (USAGE_FILE + ".damaged")).is_file()


def test_a_batch_whose_tidying_fails_is_counted_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """If old rows cannot be summed up, as on a full disk, new ones are not written twice."""
    kept = fresh(tmp_path)
    put(kept, NOW)
    kept.write(kept.take(), NOW)
    with contextlib.closing(sqlite3.connect(tmp_path / USAGE_FILE)) as db:
        db.execute("CREATE TRIGGER full BEFORE DELETE ON usage BEGIN SELECT count(*) FROM nowhere; END")
    put(kept, NOW + 2 * DAY_S)
    kept.write(kept.take(), NOW + 2 * DAY_S)
    assert "cannot tidy usage records" in caplog.text
    assert total(tmp_path).requests == 2


def test_old_bills_become_days_before_any_is_dropped(tmp_path: Path) -> None:
    """Where hours are too many, those of more than eight days ago become days."""
    kept = fresh(tmp_path)
    for hour in range(30 * 24):
        for tenant in ("a", "b"):
            put(kept, NOW + HOUR_S * hour, tenant)
    kept.write(kept.take(), NOW)
    evicted = fresh(tmp_path, most=100_000).write(PendingUsage(), NOW + 30 * DAY_S)
    assert not evicted and total(tmp_path).requests == 2 * 30 * 24
    assert count(tmp_path, f"span = {DAY_S}") >= 2 * 21 and count(tmp_path, f"span <= {HOUR_S}") >= 2 * 7 * 24
    days = read(tmp_path / USAGE_FILE, NOW - DAY_S, NOW + 30 * DAY_S, ("day",))
    assert sum(sums.requests for _, sums in days) == 2 * 30 * 24


def test_what_waits_for_a_full_disk_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three days of unwritten settlements, few rows and the last ids are kept, and the newest sums add up."""
    monkeypatch.setattr(usage_store, "MAX_PENDING_ROWS", 100)
    kept = fresh(tmp_path)
    for minute in range(3 * DAY_S // 60):
        put(kept, NOW + 60 * minute)
        kept.restore(kept.take())
    taken = kept.take()
    assert len(taken.sums) <= 100
    assert len(taken.ids) <= 3
    assert sum(sums.requests for sums in taken.sums.values()) == 3 * DAY_S // 60
    for hour in range(150):
        put(kept, NOW + HOUR_S * hour)
        kept.restore(kept.take())
    assert min(at for at, *_ in kept.take().sums) >= NOW + 50 * HOUR_S


def test_what_waits_for_a_write_that_hangs_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one batch is with a disk that never answers, a bound of the next is kept; what was lost is told."""
    monkeypatch.setattr(usage_store, "MAX_PENDING_ROWS", 100)
    monkeypatch.setattr(usage_store, "MAX_PENDING_IDS", 200)
    kept, gone = fresh(tmp_path), []
    kept.take()
    for minute in range(DAY_S // 60):
        for tenant in "abcdefgh":
            put(kept, NOW + 60 * minute, tenant)
        gone += kept.elapse(60.0 * minute, NOW + 60 * minute, GpuPrice(), "")
    waiting = kept.take()
    assert len(waiting.sums) <= 100 and len(waiting.ids) <= 200
    lost = sum(eviction.requests for eviction in gone)
    assert lost and lost + sum(sums.requests for sums in waiting.sums.values()) == 8 * DAY_S // 60


def test_what_waits_for_a_full_disk_keeps_bills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If too many rows are pending, those that cost nothing are dropped first, and all drops are reported."""
    monkeypatch.setattr(usage_store, "MAX_PENDING_ROWS", 100)
    kept = fresh(tmp_path)
    for hour in range(90):
        put(kept, NOW + HOUR_S * hour)
    for hour in range(60):
        put(kept, NOW + HOUR_S * (100 + hour), outcome="rejected", mu=0.0)
    [gone] = kept.restore(kept.take())
    assert (gone.why, gone.rows, gone.is_billable) == ("memory", 50, False)
    for hour in range(20):
        put(kept, NOW + HOUR_S * (200 + hour))
    free, paid = kept.restore(kept.take())
    assert (free.rows, free.is_billable, paid.rows, paid.mu, paid.is_billable) == (10, False, 10, 20.0, True)
    assert paid.first == NOW


def test_kill_9_amid_writing_loses_the_last_batch_at_most(tmp_path: Path) -> None:
    """After kill -9 the file holds all committed batches, at most one more."""
    code = (
        "import sys, itertools\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_usage_store import *\n"
        "kept = fresh(Path(sys.argv[1]))\n"
        "for n in itertools.count(1):\n"
        "    for _ in range(10): put(kept, NOW + n)\n"
        "    kept.write(kept.take(), NOW + n)\n"
        "    print(n * 10, flush=True)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    said = 0
    while said < 300:
        said = int(writer.stdout.readline())
    os.kill(writer.pid, signal.SIGKILL)
    said = max([said, *(int(line) for line in writer.stdout.read().split())])
    writer.wait()
    writer.stdout.close()
    assert total(tmp_path).requests in (said, said + 10)
    kept = fresh(tmp_path)
    put(kept, NOW)
    kept.write(kept.take(), NOW)
    assert total(tmp_path).requests in (said + 1, said + 11)


def test_a_newer_version_is_not_overwritten(tmp_path: Path) -> None:
    """A file of a later version is renamed whole."""
    kept = fresh(tmp_path)
    kept.write(kept.take(), NOW)
    with sqlite3.connect(tmp_path / USAGE_FILE) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    put(kept, NOW)
    kept.write(kept.take(), NOW)
    assert (tmp_path / (USAGE_FILE + ".damaged")).exists() and total(tmp_path).requests == 1


def test_what_a_relay_tells_again_is_counted_once(tmp_path: Path) -> None:
    """A settlement that a killed control process wrote and did not acknowledge is counted once."""
    kept = fresh(tmp_path)
    put(kept, NOW, id="x")
    kept.write(kept.take(), NOW)
    again = fresh(tmp_path)
    put(again, NOW + 1, id="x")
    put(again, NOW + 1, id="y")
    again.write(again.take(), NOW + 1)
    assert total(tmp_path).requests == 2
    again.write(PendingUsage({}, {"z": int(NOW)}), NOW + 500)
    with contextlib.closing(sqlite3.connect(tmp_path / USAGE_FILE)) as db:
        assert db.execute("SELECT count(*) FROM seen").fetchone() == (0,), "ids are kept for minutes only"


def test_every_group_can_be_read(tmp_path: Path) -> None:
    """Each value of --by is a column; times are in order."""
    kept = fresh(tmp_path)
    for hour in (2, 0, 1):
        put(kept, NOW + HOUR_S * hour)
    kept.write(kept.take(), NOW)
    for name in GROUPS:
        assert read(tmp_path / USAGE_FILE, NOW, NOW + DAY_S, (name,))
    hours = [key[0] for key, _ in read(tmp_path / USAGE_FILE, NOW, NOW + DAY_S, ("hour",))]
    assert hours == sorted(hours) and len(hours) == 3


def old_file(folder: Path, rows: list[tuple[int, str, int]]) -> None:
    """A file of version 1, as it was written: (start, tenant, requests)."""
    columns = "requests, mu, gpu_seconds, input_tokens, cached_tokens, output_tokens, images, seconds"
    with contextlib.closing(sqlite3.connect(folder / USAGE_FILE)) as db, db:
        db.execute(
            "CREATE TABLE usage (at INTEGER NOT NULL, tenant TEXT NOT NULL, model TEXT NOT NULL, outcome TEXT NOT NULL,"
            f" {columns}, PRIMARY KEY (at, tenant, model, outcome)) WITHOUT ROWID"
        )
        db.execute("CREATE TABLE seen (id TEXT PRIMARY KEY, at INTEGER NOT NULL) WITHOUT ROWID")
        db.execute("INSERT INTO seen VALUES ('old', ?)", (int(NOW),))
        for at, tenant, n in rows:
            db.execute(
                "INSERT INTO usage VALUES (?, ?, 'm', 'ok', ?, ?, 1.0, 100, 10, 40, 1, 4.0)", (at, tenant, n, 2.0 * n)
            )
        db.execute("PRAGMA user_version = 1")


def test_a_file_of_version_1_is_upgraded(tmp_path: Path) -> None:
    """Its hours stay hours and its minutes minutes, its sums are the same before and after, its ids are known."""
    start = int(NOW)
    old, hours = start - 48 * HOUR_S, start - 2 * HOUR_S
    rows = [(old, "a", 60), (hours, "a", 3), (start - HOUR_S + 60, "b", 1), (start, "a", 5)]
    old_file(tmp_path, rows)
    path = tmp_path / USAGE_FILE
    assert (total(tmp_path).requests, total(tmp_path).mu) == (69, 138.0), "before the upgrade"
    assert read(path, start - 48 * HOUR_S, start - 47.5 * HOUR_S, ())[0][1].requests == 30, "half of an hour's row"
    kept = fresh(tmp_path)
    put(kept, NOW, id="old")
    put(kept, NOW, id="new")
    kept.write(kept.take(), NOW)
    assert (total(tmp_path).requests, total(tmp_path).mu) == (70, 140.0)
    with contextlib.closing(sqlite3.connect(path)) as db:
        spans = dict(db.execute("SELECT at, span FROM usage WHERE source = 'unknown'"))
    assert spans == {start - 48 * HOUR_S: HOUR_S, start - 2 * HOUR_S: HOUR_S, start - HOUR_S + 60: 60, start: 60}
    assert {key[0] for key, _ in read(path, 0, NOW * 2, ("source",))} == {"unknown", "told"}
