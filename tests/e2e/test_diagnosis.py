"""End to end: a hung engine process, a verdict, and a bundle about the process without any user's data."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest

from ..ports import free_port
from ..waiting import PATIENCE

PROMPT = "the marked words of a user"


@pytest.fixture
async def engine_process() -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """`sidecar engine` as a separate process, and its URL."""
    port = free_port()
    command = [sys.executable, "-m", "sidecar", "engine", "--listen", f"127.0.0.1:{port}"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("SIDECAR_")}
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, env=env)
    assert process.stdout is not None
    async with asyncio.timeout(PATIENCE):
        await process.stdout.readline()
    yield process, f"http://127.0.0.1:{port}"
    process.kill()
    await process.wait()


@pytest.mark.slow
async def test_a_stopped_engine_process_is_named_before_it_is_killed(engine_process: Any, start: Any) -> None:
    """The list, the log, the page and the bundle all report `stopped (T)`, and the engine stays stopped."""
    process, url = engine_process
    sidecar = await start(url)
    await sidecar.until_verdict("idle")
    async with sidecar.chat(tokens=100_000, text=PROMPT, **{"x-tenant-id": "acme-tenant"}) as stream:
        await stream.content.readany()
        process.send_signal(signal.SIGSTOP)
        await sidecar.until_verdict("stalled")
        await sidecar.until(lambda s: any("stopped (T)" in d["summary"] for d in s["diagnoses"]))
        bundle = await _complete(sidecar)
    assert bundle["processes"][0]["pid"] == process.pid and bundle["complete"]
    assert [look["state"] for look in bundle["processes"][0]["looks"]] == ["T", "T"]
    assert "vllm:num_requests_running" in bundle["engine_metrics"] and bundle["engine_metrics_age"] > 0
    assert bundle["verdict"] == "stalled" and bundle["outstanding"] and bundle["changes"]
    text = str(bundle)
    assert PROMPT not in text and "acme-tenant" not in text
    path = "/diagnoses/" + (await sidecar.get("/diagnoses"))[1]["diagnoses"][0]["id"]
    async with sidecar.session.get(sidecar.admin + path, headers={"Accept": "text/html"}) as page:
        shown = await page.text()
    assert page.content_type == "text/html" and "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert "stopped (T)" in shown and "<pre>" in shown and PROMPT not in shown
    assert (await sidecar.get("/diagnoses/..%2fverdict"))[0] == 404


async def _complete(sidecar: Any) -> dict[str, Any]:
    """The newest bundle, once the log reports that both rounds are in it."""
    async with asyncio.timeout(PATIENCE):
        while not any("taken" in line and "stopped (T)" in line for line in sidecar.log):  # noqa: ASYNC110  a log has no event
            await asyncio.sleep(0.1)
    listed = (await sidecar.get("/diagnoses"))[1]["diagnoses"]
    bundle: dict[str, Any] = (await sidecar.get("/diagnoses/" + listed[0]["id"]))[1]
    return bundle
