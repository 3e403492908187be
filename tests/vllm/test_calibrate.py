"""`sidecar calibrate`, in a short form, next to a real vLLM with images."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sidecar.load import cost_model

from . import environment, processes
from .processes import Engine

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

FLAGS = ("--enable-prefix-caching", "--enable-prompt-tokens-details")


@pytest.fixture
def caching(model: Callable[[str], Path], tmp_path: Path) -> Iterator[Engine]:
    """A vLLM that reports its prefix cache."""
    with processes.engine(model("vision"), tmp_path / "engine.log", more=FLAGS) as running:
        yield running


def test_a_real_vllm_is_calibrated(caching: Engine, tmp_path: Path, took: Callable[[str, float], None]) -> None:
    """A short run writes a file that `sidecar run` reads; its report has held-out errors, cached prompts and photos."""
    out, kept = tmp_path / "co.json", tmp_path / "all.jsonl"
    command = [
        sys.executable,
        "-m",
        "sidecar",
        "calibrate",
        "--engine",
        caching.url,
        "--model",
        str(caching.model),
        "--out",
        str(out),
        "--measurements",
        str(kept),
        "--seconds",
        "30",
        "--concurrency",
        "4",
    ]
    done = subprocess.run(command, cwd=processes.ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "held out: MAPE" in done.stdout and "alpha-beta line: MAPE" in done.stdout and "448px" in done.stdout
    assert "c/" in done.stdout, "shapes with a cached part"
    co = cost_model.from_json(out.read_text())
    assert co.model == processes.MODEL and co.engine == environment.VERSION and co.batch == 4
    assert co.source.startswith("calibrated") and co.d > 0 and cost_model.unit_ms(co) > 0
    identity = json.loads(kept.read_text().splitlines()[0])
    assert identity["flags"]["enable_prefix_caching"] == "True" and identity["tokens"] == {
        "448": 192,
        "672": 432,
        "896": 768,
    }
    took("calibrate", sum(json.loads(line)["seconds"] for line in kept.read_text().splitlines()[2:]))
