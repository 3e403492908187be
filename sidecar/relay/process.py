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
import resource
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import uvloop
from aiohttp import web

from sidecar.errors import place_of
from sidecar.events import Event, Heartbeat, RelayConnected
from sidecar.images.vllm_plugin import PluginWatch
from sidecar.kernels import families
from sidecar.kernels.grid import ProcessorSpec
from sidecar.load.cost_model import Coefficients
from sidecar.load.estimator import Estimator
from sidecar.load.tenant_limits import TenantLimits
from sidecar.relay import engine_io, url_policy
from sidecar.relay.control_link import ControlLink
from sidecar.relay.handler import Handler, Relay
from sidecar.relay.media.fetch import Fetcher
from sidecar.relay.media.inline import Fetch
from sidecar.relay.pricing import tokenizer
from sidecar.relay.pricing.charge import Pricing
from sidecar.relay.pricing.quota import Quota
from sidecar.relay.pricing.tenant_accounts import TenantAccounts
from sidecar.settings import Settings

if TYPE_CHECKING:
    from sidecar.images.service import ImageService

_log = logging.getLogger(__name__)

HEARTBEAT_INTERVAL_S: Final = 1.0
# A heartbeat carries the largest lag.
_LAG_CHECKS_PER_HEARTBEAT: Final = 4
_LISTEN_BACKLOG: Final = 1024


@dataclass(frozen=True, slots=True)
class RelayContext:
    """Everything that a relay process is started with. `control` is the path of a listening Unix socket."""

    settings: Settings
    coefficients: Coefficients
    control: str
    image_key: bytes  # names images for the engine's cache, the same in all relays
    image_socket: str = ""  # "" if images are off
    image_cache: str = ""  # folder of prepared images; "" if there is no cache
    image_cache_bytes: int = 0
    accounts: str = ""  # file of the tenants' accounts, shared by all relays; "" if there is only one
    limits: TenantLimits = field(default_factory=TenantLimits)  # at the start of the sidecar
    index: int = 0
    restarts: int = 0


def main(context: RelayContext, listener: socket.socket) -> int:
    """Serve until drained. Returns 0."""
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    # a stream takes two files; many shells and runtimes allow 1024
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
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
        server = web.Server(
            relay.handle,
            handler_cancellation=True,
            access_log=None,
            logger=_quiet(),
            auto_decompress=False,
            read_bufsize=engine_io.READ_BUFFER_BYTES,
            max_line_size=engine_io.MAX_HEADER_BYTES,
            max_field_size=engine_io.MAX_HEADER_BYTES,
        )
        # objects alive now stay, and requests leave almost no cycles: collect less often
        gc.freeze()
        gc.set_threshold(10_000, 20, 20)
        accepting = await loop.create_server(server, sock=listener, backlog=_LISTEN_BACKLOG)
        tasks = [
            asyncio.create_task(_restarting(link.run)),
            asyncio.create_task(_restarting(lambda: _send_heartbeats(link, relay))),
        ]
        try:
            await ended.wait()
            accepting.close()
            await relay.drain(server, context.settings.drain_seconds)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    await link.close()


@contextlib.asynccontextmanager
async def _relay(context: RelayContext, emit: Callable[[Event], None]) -> AsyncIterator[Relay]:
    settings = context.settings
    async with contextlib.AsyncExitStack() as stack:
        images = _images(context)
        if images is not None:
            stack.push_async_callback(images.close)
        domains = url_policy.parse_domains(settings.image_urls)
        fetcher = Fetcher(domains, settings.image_max_bytes) if domains else None
        if fetcher is not None:
            stack.push_async_callback(fetcher.close)
        quota = await stack.enter_async_context(_quota(context)) if settings.tenant_limits else None
        counter = tokenizer.load_counter(settings.model)  # before serving, as loading blocks the loop
        if counter is not None:
            stack.callback(counter.close)
        fetch = fetcher.fetch if fetcher is not None else None
        relay = Relay(
            settings,
            context.coefficients,
            emit,
            index=context.index,
            engine_kind=settings.engine_kind if settings.engine_kind != "auto" else "",
            image_key=context.image_key,
            images=images,
            preprocess=_preprocess(images, settings, emit, fetch) if images is not None else None,
            fetch=fetch,
            is_shm_ready=PluginWatch() if settings.images == "shm" else None,
            pricing=Pricing(Estimator(context.coefficients), quota, counter, _processor(settings)),
        )
        stack.push_async_callback(relay.close)
        yield relay


def _processor(settings: Settings) -> ProcessorSpec | None:
    return families.from_dir(settings.model) if settings.model else None


def _images(context: RelayContext) -> ImageService | None:
    """The image workers' client; None if images are off."""
    spec = _processor(context.settings)
    if not context.image_socket or spec is None:
        return None
    # imported only if images are on, to keep a relay without them small
    from sidecar.images.service import ImageService
    from sidecar.images.shm_cache import ImageCache

    folder = context.image_cache
    cache = ImageCache(folder, context.image_cache_bytes, context.image_key) if folder else None
    return ImageService(context.image_socket, context.settings, spec, cache)


@contextlib.asynccontextmanager
async def _quota(context: RelayContext) -> AsyncIterator[Quota]:
    """The tenants' limits, reloaded when they change."""
    settings = context.settings
    accounts = TenantAccounts(context.accounts, settings.workers, context.index)
    quota = Quota(settings.tenant_limits, accounts, settings.workers, context.limits)
    watching = asyncio.create_task(_restarting(quota.watch))
    try:
        yield quota
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        quota.close()


def _preprocess(
    images: ImageService, settings: Settings, emit: Callable[[Event], None], fetch: Fetch | None
) -> Handler:
    from sidecar.relay.media.preprocess_api import preprocess

    return lambda request: preprocess(request, images, settings, emit, fetch)


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
    step = HEARTBEAT_INTERVAL_S / _LAG_CHECKS_PER_HEARTBEAT
    while True:
        worst = 0.0
        for _ in range(_LAG_CHECKS_PER_HEARTBEAT):
            due = time.monotonic() + step
            await asyncio.sleep(step)
            worst = max(worst, time.monotonic() - due)
        link.send(Heartbeat(time.monotonic(), worst, relay.open))


def _quiet() -> logging.Logger:
    """A logger that drops aiohttp's traceback for each malformed request: the client's 400 is enough."""
    logger = logging.getLogger("sidecar.relay.http")
    logger.setLevel(logging.CRITICAL)
    return logger
