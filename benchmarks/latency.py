"""Predicted against actual time to first token: request traces on a simulated engine, or a running sidecar's own error.

    .venv/bin/python benchmarks/latency.py [--traces DIR] [--loads 0.5 0.8] [--seconds 3600] [--write]
    .venv/bin/python benchmarks/latency.py --relay URL --admin URL --model NAME [--rates 2] [--requests 300] [--write]
    .venv/bin/python benchmarks/latency.py --vllm [--rates 10 20 30] [--requests 600] [--write]

Simulated: one replica of benchmarks/replay, a trace compressed in time to the given load. The predictor, ledger and
estimator are production code; coefficients are those that calibration finds from outside, or the default on an engine
four times slower. Load is the share of what the engine does if it is never idle. Each request is predicted when it is
admitted, from what is known then: neither its output, nor what of it is cached. "Queue length" is the same fit, given
the number of waiting requests instead.

Real: streams of mixed prompts of token ids through a relay in front of any engine, Poisson arrivals of each rate in
turn. "At admission" is the sidecar's own error over its last 200 streams; "asked before" that of `GET /load?in=...`
before a request is sent. `--vllm` starts both: vLLM with a tiny model on this machine's CPU (environment: `make
test-vllm`), and a sidecar with defaults, uncalibrated. Its client shares the cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import aiohttp
from calibration import ENVIRON, FLAGS
from replay import requests as traces
from replay.engine import Engine, Hardware, Sequence, busy_seconds
from replay.pricing import calibrated
from replay.requests import Request

from sidecar.events import Admitted, Delivered, FirstToken, Settled, Usage
from sidecar.load.cost_model import Coefficients
from sidecar.load.estimator import Estimator
from sidecar.load.latency_prediction import LatencyPredictor
from sidecar.load.least_squares import RelativeFit
from sidecar.load.ledger import Ledger
from sidecar.load.request_shape import RequestShape
from sidecar.readings import EngineSample
from tests.vllm import environment, processes

TICK_S, FLUSH_S = 0.5, 0.2  # of control, and of the relay's deliveries
WARM_UP = 100  # first tokens that are not scored
SLOWER = 4.0
COLUMNS = (
    "trace",
    "load",
    "coefficients",
    "TTFT p50, s",
    "p99, s",
    "median error",
    "P90",
    "MAPE",
    "queue length",
    "its P90",
)
REAL_COLUMNS = (
    *("requests/s", "requests", "TTFT p50, s", "p99, s", "at admission: median error", "P90"),
    *("asked before: median error", "P90", "queue length", "its P90"),
)
VOCABULARY, MAX_PROMPT = 250, 4000  # token ids that any tokenizer has, byte-level ones included


@dataclass
class Score:
    """Predicted and actual times to first token."""

    pairs: list[tuple[float, float]] = field(default_factory=list)

    def errors(self) -> list[float]:
        return sorted(abs(predicted / actual - 1) for predicted, actual in self.pairs[WARM_UP:])

    def quantile(self, q: float) -> float:
        errors = self.errors()
        return errors[int(q * (len(errors) - 1))] if errors else math.nan


class Replica:
    """An engine with the sidecar's ledger, estimator and predictor."""

    def __init__(self, hardware: Hardware, co: Coefficients) -> None:
        self.engine, self.co = Engine(hardware, random.Random("latency")), co
        self.ledger, self.estimator, self.predictor = Ledger(co), Estimator(co), LatencyPredictor(co)
        self.ours, self.queue_length = Score(), Score()
        self._by_queue = RelativeFit(2, 0.99, 0.1, 10)
        self._asked: dict[str, tuple[float, tuple[float, float], float]] = {}
        self._flushed = 0.0

    def run(self, requests: list[Request]) -> None:
        """Serve all requests."""
        ticked = 0.0
        coming, number = iter(requests), 0
        request = next(coming, None)
        while request is not None or self.engine.open:
            due = min(self.engine.next_at, request.at if request else float("inf"), ticked + TICK_S)
            if due == ticked + TICK_S:
                ticked = due
                self._tick(due)
            elif request is not None and due == request.at:
                number += 1
                self._arrive(f"r{number}", request)
                request = next(coming, None)
            else:
                self._step(due)

    def _tick(self, now: float) -> None:
        self._flush(now)
        engine = self.engine
        usage = 1 - max(0, engine.room) / engine.hardware.kv_tokens
        running = len(engine.prefilling) + len(engine.decoding)
        sample = EngineSample(running, len(engine.waiting), usage, kv_capacity_tokens=engine.hardware.kv_tokens)
        self.predictor.tick(sample, now)
        self._by_queue.solve()

    def _arrive(self, id: str, request: Request) -> None:
        now, key = request.at, (0, id)
        shape = RequestShape(model="m", stream=True, text_bytes=request.text_bytes)
        estimate = self.estimator.estimate("t", shape, [])
        event = Admitted(id, now, "t", "m", "chat", True, estimate.work, None, estimate.mu, tail=estimate.tail)
        self.ledger.apply(0, event)
        row = (0.05, 0.05 * self.ledger.in_flight().waiting)
        self.predictor.apply(key, event, self.ledger.hold(key))
        self._asked[id] = self.predictor.predicted(key), row, self._by_queue.predict(row)
        self.engine.arrive(Sequence(id, request, now), now)

    def _step(self, now: float) -> None:
        self._flush(now, every=FLUSH_S)
        first, ended = self.engine.step(now)
        for s in first:
            event = FirstToken(s.id, now)
            predicted, row, by_queue = self._asked.pop(s.id)
            took = now - s.arrived
            if predicted:
                self.ours.pairs.append((predicted, took))
            self.queue_length.pairs.append((by_queue, took))
            self._by_queue.add(row, took)
            self.ledger.apply(0, event)
            self.predictor.apply((0, s.id), event, None)
        for s in ended:
            usage = Usage(s.request.prompt, s.request.output, s.cached)
            self.ledger.apply(0, Settled(s.id, now, "ok", 200, usage, s.request.output, 0, s.first_at, s.arrived, 0.0))
            self.predictor.end((0, s.id), now)
            self.estimator.learn("t", RequestShape(model="m", text_bytes=s.request.text_bytes), usage)

    def _flush(self, now: float, every: float = 0.0) -> None:
        if now - self._flushed < every:
            return
        self._flushed = now
        for s in self.engine.decoding.values():
            given = self.engine.generated(s, now)
            if given > s.reported:
                event = Delivered(s.id, now, given - s.reported, 0)
                self.ledger.apply(0, event)
                self.predictor.apply((0, s.id), event, None)
                s.reported = given


