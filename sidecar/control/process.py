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

TICK_LOST = 5.0  # seconds without a tick before /healthz fails

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
            "contact": signals.contact.run(signals.port.opened),
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
    if not ticker.control.draining:
        _log.info("draining: readiness off, open streams have %.0f s", seconds)
        ticker.control.draining = True


def build(
    chosen: Settings,
    co: cost_model.Coefficients,
    state: StateDir,
    session: aiohttp.ClientSession,
    stack: AsyncExitStack,
) -> tuple[ControlLoop, Signals, PageFeed]:
    """The judge with its signals and sinks."""
    meters, feed = Metrics(max_tenants=chosen.max_tenants), PageFeed()
    tracing = Tracing(chosen.otlp_endpoint, __version__)
    stack.push_async_callback(tracing.close)
    gpus = GpuSignal()
    gpus.start()
    stack.push_async_callback(gpus.stop)
    pod = ".".join(filter(None, (os.environ.get("POD_NAME"), os.environ.get("POD_UID"))))
    signals = Signals(EngineMonitor(session, chosen), PortSignal(chosen.engine), gpus, ProcessExaminer(chosen.engine))
    control = ControlState(chosen, co, time.monotonic(), time.time(), pod)
    keeping = StateStore(state, chosen.engine, co.fingerprint)
    keeping.restore(control, time.monotonic())
    kept = chosen.usage_bytes
    records = UsageStore(state.path, control.unit_ms, chosen.usage_days, kept) if kept else None
    sinks = Sinks(meters, MetricsPages(meters.registry), feed, Diagnoses(state), state, tracing, keeping, records)
    ticker = ControlLoop(control, signals, sinks, chosen.dollars_per_gpu_hour)
    return ticker, signals, feed


async def serve_admin(
    ticker: ControlLoop, pool: RelayPool, feed: PageFeed, sock: socket.socket, stack: AsyncExitStack
) -> None:
    """The admin port, until the stack unwinds."""

    def health() -> tuple[bool, dict[str, Any]]:
        now = time.monotonic()
        relays = [
            {"index": r.index, "pid": r.pid, "restarts": r.restarts, "pulse_age": r.pulse_age} for r in pool.use(now)
        ]
        well = now - ticker.ticked_at < TICK_LOST and any(r["pid"] for r in relays)
        return well, {"pid": os.getpid(), "relays": relays, "loop_lag": ticker.control.lag}

    sinks = ticker.sinks
    sources = Sources(
        ticker.stand, lambda: ticker.snapshot, health, sinks.pages, feed, sinks.diagnoses, ticker.control.upkeep
    )
    runner = web.AppRunner(make_app(sources), access_log=None, shutdown_timeout=1)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    stack.callback(feed.close)
    await web.SockSite(runner, sock).start()
