"""Spans, as a real OTLP/HTTP collector receives them, and trace contexts."""

from __future__ import annotations

import asyncio
import gzip
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from sidecar import trace_context
from sidecar.events import (
    Admitted,
    AnswerDetails,
    FirstToken,
    HttpRequest,
    ImagePrepared,
    RequestSize,
    Settled,
    Trace,
    Usage,
)
from sidecar.report import tracing as otel
from sidecar.report.semantic_conventions import Service
from sidecar.report.tracing import Tracing

TRACE = Trace("0af7651916cd43dd8448eb211c80319c", "00f067aa0ba902b7", "b7ad6b7169203331", True)
WALL = 1_700_000_000.0  # of monotonic 0
IMAGE = ImagePrepared("r", 11.5, "jpeg", "ok", 0.5, (("decode", 0.2), ("resize", 0.1)), 1000, 2000)


def admitted(id: str = "r", trace: Trace | None = TRACE) -> Admitted:
    return Admitted(id, 10.0, "acme", "llama", "chat", True, RequestSize(10, 0, 20), 64, 0.5, trace)


def settled(id: str = "r", outcome: Any = "ok", status: int = 200, **more: Any) -> Settled:
    usage = Usage(12, 7, 3) if outcome == "ok" else None
    return Settled(id, 20.0, outcome, status, usage, 7, 700, 12.0, 11.0, 0.0004, **more)


