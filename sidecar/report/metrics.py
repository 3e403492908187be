"""The only file that names metrics: their table, how they are updated, and how they are exposed.

Rules:
- Gauges are a pure rendering of the last Snapshot, so a series disappears with its subject.
- An absent signal has no series, a failed one is `sidecar_signal_up 0`. Neither is a bare 0.
- Counters and histograms are updated by records as they arrive.
- A counter that alerts read has each of its series from the first page on, at 0, where its labels are known before:
  `increase()` of a series that appears with a value is 0.
- Labels that clients choose come bounded (sidecar/load/client_labels.py). The series of one that ends are added to
  those of `other`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final, Literal

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from sidecar.events import (
    CANARY_OUTCOMES,
    OUTCOMES,
    STATES,
    AbortRequests,
    CanaryResult,
    ImagePrepared,
    UnreadRequest,
    Verdict,
)
from sidecar.health.kill_policy import ESCALATIONS, KILL_REASONS, NEEDS_REBOOT, NEEDS_RESET
from sidecar.health.reasons import ABORT_REASONS, REASON_TEXTS
from sidecar.labels import BoundedLabels
from sidecar.load.api_routes import PATH_CLASSES
from sidecar.load.client_labels import fold
from sidecar.readings import (
    RECOVERY_ACTIONS,
    SLOWDOWNS,
    Failed,
    GpuActivity,
    GpuFaults,
    GpuSample,
    ProcessSample,
    Reading,
    Value,
)
from sidecar.report.usage_rows import EVICTION_REASONS, Eviction, UsageKey, UsageSums, tokens_by_kind
from sidecar.snapshot import RelayUse, Snapshot

Labels = tuple[str, ...]
MetricRow = tuple[str, Labels, float]  # metric, label values in the table's order, value


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric as it is exposed; a counter's name ends in `_total`. `buckets`: upper bounds in seconds, no +Inf."""

    name: str
    help: str
    labels: Labels = ()
    buckets: tuple[float, ...] = ()

    @property
    def kind(self) -> Literal["gauge", "counter", "histogram"]:
        return "histogram" if self.buckets else "counter" if self.name.endswith("_total") else "gauge"


# Two to three bounds per decade: quantiles are off by less than half their value, with fewer than 20 series each.
_REQUEST_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5, 10.0)
_OVERHEAD_S = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1)
_IMAGE_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_CLIENT, _GPU = ("tenant", "model", "outcome"), ("gpu",)
_KIND = (*_CLIENT[:2], "kind", "source")
DATABASE_RESULTS: Final = ("ok", "failed")

