"""Pure: a Snapshot as `GET /load`, for autoscalers and routers that read JSON.

A value that could not be read is null, with its reason under the same key plus `_absent`.
"""

from __future__ import annotations

from typing import Any, Final

from sidecar.readings import Absent, GpuSample, Reading, Value
from sidecar.snapshot import PriceUse, Snapshot

MU: Final = ("in_flight", "max_in_flight", "per_minute", "max_per_minute")


def render(snapshot: Snapshot, unit: str = "") -> dict[str, Any]:
    """The body of `GET /load`. `unit` "milli": MU as integer thousandths, for consumers that count in integers."""
    load = snapshot.load
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
        **_gpus(snapshot.gpus),
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
    for name, share in snapshot.load.parts:
        parts[name] = share
        if share is None:
            engine = snapshot.engine
            parts |= _entry(name, Absent("not reported by the engine") if isinstance(engine, Value) else engine)
    return parts


def _prices(prices: PriceUse) -> dict[str, Any]:
    """The coefficients: source, margin, the terms of one MU in ms, and the re-fit."""
    shadow = prices.shadow
    if shadow is None:
        refit: dict[str, Any] = {"shadow": None, "shadow_absent": f"{prices.windows} windows of work so far"}
    else:
        refit = {
            "shadow": {
                **dict(shadow.coefficients),
                "max_per_minute": shadow.mu_max_per_minute,
                "windows": shadow.windows,
                "error": shadow.error,
            }
        }
    return {
        "source": prices.source,
        "margin": prices.margin,
        **({"stale_reason": prices.stale} if prices.stale else {}),
        "unit_ms": dict(prices.terms),
        "line_ms": dict(prices.line),
        **refit,
    }


def _gpus(reading: Reading[tuple[GpuSample, ...]]) -> dict[str, Any]:
    if isinstance(reading, Value):
        return {"gpu": [_gpu(gpu) for gpu in reading.value]}
    return _entry("gpu", reading)


def _gpu(gpu: GpuSample) -> dict[str, Any]:
    return {
        "index": gpu.index,
        "mig": gpu.mig,
        "name": gpu.name,
        **_entry("utilization", gpu.utilization),
        **_entry("memory_used_bytes", gpu.memory_used),
        **_entry("memory_total_bytes", gpu.memory_total),
        **_entry("power_watts", gpu.power),
        **_entry("energy_joules", gpu.energy),
        **_entry("temperature_celsius", gpu.temperature),
        **_entry("sm_clock_hertz", gpu.sm_clock),
        **_entry("slowdowns", gpu.slowdowns),
        **_entry("processes", gpu.processes),
    }


def _entry(key: str, reading: Reading[Any]) -> dict[str, Any]:
    match reading:
        case Value(value=value):
            return {key: value}
        case Absent(reason=reason):
            return {key: None, f"{key}_absent": reason}
        case _:
            return {key: None, f"{key}_absent": f"failed: {reading.error}"}
