"""One SERVER span per request, built in the control process from facts, so that the relay pays nothing for tracing.

Rules: OpenTelemetry is imported only where an endpoint is set; only traces that their caller sampled are kept; what is kept
is bounded, and so is the wait at the end; a collector that is away costs its spans and nothing else. Names are those of
the GenAI semantic conventions; no content ever goes into a span.
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
from sidecar.trace_context import child

if TYPE_CHECKING:
    from opentelemetry.trace import SpanContext

Attributes = dict[str, str | int | float | bool]
Terms = Callable[
    [], Iterable[tuple[str, float]]
]  # called only where there is a span: (name, ms) of each term of a price

MAX_OPEN_REQUESTS: Final = 10_000  # requests whose span is being built
MAX_IMAGES_PER_REQUEST: Final = 64  # image spans of one request
MAX_QUEUED_SPANS: Final = 2048  # spans that wait for the collector
_OPERATIONS: Final = {"chat": "chat", "completions": "text_completion", "embeddings": "embeddings"}
_FAULT_OUTCOMES: Final = frozenset(
    {"engine_error", "stalled", "lost"}
)  # a client that went away is no error of a server


@dataclass(slots=True)
class _OpenSpan:
    """A request that is not settled yet."""

    admitted: Admitted
    trace: Trace
    first_at: float | None = None
    images: list[ImagePrepared] = field(default_factory=list)


class Tracing:
    """Feed it the facts of requests in their order. With `endpoint` "" it does nothing, at no cost.

    `endpoint` is the base URL of an OTLP/HTTP collector, with or without /v1/traces. `mu` of `settled` is the actual price.
    """

    def __init__(
        self,
        endpoint: str,
        version: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._clock, self._wall = clock, wall
        self._open: OrderedDict[str, _OpenSpan] = OrderedDict()
        self._early: OrderedDict[str, list[ImagePrepared]] = (
            OrderedDict()
        )  # images come before the admission that they price
        self._exporter = _Exporter(endpoint, version) if endpoint else None

    def admitted(self, event: Admitted) -> None:
        """Begin a span, where the request is traced and sampled."""
        images = self._early.pop(event.id, [])
        if self._exporter is None or event.trace is None or not event.trace.sampled:
            return
        self._open[event.id] = _OpenSpan(event, event.trace, images=images)
        if len(self._open) > MAX_OPEN_REQUESTS:
            self._open.popitem(last=False)

    def first_token(self, event: FirstToken) -> None:
        """Note when the first token came."""
        if (request := self._open.get(event.id)) is not None:
            request.first_at = event.at

    def imaged(self, event: ImagePrepared) -> None:
        """Note an image of a request, as a span under the request's."""
        if self._exporter is None or not event.id:
            return
        request = self._open.get(event.id)
        images = self._early.setdefault(event.id, []) if request is None else request.images
        if len(images) < MAX_IMAGES_PER_REQUEST:
            images.append(event)
        if len(self._early) > MAX_OPEN_REQUESTS:
            self._early.popitem(last=False)

    def settled(self, event: Settled, mu: float | None = None, terms: Terms = tuple) -> None:
        """End the span and hand it, with those of its images, to the exporter. `terms` of its price, in ms. Never waits."""
        request = self._open.pop(event.id, None)
        if request is None or self._exporter is None:
            return
        offset = self._wall() - self._clock()  # taken anew each time: wall clocks are stepped

        def ns(at: float) -> int:
            return int((at + offset) * 1e9)

        for image in request.images:
            self._exporter.image(child(request.trace), request.trace, image, ns)
        self._exporter.request(
            request,
            event,
            {**request_attributes(request.admitted, request.first_at, event, mu), **price_attributes(terms())},
            ns,
        )

    async def close(self, seconds: float = 3.0) -> bool:
        """Send what is queued, within `seconds`. False where the collector did not take it in time."""
        self._open.clear()
        self._early.clear()
        return await self._exporter.close(seconds) if self._exporter is not None else True


def price_attributes(terms: Iterable[tuple[str, float]]) -> Attributes:
    """Pure: the terms of a price as attributes; those that cost nothing are left out."""
    return {f"sidecar.gpu_ms.{name}": ms for name, ms in terms if ms}


