"""Export by OTLP to real receivers over HTTP and gRPC, and what happens while there is none."""

from __future__ import annotations

import asyncio
import gzip
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest, ExportLogsServiceResponse
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from sidecar.events import Admitted, RequestSize, Settled, Trace, Usage, Verdict
from sidecar.report.fan_out import make_log_handler, make_server_metrics
from sidecar.report.otlp import DEFAULT_QUEUED
from sidecar.report.otlp_logs import OtlpLogHandler
from sidecar.report.semantic_conventions import FinishedRequest, Service, verdict_attributes
from sidecar.report.tracing import Tracing

from ..waiting import PATIENCE

TRACE = Trace("0af7651916cd43dd8448eb211c80319c", "00f067aa0ba902b7", "", True)


def admitted(id: str = "r") -> Admitted:
    return Admitted(id, 10.0, "acme", "llama", "chat", True, RequestSize(10, 0, 20), 64, 0.5, TRACE)


def settled(id: str = "r") -> Settled:
    return Settled(id, 20.0, "ok", 200, Usage(12, 5), 5, 700, 12.0, 11.0, 0.0004)


def request(traces: Tracing, id: str = "r") -> None:
    traces.admitted(admitted(id))
    traces.settled(settled(id))


FORMS = {
    "/v1/traces": ExportTraceServiceRequest,
    "/v1/metrics": ExportMetricsServiceRequest,
    "/v1/logs": ExportLogsServiceRequest,
}


class Collector:
    """An OTLP/HTTP receiver: what came to which path, with which header fields. `status`: how it answers."""

    def __init__(self) -> None:
        self.received: list[tuple[str, Any]] = []
        self.headers: list[Any] = []
        self.status, self.url = 200, ""

    async def take(self, request: web.Request) -> web.Response:
        body = await request.read()
        if body[:2] == b"\x1f\x8b":
            body = gzip.decompress(body)
        form = FORMS[request.path]
        self.headers.append(request.headers)
        if self.status == 200:
            self.received.append((request.path, form.FromString(body)))
        return web.Response(status=self.status, content_type="application/x-protobuf")

    @property
    def spans(self) -> int:
        return sum(
            len(s.spans) for p, r in self.received if p == "/v1/traces" for x in r.resource_spans for s in x.scope_spans
        )


@pytest.fixture
async def collector() -> AsyncIterator[Collector]:
    got = Collector()
    app = web.Application()
    app.router.add_post("/v1/{signal}", got.take)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    got.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield got
    await runner.cleanup()


