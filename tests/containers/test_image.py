"""The image as users build it: what is in it, what it is called, and that it runs with nothing but its own rights."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sidecar.tools import synthetic_photos

from .environment import BASE, ROOT, Podman
from .pods import wait_for

pytestmark = [pytest.mark.containers, pytest.mark.timeout(1500)]

HARDENED = (
    "--network=none",
    "--read-only",
    "--read-only-tmpfs=false",  # nothing is writable but what the manifests mount
    "--cap-drop=all",
    "--security-opt=no-new-privileges",
    "--mount=type=tmpfs,destination=/run/sidecar,U=true",
    "--mount=type=tmpfs,destination=/tmp,U=true",
)
MAX_BYTES = 300_000_000  # what the image adds to its base: 217 MB on 2026-11-30, and no 5 GB of CUDA
PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "min_pixels": 3136,
    "max_pixels": 448 * 448,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
}
# Pixels as a worker makes them, by the image's own codecs and kernel.
PREPARE = """
import sys
from sidecar.images.protocol import RAW, TENSORS, ImageJob, ImageLimits
from sidecar.images.worker.pipeline import prepare_image
from sidecar.kernels import families
spec = families.from_config(__import__("json").loads(sys.argv[1]))
job = ImageJob(sys.argv[2], spec.to_json(), False, ImageLimits(1 << 24, 1 << 24), 60.0, False)
sys.stdout.buffer.write(prepare_image(job, sys.stdin.buffer.read())[1])
"""


def test_labels_name_what_it_is(podman: Podman, image: str) -> None:
    """The labels that registries and scanners read, the user, and what starts."""
    config = podman.inspect(image)["Config"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    label = {name.removeprefix("org.opencontainers.image."): value for name, value in config["Labels"].items()}
    assert (label["title"], label["version"], label["licenses"]) == (project["name"], project["version"], "Apache-2.0")
    assert (label["revision"], label["source"]) == ("0123456789abcdef", "https://example.org/sidecar")
    assert (label["created"], label["base.name"]) == ("2026-01-01T00:00:00Z", BASE)
    assert (config["User"], config["Entrypoint"], config["Cmd"]) == ("65532:65532", ["sidecar"], ["run"])
    assert podman.must("run", "--rm", *HARDENED, image, "--version") == f"sidecar, version {project['version']}\n"


def test_it_is_small_and_has_no_torch(podman: Podman, image: str) -> None:
    """What it adds to its base; no compiler, no pip and no torch are among it."""
    added = podman.inspect(image)["Size"] - podman.inspect(BASE)["Size"]
    assert 50_000_000 < added < MAX_BYTES
    code = "import importlib.util as u; print([m for m in ('torch', 'pip', 'uv') if u.find_spec(m)])"
    found = podman.must("run", "--rm", *HARDENED, "--entrypoint=python", image, "-c", code)
    assert found == "[]\n"
    assert podman.run("run", "--rm", *HARDENED, "--entrypoint=sh", image, "-c", "command -v gcc g++ cc").returncode


@pytest.fixture
def running(podman: Podman, image: str) -> Iterator[str]:
    """The image with nothing but its own rights, running; it has no engine yet."""
    name = "sidecar-test-alone"
    podman.run("rm", "--force", "--time=2", name)
    podman.must("run", "--detach", "--name", name, *HARDENED, image, "run", "--engine", "http://127.0.0.1:8000")
    try:
        wait_for(lambda: healthy(podman, name), "the sidecar to be healthy")
        yield name
    finally:
        podman.run("rm", "--force", "--time=2", name)


def healthy(podman: Podman, name: str) -> bool:
    """Whether /healthz answers 200, asked from within."""
    code = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9400/healthz').status)"
    return podman.run("exec", name, "python", "-c", code).stdout == "200\n"


def test_it_runs_with_no_rights(podman: Podman, running: str) -> None:
    """The kernel says of each process: user 65532, no capability, none to be gained, system calls filtered."""
    pids = podman.must("top", running, "hpid").split()[1:]
    assert len(pids) >= 3, "supervisor, control, relay"
    for pid in pids:
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        assert set(status["Uid"].split()) == set(status["Gid"].split()) == {"65532"}
        assert {int(status[name], 16) for name in ("CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb")} == {0}
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    for path in ("/opt/sidecar/x", "/etc/x", "/x", "/home/x"):
        done = podman.run("exec", running, "sh", "-c", f"echo > {path}")
        assert done.returncode and "ead-only file system" in done.stderr, path


def test_it_ends_on_sigterm(podman: Podman, running: str) -> None:
    """`podman stop` sends SIGTERM; status 0 says that it ended by itself, 137 would be the kill after ten seconds."""
    podman.must("stop", "--time=10", running)
    assert podman.inspect(running)["State"]["ExitCode"] == 0


def test_doctor_finds_nothing_wrong(podman: Podman, image: str, tmp_path: Path) -> None:
    """In the container, next to an engine, doctor ends with 0, and images can be prepared."""
    tmp_path.chmod(0o755)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    script = (
        "sidecar engine --listen 127.0.0.1:8000 & "
        "python -c \"import socket,time\nwhile socket.socket().connect_ex(('127.0.0.1', 8000)): time.sleep(0.1)\"; "
        "sidecar doctor --engine http://127.0.0.1:8000 --model /model"
    )
    where = (*HARDENED, f"--volume={tmp_path}:/model:ro", "--entrypoint=sh")
    done = podman.run("run", "--rm", *where, image, "-c", script)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "JPEG by simplejpeg" in done.stdout


@pytest.mark.parametrize("want", ["raw", "tensors"])
def test_its_codecs_give_the_same_bits(podman: Podman, image: str, want: str) -> None:
    """A JPEG, a WebP and a PNG, prepared in the image and here: another build of the kernel and codecs, equal bits."""
    script = [PREPARE, json.dumps(PROCESSOR), want]
    for format in ("JPEG", "WEBP", "PNG"):
        file = io.BytesIO()
        Image.fromarray(synthetic_photos.pixels(901, 677, 5)).save(file, format)
        made = prepared(podman, image, script, file.getvalue())
        here = prepared(None, image, script, file.getvalue())
        assert len(made) > 100_000 and np.array_equal(np.frombuffer(made, np.uint8), np.frombuffer(here, np.uint8))


def prepared(podman: Podman | None, image: str, script: list[str], data: bytes) -> bytes:
    """What the pipeline makes of a file: in the container, or here without one."""
    if podman is None:
        command: tuple[str, ...] = (sys.executable, "-c", *script)
        return subprocess.run(command, cwd=ROOT, input=data, capture_output=True, check=True, timeout=120).stdout
    return podman.raw("run", "--rm", "--interactive", *HARDENED, "--entrypoint=python", image, "-c", *script, data=data)
