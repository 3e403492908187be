"""OTLP export over HTTP or gRPC: what of OpenTelemetry's SDK spans, log records and metrics need.

Rules:
- What the SDK's variables say holds: OTEL_EXPORTER_OTLP_* (endpoint, protocol, headers, compression, certificates,
  timeout, also by signal), OTEL_BSP_*, OTEL_BLRP_*, OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES. --otlp-endpoint goes
  before an endpoint of theirs.
- A collector that is away costs spans or records and nothing else. They are counted, and one warning begins each such
  time.
- What is queued and the wait at shutdown are bounded.
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
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult

from sidecar.errors import UsageError

DEFAULT_QUEUED: Final = 2048  # the specification's default of OTEL_BSP_MAX_QUEUE_SIZE and OTEL_BLRP_MAX_QUEUE_SIZE
EXPORT_TIMEOUT_S: Final = 5.0
PROTOCOLS: Final = {"http/protobuf": "http", "grpc": "grpc"}  # -> the package of its exporters
# They log a line for each try; CountingExporter logs when it begins and when it ends.
_NOISY_LOGGERS: Final = ("opentelemetry.exporter", "opentelemetry.sdk._shared_internal")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Signal:
    """A signal of OTLP: its name in variables, where its exporter is, and its path over HTTP.

    `noun`, `counter`: what is lost without a collector, and the metric that counts it.
    """

    name: str
    module: str
    exporter: str
    path: str
    noun: str = ""
    counter: str = ""


SPANS: Final = Signal(
    "TRACES", "trace_exporter", "OTLPSpanExporter", "/v1/traces", "spans", "sidecar_spans_dropped_total"
)
LOGS: Final = Signal(
    "LOGS", "_log_exporter", "OTLPLogExporter", "/v1/logs", "log records", "sidecar_log_records_dropped_total"
)
METRICS: Final = Signal("METRICS", "metric_exporter", "OTLPMetricExporter", "/v1/metrics")


class ExportQueue:
    """Spans or log records on their way to a collector. `dropped` counts those that it did not get.

    `make_processor` makes the SDK's batch processor of an exporter. `max_variable` names the variable of its size.
    """

    def __init__(
        self,
        signal: Signal,
        endpoint: str,
        version: str,
        make_processor: Callable[[Any], Any],
        max_variable: str,
        failure: object,
    ) -> None:
        self.resource = make_resource(version)
        for name in _NOISY_LOGGERS:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._exporter = CountingExporter(make_exporter(signal, endpoint), signal, failure)
        self.processor = make_processor(self._exporter)
        given = os.environ.get(max_variable, "").strip()
        self._max_pending = int(given) if given.isdecimal() and int(given) else DEFAULT_QUEUED
        self._added = self._full = 0

    @property
    def dropped(self) -> int:
        """What was not exported: the collector did not take it, or the queue was full."""
        return self._full + self._exporter.failed

    def has_room(self) -> bool:
        """Whether one more may be given to the processor; it then counts as queued, else as dropped."""
        if self._added - self._exporter.done >= self._max_pending:
            self._full += 1
            return False
        self._added += 1
        return True

    async def close(self, seconds: float) -> bool:
        """Export what is queued. False if the collector did not accept it within `seconds`."""
        return await call_within(self.processor.shutdown, seconds)


class SpanQueue(ExportQueue):
    """Ended spans on their way to a collector."""

    def __init__(self, endpoint: str, version: str) -> None:
        super().__init__(
            SPANS, endpoint, version, BatchSpanProcessor, "OTEL_BSP_MAX_QUEUE_SIZE", SpanExportResult.FAILURE
        )

    def add(self, span: ReadableSpan) -> None:
        """Queue a span. Never waits."""
        if self.has_room():
            self.processor.on_end(span)


class CountingExporter:
    """Exports by another exporter, on the thread of the processor; counts, and logs the first failure of a row.

    The exporters of all signals have the same form; only their results are of different types.
    """

    def __init__(self, exporter: Any, signal: Signal, failure: object) -> None:
        self._exporter = exporter
        self._signal = signal
        self._failure = failure
        self._is_failing = False
        self.done = self.failed = 0

    def export(self, batch: Sequence[Any]) -> Any:
        noun = self._signal.noun
        try:
            result = self._exporter.export(batch)
        except Exception as e:  # noqa: BLE001  # a library's: it costs this batch
            _log.debug("export of %s: %s", noun, type(e).__name__)
            result = self._failure
        has_failed = result is self._failure
        if has_failed:
            self.failed += len(batch)
        self.done += len(batch)
        if has_failed and not self._is_failing:
            text = "the collector takes no %s; they are dropped and counted (%s)"
            _log.warning(text, noun, self._signal.counter)
        elif self._is_failing and not has_failed:
            _log.info("the collector takes %s again", noun)
        self._is_failing = has_failed
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return bool(self._exporter.force_flush(timeout_millis))


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
