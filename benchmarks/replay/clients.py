"""Two weeks of production clients (ServeGen, arXiv 2505.09999), each as the traffic of one model's fleet.

A client has, for each of 2016 windows of ten minutes, a rate, and how irregular its arrivals are (the coefficient of
variation of the gaps between them); and for every six hours the quantiles of its lengths. Rates are scaled so that
PEAK_REPLICAS are busy in the busiest window; what a request costs is the production cost model's price
with the coefficients of the simulated engine.
"""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from replay.engine import Hardware
from replay.pricing import calibrated
from replay.requests import Request, request
from sidecar.events import RequestSize
from sidecar.load import cost_model

FILE = "servegen-two-weeks.jsonl.gz"
WINDOW_S = 600
PEAK_REPLICAS = 16
TOKEN_S = 0.03  # of a request in a full batch, per output token
CONTEXT_TOKENS = 128_000  # longer prompts are cut

Numbers = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class Client:
    """One client by window: requests per second after scaling, irregularity, seconds of a replica for each request.

    `second_moment` is the mean square of those seconds, `residence` how long a request is with a full engine, `prefill`
    the seconds of its prompt alone. `copies`: how often each request of the trace is sent; below 1, only that share of
    them is.
    """

    name: str
    rate: Numbers
    dispersion: Numbers  # of counts: their variance over their mean
    seconds: Numbers
    second_moment: Numbers
    residence: Numbers
    prefill: Numbers
    copies: float
    gaps: str = "irregular"  # or "Poisson": counts vary only as those of independent requests

    @property
    def demand(self) -> Numbers:
        """Replicas kept busy."""
        return self.rate * self.seconds

    @property
    def burstiness(self) -> float:
        """Peak over mean of the rates."""
        return float(self.rate.max() / self.rate.mean())


def shifts(client: Client, rng: random.Random) -> list[float]:
    """By how many seconds each copy is late. A single one is not: what it does at once, it does at once."""
    copies = max(1, round(client.copies))
    return [0.0] if copies == 1 else [rng.uniform(0, WINDOW_S) for _ in range(copies)]


def poisson(client: Client) -> Client:
    """The same client without irregular gaps."""
    return replace(client, dispersion=np.ones_like(client.dispersion), gaps="Poisson")


def load(folder: Path, hardware: Hardware) -> list[Client]:
    """All clients, the steadiest first."""
    return sorted((_client(row, hardware) for row in rows(folder)), key=lambda client: client.burstiness)


@lru_cache
def rows(folder: Path) -> tuple[dict[str, object], ...]:
    """The file as it is."""
    with gzip.open(folder / FILE, "rt") as file:
        return tuple(json.loads(line) for line in file)


def _client(row: dict[str, object], hardware: Hardware) -> Client:
    rate, cv = (np.array([x or 0.0 for x in row[name]]) for name in ("rate", "cv"))  # type: ignore[attr-defined]
    priced = {int(at): _priced(lengths, hardware) for at, lengths in row["lengths"].items()}  # type: ignore[attr-defined]
    times = sorted(priced)
    nearest = [min(times, key=lambda at, now=n * WINDOW_S: abs(at + 10_800 - now)) for n in range(len(rate))]
    seconds, moment, residence, prefill = np.array([priced[at] for at in nearest]).T
    copies = PEAK_REPLICAS / float((rate * seconds).max())
    # Independent copies keep the dispersion of one; of a thinned process, only its excess over Poisson's shrinks.
    dispersion = 1.0 + min(1.0, copies) * (np.maximum(cv, 0.2) ** 2 - 1.0)
    # Within a window, more than all of its requests cannot come at once.
    dispersion = np.clip(dispersion, 0.05, 1.0 + np.maximum(rate * min(1.0, copies) * WINDOW_S, 0.0))
    return Client(str(row["client"]), rate * copies, dispersion, seconds, moment, residence, prefill, copies)


def _priced(lengths: dict[str, list[float]], hardware: Hardware) -> tuple[float, float, float, float]:
    """Mean seconds, mean square, residence and prefill of requests whose lengths have these quantiles."""
    co = calibrated(hardware)[0]
    rng = random.Random(1)
    sizes = [_size(lengths, rng) for _ in range(400)]
    ms = [cost_model.gpu_ms(size, co) / 1000 for size in sizes]
    mean = sum(ms) / len(ms)
    outputs = sum(size.output for size in sizes) / len(sizes)
    prefill = sorted(cost_model.terms(size, co).before_first_token / 1000 for size in sizes)[len(sizes) // 2]
    return mean, sum(x * x for x in ms) / len(ms), prefill + outputs * TOKEN_S, prefill


def _size(lengths: dict[str, list[float]], rng: random.Random) -> RequestSize:
    prompt = min(CONTEXT_TOKENS, max(1, round(_draw(lengths["input_tokens"], rng))))
    return RequestSize(prompt, output=max(1, round(_draw(lengths["output_tokens"], rng))))


def _draw(quantiles: list[float], rng: random.Random) -> float:
    at = rng.random() * (len(quantiles) - 1)
    low = int(at)
    return quantiles[low] + (quantiles[min(low + 1, len(quantiles) - 1)] - quantiles[low]) * (at - low)


def arrivals(folder: Path, client: Client, start: float, seconds: float, seed: int) -> list[Request]:
    """Requests of a part of the two weeks, for discrete events.

    Gaps are drawn with each window's rate and irregularity, for each copy on its own and shifted in time.
    """
    row = next(row for row in rows(folder) if row["client"] == client.name)
    rng, found = random.Random(f"{client.name}:{start}:{seed}"), []
    late = shifts(client, random.Random(f"{client.name}:{seed}"))
    for shift in (-seconds_late for seconds_late in late):
        at = start - WINDOW_S
        while at < start + seconds:
            window = int((at + shift) // WINDOW_S) % len(client.rate)
            rate = float(client.rate[window]) / len(late)
            if rate <= 0:
                at = ((at + shift) // WINDOW_S + 1) * WINDOW_S - shift
                continue
            gap = _gap(rate, float(client.dispersion[window]), rng)
            following = ((at + shift) // WINDOW_S + 1) * WINDOW_S - shift
            if at + gap >= following:
                at = following  # gaps do not reach into the next window, which has a rate of its own
                continue
            at += gap
            if at >= start:
                lengths = _lengths(row, at)
                size = _size(lengths, rng)
                found.append(request(at - start, size.uncached, size.output))
    return sorted((r for r in found if r.at < seconds), key=lambda r: r.at)


def _gap(rate: float, dispersion: float, rng: random.Random) -> float:
    """A gap of a gamma renewal process; its squared coefficient of variation is the dispersion of counts."""
    shape = 1 / max(dispersion, 0.01)
    return rng.gammavariate(shape, 1 / (rate * shape))


def _lengths(row: dict[str, object], at: float) -> dict[str, list[float]]:
    by_time: dict[str, dict[str, list[float]]] = row["lengths"]  # type: ignore[assignment]
    return by_time[min(by_time, key=lambda key: abs(int(key) + 10_800 - at))]
