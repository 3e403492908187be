"""The control process: starts its parts, and stops them in order.

It stops in this order: readiness off while the relays drain their streams, then the control loop, and the admin port
last, so that kubelet has an answer to the end. The supervisor signals when each is due (see supervisor.py).
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import Final

import aiohttp
from aiohttp import web

from sidecar.control.admin_api import make_app
from sidecar.control.admin_connections import AdminConnections, admin_limits
from sidecar.control.loop import ControlLoop
from sidecar.control.state_dir import StateDir
from sidecar.load.cost_model import Coefficients
from sidecar.runtime import open_files, own_gpu_use
from sidecar.runtime.own_gpu_use import UNUSED, OwnGpuUse
from sidecar.runtime.service_manager import ServiceManager
from sidecar.settings import Settings
from sidecar.signals.engine_address import EngineAddress
from sidecar.signals.engine_monitor import open_session

CANCEL_AGAIN_S: Final = 0.5
BEAT_S: Final = 5.0
# Without a beat for so long, this process hangs. A starved one still has its ticks.
HANG_ALARM_S: Final = 60

_log = logging.getLogger("sidecar")


async def run(
    settings: Settings, co: Coefficients, admin: socket.socket, joining: socket.socket, serving: Callable[[], None]
) -> None:
    """Serve until SIGUSR1; SIGTERM and SIGINT only withdraw readiness.

    The supervisor listens on `admin`, for probes and pages, and on `joining`, for relays that report. `serving` is
    called once the admin port answers. Raises UsageError and StartError before that.
    """
    ended = asyncio.Event()
    async with AsyncExitStack() as stack:
        state_dir = StateDir(settings.state_dir)
        with suppress(OSError):
            state_dir.sweep()
        stack.callback(state_dir.clear)
        session = await stack.enter_async_context(open_session(EngineAddress(settings.engine, settings.engine_ca)))
        own_gpu = partial(own_gpu_use.read, own_gpu_use.next_to(joining.getsockname()))
        loop = build(settings, co, state_dir, session, stack, own_gpu)
        manager = ServiceManager()
        handle_signals(lambda: drain(loop, settings.drain_seconds, manager), ended.set)
        await serve_admin(loop, admin, stack)
        serving()
        manager.ready(loop.status)
        _log.info("relay on %s:%d, admin on %s:%d, engine %s", *settings.listen, *settings.admin, settings.engine)
        try:
            async with asyncio.TaskGroup() as group:
                work = (
                    loop.pool.run(joining),
                    loop.port.run(),
                    loop.run(),
                    loop.engine.run(loop.port.opened),
                    beat(loop, manager),
                )
                tasks = [group.create_task(part) for part in work]
                await ended.wait()
                await _end(tasks)
        finally:
            await loop.close()


async def _end(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancel tasks until they have ended.

    One cancellation may be lost: before Python 3.12, asyncio.wait_for swallows it if the awaited task completes in
    the same moment (python/cpython#86296).
    """
    pending: set[asyncio.Task[None]] = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=CANCEL_AGAIN_S)


def handle_signals(draining: Callable[[], None], ended: Callable[[], None]) -> None:
    """Handle the supervisor's signals, those that it sent before included."""
    loop = asyncio.get_running_loop()
    for number, handler in ((signal.SIGTERM, draining), (signal.SIGINT, draining), (signal.SIGUSR1, ended)):
        loop.add_signal_handler(number, handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


async def beat(loop: ControlLoop, manager: ServiceManager) -> None:
    """Until cancelled, show the kernel and the service manager that this process works.

    If it hangs, the kernel ends it and the supervisor starts another, long before a service manager's watchdog would
    restart the whole unit with the engine in it.
    """
    try:
        while True:
            if time.monotonic() - loop.ticked_at < BEAT_S:
                signal.alarm(HANG_ALARM_S)
                manager.alive(loop.status)
            await asyncio.sleep(BEAT_S)
    finally:
        signal.alarm(0)


def drain(loop: ControlLoop, seconds: float, manager: ServiceManager) -> None:
    """Withdraw readiness, so that new requests go elsewhere while the relays finish their streams."""
    if not loop.control.health.draining:
        manager.stopping()
        _log.info("draining: readiness off, open streams have %.0f s", seconds)
        loop.control.health.draining = True


def build(
    settings: Settings,
    co: Coefficients,
    state_dir: StateDir,
    session: aiohttp.ClientSession,
    stack: AsyncExitStack,
    own_gpu: Callable[[], OwnGpuUse] = lambda: UNUSED,
) -> ControlLoop:
    """The control loop; what it starts and opens ends with `stack`. `own_gpu`: how the sidecar uses the GPU."""
    loop = ControlLoop(settings, co, state_dir, session, own_gpu)
    stack.push_async_callback(loop.tracing.close)
    if loop.log_handler is not None:
        logging.getLogger().addHandler(loop.log_handler)
        stack.push_async_callback(loop.log_handler.stop)
        stack.callback(logging.getLogger().removeHandler, loop.log_handler)
    if loop.server_metrics is not None:
        stack.push_async_callback(loop.server_metrics.close)
    loop.gpus.start()
    stack.push_async_callback(loop.gpus.stop)
    return loop


async def serve_admin(loop: ControlLoop, sock: socket.socket, stack: AsyncExitStack) -> None:
    """The admin port, until the stack unwinds."""
    connections = AdminConnections(admin_limits(open_files.limit()))
    runner = web.AppRunner(make_app(loop, connections.track), access_log=None, shutdown_timeout=1)
    await runner.setup()
    assert runner.server is not None
    stack.push_async_callback(runner.cleanup)
    stack.callback(loop.feed.close)
    accepting = asyncio.create_task(connections.run(runner.server, sock))
    stack.callback(accepting.cancel)
