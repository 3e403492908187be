"""Few file descriptors, and clients that hold them: probes are answered and the verdict file is fresh."""

from __future__ import annotations

import asyncio
import json
import resource
from collections.abc import AsyncIterator
from typing import Any

import pytest

from sidecar.tools.scripted_engine.server import ScriptedEngine

from ..waiting import PATIENCE


@pytest.fixture
def many_files() -> None:
    """Enough files for this process, which plays the clients; skips where it may not have them."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4096:
        pytest.skip("this process may not open 4096 files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, hard))


async def hold(url: str, begun: bytes, count: int) -> AsyncIterator[asyncio.StreamWriter]:
    """Connections that a client opens and never uses."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    for _ in range(count):
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(begun)
        yield writer


async def next_verdict(sidecar: Any) -> Any:
    """The verdict file that is written after this call."""
    path = sidecar.state / "verdict.json"
    before = path.stat().st_mtime_ns
    async with asyncio.timeout(PATIENCE):
        while path.stat().st_mtime_ns == before:  # noqa: ASYNC110  a file has no event
            await asyncio.sleep(0.1)
    return json.loads(path.read_text())


@pytest.mark.usefixtures("many_files")
@pytest.mark.parametrize(("begun", "count"), [(b"", 1100), (b"GET /livez HTTP/1.1\r\nhost:", 2000)])
async def test_idle_connections_to_the_admin_port_starve_no_probe(
    engine: ScriptedEngine, start: Any, begun: bytes, count: int
) -> None:
    """Soft and hard limit 1024: while one client holds all it can, probes, metrics and verdict file go on."""
    sidecar = await start(engine.url, open_files="1024")
    await sidecar.until_verdict("idle")
    writers = [writer async for writer in hold(sidecar.admin, begun, count)]
    for path in ("/livez", "/readyz", "/startupz", "/metrics", "/load"):
        assert (await sidecar.get(path))[0] == 200
    for _ in range(2):
        assert (await next_verdict(sidecar))["verdict"] == "idle"
    assert (await sidecar.get("/livez"))[0] == 200
    for writer in writers:
        writer.close()
