"""One SERVER span per request, built in the control process from events, so that tracing costs the relay nothing.

Rules:
- OpenTelemetry is imported only if an endpoint is set. Only traces that the caller sampled are recorded.
- Open spans, queued spans and the wait at shutdown are bounded. If the collector is unreachable, only spans are lost.
- Names are those of the GenAI semantic conventions. Spans never contain content.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from sidecar.events import Admitted, FirstToken, ImagePrepared, Settled, Trace
from sidecar.labels import printable
from sidecar.load.ledger import FAILED_OUTCOMES
from sidecar.trace_context import child

if TYPE_CHECKING:
    from opentelemetry.trace import SpanContext

Attributes = dict[str, str | int | float | bool]
Clock = Callable[[], float]
Nanoseconds = Callable[[float], int]
# Returns (name, ms) of each term of a price; called only if there is a span.
Terms = Callable[[], Iterable[tuple[str, float]]]

MAX_OPEN_REQUESTS: Final = 10_000
MAX_IMAGES_PER_REQUEST: Final = 64
MAX_QUEUED_SPANS: Final = 2048
_OPERATIONS: Final = {"chat": "chat", "completions": "text_completion", "embeddings": "embeddings"}


@dataclass(slots=True)
class _OpenSpan:
    admitted: Admitted
    trace: Trace
    first_at: float | None = None
    images: list[ImagePrepared] = field(default_factory=list)


class Tracing:
    """Builds spans from the events of requests, in their order. With `endpoint` "" it does nothing.

    `endpoint` is the base URL of an OTLP/HTTP collector, with or without /v1/traces.
    """

    def __init__(self, endpoint: str, version: str, *, clock: Clock = time.monotonic, wall: Clock = time.time) -> None:
        self._clock, self._wall = clock, wall
        self._open: OrderedDict[str, _OpenSpan] = OrderedDict()
        self._early: OrderedDict[str, list[ImagePrepared]] = OrderedDict()  # images precede their request's admission
        self._exporter = _Exporter(endpoint, version) if endpoint else None

    def admitted(self, event: Admitted) -> None:
        images = self._early.pop(event.id, [])
        if self._exporter is None or event.trace is None or not event.trace.sampled:
            return
        self._open[event.id] = _OpenSpan(event, event.trace, images=images)
        if len(self._open) > MAX_OPEN_REQUESTS:
            self._open.popitem(last=False)

    def first_token(self, event: FirstToken) -> None:
        if (request := self._open.get(event.id)) is not None:
            request.first_at = event.at

    def imaged(self, event: ImagePrepared) -> None:
        if self._exporter is None or not event.id:
            return
        request = self._open.get(event.id)
        images = self._early.setdefault(event.id, []) if request is None else request.images
        if len(images) < MAX_IMAGES_PER_REQUEST:
            images.append(event)
        if len(self._early) > MAX_OPEN_REQUESTS:
            self._early.popitem(last=False)

    def settled(self, event: Settled, mu: float | None = None, terms: Terms = tuple) -> None:
        """End the span, and export it with those of its images. `mu` and `terms`: the actual price. Never waits."""
        request = self._open.pop(event.id, None)
        if request is None or self._exporter is None:
            return
        offset = self._wall() - self._clock()  # computed each time, as wall clocks are stepped

        def ns(at: float) -> int:
            return int((at + offset) * 1e9)

        for image in request.images:
            self._exporter.image(request.trace, image, ns)
        price = {f"sidecar.gpu_ms.{name}": ms for name, ms in terms() if ms}
        first_at = event.first_at if event.first_at is not None else request.first_at
        attributes = request_attributes(request.admitted, first_at, event, mu) | price
        self._exporter.request(request, first_at, event, attributes, ns)

    async def close(self, seconds: float = 3.0) -> bool:
        """Export queued spans within `seconds`. False if the collector did not accept them in time."""
        self._open.clear()
        self._early.clear()
        return await self._exporter.close(seconds) if self._exporter is not None else True


def request_attributes(admitted: Admitted, first_at: float | None, settled: Settled, mu: float | None) -> Attributes:
    """Pure: the attributes of a request's span, without unknown ones."""
    usage = settled.usage
    known: dict[str, str | int | float | bool | None] = {
        "gen_ai.operation.name": _OPERATIONS.get(admitted.route, admitted.route),
        "gen_ai.request.model": printable(admitted.model),
        "gen_ai.request.max_tokens": admitted.max_output,
        "gen_ai.request.stream": admitted.stream,
        "gen_ai.usage.input_tokens": usage.prompt_tokens if usage else None,
        "gen_ai.usage.output_tokens": usage.completion_tokens if usage else None,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens if usage else None,
        "gen_ai.server.time_to_first_token": first_at - admitted.at if first_at is not None else None,
        "http.response.status_code": settled.status or None,
        "error.type": (settled.error or settled.outcome) if settled.outcome != "ok" else None,
        "sidecar.tenant": printable(admitted.tenant),
        "sidecar.outcome": settled.outcome,
        "sidecar.mu": mu if mu is not None else admitted.mu,
        "sidecar.overhead_seconds": settled.overhead,
        "sidecar.delivered_tokens": settled.delivered_tokens,
    }
    return {name: value for name, value in known.items() if value is not None}


