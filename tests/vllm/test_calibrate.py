"""`sidecar calibrate`, in a short form, next to a real vLLM with images."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import aiohttp
import pytest

from sidecar.load import cost_model
from sidecar.tools.calibrate import capabilities
from sidecar.tools.calibrate.prompts import PromptTarget

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
    assert "3 of 3 were cached, as reported by the engine" in done.stdout and ", median " in done.stdout
    co = cost_model.from_json(out.read_text())
    assert co.model == processes.MODEL and co.engine == environment.VERSION and co.batch == 4
    assert not co.no_cached and co.median_ape <= co.p90 and ("no capacity" in done.stdout) is bool(co.no_capacity)
    assert co.source.startswith("calibrated") and co.d > 0 and cost_model.unit_ms(co) > 0
    identity = json.loads(kept.read_text().splitlines()[0])
    assert identity["flags"]["enable_prefix_caching"] == "True" and identity["tokens"] == {
        "448": 192,
        "672": 432,
        "896": 768,
    }
    took("calibrate", sum(json.loads(line)["seconds"] for line in kept.read_text().splitlines()[2:]))


@pytest.mark.parametrize(
    ("flags", "expected"), [(("--enable-prefix-caching",), ""), ((), capabilities.NOT_CACHED)], ids=["on", "off"]
)
async def test_what_a_real_vllm_had_cached_is_read_from_its_counters(
    model: Callable[[str], Path], tmp_path: Path, flags: tuple[str, ...], expected: str
) -> None:
    """Without --enable-prompt-tokens-details responses do not report it; counters show whether there is a cache."""
    with processes.engine(model("text"), tmp_path / "engine.log", more=flags) as running:
        async with aiohttp.ClientSession() as session:
            target = PromptTarget(session, running.url)
            found = await capabilities.probe_capabilities(target, "vllm", "", 0)
    assert (found.no_cached, found.kind, found.context) == (expected, "vllm", 4096)
