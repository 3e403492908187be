"""Folders that are removed by the next start where their owner was killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sidecar.runtime import locked_folder

PREFIX = "mine-"
KILLED = """
import os, signal, sys
from sidecar.runtime import locked_folder
print(locked_folder.make(sys.argv[1], "mine-")[0], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_only_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    """A folder in use stays, and so does one without a lock, or of another name."""
    path, lock = locked_folder.make(str(tmp_path), PREFIX)
    left = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, check=False)
    for name in ("mine-plain", "other-x"):
        (tmp_path / name).mkdir()
    (tmp_path / "other-x" / locked_folder.LOCK_NAME).touch()
    assert Path(left.stdout.strip()).is_dir()
    locked_folder.sweep(str(tmp_path), PREFIX)
    assert {found.name for found in tmp_path.iterdir()} == {Path(path).name, "mine-plain", "other-x"}
    locked_folder.remove(path, lock)
    assert not Path(path).exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a folder away")
def test_folders_of_other_users_stay(tmp_path: Path) -> None:
    """Nor is a link followed to a folder that looks like one of ours."""
    (tmp_path / "mine-theirs").mkdir()
    (tmp_path / "mine-theirs" / locked_folder.LOCK_NAME).touch()
    os.chown(tmp_path / "mine-theirs", 12345, 12345)
    (tmp_path / "away").mkdir()
    (tmp_path / "away" / locked_folder.LOCK_NAME).touch()
    (tmp_path / "mine-link").symlink_to(tmp_path / "away")
    locked_folder.sweep(str(tmp_path), PREFIX)
    assert (tmp_path / "mine-theirs").is_dir() and (tmp_path / "away" / locked_folder.LOCK_NAME).exists()
