"""The GenAI server metrics by OTLP, for those who have no Prometheus: with OTEL_METRICS_EXPORTER=otlp only.

Names, units, buckets and attributes are those of the conventions (semantic_conventions.py). Models have the bounded
labels of the other metrics. Exemplars are the spans of sampled requests, unless OTEL_METRICS_EXEMPLAR_FILTER says
otherwise.
"""

from __future__ import annotations

from typing import Final

from opentelemetry.context import Context
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

from sidecar.report import otlp
from sidecar.report.semantic_conventions import COMMON, FinishedRequest, attributes

# Attributes of a series. The model that an answer names is left out: engines repeat what clients write.
_UNBOUNDED: Final = "gen_ai.response.model"
_LABELS: Final = tuple(row for row in COMMON if row[0] != _UNBOUNDED)
# name -> upper bounds in seconds, from the conventions.
HISTOGRAMS: Final[dict[str, tuple[float, ...]]] = {
    "gen_ai.server.request.duration": (
        *(0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92),
    ),
    "gen_ai.server.time_to_first_token": (
        *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    ),
    "gen_ai.server.time_per_output_token": (
        *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
    ),
}


def _span_of(request: FinishedRequest) -> Context:
    """The request's own span as the current one, so that the SDK keeps it as an exemplar where it is sampled."""
    if (trace := request.admitted.trace) is None or not trace.sampled:
        return Context()
    ids = int(trace.trace_id, 16), int(trace.span_id, 16)
    return set_span_in_context(NonRecordingSpan(SpanContext(*ids, False, TraceFlags(TraceFlags.SAMPLED))), Context())


class ServerMetrics:
    """The histograms, exported once per OTEL_METRIC_EXPORT_INTERVAL on a thread of the SDK."""

    def __init__(self, endpoint: str, version: str) -> None:
        reader = PeriodicExportingMetricReader(otlp.make_exporter(otlp.METRICS, endpoint))
        self._provider = MeterProvider([reader], resource=otlp.make_resource(version), shutdown_on_exit=False)
        meter = self._provider.get_meter("sidecar", version)
        self._histograms = {
            name: meter.create_histogram(name, unit="s", explicit_bucket_boundaries_advisory=bounds)
            for name, bounds in HISTOGRAMS.items()
        }

    def settled(self, request: FinishedRequest, model: str) -> None:
        """Count a request. `model`: its label. Times to and per token are those of streams that ended well."""
        labels = attributes(_LABELS, request) | {"gen_ai.request.model": model}
        is_ok = request.settled.outcome == "ok"
        seconds = {
            "gen_ai.server.request.duration": request.settled.at - request.admitted.at,
            "gen_ai.server.time_to_first_token": request.first_token_s if is_ok else None,
            "gen_ai.server.time_per_output_token": request.output_token_s if is_ok else None,
        }
        context = _span_of(request)
        for name, value in seconds.items():
            if value is not None:
                self._histograms[name].record(max(0.0, value), labels, context)

    async def close(self, seconds: float = 3.0) -> bool:
        """Export what was counted. False if the collector did not accept it in time."""
        return await otlp.call_within(self._provider.shutdown, seconds)