class Collector:
    """The spans that an OTLP/HTTP collector received."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        self.url = ""

    async def take(self, request: web.Request) -> web.Response:
        body = await request.read()
        if body[:2] == b"\x1f\x8b":
            body = gzip.decompress(body)
        self.requests.append(ExportTraceServiceRequest.FromString(body))
        return web.Response(content_type="application/x-protobuf")

    def spans(self) -> dict[str, Any]:
        return {s.name: s for r in self.requests for rs in r.resource_spans for ss in rs.scope_spans for s in ss.spans}


@pytest.fixture
async def collector() -> AsyncIterator[Collector]:
    got = Collector()
    app = web.Application()
    app.router.add_post("/v1/traces", got.take)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    got.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield got
    await runner.cleanup()


def tracing(url: str) -> Tracing:
    return Tracing(url, "1.2.3", clock=lambda: 0.0, wall=lambda: WALL)


def attributes(span: Any) -> dict[str, Any]:
    return {a.key: plain(a.value) for a in span.attributes}


def plain(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return [plain(one) for one in value.array_value.values] if kind == "array_value" else getattr(value, kind)


async def test_a_request_arrives_as_a_server_span_with_its_images_under_it(collector: Collector) -> None:
    """The span has the ids of the traceparent, wall times, GenAI names, MU, and an INTERNAL child per image."""
    traces = tracing(collector.url)
    traces.service = Service("vllm", "pod-0", 8080)
    traces.admitted(structs.replace(admitted(), http=HttpRequest("POST", "/v1/chat/completions", "http", "1.1")))
    traces.imaged(IMAGE)
    traces.first_token(FirstToken("r", 12.0))
    details = AnswerDetails("chatcmpl-1", "llama-3", ("stop", "length"))
    traces.settled(settled(details=details), 0.75, lambda: (("decode", 12.5), ("images", 0.0)))
    assert await traces.close(10)

    spans = collector.spans()
    server, image = spans["chat llama"], spans["prepare image"]
    assert (server.trace_id.hex(), server.span_id.hex(), server.parent_span_id.hex()) == (
        TRACE.trace_id,
        TRACE.span_id,
        TRACE.parent_id,
    )
    assert (server.kind, server.status.code) == (server.SPAN_KIND_SERVER, 0)
    assert (server.start_time_unix_nano, server.end_time_unix_nano) == ((WALL + 10) * 1e9, (WALL + 20) * 1e9)
    assert [(e.name, e.time_unix_nano) for e in server.events] == [("first_token", (WALL + 12) * 1e9)]
    assert attributes(server) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.model": "llama",
        "gen_ai.request.max_tokens": 64,
        "gen_ai.request.stream": True,
        "gen_ai.response.id": "chatcmpl-1",
        "gen_ai.response.model": "llama-3",
        "gen_ai.response.finish_reasons": ["stop", "length"],
        "gen_ai.response.time_to_first_chunk": 2.0,
        "gen_ai.usage.input_tokens": 12,
        "gen_ai.usage.output_tokens": 7,
        "gen_ai.usage.cache_read.input_tokens": 3,
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "url.path": "/v1/chat/completions",
        "url.scheme": "http",
        "network.protocol.version": "1.1",
        "server.address": "pod-0",
        "server.port": 8080,
        "sidecar.tenant": "acme",
        "sidecar.outcome": "ok",
        "sidecar.mu": 0.75,
        "sidecar.gpu_ms.decode": 12.5,
        "sidecar.overhead_seconds": 0.0004,
        "sidecar.delivered_tokens": 7,
    }
    assert (image.trace_id, image.parent_span_id) == (server.trace_id, server.span_id)
    assert image.kind == image.SPAN_KIND_INTERNAL
    assert image.end_time_unix_nano - image.start_time_unix_nano == 5e8
    assert attributes(image)["sidecar.image.decode_seconds"] == 0.2
    resource = collector.requests[0].resource_spans[0].resource
    assert attributes(resource)["service.name"] == "inference-sidecar"


@pytest.mark.parametrize(
    ("outcome", "status", "code"),
    [
        ("engine_error", 500, 2),
        ("engine_error", 400, 0),
        ("stalled", 0, 2),
        ("lost", 0, 2),
        ("client_cancelled", 200, 0),
    ],
)
async def test_only_faults_of_the_server_are_errors(collector: Collector, outcome: str, status: int, code: int) -> None:
    """Disconnects and bad requests are no server errors; every outcome but ok names its error.type."""
    traces = tracing(collector.url)
    traces.admitted(admitted())
    traces.settled(settled(outcome=outcome, status=status))
    assert await traces.close(10)
    span = collector.spans()["chat llama"]
    assert span.status.code == code
    assert attributes(span)["error.type"] == outcome
    assert attributes(span)["sidecar.mu"] == 0.5


async def test_what_is_not_sampled_or_not_known_makes_no_span(collector: Collector) -> None:
    """An unsampled trace, a request without one, and events of unknown requests leave nothing behind."""
    traces = tracing(collector.url)
    traces.admitted(admitted("a", None))
    traces.admitted(admitted("b", Trace(TRACE.trace_id, TRACE.span_id, "", False)))
    for id in ("a", "b", "c"):
        traces.first_token(FirstToken(id, 12.0))
        traces.settled(settled(id))
    traces.imaged(IMAGE)
    assert await traces.close(10)
    assert collector.requests == []


async def test_open_spans_are_bounded(monkeypatch: pytest.MonkeyPatch, collector: Collector) -> None:
    """Beyond the bound the oldest open span is dropped, and the newest is kept."""
    monkeypatch.setattr(otel, "MAX_OPEN_REQUESTS", 2)
    traces = tracing(collector.url)
    for n in range(5):
        traces.admitted(admitted(f"r{n}", Trace(TRACE.trace_id, f"{n + 1:016x}", "", True)))
    for n in range(5):
        traces.settled(settled(f"r{n}"))
    assert await traces.close(10)
    ids = {s.span_id.hex() for r in collector.requests for rs in r.resource_spans for s in rs.scope_spans[0].spans}
    assert ids == {f"{4:016x}", f"{5:016x}"}


async def test_a_collector_that_hangs_does_not_hold_the_end() -> None:
    """Close returns False within its bound if the collector never answers."""
    asked, release = asyncio.Event(), asyncio.Event()

    async def hang(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await release.wait()
        writer.close()

    server = await asyncio.start_server(hang, "127.0.0.1", 0)
    try:
        traces = tracing(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        traces.admitted(admitted())
        traces.settled(settled())
        assert await traces.close(0.2) is False
        await asked.wait()
    finally:
        release.set()
        server.close()


def test_off_imports_no_opentelemetry() -> None:
    """With tracing off, events do not import OpenTelemetry."""
    code = """
import sys
from sidecar.events import Admitted, RequestSize, Trace
from sidecar.report.tracing import Tracing
t = Tracing("", "1")
t.admitted(Admitted("r", 0, "t", "m", "chat", True, RequestSize(1), None, 1, Trace("a" * 32, "b" * 16, "", True)))
print([m for m in sys.modules if m.startswith("opentelemetry")], len(t._open))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.split() == ["[]", "0"]


# --- W3C trace context ---

