"""Prediction of output lengths on real traces: the relay's estimator against the decayed mean that it replaced.

    .venv/bin/python benchmarks/estimates.py [--traces DIR] [--write]

Each request is estimated on arrival and learned when it ends (half a second and 30 ms per token later). The first table
has mean absolute error and mean error of the expected output tokens, the share of answers within the 90th percentile
(what a limit reserves) and within the 80 % interval, and the pinball loss of that percentile (lower is better; a
useless percentile can still be covered). The second table is about the requests in flight: every 10 s, the sum of their
remaining output tokens, as the ledger estimates it and as it turned out, and the same for the decayed mean minus
delivered tokens.
"""

from __future__ import annotations

import argparse
import heapq
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from sim.traces import Trace, load

from sidecar.events import Admitted, Usage
from sidecar.load import cost_model
from sidecar.load.estimator import Estimator
from sidecar.load.ledger import AdmissionHold, remaining_tokens
from sidecar.load.request_shape import RequestShape

FIRST_TOKEN, PER_TOKEN = 0.5, 0.03  # seconds
MEAN_START, MEAN_WEIGHT = 256.0, 0.05  # of the decayed mean
COLUMNS = (
    "trace",
    "requests",
    "mean",
    "MAE",
    "MAE of mean",
    "error",
    "p90 covers",
    "80 % covers",
    "p90 loss",
    "tail error",
)


@dataclass
class Score:
    """Sums of one trace."""

    actual: list[int] = field(default_factory=list)
    expected: list[float] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    before: list[float] = field(default_factory=list)
    tails: list[float] = field(default_factory=list)  # remaining tokens beyond the estimate: estimated less actual

    def row(self, name: str) -> tuple[str, ...]:
        """One line of the table."""
        pairs = list(zip(self.actual, self.expected, strict=True))
        within = [low <= a <= high for a, low, high in zip(self.actual, self.low, self.high, strict=True)]
        over = [a - high for a, high in zip(self.actual, self.high, strict=True)]
        return (
            name,
            str(len(pairs)),
            f"{fmean(self.actual):.0f}",
            f"{fmean(abs(a - e) for a, e in pairs):.1f}",
            f"{fmean(abs(a - b) for a, b in zip(self.actual, self.before, strict=True)):.1f}",
            f"{fmean(e - a for a, e in pairs):+.1f}",
            f"{fmean(x <= 0 for x in over):.1%}",
            f"{fmean(within):.1%}",
            f"{fmean(max(0.9 * x, -0.1 * x) for x in over):.1f}",
            f"{fmean(self.tails):+.1f}",
        )


def arrivals(trace: Trace) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """Each arrival's (prompt, output), and the same of the requests that ended since the last one."""
    open_: list[tuple[float, int, int]] = []
    for request in trace:
        ended = []
        while open_ and open_[0][0] <= request.at:
            ended.append(heapq.heappop(open_)[1:])
        yield request.prompt, request.output, ended
        end = request.at + FIRST_TOKEN + PER_TOKEN * request.output
        heapq.heappush(open_, (end, request.prompt, request.output))


def score(trace: Trace) -> Score:
    """Run the estimator on one trace."""
    estimator, mean, result = Estimator(cost_model.Coefficients()), MEAN_START, Score()
    for prompt, output, ended in arrivals(trace):
        for p, o in ended:
            estimator.learn("t", RequestShape("m", token_ids=p), Usage(p, o))
            mean += MEAN_WEIGHT * (o - mean)
        forecast = estimator.forecast("t", RequestShape("m"), prompt)
        expected = forecast.mean()
        result.actual.append(output)
        result.expected.append(expected)
        result.low.append(forecast.quantile(0.1))
        result.high.append(forecast.quantile(0.9))
        result.before.append(mean)
        if output > expected:
            result.tails.append(forecast.remaining([expected])[0] - (output - expected))
    return result


STOCK_INTERVAL_S = 10.0
STOCK = ("trace", "open", "tokens to come", "error", "error of mean", "absolute error", "absolute error of mean")


@dataclass
class Open:
    """One open request; `mean` is its estimate by the decayed mean."""

    begin: float
    output: int
    hold: AdmissionHold
    mean: float

    @property
    def end(self) -> float:
        return self.begin + FIRST_TOKEN + PER_TOKEN * self.output

    def left(self, now: float) -> tuple[float, float, float]:
        """Remaining tokens: actual, by the ledger, by the mean."""
        came = min(self.output, max(0, int((now - self.begin - FIRST_TOKEN) / PER_TOKEN)))
        self.hold.delivered = came
        return self.output - came, remaining_tokens(self.hold), max(self.mean - came, 0)


def stock(name: str, trace: Trace) -> tuple[str, ...]:
    """One line of the second table."""
    estimator, mean, due = Estimator(cost_model.Coefficients()), MEAN_START, STOCK_INTERVAL_S
    open_: list[Open] = []
    counts, sums = [], []
    for number, request in enumerate(trace):
        while due <= request.at:
            there = [one.left(due) for one in open_ if one.end > due]
            if there:
                counts.append(len(there))
                sums.append([sum(column) for column in zip(*there, strict=True)])
            due += STOCK_INTERVAL_S
        for one in sorted((one for one in open_ if one.end <= request.at), key=lambda one: one.end):
            prompt = one.hold.admitted.expected.uncached
            estimator.learn("t", RequestShape("m", token_ids=prompt), Usage(prompt, one.output))
            mean += MEAN_WEIGHT * (one.output - mean)
        open_ = [one for one in open_ if one.end > request.at]
        estimate = estimator.estimate("t", RequestShape("m", stream=True, token_ids=request.prompt), [])
        event = Admitted(
            str(number), request.at, "t", "m", "chat", True, estimate.work, None, estimate.mu, None, estimate.tail
        )
        open_.append(Open(request.at, request.output, AdmissionHold(event, request.at), mean))
    true = fmean(row[0] for row in sums)
    off = [[row[n] - row[0] for row in sums] for n in (1, 2)]
    mean_errors = (f"{fmean(column) / true:+.1%}" for column in off)
    absolute = (f"{fmean(map(abs, column)) / true:.1%}" for column in off)
    return name, f"{fmean(counts):.0f}", f"{true:.0f}", *mean_errors, *absolute


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=Path, help="folder of real traces; default: a synthetic one")
    parser.add_argument("--write", action="store_true")
    chosen = parser.parse_args()
    traces = load(chosen.traces)
    text = "\n\n".join(
        (
            _table(COLUMNS, [score(trace).row(name) for name, trace in traces.items()]),
            _table(STOCK, [stock(name, trace) for name, trace in traces.items()]),
        )
    )
    print(text)
    if chosen.write:
        folder = Path(__file__).parent / "results"
        (folder / f"estimates-{time.strftime('%Y-%m-%d')}.md").write_text(f"# Estimates on traces\n\n{text}\n")


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, ("---",) * len(columns), *rows))


if __name__ == "__main__":
    main()
