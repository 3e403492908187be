"""A fleet under a trace: replicas, each an engine with its sidecar's ledger and estimator, a router, an autoscaler.

The sidecar's part is production code: `Estimator` prices a request on arrival, `Ledger` holds and settles, `load_of`
computes the utilisation. Events reach the ledger as from the relay: admissions, first tokens and ends at once,
deliveries at the relay's flush interval.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

from replay.engine import Engine, Hardware, Sequence
from replay.pricing import SLO_S, calibrated
from replay.requests import Request
from replay.routing import Policy, Report, Router
from replay.scaling import Scaler, Scaling
from sidecar.events import Admitted, Delivered, FirstToken, RequestSize, Settled, Usage
from sidecar.load import cost_model
from sidecar.load.estimator import Estimator
from sidecar.load.latency_prediction import LatencyPredictor
from sidecar.load.ledger import Ledger
from sidecar.load.request_shape import RequestShape
from sidecar.load.summary import Objectives, load_of
from sidecar.readings import Absent, EngineSample
from sidecar.relay.open_requests import EVENT_FLUSH_INTERVAL_S
from sidecar.report import orca
from sidecar.snapshot import Load

MODEL = "model"
OBJECTIVES = Objectives(SLO_S, 2.0)  # as --slo-ttft-seconds


@dataclass(frozen=True, slots=True)
class Served:
    """One served request: seconds to the first token and per further token, replica, MU held and settled."""

    first: float
    per_token: float
    request: Request
    replica: int
    held: float
    mu: float


@dataclass(slots=True)
class Outcome:
    """A whole run. `gpu_seconds` counts each replica from its start command until it is gone."""

    served: list[Served] = field(default_factory=list)
    gpu_seconds: float = 0.0
    busy_seconds: float = 0.0
    preemptions: int = 0
    cached_tokens: int = 0
    most_replicas: int = 0
    ends_at: float = 0.0


class Replica:
    """An engine and its sidecar."""

    def __init__(self, index: int, hardware: Hardware, seed: str, began: float, serves_at: float) -> None:
        self.index = index
        self.engine = Engine(hardware, random.Random(f"{seed}:{index}"))
        self.co = calibrated(hardware)[0]
        self.ledger = Ledger(self.co)
        self.estimator = Estimator(self.co)
        self.latency = LatencyPredictor(self.co)
        self.report = Report()
        self._recently = orca.MovingMean()
        self.began, self.serves_at, self.gone_at = began, serves_at, math.inf
        self.draining = False
        self.flushing = False
        self.most = cost_model.max_mu_in_flight(self.co, SLO_S)
        self._shapes: dict[str, RequestShape] = {}

    @property
    def open(self) -> int:
        """Open requests."""
        return self.engine.open

    def admit(self, s: Sequence, now: float) -> RequestSize:
        """A request arrives through the relay. Returns its expected size."""
        shape = RequestShape(model=MODEL, stream=True, text_bytes=s.request.text_bytes)
        estimate = self.estimator.estimate("", shape, [])
        work, s.expected_mu = estimate.work, estimate.mu
        self._shapes[s.id] = shape
        event = Admitted(s.id, now, "", MODEL, "chat", True, work, None, s.expected_mu, tail=estimate.tail)
        self._apply(event)
        self.report.sent += 1
        self.engine.arrive(s, now)
        return work

    def step(self, now: float) -> list[tuple[Sequence, float]]:
        """The engine's steps end: (sequence that ended, settled MU)."""
        first, ended = self.engine.step(now)
        for s in first:
            self._apply(FirstToken(s.id, now))
        return [(s, self._settle(s, now)) for s in ended]

    def flush(self, now: float) -> None:
        """Report the tokens delivered since the last flush to the ledger."""
        for s in self.engine.decoding.values():
            given = self.engine.generated(s, now)
            if given > s.reported:
                self._apply(Delivered(s.id, now, given - s.reported, 0))
                s.reported = given

    def refresh_report(self, now: float, weights: bool) -> None:
        """The router reads the report; `weights`: also Envoy's weight from the ORCA report."""
        stock = self.ledger.in_flight()
        weight = 0.0
        if weights:
            load = self.load(now)
            fields = orca.report(load, Absent("simulated"), self._recently.mean(load.pressure, now)).fields
            weight = fields["rps_fractional"] / fields["application_utilization"]
        self.report = Report(stock.prefill_tokens + stock.decode_tokens, stock.mu / self.most, weight)

    def load(self, now: float) -> Load:
        """The content of /load."""
        engine = self.engine
        kv = 1 - max(0, engine.room) / engine.hardware.kv_tokens
        running = len(engine.prefilling) + len(engine.decoding)
        capacity = engine.hardware.kv_tokens
        self.latency.tick(EngineSample(running, len(engine.waiting), kv, kv_capacity_tokens=capacity), now)
        return load_of(self.ledger, self.co, OBJECTIVES, kv, self.latency.forecast(now), now)

    def _apply(self, event: Admitted | FirstToken | Delivered) -> None:
        self.ledger.apply(0, event)
        self.latency.apply((0, event.id), event, self.ledger.hold((0, event.id)))

    def true_work(self, now: float) -> float:
        """Remaining milliseconds of work, with all lengths known."""
        e, co = self.engine, self.co
        waiting = itertools.chain(e.waiting, e.prefilling)
        prefill = sum(co.a * (s.request.prompt - s.computed) + co.d * s.request.output for s in waiting)
        return prefill + co.d * sum(s.request.output - e.generated(s, now) for s in e.decoding.values())

    def _settle(self, s: Sequence, now: float) -> float:
        usage = Usage(s.request.prompt, s.request.output, s.cached)
        settled = self.ledger.apply(
            0, Settled(s.id, now, "ok", 200, usage, s.request.output, 0, s.first_at, s.arrived, 0.0)
        )
        assert settled is not None, "each request settles once"
        self.latency.end((0, s.id), now)
        self.estimator.learn("", self._shapes.pop(s.id), usage)
        return settled.mu


