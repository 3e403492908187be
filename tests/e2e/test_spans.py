"""`sidecar run` with OpenTelemetry's variables alone: spans, metrics and log records at a real OTLP receiver."""

from __future__ import annotations

import asyncio
import gzip
import socket
from typing import Any

import pytest
from aiohttp import web
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from sidecar.tools.scripted_engine.server import ScriptedEngine

from ..waiting import PATIENCE

FORMS = {
    "/v1/traces": ExportTraceServiceRequest,
    "/v1/metrics": ExportMetricsServiceRequest,
    "/v1/logs": ExportLogsServiceRequest,
}
TAKES_AGAIN = "the collector takes spans again"
AWAY_S = 60.0
CLIENTS = 4  # that ask one after the other while the collector is away
CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-0"


class Receiver:
    """An OTLP/HTTP receiver that can go away and come back at the same port, which it keeps meanwhile."""

    def __init__(self) -> None:
        self.received: dict[str, list[Any]] = {path: [] for path in FORMS}
        self._held = reusable_socket(0)  # bound and not listening: alone, it refuses connections
        self._port: int = self._held.getsockname()[1]
        self._runner: web.AppRunner | None = None
        self._arrived = asyncio.Event()
        self.url = f"http://127.0.0.1:{self._port}"

    async def take(self, request: web.Request) -> web.Response:
        body = await request.read()
        body = gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body
        self.received[request.path].append(FORMS[request.path].FromString(body))
        self._arrived.set()
        return web.Response(content_type="application/x-protobuf")

    async def listen(self) -> None:
        app = web.Application()
        app.router.add_post("/v1/{signal}", self.take)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        await web.SockSite(self._runner, reusable_socket(self._port)).start()

    async def go_away(self) -> None:
        """Close the port and all connections."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def close(self) -> None:
        await self.go_away()
        self._held.close()

    async def until_spans(self, count: int) -> None:
        async with asyncio.timeout(PATIENCE):
            while len(self.spans()) < count:
                await self._arrived.wait()
                self._arrived.clear()

    def spans(self) -> list[Any]:
        sent = self.received["/v1/traces"]
        return [s for r in sent for x in r.resource_spans for scope in x.scope_spans for s in scope.spans]


def reusable_socket(port: int) -> socket.socket:
    """Bound to a port of loopback that other sockets of this process share."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(("127.0.0.1", port))
    return sock


async def test_a_stream_becomes_a_span_and_server_metrics(engine: ScriptedEngine, start: Any) -> None:
    """What the caller sampled arrives with all that its answer says; the rest does not; at the end nothing is left."""
    receiver = Receiver()
    await receiver.listen()
    try:
        environ = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
            "OTEL_METRICS_EXPORTER": "otlp",
            "OTEL_LOGS_EXPORTER": "otlp",
        }
        sidecar = await start(engine.url, environ=environ)
        await sidecar.until_verdict("idle")
        for flag in "10":
            async with sidecar.chat(traceparent=CALLER + flag) as answer:
                assert b"[DONE]" in await answer.read()
        await sidecar.until_metrics('sidecar_request_outcomes_total{outcome="ok"} 2.0')
        assert await sidecar.stop() == 0
    finally:
        await receiver.close()
    received = receiver.received
    [span] = receiver.spans()
    found = {a.key: a.value for a in span.attributes}
    assert (span.name, span.parent_span_id.hex()) == ("chat scripted", "b7ad6b7169203331")
    assert found["gen_ai.provider.name"].string_value == "scripted"  # the kind of the engine
    assert found["gen_ai.response.model"].string_value == "scripted" and found["gen_ai.response.id"].string_value
    assert [v.string_value for v in found["gen_ai.response.finish_reasons"].array_value.values] == ["length"]
    assert found["url.path"].string_value == "/v1/chat/completions" and found["server.port"].int_value
    assert found["gen_ai.response.time_to_first_chunk"].double_value > 0
    metrics = [
        m for r in received["/v1/metrics"] for x in r.resource_metrics for s in x.scope_metrics for m in s.metrics
    ]
    counts = {m.name: sum(p.count for p in m.histogram.data_points) for m in metrics}
    names = ("request.duration", "time_to_first_token", "time_per_output_token")
    assert counts == {f"gen_ai.server.{name}": 2 for name in names}
    exemplars = [e for m in metrics for p in m.histogram.data_points for e in p.exemplars]
    assert {(e.trace_id, e.span_id) for e in exemplars} == {(span.trace_id, span.span_id)}, "those of the sampled one"
    logs = [r for sent in received["/v1/logs"] for x in sent.resource_logs for s in x.scope_logs for r in s.log_records]
    states = [{a.key: a.value.string_value for a in r.attributes} for r in logs if r.event_name == "sidecar.verdict"]
    assert states and states[0]["sidecar.verdict.state"] == "idle" and states[0]["sidecar.verdict.reason"]


