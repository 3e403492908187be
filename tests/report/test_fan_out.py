"""The fan-out of events: each report counts what it must, once."""

from __future__ import annotations

from pathlib import Path

import pytest

from sidecar.events import Admitted, Event, FirstToken, ImagePrepared, RequestSize, Settled
from sidecar.load.cost_model import Coefficients, unit_ms
from sidecar.load.gpu_price import GpuPrice
from sidecar.load.ledger import Ledger
from sidecar.report.fan_out import FanOut
from sidecar.report.metrics import Metrics
from sidecar.report.tracing import Tracing
from sidecar.report.usage_query import read
from sidecar.report.usage_store import UsageStore

CO = Coefficients()
PRICED = CO.fingerprint, unit_ms(CO)
TOKENS = {"tenant": "t", "model": "m", "source": "estimated"}


def test_a_request_reaches_metrics_and_usage_records_once(tmp_path: Path) -> None:
    """Its end is counted with its time per token and its price; so is its image."""
    metrics, usage = Metrics(), UsageStore(tmp_path, 1, 1 << 20)
    ledger = Ledger(CO)
    fan_out = FanOut(metrics, Tracing("", "0"), usage, ledger.labels, lambda work: (), *PRICED)
    events: list[Event] = [
        ImagePrepared("a", 0.5, "jpeg", "ok", 0.1, (), 10, 10),
        Admitted("a", 1.0, "t", "m", "chat", True, RequestSize(500, output=3), 3, 1.0),
        FirstToken("a", 2.0),
        Settled("a", 4.0, "ok", 200, None, 3, 12, 2.0, 1.0, 0.001),
        Settled("a", 4.0, "ok", 200, None, 3, 12, 2.0, 1.0, 0.001),
    ]
    for event in events:
        if (settlement := ledger.apply(0, event)) is not None:
            fan_out.on_settlement(settlement, GpuPrice(8, 3.6), wall=100.0)
        else:
            fan_out.on_event(event)
    labels = {"tenant": "t", "model": "m", "outcome": "ok"}
    sample = metrics.registry.get_sample_value
    mu = sample("sidecar_mu_total", labels)
    assert sample("sidecar_requests_total", labels) == 1 and mu
    assert sample("sidecar_time_per_output_token_seconds_sum") == 1.0
    assert sample("sidecar_images_total", {"format": "jpeg", "outcome": "ok", "reason": ""}) == 1
    paid = sample("sidecar_cost_dollars_total", {"tenant": "t", "model": "m"})
    gpu_seconds = 8 * mu * unit_ms(CO) / 1000
    assert paid == pytest.approx(gpu_seconds / 1000), "$3.60 an hour are a tenth of a cent a second, of each GPU"
    assert sample("sidecar_gpu_seconds_total", labels) == pytest.approx(gpu_seconds)
    tokens = {kind: sample("sidecar_tokens_total", TOKENS | {"kind": kind}) for kind in ("new", "cached", "out")}
    assert tokens == {"new": 500, "cached": None, "out": 3}
    usage.write(usage.take(), 100.0)
    rows = dict(read(usage.path, 0, 200, ("tenant", "outcome")))
    sums, idle = rows["t", "ok"], rows["", "idle"]
    assert (sums.requests, sums.mu, sums.dollars) == (1, mu, paid)
    assert sums.gpu_seconds == pytest.approx(gpu_seconds)
    assert (idle.gpu_seconds, idle.dollars) == (-sums.gpu_seconds, -sums.dollars), "no GPU time has passed here"
    [((source, fingerprint), _)] = read(usage.path, 0, 200, ("source", "fingerprint"))
    assert (source, fingerprint) == ("estimated", CO.fingerprint)