VALID = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_a_valid_traceparent_becomes_our_span_under_the_callers() -> None:
    """Trace id, sampling and state are kept, the caller's span is the parent, and the span id is new."""
    trace = trace_context.parse_traceparent(VALID, "congo=t61rcWkgMzE")
    assert trace is not None
    assert (trace.trace_id, trace.parent_id) == ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331")
    assert (trace.sampled, trace.state) == (True, "congo=t61rcWkgMzE")
    assert trace.span_id not in (trace.parent_id, "0" * 16)
    assert trace_context.format_traceparent(trace) == f"00-{trace.trace_id}-{trace.span_id}-01"


@pytest.mark.parametrize(
    ("header", "sampled"),
    [(VALID[:-2] + "00", False), (VALID[:-2] + "03", True), ("cc" + VALID[2:] + "-more", True), (f" {VALID} ", True)],
)
def test_flags_and_later_versions_are_read(header: str, sampled: bool) -> None:
    """Only the lowest flag means sampled; a later version may be longer."""
    trace = trace_context.parse_traceparent(header)
    assert trace is not None
    assert trace.sampled is sampled


@pytest.mark.parametrize(
    "header",
    [
        "",
        "ff" + VALID[2:],
        VALID + "-more",
        VALID + "x",
        VALID.upper(),
        "00-" + "0" * 32 + "-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-" + "0" * 16 + "-01",
        VALID[:-1],
        "cc" + VALID[2:] + "more",
        VALID + "\n" + VALID,
    ],
)
def test_an_invalid_traceparent_is_none(header: str) -> None:
    """Wrong version, length, case or separator, and all-zero ids, start a new trace."""
    assert trace_context.parse_traceparent(header) is None


@given(st.text(max_size=80))
def test_no_header_breaks_the_parser(header: str) -> None:
    """Whatever a client sends, the result is a trace or None, and a trace formats as a valid header."""
    trace = trace_context.parse_traceparent(header)
    assert trace is None or trace_context.parse_traceparent(trace_context.format_traceparent(trace)) is not None


def test_a_new_trace_is_a_root_and_a_child_is_not() -> None:
    """New ids are of the right form and differ from one another; a child keeps the trace and names its parent."""
    root, other = trace_context.new_trace(), trace_context.new_trace(sampled=False)
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-01", trace_context.format_traceparent(root))
    assert trace_context.format_traceparent(other).endswith("-00")
    assert (root.parent_id, root.trace_id == other.trace_id) == ("", False)
    below = trace_context.child(root)
    assert (below.trace_id, below.parent_id, below.span_id == root.span_id) == (root.trace_id, root.span_id, False)


@pytest.mark.parametrize(
    ("state", "kept"),
    [
        ("congo=t61rcWkgMzE, rojo=00f067aa0ba902b7", True),
        ("fw529a3039@dt=FfffffK8", True),
        ("a=" + "b" * 256 + ",c=" + "d" * 251, True),  # 512 characters
        ("a=" + "b" * 256 + ",c=" + "d" * 252, False),
        ("a=" + "b" * 257, False),
        ("congo", False),
        ("Congo=1", False),
        ("a=1,,b=2", False),
        ("a=\n", False),
        ("a=ü", False),
    ],
)
def test_a_tracestate_passes_whole_or_not_at_all(state: str, kept: bool) -> None:
    """A valid state of at most 512 characters is kept as it is; it is never cut or repaired."""
    trace = trace_context.parse_traceparent(VALID, state)
    assert trace is not None
    assert trace.state == (state if kept else "")


async def test_a_clients_tracestate_never_reaches_our_log(
    collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever state a client sends, exporting its span logs nothing; a valid one is exported."""
    traces = tracing(collector.url)
    for n, state in enumerate(("secret text", "A=1", "k=v,k=w", "a=1,b=2", "a@" + "b" * 15 + "=1")):
        traces.admitted(admitted(f"r{n}", trace_context.parse_traceparent(VALID, state)))
        traces.settled(settled(f"r{n}"))
    assert await traces.close(10)
    states = [s.trace_state for r in collector.requests for rs in r.resource_spans for s in rs.scope_spans[0].spans]
    assert sorted(states) == ["", "", "", "", "a=1,b=2"]
    assert "opentelemetry" not in {record.name.partition(".")[0] for record in caplog.records}
