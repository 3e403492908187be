"""Containers for tests without a registry: a base image made by debootstrap, the project's image, and podman.

Rules: standard library only, root only. Everything lies in one folder of the cache, podman's store included, so that
nothing touches the machine's own images. The root of the base image is made once, images are built with podman's
layer cache, and what is a day old goes.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("podman", "runc", "debootstrap", "catatonit")  # the last starts the container that holds a pod's namespaces
DEBIAN, PYTHON = "trixie", "3.13"
BASE = f"docker.io/library/python:{PYTHON}-slim-{DEBIAN}"  # the name that the Dockerfile asks for
IMAGE = "localhost/inference-sidecar:test"
PACKAGES = f"python{PYTHON},python{PYTHON}-venv,libpython{PYTHON}-dev,ca-certificates"
CERTIFICATES = "etc/ssl/certs/ca-certificates.crt"
FREE_BYTES = 4 << 30
COMMAND_TIMEOUT_S = 120.0
BUILD_TIMEOUT_S = 900.0
# Debian's podman needs no more of a machine than this: no raised limits, no systemd, either version of cgroups.
CONTAINERS_CONF = """\
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""


class Unavailable(Exception):
    """Containers cannot run here; the message says why."""


class Podman:
    """podman over a store of its own below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        conf = folder / "containers.conf"
        conf.write_text(CONTAINERS_CONF)
        self._env = {**os.environ, "CONTAINERS_CONF": str(conf)}
        self._command = ("podman", "--root", str(folder / "store"), "--runroot", str(folder / "run"))

    def run(self, *args: str, timeout: float = COMMAND_TIMEOUT_S, **options: Any) -> subprocess.CompletedProcess[str]:
        """One command; its output as text. Its exit status is the caller's to look at."""
        return subprocess.run(
            (*self._command, *args), env=self._env, capture_output=True, text=True, timeout=timeout, **options
        )

    def must(self, *args: str, timeout: float = COMMAND_TIMEOUT_S, **options: Any) -> str:
        """Standard output of a command that must succeed."""
        done = self.run(*args, timeout=timeout, **options)
        assert done.returncode == 0, f"podman {' '.join(args)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    def raw(self, *args: str, data: bytes, timeout: float = COMMAND_TIMEOUT_S) -> bytes:
        """Standard output as bytes of a command that gets `data` and must succeed."""
        command = (*self._command, *args)
        return subprocess.run(
            command, env=self._env, input=data, stdout=subprocess.PIPE, timeout=timeout, check=True
        ).stdout

    def inspect(self, name: str) -> Any:
        """What podman knows of a container or an image."""
        return json.loads(self.must("inspect", name))[0]

    def pid(self, name: str) -> int:
        """The container's first process, as this machine numbers it; 0 if it does not run."""
        done = self.run("inspect", "--format", "{{.State.Pid}}", name)
        return int(done.stdout) if done.returncode == 0 else 0

    def build(self, tag: str = IMAGE, **args: str) -> None:
        """The project's image from this checkout, on the base image."""
        self._make_base()
        self.run("image", "prune", "--force", "--filter", "until=24h")
        options = [f"--build-arg={name}={value}" for name, value in args.items()]
        self.must("build", "--network=host", *options, "-t", tag, str(ROOT), timeout=BUILD_TIMEOUT_S)

    def _make_base(self) -> None:
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.run("image", "exists", BASE).returncode == 0:
                return
            root = self.folder / f"{DEBIAN}-root"
            if not (root / "made").exists():
                shutil.rmtree(root, ignore_errors=True)
                make_root(root)
            env = (
                "PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin",
                f"SSL_CERT_FILE=/{CERTIFICATES}",
            )
            changes = [f"--change=ENV {line}" for line in env] + ['--change=CMD ["python"]']
            with subprocess.Popen(["tar", "-C", str(root), "-c", "."], stdout=subprocess.PIPE) as archive:
                self.must("import", *changes, "-", BASE, stdin=archive.stdout, timeout=BUILD_TIMEOUT_S)
            assert archive.returncode == 0


def make_root(root: Path) -> None:
    """A Debian with Python where Docker's images have it, that trusts whom this machine trusts."""
    command = ("debootstrap", "--variant=minbase", f"--include={PACKAGES}", DEBIAN, str(root))
    done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    for name in ("python", "python3"):
        (root / "usr/local/bin" / name).symlink_to(f"/usr/bin/python{PYTHON}")
    if Path("/", CERTIFICATES).exists():
        shutil.copy(Path("/", CERTIFICATES), root / CERTIFICATES)
    for waste in ("var/cache/apt/archives", "var/lib/apt/lists"):
        shutil.rmtree(root / waste)
        (root / waste).mkdir()
    (root / "made").touch()


def folder() -> Path:
    """Where all of it lies."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "inference-sidecar" / "containers"


def available() -> Podman:
    """podman, once it can run containers. Raises Unavailable."""
    missing = [name for name in TOOLS if not (shutil.which(name) or Path("/usr/libexec/podman", name).exists())]
    if missing:
        raise Unavailable(f"not installed: {', '.join(missing)}")
    if os.geteuid() != 0:
        raise Unavailable("real containers are made by root here")
    podman = Podman(folder())
    if (free := shutil.disk_usage(podman.folder).free) < FREE_BYTES:
        raise Unavailable(
            f"{FREE_BYTES >> 30} GiB of free disk are needed under {podman.folder}: {free >> 30} are free"
        )
    info = podman.run("info")
    if info.returncode:
        raise Unavailable(f"podman info: {(info.stderr.strip().splitlines() or ['failed'])[-1]}")
    return podman
