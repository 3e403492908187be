"""One relay process: a listening socket and a channel to the control process in, a served data path out.

Rules: the first order must be Configure; the process ends by Drain, or when the control process is gone: then it stops
accepting at once, lets its streams finish, and exits. SIGTERM and SIGINT are ignored, because the control process, which gets
them too, drains us. Neither metrics, nor tracing, nor NVML is imported here: a relay is as small as its job.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import resource
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Final

import uvloop
from aiohttp import web

from sidecar import logs, settings, units
from sidecar.channel import Channel
from sidecar.facts import Configure, Drain, Fact, Order, Pulse
from sidecar.relay import upstream
from sidecar.relay.handler import Handler, Relay

if TYPE_CHECKING:
    from sidecar.images import Images

_log = logging.getLogger(__name__)

PULSE: Final = 1.0  # seconds
_TICKS: Final = 4  # looks at the clock per pulse; the pulse carries the worst
_BACKLOG: Final = 1024
_CONFIGURE_SECONDS: Final = 30.0
_FLUSH_SECONDS: Final = 2.0


def main(control_fd: int, listen_fd: int) -> int:
    """Serve until drained. `control_fd`: our end of a connected Unix stream; `listen_fd`: a listening TCP socket."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a stream takes two; many shells and runtimes allow 1024
    control = socket.socket(fileno=control_fd)
    listener = socket.socket(fileno=listen_fd)
    with contextlib.closing(control), contextlib.closing(listener):
        status: int = uvloop.run(_serve(control, listener))
        return status


class _Orders:
    """Orders as they come: the first configures, Drain (or the end of the channel) ends, the rest is the relay's."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.configured: asyncio.Future[Configure] = loop.create_future()
        self.ended: asyncio.Future[float | None] = loop.create_future()  # seconds to drain; None: as the settings say
        self.gone: asyncio.Future[None] = loop.create_future()
        self.sink: Callable[[Order], None] = lambda _: None

    def take(self, order: Fact | Order) -> None:
        match order:
            case Configure() if not self.configured.done():
                self.configured.set_result(order)
            case Drain() if not self.ended.done():
                self.ended.set_result(order.seconds)
            case _:
                self.sink(order)  # type: ignore[arg-type]  # the control process sends orders only

    def closed(self) -> None:
        if not self.gone.done():
            self.gone.set_result(None)
        if not self.ended.done():
            self.ended.set_result(None)


async def _serve(control: socket.socket, listener: socket.socket) -> int:
    orders = _Orders()
    channel = await Channel.open(control, orders.take, orders.closed)
    configured = await _configuration(orders)
    if configured is None:
        _log.error("relay: the control process sent no configuration")
        return 1
    own = settings.from_json(configured.settings)
    logs.setup(own.log_format, own.log_level)
    async with _relay(configured, own, channel) as relay:
        orders.sink = relay.obey
        server = web.Server(
            relay.handle,
            handler_cancellation=True,
            access_log=None,
            logger=_quiet(),
            auto_decompress=False,
            read_bufsize=upstream.READ_BUFFER,
            max_line_size=upstream.MAX_HEADER,
            max_field_size=upstream.MAX_HEADER,
        )
        # what lives now lives to the end, and a request leaves next to no cycles: look for them less often
        gc.freeze()
        gc.set_threshold(10_000, 20, 20)
        accepting = await asyncio.get_running_loop().create_server(server, sock=listener, backlog=_BACKLOG)
        pulse = asyncio.create_task(_pulse(channel, relay))
        try:
            seconds = await orders.ended
            accepting.close()
            await relay.drain(server, own.drain_seconds if seconds is None else seconds)
        finally:
            pulse.cancel()
            await asyncio.gather(pulse, return_exceptions=True)
    channel.close()
    await asyncio.wait((orders.gone,), timeout=_FLUSH_SECONDS)  # the last facts are on their way
    return 0


async def _configuration(orders: _Orders) -> Configure | None:
    await asyncio.wait(
        (orders.configured, orders.ended), timeout=_CONFIGURE_SECONDS, return_when=asyncio.FIRST_COMPLETED
    )
    return orders.configured.result() if orders.configured.done() else None


@contextlib.asynccontextmanager
async def _relay(configured: Configure, own: settings.Settings, channel: Channel) -> AsyncIterator[Relay]:
    coefficients = units.from_json(configured.coefficients)
    async with _images(configured.image_socket, own) as images:
        relay = Relay(
            own,
            coefficients,
            channel.send,
            index=configured.index,
            engine_kind=configured.engine_kind,
            image_key=bytes.fromhex(configured.image_key),
            images=images,
            preprocess=_preprocess(images, own, channel.send) if images is not None else None,
        )
        try:
            yield relay
        finally:
            await relay.close()


@contextlib.asynccontextmanager
async def _images(socket_path: str, own: settings.Settings) -> AsyncIterator[Images | None]:
    """The image workers' client; None where images are off."""
    if not socket_path:
        yield None
        return
    # imported only where images are on: without them a relay stays as small as it is
    from sidecar.images import Images
    from sidecar.kernels import families

    spec = families.from_dir(own.model)
    if spec is None:
        yield None
        return
    images = Images(socket_path, own, spec)
    try:
        yield images
    finally:
        await images.close()


def _preprocess(images: Images, own: settings.Settings, emit: Callable[[Fact], None]) -> Handler:
    from sidecar.relay.preprocess import preprocess

    return lambda request: preprocess(request, images, own, emit)


async def _pulse(channel: Channel, relay: Relay) -> None:
    """Tell the control process once a second that we live, and how late our timers run."""
    step = PULSE / _TICKS
    while True:
        worst = 0.0
        for _ in range(_TICKS):
            due = time.monotonic() + step
            await asyncio.sleep(step)
            worst = max(worst, time.monotonic() - due)
        channel.send(Pulse(time.monotonic(), worst, relay.open))


def _quiet() -> logging.Logger:
    """aiohttp logs a traceback for every malformed request anybody sends; the 400 that they get is enough."""
    logger = logging.getLogger("sidecar.relay.http")
    logger.setLevel(logging.CRITICAL)
    return logger
