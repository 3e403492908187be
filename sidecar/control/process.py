"""Composition root of the control process: builds, wires, starts, stops in order.

Order of stopping: readiness off while the relays drain their streams, then the judge, and the admin port last, so that kubelet has
an answer to the end. The supervisor says when each is due (see supervisor.py).
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
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiohttp import web

from sidecar import __version__
from sidecar.control.admin_api import Sources, make_app
from sidecar.control.diagnosis import Diagnoses
from sidecar.control.loop import ControlLoop, Signals, Sinks
from sidecar.control.relay_pool import RelayPool
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

# Without a tick for so long, /healthz fails.
TICK_LOST_S = 5.0

_log = logging.getLogger("sidecar")


@dataclass(frozen=True, slots=True)
class ListeningSockets:
    """Listening sockets of the supervisor's: for probes and pages, and for relays that report."""

    admin: socket.socket
    joining: socket.socket


async def run(
    chosen: Settings, co: cost_model.Coefficients, doors: ListeningSockets, serving: Callable[[], None]
) -> None:
    """Serve until SIGUSR1; SIGTERM and SIGINT only withdraw readiness. `serving` is called once the admin port answers.

    Raises UsageError and StartError before that.
    """
    ended = asyncio.Event()
    async with AsyncExitStack() as stack:
        state = StateDir(chosen.state_dir)
        stack.callback(state.clear)
        session = await stack.enter_async_context(open_session())
        ticker, signals, feed = build(chosen, co, state, session, stack)
        listen(lambda: drain(ticker, chosen.drain_seconds), ended.set)
        pool = RelayPool(chosen.workers, ticker.on_event, ticker.on_lost)
        ticker.attach(pool)
        await serve_admin(ticker, pool, feed, doors.admin, stack)
        serving()
        _log.info("relay on %s:%d, admin on %s:%d, engine %s", *chosen.listen, *chosen.admin, chosen.engine)
        duties: dict[str, Any] = {
            "relays": pool.run(doors.joining), "port": signals.port.run(), "ticks": ticker.run(),
            "engine": signals.engine.run(signals.port.opened),
        }  # fmt: skip
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(duty, name=name) for name, duty in duties.items()]
            await ended.wait()
            for task in tasks:
                task.cancel()


def listen(draining: Callable[[], None], ended: Callable[[], None]) -> None:
    """Say what the supervisor's signals mean, then let in those that it sent before."""
    loop = asyncio.get_running_loop()
    for number, meaning in ((signal.SIGTERM, draining), (signal.SIGINT, draining), (signal.SIGUSR1, ended)):
        loop.add_signal_handler(number, meaning)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def drain(ticker: ControlLoop, seconds: float) -> None:
    """The relays let their streams finish; whoever sends new requests is to go elsewhere."""
    if not ticker.control.health.draining:
        _log.info("draining: readiness off, open streams have %.0f s", seconds)
        ticker.control.health.draining = True


def build(
    settings: Settings,
    co: cost_model.Coefficients,
    state_dir: StateDir,
    session: aiohttp.ClientSession,
    stack: AsyncExitStack,
) -> tuple[ControlLoop, Signals, PageFeed]:
    """The control loop with its signals and sinks."""
    metrics, feed = Metrics(max_tenants=settings.max_tenants), PageFeed()
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
    price_terms, dollars = control.price_terms, settings.dollars_per_gpu_hour
    fan_out = FanOut(metrics, tracing, usage, price_terms, control.unit_ms, dollars)
    pages, diagnoses = MetricsPages(metrics.registry), Diagnoses(state_dir)
    sinks = Sinks(fan_out, pages, feed, diagnoses, state_dir, state_store, usage)
    return ControlLoop(control, signals, sinks), signals, feed


async def serve_admin(
    ticker: ControlLoop, pool: RelayPool, feed: PageFeed, sock: socket.socket, stack: AsyncExitStack
) -> None:
    """The admin port, until the stack unwinds."""

    def health() -> tuple[bool, dict[str, Any]]:
        now = time.monotonic()
        relays = [
            {"index": r.index, "pid": r.pid, "restarts": r.restarts, "pulse_age": r.pulse_age} for r in pool.use(now)
        ]
        well = now - ticker.ticked_at < TICK_LOST_S and any(r["pid"] for r in relays)
        return well, {"pid": os.getpid(), "relays": relays, "loop_lag": ticker.control.health.lag}

    sinks = ticker.sinks
    sources = Sources(
        ticker.control.health.probe_state,
        lambda: ticker.snapshot,
        health,
        sinks.pages,
        feed,
        sinks.diagnoses,
        ticker.control.upkeep,
    )
    runner = web.AppRunner(make_app(sources), access_log=None, shutdown_timeout=1)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    stack.callback(feed.close)
    await web.SockSite(runner, sock).start()
