"""A real vLLM hangs in different ways: its class is named, its core's steps are seen, and a proof kills at 30 s.

The plug-in comes by PYTHONPATH from the state directory, as `sidecar run` writes it there. A second plug-in, of this
test, makes the core's main thread wait for a lock or a compiler when a signal tells it, or slows its steps down.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from sidecar.launch import engine_plugin
from sidecar.readings import CoreSteps, Value
from sidecar.signals.engine_steps import EngineSteps

from ..signals.test_hang_watch import frozen
from . import client, processes
from .client import Http
from .processes import Engine, Sidecar

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

FAULTS = """
import os, signal, subprocess, threading, time
def lock(*_):
    held = threading.Lock(); held.acquire(); held.acquire()
def compile(*_):
    subprocess.run([os.environ["TEST_COMPILER"], "60"])
def register():
    try:
        signal.signal(signal.SIGUSR1, lock); signal.signal(signal.SIGUSR2, compile)
    except ValueError:
        return
    from vllm.v1.core.sched.scheduler import Scheduler
    update = Scheduler.update_from_output
    def slowly(self, *args, **kwargs):
        if os.path.exists(os.environ["TEST_SLOW"]): time.sleep(1.8)
        return update(self, *args, **kwargs)
    Scheduler.update_from_output = slowly
"""
CHUNK = 32  # tokens of a step
PROMPT = " ".join(["the"] * 1000)
SETTINGS = {"silence_floor": "12", "silence_kill": "75", "silence_cap": "900", "canary_interval": "5"}


@dataclass
class Place:
    """One engine with a state directory, over several sidecars."""

    engine: Engine
    state: Path
    slow: Path
    steps: EngineSteps = field(init=False)

    def __post_init__(self) -> None:
        self.steps = EngineSteps(self.state)

    def core(self) -> CoreSteps:
        self.steps.refresh()
        found = self.steps.read()
        assert isinstance(found, Value), found
        [core] = found.value
        return core


@pytest.fixture(scope="module")
def place(model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A vLLM with both plug-ins, whose steps are of 32 tokens."""
    folder = tmp_path_factory.mktemp("proof")
    state, faults, compiler = folder / "state", folder / "faults", folder / "ptxas"
    (faults / "test_faults-1.dist-info").mkdir(parents=True)
    (faults / "test_faults.py").write_text(FAULTS)
    (faults / "test_faults-1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: test-faults\nVersion: 1\n"
    )
    points = "[vllm.general_plugins]\ntest_faults = test_faults:register\n"
    (faults / "test_faults-1.dist-info" / "entry_points.txt").write_text(points)
    shutil.copy("/bin/sleep", compiler)
    state.mkdir()
    environ = {
        "PYTHONPATH": f"{engine_plugin.write(str(state))}:{faults}",
        "TEST_COMPILER": str(compiler),
        "TEST_SLOW": str(folder / "slow"),
    }
    more = ("--max-num-batched-tokens", str(CHUNK), "--max-num-seqs", "8")
    log = folder / "engine.log"
    with processes.engine(model("text"), log, environ=environ, more=more) as engine:
        yield Place(engine, state, folder / "slow")


@pytest.fixture
async def sidecar(place: Place, tmp_path: Path, http: Http) -> AsyncIterator[Sidecar]:
    """A sidecar with the times of production, which knows this engine's gaps."""
    with processes.sidecar(place.engine.url, place.state, tmp_path / "sidecar.log", **SETTINGS) as running:
        await client.until(lambda: is_verdict(http, running, "idle"), "idle")
        for _ in range(12):
            await client.stream(http, f"{running.url}/v1/completions", client.completion("1", max_tokens=3))
        yield running


async def is_verdict(http: Http, sidecar: Sidecar, verdict: str) -> bool:
    return (await client.probe(http, f"{sidecar.admin}/livez"))[1] == verdict


async def evidence(http: Http, sidecar: Sidecar) -> dict[str, Any]:
    async with http.get(f"{sidecar.admin}/livez") as answer:
        body = await answer.json()
        return {"live": answer.status, "detail": body["detail"], **body["evidence"]}


@dataclass
class Outcome:
    """When readiness and liveness failed after the fault, and what was said."""

    unready: float | None = None
    killed: float | None = None
    last: dict[str, Any] = field(default_factory=dict)
    classes: set[str] = field(default_factory=set)


async def watched(http: Http, sidecar: Sidecar, seconds: float) -> Outcome:
    """What the probes say for so long, or until liveness fails."""
    began, seen = time.monotonic(), Outcome()
    while time.monotonic() < began + seconds and seen.killed is None:
        seen.last = await evidence(http, sidecar)
        age = time.monotonic() - began
        if seen.unready is None and await client.status(http, f"{sidecar.admin}/readyz") == 503:
            seen.unready = age
        if seen.last["hang"]:
            seen.classes.add(seen.last["hang"])
        seen.killed = age if seen.last["live"] == 503 else None
        await asyncio.sleep(0.2)
    return seen


