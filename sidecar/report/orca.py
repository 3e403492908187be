"""Pure: the load as an ORCA report in the response header `endpoint-load-metrics`, for Envoy, gRPC and the like.

Rules: both forms carry the same numbers. Envoy's client-side weighted round robin rejects a report whose rps_fractional or
utilisation is not above 0, and then goes on with an old weight; so an idle engine reports an epsilon of both, in the ratio
that makes the weight (rps / utilisation) its capacity in reference requests per second. What could not be read is left out.
"""

from __future__ import annotations

import json
import math
from typing import Final

from sidecar.facts import EngineSample, Reading, Value
from sidecar.snapshot import Load

LEAST_UTILIZATION: Final = 0.001
LEAST_RPS: Final = 1e-6  # where not even the capacity is known


def header_json(load: Load, engine: Reading[EngineSample]) -> str:
    """The header's value as `JSON {...}`, in the field names of `xds.data.orca.v3.OrcaLoadReport`."""
    return "JSON " + json.dumps({**_fields(load), "named_metrics": _named(load, engine)})


def header_text(load: Load, engine: Reading[EngineSample]) -> str:
    """The header's value as `TEXT key=value, ...`."""
    named = {f"named_metrics.{name}": value for name, value in _named(load, engine).items()}
    return "TEXT " + ", ".join(f"{name}={value:.10g}" for name, value in {**_fields(load), **named}.items())


def _fields(load: Load) -> dict[str, float]:
    return {
        "rps_fractional": round(max(load.requests_per_second, _idle_rps(load)), 9),
        "application_utilization": _utilization(load),
    }


def _named(load: Load, engine: Reading[EngineSample]) -> dict[str, float]:
    sample = engine.value if isinstance(engine, Value) else EngineSample()
    waiting = sample.waiting if sample.waiting is not None else float(load.requests_waiting)
    numbers = {
        "mu_utilization": _utilization(load),
        "mu_in_flight": round(load.mu_in_flight, 6),
        # The two that vLLM itself reports in this header, which ours replaces.
        "kv_cache_usage_perc": sample.kv_usage,
        "num_requests_waiting": waiting,
    }
    return {name: value for name, value in numbers.items() if value is not None and math.isfinite(value)}


def _utilization(load: Load) -> float:
    return round(max(load.utilization, LEAST_UTILIZATION), 6)


def _idle_rps(load: Load) -> float:
    return max(LEAST_UTILIZATION * load.mu_max_per_minute / 60, LEAST_RPS)
