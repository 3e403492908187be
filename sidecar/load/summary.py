"""Pure: sums of the ledger and of image events for reports: load, use by tenant, image work."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from sidecar.events import ImagePrepared
from sidecar.labels import BoundedLabels
from sidecar.load import cost_model
from sidecar.load.ledger import AdmissionHold, Ledger, TenantTotals
from sidecar.readings import EngineSample
from sidecar.snapshot import ImageUse, Load, TenantUse


@dataclass(slots=True)
class ImageSums:
    """Image work since the start; outcomes and stages are bounded in number."""

    outcomes: Counter[str] = field(default_factory=Counter)
    stages: dict[str, tuple[int, float]] = field(default_factory=dict)
    bytes_in: int = 0
    bytes_out: int = 0
    label: BoundedLabels = field(default_factory=lambda: BoundedLabels(20))

    def add(self, event: ImagePrepared) -> None:
        """Count one image."""
        self.outcomes[self.label(event.outcome)] += 1
        self.bytes_in += event.bytes_in
        self.bytes_out += event.bytes_out
        for stage, seconds in event.stages:
            label = self.label(stage)
            count, total = self.stages.get(label, (0, 0.0))
            self.stages[label] = (count + 1, total + seconds)

    def use(self) -> ImageUse:
        """The sums so far."""
        stages = tuple((stage, count, seconds) for stage, (count, seconds) in self.stages.items())
        return ImageUse(tuple(self.outcomes.items()), stages, self.bytes_in, self.bytes_out)


def load_of(
    ledger: Ledger, co: cost_model.Coefficients, slo_seconds: float, kv: float | None, queue: float | None, now: float
) -> Load:
    """How loaded the engine is; `kv` and `queue` are shares 0..1, None if the engine does not report them."""
    in_flight = ledger.in_flight()
    per_minute = ledger.mu_per_minute(now)
    max_per_minute = cost_model.max_mu_per_minute(co)
    max_in_flight = cost_model.max_mu_in_flight(co, slo_seconds)
    parts = {"stock": in_flight.mu / max_in_flight, "flow": per_minute / max_per_minute, "kv": kv, "queue": queue}
    shares = {name: share for name, share in parts.items() if share is not None}
    limited_by = max(shares, key=lambda name: shares[name])
    return Load(
        mu_in_flight=in_flight.mu,
        mu_max_in_flight=max_in_flight,
        mu_per_minute=per_minute,
        mu_max_per_minute=max_per_minute,
        utilization=shares[limited_by],
        limited_by=limited_by,
        prefill_tokens_in_flight=in_flight.prefill_tokens,
        decode_tokens_in_flight=in_flight.decode_tokens,
        tokens_delivered_total=ledger.delivered_total,
        tokens_per_second=ledger.tokens_per_second(now),
        requests_in_flight=in_flight.requests,
        requests_waiting=in_flight.waiting,
        requests_per_second=ledger.requests_per_second(now),
        coefficients_fingerprint=co.fingerprint,
        coefficients_source=co.source,
        coefficients_stale=False,
        errors_per_second=ledger.errors_per_second(now),
        recent_mu_per_second=ledger.recent_mu_per_second(now),
        pressure=max(shares["stock"], kv or 0.0, queue or 0.0),
        parts=tuple(parts.items()),
    )


def tenants_of(ledger: Ledger) -> tuple[TenantUse, ...]:
    """Each tenant's open requests and its use since the start, sorted by name."""
    open_: dict[str, list[AdmissionHold]] = {}
    for hold in ledger.holds():
        open_.setdefault(hold.tenant, []).append(hold)
    outcomes: dict[str, Counter[str]] = {}
    for (tenant, _, outcome), (_, requests) in ledger.totals.items():
        outcomes.setdefault(tenant, Counter())[outcome] += int(requests)
    totals, none = ledger.tenant_totals, TenantTotals()
    return tuple(
        TenantUse(
            tenant=t,
            requests_in_flight=len(open_.get(t, ())),
            mu_in_flight=sum(h.remaining_mu for h in open_.get(t, ())),
            mu_total=totals.get(t, none).mu,
            requests_total=totals.get(t, none).requests,
            tokens_total=totals.get(t, none).tokens,
            outcomes=tuple(sorted(outcomes.get(t, Counter()).items())),
        )
        for t in sorted({*open_, *totals})
    )


def queue_share(sample: EngineSample) -> float:
    """Share of the engine's requests that wait in its queue."""
    waiting, running = sample.waiting or 0.0, sample.running or 0.0
    return waiting / (waiting + running) if waiting > 0 else 0.0
