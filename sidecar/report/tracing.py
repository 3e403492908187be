"""One SERVER span per request, built in the control process from events, so that tracing costs the relay nothing.

Rules:
- OpenTelemetry is imported only if an endpoint is set. Only sampled traces are recorded; the relay samples
  (sidecar/trace_context.py).
- Open spans, queued spans and the wait at shutdown are bounded. If the collector is unreachable, only spans are lost.
- Names are those of the semantic conventions (semantic_conventions.py). Spans never contain content.
"""

from __future__ import annotations

import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from sidecar.errors import UsageError, place_of
from sidecar.events import Admitted, FirstToken, ImagePrepared, Settled, Trace
from sidecar.load.ledger import FAILED_OUTCOMES
from sidecar.report import semantic_conventions
from sidecar.report.semantic_conventions import Attributes, FinishedRequest, Service
from sidecar.trace_context import child, sampler_of, sampler_trouble

if TYPE_CHECKING:
    from opentelemetry.trace import SpanContext

    from sidecar.report.otlp import SpanQueue

Clock = Callable[[], float]
Nanoseconds = Callable[[float], int]
# Returns (name, ms) of each term of a price; called only if there is a span.
Terms = Callable[[], Iterable[tuple[str, float]]]

MAX_OPEN_REQUESTS: Final = 10_000
MAX_IMAGES_PER_REQUEST: Final = 64

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _OpenSpan:
    admitted: Admitted
    trace: Trace
    first_at: float | None = None
    images: list[ImagePrepared] = field(default_factory=list)


class Tracing:
    """Builds spans from the events of requests, in their order. Does nothing where no collector is named.

    `endpoint` is its base URL, with or without /v1/traces; "" leaves it to OTEL_EXPORTER_OTLP_ENDPOINT. `service`: what
    spans say of engine and sidecar.
    """

    def __init__(self, endpoint: str, version: str, *, clock: Clock = time.monotonic, wall: Clock = time.time) -> None:
        self._clock, self._wall = clock, wall
        self._open: OrderedDict[str, _OpenSpan] = OrderedDict()
        self._early: OrderedDict[str, list[ImagePrepared]] = OrderedDict()  # images precede their request's admission
        self.service = Service()
        self._exporter = _make_exporter(endpoint, version) if sampler_of(os.environ, endpoint) is not None else None

    @property
    def dropped(self) -> int:
        """Spans that no collector got."""
        return self._exporter.queue.dropped if self._exporter is not None else 0

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
        finished = FinishedRequest(request.admitted, event, self.service, first_at, mu)
        attributes = semantic_conventions.attributes(semantic_conventions.SPAN, finished) | price
        self._exporter.request(request, first_at, event, attributes, ns)

    async def close(self, seconds: float = 3.0) -> bool:
        """Export queued spans within `seconds`. False if the collector did not accept them in time."""
        self._open.clear()
        self._early.clear()
        return await self._exporter.queue.close(seconds) if self._exporter is not None else True


def _make_exporter(endpoint: str, version: str) -> _Exporter | None:
    """The exporter; None, with a line in the log, where the environment asks for one that there is not."""
    if trouble := sampler_trouble(os.environ):
        _log.warning("%s", trouble)
    try:
        return _Exporter(endpoint, version)
    except UsageError as error:
        _log.error("spans are off: %s", error)
    except ValueError as error:  # the SDK's, of its variables, which may hold secrets
        _log.error("spans are off: OpenTelemetry rejects an OTEL_* variable (%s)", place_of(error))
    return None


class _Exporter:
    """Builds the spans of OpenTelemetry.

    Spans have the ids sent in `traceparent`. A tracer would generate its own, so ended spans are built and queued.
    """

    def __init__(self, endpoint: str, version: str) -> None:
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        from sidecar.report.otlp import SpanQueue

        self.queue: SpanQueue = SpanQueue(endpoint, version)
        self._scope = InstrumentationScope("sidecar", version)

    def request(
        self, request: _OpenSpan, first_at: float | None, settled: Settled, attributes: Attributes, ns: Nanoseconds
    ) -> None:
        """The SERVER span, from its first image or its admission to its settlement."""
        from opentelemetry.sdk.trace import Event
        from opentelemetry.trace import SpanKind

        trace = request.trace
        self._end(
            # A bad request that the engine rejected (4xx) is no error of the server.
            settled.outcome in FAILED_OUTCOMES and not 400 <= settled.status < 500,
            name=semantic_conventions.span_name(attributes),
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

    def _end(self, is_error: bool, **span: Any) -> None:
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.trace.status import Status, StatusCode

        status = Status(StatusCode.ERROR if is_error else StatusCode.UNSET)
        whole = ReadableSpan(resource=self.queue.resource, instrumentation_scope=self._scope, status=status, **span)
        self.queue.add(whole)


def _context(trace: Trace, span_id: str, *, remote: bool = False) -> SpanContext:
    from opentelemetry.trace import SpanContext, TraceFlags, TraceState

    flags = TraceFlags(TraceFlags.SAMPLED if trace.sampled else TraceFlags.DEFAULT)
    state = TraceState.from_header([trace.state]) if trace.state else None
    return SpanContext(int(trace.trace_id, 16), int(span_id, 16), remote, flags, state)
