"""A relay process: served, drained, and without its control process, as supervisor and control see it."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from sidecar import settings
from sidecar.events import (
    Admitted,
    FirstToken,
    Heartbeat,
    MetricsPage,
    MetricsPageRequested,
    RelayConnected,
    Settled,
    SettlementsAcked,
    UnreadRequest,
)
from sidecar.relay import process
from sidecar.runtime.channel import Channel
from sidecar.runtime.open_files import is_scarce

from ..waiting import PATIENCE

RUN = """
import socket, sys
from sidecar import settings; from sidecar.load.cost_model import Coefficients
from sidecar.relay.process import RelayContext, main
context = RelayContext(settings.from_json(sys.argv[1]), Coefficients(), sys.argv[2], b"", b"", index=3, restarts=2)
sys.exit(main(context, socket.socket(fileno=int(sys.argv[3]))))
"""
EVENT = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'
DONE = b"data: [DONE]\n\n"


class Control:
    """A control process's end: takes the relay's connection on a Unix socket."""

    def __init__(self, emitted: Any) -> None:
        self.emitted = emitted
        self.channel = Channel(emitted, self._left)
        self.left = asyncio.Event()

    def _left(self) -> None:
        self.left.set()

    @classmethod
    async def open(cls, path: Path, emitted: Any) -> Control:
        control = cls(emitted)
        control.server = await asyncio.get_running_loop().create_unix_server(lambda: control.channel, str(path))
        return control

    async def die(self) -> None:
        """As the kernel ends a process: its sockets close, nothing is sent."""
        self.server.close()
        self.channel.close()
        await self.left.wait()

    server: asyncio.Server


class Process:
    """A relay process and the control end of its connection."""

    def __init__(self, emitted: Any, folder: Path) -> None:
        self.emitted = emitted
        self.path = folder / "control"
        self.listener = socket.create_server(("0.0.0.0", 0))
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    async def start(self, engine: str, **own: Any) -> None:
        self.control = await Control.open(self.path, self.emitted)
        text = settings.to_json(settings.Settings(engine=engine, **{"engine_kind": "vllm", **own}))
        fd = self.listener.fileno()
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", RUN, text, str(self.path), str(fd), pass_fds=(fd,), stderr=asyncio.subprocess.PIPE
        )
        self.listener.close()
        await self.emitted.wait(Heartbeat)

    async def ended(self) -> tuple[int | None, bytes]:
        async with asyncio.timeout(PATIENCE):
            _, errors = await self.process.communicate()
        return self.process.returncode, errors

    async def refused(self) -> None:
        """Returns once new connections are refused."""
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                except ConnectionRefusedError:
                    return
                except ConnectionError:  # it was in the queue when the listener closed
                    continue
                writer.close()


@pytest.fixture
async def relay_process(emitted: Any, tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[Process]]]:
    async with AsyncExitStack() as stack:

        async def start(engine: str, **own: Any) -> Process:
            process = Process(emitted, tmp_path)
            await process.start(engine, **own)
            stack.push_async_callback(_stop, process)
            return process

        yield start


async def _stop(process: Process) -> None:
    if process.process.returncode is None:
        process.process.kill()
    await process.process.wait()
    await process.control.die()


async def two_step_engine(serve: Any) -> tuple[str, asyncio.Event]:
    """(URL, event that lets it end) of an engine that sends one event and then waits."""
    go_on = asyncio.Event()

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(EVENT)
        async with asyncio.timeout(PATIENCE):
            await go_on.wait()
        await response.write(EVENT + DONE)
        return response

    return await serve(engine), go_on


async def begin(client: aiohttp.ClientSession, process: Process) -> aiohttp.ClientResponse:
    """A stream through the relay, with its first event read."""
    got = await client.post(process.url + "/v1/completions", json={"stream": True, "prompt": "x"})
    assert await got.content.readany() == EVENT
    return got


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_drain_lets_open_streams_finish(relay_process: Any, serve: Any, number: signal.Signals) -> None:
    """SIGTERM or SIGINT: the process stops accepting at once, lets its stream end whole, reports it, and exits 0."""
    url, go_on = await two_step_engine(serve)
    process = await relay_process(url)
    async with aiohttp.ClientSession() as client:
        got = await begin(client, process)
        process.process.send_signal(number)
        await process.refused()
        go_on.set()
        assert await got.read() == EVENT + DONE
    assert await process.ended() == (0, b"")
    await process.control.left.wait()
    assert process.emitted.of(Settled)[0].outcome == "ok"


async def test_it_outlives_its_control_process(relay_process: Any, serve: Any, emitted: Any, tmp_path: Path) -> None:
    """Without control streams go on and new requests are served; the next control receives all open and ended ones."""
    url, go_on = await two_step_engine(serve)
    process = await relay_process(url)
    async with aiohttp.ClientSession() as client:
        streams = [await begin(client, process) for _ in range(2)]
        await emitted.wait(FirstToken, 2)
        await process.control.die()
        process.path.unlink()
        go_on.set()
        assert await streams[0].read() == EVENT + DONE  # without a control process
        async with client.post(process.url + "/v1/completions", json={"prompt": "x"}) as new:
            assert await new.read() == EVENT * 2 + DONE
        later = type(emitted)()
        process.control = await Control.open(process.path, later)
        await later.wait(Settled, 2)
        assert isinstance(later.all[0], RelayConnected)
        assert (later.all[0].index, later.all[0].pid, later.all[0].restarts) == (3, process.process.pid, 2)
        assert await streams[1].read() == EVENT + DONE
        await later.wait(Settled, 3)
    replayed = {event.id: event for event in later.of(Admitted)}
    assert set(replayed) == {event.id for event in later.of(Settled)} and len(replayed) == 3
    assert {event.id: event for event in emitted.of(Admitted)}.items() <= replayed.items()
    assert {event.outcome for event in later.of(Settled)} == {"ok"}


async def test_the_next_control_process_learns_of_open_calls(relay_process: Any, serve: Any, emitted: Any) -> None:
    """Unread calls that are open when control is replaced are reported to the next one, and so are their ends."""
    url, go_on = await two_step_engine(serve)
    process = await relay_process(url)
    async with aiohttp.ClientSession() as client:
        got = await client.post(process.url + "/v1/videos", json={"prompt": "x"})
        [open_call] = await emitted.wait(UnreadRequest)
        await process.control.die()
        process.path.unlink()
        later = type(emitted)()
        process.control = await Control.open(process.path, later)
        assert await later.wait(UnreadRequest) == [open_call]
        go_on.set()
        assert await got.read() == EVENT * 2 + DONE
        over = (await later.wait(UnreadRequest, 2))[1]
    assert (over.id, over.on, over.status) == (open_call.id, False, 200)


async def test_acknowledged_settlements_are_not_sent_again(relay_process: Any, serve: Any, emitted: Any) -> None:
    """A settlement is sent again to the next control process unless the last one acknowledged it."""

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(body=EVENT)

    process = await relay_process(await serve(engine))
    async with aiohttp.ClientSession() as client:
        for count in (1, 2):
            async with client.post(process.url + "/v1/completions", json={"prompt": "x"}) as got:
                await got.read()
            await emitted.wait(Settled, count)
    process.control.channel.send(SettlementsAcked(1))
    seen = len(emitted.of(Heartbeat))
    await emitted.wait(Heartbeat, seen + 1)  # the command was read before it
    await process.control.die()
    process.path.unlink()
    later = type(emitted)()
    process.control = await Control.open(process.path, later)
    await later.wait(Heartbeat)
    assert [event.id for event in later.of(Settled)] == [emitted.of(Settled)[1].id]


async def test_a_drain_has_an_end(relay_process: Any, serve: Any) -> None:
    """A stream that outlasts the drain ends with an error event, is reported as lost, and the process still exits 0."""
    url, _ = await two_step_engine(serve)
    process = await relay_process(url, drain_seconds=0.05)
    async with aiohttp.ClientSession() as client:
        got = await begin(client, process)
        process.process.terminate()
        assert b'"code": "drain_cut"' in (await got.read()).splitlines()[-2]
    code, errors = await process.ended()
    assert code == 0
    assert b"cut off" in errors
    await process.control.left.wait()
    [settled] = process.emitted.of(Settled)
    assert (settled.outcome, settled.error) == ("lost", "drain_cut")


async def test_idle_connections_do_not_delay_the_end(relay_process: Any, serve: Any) -> None:
    """A client's idle keep-alive connection is closed by the drain, not waited for."""

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(text="ok")

    process = await relay_process(await serve(engine), drain_seconds=600.0)
    async with aiohttp.ClientSession() as client:
        async with client.get(process.url + "/health") as got:
            assert await got.text() == "ok"
        process.process.terminate()
        assert await process.ended() == (0, b"")


