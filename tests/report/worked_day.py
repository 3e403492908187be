"""A day of three engines on a simulated clock, with the production ledger, price, usage records and log of requests.

Three tenants: `shop` chats and runs agents whose prompts are mostly cached, `search` embeds texts, `media` describes
pictures and transcribes recordings. Clients leave, the chat engine fails now and then, hangs once and is restarted,
and a control process is killed. Everything follows from the seed.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from sidecar.events import Admitted, Delivered, FirstToken, Outcome, RequestSize, Settled, Usage
from sidecar.load.cost_model import Coefficients, unit_ms
from sidecar.load.gpu_price import GpuPrice
from sidecar.load.ledger import Ledger
from sidecar.load.roofline import roofline
from sidecar.report.fan_out import FanOut
from sidecar.report.metrics import Metrics
from sidecar.report.request_log import RequestLog
from sidecar.report.tracing import Tracing
from sidecar.report.usage_rows import DAY_S, HOUR_S, MINUTE_S
from sidecar.report.usage_store import UsageStore

MIDNIGHT: Final = 1_795_478_400  # 2026-11-24 00:00 UTC
WRITE_INTERVAL_S: Final = 10 * MINUTE_S  # production writes each second, which a simulation need not
MONOTONIC: Final = 5000.0  # the clock of the machine, then
LAST_ARRIVAL_S: Final = DAY_S - 15 * MINUTE_S  # so that all end within the day
HANGS_AT, KILLED_AT, SERVES_AT = (round(hour * HOUR_S) for hour in (14.15, 14.18, 14.25))
CONTROL_KILLED_AT: Final = 9 * HOUR_S + 17
_LLAMA: Final = {"model_type": "llama", "intermediate_size": 28672, "vocab_size": 128_256, "torch_dtype": "bfloat16"}
_LLAMA_70B: Final = _LLAMA | {
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
_EMBEDDER: Final = {
    "model_type": "qwen3",
    "hidden_size": 2560,
    "num_hidden_layers": 36,
    "intermediate_size": 9728,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_665,
    "torch_dtype": "bfloat16",
}


DayEvent = Admitted | FirstToken | Delivered | Settled


@dataclass(frozen=True, slots=True)
class DayEngine:
    """An engine of the day: its model, its GPUs, what an hour of one costs."""

    model: str
    co: Coefficients
    price: GpuPrice


ENGINES: Final = {
    "chat": DayEngine("llama-70b", roofline(_LLAMA_70B, "H100", 2), GpuPrice(2, 2.50, 480.0)),
    "embed": DayEngine("embedder-4b", roofline(_EMBEDDER, "L40S", 1), GpuPrice(1, 0.90, 210.0)),
    "audio": DayEngine(
        "whisper", replace(roofline({}, "L40S", 1), fingerprint="whisper-l40s"), GpuPrice(1, 0.90, 160.0)
    ),
}
INVOICE: Final = sum(24 * of.price.gpus * of.price.dollars_per_gpu_hour for of in ENGINES.values())


@dataclass(frozen=True, slots=True)
class DayRequest:
    """One request: when, whose, of which kind, its size, what comes of it. `share`: of the answer that is delivered."""

    at: float
    tenant: str
    kind: str
    route: str
    size: RequestSize
    outcome: Outcome
    share: float = 1.0


def requests_of(engine: str, rng: random.Random) -> Iterator[DayRequest]:
    """The day's requests of one engine, in order of their times."""
    kinds = {
        "chat": (("shop", "chat", 0.12), ("shop", "agents", 0.10), ("media", "pictures", 0.03)),
        "embed": (("search", "embeddings", 0.05), ("shop", "embeddings", 0.01)),
        "audio": (("media", "audio", 0.04),),
    }[engine]
    streams = [_arrivals(tenant, kind, rate, rng) for tenant, kind, rate in kinds]
    yield from heapq.merge(*streams, key=lambda request: request.at)


