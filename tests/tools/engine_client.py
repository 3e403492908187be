"""A small client of the scripted engine for its tests: requests as tasks, server-sent events as they arrive."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from sidecar.engines.metrics_parser import parse
from sidecar.engines.registry import KINDS
from sidecar.readings import EngineSample
from sidecar.tools.scripted_engine.server import EngineSettings, ScriptedEngine

QUIET = 0.05  # seconds in which a live engine of these tests does dozens of steps


def quick(**settings: Any) -> EngineSettings:
    """Settings of an engine whose steps take a millisecond."""
    return EngineSettings(**{"listen": ("127.0.0.1", 0), "decode_step_ms": 1.0, "image_ms": 0.0, **settings})


class Client:
    """One session with one engine."""

    def __init__(self, engine: ScriptedEngine, session: aiohttp.ClientSession) -> None:
        self.engine = engine
        self.session = session
        self._tasks: list[asyncio.Task[Any]] = []

    def start(self, tokens: int = 50, prompt: str = "hello", **body: Any) -> asyncio.Task[list[dict[str, Any]]]:
        """A streaming chat as a task; its result is the list of chunks."""
        return self._task(self.chat(tokens, prompt, **body))

    async def chat(self, tokens: int, prompt: str = "hello", **body: Any) -> list[dict[str, Any]]:
        async with self.stream(tokens, prompt, **body) as chunks:
            return [chunk async for chunk in chunks]

    @asynccontextmanager
    async def stream(
        self, tokens: int, prompt: str = "hello", **body: Any
    ) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        """A streaming chat: its chunks up to [DONE]; leaving early closes the connection."""
        payload = {"messages": [{"role": "user", "content": prompt}], "max_tokens": tokens, "stream": True, **body}
        async with self.session.post("/v1/chat/completions", json=payload) as response:
            assert response.status == 200, await response.text()
            yield events(response)

    async def json(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        """Status and JSON of a GET, or of a POST if there is a body."""
        async with self.session.request("POST" if body is not None else "GET", path, json=body) as response:
            return response.status, json.loads(await response.read() or b"null")

    def get(self, path: str) -> asyncio.Task[int]:
        """A GET as a task; its result is the status."""
        return self._task(self._status(path))

    async def sample(self) -> EngineSample:
        async with self.session.get("/metrics") as response:
            return parse(await response.read(), KINDS["scripted"])

    async def silent(self, *tasks: asyncio.Task[Any]) -> bool:
        """Whether none of the tasks ends within a short time."""
        done, _ = await asyncio.wait(tasks, timeout=QUIET)
        return not done

    async def running(self, count: int = 1) -> None:
        """Wait until so many sequences run in total."""
        await self.engine.until(lambda: sum(len(c.scheduler.running) for c in self.engine.cores) >= count)

    async def steps(self, count: int, rank: int = 0) -> None:
        """Wait until the core of a rank has made some more steps."""
        core = self.engine.cores[rank]
        goal = core.steps + count
        await self.engine.until(lambda: core.steps >= goal)

    async def _status(self, path: str) -> int:
        async with self.session.get(path) as response:
            return response.status

    def _task(self, job: Any) -> asyncio.Task[Any]:
        task = asyncio.create_task(job)
        self._tasks.append(task)
        return task

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def running_engine(**settings: Any) -> AsyncIterator[Client]:
    """A quick engine on a free port, and a client of it."""
    async with ScriptedEngine(quick(**settings)) as engine:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(engine.url, connector=connector) as session:
            client = Client(engine, session)
            try:
                yield client
            finally:
                await client.close()


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each event; the stream must end with [DONE] and each event with an empty line."""
    async for line in response.content:
        if line == b"data: [DONE]\n":
            assert await response.content.read() == b"\n"
            return
        assert line.startswith(b"data: {") and await response.content.readline() == b"\n"
        yield json.loads(line.removeprefix(b"data: "))
    raise AssertionError("the stream broke before [DONE]")


def text(chunks: list[dict[str, Any]]) -> str:
    return "".join(c["choices"][0]["delta"]["content"] for c in chunks if c["choices"])
