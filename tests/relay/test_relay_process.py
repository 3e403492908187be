"""A relay process: configured, served, drained, and orphaned, as the control process does it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from sidecar import settings, units
from sidecar.channel import Channel
from sidecar.facts import Admitted, Configure, Drain, FirstToken, Page, PageWanted, Pulse, Settled

RUN = "import sys; from sidecar.relay.process import main; sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))"
EVENT = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'


class Process:
    """A relay process and the control end of its channel."""

    def __init__(self, facts: Any) -> None:
        self.facts = facts
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.closed = asyncio.Event()

    async def start(self, engine: str, **own: Any) -> None:
        near, far = socket.socketpair()
        fds = (far.fileno(), self.listener.fileno())
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", RUN, *map(str, fds), pass_fds=fds, stderr=asyncio.subprocess.PIPE
        )
        far.close()
        self.listener.close()
        self.channel = await Channel.open(near, self.facts, self.closed.set)
        text = settings.to_json(settings.Settings(engine=engine, **own))
        self.channel.send(Configure(text, 0, "", "vllm", units.to_json(units.Coefficients())))
        await self.facts.wait(Pulse)

    async def ended(self) -> tuple[int | None, bytes]:
        async with asyncio.timeout(10):
            _, errors = await self.process.communicate()
        return self.process.returncode, errors

    async def refused(self) -> None:
        """Returns once new connections are refused."""
        async with asyncio.timeout(10):
            while True:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                except ConnectionRefusedError:
                    return
                except ConnectionError:  # it was in the queue when the listener closed
                    continue
                writer.close()


@pytest.fixture
async def relay_process(facts: Any) -> AsyncIterator[Callable[..., Awaitable[Process]]]:
    async with AsyncExitStack() as stack:

        async def start(engine: str, **own: Any) -> Process:
            process = Process(facts)
            await process.start(engine, **own)
            stack.push_async_callback(_stop, process)
            return process

        yield start


async def _stop(process: Process) -> None:
    if process.process.returncode is None:
        process.process.kill()
    await process.process.wait()
    process.channel.close()
    await process.closed.wait()


async def two_step_engine(serve: Any) -> tuple[str, asyncio.Event]:
    """(URL, event that lets it end) of an engine that sends one event and then waits."""
    go_on = asyncio.Event()

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(EVENT)
        async with asyncio.timeout(10):
            await go_on.wait()
        await response.write(EVENT)
        return response

    return await serve(engine), go_on


async def begin(client: aiohttp.ClientSession, process: Process) -> aiohttp.ClientResponse:
    """A stream through the relay, with its first event read."""
    got = await client.post(process.url + "/v1/completions", json={"stream": True, "prompt": "x"})
    assert await got.content.readany() == EVENT
    return got


@pytest.mark.parametrize("how", ["drain", "control dies"])
async def test_open_streams_finish(relay_process: Any, serve: Any, how: str) -> None:
    """Drained or orphaned, the process stops accepting at once, lets its stream end whole, and exits 0."""
    url, go_on = await two_step_engine(serve)
    process = await relay_process(url)
    async with aiohttp.ClientSession() as client:
        got = await begin(client, process)
        if how == "drain":
            process.channel.send(Drain(30.0))
        else:
            process.channel.close()
        await process.refused()
        go_on.set()
        assert await got.read() == EVENT
    assert await process.ended() == (0, b"")
    if how == "drain":
        assert process.facts.of(Settled)[0].outcome == "ok"


async def test_a_drain_has_an_end(relay_process: Any, serve: Any) -> None:
    """A stream that outlasts the drain is cut off, told to control as lost, and the process still exits 0."""
    url, _ = await two_step_engine(serve)
    process = await relay_process(url)
    async with aiohttp.ClientSession() as client:
        got = await begin(client, process)
        process.channel.send(Drain(0.05))
        with pytest.raises(aiohttp.ClientPayloadError):
            await got.read()
    code, errors = await process.ended()
    assert code == 0
    assert b"cut off" in errors
    [settled] = process.facts.of(Settled)
    assert (settled.outcome, settled.error) == ("lost", "drain_cut")


async def test_idle_connections_do_not_delay_the_end(relay_process: Any, serve: Any) -> None:
    """A client's idle keep-alive connection is closed by the drain, not waited for."""

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(text="ok")

    process = await relay_process(await serve(engine))
    async with aiohttp.ClientSession() as client:
        async with client.get(process.url + "/health") as got:
            assert await got.text() == "ok"
        process.channel.send(Drain(600.0))
        assert await process.ended() == (0, b"")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signals_are_controls_to_obey(relay_process: Any, serve: Any, number: signal.Signals) -> None:
    """SIGTERM and SIGINT, which the whole group gets, end no stream: the control process drains."""
    url, go_on = await two_step_engine(serve)
    process = await relay_process(url)
    async with aiohttp.ClientSession() as client:
        got = await begin(client, process)
        process.process.send_signal(number)
        go_on.set()
        assert await got.read() == EVENT
    process.channel.send(Drain(5.0))
    assert (await process.ended())[0] == 0


async def test_facts_and_orders_cross_the_channel(relay_process: Any, serve: Any) -> None:
    """Admission to settlement reach control in order, pulses tell lag and load, and a page comes back to the scraper."""
    url, go_on = await two_step_engine(serve)
    process = await relay_process(url)
    async with aiohttp.ClientSession() as client:
        got = await begin(client, process)
        seen = len(process.facts.of(Pulse))
        pulse = (await process.facts.wait(Pulse, seen + 1))[-1]
        assert pulse.open == 1
        assert pulse.lag >= 0
        scrape = asyncio.create_task(client.get(process.url + "/metrics"))
        await process.facts.wait(PageWanted)
        process.channel.send(Page(0.0, "ours 1\n"))
        assert await (await scrape).text() == "ours 1\n"
        go_on.set()
        await got.read()
    await process.facts.wait(Settled)
    order = [type(f) for f in process.facts.all if isinstance(f, Admitted | FirstToken | Settled)]
    assert order == [Admitted, FirstToken, Settled]


async def test_without_a_configuration_it_ends(facts: Any) -> None:
    """A control process that dies before it configured the relay leaves no orphan behind."""
    process = Process(facts)
    near, far = socket.socketpair()
    fds = (far.fileno(), process.listener.fileno())
    process.process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", RUN, *map(str, fds), pass_fds=fds, stderr=asyncio.subprocess.PIPE
    )
    for sock in (near, far, process.listener):
        sock.close()
    code, errors = await process.ended()
    assert code == 1
    assert b"no configuration" in errors


async def test_a_relay_is_small() -> None:
    """Importing a relay process brings in no metrics, tracing, NVML, psutil or image library."""
    code = "import sys, sidecar.relay.process; print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE, env={**os.environ, "PYTHONPATH": ""}
    )
    out, _ = await process.communicate()
    loaded = set(out.decode().split())
    assert "aiohttp" in loaded
    assert not loaded & {"prometheus_client", "opentelemetry", "psutil", "pynvml", "torch", "numpy", "PIL", "click"}
