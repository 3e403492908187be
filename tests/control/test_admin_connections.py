"""Who may hold a connection to the admin port, and for how long."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress

import aiohttp
import pytest
from aiohttp import web

from sidecar.control import admin_connections
from sidecar.control.admin_connections import AdminConnection, AdminConnections, AdminLimits, admin_limits, to_close

from ..few_files import no_files_left
from ..waiting import PATIENCE

NOW = 100.0
LIMITS = AdminLimits(all=6, per_client=3)


def open_(*clients: str, busy: tuple[int, ...] = ()) -> list[AdminConnection]:
    """Connections of these clients, oldest first."""
    return [AdminConnection(client, float(n), is_busy=n in busy) for n, client in enumerate(clients)]


def test_there_is_room_below_the_bounds() -> None:
    """No connection is closed without need."""
    assert to_close(open_("a", "a", "b"), "b", LIMITS, NOW) is None
    assert to_close((), "a", LIMITS, NOW) is None


def test_a_client_at_its_bound_closes_its_own_longest_idle() -> None:
    """Also where an older one is another client's, or busy."""
    held = open_("b", "a", "a", "a", busy=(1,))
    assert to_close(held, "a", LIMITS, NOW) is held[2]


def test_at_the_bound_of_all_the_client_with_most_closes() -> None:
    """A prober with one connection keeps it, however old it is."""
    held = open_("kubelet", "a", "a", "b", "a", "b")
    assert to_close(held, "new", LIMITS, NOW) is held[1]


def test_where_all_are_busy_the_oldest_goes() -> None:
    """Streams that are never read keep no probe out."""
    held = open_("a", "a", "a", busy=(0, 1, 2))
    assert to_close(held, "a", LIMITS, NOW) is held[0]


def test_one_that_has_just_come_is_the_last_to_go() -> None:
    """A probe whose request is still on its way is not taken for an idle connection."""
    held = open_("a", "a", "a", busy=(0, 1))
    held[2].since = NOW
    assert to_close(held, "a", LIMITS, NOW) is held[0]


@pytest.mark.parametrize("limit", [16, 64, 256, 1024, 1 << 20])
def test_the_bounds_leave_files_for_the_judge(limit: int) -> None:
    """Connections take a quarter of them at most."""
    limits = admin_limits(limit)
    assert 1 <= limits.per_client < limits.all <= limit // 4 <= max(limit // 4, admin_connections.MAX_CONNECTIONS)


Port = tuple[str, int]
Serve = Callable[[AdminLimits], Awaitable[tuple[Port, AdminConnections]]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """A function: limits -> address of a server with `/` and a stream `/events`, and its connections."""
    async with AsyncExitStack() as stack:

        async def ok(request: web.Request) -> web.Response:
            return web.Response(text="ok")

        async def events(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            with suppress(ConnectionError):
                await response.prepare(request)
                await asyncio.Event().wait()
            return response

        async def start(limits: AdminLimits) -> tuple[Port, AdminConnections]:
            connections = AdminConnections(limits)
            app = web.Application(middlewares=[connections.track])
            app.add_routes([web.get("/", ok), web.get("/events", events)])
            runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            listener = stack.enter_context(socket.create_server(("0.0.0.0", 0)))
            listener.setblocking(False)
            assert runner.server is not None
            stack.callback(asyncio.create_task(connections.run(runner.server, listener)).cancel)
            return ("127.0.0.1", listener.getsockname()[1]), connections

        yield start


async def get(address: Port) -> str:
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(PATIENCE)) as client,
        client.get(f"http://{address[0]}:{address[1]}/") as answer,
    ):
        return await answer.text()


async def closed(reader: asyncio.StreamReader) -> None:
    """Wait until the server has ended a connection."""
    async with asyncio.timeout(PATIENCE):
        with suppress(ConnectionError):
            while await reader.read(1 << 16):
                pass


@pytest.mark.parametrize("begun", [b"", b"GET / HTTP/1.1\r\nhost:", b"GET /events HTTP/1.1\r\nhost: x\r\n\r\n"])
async def test_one_client_holds_no_more_than_its_share_and_shuts_nobody_out(serve: Serve, begun: bytes) -> None:
    """Idle connections, unfinished heads and unread streams: each new one costs the oldest, and probes are answered."""
    address, connections = await serve(LIMITS)
    held = []
    for _ in range(20):
        reader, writer = await asyncio.open_connection(*address)
        writer.write(begun)
        held.append((reader, writer))
        assert await get(address) == "ok"
        assert len(connections) <= LIMITS.per_client
    for reader, _ in held[: -LIMITS.per_client]:
        await closed(reader)
    for _, writer in held:
        writer.close()


async def test_another_client_keeps_its_connection(serve: Serve) -> None:
    """A scraper's kept connection outlives a flood from elsewhere, and is still answered."""
    address, _ = await serve(AdminLimits(4, 4))
    reader, writer = await asyncio.open_connection(*address, local_addr=("127.0.0.2", 0))
    flood = [await asyncio.open_connection(*address) for _ in range(30)]
    await closed(flood[0][0])
    writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    async with asyncio.timeout(PATIENCE):
        assert b"200" in await reader.readline()
    for _, other in [*flood, (reader, writer)]:
        other.close()


async def test_a_head_that_is_never_whole_ends_its_connection(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """However slowly it drips; so does an idle kept connection, and a stream goes on."""
    monkeypatch.setattr(admin_connections, "HEAD_TIMEOUT_S", 0.2)
    monkeypatch.setattr(admin_connections, "IDLE_TIMEOUT_S", 0.2)
    monkeypatch.setattr(admin_connections, "CHECK_INTERVAL_S", 0.05)
    address, connections = await serve(AdminLimits(16, 16))
    stream, writer = await asyncio.open_connection(*address)
    writer.write(b"GET /events HTTP/1.1\r\nhost: x\r\n\r\n")
    await stream.readuntil(b"\r\n\r\n")
    held = [writer]
    for begun in (b"", b"GET / HTTP/1.1\r\nho", b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"):
        reader, writer = await asyncio.open_connection(*address)
        writer.write(begun)
        await closed(reader)
        held.append(writer)
    assert len(connections) == 1
    for writer in held:
        writer.close()


async def test_without_files_the_oldest_makes_room(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """The process ran out of files: one that is held for nothing is closed, one line says why, and probes go on."""
    address, connections = await serve(AdminLimits(16, 16))
    held = [await asyncio.open_connection(*address) for _ in range(3)]
    async with asyncio.timeout(PATIENCE):
        while len(connections) < 3:  # noqa: ASYNC110  accepting has no event
            await asyncio.sleep(0)
    with socket.socket() as late:
        late.setblocking(False)
        with no_files_left():
            await asyncio.get_running_loop().sock_connect(late, address)
            await closed(held[0][0])
    assert await get(address) == "ok"
    assert caplog.text.count("no file descriptors left") == 1
    for _, writer in held:
        writer.close()
