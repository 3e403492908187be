"""Pure: sums of the ledger and of image events for reports: load, use by tenant, image work."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from sidecar.events import ImagePrepared
from sidecar.labels import BoundedLabels
from sidecar.load import cost_model
from sidecar.load.ledger import Ledger, TenantTotals
from sidecar.snapshot import ImageUse, LatencyForecast, Load, TenantUse

MIN_HEADROOM_SHARE = 0.1  # of the TTFT objective, if an idle engine hardly keeps it


@dataclass(slots=True)
class ImageSums:
    """Image work since the start; outcomes and stages are bounded in number."""

    outcomes: Counter[str] = field(default_factory=Counter)
    stages: dict[str, tuple[int, float]] = field(default_factory=dict)
    bytes_in: int = 0
    bytes_out: int = 0
    label: BoundedLabels = field(default_factory=lambda: BoundedLabels(20))

    def add(self, event: ImagePrepared) -> None:
        self.outcomes[self.label(event.outcome)] += 1
        self.bytes_in += event.bytes_in
        self.bytes_out += event.bytes_out
        for stage, seconds in event.stages:
            label = self.label(stage)
            count, total = self.stages.get(label, (0, 0.0))
            self.stages[label] = (count + 1, total + seconds)

    def use(self) -> ImageUse:
        stages = tuple((stage, count, seconds) for stage, (count, seconds) in self.stages.items())
        return ImageUse(tuple(self.outcomes.items()), stages, self.bytes_in, self.bytes_out)


@dataclass(frozen=True, slots=True)
class Objectives:
    """What users expect, in seconds: of a whole request, and of its first token."""

    request: float
    ttft: float


def load_of(
    ledger: Ledger,
    co: cost_model.Coefficients,
    objectives: Objectives,
    kv: float | None,
    forecast: LatencyForecast,
    now: float,
    slowness: float = 1.0,
) -> Load:
    """How loaded the engine is.

    `kv` is a share 0..1, None if the engine does not report it; `slowness`: how many times longer than its coefficients
    predict the engine takes; its capacity is smaller by this factor.
    """
    in_flight, per_minute = ledger.in_flight(), ledger.flow.sum(now)
    max_in_flight = cost_model.max_mu_in_flight(co, objectives.request) / slowness
    max_per_minute = cost_model.max_mu_per_minute(co) / slowness
    parts = {
        "stock": in_flight.mu / max_in_flight,
        "flow": per_minute / max_per_minute,
        "kv": kv,
        "queue": forecast.wait_seconds / objectives.ttft,
        "ttft": ttft_share(forecast, objectives.ttft),
    }
    shares = {name: share for name, share in parts.items() if share is not None}
    limited_by = max(shares, key=lambda name: shares[name])
    return Load(
        *(in_flight.mu, max_in_flight, per_minute, max_per_minute, shares[limited_by], limited_by),
        *(in_flight.prefill_tokens, in_flight.decode_tokens, ledger.delivered_total, ledger.tokens.per_second(now)),
        *(in_flight.requests, in_flight.waiting, ledger.finished.per_second(now)),
        *(co.fingerprint, co.source),
        coefficients_stale=False,
        errors_per_second=ledger.failed.per_second(now),
        recent_mu_per_second=ledger.recent_flow.per_second(now),
        pressure=max(share for name, share in shares.items() if name != "flow"),
        parts=tuple(parts.items()),
        forecast=forecast,
    )


def tenants_of(ledger: Ledger) -> tuple[TenantUse, ...]:
    """Each tenant's open requests and its use since the start, sorted by name."""
    open_mu, outcomes = defaultdict[str, list[float]](list), defaultdict[str, Counter[str]](Counter)
    for hold in ledger.holds():
        open_mu[ledger.labels.tenant(hold.admitted.tenant)].append(hold.remaining_mu)
    for (tenant, _, outcome), (_, requests) in ledger.totals.items():
        outcomes[tenant][outcome] += int(requests)
    uses = []
    for tenant in sorted({*open_mu, *ledger.tenant_totals}):
        mu, total = open_mu[tenant], ledger.tenant_totals.get(tenant, TenantTotals())
        ends = tuple(sorted(outcomes[tenant].items()))
        uses.append(TenantUse(tenant, len(mu), sum(mu), total.mu, total.requests, total.tokens, ends))
    return tuple(uses)


def ttft_share(forecast: LatencyForecast, objective: float) -> float:
    """How much of the time that load may add to a typical first token it does add; 1 where the objective is missed.

    The time on an idle engine is not load: more replicas would not shorten it.
    """
    headroom = max(objective - forecast.idle_seconds, MIN_HEADROOM_SHARE * objective)
    return max(0.0, forecast.typical_seconds - forecast.idle_seconds) / headroom
