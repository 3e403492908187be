"""A hung GPU driver affects nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sidecar.tools.scripted_engine.server import ScriptedEngine

from ..nvml_stub.build import build


@pytest.mark.slow
@pytest.mark.parametrize("function", ["nvmlInitWithFlags", "nvmlDeviceGetFieldValues"])
async def test_a_driver_that_hangs_costs_its_own_numbers_only(
    function: str, engine: ScriptedEngine, start: Any, tmp_path: Path, requires: Callable[[str], Path]
) -> None:
    """NVML hangs in its init or later: probes pass, requests are served, the load reports why NVML is missing."""
    library, script = build(requires("gcc"), tmp_path / "lib"), tmp_path / "script"
    script.write_text(f"hang {function}")
    sidecar = await start(engine.url, environ={"LD_LIBRARY_PATH": str(library), "NVML_STUB_SCRIPT": str(script)})
    await sidecar.until_verdict("idle")
    await sidecar.until_metrics('sidecar_signal_up{signal="gpu"} 0.0')
    load = (await sidecar.get("/load"))[1]
    assert load["gpu"] is None and "NVML did not answer" in load["gpu_absent"]
    async with sidecar.chat() as answer:
        assert answer.status == 200 and (await answer.text()).rstrip().endswith("data: [DONE]")
    assert (await sidecar.get("/livez"))[0] == (await sidecar.get("/readyz"))[0] == 200
    script.write_text("")
    await sidecar.until_metrics('sidecar_signal_up{signal="gpu"} 1.0', 'sidecar_gpu_power_watts{gpu="0"} 640.5')
    assert await sidecar.stop() == 0