def _arrivals(tenant: str, kind: str, rate: float, rng: random.Random) -> Iterator[DayRequest]:
    at = 0.0
    while (at := at + rng.expovariate(2 * rate)) < LAST_ARRIVAL_S:
        # From a fifth of the peak at 3 o'clock to the peak at 15 o'clock.
        if rng.random() < 0.6 - 0.4 * math.cos((at / HOUR_S - 3) * math.pi / 12):
            yield _request(at, tenant, kind, rng)


def _request(at: float, tenant: str, kind: str, rng: random.Random) -> DayRequest:
    outcome, share = _fate(kind, rng)
    out = min(4000, int(rng.lognormvariate(5.7, 0.8)) + 1)
    match kind:
        case "agents":
            prompt = min(120_000, int(rng.lognormvariate(9.9, 0.6)))
            cached = int(prompt * rng.uniform(0.85, 0.97))
            return DayRequest(at, tenant, kind, "chat", RequestSize(prompt - cached, cached, out), outcome, share)
        case "pictures":
            images = rng.randrange(1, 4)
            size = RequestSize(
                images * 1200 + rng.randrange(50, 400), 0, out, images * 1200, images, image_squares=images * 1200**2
            )
            return DayRequest(at, tenant, kind, "chat", size, outcome, share)
        case "embeddings":
            texts = rng.choice((1, 32, 64, 128))
            size = RequestSize(texts * rng.randrange(100, 900), prompts=texts, sequences=texts)
            return DayRequest(at, tenant, kind, "embeddings", size, outcome, share)
        case "audio":
            seconds = rng.uniform(20, 1800)
            size = RequestSize(4, output=int(seconds * 2.5), audios=1, audio_seconds=seconds)
            return DayRequest(at, tenant, kind, "transcriptions", size, outcome, share)
        case _:
            prompt = min(16_000, int(rng.lognormvariate(6.8, 0.9)))
            cached = prompt // 3 if rng.random() < 0.3 else 0
            return DayRequest(at, tenant, kind, "chat", RequestSize(prompt - cached, cached, out), outcome, share)


def _fate(kind: str, rng: random.Random) -> tuple[Outcome, float]:
    """Some clients leave, most of them during an answer; some requests fail, half of those before it begins."""
    luck = rng.random()
    if luck < 0.005:
        return "engine_error", rng.choice((0.0, rng.random()))
    if kind in ("chat", "agents", "pictures") and luck < 0.035:
        return "client_cancelled", rng.choice((0.0, rng.random(), rng.random()))
    return "ok", 1.0


