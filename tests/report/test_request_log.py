"""The log of requests: a line for each, whole lines after kills and full disks, bounded, without content."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sidecar.events import Admitted, RequestSize, Settled, Trace, Usage
from sidecar.load.cost_model import Coefficients, unit_ms
from sidecar.load.gpu_price import GpuPrice
from sidecar.load.ledger import Ledger
from sidecar.report.fan_out import FanOut
from sidecar.report.metrics import Metrics
from sidecar.report.request_log import LOG_FILE, MAX_PENDING, RequestLog
from sidecar.report.tracing import Tracing
from sidecar.report.usage_store import UsageStore

CO = Coefficients()
WALL = 1_800_000_000.25


class Reports:
    """A control process's reports, with usage records and a log of requests."""

    def __init__(self, folder: Path, max_bytes: int = 1 << 20) -> None:
        self.ledger, self.metrics = Ledger(CO), Metrics()
        self.usage, self.log = UsageStore(folder, 35, 64 << 20), RequestLog(folder, max_bytes)
        reports = self.metrics, Tracing("", "0"), self.usage, self.ledger.labels, lambda work: ()
        self.fan_out = FanOut(*reports, CO.fingerprint, unit_ms(CO), self.log)

    def settle(self, id: str, outcome: str = "ok", usage: Usage | None = None) -> None:
        trace = Trace("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", "", True)
        size = RequestSize(500, output=3)
        self.ledger.apply(0, Admitted(id, 1.0, "acme", "llama", "chat", True, size, 3, 1.0, trace))
        done = Settled(id, 4.0, outcome, 200, usage, 3, 12, 2.0, 1.0, 0.001)  # type: ignore[arg-type]
        settlement = self.ledger.apply(0, done)
        assert settlement is not None
        self.fan_out.on_settlement(settlement, GpuPrice(8, 2.5, 700.0), WALL)


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_says_what_the_rows_say(tmp_path: Path) -> None:
    """Names, tokens by kind, price and outcome: the sums of all lines are the usage records."""
    reports = Reports(tmp_path)
    reports.settle("a", usage=Usage(900, 40, 300))
    reports.settle("b", "client_cancelled")
    reports.log.write(reports.log.take())
    first, second = lines(tmp_path / LOG_FILE)
    assert first["tokens"] == {"new": 600, "cached": 300, "out": 40, "image": 0, "audio": 0, "video": 0}
    assert (first["id"], first["tenant"], first["model"], first["route"]) == ("a", "acme", "llama", "chat")
    assert (first["estimated"], second["estimated"], second["outcome"]) == (False, True, "client_cancelled")
    assert (first["at"], first["seconds"]) == ("2027-01-15T08:00:00.250+00:00", 3.0)
    assert (first["first_token_seconds"], first["trace_id"]) == (1.0, "0af7651916cd43dd8448eb211c80319c")
    assert (first["fingerprint"], first["gpus"], first["dollars_per_gpu_hour"]) == (CO.fingerprint, 8, 2.5)
    used = [sums for key, sums in reports.usage.take().sums.items() if key.tenant]
    for name in ("mu", "gpu_seconds", "dollars", "joules"):
        logged = sum(float(str(line[name])) for line in (first, second))
        assert logged == pytest.approx(sum(getattr(sums, name) for sums in used), rel=1e-3)


def test_a_repeated_settlement_has_one_line(tmp_path: Path) -> None:
    """A relay repeats what a killed control process may not have recorded; usage records know its id."""
    reports = Reports(tmp_path)
    reports.settle("a")
    reports.usage.write(reports.usage.take(), WALL)
    reports.log.write(reports.log.take())
    after = Reports(tmp_path)
    after.settle("a")
    after.settle("b")
    after.log.write(after.log.take())
    assert [line["id"] for line in lines(tmp_path / LOG_FILE)] == ["a", "b"]


def test_the_files_are_bounded(tmp_path: Path) -> None:
    """Never more than `max_bytes` in two files, whose lines are whole, the newest included."""
    log, most = RequestLog(tmp_path, 10_000), 0
    for n in range(400):
        log._pending.append(json.dumps({"id": n, "x": "y" * 60}).encode() + b"\n")
        if n % 7 == 0:
            log.write(log.take())
            most = max(most, sum(file.stat().st_size for file in tmp_path.iterdir()))
    log.write(log.take())
    assert 5_000 < most <= 10_000
    found = [line["id"] for name in (LOG_FILE + ".1", LOG_FILE) for line in lines(tmp_path / name)]
    assert found == list(range(int(str(found[0])), 400))


def test_a_part_of_a_line_is_cut_off(tmp_path: Path) -> None:
    """What a killed process had begun to write is not glued to the next line."""
    (tmp_path / LOG_FILE).write_bytes(b'{"id":"a"}\n{"id":"b","mu')
    log = RequestLog(tmp_path, 10_000)
    log.write([b'{"id":"c"}\n'])
    assert [line["id"] for line in lines(tmp_path / LOG_FILE)] == ["a", "c"]


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    """A batch that fits in part is written later as a whole."""
    code = f"""
import resource, signal
from pathlib import Path
from sidecar.report.request_log import RequestLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = RequestLog(Path({str(tmp_path)!r}), 1 << 20)
log.write([b'{{"id":1}}\\n'])
resource.setrlimit(resource.RLIMIT_FSIZE, (50, resource.RLIM_INFINITY))
batch = [b'{{"id":%d}}\\n' % n for n in range(2, 40)]
try:
    log.write(batch)
except OSError:
    print(log.path.stat().st_size)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.restore(batch)
log.write(log.take())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "9\n", "the size of the first batch"
    assert [line["id"] for line in lines(tmp_path / LOG_FILE)] == list(range(1, 40))


def test_what_waits_is_bounded_and_counted(tmp_path: Path) -> None:
    """A disk that stays full costs the oldest lines, and a counter says how many."""
    reports = Reports(tmp_path)
    waiting = [b"{}\n"] * MAX_PENDING
    assert reports.log.restore(waiting) == 0
    reports.settle("a")
    assert reports.metrics.registry.get_sample_value("sidecar_requests_unlogged_total") == 1
    assert len(taken := reports.log.take()) == MAX_PENDING and json.loads(taken[-1])["id"] == "a"


def test_no_link_is_followed(tmp_path: Path) -> None:
    """A link in its place, as another container may put there, is an error; so is a pipe."""
    (tmp_path / "theirs").write_text("kept")
    (tmp_path / LOG_FILE).symlink_to(tmp_path / "theirs")
    log = RequestLog(tmp_path, 10_000)
    with pytest.raises(OSError, match="symbolic links"):
        log.write([b"{}\n"])
    (tmp_path / LOG_FILE).unlink()
    os.mkfifo(tmp_path / LOG_FILE)
    with pytest.raises(OSError, match="not a file"):
        log.write([b"{}\n"])
    assert (tmp_path / "theirs").read_text() == "kept"
