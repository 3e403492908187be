"""What the control process knows, and how a tick turns it into a Snapshot. No I/O, no clock, no tasks.

events -> ledger, health        readings -> health -> verdict        tick -> Snapshot
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace

from sidecar import __version__
from sidecar.control.saved_state import SavedState
from sidecar.events import (
    Admitted,
    CanaryResult,
    Delivered,
    Event,
    FirstToken,
    ImagePrepared,
    RequestBlocked,
    RequestSize,
)
from sidecar.health import probes
from sidecar.health.kill_policy import kills_by_reason
from sidecar.health.monitor import HealthMonitor, TickReadings
from sidecar.health.progress import PREDICTION_MARGIN
from sidecar.labels import DEFAULT_TENANT
from sidecar.load import coefficient_monitor, cost_model, summary
from sidecar.load.cached_share import EngineCache
from sidecar.load.client_labels import ClientLabels
from sidecar.load.coefficient_monitor import CoefficientMonitor
from sidecar.load.gpu_price import GpuCount, GpuPrice, count_gpus, mean_watts
from sidecar.load.latency_prediction import LatencyPredictor
from sidecar.load.ledger import Ledger, Settlement
from sidecar.load.recent_times import RecentTimes
from sidecar.readings import EngineSample, Value
from sidecar.settings import Settings
from sidecar.snapshot import CanaryUse, Load, PodNames, RecentLatencies, Snapshot


class ControlState:
    """State of the control process. The control loop feeds it and acts on it after each tick."""

    def __init__(
        self,
        settings: Settings,
        co: cost_model.Coefficients,
        now: float,
        wall: float,
        pod: str = "",
        place: PodNames = PodNames(),  # noqa: B008 - frozen
    ) -> None:
        self._settings = settings
        self._co = co
        self._place = place
        self._first_tokens, self._output_tokens = RecentTimes(), RecentTimes()
        self.gpu_count = GpuCount()
        self._watts: float | None = None  # of a GPU
        self.ledger = Ledger(co, ClientLabels(settings.max_tenants))
        self.name_tenants(())
        self._models: tuple[str, ...] = ()
        self.health = HealthMonitor(settings, now, wall, pod)
        self.coefficients = CoefficientMonitor(co, now, follows=settings.capacity == "measured")
        self.latency = LatencyPredictor(co, max(0, settings.max_concurrent - 1))
        self._objectives = summary.Objectives(settings.slo_seconds, settings.slo_ttft_seconds)
        self._engine_cache = EngineCache()
        self._canaries = CanaryUse()
        self._images = summary.ImageSums()

    # --- events ---

    def on_event(self, relay: int, event: Event) -> Settlement | None:
        """Record one event. Returns the settlement when it ended a request."""
        settlement = self.ledger.apply(relay, event)
        hold = self.ledger.hold((relay, event.id)) if isinstance(event, Admitted | FirstToken) else None
        if isinstance(event, Admitted | FirstToken | Delivered | RequestBlocked):
            self.latency.apply((relay, event.id), event, hold)
        self.health.on_event(relay, event, hold)
        if isinstance(event, FirstToken) and hold is not None and hold.admitted.stream:
            self._first_tokens.add(event.at, event.at - hold.admitted.at)
        if settlement is not None:
            if settlement.output_token_s is not None:
                self._output_tokens.add(settlement.settled.at, settlement.output_token_s)
            self.latency.end((relay, settlement.admitted.id), settlement.settled.at)
            self.coefficients.settled(settlement)
            pace = None if settlement.slowed else settlement.pace
            self.health.on_settlement(settlement.settled, settlement.admitted, pace)
        if isinstance(event, ImagePrepared):
            self._images.add(event)
        return settlement

    def relay_lost(self, relay: int, now: float) -> list[Settlement]:
        """Settle what a dead relay held."""
        self.health.relay_lost(relay, now)
        lost = self.ledger.lose(relay, now)
        for settlement in lost:
            self.latency.end((relay, settlement.admitted.id), now)
            self.coefficients.settled(settlement)
            self.health.on_event(relay, settlement.settled, None)
        return lost

    def canary_ended(self, result: CanaryResult) -> CanaryResult:
        """Record a canary's end. Returns it as it counts."""
        result = self.health.canary_ended(result)
        if result.outcome == "ok":
            self._canaries = add_canary(self._canaries, result, self._co)
        return result

    def price_terms(self, work: RequestSize) -> tuple[tuple[str, float], ...]:
        """The price of a request in milliseconds of all GPUs by cause, by the coefficients in use."""
        return tuple((name, ms * self.gpu_count.gpus) for name, ms in cost_model.by_cause(work, self.coefficients.co))

    @property
    def gpu_price(self) -> GpuPrice:
        """The current price of the engine's time, as far as it is known."""
        return GpuPrice(self.gpu_count.gpus, self._settings.dollars_per_gpu_hour, self._watts)

    @property
    def is_gpu_count_assumed(self) -> bool:
        """Whether a GPU price is set but the number of GPUs is a guess: a rank may have several."""
        return self._settings.dollars_per_gpu_hour > 0 and self.gpu_count.source in ("", "ranks")

    def name_tenants(self, names: Iterable[str]) -> None:
        """The tenants configured by an operator; they always have a label."""
        self.ledger.labels.give(tenants=(*names, DEFAULT_TENANT))

    # --- ticks ---

    def tick(self, readings: TickReadings, now: float, wall: float) -> Snapshot:
        """Evaluate health and return the snapshot that all reports render."""
        self._name_models(readings.identity.models)
        self._count_gpus(readings)
        sample = readings.sample or EngineSample()
        self._engine_cache.read(sample.cache_lookups, sample.cached_tokens)
        self.latency.slowness = self.coefficients.capacity.slowness
        self.latency.tick(sample, now)
        self.health.tick(readings, self.ledger.holds(), now, wall)
        self._check_coefficients(readings, now)
        return self._snapshot(readings, now, wall)

    def _name_models(self, models: tuple[str, ...]) -> None:
        """Models listed by the engine always have a label, even while a restarted engine lists none yet."""
        if models and models != self._models:
            self._models = models
            self.ledger.labels.give(models=models)

    def _count_gpus(self, readings: TickReadings) -> None:
        """The engine's GPUs; the last count stays valid while no new reading is available."""
        ranks = len(readings.sample.ranks) if readings.sample else 0
        settings = self._settings
        found = count_gpus(settings.gpus, settings.gpu, readings.identity, ranks, readings.gpus)
        self.gpu_count = found if found.source else self.gpu_count
        self._watts = mean_watts(readings.gpus)

    def _check_coefficients(self, readings: TickReadings, now: float) -> None:
        """Compare the coefficients with the work that was done; while they are stale, allow longer silences."""
        gpus = readings.gpus.value if isinstance(readings.gpus, Value) else ()
        slowdowns = {why for gpu in gpus if isinstance(gpu.slowdowns, Value) for why in gpu.slowdowns.value}
        names = tuple(gpu.name for gpu in gpus)
        engine = replace(readings.identity, gpus=names, slowdowns=tuple(sorted(slowdowns)))
        self.coefficients.tick(self.ledger.holds(), now, engine, trusted=self.health.is_usual)
        factor = coefficient_monitor.STALE_MARGIN_FACTOR if self.coefficients.stale else 1.0
        self.health.set_margin(PREDICTION_MARGIN * factor)

    # --- over a restart of the sidecar ---

    def save(self) -> SavedState:
        """What the next process of the sidecar should know."""
        health = self.health.save()
        values = {field.name: getattr(health, field.name) for field in fields(health)}
        return SavedState(**values, drift=self.coefficients.drift.memory)

    def restore(self, saved: SavedState, now: float, *, same: bool) -> None:
        """Restore saved state. `same`: it was saved for the engine process that is running now."""
        self.health.restore(saved, now, same=same)
        self.coefficients.restore(saved.drift)

    # --- reports ---

    def _snapshot(self, readings: TickReadings, now: float, wall: float) -> Snapshot:
        health, settings = self.health, self._settings
        return Snapshot(
            at=now,
            at_wall=wall,
            version=__version__,
            engine_kind=readings.engine_kind,
            draining=health.draining,
            verdict=health.verdict,
            progress_age=health.evidence.age,
            silence_allowed=health.evidence.allowed,
            silence_ruled_by=health.evidence.ruled_by,
            load=self._load(readings, now),
            tenants=summary.tenants_of(self.ledger),
            images=self._images.use(),
            images_device="off" if settings.images == "off" else settings.images_device,
            engine=readings.engine,
            gpus=readings.gpus,
            own=readings.own,
            own_lag=health.lag,
            relays=readings.relays,
            canary=health.canaries.last,
            canary_outstanding_since=health.canaries.since,
            changes=tuple(health.changes),
            diagnoses=readings.diagnoses,
            kills=health.kill_policy.state.kills_total,
            kills_by_reason=tuple(kills_by_reason(health.kill_policy.state.kills).items()),
            handover=health.kill_policy.state.handover,
            canaries=replace(self._canaries, garbage=health.garbage.found, usable=health.canary_usable),
            prices=self.coefficients.use(),
            engine_gpus=self.gpu_count.gpus,
            place=self._place,
            models=readings.identity.models,
            engine_version=readings.identity.engine,
            probes=tuple((kind, probes.passes(kind, health.probe_state())) for kind in probes.KINDS),
            latencies=RecentLatencies(self._first_tokens.percentiles(now), self._output_tokens.percentiles(now)),
        )

    def _load(self, readings: TickReadings, now: float) -> Load:
        sample = readings.sample or EngineSample()
        forecast, slowness = self.latency.forecast(now), self.coefficients.capacity.slowness
        load = summary.load_of(self.ledger, self._co, self._objectives, sample.kv_usage, forecast, now, slowness)
        return replace(
            load,
            coefficients_stale=bool(self.coefficients.stale),
            cached_share=self._engine_cache.share,
            objectives=(("seconds", self._objectives.request), ("ttft_seconds", self._objectives.ttft)),
        )


def add_canary(use: CanaryUse, result: CanaryResult, co: cost_model.Coefficients) -> CanaryUse:
    """The canaries with one more that passed: no tenant's work, so they are counted here."""
    output = 1 if result.digest else 0  # an embedding has no output tokens
    mu = cost_model.mu(RequestSize(uncached=result.prompt_tokens, output=output), co)
    return CanaryUse(use.passed + 1, use.mu + mu, use.tokens + result.prompt_tokens + output)