def leave_files(pid: int, count: int) -> None:
    """Let a process open `count` files more; a limit bounds the highest number of a file."""
    taken = {int(fd.name) for fd in Path(f"/proc/{pid}/fd").iterdir()}
    *_, last = (number for _, number in zip(range(count), (n for n in range(1 << 16) if n not in taken), strict=False))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (last + 1, resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]))


async def test_its_own_limit_is_named(relay_process: Any, serve: Any) -> None:
    """Without a file for the engine's connection it blames itself, and reports it, once a minute in the log."""

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(text="ok")

    process = await relay_process(await serve(engine))
    leave_files(process.process.pid, 1)
    async with aiohttp.ClientSession() as client:
        for path in ("/v1/completions", "/tokenize"):
            async with client.post(process.url + path, json={"prompt": "x"}) as got:
                assert got.status == 503
                assert (await got.json())["error"]["code"] == "no_open_files"
        [settled] = await process.emitted.wait(Settled)
        assert (settled.outcome, settled.error) == ("rejected", "no_open_files")
        seen = len(process.emitted.of(Heartbeat))
        heartbeat = (await process.emitted.wait(Heartbeat, seen + 2))[-1]
        assert is_scarce(heartbeat.open_files, heartbeat.max_files)
        resource.prlimit(process.process.pid, resource.RLIMIT_NOFILE, (256, 256))
        async with client.post(process.url + "/tokenize") as got:
            assert await got.text() == "ok"
    process.process.terminate()
    _, errors = await process.ended()
    assert errors.count(b"file descriptors are in use") == 1