class Fleet:
    """Discrete events: arrivals, ends of steps, deliveries, the router's reads, the autoscaler's decisions."""

    def __init__(
        self,
        hardware: Many[Hardware],
        policy: Policy,
        seed: str,
        scaling: Scaling | None = None,
        flush: float = EVENT_FLUSH_INTERVAL_S,
    ) -> None:
        self.replicas = [Replica(i, h, seed, 0.0, 0.0) for i, h in enumerate(hardware)]
        self.outcome = Outcome(most_replicas=len(hardware))
        self._live = list(self.replicas)
        self._policy, self._seed, self._flush = policy, seed, flush
        self._router = Router(policy, random.Random(f"{seed}:router"))
        self._scaler = Scaler(scaling) if scaling else None
        self._events: list[tuple[float, int, str, Replica | None]] = []
        self._order = itertools.count()
        self._ids = itertools.count(1)
        self._looked = -1.0

    def run(self, requests: Many[Request]) -> Outcome:
        """Serve all requests, in order of their times."""
        coming = iter(requests)
        request = next(coming, None)
        if self._scaler:
            self._push(0.0, "scale")
        self._will_look(request)
        while request is not None or any(r.open for r in self._live):
            at = self._events[0][0] if self._events else math.inf
            if request is not None and request.at < at:
                self._arrive(request)
                request = next(coming, None)
                self._will_look(request)
                continue
            now, _, kind, replica = heapq.heappop(self._events)
            self._happen(kind, replica, now)
            self.outcome.ends_at = now
        return self._closed()

    def _push(self, at: float, kind: str, replica: Replica | None = None) -> None:
        heapq.heappush(self._events, (at, next(self._order), kind, replica))

    def _happen(self, kind: str, replica: Replica | None, now: float) -> None:
        if kind == "scale":
            self._scale(now)
        elif kind == "look":
            for each in self._serving(now):
                each.refresh_report(now, self._policy.signal == "weights")
        elif replica is not None and kind == "flush":
            replica.flush(now)
            replica.flushing = bool(replica.engine.decoding)
            if replica.flushing:
                self._push(now + self._flush, "flush", replica)
        elif replica is not None and now == replica.engine.next_at:  # else these steps were cut
            self._step(replica, now)

    def _will_look(self, request: Request | None) -> None:
        """Schedule the router's read; of its periodic reads only the last before an arrival matters."""
        if request is None or not self._policy.reads:
            return
        at = math.floor(request.at / self._policy.period) * self._policy.period
        if at > self._looked:
            self._looked = at
            self._push(at, "look")

    def _arrive(self, request: Request) -> None:
        now = request.at
        serving = self._serving(now)
        replica = serving[self._router.choose(serving, now)]
        s = Sequence(f"{next(self._ids)}", request, now)
        work = replica.admit(s, now)
        self._router.learn_price(s.expected_mu / replica.most, work.uncached + work.output)
        self._push(replica.engine.next_at, "step", replica)

    def _serving(self, now: float) -> list[Replica]:
        return [r for r in self._live if not r.draining and r.serves_at <= now]

    def _step(self, replica: Replica, now: float) -> None:
        for s, mu in replica.step(now):
            per = (now - s.first_at) / (s.request.output - 1) if s.request.output > 1 else 0.0
            self.outcome.served.append(Served(s.first_at - s.arrived, per, s.request, replica.index, s.expected_mu, mu))
            self.outcome.cached_tokens += s.cached
        if replica.engine.next_at < math.inf:
            self._push(replica.engine.next_at, "step", replica)
        if not replica.flushing and replica.engine.decoding and (self._policy.reads or self._scaler):
            replica.flushing = True
            self._push(now + self._flush, "flush", replica)
        if replica.draining and not replica.open:
            self._remove(replica, now)

    # --- autoscaling ---

    def _scale(self, now: float) -> None:
        assert self._scaler
        p = self._scaler.policy
        serving = self._serving(now)
        kept = [r for r in self._live if not r.draining]
        queue = sum(waiting_of(r, now) for r in serving) if p.drain else 0.0
        wanted = self._scaler.wanted(len(kept), sum(signal_of(r, p, now) for r in serving), now, queue)
        for _ in range(wanted - len(kept)):
            self._start(now)
        for replica in sorted(serving, key=lambda r: r.open)[: max(0, min(len(kept) - wanted, len(serving) - 1))]:
            replica.draining = True
            if not replica.open:
                self._remove(replica, now)
        self.outcome.most_replicas = max(self.outcome.most_replicas, len(self._live))
        self._push(now + p.every, "scale")

    def _start(self, now: float) -> None:
        assert self._scaler
        hardware = self.replicas[0].engine.hardware
        replica = Replica(len(self.replicas), hardware, self._seed, now, now + self._scaler.policy.startup)
        self.replicas.append(replica)
        self._live.append(replica)

    def _remove(self, replica: Replica, now: float) -> None:
        replica.gone_at = now
        self._live.remove(replica)

    def _closed(self) -> Outcome:
        end = self.outcome.ends_at
        self.outcome.gpu_seconds = sum(min(r.gone_at, end) - r.began for r in self.replicas if r.began < end)
        self.outcome.busy_seconds = sum(r.engine.busy_seconds for r in self.replicas)
        self.outcome.preemptions = sum(r.engine.preemptions for r in self.replicas)
        return self.outcome


def waiting_of(replica: Replica, now: float) -> float:
    """Seconds until one replica would begin the next request."""
    return (dict(replica.load(now).parts)["queue"] or 0.0) * OBJECTIVES.ttft


def signal_of(replica: Replica, policy: Scaling, now: float) -> float:
    """One replica's part of the autoscaler's signal."""
    signal = policy.signal
    if signal == "requests":
        return float(replica.open)
    load = replica.load(now)
    if signal == "utilization":
        return load.utilization
    if signal == "flow and queue":
        return dict(load.parts)["flow"] or 0.0
    return max(load.mu_in_flight / load.mu_max_in_flight, load.mu_per_minute / load.mu_max_per_minute)
