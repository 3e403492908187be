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

from sidecar.events import Admitted, Outcome, RequestSize, Settled
from sidecar.load.ledger import Settlement
from sidecar.report import usage_store
from sidecar.report.usage_store import DAY_S, HOUR_S, USAGE_FILE, PendingUsage, UsageStore, UsageSums, read

NOW = 1_800_000_000.0  # a full hour


COUNTER = itertools.count()


def settlement(tenant: str = "a", outcome: Outcome = "ok", mu: float = 2.0, id: str = "") -> Settlement:
    admitted = Admitted(
        id or f"{os.getpid()}-{next(COUNTER)}", 10.0, tenant, "m", "chat", True, RequestSize(100, output=50), None, 3.0
    )
    settled = Settled("1", 14.0, outcome, 200, None, 40, 400, 11.0, 10.1, 0.001)
    return Settlement(admitted, settled, tenant, "m", RequestSize(90, cached=10, output=40, images=1), mu, 40)


def fresh(folder: Path, days: int = 35, most: int = 64 << 20) -> UsageStore:
    return UsageStore(folder, 1000.0, days, most)


def total(folder: Path) -> UsageSums:
    rows = read(folder / USAGE_FILE, 0, NOW * 2, ())
    return rows[0][1] if rows else UsageSums()


def test_settlements_add_up_by_minute_tenant_and_outcome(tmp_path: Path) -> None:
    """Two batches of the same minute are one row; another tenant, outcome or minute is another."""
    kept = fresh(tmp_path)
    for tenant, outcome, at in (("a", "ok", 0), ("a", "ok", 30), ("a", "stalled", 0), ("b", "ok", 61)):
        kept.add(settlement(tenant, outcome), NOW + at)  # type: ignore[arg-type]
        kept.write(kept.take(), NOW)
    rows = dict(read(tmp_path / USAGE_FILE, NOW, NOW + 100, ("tenant", "outcome")))
    assert {key: sums.requests for key, sums in rows.items()} == {("a", "ok"): 2, ("a", "stalled"): 1, ("b", "ok"): 1}
    assert rows["a", "ok"] == UsageSums(2, 4.0, 4.0, 200, 20, 80, 2, 8.0)
    assert read(tmp_path / USAGE_FILE, NOW + 60, NOW + 100, ("tenant",))[0][0] == ("b",)


def test_what_could_not_be_written_is_written_later_once(tmp_path: Path) -> None:
    """After the folder was gone for a while, every settlement is written exactly once."""
    kept = fresh(tmp_path / "later")
    kept.add(settlement(), NOW)
    taken = kept.take()
    with pytest.raises(sqlite3.OperationalError):
        kept.write(taken, NOW)
    kept.restore(taken)
    kept.add(settlement(), NOW)
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
            kept.add(settlement(tenant, mu=mu), NOW + 7 * HOUR_S * i)
        kept.write(kept.take(), NOW + 7 * HOUR_S * i)
    wanted = [mu for batch in batches for _, mu in batch]
    if wanted:
        assert total(folder).requests == len(wanted)
        assert total(folder).mu == pytest.approx(sum(wanted))


def test_old_minutes_become_hours_and_old_days_go(tmp_path: Path) -> None:
    """Summing up minutes keeps the sums; rows beyond the retention are dropped."""
    kept = fresh(tmp_path, days=2)
    for minute in range(120):
        kept.add(settlement(), NOW + 60 * minute)
    kept.write(kept.take(), NOW)
    kept.write(PendingUsage(), NOW + 1.5 * DAY_S)
    with sqlite3.connect(tmp_path / USAGE_FILE) as db:
        assert db.execute("SELECT count(*) FROM usage").fetchone() == (2,)
    db.close()
    assert total(tmp_path).requests == 120
    kept.write(PendingUsage(), NOW + 4 * DAY_S)
    assert total(tmp_path).requests == 0


def test_the_file_is_bounded(tmp_path: Path) -> None:
    """Beyond the size bound the oldest rows are dropped, the newest stay."""
    kept = fresh(tmp_path, most=200_000)
    for hour in range(10):
        for i in range(500):
            kept.add(settlement(f"tenant-{i}"), NOW + HOUR_S * hour)
        kept.write(kept.take(), NOW + HOUR_S * hour)
    kept.write(PendingUsage(), NOW + 11 * HOUR_S)
    assert (tmp_path / USAGE_FILE).stat().st_size < 600_000
    assert read(tmp_path / USAGE_FILE, NOW + 9 * HOUR_S, NOW + 10 * HOUR_S, ())[0][1].requests == 500


def test_the_file_is_bounded_within_an_hour(tmp_path: Path) -> None:
    """Clients that name a new tenant with each request do not fill the disk within an hour."""
    kept = fresh(tmp_path, most=200_000)
    for minute in range(50):
        for i in range(200):
            kept.add(settlement(f"tenant-{i}"), NOW + 60 * minute)
        kept.write(kept.take(), NOW + 60 * minute)
    assert (tmp_path / USAGE_FILE).stat().st_size < 600_000


