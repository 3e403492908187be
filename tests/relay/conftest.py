"""A relay in this process between a real client and a real engine, all on port 0."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, TypeVar

import aiohttp
import pytest
from aiohttp import web

from sidecar.events import Event, LoadReport, Settled
from sidecar.images.vllm_plugin import Handoffs
from sidecar.load.cost_model import Coefficients
from sidecar.load.estimator import Estimator
from sidecar.relay.client_io import CLIENT_STALL_S
from sidecar.relay.concurrency import MAX_QUEUED
from sidecar.relay.handler import Relay
from sidecar.relay.pricing.charge import Pricing
from sidecar.settings import Settings

from ..waiting import PATIENCE

F = TypeVar("F")


class EmittedEvents:
    """What the relay reported, and a way to wait for it."""

    def __init__(self) -> None:
        self.all: list[Event] = []
        self._news = asyncio.Event()

    def __call__(self, event: Event) -> None:
        self.all.append(event)
        self._news.set()

    def of(self, kind: type[F]) -> list[F]:
        return [event for event in self.all if isinstance(event, kind)]

    async def wait(self, kind: type[F], count: int = 1) -> list[F]:
        async with asyncio.timeout(PATIENCE):
            while len(self.of(kind)) < count:
                self._news.clear()
                await self._news.wait()
        return self.of(kind)

    async def settled(self) -> Settled:
        return (await self.wait(Settled))[0]


class Rig:
    """One relay in front of one engine. `client` requests go to the relay."""

    def __init__(
        self,
        relay: Relay,
        address: tuple[str, int],
        client: aiohttp.ClientSession,
        emitted: EmittedEvents,
    ) -> None:
        self.relay = relay
        self.host, self.port = address
        self.client = client
        self.emitted = emitted

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    async def raw(self, request: bytes, *, close_after: bool = True) -> bytes:
        """Send bytes, read until the relay closes the connection (send `connection: close`)."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        writer.write(request)
        await writer.drain()
        async with asyncio.timeout(PATIENCE):
            answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        return answer


Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


@pytest.fixture
async def serve() -> AsyncIterator[Callable[..., Awaitable[str]]]:
    """A function: aiohttp handler -> URL of a server that runs it."""
    async with AsyncExitStack() as stack:

        async def start(handler: Handler, **kwargs: Any) -> str:
            runner = web.ServerRunner(web.Server(handler, handler_cancellation=True, **kwargs), shutdown_timeout=0.1)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            return f"http://127.0.0.1:{runner.addresses[0][1]}"

        yield start


@pytest.fixture
async def serve_raw() -> AsyncIterator[Callable[..., Awaitable[str]]]:
    """A function: (reader, writer) callback -> URL of a TCP server that runs it for each connection."""
    async with AsyncExitStack() as stack:

        async def start(talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> str:
            server = await asyncio.start_server(talk, "127.0.0.1", 0)
            stack.push_async_callback(server.wait_closed)
            stack.callback(server.close)
            return f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"

        yield start


@pytest.fixture
async def rig() -> AsyncIterator[Callable[..., Awaitable[Rig]]]:
    """A function: (engine URL, settings, relay arguments) -> Rig."""
    async with AsyncExitStack() as stack:

        async def start(
            engine: str,
            *,
            images: Any = None,
            preprocess: Any = None,
            fetch: Any = None,
            render: Any = None,
            kind: str = "vllm",
            shm: Any = None,
            image_key: bytes = b"",
            pricing: Any = None,
            max_queued: int = MAX_QUEUED,
            client_stall: float = CLIENT_STALL_S,
            **settings: Any,
        ) -> Rig:
            ways = {
                "images": images,
                "preprocess": preprocess,
                "fetch": fetch,
                "render": render,
                "image_key": image_key,
            }
            ways["handoffs"] = shm and (lambda: h if isinstance(h := shm(), Handoffs) else Handoffs(h))
            ways |= {"max_queued": max_queued, "client_stall": client_stall}
            own = Settings(engine=engine, engine_kind=kind, **settings)
            return await stack.enter_async_context(_rig(own, pricing or Pricing(Estimator(Coefficients())), ways))

        yield start


@pytest.fixture
async def emitted() -> EmittedEvents:
    """Where a relay process of a test reports to."""
    return EmittedEvents()


@asynccontextmanager
async def _rig(own: Settings, pricing: Pricing, ways: dict[str, Any]) -> AsyncIterator[Rig]:
    emitted = EmittedEvents()
    relay = Relay(own, emitted, pricing, **ways)
    if ways.get("images") is not None:  # to an engine that is not known no prepared images go
        relay.on_command(LoadReport("{}", "", "idle", own.engine_kind))
    accepting = await asyncio.get_running_loop().create_server(relay.server, "127.0.0.1", 0)
    async with aiohttp.ClientSession(auto_decompress=False) as client:
        yield Rig(relay, accepting.sockets[0].getsockname(), client, emitted)
    accepting.close()
    await relay.server.close()
    await relay.close()


@pytest.fixture
def switching_never() -> Iterator[None]:
    """No thread is interrupted: it runs until it waits, or lets go of the GIL."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(PATIENCE)
    yield
    sys.setswitchinterval(before)
