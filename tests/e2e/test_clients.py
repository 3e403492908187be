"""The clients that users have: each makes the same of an engine with a sidecar before it as of the engine alone."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from sidecar.tools.scripted_engine.server import ScriptedEngine

from ..missing import missing
from .clients import answering, environment
from .conftest import Start

pytestmark = pytest.mark.clients
CALLS = Path(__file__).parent / "clients"
PYTHON_CALLS = ("call_openai.py", "call_anthropic.py", "call_litellm.py", "call_langchain.py")


@pytest.fixture
def installed() -> None:
    """Skips where the clients were not installed."""
    if not environment.is_complete():
        missing("the clients are not installed: `make test-clients` installs them")


@pytest.fixture
async def talking(engine: ScriptedEngine) -> AsyncIterator[str]:
    """The URL of the scripted engine, which here has tools and messages as well."""
    app = answering.create()
    app[answering.ENGINE] = engine.url
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


async def _call(script: str, url: str) -> dict[str, Any]:
    """What a client's script prints."""
    interpreter = environment.python() if script.endswith(".py") else environment.node()
    if interpreter is None:
        missing("node and npm are not installed")
    env = os.environ | {"CLIENTS": str(environment.home()), "NO_PROXY": "*"}
    process = await asyncio.create_subprocess_exec(
        *(str(interpreter), str(CALLS / script), url), stdout=asyncio.subprocess.PIPE, env=env
    )
    printed, _ = await process.communicate()
    assert process.returncode == 0
    found: dict[str, Any] = json.loads(printed)
    return found


def _without_ids(made: Any) -> Any:
    """What a client made, without what differs in each answer."""
    if isinstance(made, dict):
        return {key: _without_ids(value) for key, value in made.items() if key not in ("id", "created")}
    return [_without_ids(item) for item in made] if isinstance(made, list) else made


@pytest.mark.parametrize("script", [*PYTHON_CALLS, "call_openai.mjs"])
async def test_clients(installed: None, start: Start, talking: str, script: str) -> None:
    """Chat, stream, usage, tools and embeddings are the same, and none of them is empty."""
    sidecar = await start(talking)
    direct, relayed = await _call(script, talking), await _call(script, sidecar.relay)
    assert _without_ids(relayed) == _without_ids(direct)
    assert all(direct.values())