@pytest.mark.parametrize("damage", [b"no database", b"SQLite format 3\0" + b"\xff" * 4096], ids=["text", "pages"])
def test_a_damaged_file_is_put_aside(tmp_path: Path, damage: bytes) -> None:
    """A damaged file is renamed, and usage continues in a new one."""
    (tmp_path / USAGE_FILE).write_bytes(damage)
    kept = fresh(tmp_path)
    kept.add(settlement(), NOW)
    kept.write(kept.take(), NOW)
    assert total(tmp_path).requests == 1
    assert (tmp_path / (USAGE_FILE + ".damaged")).read_bytes() == damage


def test_damage_that_shows_later_is_put_aside_too(tmp_path: Path) -> None:
    """A file damaged while the sidecar runs is renamed; the batch is in the new file, once."""
    kept = fresh(tmp_path)
    for i in range(2000):
        kept.add(settlement(f"tenant-{i}"), NOW)
    kept.write(kept.take(), NOW)
    pages = (tmp_path / USAGE_FILE).read_bytes()
    (tmp_path / USAGE_FILE).write_bytes(pages[:8192] + b"\xff" * (len(pages) - 8192))
    for _ in range(2):
        kept.add(settlement(), NOW)
        kept.write(kept.take(), NOW)
    assert total(tmp_path).requests == 2
    assert (tmp_path / (USAGE_FILE + ".damaged")).is_file()


def test_a_batch_whose_tidying_fails_is_counted_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """If old rows cannot be summed up, as on a full disk, new ones are not written twice."""
    kept = fresh(tmp_path)
    kept.add(settlement(), NOW)
    kept.write(kept.take(), NOW)
    with contextlib.closing(sqlite3.connect(tmp_path / USAGE_FILE)) as db:
        db.execute("CREATE TRIGGER full BEFORE DELETE ON usage BEGIN SELECT count(*) FROM nowhere; END")
    kept.add(settlement(), NOW + 2 * DAY_S)
    kept.write(kept.take(), NOW + 2 * DAY_S)
    assert "cannot tidy usage records" in caplog.text
    assert total(tmp_path).requests == 2


def test_what_waits_for_a_full_disk_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three days of unwritten settlements, few rows and the last ids are kept, and the newest sums add up."""
    monkeypatch.setattr(usage_store, "MAX_PENDING_ROWS", 100)
    kept = fresh(tmp_path)
    for minute in range(3 * DAY_S // 60):
        kept.add(settlement(), NOW + 60 * minute)
        kept.restore(kept.take())
    taken = kept.take()
    assert len(taken.sums) <= 100
    assert len(taken.ids) <= 3
    assert sum(sums.requests for sums in taken.sums.values()) == 3 * DAY_S // 60
    for hour in range(150):
        kept.add(settlement(), NOW + HOUR_S * hour)
        kept.restore(kept.take())
    assert min(at for at, *_ in kept.take().sums) >= NOW + 50 * HOUR_S


def test_kill_9_amid_writing_loses_the_last_batch_at_most(tmp_path: Path) -> None:
    """After kill -9 the file holds all committed batches, at most one more."""
    code = (
        "import sys, itertools\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_usage_store import *\n"
        "kept = fresh(Path(sys.argv[1]))\n"
        "for n in itertools.count(1):\n"
        "    for _ in range(10): kept.add(settlement(), NOW + n)\n"
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
    kept.add(settlement(), NOW)
    kept.write(kept.take(), NOW)
    assert total(tmp_path).requests in (said + 1, said + 11)


def test_a_newer_version_is_not_overwritten(tmp_path: Path) -> None:
    """A file of a later version is renamed whole."""
    kept = fresh(tmp_path)
    kept.write(kept.take(), NOW)
    with sqlite3.connect(tmp_path / USAGE_FILE) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    kept.add(settlement(), NOW)
    kept.write(kept.take(), NOW)
    assert (tmp_path / (USAGE_FILE + ".damaged")).exists() and total(tmp_path).requests == 1


def test_what_a_relay_tells_again_is_counted_once(tmp_path: Path) -> None:
    """A settlement that a killed control process wrote and did not acknowledge is counted once."""
    kept = fresh(tmp_path)
    kept.add(settlement(id="x"), NOW)
    kept.write(kept.take(), NOW)
    again = fresh(tmp_path)
    again.add(settlement(id="x"), NOW + 1)
    again.add(settlement(id="y"), NOW + 1)
    again.write(again.take(), NOW + 1)
    assert total(tmp_path).requests == 2
    again.write(PendingUsage({}, {"z": int(NOW)}), NOW + 500)
    with contextlib.closing(sqlite3.connect(tmp_path / USAGE_FILE)) as db:
        assert db.execute("SELECT count(*) FROM seen").fetchone() == (0,), "ids are kept for minutes only"


def test_every_group_can_be_read(tmp_path: Path) -> None:
    """Each value of --by is a column; times are in order."""
    kept = fresh(tmp_path)
    for hour in (2, 0, 1):
        kept.add(settlement(), NOW + HOUR_S * hour)
    kept.write(kept.take(), NOW + 3 * HOUR_S)
    for name in usage_store.GROUP_COLUMNS:
        assert read(tmp_path / USAGE_FILE, NOW, NOW + DAY_S, (name,))
    hours = [key[0] for key, _ in read(tmp_path / USAGE_FILE, NOW, NOW + DAY_S, ("hour",))]
    assert hours == sorted(hours) and len(hours) == 3
