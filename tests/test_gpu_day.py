"""The one call for a borrowed GPU: its stages run here against scripted drivers, and a broken one stops no other."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cuda_stub.build import build as build_cuda
from tests.nvml_stub.build import build as build_nvml

ROOT = Path(__file__).resolve().parents[1]


def call(tmp_path: Path, env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks/gpu_all.py"), "--out", str(tmp_path / "out"), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=290, env={**os.environ, **env}, check=False, cwd=tmp_path
    )


def lines_of(tmp_path: Path) -> list[tuple[str, str]]:
    """(stage, what) of each line."""
    lines = map(json.loads, (tmp_path / "out/results.jsonl").read_text().splitlines())
    return [(line["stage"], line["what"]) for line in lines]


@pytest.fixture
def drivers(tmp_path: Path, requires: Callable[[str], Path]) -> dict[str, str]:
    gcc, library = requires("gcc"), tmp_path / "lib"
    build_cuda(gcc, library)
    build_nvml(gcc, library)
    return {"LD_LIBRARY_PATH": str(library), "CUDA_MPS_PIPE_DIRECTORY": str(tmp_path)}


def test_a_stage_that_fails_stops_no_other(tmp_path: Path, drivers: dict[str, str]) -> None:
    """A driver that fails at a copy: what does not copy has its lines, the rest says why, and the table has both."""
    (tmp_path / "script").write_text("cuMemcpyHtoDAsync_v2 719\n")
    env = {**drivers, "CUDA_STUB_SCRIPT": str(tmp_path / "script")}
    done = call(tmp_path, env, "--only", "ceilings", "--only", "versions")
    assert done.returncode == 1 and "719" in done.stdout, done.stdout + done.stderr
    assert ("versions", "device") in lines_of(tmp_path)
    assert "versions | | ok" in (tmp_path / "out/table.md").read_text()


@pytest.mark.slow  # every stage, with kernels in plain C
def test_every_stage_runs(tmp_path: Path, drivers: dict[str, str]) -> None:
    """Bits are held, and each stage adds lines; only the stand-in for an engine needs a real GPU."""
    done = call(tmp_path, drivers, "--budget", "270", "--small")
    assert done.returncode == 0, done.stdout + done.stderr
    found = lines_of(tmp_path)
    stages = runpy.run_path(str(ROOT / "benchmarks/gpu_all.py"))["STAGES"]
    assert {stage for stage, _ in found} == set(stages)
    assert ("nvml", "XIDs after a null write of the sidecar's own") in found
    assert sum(stages.values()) <= 430 and len(list((tmp_path / "out").iterdir())) <= 8