METRICS: Final = (
    Metric("sidecar_mu_in_flight", "Model units of admitted requests that are not settled."),
    Metric("sidecar_mu_max_in_flight", "Model units in flight at which requests still meet the time objective."),
    Metric("sidecar_mu_per_minute", "Model units done in the last minute."),
    Metric("sidecar_mu_max_per_minute", "Model units that this model and hardware can do in a minute."),
    Metric("sidecar_mu_utilization_ratio", "Largest of stock, flow, KV cache, queue and TTFT, as a share of capacity."),
    Metric("sidecar_mu_utilization_part_ratio", "Each part of the utilization; the largest one limits.", ("part",)),
    Metric("sidecar_mu_total", "Model units of settled requests.", _CLIENT),
    Metric("sidecar_gpu_seconds_total", "Seconds of all GPUs that settled requests used, by the cost model.", _CLIENT),
    Metric(
        "sidecar_tokens_total",
        "Tokens of settled requests, each of one kind.",
        _KIND,
    ),
    Metric(
        "sidecar_unmetered_requests_total", "Requests forwarded unread, whose work is not metered.", ("path_class",)
    ),
    Metric("sidecar_mu_coefficients_stale", "1 if the coefficients no longer fit this model and hardware."),
    Metric(
        "sidecar_mu_slowness_ratio",
        "Actual time of work over the time predicted by the coefficients; capacity follows it.",
    ),
    Metric("sidecar_predicted_ttft_seconds", "Predicted time to first token of the next request, of one MU."),
    Metric("sidecar_predicted_tpot_seconds", "Predicted time per output token of the next request."),
    Metric(
        "sidecar_predicted_ttft_error_ratio",
        "Error of the predicted time to first token as a share of the actual one, over the last 200 streams.",
        ("percentile",),
    ),
    Metric("sidecar_prefill_tokens_in_flight", "Input tokens of requests without a first token."),
    Metric("sidecar_decode_tokens_in_flight", "Output tokens that are expected and not yet delivered."),
    Metric("sidecar_tokens_delivered_total", "Output tokens delivered to clients."),
    Metric("sidecar_requests_in_flight", "Admitted requests that are not settled."),
    Metric("sidecar_requests_total", "Settled requests.", _CLIENT),
    Metric(
        "sidecar_request_outcomes_total",
        "Settled requests of all clients; each outcome from 0 on, for alerts: no series comes or goes with a client.",
        ("outcome",),
    ),
    Metric("sidecar_time_to_first_token_seconds", "Time from admission to a stream's first token.", (), _REQUEST_S),
    Metric("sidecar_late_first_tokens_total", "Streams whose first token came later than --slo-ttft-seconds."),
    Metric("sidecar_time_per_output_token_seconds", "Time per token of a stream after the first.", (), _TOKEN_S),
    Metric("sidecar_request_seconds", "Time from admission to settlement.", (), _REQUEST_S),
    Metric("sidecar_relay_overhead_seconds", "Time added by the relay itself, without image work.", (), _OVERHEAD_S),
    Metric("sidecar_verdict", "1 for the current verdict, 0 for all others.", ("verdict",)),
    Metric("sidecar_doubt", "1 for the reason for which the engine is suspect or stalled now, else 0.", ("reason",)),
    Metric("sidecar_verdict_changes_total", "Changes of the verdict.", ("to", "reason")),
    Metric("sidecar_kills_total", "Times that liveness failed, by the reason of the stall.", ("reason",)),
    Metric("sidecar_handover", "1 if a restart does not help and an operator must act.", ("reason",)),
    Metric("sidecar_progress_age_seconds", "Time since the last progress; no series while nothing is outstanding."),
    Metric("sidecar_silence_allowed_seconds", "Silence allowed for the outstanding work."),
    Metric("sidecar_streams_ended_total", "Requests aborted because they alone were stuck.", ("reason",)),
    Metric("sidecar_canary_seconds", "Duration of canaries.", (), _REQUEST_S),
    Metric("sidecar_canaries_total", "Canaries by outcome.", ("outcome",)),
    Metric("sidecar_canary_mu_total", "Model units of passed canaries; they belong to no tenant."),
    Metric("sidecar_canary_tokens_total", "Tokens of passed canaries, prompts and outputs."),
    Metric("sidecar_canary_usable", "1 if a canary has passed in this process of the engine, 0 if it takes none."),
    Metric("sidecar_garbage_output", "1 while the canary's answer differs from its usual answer. Informational."),
    Metric("sidecar_images_total", "Images by outcome; `reason`: why one passed.", ("format", "outcome", "reason")),
    Metric("sidecar_image_seconds", "Time of one image by stage; `total` includes queueing.", ("stage",), _IMAGE_S),
    Metric("sidecar_image_bytes_total", "Bytes of images, received and passed on.", ("direction",)),
    Metric("sidecar_gpu_utilization_ratio", "Share of time in which a kernel ran; 1 is no proof of progress.", _GPU),
    Metric("sidecar_gpu_memory_used_bytes", "GPU memory in use.", _GPU),
    Metric("sidecar_gpu_power_watts", "Power draw of the GPU.", _GPU),
    Metric("sidecar_gpu_energy_joules_total", "Energy used by the GPU since its driver was loaded.", _GPU),
    Metric("sidecar_gpu_sm_clock_hertz", "Clock of the GPU's multiprocessors.", _GPU),
    Metric("sidecar_gpu_slowdown", "1 while this reason reduces the GPU's clocks, else 0.", ("gpu", "reason")),
    Metric("sidecar_gpu_xid_errors_total", "XID errors from the driver; xid 0 counts rare others.", ("gpu", "xid")),
    Metric(
        "sidecar_gpu_tensor_ratio", "Share of time in which tensor cores worked; read in doubt, from Hopper on.", _GPU
    ),
    Metric("sidecar_gpu_dram_ratio", "Share of the memory bandwidth in use; read in doubt, from Hopper on.", _GPU),
    Metric("sidecar_gpu_nvlink_bytes", "Bytes a second over NVLink; read in doubt, from Hopper on.", _GPU),
    Metric("sidecar_gpu_ecc_uncorrected_total", "Uncorrectable ECC errors since the driver was loaded.", _GPU),
    Metric(
        "sidecar_gpu_row_remap",
        "1 while rows of memory wait for a reset to be remapped, or could not be.",
        ("gpu", "state"),
    ),
    Metric("sidecar_gpu_recovery_action", "1 for what the driver says that the GPU needs, else 0.", ("gpu", "action")),
    Metric("sidecar_gpu_events_total", "GPU Operational Events of the driver, by severity.", ("gpu", "severity")),
    Metric("sidecar_signal_up", "1 if a signal was read, 0 if it failed; no series if it is absent.", ("signal",)),
    Metric("sidecar_signal_seconds", "Duration of the last reading of a signal.", ("signal",)),
    Metric("sidecar_loop_lag_seconds", "Event loop lag of a process.", ("process",)),
    Metric("sidecar_open_files", "File descriptors that a process has open.", ("process",)),
    Metric("sidecar_max_open_files", "File descriptors that a process may have open (ulimit -n).", ("process",)),
    Metric("sidecar_cost_dollars_total", "Dollars of settled requests; needs --dollars-per-gpu-hour.", _CLIENT[:2]),
    Metric("sidecar_engine_gpus", "Number of the engine's GPUs, as billed."),
    Metric("sidecar_usage_evicted_rows_total", "Dropped rows of usage records.", ("why", "billable")),
    Metric("sidecar_usage_evicted_mu_total", "Model units in dropped rows of usage records.", ("why",)),
    Metric(
        "sidecar_requests_unlogged_total", "Requests without a line in the log of requests: it could not be written."
    ),
    Metric("sidecar_usage_database_writes_total", "Writes of usage records to --usage-url.", ("result",)),
    Metric("sidecar_build_info", "Always 1; the labels name version and engine.", ("version", "engine_kind")),
    Metric(
        "sidecar_spans_dropped_total", "Spans that the collector did not take, or that came while its queue was full."
    ),
    Metric(
        "sidecar_log_records_dropped_total",
        "Log records that the collector did not take, or that came while its queue was full.",
    ),
    # The name and unit of DCGM's exporter, for its consumers.
    Metric("DCGM_FI_DEV_GPU_UTIL", "GPU utilization (in %).", ("gpu", "UUID")),
)