class DayPod:
    """One engine's sidecar: control's reports, fed with what its relay would report."""

    def __init__(self, engine: str, folder: Path, rng: random.Random) -> None:
        self.engine, self.name, self._rng = ENGINES[engine], engine, rng
        self.folder = folder / engine
        self.folder.mkdir(parents=True)
        self.sent: list[DayRequest] = []
        self._ids, self._order = itertools.count(1), itertools.count()
        self._events: list[tuple[float, int, DayEvent]] = []
        self._open: dict[str, list[DayEvent]] = {}
        self._start(0.0)

    def run(self) -> None:
        """The whole day."""
        minute = MINUTE_S
        for request in requests_of(self.name, self._rng):
            while minute <= request.at:
                self._tick(float(minute))
                minute += MINUTE_S
            self._send(request)
        while minute <= DAY_S:
            self._tick(float(minute))
            minute += MINUTE_S

    # --- what the relay reports ---

    def _send(self, request: DayRequest) -> None:
        """The events of one request: what the engine does with it, and how it ends."""
        hangs, killed, serves = (HANGS_AT, KILLED_AT, SERVES_AT) if self.name == "chat" else (math.inf,) * 3
        size, at, id = request.size, request.at, f"{self.name}-{next(self._ids)}"
        stream = request.route == "chat"
        self.sent.append(request)
        self._push(
            at, Admitted(id, _now(at), request.tenant, self.engine.model, request.route, stream, size, None, 1.0)
        )
        if killed <= at < serves:  # refused at once
            self._settle(id, request, at, "stalled", 503, sent=False)
            return
        seconds = unit_ms(self.engine.co) / 1000
        first = at + self._rng.uniform(0.05, 0.4) + seconds * size.uncached / 3500
        ends = first + max(size.output * self._rng.uniform(0.02, 0.04), 0.01)
        if request.outcome == "client_cancelled" and request.share == 0.0:
            self._settle(id, request, at + (first - at) * self._rng.random(), "client_cancelled", 0)
        elif request.outcome == "engine_error" and request.share == 0.0:
            self._settle(id, request, at + (first - at) * self._rng.random(), "engine_error", 500)
        else:
            end = first + (ends - first) * request.share
            if end < hangs or at >= serves:
                self._first(id, first, stream)
                self._settle(id, request, end, request.outcome, 200, first, delivered=request.share)
            else:  # it hangs, and is aborted when the engine is killed
                share = max(0.0, (hangs - first) / (ends - first))
                if first < hangs:
                    self._first(id, first, stream)
                self._settle(id, request, killed, "stalled", 200, first if first < hangs else None, delivered=share)

    def _first(self, id: str, at: float, stream: bool) -> None:
        if stream:
            self._push(at, FirstToken(id, _now(at)))

    def _settle(
        self,
        id: str,
        request: DayRequest,
        at: float,
        outcome: Outcome,
        status: int,
        first: float | None = None,
        *,
        delivered: float = 0.0,
        sent: bool = True,
    ) -> None:
        size, stream = request.size, request.route == "chat"
        tokens = int(size.output * delivered) if stream else 0
        prompt = size.uncached + size.cached
        usage = Usage(prompt, size.output, size.cached, size.audio_seconds) if outcome == "ok" else None
        if tokens:
            self._push(at, Delivered(id, _now(at), tokens, 4 * tokens))
        first_at, sent_at = (
            (_now(first) if stream and first is not None else None),
            (_now(request.at) if sent else None),
        )
        done = Settled(id, _now(at), outcome, status, usage, tokens, 4 * tokens, first_at, sent_at, 0.0004)
        self._push(at, done)

    def _push(self, at: float, event: DayEvent) -> None:
        heapq.heappush(self._events, (at, next(self._order), event))

    # --- what control does ---

    def _start(self, at: float) -> None:
        self._store, self._ledger = UsageStore(self.folder, 35, 64 << 20), Ledger(self.engine.co)
        self._log, co = RequestLog(self.folder, 64 << 20), self.engine.co
        reports: tuple[Any, ...] = (Metrics(), Tracing("", "0"), self._store, self._ledger.labels, lambda work: ())
        self._fan_out = FanOut(*reports, co.fingerprint, unit_ms(co), self._log)
        self._elapse(at)
        for event in itertools.chain.from_iterable(self._open.values()):  # relays repeat what is open
            self._ledger.apply(0, event)

    def _tick(self, until: float) -> None:
        """Handle the events until then, count the time that passed, write."""
        begins = until - MINUTE_S
        if self.name == "embed" and begins <= CONTROL_KILLED_AT < until:  # kill -9, and 4 s later there is another one
            self._handle(CONTROL_KILLED_AT)
            self._write(CONTROL_KILLED_AT - 1.0)
            self._start(CONTROL_KILLED_AT + 4.0)
        self._handle(until)
        if until % WRITE_INTERVAL_S == 0:
            self._write(until)
        else:
            self._elapse(until)

    def _handle(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            at, _, event = heapq.heappop(self._events)
            self._open.setdefault(event.id, []).append(event)
            settlement = self._ledger.apply(0, event)
            if settlement is not None:
                del self._open[event.id]
                self._fan_out.on_settlement(settlement, self.engine.price, MIDNIGHT + at)

    def _write(self, at: float) -> None:
        self._elapse(at)
        self._store.write(self._store.take(), MIDNIGHT + at)
        self._log.write(self._log.take())

    def _elapse(self, at: float) -> None:
        self._store.elapse(_now(at), MIDNIGHT + at, self.engine.price, self.engine.co.fingerprint)


def _now(at: float) -> float:
    return MONOTONIC + at


def simulate(folder: Path, seed: int = 1) -> dict[str, DayPod]:
    """The day of all engines, whose records are in a folder each."""
    pods = {name: DayPod(name, folder, random.Random(f"{seed}:{name}")) for name in ENGINES}
    for pod in pods.values():
        pod.run()
    return pods
