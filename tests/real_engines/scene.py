"""One real engine at a port of its own, and a sidecar beside it: what the cases act on."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import signal
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from ..certificates import Authority
from ..environments import made_model
from ..ports import free_port
from ..vllm import client, processes
from ..vllm.processes import Sidecar
from .engines import HEALTHY, Call, RealEngine

MODEL = processes.MODEL
# What differs between two equal answers: that it is there is compared, not what it is.
VOLATILE = frozenset(
    {
        *("id", "created", "created_at", "completed_at", "timings", "response_id", "request_id", "id_slot"),
        *("timestamp", "forward_entry_time", "prefill_finished_time", "queue_time", "e2e_latency"),
        *("request_received_ts", "api_server_dispatch_finish_ts", "request_finished_ts", "response_sent_to_client_ts"),
        *("first_token_latency", "decode_throughput", "internal_states"),
    }
)
# Which part of a prompt came from a cache depends on what was asked before.
CACHED = frozenset(
    {
        "cached_tokens",
        "cached_tokens_details",
        "cache_read_input_tokens",
        "input_tokens",
        "tokens_cached",
        "tokens_evaluated",
    }
)


@dataclass
class EnginePlace:
    """A port at which processes of one engine run, one after the other."""

    row: RealEngine
    folder: Path
    port: int = field(default_factory=free_port)
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    root: psutil.Process | None = None
    starts: int = 0
    trust: ssl.SSLContext | None = None
    authority: Path | None = None

    @property
    def url(self) -> str:
        return f"http{'s' if self.row.is_tls else ''}://127.0.0.1:{self.port}{self.row.base}"

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.row.key}"} if self.row.key else {}

    @property
    def log(self) -> Path:
        return self.folder / f"engine{self.starts}.log"

    def start(self, *, ready: bool = True) -> None:
        """Start it, and wait until it has served unless `ready` is false. Raises NotReady."""
        self.stop()
        self.starts += 1
        row = self.row
        maker = (row.maker or row.environment).python()
        words = {
            "home": str(row.environment.home()),
            "python": str(row.environment.python()),
            "port": str(self.port),
            "model": str(made_model(row.script, row.made, maker, processes.ENGINE_ENV)),
            "folder": str(self.folder),
        }
        if row.binary:
            words["binary"] = str(row.binary.file())
        if row.is_tls:
            words |= self._certificate()
        command = [word.format(**words) for word in row.command]
        environ = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        environ |= processes.ENGINE_ENV | {key: value.format(**words) for key, value in row.environ.items()}
        process = self._stack.enter_context(processes.running(command, self.log, environ))
        self.root = psutil.Process(process.pid)
        if ready:
            processes.wait_for(self.serves, process, self.log, row.start_seconds)

    def stop(self) -> None:
        """End what runs there."""
        self._stack.close()
        self.root = None

    def ensure(self) -> None:
        """Start it unless it runs: an earlier case may have failed half-way."""
        if self.root is None or not self.root.is_running() or self.root.status() == psutil.STATUS_ZOMBIE:
            self.start()

    def serves(self) -> bool:
        """Whether it does its work now."""
        if "embeddings" in self.row.routes:
            path, body = "/v1/embeddings", {"input": "1"}
        elif "completions" in self.row.routes:
            path, body = "/v1/completions", {"prompt": "1", "max_tokens": 1}
        else:
            path, body = "/v1/chat/completions", client.chat("1", max_tokens=1)
        sent = {"model": MODEL, **body}
        return processes.http_status(self.url + path, sent, self.headers, self.trust) == 200

    def process(self, part: str) -> psutil.Process:
        """The process that is this part of the engine."""
        assert self.root is not None
        title = self.row.parts[part]
        if not title:
            return self.root
        below = [each for each in self.root.children(recursive=True) if each.status() != psutil.STATUS_ZOMBIE]
        found = [each for each in below if title in " ".join(each.cmdline())]
        assert found, f"no process of {[each.cmdline() for each in below]} has {title!r}"
        return found[0]

    def replace(self, part: str) -> None:
        """Have another process of a part started that is `given_up`."""
        assert self.root is not None and part in self.row.given_up
        self.root.send_signal(signal.SIGUSR1)

    def _certificate(self) -> dict[str, str]:
        if self.authority is None:
            made = Authority(self.folder)
            self._issued = made.issue()
            self.authority = made.pem
            self.trust = made.trust()
        certificate, key = self._issued
        return {"certificate": str(certificate), "certificate_key": str(key)}


@contextlib.contextmanager
def place(row: RealEngine, folder: Path) -> Iterator[EnginePlace]:
    """An engine that serves; nothing of it is left at the end."""
    there = EnginePlace(row, folder)
    try:
        there.start()
        yield there
    finally:
        there.stop()


@contextlib.contextmanager
def beside(engine: EnginePlace, folder: Path) -> Iterator[Sidecar]:
    """A sidecar that has to find out by itself what the engine is."""
    flags = {"engine_kind": "auto", **command_flags(engine)}
    with processes.sidecar(engine.url, folder / "state", folder / "sidecar.log", **flags) as running:
        yield running


def command_flags(engine: EnginePlace) -> dict[str, str]:
    """The sidecar's flags without which this engine cannot be reached."""
    key = {"engine_key": engine.row.key} if engine.row.key else {}
    return key | ({"engine_ca": str(engine.authority)} if engine.authority else {})


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer as a client sees it."""

    status: int
    body: Any


@dataclass(frozen=True, slots=True)
class EngineScene:
    """An engine, the sidecar beside it, and a client of both."""

    engine: EnginePlace
    sidecar: Sidecar
    http: aiohttp.ClientSession

    @property
    def row(self) -> RealEngine:
        return self.engine.row

    async def direct(self, call: Call) -> Answer:
        """The engine's own answer."""
        return await self._ask(self.engine.url, call, "")

    async def relayed(self, call: Call, tenant: str = "") -> Answer:
        """The same through the relay."""
        return await self._ask(self.sidecar.url, call, tenant)

    async def stream(self, url: str, call: Call, tenant: str = "") -> list[str]:
        """The lines of a stream, its end included."""
        headers = self._headers(tenant)
        async with self.http.post(url + call.path, data=self._sent(call, stream=True), headers=headers) as answer:
            assert answer.status == 200, await answer.text()
            return [line.decode() async for line in answer.content]

    @contextlib.asynccontextmanager
    async def open_stream(self, tenant: str = "") -> AsyncIterator[aiohttp.ClientResponse]:
        """A long stream through the relay, of which the first line was read."""
        call = generate(self.row, "The tokens come one by one.", max_tokens=self.row.stream_tokens, stream=True)
        headers = self._headers(tenant)
        async with self.http.post(self.sidecar.url + call.path, data=self._sent(call), headers=headers) as answer:
            assert answer.status == 200, await answer.text()
            await answer.content.readline()
            yield answer

    async def metric(self, name: str, **labels: str) -> float:
        """The sum of a series on the sidecar's own page."""
        return await client.sample(self.http, f"{self.sidecar.admin}/metrics", name, **labels)

    async def until(self, holds: Callable[[], Awaitable[Any]], what: str, seconds: float = client.WAIT) -> None:
        await client.until(holds, f"{what}; {await self.probe('/livez')}", seconds)

    async def probe(self, path: str) -> tuple[int, str, str]:
        return await client.probe(self.http, self.sidecar.admin + path)

    async def until_probe(self, path: str, status: int, *verdicts: str, seconds: float = client.WAIT) -> None:
        """Wait until a probe answers so."""

        async def holds() -> bool:
            seen = await self.probe(path)
            return seen[0] == status and (not verdicts or seen[1] in verdicts)

        await client.until(holds, f"{path} {status} {verdicts}", seconds)

    async def settled(self, tenant: str, outcome: str, count: int = 1) -> None:
        """Wait until so many requests of the tenant have ended so."""

        async def holds() -> bool:
            return await self.metric("sidecar_requests_total", tenant=tenant, outcome=outcome) == count

        await client.until(holds, f"{count} request of {tenant}: {outcome}")

    async def verdicts_since(self, began: float) -> list[dict[str, Any]]:
        """The changes of the verdict since a wall-clock time."""
        async with self.http.get(f"{self.sidecar.admin}/verdicts") as answer:
            return [change for change in (await answer.json())["verdicts"] if change["since"] >= began]

    async def is_quiet_since(self, began: float) -> None:
        """No verdict since then speaks against the engine."""
        against = [change for change in await self.verdicts_since(began) if change["verdict"] not in HEALTHY]
        assert not against, against

    async def _ask(self, url: str, call: Call, tenant: str) -> Answer:
        method = "GET" if call.body is None else "POST"
        sent, headers = self._sent(call), self._headers(tenant)
        async with self.http.request(method, url + call.path, data=sent, headers=headers) as answer:
            text = await answer.text()
            try:
                return Answer(answer.status, json.loads(text))
            except ValueError:
                return Answer(answer.status, text)

    def _sent(self, call: Call, **more: Any) -> io.BytesIO | None:
        if call.body is None:
            return None
        body = {"model": MODEL, **call.body, **more}
        sent = {name: value for name, value in body.items() if name not in self.row.refused_members}
        return io.BytesIO(json.dumps(sent).encode())

    def _headers(self, tenant: str) -> dict[str, str]:
        tenancy = {"x-tenant-id": tenant} if tenant else {}
        return {"content-type": "application/json", **self.engine.headers, **tenancy}


def generate(row: RealEngine, text: str, **more: Any) -> Call:
    """A greedy request for text by the first route that the engine has."""
    if "completions" in row.routes:
        return Call("/v1/completions", client.completion(text, **more))
    return Call("/v1/chat/completions", client.chat(text, **more))


def same(value: Any) -> Any:
    """An answer without what differs between equal ones."""
    if isinstance(value, Mapping):
        return {
            key: type(part).__name__ if key in VOLATILE else "cached" if key in CACHED else same(part)
            for key, part in value.items()
        }
    if isinstance(value, list):
        return [same(part) for part in value]
    return round(value, 4) if isinstance(value, float) else value


@contextlib.contextmanager
def frozen(process: psutil.Process) -> Iterator[None]:
    """A process that is stopped, and goes on afterwards."""
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGCONT)


def now() -> float:
    """The wall clock, as verdicts are dated."""
    return time.time()


async def read_to_end(answer: aiohttp.ClientResponse) -> bytes:
    """The rest of a stream, however it ends."""
    try:
        return await asyncio.wait_for(answer.read(), client.WAIT)
    except aiohttp.ClientError as e:
        return f"broken: {type(e).__name__}".encode()
