"""Files where someone else may write: no link is followed, in no place of a path."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sidecar.runtime import safe_files


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file that must stay as it is."""
    path = tmp_path / "victim"
    path.write_text("precious")
    path.chmod(0o600)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the attacker may write."""
    path = tmp_path / "state"
    path.mkdir()
    return path


def unharmed(victim: Path) -> bool:
    return victim.read_text() == "precious" and victim.stat().st_mode & 0o777 == 0o600


def test_a_file_is_replaced_whole_and_readable(folder: Path) -> None:
    """Also under a mask that would hide it, and with no scratch file left."""
    before = os.umask(0o077)
    try:
        for text in (b"old", b"new"):
            safe_files.replace(folder / "file", text)
    finally:
        os.umask(before)
    assert safe_files.read(folder / "file", 10) == b"new"
    assert (folder / "file").stat().st_mode & 0o777 == 0o644
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_a_link_in_the_place_of_a_file_is_replaced(folder: Path, victim: Path) -> None:
    """What it pointed to stays."""
    (folder / "file").symlink_to(victim)
    safe_files.replace(folder / "file", b"new")
    assert unharmed(victim) and not (folder / "file").is_symlink()


def test_names_of_scratch_files_cannot_be_guessed(folder: Path, victim: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And even one that was guessed is not followed."""
    monkeypatch.setattr(os, "urandom", bytes)
    (folder / f".file.{'00' * 8}.tmp").symlink_to(victim)
    with pytest.raises(FileExistsError):
        safe_files.replace(folder / "file", b"new")
    assert unharmed(victim) and not (folder / "file").exists()


def test_a_link_in_the_place_of_a_folder_is_refused(tmp_path: Path, folder: Path) -> None:
    """Nothing is written where it leads."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (folder / "diagnoses").symlink_to(elsewhere)
    with pytest.raises(OSError):
        safe_files.make_folder(folder / "diagnoses")
    with pytest.raises(OSError):
        safe_files.replace(folder / "diagnoses" / "file", b"new")
    assert list(elsewhere.iterdir()) == []


def test_touching_follows_no_link(tmp_path: Path, folder: Path, victim: Path) -> None:
    """Neither to a file that exists nor to one that would be made; the link goes."""
    before = victim.stat().st_mtime_ns
    for target in (victim, tmp_path / "new"):
        (folder / "stalled").unlink(missing_ok=True)
        (folder / "stalled").symlink_to(target)
        safe_files.touch(folder / "stalled")
        assert (folder / "stalled").read_bytes() == b"" and not (folder / "stalled").is_symlink()
    assert victim.stat().st_mtime_ns == before and not (tmp_path / "new").exists()


def test_touching_renews_the_time(folder: Path) -> None:
    """Of a file that is old."""
    (folder / "stalled").touch()
    os.utime(folder / "stalled", (1.0, 1.0))
    safe_files.touch(folder / "stalled")
    assert (folder / "stalled").stat().st_mtime > 1.0


def test_nothing_but_files_is_read(folder: Path, victim: Path) -> None:
    """No link, no pipe that would never end, nothing too long."""
    (folder / "link").symlink_to(victim)
    with pytest.raises(OSError):
        safe_files.read(folder / "link", 100)
    os.mkfifo(folder / "pipe")
    with pytest.raises(ValueError, match="not a file"):
        safe_files.read(folder / "pipe", 100)
    with pytest.raises(ValueError, match="more than 3 bytes"):
        safe_files.read(victim, 3)


def test_a_library_meets_no_link(folder: Path, victim: Path) -> None:
    """For SQLite, which follows them."""
    (folder / "usage.db").symlink_to(victim)
    with pytest.raises(OSError):
        safe_files.require_no_link(folder / "usage.db")
    safe_files.require_no_link(folder / "none")
    safe_files.require_no_link(victim)
