"""`sidecar run --orca-grpc`: the stream of load reports, as a router sees it, while processes die around it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import psutil
from grpc import aio

from sidecar.report.orca_proto import METHOD, SERVICE, Report, Request
from sidecar.tools.scripted_engine.server import ScriptedEngine

from ..ports import free_port
from ..waiting import PATIENCE


@asynccontextmanager
async def streaming(port: int) -> AsyncIterator[Any]:
    """A call of the stream, ten reports a second, on its own connection."""
    request = Request()
    request.report_interval.FromMilliseconds(100)
    # else a connection of the channel before is taken again, though its server died
    own = (("grpc.use_local_subchannel_pool", 1),)
    async with aio.insecure_channel(f"127.0.0.1:{port}", options=own) as channel:
        call = channel.unary_stream(
            f"/{SERVICE}/{METHOD}",
            request_serializer=Request.SerializeToString,
            response_deserializer=Report.FromString,
        )
        yield call(request, wait_for_ready=True)


async def test_reports_outlive_control_and_come_back_after_their_own_death(engine: ScriptedEngine, start: Any) -> None:
    """A stream survives a kill -9 of control; its own process is replaced; SIGTERM ends it as UNAVAILABLE."""
    port = free_port()
    sidecar = await start(engine.url, orca_grpc=f"127.0.0.1:{port}")
    await sidecar.until_verdict("idle")
    async with asyncio.timeout(PATIENCE):
        async with streaming(port) as stream:
            idle = await stream.read()
            assert idle.rps_fractional > 0 and idle.application_utilization == 0.001
            control = await sidecar.control()
            os.kill(control, signal.SIGKILL)
            async with sidecar.chat(tokens=100_000):  # open until the next control tells of it
                while (await stream.read()).named_metrics["mu_in_flight"] == 0:
                    pass
            assert await sidecar.control() != control
        (reports,) = [p for p in psutil.Process(sidecar.process.pid).children() if "load" in p.name()]
        reports.kill()
        await asyncio.to_thread(reports.wait)  # until then its port still takes connections, only to reset them
        async with streaming(port) as stream:
            assert (await stream.read()).rps_fractional > 0
            stopping = asyncio.create_task(sidecar.stop())
            assert await stream.code() == grpc.StatusCode.UNAVAILABLE
            assert await stopping == 0