async def test_a_collector_that_is_away_harms_no_request(engine: ScriptedEngine, start: Any) -> None:
    """While nobody listens there: every request is answered, each signal has one warning, and what was lost counts."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        environ = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{nobody.getsockname()[1]}",
            "OTEL_EXPORTER_OTLP_TIMEOUT": "1",
            "OTEL_LOGS_EXPORTER": "otlp",
            "OTEL_METRICS_EXPORTER": "otlp",
            "OTEL_BSP_SCHEDULE_DELAY": "50",
            "OTEL_BLRP_SCHEDULE_DELAY": "50",
        }
        sidecar = await start(engine.url, environ=environ)
        await sidecar.until_verdict("idle")
        for _ in range(20):
            async with sidecar.chat() as answer:
                assert answer.status == 200 and b"[DONE]" in await answer.read()
        page = await sidecar.until_metrics("sidecar_spans_dropped_total 20.0")
        assert await sidecar.stop() == 0
    assert "sidecar_log_records_dropped_total 0.0" not in page
    for noun in ("spans", "log records"):
        assert sum(f"the collector takes no {noun}" in line for line in sidecar.log) == 1, noun
    assert [line for line in sidecar.log if '"logger": "opentelemetry' in line] == []


@pytest.mark.slow
async def test_a_collector_away_for_a_minute_under_load(engine: ScriptedEngine, start: Any) -> None:
    """Every request is answered, one warning, one line when it is back, and each span arrived or is counted."""
    receiver = Receiver()
    await receiver.listen()
    environ = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.url,
        "OTEL_EXPORTER_OTLP_TIMEOUT": "1",
        "OTEL_LOGS_EXPORTER": "otlp",
        "OTEL_METRICS_EXPORTER": "otlp",
        "OTEL_BSP_SCHEDULE_DELAY": "200",
        "OTEL_BLRP_SCHEDULE_DELAY": "200",
    }
    answered = 0

    async def ask_until(end: float) -> None:
        nonlocal answered
        while asyncio.get_running_loop().time() < end:
            async with sidecar.chat() as answer:
                assert answer.status == 200 and b"[DONE]" in await answer.read()
            answered += 1

    async def ask(seconds: float) -> None:
        end = asyncio.get_running_loop().time() + seconds
        async with asyncio.TaskGroup() as clients:
            for _ in range(CLIENTS):
                clients.create_task(ask_until(end))

    try:
        sidecar = await start(engine.url, environ=environ)
        await sidecar.until_verdict("idle")
        await ask(1)
        await receiver.until_spans(answered)
        await receiver.go_away()
        await ask(AWAY_S)
        await receiver.listen()
        async with asyncio.timeout(PATIENCE):  # the exporter's own pauses between tries are part of it
            while not any(TAKES_AGAIN in line for line in sidecar.log):
                await ask(0.2)
        dropped = 0
        async with asyncio.timeout(PATIENCE):
            while not dropped or len(receiver.spans()) + dropped < answered:
                page = await sidecar.until_metrics("sidecar_spans_dropped_total")
                dropped = int(float(page.split("\nsidecar_spans_dropped_total ")[1].split()[0]))
                await asyncio.sleep(0.2)
        assert await sidecar.stop() == 0
    finally:
        await receiver.close()
    assert len(receiver.spans()) + dropped == answered
    assert sum("the collector takes no spans" in line for line in sidecar.log) == 1
    assert sum(TAKES_AGAIN in line for line in sidecar.log) == 1
