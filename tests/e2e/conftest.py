"""`sidecar run` as a process next to a scripted engine, observed like kubelet and a page do."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from sidecar.tools.scripted_engine.server import EngineSettings, ScriptedEngine

from ..ports import free_port
from ..waiting import PATIENCE

QUICK = {
    "silence-floor": "1.5",
    "silence-kill": "8",
    "silence-cap": "12",  # so 2.4 s before anything is learned, and 4 s more for an unresponsive API
    "canary-interval": "1",
    "kill-interval": "0",  # some see more than one hang
    "drain-seconds": "10",
    "images": "off",
}


TABLE = pytest.StashKey[list[str]]()  # lines of the matrix of hangs and alarms, once it has run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the matrix at the end of a verbose run (`-v`)."""
    if config.get_verbosity() > 0 and TABLE in config.stash:
        terminalreporter.section("hang modes and alarms")
        terminalreporter.write_line("\n".join(config.stash[TABLE]))


@dataclass
class Sidecar:
    """A running sidecar: its ports, its state directory, its log."""

    relay: str
    admin: str
    state: Path
    process: asyncio.subprocess.Process
    session: aiohttp.ClientSession
    log: list[str] = field(default_factory=list)

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.session.get(self.admin + path) as answer:
            body = await answer.text()
            return answer.status, json.loads(body) if body.startswith("{") else body

    async def control(self) -> int:
        """Process id of the control process; `process` is the supervisor."""
        return int((await self.get("/healthz"))[1]["pid"])

    async def until(self, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first snapshot of the live feed for which `holds` is true."""
        async with asyncio.timeout(PATIENCE), self.session.get(self.admin + "/events") as feed:
            event = ""
            async for line in feed.content:
                if line.startswith(b"event: "):
                    event = line[7:].decode().strip()
                elif line.startswith(b"data: ") and event == "snapshot":
                    snapshot: dict[str, Any] = json.loads(line[6:])
                    if holds(snapshot):
                        return snapshot
        raise AssertionError("the feed ended")

    async def until_verdict(self, *states: str) -> dict[str, Any]:
        try:
            return await self.until(lambda s: s["verdict"]["state"] in states)
        except TimeoutError:
            raise AssertionError(f"never {states}; log: {''.join(self.log[-20:])}") from None

    async def until_changed(self, state: str) -> None:
        """Wait until the verdict has been this, however briefly."""
        async with asyncio.timeout(PATIENCE):
            while all(v["verdict"] != state for v in (await self.get("/verdicts"))[1]["verdicts"]):  # noqa: ASYNC110  a page has no event
                await asyncio.sleep(0.1)

    async def until_metrics(self, *lines: str) -> str:
        """The first metrics page with all of `lines`; a page may be a second old."""
        async with asyncio.timeout(PATIENCE):
            while True:
                _, page = await self.get("/metrics")
                if all(line in page for line in lines):
                    return str(page)
                await asyncio.sleep(0.2)

    async def until_file(self, name: str, *, there: bool = True) -> None:
        """Wait until a file of the state directory exists, or is gone; a thread writes them."""
        async with asyncio.timeout(PATIENCE):
            while (self.state / name).exists() is not there:  # noqa: ASYNC110  a file has no event
                await asyncio.sleep(0.1)

    async def until_remembered(self, holds: Callable[[dict[str, Any]], bool], patience: float = PATIENCE) -> None:
        """Wait for content of the saved state, written every ten seconds and on a change of the verdict."""
        async with asyncio.timeout(patience):
            while True:
                with contextlib.suppress(FileNotFoundError):
                    if holds(json.loads((self.state / "memory.json").read_text())["kept"]):
                        return
                await asyncio.sleep(0.1)

    async def until_merged(self, *lines: str) -> None:
        """Wait until the relay's merged page has all of `lines`; the engine's part comes with its first scrape."""
        async with asyncio.timeout(PATIENCE):
            while True:
                async with self.session.get(self.relay + "/metrics") as answer:
                    page = await answer.text()
                if all(line in page for line in lines):
                    return
                await asyncio.sleep(0.2)

    def chat(self, *, stream: bool = True, tokens: int = 5, text: str = "hello", **headers: str) -> Any:
        body = {
            "model": "scripted",
            "stream": stream,
            "max_tokens": tokens,
            "messages": [{"role": "user", "content": text}],
        }
        return self.session.post(self.relay + "/v1/chat/completions", json=body, headers=headers)

    async def stop(self) -> int:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(PATIENCE):
            return await self.process.wait()


Start = Callable[..., Any]


@pytest.fixture
async def engine() -> AsyncIterator[ScriptedEngine]:
    settings = EngineSettings(listen=("127.0.0.1", 0), decode_step_ms=5.0)
    async with ScriptedEngine(settings) as engine:
        yield engine


@contextlib.asynccontextmanager
async def starter(folder: Path) -> AsyncIterator[Start]:
    """A function that starts `sidecar run` for an engine URL with settings; all end with the block."""
    async with contextlib.AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        count = 0

        async def run(
            engine: str, environ: Mapping[str, str] | None = None, after: Sequence[str] = (), **chosen: str
        ) -> Sidecar:
            nonlocal count
            count += 1
            relay, admin, state = free_port(), free_port(), folder / chosen.pop("state", f"state{count}")
            host = chosen.pop("host", "127.0.0.1")  # of the relay
            files = chosen.pop("open_files", "")  # the most that each process may open
            flags = QUICK | {k.replace("_", "-"): v for k, v in chosen.items()}
            flags |= {"engine": engine, "listen": f"{host}:{relay}", "admin": f"127.0.0.1:{admin}"}
            flags |= {"state-dir": str(state)}
            command = [sys.executable, "-m", "sidecar", "run", *(x for k, v in flags.items() for x in (f"--{k}", v))]
            command += ["--", *after] if after else []  # the engine's own command
            if files:
                command = ["sh", "-c", f'ulimit -n {files} && exec "$@"', "sh", *command]
            env = {k: v for k, v in os.environ.items() if not k.startswith("SIDECAR_")} | dict(environ or {})
            process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE, env=env)
            sidecar = Sidecar(f"http://{host}:{relay}", f"http://127.0.0.1:{admin}", state, process, session)
            reader = asyncio.create_task(_read(process, sidecar.log))
            stack.push_async_callback(_end, sidecar, reader)
            await _listening(sidecar)
            return sidecar

        yield run


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """A function that starts `sidecar run`, for one test."""
    async with starter(tmp_path) as run:
        yield run


@pytest.fixture(scope="session")
def sidecars() -> Any:
    """`starter`, for fixtures that outlive a test."""
    return starter


async def _read(process: asyncio.subprocess.Process, log: list[str]) -> None:
    assert process.stderr is not None
    while line := await process.stderr.readline():
        log.append(line.decode())


async def _listening(sidecar: Sidecar) -> None:
    async with asyncio.timeout(PATIENCE):
        while True:
            if sidecar.process.returncode is not None:
                raise AssertionError(f"it ended: {''.join(sidecar.log)}")
            try:
                status, _ = await sidecar.get("/healthz")
                if status == 200:
                    return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.05)


async def _end(sidecar: Sidecar, reader: asyncio.Task[None]) -> None:
    if sidecar.process.returncode is None:
        await sidecar.stop()
    await reader
    text = "".join(sidecar.log)
    assert "Traceback" not in text, text
