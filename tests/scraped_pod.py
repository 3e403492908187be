"""A pod whose sidecar is scraped each minute, on a simulated clock: the real control state, fan-out and metrics.

What happens is scripted (users, the engine's port, canaries, GPUs); what the pages say is the sidecar's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from prometheus_client.parser import text_string_to_metric_families

from sidecar.control.state import ControlState
from sidecar.events import (
    Admitted,
    CanaryResult,
    Delivered,
    Event,
    FirstToken,
    Outcome,
    RequestSize,
    Settled,
    Usage,
)
from sidecar.health.monitor import TICK_S, TickReadings
from sidecar.load.cost_model import Coefficients, unit_ms
from sidecar.readings import Absent, EngineIdentity, EngineSample, GpuSample, ProcessSample, Reading, Value
from sidecar.report.fan_out import FanOut
from sidecar.report.metrics import Metrics
from sidecar.report.prometheus import MetricsPages
from sidecar.report.tracing import Tracing
from sidecar.settings import Settings
from sidecar.snapshot import RelayUse

MINUTE_S = 60.0
WALL = 1_700_000_000.0
NOTHING = Absent("not here")
GPU = GpuSample(
    *(0, "H100", "GPU-0", Value(0.9, 0.0), Value(1 << 30, 0.0), Value(80 << 30, 0.0), Value(600.0, 0.0)),
    *(Value(60.0, 0.0), (), None),
    xids_watched=True,
)
Key = tuple[str, tuple[tuple[str, str], ...]]


@dataclass
class ScrapedPod:
    """A sidecar next to a scripted engine. `pages`: what each minute's scrape got; None where there was no answer.

    `canary`: how canaries end; `digest`: what they are answered; `resting`: why the engine says that it rests; `up`:
    whether the sidecar answers scrapes.
    """

    co: Coefficients = field(default_factory=Coefficients)
    page: Reading[EngineSample] = NOTHING
    gpus: Reading[tuple[GpuSample, ...]] = field(default_factory=lambda: Value((GPU,), 0.0))
    canary: str = "ok"
    digest: str = "a"
    refused: bool = False
    resting: str = ""
    lag: float = 0.001
    open_files: int = 50
    models: tuple[str, ...] = ()
    up: bool = True
    now: float = 1000.0
    pages: list[str | None] = field(default_factory=list)
    requests: int = 0

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """The sidecar starts, or starts again: it counts from 0."""
        self.control = ControlState(Settings(engine="http://engine"), self.co, self.now, WALL + self.now)
        self.metrics = Metrics()
        priced = self.co.fingerprint, unit_ms(self.co)
        self.fan_out = FanOut(
            self.metrics, Tracing("", "0"), None, self.control.ledger.labels, self.control.price_terms, *priced
        )
        self._refused_since: float | None = None
        self._canary_sent: tuple[float, float] | None = None

    # --- what happens ---

    def event(self, event: Event) -> None:
        settlement = self.control.on_event(0, event)
        if settlement is not None:
            self.fan_out.on_settlement(settlement, self.control.gpu_price, WALL + self.now)
        else:
            self.fan_out.on_event(event)

    def admit(self, tokens: int = 500, output: int = 64) -> str:
        self.requests += 1
        size = RequestSize(tokens, output=output)
        self.event(Admitted(str(self.requests), self.now, "t", "m", "chat", True, size, output, 1.0))
        return str(self.requests)

    def settle(self, id: str, outcome: Outcome = "ok", first_at: float | None = None) -> None:
        usage, status = (Usage(500, 64), 200) if outcome == "ok" else (None, 500)
        self.event(Settled(id, self.now, outcome, status, usage, 64, 256, first_at, self.now, 0.0004))

    def serve(self, count: int, *, first_token_s: float = 0.2, outcome: Outcome = "ok") -> None:
        """So many streams begin together, and end with their first token."""
        ids = [self.admit() for _ in range(count)]
        ticks = math.ceil(first_token_s / TICK_S)
        for _ in range(ticks):
            self._tick(first_token_s / ticks)
        for id in ids:
            if outcome == "ok":
                self.event(FirstToken(id, self.now))
                self.event(Delivered(id, self.now, 64, 256))
            self.settle(id, outcome, self.now if outcome == "ok" else None)

    # --- time ---

    def run(self, minutes: int, *, streams_per_minute: int = 0, decoding: Iterable[str] = ()) -> None:
        """Time passes, with users who are served, and open streams that move on; a scrape each minute."""
        for _ in range(minutes):
            ends = self.now + MINUTE_S
            self.serve(streams_per_minute)
            while self.now < ends:
                for id in decoding:
                    self.event(Delivered(id, self.now, 1, 4))
                self._tick(TICK_S)
            self.scrape()

    def scrape(self) -> None:
        self.pages.append(MetricsPages(self.metrics.registry, seconds=0).text() if self.up else None)

    def fresh_page(self) -> str:
        """What the first scrape gets, after one tick."""
        self._tick(TICK_S)
        return MetricsPages(self.metrics.registry, seconds=0).text()

    def until(self, state: str, minutes: int = 30) -> None:
        """Time passes until the verdict is `state`."""
        for _ in range(minutes):
            if self.control.health.verdict.state == state:
                return
            self.run(1)
        verdict = self.control.health.verdict
        raise AssertionError(f"never {state}, but {verdict.state} ({verdict.reason})")

    def _tick(self, seconds: float) -> None:
        self.now += seconds
        self._end_canary()
        self._refused_since = (self._refused_since or self.now) if self.refused else None
        health = self.control.health
        readings = TickReadings(
            engine=replace(self.page, at=self.now) if isinstance(self.page, Value) else self.page,
            gpus=self.gpus,
            own=Value(ProcessSample(1, 50_000_000, 3.0, 4, 30, 1024), self.now),
            relays=(RelayUse(0, 10, 0, 0, self.lag, 0.1, self.open_files, 1024),),
            refused_since=self._refused_since,
            engine_kind="vllm",
            resting=self.resting,
            identity=EngineIdentity(models=self.models),
            is_fcfs=True,
        )
        self.metrics.update(self.control.tick(readings, self.now, WALL + self.now))
        if health.has_changed:
            self.fan_out.on_decision(health.verdict)
        for _, command in health.take_aborts():
            self.fan_out.on_decision(command)
        if (allowed := health.canary_due()) is not None and not self.refused:
            health.canary_sent(self.now)
            self._canary_sent = self.now, allowed

    def _end_canary(self) -> None:
        if self._canary_sent is None:
            return
        started, allowed = self._canary_sent
        if self.canary == "starved" and self.now - started < allowed:
            return
        self._canary_sent = None
        digest = self.digest if self.canary == "ok" else ""
        result = CanaryResult(self.canary, started, self.now, allowed, digest=digest, prompt_tokens=4)  # type: ignore[arg-type]
        self.fan_out.on_decision(self.control.canary_ended(result))


def samples(page: str | None) -> dict[Key, float]:
    """Every sample of a page, as a scraper reads it."""
    families = text_string_to_metric_families(page or "")
    return {
        (s.name, tuple(sorted(s.labels.items()))): s.value
        for f in families
        for s in f.samples
        if not s.name.endswith("_created")
    }


def promtool_series(pages: Iterable[str | None], used: Iterable[str]) -> list[dict[str, str]]:
    """The pages as input series of a promtool test, one value a minute: those of the metrics `used`, and `up`.

    A series that ends, or whose page is missing, becomes stale, as Prometheus has it.
    """
    read, names = [samples(page) for page in pages], set(used)
    found: dict[Key, list[str]] = {("up", ()): ["1" if page else "0" for page in read]}
    for at, page in enumerate(read):
        for key in page:
            if key[0] in names and key not in found:
                found[key] = ["_"] * at
        for key, values in found.items():
            if key[0] == "up":
                continue
            if key in page:
                values.append(repr(page[key]))
            else:
                values.append("stale" if values[-1] not in ("_", "stale") else "_")
    return [
        {"series": written(name, dict(labels)), "values": " ".join(values)} for (name, labels), values in found.items()
    ]


def written(name: str, labels: dict[str, str]) -> str:
    """A series as PromQL has it, with what Prometheus adds to those of a target."""
    inside = ", ".join(f'{label}="{value}"' for label, value in {"job": "llm", "instance": "a", **labels}.items())
    return f"{name}{{{inside}}}"