_TABLE: Final = {m.name: m for m in METRICS}
MAX_REASONS: Final = 200  # far above the number of reason codes
# What NVIDIA's catalogue has of errors of data centre GPUs and of work on them, and those that the kill policy knows.
# Any other one has a series from its first error on.
XIDS_FROM_ZERO: Final = tuple(
    sorted({0, 13, 31, 43, 45, 48, 61, 63, 64, 74, 92, 94, 143, 149, *NEEDS_RESET, *NEEDS_REBOOT})
)
# Counters whose label values are known before anything is counted.
_FROM_ZERO: Final[tuple[tuple[str, tuple[Labels, ...]], ...]] = (
    ("sidecar_request_outcomes_total", tuple((outcome,) for outcome in OUTCOMES)),
    ("sidecar_late_first_tokens_total", ((),)),
    ("sidecar_requests_unlogged_total", ((),)),
    ("sidecar_usage_database_writes_total", tuple((result,) for result in DATABASE_RESULTS)),
    ("sidecar_spans_dropped_total", ((),)),
    ("sidecar_log_records_dropped_total", ((),)),
    ("sidecar_canaries_total", tuple((outcome,) for outcome in CANARY_OUTCOMES)),
    ("sidecar_streams_ended_total", tuple((reason,) for reason in ABORT_REASONS)),
    ("sidecar_image_bytes_total", (("in",), ("out",))),
    ("sidecar_usage_evicted_mu_total", tuple((why,) for why in EVICTION_REASONS)),
    (
        "sidecar_usage_evicted_rows_total",
        tuple((why, billable) for why in EVICTION_REASONS for billable in ("yes", "no")),
    ),
    ("sidecar_unmetered_requests_total", tuple((name,) for name in PATH_CLASSES)),
    (
        "sidecar_verdict_changes_total",
        (*((state, reason) for state in ("suspect", "stalled") for reason in REASON_TEXTS), ("dead", "engine_gone")),
    ),
)


