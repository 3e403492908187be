"""OTLP export over HTTP or gRPC: what of OpenTelemetry's SDK spans and metrics need.

Rules:
- What the SDK's variables say holds: OTEL_EXPORTER_OTLP_* (endpoint, protocol, headers, compression, certificates,
  timeout, also by signal), OTEL_BSP_*, OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES. --otlp-endpoint goes before an
  endpoint of theirs.
- A collector that is away costs spans and nothing else. They are counted, and one warning begins each such time.
- Queued spans and the wait at shutdown are bounded.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from sidecar.errors import UsageError

DEFAULT_QUEUED_SPANS: Final = 2048  # the specification's default of OTEL_BSP_MAX_QUEUE_SIZE
EXPORT_TIMEOUT_S: Final = 5.0
PROTOCOLS: Final = {"http/protobuf": "http", "grpc": "grpc"}  # -> the package of its exporters
# They log a line for each try; CountingExporter logs when it begins and when it ends.
_NOISY_LOGGERS: Final = ("opentelemetry.exporter", "opentelemetry.sdk._shared_internal")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Signal:
    """A signal of OTLP: its name in variables, where its exporter is, and its path over HTTP."""

    name: str
    module: str
    exporter: str
    path: str


SPANS: Final = Signal("TRACES", "trace_exporter", "OTLPSpanExporter", "/v1/traces")
METRICS: Final = Signal("METRICS", "metric_exporter", "OTLPMetricExporter", "/v1/metrics")


class SpanQueue:
    """Ended spans on their way to a collector. `dropped` counts those that it did not get."""

    def __init__(self, endpoint: str, version: str) -> None:
        self.resource = make_resource(version)
        for name in _NOISY_LOGGERS:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._exporter = CountingExporter(make_exporter(SPANS, endpoint))
        self._processor = BatchSpanProcessor(self._exporter)
        given = os.environ.get("OTEL_BSP_MAX_QUEUE_SIZE", "").strip()
        self._max_pending = int(given) if given.isdecimal() and int(given) else DEFAULT_QUEUED_SPANS
        self._added = self._full = 0

    @property
    def dropped(self) -> int:
        """Spans that were not exported: the collector did not take them, or the queue was full."""
        return self._full + self._exporter.failed

    def add(self, span: ReadableSpan) -> None:
        """Queue a span. Never waits."""
        if self._added - self._exporter.done >= self._max_pending:
            self._full += 1
            return
        self._added += 1
        self._processor.on_end(span)

    async def close(self, seconds: float) -> bool:
        """Export queued spans. False if the collector did not accept them within `seconds`."""
        return await call_within(self._processor.shutdown, seconds)


class CountingExporter(SpanExporter):
    """Exports by another exporter, on the thread of the processor; counts, and logs the first failure of a row."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._is_failing = False
        self.done = self.failed = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        try:
            result = self._exporter.export(spans)
        except Exception as e:  # noqa: BLE001  # a library's: it costs these spans
            _log.debug("export of spans: %s", type(e).__name__)
            result = SpanExportResult.FAILURE
        has_failed = result is not SpanExportResult.SUCCESS
        if has_failed:
            self.failed += len(spans)
        self.done += len(spans)
        if has_failed and not self._is_failing:
            _log.warning("the collector takes no spans; they are dropped and counted (sidecar_spans_dropped_total)")
        elif self._is_failing and not has_failed:
            _log.info("the collector takes spans again")
        self._is_failing = has_failed
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._exporter.force_flush(timeout_millis)


async def call_within(function: Callable[[], object], seconds: float) -> bool:
    """Call `function` in a thread; False if it takes longer. A daemon: a hung collector cannot block the exit."""
    thread = threading.Thread(target=function, name="otel-close", daemon=True)
    thread.start()
    await asyncio.to_thread(thread.join, seconds)
    return not thread.is_alive()


def make_resource(version: str) -> Resource:
    """The sidecar as OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES describe it."""
    resource = Resource.create({"service.version": version})
    if str(resource.attributes.get("service.name", "")).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": "inference-sidecar"}))
    return resource


def make_exporter(signal: Signal, endpoint: str) -> Any:
    """The exporter of a signal, of the protocol that the environment names. Raises UsageError if there is none."""
    protocol = _variable(signal, "PROTOCOL").lower() or "http/protobuf"
    if protocol not in PROTOCOLS:
        raise UsageError(f"OTEL_EXPORTER_OTLP_PROTOCOL is none of {', '.join(PROTOCOLS)}")
    try:
        module = importlib.import_module(f"opentelemetry.exporter.otlp.proto.{PROTOCOLS[protocol]}.{signal.module}")
    except ImportError:
        raise UsageError("OTEL_EXPORTER_OTLP_PROTOCOL=grpc needs the extra `otlp-grpc`") from None
    settings: dict[str, Any] = {} if _variable(signal, "TIMEOUT") else {"timeout": EXPORT_TIMEOUT_S}
    if endpoint and protocol == "grpc":
        settings |= {"endpoint": endpoint, "insecure": endpoint.startswith("http://")}
    elif endpoint:
        settings["endpoint"] = endpoint.rstrip("/").removesuffix(SPANS.path) + signal.path
    return getattr(module, signal.exporter)(**settings)


def _variable(signal: Signal, name: str) -> str:
    """OTEL_EXPORTER_OTLP_<name> of a signal, or of all."""
    names = (f"OTEL_EXPORTER_OTLP_{signal.name}_{name}", f"OTEL_EXPORTER_OTLP_{name}")
    return next((value for name in names if (value := os.environ.get(name, "").strip())), "")