async def test_events_and_commands_cross_the_channel(relay_process: Any, serve: Any) -> None:
    """Admission to settlement reach control in order, heartbeats carry lag and load, and a page reaches the scraper."""
    url, go_on = await two_step_engine(serve)
    process = await relay_process(url)
    async with aiohttp.ClientSession() as client:
        got = await begin(client, process)
        seen = len(process.emitted.of(Heartbeat))
        pulse = (await process.emitted.wait(Heartbeat, seen + 1))[-1]
        assert pulse.open == 1
        assert pulse.lag >= 0
        scrape = asyncio.create_task(client.get(process.url + "/metrics"))
        await process.emitted.wait(MetricsPageRequested)
        process.control.channel.send(MetricsPage(0.0, "ours 1\n"))
        assert await (await scrape).text() == "ours 1\n"
        go_on.set()
        await got.read()
    await process.emitted.wait(Settled)
    order = [type(f) for f in process.emitted.all if isinstance(f, Admitted | FirstToken | Settled)]
    assert order == [Admitted, FirstToken, Settled]


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


async def test_a_duty_that_breaks_is_begun_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A background task that fails is started again after a second; the text of its error is not logged."""
    monkeypatch.setattr(process, "HEARTBEAT_INTERVAL_S", 0.01)
    runs: list[int] = []

    async def duty() -> None:
        runs.append(1)
        if len(runs) < 3:
            raise RuntimeError("a secret")

    await process._restarting(duty)
    assert len(runs) == 3
    assert "RuntimeError" in caplog.text and "secret" not in caplog.text