class _Histogram:
    """Counts by bucket (the last one is +Inf) and the sum of the observed values."""

    def __init__(self, metric: Metric) -> None:
        self.counts, self.sum = [0] * (len(metric.buckets) + 1), 0.0


class Metrics(Collector):
    """All metrics of the sidecar. `registry` is for the encoders of `prometheus_client`."""

    def __init__(self) -> None:
        self._formats, self._stages, self._reasons = BoundedLabels(20), BoundedLabels(20), BoundedLabels(MAX_REASONS)
        self._counters: dict[str, dict[Labels, float]] = defaultdict(lambda: defaultdict(float))
        # A histogram without labels exists from the start, at 0.
        self._histograms: dict[str, dict[Labels, _Histogram]] = {
            m.name: {} if m.labels else {(): _Histogram(m)} for m in METRICS if m.buckets
        }
        for name, series in _FROM_ZERO:
            for labels in series:
                self._count(name, labels, 0.0)
        self._snapshot: Snapshot | None = None
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)

    def update(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def observe(self, record: ImagePrepared | CanaryResult | Verdict | AbortRequests | UnreadRequest) -> None:
        """Count an image, an unread call, a canary result, a changed verdict, or a command to abort requests."""
        match record:
            case ImagePrepared():
                labels = self._formats(record.format), record.outcome, record.reason and self._reasons(record.reason)
                self._count("sidecar_images_total", labels)
                self._count("sidecar_image_bytes_total", ("in",), record.bytes_in)
                self._count("sidecar_image_bytes_total", ("out",), record.bytes_out)
                for stage, seconds in (*record.stages, ("total", record.seconds)):
                    self._observe("sidecar_image_seconds", seconds, (self._stages(stage),))
            case CanaryResult():
                self._count("sidecar_canaries_total", (record.outcome,))
                self._observe("sidecar_canary_seconds", record.ended - record.started)
            case Verdict():
                self._count("sidecar_verdict_changes_total", (record.state, self._reasons(record.reason)))
            case UnreadRequest():
                if record.path_class in PATH_CLASSES:
                    self._count("sidecar_unmetered_requests_total", (record.path_class,))
            case AbortRequests():
                self._count("sidecar_streams_ended_total", (record.code,), len(record.ids))

    def settled(self, key: UsageKey, sums: UsageSums, **seconds: float | None) -> None:
        """Count what one settled request adds to its row of usage records.

        `seconds`: by histogram; None if there was none (no token, nothing relayed).
        """
        client, ended = (key.tenant, key.model), (key.tenant, key.model, key.outcome)
        self._count("sidecar_requests_total", ended)
        self._count("sidecar_request_outcomes_total", (key.outcome,))
        if self._is_late(seconds.get("time_to_first_token")):
            self._count("sidecar_late_first_tokens_total", ())
        self._count("sidecar_mu_total", ended, sums.mu)
        self._count("sidecar_gpu_seconds_total", ended, sums.gpu_seconds)
        for kind, tokens in tokens_by_kind(sums).items():
            if tokens > 0:
                self._count("sidecar_tokens_total", (*client, kind, key.source), tokens)
        if sums.dollars > 0:
            self._count("sidecar_cost_dollars_total", client, sums.dollars)
        for name, value in seconds.items():
            if value is not None:
                self._observe(f"sidecar_{name}_seconds", value)

    def evicted(self, eviction: Eviction) -> None:
        """Count rows of usage records that were dropped."""
        labels = eviction.why, "yes" if eviction.is_billable else "no"
        self._count("sidecar_usage_evicted_rows_total", labels, eviction.rows)
        self._count("sidecar_usage_evicted_mu_total", labels[:1], eviction.mu)

    def requests_unlogged(self, lines: int) -> None:
        """Count lines that were dropped from the log of requests."""
        self._count("sidecar_requests_unlogged_total", (), lines)

    def database_written(self, result: Literal["ok", "failed"]) -> None:
        """Count a write of usage records to the database."""
        self._count("sidecar_usage_database_writes_total", (result,))

    def exports_dropped(self, spans: int, log_records: int) -> None:
        """Show how many spans and log records were dropped so far."""
        self._counters["sidecar_spans_dropped_total"][()] = float(spans)
        self._counters["sidecar_log_records_dropped_total"][()] = float(log_records)

    def relabel(self, of: Callable[[str, str], tuple[str, str]]) -> None:
        """Add the series of clients that lost their label to those of `of`."""
        for metric in METRICS:
            if metric.labels[:2] == _CLIENT[:2] and (series := self._counters.get(metric.name)):
                folded = fold(series, lambda labels: (*of(labels[0], labels[1]), *labels[2:]), float.__add__)
                self._counters[metric.name] = defaultdict(float, folded)

    def collect(self) -> Iterator[Family]:
        """All metrics of the table, in its order, with their current series."""
        rows: dict[str, list[tuple[Labels, float]]] = defaultdict(list)
        for name, labels, value in gauges(self._snapshot) if self._snapshot else ():
            rows[name].append((labels, value))
        for name, series in self._counters.items():
            rows[name].extend(series.items())
        for metric in METRICS:
            yield _family(metric, rows[metric.name], self._histograms.get(metric.name, {}))

    def _is_late(self, first_token_s: float | None) -> bool:
        """Whether a first token came later than the objective in force."""
        objective = dict(self._snapshot.load.objectives).get("ttft_seconds") if self._snapshot else None
        return first_token_s is not None and objective is not None and first_token_s > objective

    def _count(self, name: str, labels: Labels, by: float = 1.0) -> None:
        self._counters[name][labels] += by

    def _observe(self, name: str, value: float, labels: Labels = ()) -> None:
        histogram = self._histograms[name].setdefault(labels, _Histogram(_TABLE[name]))
        histogram.counts[bisect_left(_TABLE[name].buckets, value)] += 1
        histogram.sum += max(0.0, value)


# Those of a Load that are metrics under their own names.
_LOAD_FIELDS: Final = (
    *("mu_in_flight", "mu_max_in_flight", "mu_per_minute", "mu_max_per_minute", "requests_in_flight"),
    *("prefill_tokens_in_flight", "decode_tokens_in_flight", "tokens_delivered_total"),
)


def gauges(snapshot: Snapshot) -> Iterator[MetricRow]:
    """All series that show a Snapshot."""
    for name in _LOAD_FIELDS:
        yield f"sidecar_{name}", (), getattr(snapshot.load, name)
    yield "sidecar_mu_utilization_ratio", (), snapshot.load.utilization
    for part, share in snapshot.load.parts:
        if share is not None:
            yield "sidecar_mu_utilization_part_ratio", (part,), share
    yield "sidecar_mu_coefficients_stale", (), snapshot.load.coefficients_stale
    yield "sidecar_mu_slowness_ratio", (), snapshot.prices.slowness
    if (forecast := snapshot.load.forecast) is not None:
        yield "sidecar_predicted_ttft_seconds", (), forecast.reference_seconds
        yield "sidecar_predicted_tpot_seconds", (), forecast.tpot_seconds
        for percentile, error in (("50", forecast.error_median), ("90", forecast.error_p90)):
            if error is not None:
                yield "sidecar_predicted_ttft_error_ratio", (percentile,), error
    for state in STATES:
        yield "sidecar_verdict", (state,), snapshot.verdict.state == state
    is_doubted = snapshot.verdict.state in ("suspect", "stalled")
    for reason in REASON_TEXTS:
        yield "sidecar_doubt", (reason,), is_doubted and snapshot.verdict.cause == reason
    kills = dict(snapshot.kills_by_reason)
    for reason in KILL_REASONS:  # each from 0 on: a rate misses the rise of a series that begins at 1
        yield "sidecar_kills_total", (reason,), kills.get(reason, 0)
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
    yield "sidecar_engine_gpus", (), snapshot.engine_gpus
    yield "sidecar_loop_lag_seconds", ("control",), snapshot.own_lag
    if isinstance(snapshot.own, Value):
        yield from _files("control", snapshot.own.value)
    for relay in snapshot.relays:
        yield "sidecar_loop_lag_seconds", (f"relay-{relay.index}",), relay.lag
        yield from _files(f"relay-{relay.index}", relay)
    yield "sidecar_build_info", (snapshot.version, snapshot.engine_kind), 1
    yield from _signal("scrape", snapshot.engine)
    yield from _signal("process", snapshot.own)
    yield from _signal("gpu", _gpus_signal(snapshot.gpus))
    for gpu in snapshot.gpus.value if isinstance(snapshot.gpus, Value) else ():
        yield from _gpu(gpu)


def _files(process: str, of: ProcessSample | RelayUse) -> Iterator[MetricRow]:
    if of.max_files:  # a relay that has just begun has not said it yet
        yield "sidecar_open_files", (process,), of.open_files
        yield "sidecar_max_open_files", (process,), of.max_files


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
    yield from _gpu_state(gpu)
    counts = {**dict.fromkeys(XIDS_FROM_ZERO if gpu.xids_watched else (), 0), **dict(gpu.xid_errors)}
    for xid, count in counts.items():
        yield "sidecar_gpu_xid_errors_total", (index, str(xid)), count


def _gpu_state(gpu: GpuSample) -> Iterator[MetricRow]:
    """What it does, while the engine is in doubt, and what the driver says of its faults."""
    index = gpu.label
    activity = gpu.activity.value if isinstance(gpu.activity, Value) else GpuActivity()
    faults = gpu.faults.value if isinstance(gpu.faults, Value) else GpuFaults()
    rows: Iterable[tuple[str, Labels, float | None]] = (
        ("sidecar_gpu_tensor_ratio", (index,), activity.tensor),
        ("sidecar_gpu_dram_ratio", (index,), activity.dram),
        ("sidecar_gpu_nvlink_bytes", (index,), activity.nvlink),
        ("sidecar_gpu_ecc_uncorrected_total", (index,), faults.ecc_uncorrected),
        ("sidecar_gpu_row_remap", (index, "pending"), faults.remap_pending),
        ("sidecar_gpu_row_remap", (index, "failed"), faults.remap_failed),
    )
    for name, labels, value in rows:
        if value is not None:
            yield name, labels, value
    if faults.recovery is not None:
        for action in RECOVERY_ACTIONS:
            yield "sidecar_gpu_recovery_action", (index, action), action == faults.recovery
    for severity, count in gpu.events:
        yield "sidecar_gpu_events_total", (index, severity), count


def _family(metric: Metric, rows: list[tuple[Labels, float]], histograms: dict[Labels, _Histogram]) -> Family:
    if metric.kind == "histogram":
        family = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
        for labels, histogram in histograms.items():
            counts = zip([*map(str, metric.buckets), "+Inf"], map(float, accumulate(histogram.counts)), strict=True)
            family.add_metric(labels, list(counts), histogram.sum)
        return family
    cls = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    plain = cls(metric.name, metric.help, labels=metric.labels)
    for labels, value in rows:
        plain.add_metric(labels, float(value))
    return plain
