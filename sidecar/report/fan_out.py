"""Hands what happens in the control process to every report that counts it: metrics, spans, usage records.

Nothing here waits, and nothing here decides.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from sidecar.errors import UsageError, place_of
from sidecar.events import (
    AbortRequests,
    Admitted,
    CanaryResult,
    Event,
    FirstToken,
    ImagePrepared,
    RequestSize,
    UnreadRequest,
    Verdict,
)
from sidecar.load.client_labels import ClientLabels
from sidecar.load.gpu_price import GpuPrice
from sidecar.load.ledger import Settlement
from sidecar.report.metrics import Metrics
from sidecar.report.request_log import RequestLog
from sidecar.report.semantic_conventions import FinishedRequest
from sidecar.report.tracing import Tracing
from sidecar.report.usage_rows import Eviction, key_of, rate_of, sums_of
from sidecar.report.usage_store import UsageStore
from sidecar.trace_context import is_exported

if TYPE_CHECKING:  # it imports OpenTelemetry
    from sidecar.report.otlp_logs import OtlpLogHandler
    from sidecar.report.otlp_metrics import ServerMetrics

T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FanOut:
    """The reports of one control process. `price_terms` splits the price of a request by cause, in GPU milliseconds."""

    metrics: Metrics
    tracing: Tracing
    usage: UsageStore | None
    labels: ClientLabels
    price_terms: Callable[[RequestSize], Iterable[tuple[str, float]]]
    fingerprint: str  # of the coefficients
    unit_ms: float  # milliseconds of the engine of one MU
    request_log: RequestLog | None = None  # of what `usage` counts
    server_metrics: ServerMetrics | None = None  # by OTLP

    def on_event(self, event: Event) -> None:
        """An event of a relay, other than the end of a request."""
        if isinstance(event, Admitted):
            self.tracing.admitted(event)
        elif isinstance(event, FirstToken):
            self.tracing.first_token(event)
        elif isinstance(event, UnreadRequest):
            self.metrics.observe(event)
        elif isinstance(event, ImagePrepared):
            self.metrics.observe(event)
            self.tracing.imaged(event)

    def on_settlement(self, settlement: Settlement, price: GpuPrice, wall: float) -> None:
        """A request ended, at `wall` (seconds since 1970)."""
        admitted, settled, mu = settlement.admitted, settlement.settled, settlement.mu
        if settlement.relabelled:
            self.metrics.relabel(self.labels.of)
        self.tracing.settled(settled, mu, lambda: self.price_terms(settlement.work) if mu else ())
        key = key_of(settlement, rate_of(price, self.fingerprint), wall)
        sums = sums_of(settlement, price, self.unit_ms)
        self.metrics.settled(
            key,
            sums,
            request=settled.at - admitted.at,
            time_to_first_token=settlement.first_token_s,
            time_per_output_token=settlement.output_token_s,
            relay_overhead=None if settled.sent_at is None else settled.overhead,
        )
        is_new = self.usage is not None and self.usage.add(admitted.id, key, sums)
        if is_new and self.request_log is not None:
            self.metrics.requests_unlogged(self.request_log.add(settlement, key, sums, wall))
        if self.server_metrics is not None:
            finished = FinishedRequest(admitted, settled, self.tracing.service, settled.first_at, mu)
            self.server_metrics.settled(finished, key.model)

    def on_evictions(self, evictions: Iterable[Eviction]) -> None:
        """Usage records were dropped."""
        for eviction in evictions:
            self.metrics.evicted(eviction)

    def on_database_write(self, result: Literal["ok", "failed"]) -> None:
        """Usage records were written to the database, or could not be."""
        self.metrics.database_written(result)

    def on_decision(self, record: CanaryResult | Verdict | AbortRequests) -> None:
        """A canary ended, the verdict changed, or requests are to be aborted."""
        self.metrics.observe(record)


def make_server_metrics(endpoint: str, version: str) -> ServerMetrics | None:
    """The metrics by OTLP, where OTEL_METRICS_EXPORTER asks for them: many collectors of spans take no metrics."""

    def make() -> ServerMetrics:
        from sidecar.report.otlp_metrics import ServerMetrics

        return ServerMetrics(endpoint, version)

    return _make_if_exported("METRICS", endpoint, make)


def make_log_handler(endpoint: str, version: str) -> OtlpLogHandler | None:
    """The log records by OTLP, where OTEL_LOGS_EXPORTER asks for them: many collectors of spans take no logs."""

    def make() -> OtlpLogHandler:
        from sidecar.report.otlp_logs import OtlpLogHandler

        return OtlpLogHandler(endpoint, version)

    return _make_if_exported("LOGS", endpoint, make)


def _make_if_exported(signal: str, endpoint: str, make: Callable[[], T]) -> T | None:
    """The export of a signal; None where no variable enables it, or, with an error in the log, where that fails."""
    if not is_exported(signal, os.environ, endpoint, default=""):
        return None
    try:
        return make()
    except (UsageError, ValueError) as error:  # the SDK's names a variable, which may hold secrets
        why = error if isinstance(error, UsageError) else place_of(error)
        _log.error("%s by OTLP are off: %s", signal.lower(), why)
        return None
