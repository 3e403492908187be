"""Pure: the load as an ORCA report: the response header `endpoint-load-metrics` in its three forms, and the message of the stream.

Envoy's client-side weighted round robin, and gRPC's, weigh an endpoint by rps_fractional / utilisation.
Rules: all forms carry the same numbers. Rate and utilisation are means of the same ten seconds: a moment's queue over a minute's flow
would be no engine's capacity. The rate is in milli-MU per second and not in requests: Envoy cuts the quotient to a whole
number, of which an engine of three requests per second has three, and two engines of 1.9 and 1.1 are alike; and an engine that is
sent small requests is not stronger for that. So the weight of an engine at its flow's limit is its capacity in milli-MU per second.
A report whose rate or utilisation is not above 0 is rejected, and the old weight stays; so an idle engine reports an epsilon
of both, in the same ratio. eps is the share of requests that the engine failed, of that rate. What could not be read is left out.
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
MIN_RPS: Final = 1e-3  # where not even the capacity is known
MILLI_PER_MU: Final = 1000.0


@dataclass(frozen=True, slots=True)
class OrcaReport:
    """One `xds.data.orca.v3.OrcaLoadReport`; `named` are its named_metrics."""

    fields: dict[str, float]
    named: dict[str, float]

    def json(self) -> str:
        """The header's value as `JSON {...}`."""
        return "JSON " + json.dumps({**self.fields, "named_metrics": self.named})

    def text(self) -> str:
        """The header's value as `TEXT key=value, ...`."""
        named = {f"named_metrics.{name}": value for name, value in self.named.items()}
        return "TEXT " + ", ".join(f"{name}={value:.10g}" for name, value in {**self.fields, **named}.items())

    def binary(self) -> str:
        """The header's value as `BIN ` and base64."""
        return BIN_PREFIX + base64.b64encode(orca_proto.encode(self.fields, self.named)).decode()


BIN_PREFIX: Final = "BIN_PREFIX "


def message(binary: str) -> bytes:
    """The message that a header in the BIN form carries. Raises ValueError."""
    return base64.b64decode(binary.removeprefix(BIN_PREFIX), validate=True)


class MovingMean:
    """The mean of the pressure over the ledger's RECENT seconds, in its buckets."""

    def __init__(self) -> None:
        self._sum = SlidingSum(RECENT_WINDOW_S)
        self._at: float | None = None

    def mean(self, pressure: float, now: float) -> float:
        """Take one reading, which holds since the last one; the mean, in which the time before the first counts as idle."""
        seconds = 0.0 if self._at is None else min(now - self._at, RECENT_WINDOW_S)
        self._at = now
        self._sum.add(pressure * seconds, now)
        return self._sum.sum(now) / RECENT_WINDOW_S


def report(load: Load, engine: Reading[EngineSample], pressure: float) -> OrcaReport:
    """The report of one moment; `pressure` is the mean of `load.pressure`."""
    sample = engine.value if isinstance(engine, Value) else EngineSample()
    flow = load.recent_mu_per_second * 60 / load.mu_max_per_minute if load.mu_max_per_minute > 0 else 0.0
    used = round(max(pressure, flow, MIN_UTILIZATION), 6)
    return OrcaReport(_finite(_fields(load, sample, used)), _finite(_named(load, sample, used)))


def _fields(load: Load, sample: EngineSample, used: float) -> dict[str, float | None]:
    rate = _rate(load)
    failed = load.errors_per_second / load.requests_per_second if load.requests_per_second > 0 else 0.0
    return {
        "rps_fractional": round(rate, 6),
        "application_utilization": used,
        "cpu_utilization": used,  # for clients that know no application_utilization
        "mem_utilization": None if sample.kv_usage is None else min(max(sample.kv_usage, 0.0), 1.0),
        "eps": round(rate * min(failed, 1.0), 6) or None,
    }


def _named(load: Load, sample: EngineSample, used: float) -> dict[str, float | None]:
    return {
        "mu_utilization": used,
        "mu_in_flight": round(load.mu_in_flight, 6),
        "requests_per_second": round(load.requests_per_second, 6),
        # The two that vLLM itself reports in this header, which ours replaces.
        "kv_cache_usage_perc": sample.kv_usage,
        "num_requests_waiting": sample.waiting if sample.waiting is not None else float(load.requests_waiting),
    }


def _rate(load: Load) -> float:
    """Milli-MU per second, never 0."""
    idle = MIN_UTILIZATION * load.mu_max_per_minute / 60
    return max(max(load.recent_mu_per_second, idle) * MILLI_PER_MU, MIN_RPS)


def _finite(numbers: dict[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in numbers.items() if value is not None and math.isfinite(value)}
