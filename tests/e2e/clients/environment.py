"""Install, once, the clients that users call engines with, for tests/e2e/test_clients.py.

    .venv/bin/python tests/e2e/clients/environment.py      installs them, or finds them; the last line is their folder

Rules: standard library only. Nothing goes into the project's own environment. The marker with the pins is written last;
a folder without it, or with other pins, is made again. Concurrent runs wait for each other.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

PYTHON_CLIENTS = ("openai==3.57.0", "anthropic==2.14.0", "litellm==1.110.2", "langchain-openai==1.7.4")
NODE_CLIENTS = ("openai@6.49.0",)
PINS = "\n".join((*PYTHON_CLIENTS, *NODE_CLIENTS, ""))


def home() -> Path:
    """The folder of both environments; it may not exist yet."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "inference-sidecar" / "clients"


def python() -> Path:
    """The interpreter that has the Python clients."""
    return home() / "python" / "bin" / "python"


def node() -> Path | None:
    """The interpreter of the JavaScript client; None where there is none."""
    found = shutil.which("node")
    return Path(found) if found and shutil.which("npm") else None


def is_complete() -> bool:
    """Whether the clients were installed to the end, with these pins."""
    marker = home() / "complete.txt"
    return marker.is_file() and marker.read_text() == PINS


def make() -> None:
    """Install the clients unless they are there."""
    home().parent.mkdir(parents=True, exist_ok=True)
    with home().with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_complete():
            return
        shutil.rmtree(home(), ignore_errors=True)
        home().mkdir()
        _run(_uv(), "venv", "--quiet", "--python", sys.executable, str(home() / "python"))
        _run(_uv(), "pip", "install", "--quiet", "--python", str(python()), "--compile-bytecode", *PYTHON_CLIENTS)
        if node() is not None:
            _run("npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(home()), *NODE_CLIENTS)
        (home() / "complete.txt").write_text(PINS)


def _uv() -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    found = shutil.which("uv", path=path)
    if not found:
        raise SystemExit(f"uv is not installed: {sys.executable} -m pip install uv")
    return found


def _run(*command: str) -> None:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run(command, env=env, check=True, stdin=subprocess.DEVNULL)


if __name__ == "__main__":
    make()
    print(home())
