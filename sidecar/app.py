"""Composition root of the control process: builds, wires, starts, stops in order.

Order of stopping: readiness off, relays drain their streams, then the judge, and the admin port last, so that kubelet has an
answer to the end.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import secrets
import shutil
import signal
import socket
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from sidecar import __version__, settings, units
from sidecar.admin import Sources, make_app
from sidecar.children import Child
from sidecar.contact import Contact
from sidecar.control import Control
from sidecar.diagnosis import Diagnoses
from sidecar.errors import StartError
from sidecar.examination import Examiner
from sidecar.facts import Configure
from sidecar.kernels import families
from sidecar.meters import Meters
from sidecar.relays import RelayPool
from sidecar.report.otel import Tracing
from sidecar.report.page import Feed
from sidecar.report.prometheus import Pages
from sidecar.settings import Settings
from sidecar.signals.gpu import GpuSignal
from sidecar.signals.port import PortSignal
from sidecar.statefile import StateDir
from sidecar.ticker import Signals, Sinks, Ticker

TICK_LOST = 5.0  # seconds without a tick before /healthz fails

_log = logging.getLogger("sidecar")


async def run(chosen: Settings) -> None:
    """Serve until SIGTERM or SIGINT; then drain and return. Raises UsageError and StartError before anything is served."""
    co = coefficients(chosen)
    chosen = replace(chosen, images=image_mode(chosen))
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with AsyncExitStack() as stack:
        state = StateDir(chosen.state_dir)
        stack.callback(state.clear)
        listener = stack.enter_context(bind("listen", chosen.listen))
        admin = stack.enter_context(bind("admin", chosen.admin))
        session = await stack.enter_async_context(aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()))
        ticker, signals, feed = build(chosen, co, state, session, stack)
        images = ImageServer(chosen, stack) if chosen.images != "off" else None
        pool = RelayPool(chosen.workers, listener, configure(chosen, co, images), ticker.on_fact, ticker.on_lost)
        ticker.attach(pool)
        await serve_admin(ticker, pool, feed, admin, stack)
        _log.info("relay on %s:%d, admin on %s:%d, engine %s", *chosen.listen, *chosen.admin, chosen.engine)
        duties: dict[str, Any] = {
            "relays": pool.run(), "port": signals.port.run(), "ticks": ticker.run(),
            "contact": signals.contact.run(signals.port.opened),
        }  # fmt: skip
        if images is not None:
            duties["images"] = images.run()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(duty, name=name) for name, duty in duties.items()]
            await stop.wait()
            _log.info("draining: readiness off, open streams have %.0f s", chosen.drain_seconds)
            ticker.control.draining = True
            listener.close()  # the relays close theirs; ours would keep new connections waiting in the kernel
            await pool.drain(chosen.drain_seconds)
            if images is not None:
                await images.stop()
            for task in tasks:
                task.cancel()


def build(
    chosen: Settings, co: units.Coefficients, state: StateDir, session: aiohttp.ClientSession, stack: AsyncExitStack
) -> tuple[Ticker, Signals, Feed]:
    """The judge with its signals and sinks."""
    meters, feed = Meters(max_tenants=chosen.max_tenants), Feed()
    tracing = Tracing(chosen.otlp_endpoint, __version__)
    stack.push_async_callback(tracing.close)
    gpus = GpuSignal()
    gpus.start()
    stack.push_async_callback(gpus.stop)
    signals = Signals(Contact(session, chosen), PortSignal(chosen.engine), gpus, Examiner(chosen.engine))
    control = Control(chosen, co, time.monotonic(), time.time())
    sinks = Sinks(meters, Pages(meters.registry), feed, Diagnoses(state), state, tracing)
    ticker = Ticker(control, signals, sinks, chosen.dollars_per_gpu_hour)
    return ticker, signals, feed


async def serve_admin(ticker: Ticker, pool: RelayPool, feed: Feed, sock: socket.socket, stack: AsyncExitStack) -> None:
    """The admin port, until the stack unwinds."""

    def health() -> tuple[bool, dict[str, Any]]:
        now = time.monotonic()
        relays = [
            {"index": r.index, "pid": r.pid, "restarts": r.restarts, "pulse_age": r.pulse_age} for r in pool.use(now)
        ]
        well = now - ticker.ticked_at < TICK_LOST and any(r["pid"] for r in relays)
        return well, {"relays": relays, "loop_lag": ticker.control.lag}

    sinks = ticker.sinks
    sources = Sources(ticker.stand, lambda: ticker.snapshot, health, sinks.pages, feed, sinks.diagnoses)
    runner = web.AppRunner(make_app(sources), access_log=None, shutdown_timeout=1)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    stack.callback(feed.close)
    await web.SockSite(runner, sock).start()


def configure(chosen: Settings, co: units.Coefficients, images: ImageServer | None) -> Any:
    """What a relay process is told first, by its index."""
    text, prices = settings.to_json(chosen), units.to_json(co)
    kind = chosen.engine_kind if chosen.engine_kind != "auto" else ""
    path, key = images.path if images else "", secrets.token_hex(32)
    return lambda index: Configure(text, index, path, kind, prices, key)


class ImageServer:
    """The image server process and the socket that it listens on."""

    def __init__(self, chosen: Settings, stack: AsyncExitStack) -> None:
        folder = tempfile.mkdtemp(prefix="sidecar-")  # mode 0700
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        self.path = str(Path(folder) / "images")
        self._listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        self._listener.bind(self.path)
        self._listener.listen(1024)
        self._settings = settings.to_json(chosen)
        self._child = Child("image server", self._args, self._started)

    async def run(self) -> None:
        """Keep it running until stopped."""

        async def ended() -> None:
            return None

        await self._child.run(ended)

    async def stop(self) -> None:
        """End it."""
        await self._child.stop(5)

    def _args(self) -> tuple[list[str], list[int]]:
        number = self._listener.dup().detach()
        return ["image-server", "--listen-fd", str(number)], [number]

    async def _started(self, child: asyncio.subprocess.Process) -> None:
        assert child.stdin is not None
        child.stdin.write(self._settings.encode() + b"\n")  # a pipe, because settings hold a key
        await child.stdin.drain()


def coefficients(chosen: Settings) -> units.Coefficients:
    """The coefficients file, or the documented defaults. Raises UsageError."""
    if not chosen.coefficients:
        return units.Coefficients()
    return units.from_json(Path(chosen.coefficients).read_text(), f"--coefficients {chosen.coefficients}")


def image_mode(chosen: Settings) -> str:
    """ "inline" or "off". Raises StartError where images were asked for and cannot be had."""
    why = no_images(chosen)
    _log.info("images: %s", f"off ({why})" if why else "inline")
    if not why:
        return "inline"
    if chosen.images in ("auto", "off"):
        return "off"
    raise StartError(f"--images {chosen.images}: {why}")


def no_images(chosen: Settings) -> str:
    """Why images cannot be prepared; empty where they can."""
    if chosen.images == "off":
        return "as chosen"
    if chosen.images == "shm":
        return "the shm hand-off is not built yet; use inline"
    if not chosen.model or families.from_dir(chosen.model) is None:
        return "no --model directory with a known image processor (preprocessor_config.json)"
    if importlib.util.find_spec("torchvision") is None:
        return "the extra is not installed; pip install 'inference-sidecar[images]'"
    return ""


def bind(name: str, address: tuple[str, int]) -> socket.socket:
    """A listening socket. Raises StartError that names the port."""
    host, port = address
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(1024)
    except OSError as e:
        sock.close()
        text = f"--{name}: port {port} on {host} cannot be used ({e.strerror}); free it or choose another"
        raise StartError(text) from None
    sock.setblocking(False)
    return sock
