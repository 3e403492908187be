"""The state of the control process at one moment, as frozen data. Every report is a pure rendering of a Snapshot.

Times are monotonic seconds (`at`) unless named `wall`.
"""

from __future__ import annotations

from dataclasses import dataclass

from sidecar.events import CanaryResult, DiagnosisSummary, Verdict
from sidecar.readings import EngineSample, GpuSample, ProcessSample, Reading


@dataclass(frozen=True, slots=True)
class LatencyForecast:
    """Predicted latencies of the next request, in seconds: a request's time to first token is

        base + seconds_per_prefill_second * (its prefill by the cost model) + seconds_per_token * (its new tokens)

    `reference`: of a request of one MU; `typical`: of a typical recent one; `idle`: the same on an idle engine;
    `wait`: before its own prefill begins. The errors are shares of the actual times, over the last predictions.
    """

    base_seconds: float
    seconds_per_prefill_second: float
    seconds_per_token: float
    reference_seconds: float
    tpot_seconds: float
    wait_seconds: float
    typical_seconds: float
    idle_seconds: float
    first_tokens: int = 0  # that it was learned from
    error_median: float | None = None
    error_p90: float | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """How loaded the engine is. `limited_by` is the part that sets `utilization`: stock, flow, kv, queue or ttft."""

    mu_in_flight: float
    mu_max_in_flight: float
    mu_per_minute: float
    mu_max_per_minute: float
    utilization: float
    limited_by: str
    prefill_tokens_in_flight: int
    decode_tokens_in_flight: int
    tokens_delivered_total: int
    tokens_per_second: float
    requests_in_flight: int
    requests_waiting: int
    requests_per_second: float
    coefficients_fingerprint: str
    coefficients_source: str
    coefficients_stale: bool
    errors_per_second: float = 0.0  # requests with the outcome engine_error, stalled or lost
    recent_mu_per_second: float = 0.0  # over the last 10 s
    pressure: float = 0.0  # the largest of the shares but flow, now
    parts: tuple[tuple[str, float | None], ...] = ()  # the shares by name; None if the engine does not report one
    forecast: LatencyForecast | None = None
    cached_share: float | None = None  # recent share of prompt tokens, from the engine's counters; None without them
    objectives: tuple[tuple[str, float], ...] = ()  # seconds, by name


@dataclass(frozen=True, slots=True)
class ShadowUse:
    """Coefficients fitted to the engine's own work; `error` is their mean prediction error, a share, over `windows`."""

    coefficients: tuple[tuple[str, float], ...]
    mu_max_per_minute: float
    windows: int
    error: float


@dataclass(frozen=True, slots=True)
class PriceUse:
    """The coefficients in use. `stale` is why they no longer hold, "" while they do.

    `margin` is how far off a price may be, as a share; `slowness` actual over predicted time of work; `terms` the
    GPU milliseconds of one MU by cause; `line` is gpu_ms projected to alpha, beta, gamma.
    """

    source: str = "default"
    stale: str = ""
    margin: float = 0.0
    terms: tuple[tuple[str, float], ...] = ()
    line: tuple[tuple[str, float], ...] = ()
    windows: int = 0
    shadow: ShadowUse | None = None
    slowness: float = 1.0  # that the capacity follows


@dataclass(frozen=True, slots=True)
class TenantUse:
    """One tenant, now and since the start. `outcomes` maps outcome -> requests."""

    tenant: str
    requests_in_flight: int
    mu_in_flight: float
    mu_total: float
    requests_total: int
    tokens_total: int
    outcomes: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class ImageUse:
    """Images since the start. `stages` are (stage, images, total seconds)."""

    outcomes: tuple[tuple[str, int], ...]  # outcome -> images
    stages: tuple[tuple[str, int, float], ...]
    bytes_in: int
    bytes_out: int


@dataclass(frozen=True, slots=True)
class CanaryUse:
    """The cost of the canaries that passed since the start; `garbage`: their answers differ from the usual ones.

    `usable`: whether any passes in this process of the engine; None while that is not known.
    """

    passed: int = 0
    mu: float = 0.0
    tokens: int = 0  # prompts and outputs
    garbage: bool = False
    usable: bool | None = None


@dataclass(frozen=True, slots=True)
class RelayUse:
    """One relay process. `pulse_age` is seconds since its last Heartbeat; None before the first."""

    index: int
    pid: int
    restarts: int
    open: int
    lag: float
    pulse_age: float | None
    open_files: int = 0
    max_files: int = 0


@dataclass(frozen=True, slots=True)
class PodNames:
    """Where this sidecar runs, as its environment names it; "" for what it does not name."""

    pod: str = ""
    namespace: str = ""
    node: str = ""


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Percentiles of `count` recent values, in seconds."""

    p50: float
    p95: float
    count: int


@dataclass(frozen=True, slots=True)
class RecentLatencies:
    """What users of streams have waited in the last minute; None where no stream has shown it."""

    first_token: Percentiles | None = None
    output_token: Percentiles | None = None  # between two tokens: the mean of each stream


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything a report may show."""

    at: float
    at_wall: float
    version: str
    engine_kind: str
    draining: bool
    verdict: Verdict
    progress_age: float | None  # seconds since the last progress; None when nothing is outstanding
    silence_allowed: float
    silence_ruled_by: str  # "floor", "predicted", "learned", "cap"
    load: Load
    tenants: tuple[TenantUse, ...]
    images: ImageUse
    images_device: str  # "off", "auto", "cpu", "cuda": as configured
    engine: Reading[EngineSample]
    gpus: Reading[tuple[GpuSample, ...]]
    own: Reading[ProcessSample]  # the control process
    own_lag: float  # event loop lag of the control process, seconds
    relays: tuple[RelayUse, ...]
    canary: CanaryResult | None  # the last result
    canary_outstanding_since: float | None
    changes: tuple[Verdict, ...]  # newest first, bounded
    diagnoses: tuple[DiagnosisSummary, ...]  # newest first, bounded
    kills: int = 0  # how often liveness failed because of a stall
    kills_by_reason: tuple[tuple[str, int], ...] = ()  # by the reason of the verdict then
    handover: str = ""  # why an operator must act; "" while none must
    canaries: CanaryUse = CanaryUse()
    prices: PriceUse = PriceUse()
    engine_gpus: int = 1  # GPUs of the engine, as they are billed
    place: PodNames = PodNames()
    models: tuple[str, ...] = ()  # that the engine lists
    engine_version: str = ""
    probes: tuple[tuple[str, bool], ...] = ()  # kind -> whether it passes
    latencies: RecentLatencies = RecentLatencies()
