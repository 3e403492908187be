"""One relay process: a listening socket and a path to the control process in, a served data path out.

Rules: it outlives every control process. Without one it serves as before, and it reports what is open to the next one
(control_link.py). SIGTERM and SIGINT, which the whole process group may get, mean drain: it stops accepting at once,
finishes its streams, and exits. Metrics, tracing and NVML are never imported here, to keep a relay small.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import uvloop

from sidecar.errors import place_of
from sidecar.events import Event, Heartbeat, RelayConnected
from sidecar.images.vllm_plugin import PluginWatch
from sidecar.kernels import families
from sidecar.load.cost_model import Coefficients
from sidecar.load.estimator import Estimator
from sidecar.load.tenant_limits import TenantLimits
from sidecar.relay import url_policy
from sidecar.relay.control_link import ControlLink
from sidecar.relay.handler import Relay
from sidecar.relay.media.fetch import Fetcher
from sidecar.relay.media.inline import Fetch
from sidecar.relay.pricing import tokenizer
from sidecar.relay.pricing.charge import Pricing
from sidecar.relay.pricing.quota import Quota
from sidecar.relay.pricing.tenant_accounts import TenantAccounts
from sidecar.relay.render_api import RenderApi
from sidecar.render.protocol import RenderSettings
from sidecar.render.workers import RenderWorkers
from sidecar.runtime import open_files
from sidecar.runtime.limited_log import LimitedLog
from sidecar.settings import Settings

_log = logging.getLogger(__name__)

HEARTBEAT_INTERVAL_S: Final = 1.0
_LAG_CHECKS_PER_HEARTBEAT: Final = 4  # a heartbeat carries the largest lag
_LISTEN_BACKLOG: Final = 1024


@dataclass(frozen=True, slots=True)
class RelayContext:
    """Everything that a relay process is started with. `control` is the path of a listening Unix socket."""

    settings: Settings
    coefficients: Coefficients
    control: str
    image_key: bytes  # names images for the engine's cache, the same in all relays, or in all replicas
    image_cache_key: bytes  # of prepared images, the same in all relays
    image_socket: str = ""  # "" if images are off
    image_cache: str = ""  # folder of prepared images; "" if there is no cache
    image_cache_bytes: int = 0
    accounts: str = ""  # file of the tenants' accounts, shared by all relays; "" if there is only one
    limits: TenantLimits = field(default_factory=TenantLimits)  # at the start of the sidecar
    index: int = 0
    restarts: int = 0


def main(context: RelayContext, listener: socket.socket) -> int:
    """Serve until drained. Returns 0."""
    with contextlib.closing(listener):
        uvloop.run(_serve(context, listener))
    return 0


async def _serve(context: RelayContext, listener: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # deliver signals that are pending
    link = ControlLink(context.control, lambda at: RelayConnected(at, context.index, os.getpid(), context.restarts))
    async with _relay(context, link.send) as relay:
        link.on_command = relay.on_command
        # objects alive now stay, and requests leave almost no cycles: collect less often
        gc.freeze()
        gc.set_threshold(10_000, 20, 20)
        accepting = await loop.create_server(
            relay.server,
            sock=listener,
            backlog=_LISTEN_BACKLOG,
            ssl=relay.certificate.context if relay.certificate else None,
        )
        async with _background(link.run, partial(_send_heartbeats, link, relay)):
            await ended.wait()
            accepting.close()
            await relay.drain(context.settings.drain_seconds)
    await link.close()


@contextlib.asynccontextmanager
async def _relay(context: RelayContext, emit: Callable[[Event], None]) -> AsyncIterator[Relay]:
    settings = context.settings
    spec = families.from_dir(settings.model) if settings.model else None
    video_spec = families.video_from_dir(settings.model) if settings.model else None
    async with contextlib.AsyncExitStack() as stack:
        domains = url_policy.parse_domains(settings.image_urls)
        fetch: Fetch | None = None
        if domains:
            fetcher = Fetcher(domains, settings.image_max_bytes)
            stack.push_async_callback(fetcher.close)
            fetch = fetcher.fetch
        images, serve_images = None, None
        if context.image_socket and spec is not None:
            # imported only if images are on, to keep a relay without them small
            from sidecar.images.service import ImageService
            from sidecar.images.shm_cache import ImageCache
            from sidecar.relay.media.preprocess_api import preprocess

            folder = context.image_cache
            cache = ImageCache(folder, context.image_cache_bytes, context.image_cache_key) if folder else None
            images = ImageService(context.image_socket, settings, spec, cache)
            stack.push_async_callback(images.close)
            serve_images = partial(
                preprocess, images=images, settings=settings, emit=emit, fetch=fetch, video_spec=video_spec
            )
        watch: PluginWatch | None = None
        if images is not None and settings.images in ("auto", "shm"):
            watch = PluginWatch(images.spec, required=settings.images == "shm")
            if settings.images == "auto":
                await stack.enter_async_context(_background(images.calibrate))
        quota: Quota | None = None
        if settings.tenant_limits:
            accounts = TenantAccounts(context.accounts, settings.workers, context.index)
            quota = Quota(settings.tenant_limits, accounts, settings.workers, context.limits)
            stack.callback(quota.close)
            await stack.enter_async_context(_background(quota.watch))
        render: RenderApi | None = None
        if settings.render == "on":
            render = RenderApi(RenderWorkers(RenderSettings(settings.model), 1))
            await stack.enter_async_context(_background(render.run))
        counter = tokenizer.load_counter(settings.model)  # before serving, as loading blocks the loop
        if counter is not None:
            stack.callback(counter.close)
        relay = Relay(
            settings,
            emit,
            Pricing(Estimator(context.coefficients), quota, counter, spec, video_spec),
            index=context.index,
            image_key=context.image_key,
            images=images,
            preprocess=serve_images,
            fetch=fetch,
            render=render,
            handoffs=watch,
        )
        stack.push_async_callback(relay.close)
        yield relay


@contextlib.asynccontextmanager
async def _background(*work: Callable[[], Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    """Tasks for the time of a block."""
    tasks = [asyncio.create_task(_restarting(task)) for task in work]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _restarting(task: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a task again if a defect ends it: a relay that serves without reporting would blind the verdict."""
    while True:
        try:
            return await task()
        except Exception as e:  # noqa: BLE001  streams must go on after any failure
            _log.error("relay background task failed, restarting it: %s at %s", type(e).__name__, place_of(e))
            await asyncio.sleep(HEARTBEAT_INTERVAL_S)


async def _send_heartbeats(link: ControlLink, relay: Relay) -> None:
    """Report to control once a second that this process is alive, and how late its timers run."""
    log, step = LimitedLog(_log), HEARTBEAT_INTERVAL_S / _LAG_CHECKS_PER_HEARTBEAT
    while True:
        worst = 0.0
        for _ in range(_LAG_CHECKS_PER_HEARTBEAT):
            due = time.monotonic() + step
            await asyncio.sleep(step)
            worst = max(worst, time.monotonic() - due)
        files, most = open_files.count(), open_files.limit()
        link.send(Heartbeat(time.monotonic(), worst, relay.open, files, most))
        if open_files.is_scarce(files, most):
            log.error("files", "%d of %d file descriptors are in use; raise the limit (ulimit -n)", files, most)
