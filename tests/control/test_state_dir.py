"""The state directory: whose it may be, and what an attacker who may write there cannot do."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from pathlib import Path

import pytest

from sidecar.control import private_dir
from sidecar.control.diagnosis import FOLDER, Diagnoses
from sidecar.control.state_dir import StateDir
from sidecar.errors import StartError
from sidecar.events import Verdict
from sidecar.health.probes import ProbeState
from sidecar.report.usage_store import USAGE_FILE, PendingUsage, UsageStore

STALLED = ProbeState(Verdict("stalled", "no_progress", "", 0.0, 0.0), startup_done=True, draining=False)


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757, 0o1777])
def test_a_directory_that_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    """The error names it and says what to do."""
    path = tmp_path / "state"
    path.mkdir()
    path.chmod(mode)
    with pytest.raises(StartError, match=r"--state-dir: other users may write to .*state; run chmod go-w"):
        StateDir(str(path))
    path.chmod(0o755)
    StateDir(str(path))


@pytest.mark.parametrize("place", private_dir.SHARED_PLACES)
def test_a_place_where_every_program_writes_is_refused(place: str) -> None:
    """/tmp itself; a directory below it is fine."""
    if not Path(place).is_dir():
        pytest.skip(f"no {place} here")
    with pytest.raises(StartError, match="name a directory below it"):
        StateDir(place)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a directory away")
def test_a_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    """The owner could open it to anyone; a link of theirs leads where they want."""
    path, link = tmp_path / "state", tmp_path / "link"
    path.mkdir()
    link.symlink_to(path)
    os.lchown(link, 12345, 12345)
    with pytest.raises(StartError, match="link belongs to another user"):
        StateDir(str(link))
    os.chown(path, 12345, 12345)
    with pytest.raises(StartError, match=r"uid 12345.*chown it"):
        StateDir(str(path))


def test_a_new_directory_is_its_makers_alone(tmp_path: Path) -> None:
    """Also under a mask that lets the group write; others may read it."""
    before = os.umask(0o002)
    try:
        state = StateDir(str(tmp_path / "state"))
    finally:
        os.umask(before)
    assert state.path.stat().st_mode & 0o777 == 0o755


def test_a_volume_is_trusted_whoever_may_write(tmp_path: Path) -> None:
    """As Kubernetes mounts an emptyDir; names with spaces are read as the kernel writes them."""
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "25 1 0:23 / / rw - overlay overlay rw\n31 25 8:1 /pods/x /run/side\\040car rw,relatime - ext4 /dev/sda1 rw\n"
    )
    assert private_dir.is_mount_point(Path("/run/side car"), mounts)
    assert not private_dir.is_mount_point(Path("/run"), mounts)
    assert private_dir.is_mount_point(Path("/proc"))


def test_planted_links_are_not_followed(tmp_path: Path) -> None:
    """Verdict, mark of the stall, bundles, saved state: what the links point to stays."""
    victim, state = tmp_path / "victim", StateDir(str(tmp_path / "state"))
    victim.write_text("precious")
    victim.chmod(0o600)
    for name in ("verdict.json", "stalled", "memory.json", f".verdict.json.{os.getpid()}"):
        (state.path / name).symlink_to(victim)
    state.write(STALLED, time.time())
    state.replace("memory.json", {})
    (state.path / FOLDER).symlink_to(tmp_path)
    with pytest.raises(OSError):
        state.replace(f"{FOLDER}/20260101T000000-x.json", {})
    assert victim.read_text() == "precious" and victim.stat().st_mode & 0o777 == 0o600
    with pytest.raises(OSError):
        state.load(f".verdict.json.{os.getpid()}", 100)


def test_a_planted_bundle_discloses_nothing(tmp_path: Path) -> None:
    """A link among the diagnoses is no diagnosis: the admin port would show what it points to."""
    state = StateDir(str(tmp_path / "state"))
    (tmp_path / "secret").write_text('{"at": 1.0, "reason": "x"}')
    (state.path / FOLDER).mkdir()
    (state.path / FOLDER / "20260101T000000-x.json").symlink_to(tmp_path / "secret")
    diagnoses = Diagnoses(state)
    assert diagnoses.summaries() == () and diagnoses.read("20260101T000000-x") is None


@pytest.mark.parametrize("suffix", ["", "-wal", "-journal"])
def test_usage_goes_through_no_link(tmp_path: Path, suffix: str) -> None:
    """SQLite would follow it."""
    target = tmp_path / "target"
    with contextlib.closing(sqlite3.connect(target)) as db:
        db.execute("CREATE TABLE t (x)")
    before = target.read_bytes()
    folder = tmp_path / "state"
    folder.mkdir()
    (folder / f"{USAGE_FILE}{suffix}").symlink_to(target)
    with pytest.raises(OSError):
        UsageStore(folder, 35, 1 << 20).write(PendingUsage(), time.time())
    assert target.read_bytes() == before


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    """Scratch files, in folders too; nothing else."""
    state = StateDir(str(tmp_path))
    state.replace(f"{FOLDER}/20260101T000000-x.json", {})
    for left in (tmp_path / ".verdict.json.00ff.tmp", tmp_path / FOLDER / ".x.json.00ff.tmp", tmp_path / "my.tmp"):
        left.touch()
    state.sweep()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["20260101T000000-x.json", FOLDER, "my.tmp"]


def test_a_directory_that_was_removed_is_made_again(tmp_path: Path) -> None:
    """A cleaner of /run took it: the next verdict is there for exec probes, which would pass without one."""
    state = StateDir(str(tmp_path / "state"))
    state.write(STALLED, time.time())
    for file in state.path.iterdir():
        file.unlink()
    state.path.rmdir()
    state.write(STALLED, time.time())
    assert {file.name for file in state.path.iterdir()} == {"verdict.json", "stalled"}
    assert state.path.stat().st_mode & 0o022 == 0
