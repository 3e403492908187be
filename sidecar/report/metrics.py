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
_REQUEST_BUCKETS = (
    0.001,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    120.0,
    300.0,
    600.0,
)
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5, 10.0)
_OVERHEAD_BUCKETS = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1)
_IMAGE_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_CLIENT_LABELS = ("tenant", "model", "outcome")

METRICS: Final = (
    Metric("sidecar_mu_in_flight", "gauge", "Model units of admitted requests that are not settled."),
    Metric(
        "sidecar_mu_max_in_flight", "gauge", "Model units in flight at which requests still meet the time objective."
    ),
    Metric("sidecar_mu_per_minute", "gauge", "Model units done in the last minute."),
    Metric("sidecar_mu_max_per_minute", "gauge", "Model units that this model and hardware can do in a minute."),
    Metric(
        "sidecar_mu_utilization_ratio", "gauge", "Largest of stock, flow, KV cache and queue, as a share of capacity."
    ),
    Metric("sidecar_mu_total", "counter", "Model units of settled requests.", _CLIENT_LABELS),
    Metric("sidecar_mu_coefficients_stale", "gauge", "1 if the coefficients no longer fit this model and hardware."),
    Metric("sidecar_prefill_tokens_in_flight", "gauge", "Input tokens of requests without a first token."),
    Metric("sidecar_decode_tokens_in_flight", "gauge", "Output tokens that are expected and not yet delivered."),
    Metric("sidecar_tokens_delivered_total", "counter", "Output tokens delivered to clients."),
    Metric("sidecar_requests_in_flight", "gauge", "Admitted requests that are not settled."),
    Metric("sidecar_requests_total", "counter", "Settled requests.", _CLIENT_LABELS),
    Metric(
        "sidecar_time_to_first_token_seconds",
        "histogram",
        "Time from admission to the first token.",
        (),
        _REQUEST_BUCKETS,
    ),
    Metric("sidecar_time_per_output_token_seconds", "histogram", "Time per token after the first.", (), _TOKEN_BUCKETS),
    Metric("sidecar_request_seconds", "histogram", "Time from admission to settlement.", (), _REQUEST_BUCKETS),
    Metric(
        "sidecar_relay_overhead_seconds",
        "histogram",
        "Time added by the relay itself, without image work.",
        (),
        _OVERHEAD_BUCKETS,
    ),
    Metric("sidecar_verdict", "gauge", "1 for the current verdict, 0 for all others.", ("verdict",)),
    Metric("sidecar_verdict_changes_total", "counter", "Changes of the verdict.", ("to", "reason")),
    Metric("sidecar_kills_total", "counter", "Times that liveness failed because of a stall."),
    Metric("sidecar_handover", "gauge", "1 if a restart does not help and an operator must act.", ("reason",)),
    Metric(
        "sidecar_progress_age_seconds", "gauge", "Time since the last progress; no series while nothing is outstanding."
    ),
    Metric("sidecar_silence_allowed_seconds", "gauge", "Silence allowed for the outstanding work."),
    Metric("sidecar_streams_ended_total", "counter", "Requests aborted because they alone were stuck.", ("reason",)),
    Metric("sidecar_canary_seconds", "histogram", "Duration of canaries.", (), _REQUEST_BUCKETS),
    Metric("sidecar_canaries_total", "counter", "Canaries by outcome.", ("outcome",)),
    Metric("sidecar_canary_mu_total", "counter", "Model units of passed canaries; they belong to no tenant."),
    Metric("sidecar_canary_tokens_total", "counter", "Tokens of passed canaries, prompts and outputs."),
    Metric(
        "sidecar_garbage_output", "gauge", "1 while the canary's answer differs from its usual answer. Informational."
    ),
    Metric("sidecar_images_total", "counter", "Images by outcome.", ("format", "outcome")),
    Metric(
        "sidecar_image_seconds",
        "histogram",
        "Time of one image by stage; `total` includes queueing.",
        ("stage",),
        _IMAGE_BUCKETS,
    ),
    Metric("sidecar_image_bytes_total", "counter", "Bytes of images, received and passed on.", ("direction",)),
    Metric(
        "sidecar_gpu_utilization_ratio",
        "gauge",
        "Share of time in which a kernel ran; 1 is no proof of progress.",
        ("gpu",),
    ),
    Metric("sidecar_gpu_memory_used_bytes", "gauge", "GPU memory in use.", ("gpu",)),
    Metric("sidecar_gpu_power_watts", "gauge", "Power draw of the GPU.", ("gpu",)),
    Metric(
        "sidecar_gpu_energy_joules_total", "counter", "Energy used by the GPU since its driver was loaded.", ("gpu",)
    ),
    Metric("sidecar_gpu_sm_clock_hertz", "gauge", "Clock of the GPU's multiprocessors.", ("gpu",)),
    Metric("sidecar_gpu_slowdown", "gauge", "1 while this reason reduces the GPU's clocks, else 0.", ("gpu", "reason")),
    Metric(
        "sidecar_gpu_xid_errors_total",
        "counter",
        "XID errors reported by the driver; xid 0 counts rare others.",
        ("gpu", "xid"),
    ),
    Metric(
        "sidecar_signal_up", "gauge", "1 if a signal was read, 0 if it failed; no series if it is absent.", ("signal",)
    ),
    Metric("sidecar_signal_seconds", "gauge", "Duration of the last reading of a signal.", ("signal",)),
    Metric("sidecar_loop_lag_seconds", "gauge", "Event loop lag of a process.", ("process",)),
    Metric(
        "sidecar_cost_dollars_total",
        "counter",
        "GPU dollars of settled requests; needs --dollars-per-gpu-hour.",
        ("tenant", "model"),
    ),
    Metric("sidecar_build_info", "gauge", "Always 1; the labels name version and engine.", ("version", "engine_kind")),
    # The name and unit of DCGM's exporter, for its consumers.
    Metric("DCGM_FI_DEV_GPU_UTIL", "gauge", "GPU utilization (in %).", ("gpu", "UUID")),
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
