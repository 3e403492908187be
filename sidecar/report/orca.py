"""Pure: the load as an ORCA report, for the response header `endpoint-load-metrics` (three forms) and the stream.

The client-side weighted round robin of Envoy and gRPC weighs an endpoint by rps_fractional / utilization.

Rules:
- All forms carry the same numbers.
- Rate and utilization are means over the same ten seconds, so their quotient is a capacity.
- The rate is in milli-MU per second, not in requests. Envoy truncates the quotient to an integer, so engines of 1.9 and
  1.1 requests per second would be equal; and small requests would make an engine look faster.
- Clients reject a report with a rate or utilization of 0 and keep the old weight. So an idle engine reports an epsilon
  of both, in the same ratio.
- eps is the rate times the share of failed requests. A value that could not be read is left out.
"""

from __future__ import annotations

import base64
import json
import math
from dataclasses import dataclass
from typing import Final

from sidecar.load.ledger import RECENT_WINDOW_S, SlidingSum
from sidecar.readings import EngineSample, Reading, Value
from sidecar.report import orca_proto
from sidecar.snapshot import Load

MIN_UTILIZATION: Final = 0.001
MIN_RPS: Final = 1e-3  # if not even the capacity is known
MILLI_PER_MU: Final = 1000.0
BIN_PREFIX: Final = "BIN "


@dataclass(frozen=True, slots=True)
class OrcaReport:
    """An `xds.data.orca.v3.OrcaLoadReport` in the three forms of the header; `named` are its named_metrics."""

    fields: dict[str, float]
    named: dict[str, float]

    def json(self) -> str:
        return "JSON " + json.dumps({**self.fields, "named_metrics": self.named})

    def text(self) -> str:
        named = {f"named_metrics.{name}": value for name, value in self.named.items()}
        return "TEXT " + ", ".join(f"{name}={value:.10g}" for name, value in {**self.fields, **named}.items())

    def binary(self) -> str:
        return BIN_PREFIX + base64.b64encode(orca_proto.encode(self.fields, self.named)).decode()


def message(binary: str) -> bytes:
    """The message in a header of the BIN form. Raises ValueError."""
    return base64.b64decode(binary.removeprefix(BIN_PREFIX), validate=True)


class MovingMean:
    """The mean of the pressure over RECENT_WINDOW_S, in the buckets of the ledger."""

    def __init__(self) -> None:
        self._sum = SlidingSum(RECENT_WINDOW_S)
        self._at: float | None = None

    def mean(self, pressure: float, now: float) -> float:
        """Add a reading, valid since the previous one, and return the mean. Time before the first counts as idle."""
        seconds = 0.0 if self._at is None else min(now - self._at, RECENT_WINDOW_S)
        self._at = now
        self._sum.add(pressure * seconds, now)
        return self._sum.per_second(now)


def report(load: Load, engine: Reading[EngineSample], pressure: float) -> OrcaReport:
    """The current report; `pressure` is the mean of `load.pressure`."""
    sample = engine.value if isinstance(engine, Value) else EngineSample()
    flow = load.recent_mu_per_second * 60 / load.mu_max_per_minute if load.mu_max_per_minute > 0 else 0.0
    used = round(max(pressure, flow, MIN_UTILIZATION), 6)
    idle = MIN_UTILIZATION * load.mu_max_per_minute / 60
    rate = max(max(load.recent_mu_per_second, idle) * MILLI_PER_MU, MIN_RPS)
    failed = load.errors_per_second / load.requests_per_second if load.requests_per_second > 0 else 0.0
    fields = {
        "rps_fractional": round(rate, 6),
        "application_utilization": used,
        "cpu_utilization": used,  # for clients without application_utilization
        "mem_utilization": None if sample.kv_usage is None else min(max(sample.kv_usage, 0.0), 1.0),
        "eps": round(rate * min(failed, 1.0), 6) or None,
    }
    named = {
        "mu_utilization": used,
        "mu_in_flight": round(load.mu_in_flight, 6),
        "requests_per_second": round(load.requests_per_second, 6),
        # vLLM reports these two in the same header, which this one replaces.
        "kv_cache_usage_perc": sample.kv_usage,
        "num_requests_waiting": sample.waiting if sample.waiting is not None else float(load.requests_waiting),
    }
    if load.forecast is not None:
        named["predicted_ttft_seconds"] = round(load.forecast.reference_seconds, 6)
        named["predicted_tpot_seconds"] = round(load.forecast.tpot_seconds, 6)
    return OrcaReport(_finite(fields), _finite(named))


def _finite(numbers: dict[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in numbers.items() if value is not None and math.isfinite(value)}
