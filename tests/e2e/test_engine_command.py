"""`sidecar run -- COMMAND` with a real engine process: what starts it, restarts it, and ends it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from sidecar.launch import engine_runner
from sidecar.tools.manifests.render import render
from sidecar.tools.manifests.settings import ManifestSettings

from ..ports import free_port
from ..waiting import PATIENCE
from .conftest import Sidecar

Run = Callable[..., Any]


class Hosted:
    """A sidecar with its engine as a child, which a shell starts with two more processes."""

    def __init__(self, sidecar: Sidecar, marker: str) -> None:
        self.sidecar = sidecar
        self.marker = marker  # seconds that the other processes sleep: no other test's have these

    def processes(self) -> list[psutil.Process]:
        """All that the engine consists of, wherever it was adopted."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                line = " ".join(process.cmdline())
                ours = self.marker in line and process.status() != psutil.STATUS_ZOMBIE
                if ours and " run " not in line and not line.startswith("sidecar"):
                    found.append(process)
        return found

    def engine(self) -> psutil.Process:
        """Its first process."""
        (first,) = [p for p in self.processes() if " engine " in " ".join(p.cmdline())]
        return first

    async def until_served(self, *but: int) -> None:
        """Wait until an engine that is none of `but` answers users."""
        async with asyncio.timeout(PATIENCE):
            while True:
                with contextlib.suppress(ValueError, psutil.Error):
                    if self.engine().pid not in but:
                        async with self.sidecar.chat(stream=False) as answer:
                            if answer.status == 200:
                                return
                await asyncio.sleep(0.2)

    async def until_gone(self, *processes: psutil.Process) -> None:
        """Wait until they have ended."""
        async with asyncio.timeout(PATIENCE):
            while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes):  # noqa: ASYNC110  processes of others have no event
                await asyncio.sleep(0.1)

    async def until_logged(self, words: str) -> None:
        async with asyncio.timeout(PATIENCE):
            while not any(words in line for line in self.sidecar.log):  # noqa: ASYNC110  a list has no event
                await asyncio.sleep(0.1)


@pytest.fixture
async def host(start: Run) -> AsyncIterator[Run]:
    """A function that starts a sidecar with its engine; whatever is left of the engine ends with the test."""
    started: list[Hosted] = []

    async def run(line: str = "", environ: dict[str, str] | None = None, **chosen: str) -> Hosted:
        port = free_port()
        # One child in the engine's process group, one in a session of its own.
        others = f"sleep 1{port}.5 & setsid sleep 1{port}.5 &"
        engine = f"exec {sys.executable} -m sidecar engine --listen 127.0.0.1:{port} --decode-step-ms 5"
        command = ["sh", "-c", f"{line} {others} {engine}"]
        hosted = Hosted(await start(f"http://127.0.0.1:{port}", environ, command, **chosen), str(port))
        started.append(hosted)
        await hosted.until_served()
        return hosted

    yield run
    for hosted in started:
        for process in hosted.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()


@pytest.mark.slow
async def test_a_frozen_engine_is_killed_and_started_again(host: Run) -> None:
    """Frozen with a stream open: liveness fails, all of its processes are killed, another engine serves."""
    hosted = await host()
    before = hosted.processes()
    assert len(before) == 3
    await hosted.until_logged("liveness counts from now on")
    engine = hosted.engine()
    async with hosted.sidecar.chat(tokens=100_000) as stream:
        await stream.content.readany()
        engine.send_signal(signal.SIGSTOP)
        await stream.read()  # the sidecar ends it
    await hosted.until_gone(*before)
    await hosted.until_served(engine.pid)
    log = "".join(hosted.sidecar.log)
    assert "killing the engine" in log and "liveness probe failed: stalled" in log


async def test_an_engine_that_ends_is_started_again_later_each_time(host: Run) -> None:
    """At once, then with a pause; what the dead engine had started ends with it."""
    hosted = await host()
    before, engine = hosted.processes(), hosted.engine()
    engine.kill()
    await hosted.until_gone(*before)
    await hosted.until_served(engine.pid)
    assert "the engine ended with signal SIGKILL" in "".join(hosted.sidecar.log)
    hosted.engine().terminate()
    await hosted.until_logged("the engine is started again in 10 s")


