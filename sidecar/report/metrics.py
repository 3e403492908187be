"""The only file that names metrics: their table, how they are updated, and how they are exposed.

Rules:
- Gauges are a pure rendering of the last Snapshot, so a series disappears with its subject.
- An absent signal has no series, a failed one is `sidecar_signal_up 0`. Neither is a bare 0.
- Counters and histograms are updated by records as they arrive.
- Labels that clients choose are bounded in number and length, and so are their pairs.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from sidecar.events import STATES, AbortRequests, CanaryResult, ImagePrepared, Outcome, Verdict
from sidecar.health.kill_policy import ESCALATIONS
from sidecar.labels import OTHER, BoundedLabels
from sidecar.readings import SLOWDOWNS, Failed, GpuSample, Reading, Value
from sidecar.snapshot import Snapshot

Labels = tuple[str, ...]
MetricRow = tuple[str, Labels, float]  # metric, label values in the table's order, value


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric as it is exposed. `buckets` are upper bounds in seconds, without +Inf."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    help: str
    labels: Labels = ()
    buckets: tuple[float, ...] = ()


# Two to three bounds per decade: quantiles are off by less than half their value, with fewer than 20 series each.
_REQUEST_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5, 10.0)
_OVERHEAD_S = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1)
_IMAGE_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_CLIENT = ("tenant", "model", "outcome")


def _gauge(name: str, help: str, *labels: str) -> Metric:
    return Metric(name, "gauge", help, labels)


def _counter(name: str, help: str, *labels: str) -> Metric:
    return Metric(name, "counter", help, labels)


def _histogram(name: str, help: str, buckets: tuple[float, ...], *labels: str) -> Metric:
    return Metric(name, "histogram", help, labels, buckets)


METRICS: Final = (
    _gauge("sidecar_mu_in_flight", "Model units of admitted requests that are not settled."),
    _gauge("sidecar_mu_max_in_flight", "Model units in flight at which requests still meet the time objective."),
    _gauge("sidecar_mu_per_minute", "Model units done in the last minute."),
    _gauge("sidecar_mu_max_per_minute", "Model units that this model and hardware can do in a minute."),
    _gauge("sidecar_mu_utilization_ratio", "Largest of stock, flow, KV cache and queue, as a share of capacity."),
    _counter("sidecar_mu_total", "Model units of settled requests.", *_CLIENT),
    _gauge("sidecar_mu_coefficients_stale", "1 if the coefficients no longer fit this model and hardware."),
    _gauge("sidecar_prefill_tokens_in_flight", "Input tokens of requests without a first token."),
    _gauge("sidecar_decode_tokens_in_flight", "Output tokens that are expected and not yet delivered."),
    _counter("sidecar_tokens_delivered_total", "Output tokens delivered to clients."),
    _gauge("sidecar_requests_in_flight", "Admitted requests that are not settled."),
    _counter("sidecar_requests_total", "Settled requests.", *_CLIENT),
    _histogram("sidecar_time_to_first_token_seconds", "Time from admission to a stream's first token.", _REQUEST_S),
    _histogram("sidecar_time_per_output_token_seconds", "Time per token of a stream after the first.", _TOKEN_S),
    _histogram("sidecar_request_seconds", "Time from admission to settlement.", _REQUEST_S),
    _histogram("sidecar_relay_overhead_seconds", "Time added by the relay itself, without image work.", _OVERHEAD_S),
    _gauge("sidecar_verdict", "1 for the current verdict, 0 for all others.", "verdict"),
    _counter("sidecar_verdict_changes_total", "Changes of the verdict.", "to", "reason"),
    _counter("sidecar_kills_total", "Times that liveness failed because of a stall."),
    _gauge("sidecar_handover", "1 if a restart does not help and an operator must act.", "reason"),
    _gauge("sidecar_progress_age_seconds", "Time since the last progress; no series while nothing is outstanding."),
    _gauge("sidecar_silence_allowed_seconds", "Silence allowed for the outstanding work."),
    _counter("sidecar_streams_ended_total", "Requests aborted because they alone were stuck.", "reason"),
    _histogram("sidecar_canary_seconds", "Duration of canaries.", _REQUEST_S),
    _counter("sidecar_canaries_total", "Canaries by outcome.", "outcome"),
    _counter("sidecar_canary_mu_total", "Model units of passed canaries; they belong to no tenant."),
    _counter("sidecar_canary_tokens_total", "Tokens of passed canaries, prompts and outputs."),
    _gauge("sidecar_canary_usable", "1 if a canary has passed in this process of the engine, 0 if it takes none."),
    _gauge("sidecar_garbage_output", "1 while the canary's answer differs from its usual answer. Informational."),
    _counter("sidecar_images_total", "Images by outcome.", "format", "outcome"),
    _histogram("sidecar_image_seconds", "Time of one image by stage; `total` includes queueing.", _IMAGE_S, "stage"),
    _counter("sidecar_image_bytes_total", "Bytes of images, received and passed on.", "direction"),
    _gauge("sidecar_gpu_utilization_ratio", "Share of time in which a kernel ran; 1 is no proof of progress.", "gpu"),
    _gauge("sidecar_gpu_memory_used_bytes", "GPU memory in use.", "gpu"),
    _gauge("sidecar_gpu_power_watts", "Power draw of the GPU.", "gpu"),
    _counter("sidecar_gpu_energy_joules_total", "Energy used by the GPU since its driver was loaded.", "gpu"),
    _gauge("sidecar_gpu_sm_clock_hertz", "Clock of the GPU's multiprocessors.", "gpu"),
    _gauge("sidecar_gpu_slowdown", "1 while this reason reduces the GPU's clocks, else 0.", "gpu", "reason"),
    _counter("sidecar_gpu_xid_errors_total", "XID errors from the driver; xid 0 counts rare others.", "gpu", "xid"),
    _gauge("sidecar_signal_up", "1 if a signal was read, 0 if it failed; no series if it is absent.", "signal"),
    _gauge("sidecar_signal_seconds", "Duration of the last reading of a signal.", "signal"),
    _gauge("sidecar_loop_lag_seconds", "Event loop lag of a process.", "process"),
    _counter(
        "sidecar_cost_dollars_total", "Dollars of settled requests; needs --dollars-per-gpu-hour.", "tenant", "model"
    ),
    _gauge("sidecar_build_info", "Always 1; the labels name version and engine.", "version", "engine_kind"),
    # The name and unit of DCGM's exporter, for its consumers.
    _gauge("DCGM_FI_DEV_GPU_UTIL", "GPU utilization (in %).", "gpu", "UUID"),
)

_TABLE: Final = {m.name: m for m in METRICS}
# (tenant, model) pairs per tenant: at most 600 series per metric, which take 12 ms to render.
MAX_PAIRS_PER_TENANT: Final = 2
# Far above the number of reason codes; only a bound.
MAX_REASONS: Final = 200


@dataclass(slots=True)
class _Histogram:
    """Counts by bucket (the last one is +Inf) and the sum of the observed values."""

    counts: list[int]
    sum: float = 0.0

    def observe(self, value: float, bounds: tuple[float, ...]) -> None:
        self.counts[bisect_left(bounds, value)] += 1
        self.sum += value

    def cumulative(self, bounds: tuple[float, ...]) -> list[tuple[str, float]]:
        running, rows = 0, []
        for bound, count in zip([*map(str, bounds), "+Inf"], self.counts, strict=True):
            running += count
            rows.append((bound, float(running)))
        return rows


@dataclass(slots=True)
class _Series:
    """Counters and histograms so far, by metric and label values."""

    counters: dict[str, dict[Labels, float]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(float)))
    histograms: dict[str, dict[Labels, _Histogram]] = field(default_factory=lambda: defaultdict(dict))

    def count(self, name: str, labels: Labels = (), by: float = 1.0) -> None:
        self.counters[name][labels] += by

    def observe(self, name: str, value: float | None, labels: Labels = ()) -> None:
        if value is None:
            return
        bounds = _TABLE[name].buckets
        series = self.histograms[name]
        series.setdefault(labels, _Histogram([0] * (len(bounds) + 1))).observe(max(0.0, value), bounds)


class Metrics(Collector):
    """All metrics of the sidecar. `registry` is for the encoders of `prometheus_client`."""

    def __init__(self, *, max_tenants: int) -> None:
        self._tenants = BoundedLabels(max_tenants)
        self._models = BoundedLabels(max_tenants)
        self._pairs: set[tuple[str, str]] = set()
        self._max_pairs = MAX_PAIRS_PER_TENANT * max_tenants
        self._formats, self._stages, self._reasons = BoundedLabels(20), BoundedLabels(20), BoundedLabels(MAX_REASONS)
        self._series = _Series()
        self._snapshot: Snapshot | None = None
        for metric in METRICS:  # a histogram without labels exists from the start, at 0
            if metric.buckets and not metric.labels:
                self._series.histograms[metric.name][()] = _Histogram([0] * (len(metric.buckets) + 1))
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)

    def update(self, snapshot: Snapshot) -> None:
        """Set the snapshot that gauges show."""
        self._snapshot = snapshot

    def observe(self, record: ImagePrepared | CanaryResult | Verdict | AbortRequests) -> None:
        """Count an image, a canary result, a changed verdict, or a command to abort requests."""
        match record:
            case ImagePrepared():
                self._observe_image(record)
            case CanaryResult():
                self._series.count("sidecar_canaries_total", (record.outcome,))
                self._series.observe("sidecar_canary_seconds", record.ended - record.started)
            case Verdict():
                self._series.count("sidecar_verdict_changes_total", (record.state, self._reasons(record.reason)))
            case AbortRequests():
                self._series.count("sidecar_streams_ended_total", (record.code,), len(record.ids))

    def settled(
        self,
        tenant: str,
        model: str,
        outcome: Outcome,
        *,
        mu: float,
        seconds: float,
        ttft: float | None = None,
        tpot: float | None = None,
        overhead: float | None = None,
        dollars: float = 0.0,
    ) -> None:
        """Count one settled request. Times are in seconds; None if there was none (no token, nothing relayed)."""
        client = self._client(tenant, model)
        self._series.count("sidecar_requests_total", (*client, outcome))
        self._series.count("sidecar_mu_total", (*client, outcome), mu)
        if dollars > 0:
            self._series.count("sidecar_cost_dollars_total", client, dollars)
        self._series.observe("sidecar_request_seconds", seconds)
        self._series.observe("sidecar_time_to_first_token_seconds", ttft)
        self._series.observe("sidecar_time_per_output_token_seconds", tpot)
        self._series.observe("sidecar_relay_overhead_seconds", overhead)

    def collect(self) -> Iterator[Family]:
        """All metrics of the table, in its order, with their current series."""
        rows: dict[str, list[tuple[Labels, float]]] = defaultdict(list)
        for name, labels, value in gauges(self._snapshot) if self._snapshot else ():
            rows[name].append((labels, value))
        for name, series in self._series.counters.items():
            rows[name].extend(series.items())
        for metric in METRICS:
            yield _family(metric, rows[metric.name], self._series.histograms.get(metric.name, {}))

    def _observe_image(self, image: ImagePrepared) -> None:
        self._series.count("sidecar_images_total", (self._formats(image.format), image.outcome))
        self._series.count("sidecar_image_bytes_total", ("in",), image.bytes_in)
        self._series.count("sidecar_image_bytes_total", ("out",), image.bytes_out)
        for stage, seconds in (*image.stages, ("total", image.seconds)):
            self._series.observe("sidecar_image_seconds", seconds, (self._stages(stage),))

    def _client(self, tenant: str, model: str) -> tuple[str, str]:
        pair = self._tenants(tenant), self._models(model)
        if pair in self._pairs:
            return pair
        if len(self._pairs) >= self._max_pairs:
            return OTHER, OTHER
        self._pairs.add(pair)
        return pair


def gauges(snapshot: Snapshot) -> Iterator[MetricRow]:
    """All series that show a Snapshot."""
    load = snapshot.load
    yield "sidecar_mu_in_flight", (), load.mu_in_flight
    yield "sidecar_mu_max_in_flight", (), load.mu_max_in_flight
    yield "sidecar_mu_per_minute", (), load.mu_per_minute
    yield "sidecar_mu_max_per_minute", (), load.mu_max_per_minute
    yield "sidecar_mu_utilization_ratio", (), load.utilization
    yield "sidecar_mu_coefficients_stale", (), load.coefficients_stale
    yield "sidecar_prefill_tokens_in_flight", (), load.prefill_tokens_in_flight
    yield "sidecar_decode_tokens_in_flight", (), load.decode_tokens_in_flight
    yield "sidecar_tokens_delivered_total", (), load.tokens_delivered_total
    yield "sidecar_requests_in_flight", (), load.requests_in_flight
    for state in STATES:
        yield "sidecar_verdict", (state,), snapshot.verdict.state == state
    yield "sidecar_kills_total", (), snapshot.kills
    for reason in ESCALATIONS:
        yield "sidecar_handover", (reason,), snapshot.handover == reason
    if snapshot.progress_age is not None:
        yield "sidecar_progress_age_seconds", (), snapshot.progress_age
    yield "sidecar_silence_allowed_seconds", (), snapshot.silence_allowed
    yield "sidecar_canary_mu_total", (), snapshot.canaries.mu
    yield "sidecar_canary_tokens_total", (), snapshot.canaries.tokens
    if snapshot.canaries.usable is not None:
        yield "sidecar_canary_usable", (), snapshot.canaries.usable
    yield "sidecar_garbage_output", (), snapshot.canaries.garbage
    yield "sidecar_loop_lag_seconds", ("control",), snapshot.own_lag
    for relay in snapshot.relays:
        yield "sidecar_loop_lag_seconds", (f"relay-{relay.index}",), relay.lag
    yield "sidecar_build_info", (snapshot.version, snapshot.engine_kind), 1
    yield from _signal("scrape", snapshot.engine)
    yield from _signal("process", snapshot.own)
    yield from _signal("gpu", _gpus_signal(snapshot.gpus))
    for gpu in snapshot.gpus.value if isinstance(snapshot.gpus, Value) else ():
        yield from _gpu(gpu)


def _signal(name: str, reading: Reading[Any]) -> Iterator[MetricRow]:
    if isinstance(reading, Value):
        yield "sidecar_signal_up", (name,), 1
        yield "sidecar_signal_seconds", (name,), reading.seconds
    elif isinstance(reading, Failed):
        yield "sidecar_signal_up", (name,), 0


def _gpus_signal(reading: Reading[tuple[GpuSample, ...]]) -> Reading[tuple[GpuSample, ...]]:
    """The reading of the GPUs, as failed if none of them answers."""
    if isinstance(reading, Value) and all(isinstance(gpu.memory_used, Failed) for gpu in reading.value):
        return Failed("no GPU answers")
    return reading


def _gpu(gpu: GpuSample) -> Iterator[MetricRow]:
    index = gpu.label
    fields: Iterable[tuple[str, Labels, Reading[float] | Reading[int], float]] = (
        ("sidecar_gpu_utilization_ratio", (index,), gpu.utilization, 1),
        ("sidecar_gpu_memory_used_bytes", (index,), gpu.memory_used, 1),
        ("sidecar_gpu_power_watts", (index,), gpu.power, 1),
        ("sidecar_gpu_energy_joules_total", (index,), gpu.energy, 1),
        ("sidecar_gpu_sm_clock_hertz", (index,), gpu.sm_clock, 1),
        ("DCGM_FI_DEV_GPU_UTIL", (index, gpu.uuid), gpu.utilization, 100),
    )
    for name, labels, reading, scale in fields:
        if isinstance(reading, Value):
            yield name, labels, reading.value * scale
    if isinstance(gpu.slowdowns, Value):
        for reason in SLOWDOWNS:
            yield "sidecar_gpu_slowdown", (index, reason), reason in gpu.slowdowns.value
    for xid, count in gpu.xid_errors:
        yield "sidecar_gpu_xid_errors_total", (index, str(xid)), count


def _family(metric: Metric, rows: list[tuple[Labels, float]], histograms: dict[Labels, _Histogram]) -> Family:
    if metric.kind == "histogram":
        family = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
        for labels, histogram in histograms.items():
            family.add_metric(labels, histogram.cumulative(metric.buckets), histogram.sum)
        return family
    cls = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    plain = cls(metric.name, metric.help, labels=metric.labels)
    for labels, value in rows:
        plain.add_metric(labels, float(value))
    return plain
