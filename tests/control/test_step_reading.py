"""The control loop reads the steps of every kind of engine whose scheduler the plug-in knows."""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import pytest

from sidecar.control import process
from sidecar.control.state_dir import StateDir
from sidecar.engines.registry import KINDS
from sidecar.launch import engine_plugin
from sidecar.load import cost_model
from sidecar.readings import Value
from sidecar.runtime.plugin_folders import PLUGIN_FOLDER
from sidecar.settings import Settings, load

from ..waiting import PATIENCE

# Begins one step, as a scheduler does, and stays until its input ends.
CORE = """
import sys
from pathlib import Path
from sidecar_vllm import steps
path = steps.choose_path(steps.PLUGIN)
begin, _ = steps.open_file(path)
begin(512, 2, 1)
print(path, flush=True)
sys.stdin.read()
Path(path).unlink()
"""
# By what the plug-in has an entry point for: not by the table that the code asks.
LOADED_BY = {"vllm.general_plugins": "vllm", "sglang.srt.plugins": "sglang"}


def test_the_table_of_kinds_has_each_engine_that_loads_the_plugin() -> None:
    """The entry points say which engines load it."""
    groups = {line.strip("[]") for line in engine_plugin.ENTRY_POINTS.splitlines() if line.startswith("[")}
    assert {LOADED_BY[group] for group in groups} == {name for name, kind in KINDS.items() if kind.has_plugin}


@pytest.mark.parametrize("kind", LOADED_BY.values())
async def test_the_loop_reads_the_steps(kind: str, tmp_path: Path) -> None:
    """A step of the engine reaches the readings that a tick judges by."""
    chosen = load(Settings, {"engine": "http://127.0.0.1:9", "engine_kind": kind}, {})
    assert engine_plugin.write(str(tmp_path))
    env = os.environ | {"PYTHONPATH": str(tmp_path / PLUGIN_FOLDER)}
    pipe = asyncio.subprocess.PIPE
    core = await asyncio.create_subprocess_exec(sys.executable, "-c", CORE, env=env, stdin=pipe, stdout=pipe)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(core.communicate, b"")  # its input ends, and so it does
        assert core.stdout is not None and await core.stdout.readline()
        session = await stack.enter_async_context(aiohttp.ClientSession())
        loop = process.build(chosen, cost_model.Coefficients(), StateDir(str(tmp_path)), session, stack)
        ticks = asyncio.create_task(loop.run())
        try:
            async with asyncio.timeout(PATIENCE):
                while not isinstance(found := loop.steps.read(), Value):  # noqa: ASYNC110  a reading has no event
                    await asyncio.sleep(0.05)
        finally:
            ticks.cancel()
            await asyncio.gather(ticks, return_exceptions=True)
            await loop.close()
    [seen] = found.value
    assert (seen.pid, seen.steps, seen.last_tokens, seen.running, seen.waiting) == (core.pid, 1, 512, 2, 1)