def request_attributes(admitted: Admitted, first_at: float | None, settled: Settled, mu: float | None) -> Attributes:
    """Pure: the attributes of a request's span; what is not known is left out."""
    first = settled.first_at if settled.first_at is not None else first_at
    usage = settled.usage
    known: dict[str, str | int | float | bool | None] = {
        "gen_ai.operation.name": _OPERATIONS.get(admitted.route, admitted.route),
        "gen_ai.request.model": printable(admitted.model),
        "gen_ai.request.max_tokens": admitted.max_output,
        "gen_ai.request.stream": admitted.stream,
        "gen_ai.usage.input_tokens": usage.prompt_tokens if usage else None,
        "gen_ai.usage.output_tokens": usage.completion_tokens if usage else None,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens if usage else None,
        "gen_ai.server.time_to_first_token": first - admitted.at if first is not None else None,
        "http.response.status_code": settled.status or None,
        "error.type": (settled.error or settled.outcome) if settled.outcome != "ok" else None,
        "sidecar.tenant": printable(admitted.tenant),
        "sidecar.outcome": settled.outcome,
        "sidecar.mu": mu if mu is not None else admitted.mu,
        "sidecar.overhead_seconds": settled.overhead,
        "sidecar.delivered_tokens": settled.delivered_tokens,
    }
    return {name: value for name, value in known.items() if value is not None}


def image_attributes(image: ImagePrepared) -> Attributes:
    """Pure: the attributes of an image's span, seconds by stage among them."""
    return {
        "sidecar.image.format": image.format,
        "sidecar.image.outcome": image.outcome,
        "sidecar.image.bytes_in": image.bytes_in,
        "sidecar.image.bytes_out": image.bytes_out,
        **{f"sidecar.image.{stage}_seconds": seconds for stage, seconds in image.stages},
    }


class _Exporter:
    """The only part that knows OpenTelemetry. Spans have the ids that travelled in `traceparent`, so they are built whole
    and given to the batching processor as ended ones; a tracer would draw ids of its own."""

    def __init__(self, endpoint: str, version: str) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        url = endpoint if endpoint.endswith("/v1/traces") else endpoint + "/v1/traces"
        # Resource.create also reads OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES, which operators know.
        self._resource = Resource.create({"service.version": version})
        if str(self._resource.attributes.get("service.name", "")).startswith("unknown_service"):
            self._resource = self._resource.merge(Resource({"service.name": "inference-sidecar"}))
        self._scope = InstrumentationScope("sidecar", version)
        self._processor = BatchSpanProcessor(OTLPSpanExporter(endpoint=url, timeout=5), max_queue_size=MAX_QUEUED_SPANS)

    def request(self, request: _OpenSpan, settled: Settled, attributes: Attributes, ns: Callable[[float], int]) -> None:
        """The SERVER span, from its first image or its admission to its settlement."""
        from opentelemetry.sdk.trace import Event
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.status import Status, StatusCode

        first = settled.first_at if settled.first_at is not None else request.first_at
        trace, model = request.trace, attributes["gen_ai.request.model"]
        self._end(
            name=f"{attributes['gen_ai.operation.name']} {model}",
            context=_context(trace, trace.span_id),
            parent=_context(trace, trace.parent_id, remote=True) if trace.parent_id else None,
            kind=SpanKind.SERVER,
            attributes=attributes,
            events=(Event("first_token", timestamp=ns(first)),) if first is not None else (),
            status=Status(StatusCode.ERROR if _is_fault(settled) else StatusCode.UNSET),
            start_time=ns(min((request.admitted.at, *(i.at - i.seconds for i in request.images)))),
            end_time=ns(settled.at),
        )

    def image(self, own: Trace, parent: Trace, image: ImagePrepared, ns: Callable[[float], int]) -> None:
        """An INTERNAL span under the request's."""
        from opentelemetry.trace.status import Status, StatusCode

        self._end(
            name="prepare image",
            context=_context(own, own.span_id),
            parent=_context(parent, parent.span_id),
            attributes=image_attributes(image),
            status=Status(StatusCode.ERROR if image.outcome in ("rejected", "failed") else StatusCode.UNSET),
            start_time=ns(image.at - image.seconds),
            end_time=ns(image.at),
        )

    async def close(self, seconds: float) -> bool:
        """Send what is queued. The thread is a daemon, so that a collector that hangs cannot hold the process."""
        thread = threading.Thread(target=self._processor.shutdown, name="otel-close", daemon=True)
        thread.start()
        await asyncio.to_thread(thread.join, seconds)
        return not thread.is_alive()

    def _end(self, **span: Any) -> None:
        from opentelemetry.sdk.trace import ReadableSpan

        self._processor.on_end(ReadableSpan(resource=self._resource, instrumentation_scope=self._scope, **span))


def _is_fault(settled: Settled) -> bool:
    """Whether it counts as an error of the server: not where the engine refused a bad request (4xx)."""
    return settled.outcome in _FAULT_OUTCOMES and not 400 <= settled.status < 500


def _context(trace: Trace, span_id: str, *, remote: bool = False) -> SpanContext:
    from opentelemetry.trace import SpanContext, TraceFlags, TraceState

    flags = TraceFlags(TraceFlags.SAMPLED if trace.sampled else TraceFlags.DEFAULT)
    state = TraceState.from_header([trace.state]) if trace.state else None
    return SpanContext(int(trace.trace_id, 16), int(span_id, 16), remote, flags, state)
