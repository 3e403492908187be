"""One engine, one sidecar and its users, probed as by kubelet: the scene of the matrix's stories."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp

from sidecar.tools.scripted_engine.server import EngineSettings, ScriptedEngine

from ..waiting import PATIENCE
from .conftest import Sidecar, starter

# Between probes.
PERIOD_S = 0.2
# Between the requests of a client.
PAUSE_S = 0.1


@dataclass(frozen=True, slots=True)
class Seen:
    """One check of both probes: HTTP statuses, and the verdict in /readyz."""

    at: float
    live: int
    ready: int
    verdict: str
    reason: str


class Scene:
    """Everything a story acts on. Times are monotonic seconds."""

    def __init__(self, engine: ScriptedEngine, sidecar: Sidecar, session: aiohttp.ClientSession, driver: Path) -> None:
        self.engine = engine
        self.sidecar = sidecar
        self.seen: list[Seen] = []
        self.ended: list[str] = []  # how each request ended: "done", "broken", or an error's code
        self.began = time.monotonic()
        self._session = session
        self._driver = driver  # the script of the GPU's driver
        self._tasks: list[asyncio.Task[Any]] = []
        self._news = asyncio.Condition()

    # --- what a story does ---

    def fault(self, kind: str, seconds: float | None = None, **parameters: float) -> None:
        """Start a fault; detection is timed from here."""
        self.began = time.monotonic()
        self.engine.faults.start(kind, seconds, **parameters)

    def xid(self, number: int) -> None:
        """The GPU's driver reports an error."""
        written = self._driver.with_suffix(".new")
        written.write_text(f"xid {number}\n")
        written.replace(self._driver)

    def open(
        self, tokens: int | None = 100_000, prompt: int = 4, *, stream: bool = True, **body: Any
    ) -> asyncio.Task[str]:
        """One request as a task; its result is how it ended."""
        return self._task(self.ask(tokens, prompt, stream=stream, **body))

    def crowd(
        self, clients: int, tokens: int = 5, prompt: int = 4, *, stream: bool = True, patience: float | None = None
    ) -> list[asyncio.Task[Any]]:
        """Some clients, each with one request after the other; each gives a request up after `patience` seconds."""
        ask = partial(self.ask, tokens, prompt, stream=stream)
        return [self._task(self._again_and_again(ask, patience)) for _ in range(clients)]

    def callers(self, clients: int, path: str, body: Callable[[], Any]) -> None:
        """Some clients with one call of another route after the other; `body` makes a body, JSON or a form."""
        for _ in range(clients):
            self._task(self._again_and_again(lambda: self.call(path, body()), None))

    def foreign(self, tokens: int, prompt: int = 4) -> asyncio.Task[Any]:
        """A request that goes to the engine past the sidecar, as a task."""
        return self._task(self._stream(self.engine.url, _chat(tokens, prompt)))

    def arrivals(self, every: float, tokens: int = 5) -> None:
        """A new client every `every` seconds, independent of earlier ones."""
        self._task(self._arrive(every, tokens))

    async def ask(self, tokens: int | None, prompt: int = 4, *, stream: bool = True, **body: Any) -> str:
        """One request of `prompt` and `tokens` tokens (None: no limit), read to its end. Returns how it ended."""
        return await self._ended(self._stream(self.sidecar.relay, {**_chat(tokens, prompt), "stream": stream, **body}))

    async def call(self, path: str, body: Any) -> str:
        """One request of another route, read to its end. Returns how it ended: "done" for 200."""

        async def end() -> str:
            sent = {"data": body} if isinstance(body, aiohttp.FormData) else {"json": body}
            async with self._session.post(self.sidecar.relay + path, **sent) as answer:
                code = _code(await answer.read())
                return "done" if answer.status == 200 else code or str(answer.status)

        return await self._ended(end())

    def begin(self) -> None:
        """What the case expects is measured from here."""
        self.began = time.monotonic()
        self.ended.clear()

    async def post(self, path: str) -> int:
        """A call through the relay. Returns its status."""
        async with self._session.post(self.sidecar.relay + path) as answer:
            await answer.read()
            return answer.status

    async def served(self, verdict: str = "progressing") -> None:
        """Wait until users are served."""
        await self.sidecar.until_verdict(verdict)

    # --- what a test waits for ---

    async def until(self, holds: Callable[[], object], what: str) -> None:
        """Wait until `holds()` is true; checked after each probe and each request's end."""
        try:
            async with asyncio.timeout(PATIENCE), self._news:
                await self._news.wait_for(lambda: bool(holds()))
        except TimeoutError:
            raise AssertionError(f"never {what}; {self.story()}") from None

    def story(self) -> str:
        """The checks and outcomes in one line, for a failing test."""
        changes = (
            [self.seen[0], *(b for a, b in zip(self.seen, self.seen[1:], strict=False) if _differ(a, b))]
            if self.seen
            else []
        )
        history = ", ".join(
            f"{s.at - self.began:+.1f} s {s.verdict}/{s.reason} {s.live} {s.ready}" for s in changes[-25:]
        )
        return f"seen: {history}; requests ended: {sorted(set(self.ended))}; log: {''.join(self.sidecar.log[-6:])}"

    def since(self) -> list[Seen]:
        """The checks since the fault."""
        return [s for s in self.seen if s.at >= self.began]

    async def watch(self) -> None:
        """Probe like kubelet until cancelled. No answer (sidecar stopped, restarting) is not a result."""
        while True:
            try:
                live, _ = await self._probe("/livez")
                ready, body = await self._probe("/readyz")
            except (aiohttp.ClientError, ConnectionError, TimeoutError):
                await asyncio.sleep(PERIOD_S)
                continue
            async with self._news:
                self.seen.append(Seen(time.monotonic(), live, ready, body["verdict"], body["reason"]))
                self._news.notify_all()
            await asyncio.sleep(PERIOD_S)

    async def _probe(self, path: str) -> tuple[int, Any]:
        async with self._session.get(self.sidecar.admin + path, timeout=aiohttp.ClientTimeout(total=2)) as answer:
            return answer.status, await answer.json()

    async def _stream(self, url: str, body: dict[str, Any]) -> str:
        async with self._session.post(url + "/v1/chat/completions", json=body) as answer:
            return await _end_of(answer)

    async def _ended(self, request: Awaitable[str]) -> str:
        """Note how a request ended."""
        try:
            end = await request
        except (aiohttp.ClientError, ConnectionError):
            end = "broken"
        async with self._news:
            self.ended.append(end)
            self._news.notify_all()
        return end

    async def _again_and_again(self, ask: Callable[[], Awaitable[str]], patience: float | None) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await ask()
            await asyncio.sleep(PAUSE_S)

    async def _arrive(self, every: float, tokens: int) -> None:
        while True:
            self.open(tokens)
            await asyncio.sleep(every)

    def _task(self, job: Any) -> asyncio.Task[Any]:
        task = asyncio.create_task(job)
        self._tasks.append(task)
        return task

    async def close(self) -> None:
        """Cancel all tasks, repeatedly: a timeout at the same moment can swallow a cancellation."""
        while under_way := [task for task in self._tasks if not task.done()]:
            for task in under_way:
                task.cancel()
            await asyncio.wait(under_way, timeout=1.0)
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _chat(tokens: int | None, prompt: int) -> dict[str, Any]:
    body = {"model": "scripted", "stream": True, "messages": [{"role": "user", "content": "word" * prompt}]}
    return body if tokens is None else body | {"max_tokens": tokens}


