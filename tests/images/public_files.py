"""Image files that others publish, fetched once from the Python package index: for tests/images/test_public_files.py.

    .venv/bin/python tests/images/public_files.py       fetches them, or finds them; the last line is their folder

They are those of Pillow's own tests (its source distribution) and the PngSuite (a copy of which pypng carries). sharp's
package on npm has none of its own. More come from a folder that IMAGE_FIXTURES names.

Rules: standard library only. Nothing is installed. The marker with the pins is written last.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

PINS = ("pillow==13.0.0", "pypng==0.20220715.0")
PNG_SUITE = re.compile(r"'(\w+)': _dehex\(b\"\"\"\n([0-9a-f\n]+)\"\"\"\)")
MAX_BYTES = 20 << 20  # the sidecar's default for one image


def home() -> Path:
    """The folder of all of them; it may not exist yet."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "inference-sidecar" / "public-images"


def complete() -> bool:
    """Whether they were fetched to the end, with these pins."""
    marker = home() / "complete.txt"
    return marker.is_file() and marker.read_text() == "\n".join(PINS)


def make() -> None:
    """Fetch them unless they are there."""
    home().parent.mkdir(parents=True, exist_ok=True)
    with home().with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if complete():
            return
        shutil.rmtree(home(), ignore_errors=True)
        with tempfile.TemporaryDirectory() as folder:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
            subprocess.run([*pip, "--dest", folder, *PINS], check=True, stdout=sys.stderr)
            for archive in Path(folder).glob("*.tar.gz"):
                _unpack(archive)
        (home() / "complete.txt").write_text("\n".join(PINS))


def _unpack(archive: Path) -> None:
    with tarfile.open(archive) as files:
        for member in files:
            path = PurePosixPath(*PurePosixPath(member.name).parts[1:])
            file = files.extractfile(member) if member.isfile() else None
            if file is None:
                continue
            if path.is_relative_to("Tests/images"):
                _keep(PurePosixPath("pillow") / path.relative_to("Tests/images"), file.read())
            elif path == PurePosixPath("code/pngsuite.py"):
                for name, digits in PNG_SUITE.findall(file.read().decode()):
                    _keep(PurePosixPath("pngsuite") / f"{name}.png", bytes.fromhex(digits))


def _keep(path: PurePosixPath, data: bytes) -> None:
    target = home() / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)


def all_files() -> dict[str, bytes]:
    """Path -> content of each that is no larger than the sidecar takes."""
    folders = [home()] if complete() else []
    folders += [Path(more)] if (more := os.environ.get("IMAGE_FIXTURES")) else []
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.stat().st_size <= MAX_BYTES and path.suffix not in (".txt", ".py", ".md")
    }


if __name__ == "__main__":
    make()
    print(home())