class _Exporter:
    """The only part that uses OpenTelemetry.

    Spans have the ids sent in `traceparent`. A tracer would generate its own, so ended spans are built and passed to
    the batching processor.
    """

    def __init__(self, endpoint: str, version: str) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        url = endpoint if endpoint.endswith("/v1/traces") else endpoint + "/v1/traces"
        # Resource.create also reads OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES.
        self._resource = Resource.create({"service.version": version})
        if str(self._resource.attributes.get("service.name", "")).startswith("unknown_service"):
            self._resource = self._resource.merge(Resource({"service.name": "inference-sidecar"}))
        self._scope = InstrumentationScope("sidecar", version)
        self._processor = BatchSpanProcessor(OTLPSpanExporter(endpoint=url, timeout=5), max_queue_size=MAX_QUEUED_SPANS)

    def request(
        self, request: _OpenSpan, first_at: float | None, settled: Settled, attributes: Attributes, ns: Nanoseconds
    ) -> None:
        """The SERVER span, from its first image or its admission to its settlement."""
        from opentelemetry.sdk.trace import Event
        from opentelemetry.trace import SpanKind

        trace, model = request.trace, attributes["gen_ai.request.model"]
        self._end(
            # A bad request that the engine rejected (4xx) is no error of the server.
            settled.outcome in FAILED_OUTCOMES and not 400 <= settled.status < 500,
            name=f"{attributes['gen_ai.operation.name']} {model}",
            context=_context(trace, trace.span_id),
            parent=_context(trace, trace.parent_id, remote=True) if trace.parent_id else None,
            kind=SpanKind.SERVER,
            attributes=attributes,
            events=(Event("first_token", timestamp=ns(first_at)),) if first_at is not None else (),
            start_time=ns(min((request.admitted.at, *(i.at - i.seconds for i in request.images)))),
            end_time=ns(settled.at),
        )

    def image(self, parent: Trace, image: ImagePrepared, ns: Nanoseconds) -> None:
        """An INTERNAL span under the request's, with seconds by stage."""
        own, names = child(parent), ("format", "outcome", "bytes_in", "bytes_out")
        self._end(
            image.outcome in ("rejected", "failed"),
            name="prepare image",
            context=_context(own, own.span_id),
            parent=_context(parent, parent.span_id),
            attributes={f"sidecar.image.{name}": getattr(image, name) for name in names}
            | {f"sidecar.image.{stage}_seconds": seconds for stage, seconds in image.stages},
            start_time=ns(image.at - image.seconds),
            end_time=ns(image.at),
        )

    async def close(self, seconds: float) -> bool:
        """Export queued spans. The thread is a daemon, so that a hung collector cannot block the exit."""
        thread = threading.Thread(target=self._processor.shutdown, name="otel-close", daemon=True)
        thread.start()
        await asyncio.to_thread(thread.join, seconds)
        return not thread.is_alive()

    def _end(self, is_error: bool, **span: Any) -> None:
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.trace.status import Status, StatusCode

        status = Status(StatusCode.ERROR if is_error else StatusCode.UNSET)
        whole = ReadableSpan(resource=self._resource, instrumentation_scope=self._scope, status=status, **span)
        self._processor.on_end(whole)


def _context(trace: Trace, span_id: str, *, remote: bool = False) -> SpanContext:
    from opentelemetry.trace import SpanContext, TraceFlags, TraceState

    flags = TraceFlags(TraceFlags.SAMPLED if trace.sampled else TraceFlags.DEFAULT)
    state = TraceState.from_header([trace.state]) if trace.state else None
    return SpanContext(int(trace.trace_id, 16), int(span_id, 16), remote, flags, state)
