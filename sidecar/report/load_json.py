"""Pure: a Snapshot as `GET /load`, for autoscalers and routers that read JSON.

A value that could not be read is null, with its reason under the same key plus `_absent`.
"""

from __future__ import annotations

from typing import Any, Final

from sidecar.readings import Absent, GpuSample, Reading, Value
from sidecar.snapshot import PriceUse, Snapshot

MU: Final = ("in_flight", "max_in_flight", "per_minute", "max_per_minute")
# Of a GPU: the key, and the field of GpuSample.
GPU_READINGS: Final = (
    *(("utilization", "utilization"), ("memory_used_bytes", "memory_used"), ("memory_total_bytes", "memory_total")),
    *(("power_watts", "power"), ("energy_joules", "energy"), ("temperature_celsius", "temperature")),
    *(("sm_clock_hertz", "sm_clock"), ("slowdowns", "slowdowns"), ("processes", "processes")),
)


def render(snapshot: Snapshot, unit: str = "") -> dict[str, Any]:
    """The body of `GET /load`. `unit` "milli": MU as integer thousandths, for consumers that count in integers."""
    load, gpus = snapshot.load, snapshot.gpus
    mu: dict[str, Any] = {name: getattr(load, f"mu_{name}") for name in MU}
    if unit == "milli":
        mu = {name: round(1000 * value) for name, value in mu.items()}
        mu |= {"unit": "milli", "max_load_hint": mu["max_in_flight"]}
    return {
        "mu": {**mu, "utilization": load.utilization, "limited_by": load.limited_by, "parts": _parts(snapshot)},
        "tokens": {
            "prefill_in_flight": load.prefill_tokens_in_flight,
            "decode_in_flight": load.decode_tokens_in_flight,
            "delivered_total": load.tokens_delivered_total,
        },
        "requests": {"in_flight": load.requests_in_flight, "waiting": load.requests_waiting},
        **(_entry("gpu", gpus) if not isinstance(gpus, Value) else {"gpu": [_gpu(gpu) for gpu in gpus.value]}),
        "coefficients": {
            "fingerprint": load.coefficients_fingerprint,
            "stale": load.coefficients_stale,
            **_prices(snapshot.prices),
        },
        "verdict": snapshot.verdict.state,
    }


def _parts(snapshot: Snapshot) -> dict[str, Any]:
    """The shares whose maximum is the utilization."""
    parts: dict[str, Any] = {}
    engine = snapshot.engine
    reading = Absent("not reported by the engine") if isinstance(engine, Value) else engine
    for name, share in snapshot.load.parts:
        parts |= {name: share} if share is not None else _entry(name, reading)
    return parts


def _prices(prices: PriceUse) -> dict[str, Any]:
    """The coefficients: source, margin, the terms of one MU in ms, and the re-fit."""
    refit: dict[str, Any] = {"shadow": None, "shadow_absent": f"{prices.windows} windows of work so far"}
    if (shadow := prices.shadow) is not None:
        found = {"max_per_minute": shadow.mu_max_per_minute, "windows": shadow.windows, "error": shadow.error}
        refit = {"shadow": dict(shadow.coefficients) | found}
    return {
        "source": prices.source,
        "margin": prices.margin,
        **({"stale_reason": prices.stale} if prices.stale else {}),
        "unit_ms": dict(prices.terms),
        "line_ms": dict(prices.line),
        **refit,
    }


def _gpu(gpu: GpuSample) -> dict[str, Any]:
    shown: dict[str, Any] = {"index": gpu.index, "mig": gpu.mig, "name": gpu.name}
    for key, field in GPU_READINGS:
        shown |= _entry(key, getattr(gpu, field))
    return shown


def _entry(key: str, reading: Reading[Any]) -> dict[str, Any]:
    if isinstance(reading, Value):
        return {key: reading.value}
    why = reading.reason if isinstance(reading, Absent) else f"failed: {reading.error}"
    return {key: None, f"{key}_absent": why}
