"""Calls that pause an engine, end to end: a call that the engine did not accept hides no hang."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import urlsplit

from sidecar.tools.scripted_engine.server import ScriptedEngine

from ..waiting import PATIENCE

# SGLang's; the scripted engine is a vLLM and answers 404
UNKNOWN = ("/release_kv_cache_memory", "/pause_generation", "/update_weights_from_disk")


async def hang_up(sidecar: Any, path: str, announced: str) -> None:
    """Announce a body, send none of it, and leave."""
    url = urlsplit(sidecar.relay)
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    writer.write(f"POST {path} HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\n{announced}\r\n\r\n".encode())
    async with asyncio.timeout(PATIENCE):
        await reader.readuntil(b"\r\n\r\n")  # the relay reads
    writer.close()
    await writer.wait_closed()


async def test_orders_that_the_engine_does_not_know_hide_no_hang(engine: ScriptedEngine, start: Any) -> None:
    """Aborted calls and a 404 leave the pod ready; the hang that follows is found, never exempt."""
    sidecar = await start(engine.url)
    await sidecar.until_verdict("idle")
    for path in (*UNKNOWN, "/sleep", "/pause", "/start_profile"):
        for announced in ("content-length: 10", "transfer-encoding: chunked"):
            await hang_up(sidecar, path, announced)
    for path in UNKNOWN:
        async with sidecar.session.post(sidecar.relay + path) as answer:
            assert answer.status == 404
    assert (await sidecar.get("/readyz"))[0] == 200
    engine.faults.start("freeze")
    await sidecar.until_verdict("stalled")
    assert (await sidecar.get("/livez"))[0] == 503
    states = {v["verdict"] for v in (await sidecar.get("/verdicts"))[1]["verdicts"]}
    assert "exempt" not in states


async def test_a_weight_update_is_exempt_until_its_client_leaves(engine: ScriptedEngine, start: Any) -> None:
    """During the call the engine's silence is no hang; when the client is gone, the engine is judged again."""
    sidecar = await start(engine.url)
    await sidecar.until_verdict("idle")
    asked = asyncio.create_task(sidecar.session.post(sidecar.relay + "/update_weights?seconds=3000"))
    snapshot = await sidecar.until_verdict("exempt")
    assert snapshot["verdict"]["reason"] == "weight_update"
    asked.cancel()
    await sidecar.until_verdict("idle")
    states = {v["verdict"] for v in (await sidecar.get("/verdicts"))[1]["verdicts"]}
    assert "stalled" not in states