def simulated(folder: Path, loads: list[float], seconds: float) -> str:
    """The table of all traces."""
    rows = []
    for name, requests in (
        traces.load(folder) if folder.is_dir() else {"synthetic": traces.synthetic(seconds, 3)}
    ).items():
        requests = [r for r in requests if r.at < seconds]
        busy = busy_seconds(requests, Hardware())
        for load in loads:
            for slow in (1.0, SLOWER):
                hardware = Hardware() if slow == 1.0 else Hardware().slower(slow)
                co = calibrated(hardware)[0] if slow == 1.0 else Coefficients()
                replica = Replica(hardware, co)
                replica.run(traces.compressed(requests, load * requests[-1].at / (slow * busy)))
                taken = sorted(actual for _, actual in replica.ours.pairs)
                ours, other = replica.ours, replica.queue_length
                rows.append(
                    (
                        *(name, f"{load:g}", "calibrated" if slow == 1.0 else "default, 4x slower"),
                        *(f"{taken[len(taken) // 2]:.2f}", f"{taken[len(taken) * 99 // 100]:.2f}"),
                        *(f"{ours.quantile(0.5):.1%}", f"{ours.quantile(0.9):.1%}", f"{fmean(ours.errors()):.1%}"),
                        *(f"{other.quantile(0.5):.1%}", f"{other.quantile(0.9):.1%}"),
                    )
                )
                print("|", " | ".join(rows[-1]), "|", flush=True)
    return table(COLUMNS, rows)


def beside_vllm(rates: list[float], count: int) -> str:
    """The table of a sidecar beside a new vLLM. Raises SystemExit where its environment is missing."""
    if not environment.complete():
        raise SystemExit("the real vLLM is not installed: `make test-vllm` makes its environment (12 GB of disk)")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make = [str(environment.python()), str(processes.ROOT / "tests/vllm/tiny_models.py"), "text", name + "/model"]
        subprocess.run(make, check=True, env=os.environ | processes.ENGINE_ENV, timeout=120)
        with (
            processes.engine(folder / "model", folder / "engine.log", environ=ENVIRON, more=FLAGS) as engine,
            processes.sidecar(engine.url, folder / "state", folder / "sidecar.log", silence_floor="60") as sidecar,
        ):
            return asyncio.run(real(sidecar.url, sidecar.admin, processes.MODEL, rates, count))


