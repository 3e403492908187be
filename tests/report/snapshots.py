"""One snapshot of a busy engine, for the tests of all reports."""

from __future__ import annotations

from sidecar.events import Verdict
from sidecar.readings import EngineSample, GpuActivity, GpuFaults, GpuSample, ProcessSample, Reading, Value
from sidecar.snapshot import CanaryUse, ImageUse, LatencyForecast, Load, PriceUse, RelayUse, Snapshot

LOAD = Load(
    mu_in_flight=3.2,
    mu_max_in_flight=12.0,
    mu_per_minute=41.0,
    mu_max_per_minute=100.0,
    utilization=0.41,
    limited_by="flow",
    prefill_tokens_in_flight=5120,
    decode_tokens_in_flight=900,
    tokens_delivered_total=123456,
    tokens_per_second=500.0,
    requests_in_flight=7,
    requests_waiting=2,
    requests_per_second=0.7,
    coefficients_fingerprint="llama-h100",
    coefficients_source="file",
    coefficients_stale=False,
    recent_mu_per_second=0.5,
    parts=(("stock", 0.27), ("flow", 0.41), ("kv", None), ("queue", 0.02), ("ttft", 0.1)),
    forecast=LatencyForecast(0.25, 2.0, 1e-5, 0.6, 0.03, 0.2, 0.4, 0.1, 120, 0.06, 0.21),
    cached_share=0.4,
    objectives=(("seconds", 10.0), ("ttft_seconds", 2.0)),
)
GPU = GpuSample(
    0,
    "H100",
    "GPU-0",
    Value(0.93, 99.0),
    Value(1 << 30, 99.0),
    Value(80 << 30, 99.0),
    Value(640.5, 99.0),
    Value(61.0, 99.0),
    ((79, 2),),
    None,
    Value(9.5e6, 99.0),
    Value(1_980_000_000, 99.0),
    Value(("power_cap",), 99.0),
    Value(2, 99.0),
    activity=Value(GpuActivity(0.4, 0.25, 2e8), 99.0),
    faults=Value(GpuFaults("gpu_reset", 3, True, False), 99.0),
    events=(("fatal", 1),),
)
ENGINE: Reading[EngineSample] = Value(EngineSample(running=5, waiting=3, kv_usage=0.3), 99.0, 0.004)
SNAPSHOT = Snapshot(
    at=100.0,
    at_wall=1_700_000_000.0,
    version="1.2.3",
    engine_kind="vllm",
    draining=False,
    verdict=Verdict("progressing", "bytes_delivered", "", 90.0, 1_699_999_990.0),
    progress_age=0.25,
    silence_allowed=8.0,
    silence_ruled_by="floor",
    load=LOAD,
    tenants=(),
    images=ImageUse((), (), 0, 0),
    images_device="off",
    engine=ENGINE,
    gpus=Value((GPU,), 99.0, 0.002),
    own=Value(ProcessSample(1, 50_000_000, 3.0, 4, 30, 1024), 99.0, 0.0001),
    own_lag=0.001,
    relays=(RelayUse(0, 10, 0, 7, 0.002, 0.5, 90, 4096), RelayUse(1, 11, 0, 0, 0.003, 0.5)),
    canary=None,
    canary_outstanding_since=None,
    changes=(),
    diagnoses=(),
    canaries=CanaryUse(usable=True),
    prices=PriceUse("calibrated", margin=0.2, terms=(("decode", 60.0),), line=(("alpha", 0.1),), windows=3),
)
