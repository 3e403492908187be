"""The one call for a borrowed GPU: its stages run here against scripted drivers, and a broken one stops no other."""

from __future__ import annotations

import json
import os
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
    done = call(tmp_path, env, "--only", "ceilings", "--only", "nvml")
    assert done.returncode == 1 and "719" in done.stdout, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out/nvml.jsonl").read_text().splitlines()]
    assert "power, us" in [line["what"] for line in lines]
    assert "nvml | | ok" in (tmp_path / "out/table.md").read_text()


@pytest.mark.slow  # every stage, with kernels in plain C
def test_every_stage_runs(tmp_path: Path, drivers: dict[str, str]) -> None:
    """Bits are held, and each stage adds lines; only the stand-in for an engine needs a real GPU."""
    done = call(tmp_path, drivers, "--budget", "270", "--small")
    assert done.returncode == 0, done.stdout + done.stderr
    for stage in ("versions", "bits", "kernel", "jpeg", "service", "memory", "ceilings", "nvml", "interference"):
        assert (tmp_path / f"out/{stage}.jsonl").read_text(), stage