async def real(relay: str, admin: str, model: str, rates: list[float], count: int) -> str:
    """The table of a running sidecar: a row per rate."""
    rows = []
    for rate in rates:
        print(f"{count} requests at {rate:g} a second", file=sys.stderr)
        rows.append((f"{rate:g}", *await measured(relay, admin, model, rate, count)))
    return table(REAL_COLUMNS, rows)


async def measured(relay: str, admin: str, model: str, rate: float, count: int) -> tuple[str, ...]:
    """A row of the table, without the rate."""
    rng, ours, queue_length, by_queue = random.Random(1), Score(), Score(), RelativeFit(2, 0.995, 0.1, 10)
    open_: set[asyncio.Task[None]] = set()
    async with (
        # aiohttp's limit of 100 connections would make requests wait in the client
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(600)) as session,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=16)) as asking,  # the admin port takes a few hundred
    ):

        async def one() -> None:
            prompt = [
                rng.randrange(5, VOCABULARY) for _ in range(min(MAX_PROMPT, max(8, int(rng.lognormvariate(6, 1)))))
            ]
            body = {"model": model, "prompt": prompt, "max_tokens": rng.randint(8, 96), "stream": True}
            async with asking.get(f"{admin}/load?in={len(prompt)}") as answer:
                load = await answer.json()
            row = (0.05, 0.05 * load["requests"]["waiting"])
            predicted, began = by_queue.predict(row), time.monotonic()
            async with session.post(f"{relay}/v1/completions", json=body) as answer:
                answer.raise_for_status()
                async for line in answer.content:
                    if line.startswith(b"data:"):
                        if b'"error"' in line:
                            raise SystemExit(f"the engine failed: {line[5:400].decode(errors='replace').strip()}")
                        break
                took = time.monotonic() - began
                await answer.read()
            ours.pairs.append((load["predicted"]["ttft_seconds"], took))
            queue_length.pairs.append((predicted, took))
            by_queue.add(row, took)
            by_queue.solve()

        for _ in range(count):
            open_.add(asyncio.create_task(one()))
            await asyncio.sleep(rng.expovariate(rate))
        await asyncio.gather(*open_)
        async with asking.get(f"{admin}/load") as answer:
            own = json.loads(await answer.text())["predicted"]["error"]
    taken = sorted(actual for _, actual in ours.pairs)
    return (
        *(str(len(taken)), f"{taken[len(taken) // 2]:.2f}", f"{taken[len(taken) * 99 // 100]:.2f}"),
        *(f"{own['median']:.1%}", f"{own['p90']:.1%}"),
        *(f"{score.quantile(q):.1%}" for score in (ours, queue_length) for q in (0.5, 0.9)),
    )


def table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, ("---",) * len(columns), *rows))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--traces", type=Path, default=Path("none"), help="folder of real traces; default: a synthetic one"
    )
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.8])
    parser.add_argument("--seconds", type=float, default=3600.0, help="of each trace, at its own pace")
    parser.add_argument("--relay", default="", help="URL of a running relay")
    parser.add_argument("--admin", default="", help="URL of its admin port")
    parser.add_argument("--model", default="")
    parser.add_argument("--vllm", action="store_true", help="start a vLLM on this machine's CPU, and a sidecar")
    parser.add_argument("--rates", type=float, nargs="+", default=[2.0], help="requests per second")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--write", action="store_true")
    chosen = parser.parse_args()
    if chosen.vllm:
        text = beside_vllm(chosen.rates, chosen.requests)
    elif chosen.relay:
        text = asyncio.run(real(chosen.relay, chosen.admin, chosen.model, chosen.rates, chosen.requests))
    else:
        text = simulated(chosen.traces, chosen.loads, chosen.seconds)
    print(text)
    if chosen.write:
        kind = "vllm" if chosen.vllm else "real" if chosen.relay else "simulated"
        page = f"# Predicted time to first token, {kind}\n\n{text}\n"
        (Path(__file__).parent / "results" / f"latency-{kind}-{time.strftime('%Y-%m-%d')}.md").write_text(page)


if __name__ == "__main__":
    main()