def _differ(a: Seen, b: Seen) -> bool:
    return (a.verdict, a.reason, a.live, a.ready) != (b.verdict, b.reason, b.live, b.ready)


async def _end_of(answer: aiohttp.ClientResponse) -> str:
    """How a response ended: its error's code, in any form, or "done"."""
    if answer.status != 200:
        return _code(await answer.read()) or str(answer.status)
    end = "broken"
    async for line in answer.content:
        if b'"error"' in line:
            end = _code(line.removeprefix(b"data: ")) or end
        elif line.startswith((b"data: [DONE]", b'{"id"')) and end == "broken":
            end = "done"
    return end


def _code(body: bytes) -> str:
    """The code of an OpenAI error; "" if there is none."""
    try:
        error = json.loads(body)["error"]
        return str(error.get("code") or error.get("type"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""


@dataclass(frozen=True, slots=True)
class Setting:
    """How a story's engine and sidecar are started. `before` runs on the engine before the sidecar starts."""

    engine: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, str] = field(default_factory=dict)
    before: Callable[[ScriptedEngine], None] | None = None
    served: bool = True  # the story begins once the engine has served a token
    gpu: bool = False  # with the stub of the GPU's driver


@contextlib.asynccontextmanager
async def scene(setting: Setting, relays: int, folder: Path, library: Path | None) -> AsyncIterator[Scene]:
    """An engine, a sidecar with some relays, and its prober. `library`: the folder of a GPU driver's stub."""
    driver = folder / "driver"
    driver.touch()
    environ = {"LD_LIBRARY_PATH": str(library), "NVML_STUB_SCRIPT": str(driver)} if library else {}
    made = EngineSettings(**{"listen": ("127.0.0.1", 0), "decode_step_ms": 20.0, **setting.engine})
    flags = {"drain_seconds": "2", "workers": str(relays), "silence_kill": "6", **setting.flags}
    connector = aiohttp.TCPConnector(limit=0, force_close=True)  # a connection each, so that all relays get some
    async with (
        ScriptedEngine(made) as engine,
        aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session,
        starter(folder) as start,
    ):
        if setting.before:
            setting.before(engine)
        played = Scene(engine, await start(engine.url, environ=environ, **flags), session, driver)
        try:
            played._task(played.watch())
            if setting.served:
                await played.sidecar.until(lambda s: s["verdict"]["state"] == "idle" and _whole(s, relays))
            yield played
        finally:
            await played.close()


def _whole(snapshot: dict[str, Any], relays: int) -> bool:
    """Whether all relays are there."""
    return len([r for r in snapshot["relays"] if r["pulse_age"] is not None]) == relays
