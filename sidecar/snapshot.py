"""What the control process holds true at one moment, as frozen data. Every report is a pure rendering of a Snapshot.

Times are monotonic seconds (`at`) unless named `wall`.
"""

from __future__ import annotations

from dataclasses import dataclass

from sidecar.events import CanaryResult, DiagnosisSummary, Verdict
from sidecar.readings import EngineSample, GpuSample, ProcessSample, Reading


@dataclass(frozen=True, slots=True)
class Load:
    """How loaded the engine is. `limited_by` is "stock", "flow", "kv" or "queue": the term that `utilization` comes from."""

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
    errors_per_second: float = 0.0  # what the engine failed: engine_error, stalled, lost
    recent_mu_per_second: float = 0.0  # over the last 10 s
    pressure: float = 0.0  # the largest share but the flow's: of stock, KV use and queue, at this moment
    parts: tuple[tuple[str, float | None], ...] = ()  # those shares by name; None where the engine does not tell one


@dataclass(frozen=True, slots=True)
class ShadowUse:
    """Coefficients as the engine's own work shows them; `error` is that of their predictions, as a share, over `windows`."""

    coefficients: tuple[tuple[str, float], ...]
    mu_max_per_minute: float
    windows: int
    error: float


@dataclass(frozen=True, slots=True)
class PriceUse:
    """The coefficients in use. `stale` is why they no longer hold, "" while they do; `margin` how far a price may be off, as a share.

    `terms` are the GPU milliseconds of one MU by cause, `line` is gpu_ms projected to alpha, beta, gamma.
    """

    source: str = "default"
    stale: str = ""
    margin: float = 0.0
    terms: tuple[tuple[str, float], ...] = ()
    line: tuple[tuple[str, float], ...] = ()
    windows: int = 0
    shadow: ShadowUse | None = None


@dataclass(frozen=True, slots=True)
class TenantUse:
    """One tenant now and since the start. `outcomes` maps outcome -> requests."""

    tenant: str
    requests_in_flight: int
    mu_in_flight: float
    mu_total: float
    requests_total: int
    tokens_total: int
    outcomes: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class ImageUse:
    """Images since the start. `stages` maps stage -> (count, seconds in all)."""

    outcomes: tuple[tuple[str, int], ...]  # outcome -> images
    stages: tuple[tuple[str, int, float], ...]
    bytes_in: int
    bytes_out: int


@dataclass(frozen=True, slots=True)
class CanaryUse:
    """What the canaries that passed since the start have cost; `garbage`: their answers are no longer the usual ones."""

    passed: int = 0
    mu: float = 0.0
    tokens: int = 0  # prompts and outputs
    garbage: bool = False


@dataclass(frozen=True, slots=True)
class RelayUse:
    """One relay process. `pulse_age` is seconds since its last Pulse; None before the first."""

    index: int
    pid: int
    restarts: int
    open: int
    lag: float
    pulse_age: float | None


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
    images_device: str  # "off", "auto", "cpu", "cuda": as chosen
    engine: Reading[EngineSample]
    gpus: Reading[tuple[GpuSample, ...]]
    own: Reading[ProcessSample]  # the control process
    own_lag: float  # event loop lag of the control process, seconds
    relays: tuple[RelayUse, ...]
    canary: CanaryResult | None  # the last one that ended
    canary_outstanding_since: float | None
    changes: tuple[Verdict, ...]  # newest first, bounded
    diagnoses: tuple[DiagnosisSummary, ...]  # newest first, bounded
    kills: int = 0  # times that liveness was failed for a stall
    handover: str = ""  # why an operator must act; empty while nobody must
    canaries: CanaryUse = CanaryUse()
    prices: PriceUse = PriceUse()