@contextlib.asynccontextmanager
async def streaming(http: Http, sidecar: Sidecar) -> AsyncIterator[None]:
    """A long stream is open; how it ends is not asked."""
    body = client.completion("Go on.", max_tokens=3500, stream=True)
    async with http.post(f"{sidecar.url}/v1/completions", json=body) as answer:
        await answer.content.readline()
        reading = asyncio.create_task(drained(answer))
        yield
        reading.cancel()


async def drained(answer: Any) -> None:
    with contextlib.suppress(Exception):
        await answer.read()


async def test_a_chunked_prefill_moves_the_steps(place: Place, http: Http) -> None:
    """Each chunk is a step with its tokens; at the end nothing is left."""
    before = place.core()
    await client.ask(http, f"{place.engine.url}/v1/completions", client.completion(PROMPT, max_tokens=2))
    after = place.core()
    assert after.tokens - before.tokens >= 1000 and after.steps - before.steps >= 1000 / CHUNK
    assert (after.running, after.waiting) == (0, 0) and after.last_tokens <= CHUNK
    assert after.pid == place.engine.process("EngineCore").pid


@pytest.mark.parametrize("title", ["EngineCore", "api"])
async def test_a_stopped_process_is_proved(place: Place, sidecar: Sidecar, http: Http, took: Any, title: str) -> None:
    """SIGSTOP of the core, or of the front end: killed at 30 s instead of 75."""
    process = place.engine.root if title == "api" else place.engine.process(title)
    async with streaming(http, sidecar):
        process.send_signal(signal.SIGSTOP)
        try:
            seen = await watched(http, sidecar, 100)
        finally:
            process.send_signal(signal.SIGCONT)
    took(f"SIGSTOP of {title}: not ready", seen.unready or -1)
    took(f"SIGSTOP of {title}: killed", seen.killed or -1)
    assert (seen.last["hang"], seen.last["proof"]) == ("stopped", "processes"), seen
    assert seen.killed is not None and seen.killed < 60, seen


async def test_a_frozen_control_group_is_named_and_not_proved(
    place: Place, sidecar: Sidecar, http: Http, took: Any
) -> None:
    """The core is frozen and thawed after 40 s: a doubt, and no kill."""
    core = place.engine.process("EngineCore")
    async with streaming(http, sidecar):
        with frozen(core.pid, ends=False):
            seen = await watched(http, sidecar, 40)
    took("frozen for 40 s: not ready", seen.unready or -1)
    assert (seen.killed, seen.classes) == (None, {"frozen"}), seen
    await client.until(lambda: is_verdict(http, sidecar, "idle"), "idle after the frost")


async def test_a_compile_of_60_s_is_named_and_outlived(place: Place, sidecar: Sidecar, http: Http, took: Any) -> None:
    """The core waits for a compiler: not ready within seconds, since its step stands, and never killed."""
    async with streaming(http, sidecar):
        place.engine.process("EngineCore").send_signal(signal.SIGUSR2)
        seen = await watched(http, sidecar, 58)
    took("a compile of 60 s: not ready", seen.unready or -1)
    assert (seen.killed, seen.classes) == (None, {"compiling"}), seen
    assert seen.unready is not None and seen.last["core_stands"], seen
    await client.until(lambda: is_verdict(http, sidecar, "idle"), "idle after the compile")


async def test_a_prefill_of_200_s_stays_ready(place: Place, sidecar: Sidecar, http: Http, took: Any) -> None:
    """Chunks of 1.8 s each, and canaries that wait behind them: its tokens move."""
    place.slow.touch()
    try:
        body = client.completion(" ".join(["the"] * 3500), max_tokens=1, stream=True)
        asking = asyncio.create_task(drained_post(http, f"{sidecar.url}/v1/completions", body))
        began = time.monotonic()
        seen = await watched(http, sidecar, 190)
        assert (seen.unready, seen.killed) == (None, None), seen
    finally:
        place.slow.unlink()
    await asking
    took("a chunked prefill, ready all the time", time.monotonic() - began)


async def drained_post(http: Http, url: str, body: dict[str, Any]) -> None:
    with contextlib.suppress(Exception):
        async with http.post(url, json=body, timeout=aiohttp.ClientTimeout(total=400)) as answer:
            await answer.read()


async def test_a_lock_is_proved(place: Place, sidecar: Sidecar, http: Http, took: Any) -> None:
    """The last test: the core's main thread waits for a lock that nobody releases."""
    async with streaming(http, sidecar):
        place.engine.process("EngineCore").send_signal(signal.SIGUSR1)
        seen = await watched(http, sidecar, 100)
    took("a lock: not ready", seen.unready or -1)
    took("a lock: killed", seen.killed or -1)
    assert (seen.last["hang"], seen.last["proof"]) == ("host_lock", "processes"), seen
    assert seen.killed is not None and seen.killed < 60, seen
    assert seen.unready is not None and seen.unready < seen.killed
    async with http.get(f"{sidecar.admin}/diagnoses") as answer:
        newest = (await answer.json())["diagnoses"][0]["id"]
    async with http.get(f"{sidecar.admin}/diagnoses/{newest}") as answer:
        assert (await answer.json())["hang"]["class"] == "host_lock"
    for process in psutil.Process(os.getpid()).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.name() == "VLLM::EngineCor":
                process.kill()