async def test_the_variables_of_the_sdk_are_enough(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    """Endpoint, header fields, service name and resource by OTEL_*, and no flag."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-scope=team-a")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "llm")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "k8s.pod.name=pod-0")
    traces = Tracing("", "1.2.3")
    request(traces)
    assert await traces.close(PATIENCE)
    assert collector.spans == 1
    ((_, sent),) = collector.received
    resource = {a.key: a.value.string_value for a in sent.resource_spans[0].resource.attributes}
    assert (resource["service.name"], resource["k8s.pod.name"], resource["service.version"]) == (
        "llm",
        "pod-0",
        "1.2.3",
    )
    assert collector.headers[0]["x-scope"] == "team-a" and collector.headers[0]["content-encoding"] == "gzip"


@pytest.mark.parametrize(("name", "value"), [("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_EXPORTER", "none")])
async def test_what_is_switched_off_is_off(
    name: str, value: str, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even with the flag."""
    monkeypatch.setenv(name, value)
    traces = Tracing(collector.url, "1")
    request(traces)
    assert await traces.close(PATIENCE)
    assert collector.headers == []


@contextmanager
def grpc_receiver(add_servicer: Callable[[Any, Any], None], answer: Any) -> Iterator[tuple[str, list[Any]]]:
    """A receiver over gRPC of one signal: its address, and the requests it received."""
    import grpc

    received: list[Any] = []

    class Receiver:
        def Export(self, sent: Any, context: Any) -> Any:  # gRPC's name
            received.append(sent)
            return answer

    server = grpc.server(ThreadPoolExecutor(1))
    add_servicer(Receiver(), server)
    url = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield url, received
    finally:
        server.stop(None)


@pytest.mark.parametrize("by_flag", [True, False])
async def test_grpc(by_flag: bool, requires: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A gRPC receiver gets the spans, its address by flag or by variable."""
    requires("python:opentelemetry.exporter.otlp.proto.grpc")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import add_TraceServiceServicer_to_server

    with grpc_receiver(add_TraceServiceServicer_to_server, ExportTraceServiceResponse()) as (url, received):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
        if not by_flag:
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        traces = Tracing(url if by_flag else "", "1")
        request(traces)
        assert await traces.close(PATIENCE)
    assert [s.name for r in received for s in r.resource_spans[0].scope_spans[0].spans] == ["chat llama"]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "carrier pigeon", "OTEL_EXPORTER_OTLP_PROTOCOL"),
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "99999999", "OTEL_*"),
    ],
)
async def test_a_wrong_variable_costs_the_spans_alone(
    name: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The sidecar goes on without spans, with one line that says why."""
    monkeypatch.setenv(name, value)
    traces = Tracing("http://127.0.0.1:1", "1")
    request(traces)
    assert await traces.close(PATIENCE) and traces.dropped == 0
    (line,) = [r.getMessage() for r in caplog.records if r.name.startswith("sidecar")]
    assert line.startswith("spans are off") and words in line


async def test_a_collector_that_is_away_costs_one_warning_and_its_spans(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each row of failures has one line at its begin and one at its end; what was lost is counted exactly."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "1")
    caplog.set_level(logging.INFO)
    traces = Tracing(collector.url, "1")
    collector.status = 400  # no status to try again
    for n in range(4):
        request(traces, str(n))
        await until(lambda n=n: traces.dropped == n + 1)
    collector.status = 200
    request(traces, "ok")
    await until(lambda: collector.spans == 1)
    assert await traces.close(PATIENCE)
    lines = [(r.levelname, r.getMessage()) for r in caplog.records if r.name.startswith(("sidecar", "opentelemetry"))]
    assert [level for level, _ in lines] == ["WARNING", "INFO"]
    assert "sidecar_spans_dropped_total" in lines[0][1] and "again" in lines[1][1]
    assert traces.dropped == 4


def records(sent: list[Any]) -> list[Any]:
    return [r for one in sent for x in one.resource_logs for scope in x.scope_logs for r in scope.log_records]


@contextmanager
def exported_logger(url: str) -> Iterator[tuple[logging.Logger, OtlpLogHandler]]:
    """A logger of the sidecar's whose lines are exported."""
    handler = make_log_handler(url, "1.2.3")
    assert handler is not None
    logger = logging.getLogger("sidecar.control.loop")
    logger.addHandler(handler)
    try:
        yield logger, handler
    finally:
        logger.removeHandler(handler)


def write_lines(logger: logging.Logger) -> None:
    """What control logs: a change of the verdict, a warning, an error, and a line that is not exported."""
    verdict = Verdict("suspect", "no_progress", "9 outstanding", 1.0, 2.0, {"outstanding": 9, "part": None})
    found = verdict_attributes(verdict, Service("vllm", "pod-0", 8080))
    logger.info("verdict %s", "suspect", extra={"otlp_event": ("sidecar.verdict", found)})
    logger.warning("canary %s", "starved")
    logger.info("draining")
    try:
        raise OSError("disk /secret is full")
    except OSError:
        logger.exception("cannot write")


def check_records(sent: list[Any]) -> None:
    event, warning, error = records(sent)
    assert (event.event_name, event.severity_text, event.body.string_value) == (
        "sidecar.verdict",
        "INFO",
        "verdict suspect",
    )
    attributes = {a.key: a.value.string_value or a.value.int_value for a in event.attributes}
    assert attributes["sidecar.verdict.state"] == "suspect" and attributes["sidecar.verdict.reason"] == "no_progress"
    assert attributes["sidecar.evidence.outstanding"] == 9 and attributes["gen_ai.provider.name"] == "vllm"
    assert event.time_unix_nano and not warning.event_name
    assert [r.severity_number for r in (event, warning, error)] == [9, 13, 17]  # INFO, WARN, ERROR of the specification
    kinds = {a.key: a.value.string_value for a in error.attributes}
    assert kinds["exception.type"] == "OSError" and "secret" not in str(error)
    resource = {a.key: a.value.string_value for a in sent[0].resource_logs[0].resource.attributes}
    assert (resource["service.name"], resource["service.version"]) == ("inference-sidecar", "1.2.3")


async def test_verdicts_and_warnings_are_log_records(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    """A verdict is an event with attributes, a warning its text, other lines stay at home; all with the resource."""
    monkeypatch.setenv("OTEL_LOGS_EXPORTER", "otlp")
    with exported_logger(collector.url) as (logger, handler):
        logger.setLevel(logging.INFO)
        write_lines(logger)
        assert await handler.stop(PATIENCE) and handler.dropped == 0
    check_records([sent for path, sent in collector.received if path == "/v1/logs"])


async def test_log_records_by_grpc(requires: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same records, by the other protocol."""
    requires("python:opentelemetry.exporter.otlp.proto.grpc")
    from opentelemetry.proto.collector.logs.v1.logs_service_pb2_grpc import add_LogsServiceServicer_to_server

    with grpc_receiver(add_LogsServiceServicer_to_server, ExportLogsServiceResponse()) as (url, received):
        monkeypatch.setenv("OTEL_LOGS_EXPORTER", "otlp")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
        with exported_logger(url) as (logger, handler):
            logger.setLevel(logging.INFO)
            write_lines(logger)
            assert await handler.stop(PATIENCE)
    check_records(received)


async def test_a_line_that_cannot_be_formatted_takes_no_place_in_the_queue(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than the queue has places, then a good one: it is exported, and nothing counts as dropped."""
    monkeypatch.setenv("OTEL_LOGS_EXPORTER", "otlp")
    monkeypatch.setenv("OTEL_BLRP_MAX_QUEUE_SIZE", "2")
    monkeypatch.setenv("OTEL_BLRP_MAX_EXPORT_BATCH_SIZE", "2")
    with exported_logger(collector.url) as (logger, handler):
        monkeypatch.setattr(logger, "propagate", False)  # pytest's own handler raises for such a line
        for _ in range(3):
            logger.warning("%d tokens", "many")
        logger.warning("a good line")
        assert await handler.stop(PATIENCE) and handler.dropped == 0
    (line,) = records([sent for path, sent in collector.received if path == "/v1/logs"])
    assert line.body.string_value == "a good line"


async def test_lost_records_are_counted_and_do_not_feed_themselves(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One warning about the collector, which is not queued for it; what was lost is counted exactly."""
    monkeypatch.setenv("OTEL_LOGS_EXPORTER", "otlp")
    monkeypatch.setenv("OTEL_BLRP_SCHEDULE_DELAY", "1")
    collector.status = 400
    handler = make_log_handler(collector.url, "1")
    assert handler is not None
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        for n in range(3):
            logging.getLogger("sidecar.control.loop").warning("line")
            await until(lambda n=n: handler.dropped == n + 1)
        assert await handler.stop(PATIENCE)
    finally:
        root.removeHandler(handler)
    assert handler.dropped == 3
    (line,) = [r.getMessage() for r in caplog.records if r.name == "sidecar.report.otlp"]
    assert "no log records" in line and "sidecar_log_records_dropped_total" in line


@pytest.mark.parametrize(
    "environ", [{}, {"OTEL_LOGS_EXPORTER": "none"}, {"OTEL_LOGS_EXPORTER": "otlp", "OTEL_SDK_DISABLED": "true"}]
)
def test_logs_are_exported_only_if_asked_for(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An endpoint alone is not enough, as many collectors of spans take no logs."""
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert make_log_handler("http://127.0.0.1:1", "1") is None


async def test_a_full_queue_drops_and_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a collector hangs, spans beyond the queue are counted, and none is waited for."""
    release = asyncio.Event()

    async def hang(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await release.wait()
        writer.close()

    server = await asyncio.start_server(hang, "127.0.0.1", 0)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", str(PATIENCE))
    try:
        traces = Tracing(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "1")
        for n in range(DEFAULT_QUEUED + 100):
            request(traces, str(n))
        assert traces.dropped == 100
    finally:
        release.set()
        server.close()


async def test_server_metrics_arrive_by_otlp(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request once, times of tokens for streams that ended well only, models by their bounded label."""
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "otlp")
    metrics = make_server_metrics(collector.url, "1.2.3")
    assert metrics is not None
    service = Service("vllm", "pod-0", 8080)
    metrics.settled(FinishedRequest(admitted(), settled(), service, 12.0), "other")
    failed = Settled("f", 21.0, "stalled", 0, None, 3, 9, 12.0, 11.0, 0.0)
    metrics.settled(FinishedRequest(admitted(), failed, service, 12.0), "other")
    assert await metrics.close(PATIENCE)
    points = {
        metric.name: metric.histogram.data_points
        for path, sent in collector.received
        if path == "/v1/metrics"
        for resource in sent.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }
    counts = {name: sorted((p.count, p.sum) for p in found) for name, found in points.items()}
    assert counts == {
        "gen_ai.server.request.duration": [(1, 10.0), (1, 11.0)],
        "gen_ai.server.time_to_first_token": [(1, 2.0)],
        "gen_ai.server.time_per_output_token": [(1, 2.0)],
    }
    (point,) = points["gen_ai.server.time_to_first_token"]
    labels = {a.key: a.value.string_value or a.value.int_value for a in point.attributes}
    assert labels == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.model": "other",
        "server.address": "pod-0",
        "server.port": 8080,
    }


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not holds():  # noqa: ASYNC110  # of threads, which set no event of the loop
            await asyncio.sleep(0.01)
