"""kill -9 of any process of the sidecar while the engine works: no liveness probe fails, service continues."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from sidecar.tools.manifests.shell import safe_liveness
from sidecar.tools.scripted_engine.server import ScriptedEngine

from ..waiting import PATIENCE

# kubelet's checks are 10 s apart.
CHECK_INTERVAL_S = 0.2


class Checks:
    """Kubelet's checks of the engine's container, continuously: the exec probe and the manifests' shell line."""

    def __init__(self, state: Path) -> None:
        self.commands = {
            "exec": (sys.executable, "-m", "sidecar", "probe", "live", "--state-dir", str(state)),
            "shell": ("sh", "-c", safe_liveness(str(state))),
        }
        self.passed = dict.fromkeys(self.commands, 0)
        self.failed: list[str] = []

    async def run(self) -> None:
        while True:
            for name, command in self.commands.items():
                process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
                said, _ = await process.communicate()
                if process.returncode:
                    self.failed.append(f"{name}: {said.decode()}")
                self.passed[name] += process.returncode == 0
            await asyncio.sleep(CHECK_INTERVAL_S)


@contextlib.asynccontextmanager
async def checked(state: Path) -> AsyncIterator[None]:
    """Neither check fails at any time in the block, or in one more round after it."""
    checks = Checks(state)
    task = asyncio.create_task(checks.run())
    try:
        yield
        before = dict(checks.passed)
        async with asyncio.timeout(PATIENCE):
            while not checks.failed and any(checks.passed[name] < before[name] + 2 for name in before):  # noqa: ASYNC110
                await asyncio.sleep(CHECK_INTERVAL_S)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert not checks.failed


async def live_again(sidecar: Any, before: int) -> None:
    """Wait until a control process other than `before` answers /livez with 200."""
    async with asyncio.timeout(PATIENCE):
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                if (await sidecar.get("/livez"))[0] == 200 and await sidecar.control() != before:
                    return


async def relays(sidecar: Any) -> list[int]:
    snapshot = await sidecar.until(lambda s: s["relays"] and all(r["pulse_age"] is not None for r in s["relays"]))
    return [r["pid"] for r in snapshot["relays"]]


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_streams_and_counts_outlive_the_control_process(engine: ScriptedEngine, start: Any, workers: str) -> None:
    """kill -9 of control: streams end completely, new requests are served, and each is counted once."""
    sidecar = await start(engine.url, workers=workers)
    await sidecar.until_verdict("idle")
    old, before = await relays(sidecar), await sidecar.control()
    async with contextlib.AsyncExitStack() as open_, checked(sidecar.state):
        engine.faults.start("slow")  # so that the streams outlast what comes, on a busy machine, too
        streams = [await open_.enter_async_context(sidecar.chat(tokens=600)) for _ in range(4)]
        for stream in streams:
            await stream.content.readany()
        await sidecar.until(lambda s: s["load"]["requests_in_flight"] == 4)
        os.kill(before, signal.SIGKILL)
        async with sidecar.chat(tokens=3) as new:  # whether or not the next control is there already
            assert new.status == 200
            assert (await new.text()).rstrip().endswith("data: [DONE]")
        await live_again(sidecar, before)
        engine.faults.clear()
        for stream in streams:
            assert (await stream.text()).rstrip().endswith("data: [DONE]")
        await sidecar.until_metrics('sidecar_requests_total{model="scripted",outcome="ok",tenant="default"} 5.0')
    done = await sidecar.until(lambda s: s["load"]["requests_in_flight"] == 0 and bool(s["tenants"]))
    (tenant,) = done["tenants"]
    assert tenant["requests_total"] == 5 and tenant["tokens_total"] == 4 * 600 + 3
    assert await relays(sidecar) == old


@pytest.mark.parametrize("also_control", [False, True], ids=["relay", "relay and control"])
async def test_a_relay_that_dies_takes_its_streams_and_nothing_else(
    engine: ScriptedEngine, start: Any, also_control: bool
) -> None:
    """kill -9 of the relay, alone or with control: the next one serves, nothing stays in flight, no probe fails."""
    sidecar = await start(engine.url)
    await sidecar.until_verdict("idle")
    (relay,), before = await relays(sidecar), await sidecar.control()
    async with checked(sidecar.state), sidecar.chat(tokens=100_000) as stream:
        await stream.content.readany()
        for pid in [relay, before] if also_control else [relay]:
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(aiohttp.ClientError):
            while await stream.content.readany():
                pass
            raise aiohttp.ClientPayloadError("ended")
        async with sidecar.chat() as again:  # the listening socket was never closed
            assert again.status == 200
            assert (await again.text()).rstrip().endswith("data: [DONE]")
        await live_again(sidecar, before if also_control else 0)
        await sidecar.until(lambda s: s["load"]["requests_in_flight"] == 0)
        async with asyncio.timeout(PATIENCE):
            await engine.until(lambda: engine.open == 0)
    assert await relays(sidecar) != [relay]
    states = {v["verdict"] for v in (await sidecar.get("/verdicts"))[1]["verdicts"]}
    assert not {"stalled", "dead"} & states


async def test_no_connection_is_refused_while_processes_are_replaced(engine: ScriptedEngine, start: Any) -> None:
    """Ports stay open when both die: new connections wait for the next process."""
    sidecar = await start(engine.url)
    await sidecar.until_verdict("idle")
    (relay,), control = await relays(sidecar), await sidecar.control()
    ports = [int(url.rpartition(":")[2]) for url in (sidecar.relay, sidecar.admin)]
    for pid in (relay, control):
        os.kill(pid, signal.SIGKILL)
    for port, path in zip(ports * 10, ("/v1/models", "/livez") * 10, strict=True):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        async with asyncio.timeout(PATIENCE):
            assert b"200 OK" in await reader.readline()
        writer.close()


async def test_sigterm_between_two_control_processes_still_drains(engine: ScriptedEngine, start: Any) -> None:
    """Control is killed and SIGTERM arrives at once: the stream ends completely, and the exit code is 0."""
    sidecar = await start(engine.url, drain_seconds="60")
    await sidecar.until_verdict("idle")
    async with sidecar.chat(tokens=400) as stream:
        await stream.content.readany()
        os.kill(await sidecar.control(), signal.SIGKILL)
        sidecar.process.terminate()
        assert (await stream.text()).rstrip().endswith("data: [DONE]")
    async with asyncio.timeout(PATIENCE):
        assert await sidecar.process.wait() == 0
    assert not (sidecar.state / "stalled").exists()


async def test_nothing_outlives_the_supervisor(engine: ScriptedEngine, start: Any) -> None:
    """kill -9 of the container's first process: all others end with it, and the exec probe passes on."""
    sidecar = await start(engine.url)
    await sidecar.until_verdict("idle")
    await relays(sidecar)
    async with checked(sidecar.state):
        supervisor = psutil.Process(sidecar.process.pid)
        assert supervisor.num_threads() == 1  # it forks
        children = supervisor.children(recursive=True)
        sidecar.process.kill()
        await sidecar.process.wait()
        gone, alive = await asyncio.to_thread(psutil.wait_procs, children, PATIENCE)
    assert len(gone) == 2 and not alive
