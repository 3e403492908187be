"""`sidecar run` with OpenTelemetry's variables alone: spans, metrics and log records at a real OTLP receiver."""

from __future__ import annotations

import gzip
import socket
from typing import Any

from aiohttp import web
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from sidecar.tools.scripted_engine.server import ScriptedEngine

FORMS = {
    "/v1/traces": ExportTraceServiceRequest,
    "/v1/metrics": ExportMetricsServiceRequest,
    "/v1/logs": ExportLogsServiceRequest,
}
CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-0"


async def test_a_stream_becomes_a_span_and_server_metrics(engine: ScriptedEngine, start: Any) -> None:
    """What the caller sampled arrives with all that its answer says; the rest does not; at the end nothing is left."""
    received: dict[str, list[Any]] = {path: [] for path in FORMS}

    async def take(request: web.Request) -> web.Response:
        body = await request.read()
        body = gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body
        received[request.path].append(FORMS[request.path].FromString(body))
        return web.Response(content_type="application/x-protobuf")

    app = web.Application()
    app.router.add_post("/v1/{signal}", take)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_METRICS_EXPORTER": "otlp", "OTEL_LOGS_EXPORTER": "otlp"}
        sidecar = await start(engine.url, environ=environ)
        await sidecar.until_verdict("idle")
        for flag in "10":
            async with sidecar.chat(traceparent=CALLER + flag) as answer:
                assert b"[DONE]" in await answer.read()
        await sidecar.until_metrics('sidecar_request_outcomes_total{outcome="ok"} 2.0')
        assert await sidecar.stop() == 0
    finally:
        await runner.cleanup()
    [span] = [
        s for r in received["/v1/traces"] for x in r.resource_spans for scope in x.scope_spans for s in scope.spans
    ]
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
