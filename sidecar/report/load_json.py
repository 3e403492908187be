"""Pure: a Snapshot as `GET /load`, for autoscalers and routers that read JSON.

A value that could not be read is null, with its reason under the same key plus `_absent`.
"""

from __future__ import annotations

from typing import Any, Final

from sidecar.events import RequestSize
from sidecar.load import cost_model
from sidecar.load.cost_model import Coefficients
from sidecar.readings import Absent, GpuSample, Reading, Value
from sidecar.snapshot import LatencyForecast, PriceUse, Snapshot

MU: Final = ("in_flight", "max_in_flight", "per_minute", "max_per_minute")
# Of a GPU: the key, and the field of GpuSample.
GPU_READINGS: Final = (
    *(("utilization", "utilization"), ("memory_used_bytes", "memory_used"), ("memory_total_bytes", "memory_total")),
    *(("power_watts", "power"), ("energy_joules", "energy"), ("temperature_celsius", "temperature")),
    *(("sm_clock_hertz", "sm_clock"), ("slowdowns", "slowdowns"), ("processes", "processes")),
)


def render(
    snapshot: Snapshot, unit: str = "", size: RequestSize | None = None, co: Coefficients | None = None
) -> dict[str, Any]:
    """The body of `GET /load`. `unit` "milli": MU as integer thousandths, for consumers that count in integers.

    `size`: of the request whose latency is predicted, by the coefficients `co`; default: one MU.
    """
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
            **entry("cached_share", _cached_share(snapshot)),
        },
        "requests": {"in_flight": load.requests_in_flight, "waiting": load.requests_waiting},
        "objectives": dict(load.objectives),
        **({} if load.forecast is None else {"predicted": _predicted(load.forecast, size, co)}),
        **(entry("gpu", gpus) if not isinstance(gpus, Value) else {"gpu": [gpu_json(gpu) for gpu in gpus.value]}),
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
        parts |= {name: share} if share is not None else entry(name, reading)
    return parts


def _predicted(forecast: LatencyForecast, size: RequestSize | None, co: Coefficients | None) -> dict[str, Any]:
    """The latencies that the next request would have."""
    seconds, work = forecast.reference_seconds, size or cost_model.REFERENCE
    if size is not None and co is not None:
        prefill = cost_model.terms(size, co).before_first_token / 1000
        own = forecast.seconds_per_prefill_second * prefill + forecast.seconds_per_token * size.uncached
        seconds = forecast.base_seconds + own
    error = {"median": forecast.error_median, "p90": forecast.error_p90, "first_tokens": forecast.first_tokens}
    return {
        "ttft_seconds": seconds,
        "tpot_seconds": forecast.tpot_seconds,
        "wait_seconds": forecast.wait_seconds,
        "of": {"in": work.uncached + work.cached, "cached": work.cached},
        "typical_ttft_seconds": forecast.typical_seconds,
        "error": error,
    }


def _cached_share(snapshot: Snapshot) -> Reading[float]:
    share = snapshot.load.cached_share
    return (
        Absent("the engine does not report it, or too few tokens yet") if share is None else Value(share, snapshot.at)
    )


def _prices(prices: PriceUse) -> dict[str, Any]:
    """The coefficients: source, margin, the terms of one MU in ms, and the re-fit."""
    refit: dict[str, Any] = {"shadow": None, "shadow_absent": f"{prices.windows} windows of work so far"}
    if (shadow := prices.shadow) is not None:
        found = {"max_per_minute": shadow.mu_max_per_minute, "windows": shadow.windows, "error": shadow.error}
        refit = {"shadow": dict(shadow.coefficients) | found}
    return {
        "source": prices.source,
        "margin": prices.margin,
        "slowness": prices.slowness,
        **({"stale_reason": prices.stale} if prices.stale else {}),
        "unit_ms": dict(prices.terms),
        "line_ms": dict(prices.line),
        **refit,
    }


def gpu_json(gpu: GpuSample) -> dict[str, Any]:
    """A GPU's numbers, as reports for programs have them."""
    shown: dict[str, Any] = {"index": gpu.index, "mig": gpu.mig, "name": gpu.name}
    for key, field in GPU_READINGS:
        shown |= entry(key, getattr(gpu, field))
    return shown


def entry(key: str, reading: Reading[Any]) -> dict[str, Any]:
    """A reading under its key; null with the reason where there is none."""
    if isinstance(reading, Value):
        return {key: reading.value}
    why = reading.reason if isinstance(reading, Absent) else f"failed: {reading.error}"
    return {key: None, f"{key}_absent": why}