async def test_sigterm_finishes_streams_before_the_engine_ends(host: Run) -> None:
    """The open stream ends by itself with the engine alive, then the engine is gone and the exit code is 0."""
    hosted = await host(drain_seconds="60")
    before = hosted.processes()
    async with hosted.sidecar.chat(tokens=400) as stream:
        await stream.content.readany()
        hosted.sidecar.process.terminate()
        text = (await stream.read()).decode()
        assert text.rstrip().endswith("data: [DONE]")
    async with asyncio.timeout(PATIENCE):
        assert await hosted.sidecar.process.wait() == 0
    assert not any(p.is_running() for p in before)


@pytest.mark.slow
async def test_an_engine_that_ignores_sigterm_does_not_hold_the_end_up_forever(start: Run, tmp_path: Path) -> None:
    """A second signal is not needed: SIGKILL follows after the grace, and the exit code is 0."""
    port, deaf = free_port(), tmp_path / "deaf"
    program = (
        f"import pathlib, signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"pathlib.Path({str(deaf)!r}).touch()\nwhile True: signal.pause()\n"
    )
    sidecar = await start(f"http://127.0.0.1:{port}", None, [sys.executable, "-c", program])
    async with asyncio.timeout(PATIENCE):
        while not deaf.exists():  # noqa: ASYNC110  a file has no event
            await asyncio.sleep(0.1)
    assert await sidecar.stop() == 0
    assert "did not end within 30 s; killing it" in "".join(sidecar.log)


async def test_the_engine_does_not_outlive_its_keepers(host: Run) -> None:
    """SIGKILL of the engine's runner: a new engine, nothing left of the old. Of the supervisor: nothing is left."""
    hosted = await host()
    before, engine = hosted.processes(), hosted.engine()
    runner = engine.parent()
    assert runner is not None and runner.ppid() == hosted.sidecar.process.pid
    runner.kill()
    await hosted.until_gone(engine)
    await hosted.until_served(engine.pid)
    in_group = [p for p in before if p.pid != engine.pid and p.is_running()]
    assert len(in_group) <= 1, "at most the one that left the engine's process group"
    everything = hosted.processes()
    hosted.sidecar.process.kill()
    await hosted.until_gone(*(p for p in everything if p not in in_group))


async def test_the_engine_gets_none_of_the_sidecars_settings(host: Run, tmp_path: Path) -> None:
    """Neither settings, which may hold a key, nor the service manager's socket; the rest stays, with the plug-in."""
    environ = {"SIDECAR_ENGINE_KEY": "secret", "NOTIFY_SOCKET": "/nowhere", "VLLM_LOGGING_LEVEL": "DEBUG"}
    await host(f"env > {tmp_path}/env;", environ | {"PYTHONPATH": "/of/the/user"})
    seen = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines() if "=" in line)
    assert seen["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert not any(name.startswith("SIDECAR_") or name == "NOTIFY_SOCKET" for name in seen)
    plugin, rest = seen["PYTHONPATH"].split(os.pathsep)
    assert (Path(plugin) / "sidecar_vllm" / "steps.py").is_file() and rest == "/of/the/user"


def test_probes_and_graces_are_those_of_the_manifest() -> None:
    """A host and a pod treat an engine alike."""
    deployment, *_ = yaml.safe_load_all(render(ManifestSettings()))
    (engine,) = deployment["spec"]["template"]["spec"]["containers"]
    for kind, spec in engine_runner.PROBES.items():
        printed = engine[f"{kind}Probe"]
        seconds = printed["periodSeconds"] * printed["failureThreshold"]
        assert spec.period * spec.failure_threshold == seconds and spec.period <= printed["periodSeconds"]
    assert engine["livenessProbe"]["terminationGracePeriodSeconds"] == engine_runner.KILL_GRACE_S
