"""The process that streams load reports: `xds.service.orca.v3.OpenRcaService/StreamCoreMetrics` on its own port.

Rules:
- gRPC's threads live in this process only, so that its clients can delay neither control nor relay.
- The control process sends the load once a second over the socket of the relays, and knows nothing about clients.
- A client chooses its interval, at least MIN_INTERVAL_S.
- A stale load is not sent, so that the last report expires at the client.
- SIGTERM ends every stream with UNAVAILABLE.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator
from typing import Any, Final

from sidecar.errors import StartError
from sidecar.events import Command, Event, LoadReport, LoadSubscribed
from sidecar.report import orca, orca_proto
from sidecar.runtime.channel import Channel

MIN_INTERVAL_S: Final = 0.1  # Envoy reconnects after three of its intervals without a report
DEFAULT_INTERVAL_S: Final = 1.0
MAX_REPORT_AGE_S: Final = 10.0
MAX_STREAMS: Final = 256
MAX_REQUEST_BYTES: Final = 4096
SHUTDOWN_GRACE_S: Final = 2.0


class LatestReport:
    """The last load that the control process sent, and the connection to it."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lost, self._news = asyncio.Event(), asyncio.Event()
        self._message, self._at = b"", 0.0

    async def run(self) -> None:
        """Stay connected until cancelled."""
        while True:
            self._lost.clear()
            channel = await Channel.reach(self._path, self._take, self._lost.set)
            try:
                channel.send(LoadSubscribed(time.monotonic(), os.getpid()))
                await self._lost.wait()
            finally:
                channel.close()

    async def get(self) -> bytes:
        """Wait for a fresh load, and return its message."""
        while not self._message or time.monotonic() - self._at > MAX_REPORT_AGE_S:
            self._news.clear()
            await self._news.wait()
        return self._message

    def _take(self, record: Event | Command) -> None:
        if isinstance(record, LoadReport) and record.orca_bin:
            self._message, self._at = orca.message(record.orca_bin), time.monotonic()
            self._news.set()


def interval(request: bytes) -> float:
    """Seconds between the reports of one stream. Raises ValueError if the bytes are not a request."""
    asked = orca_proto.interval(request)
    return max(asked, MIN_INTERVAL_S) if asked > 0 else DEFAULT_INTERVAL_S


def main(address: tuple[str, int], path: str) -> int:
    """Serve until SIGTERM. `path`: the Unix socket of the control process. Returns 0."""
    asyncio.run(_serve(address, path))
    return 0


async def _serve(address: tuple[str, int], path: str) -> None:
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    latest = LatestReport(path)
    keeping = asyncio.create_task(latest.run())
    server = await start(address, latest, ended)
    await ended.wait()
    await server.stop(SHUTDOWN_GRACE_S)
    keeping.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await keeping


async def start(address: tuple[str, int], latest: LatestReport, ended: asyncio.Event) -> Any:
    """A running grpc.aio server, whose streams end when `ended` is set. Raises StartError that names the port."""
    import grpc  # here, as no other process of the sidecar may load it
    from grpc import aio

    async def stream(request: bytes, context: Any) -> AsyncIterator[bytes]:
        try:
            seconds = interval(request)
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        ending = asyncio.create_task(ended.wait())
        try:
            while (report := await _unless(ending, latest.get())) is not None:
                yield report
                await asyncio.wait((ending,), timeout=seconds)
        finally:
            ending.cancel()
        await context.abort(grpc.StatusCode.UNAVAILABLE, "draining")

    options = ("grpc.max_receive_message_length", MAX_REQUEST_BYTES), ("grpc.so_reuseport", 1)
    server = aio.server(options=options, maximum_concurrent_rpcs=MAX_STREAMS)
    methods = {orca_proto.METHOD: grpc.unary_stream_rpc_method_handler(stream)}  # bytes in, bytes out
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(orca_proto.SERVICE, methods),))
    host, port = address
    try:
        server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    except RuntimeError:
        raise StartError(f"--orca-grpc: cannot listen on port {port} of {host}; free it or choose another") from None
    await server.start()
    return server


async def _unless(ending: asyncio.Task[Any], wanted: Any) -> bytes | None:
    """The result of `wanted`; None if `ending` is done first."""
    getting = asyncio.ensure_future(wanted)
    try:
        await asyncio.wait((ending, getting), return_when=asyncio.FIRST_COMPLETED)
        return None if ending.done() else getting.result()
    finally:
        getting.cancel()
