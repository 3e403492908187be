"""Composition root of the control process: builds, wires, starts, stops in order.

It stops in this order: readiness off while the relays drain their streams, then the control loop, and the admin port
last, so that kubelet has an answer to the end. The supervisor signals when each is due (see supervisor.py).
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import AsyncExitStack

import aiohttp
from aiohttp import web

from sidecar import __version__
from sidecar.control.admin_api import make_app
from sidecar.control.diagnosis import Diagnoses
from sidecar.control.loop import ControlLoop, Signals, Sinks
from sidecar.control.state import ControlState
from sidecar.control.state_dir import StateDir
from sidecar.control.state_store import StateStore
from sidecar.load import cost_model
from sidecar.report.fan_out import FanOut
from sidecar.report.live_page import PageFeed
from sidecar.report.metrics import Metrics
from sidecar.report.prometheus import MetricsPages
from sidecar.report.tracing import Tracing
from sidecar.report.usage_store import UsageStore
from sidecar.settings import Settings
from sidecar.signals.engine_monitor import EngineMonitor, open_session
from sidecar.signals.gpu.poller import GpuSignal
from sidecar.signals.port import PortSignal
from sidecar.signals.process_examiner import ProcessExaminer

_log = logging.getLogger("sidecar")


async def run(
    settings: Settings,
    co: cost_model.Coefficients,
    admin: socket.socket,
    joining: socket.socket,
    serving: Callable[[], None],
) -> None:
    """Serve until SIGUSR1; SIGTERM and SIGINT only withdraw readiness.

    The supervisor listens on `admin`, for probes and pages, and on `joining`, for relays that report. `serving` is
    called once the admin port answers. Raises UsageError and StartError before that.
    """
    ended = asyncio.Event()
    async with AsyncExitStack() as stack:
        state_dir = StateDir(settings.state_dir)
        stack.callback(state_dir.clear)
        session = await stack.enter_async_context(open_session())
        loop = build(settings, co, state_dir, session, stack)
        handle_signals(lambda: drain(loop, settings.drain_seconds), ended.set)
        await serve_admin(loop, admin, stack)
        serving()
        _log.info("relay on %s:%d, admin on %s:%d, engine %s", *settings.listen, *settings.admin, settings.engine)
        engine, port = loop.signals.engine, loop.signals.port
        async with asyncio.TaskGroup() as group:
            work = loop.pool.run(joining), port.run(), loop.run(), engine.run(port.opened)
            tasks = [group.create_task(part) for part in work]
            await ended.wait()
            for task in tasks:
                task.cancel()


def handle_signals(draining: Callable[[], None], ended: Callable[[], None]) -> None:
    """Handle the supervisor's signals, those that it sent before included."""
    loop = asyncio.get_running_loop()
    for number, handler in ((signal.SIGTERM, draining), (signal.SIGINT, draining), (signal.SIGUSR1, ended)):
        loop.add_signal_handler(number, handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def drain(loop: ControlLoop, seconds: float) -> None:
    """Withdraw readiness, so that new requests go elsewhere while the relays finish their streams."""
    if not loop.control.health.draining:
        _log.info("draining: readiness off, open streams have %.0f s", seconds)
        loop.control.health.draining = True


def build(
    settings: Settings,
    co: cost_model.Coefficients,
    state_dir: StateDir,
    session: aiohttp.ClientSession,
    stack: AsyncExitStack,
) -> ControlLoop:
    """The control loop with its signals and sinks."""
    metrics = Metrics(max_tenants=settings.max_tenants)
    tracing = Tracing(settings.otlp_endpoint, __version__)
    stack.push_async_callback(tracing.close)
    gpus = GpuSignal()
    gpus.start()
    stack.push_async_callback(gpus.stop)
    pod = ".".join(filter(None, (os.environ.get("POD_NAME"), os.environ.get("POD_UID"))))
    engine = EngineMonitor(session, settings)
    signals = Signals(engine, PortSignal(settings.engine), gpus, ProcessExaminer(settings.engine))
    control = ControlState(settings, co, time.monotonic(), time.time(), pod)
    state_store = StateStore(state_dir, settings.engine, co.fingerprint)
    state_store.restore(control, time.monotonic())
    usage = None
    if settings.usage_bytes:
        usage = UsageStore(state_dir.path, control.unit_ms, settings.usage_days, settings.usage_bytes)
    dollars = settings.dollars_per_gpu_hour
    fan_out = FanOut(metrics, tracing, usage, control.price_terms, control.unit_ms, dollars)
    pages, diagnoses = MetricsPages(metrics.registry), Diagnoses(state_dir)
    sinks = Sinks(fan_out, pages, PageFeed(), diagnoses, state_dir, state_store, usage)
    return ControlLoop(control, signals, sinks, settings.workers)


async def serve_admin(loop: ControlLoop, sock: socket.socket, stack: AsyncExitStack) -> None:
    """The admin port, until the stack unwinds."""
    runner = web.AppRunner(make_app(loop), access_log=None, shutdown_timeout=1)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    stack.callback(loop.sinks.feed.close)
    await web.SockSite(runner, sock).start()
