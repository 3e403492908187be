"""Forecast the replicas that the coming day needs, from usage records or Prometheus, as KEDA triggers or numbers.

    sidecar forecast --state-dir all --target 0.7 --format keda > cron.yaml
    sidecar forecast --prometheus http://prometheus:9090 --query 'sum(sidecar_mu_utilization_part_ratio{part="flow"})'

The forecast is a floor for an autoscaler that also reacts: what the same time of earlier days asked for. It needs days
of history; with none it says so. Usage records of many pods are merged first (`sidecar usage merge`).
"""

from __future__ import annotations

import json
import math
import sqlite3
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from sidecar.errors import SidecarError
from sidecar.flags import directory, flag, integer, number, one_of, text, url
from sidecar.load.seasonal_forecast import DAYS, forecast_of
from sidecar.report.usage_query import all_rows
from sidecar.report.usage_rows import DAY_S, HOUR_S, IDLE, QUARTER_S
from sidecar.report.usage_store import USAGE_FILE

SLOTS: Final = DAY_S // QUARTER_S
FETCH_TIMEOUT_S: Final = 30
MAX_ANSWER_BYTES: Final = 16 << 20
MIN_DAYS: Final = 1


@dataclass(frozen=True, slots=True)
class ForecastSettings:
    """Settings of `sidecar forecast`."""

    state_dir: str = flag("/run/sidecar", directory, "State directory of a sidecar, or of merged usage records")
    prometheus: str = flag("", url, "Prometheus to read instead of usage records")
    query: str = flag(
        'sum(sidecar_mu_utilization_part_ratio{part="flow"})', text, "What to read there: replicas kept busy"
    )
    model: str = flag("", text, "Count this model's usage only; none: all")
    target: float = flag(0.7, number(0.05, 1), "How busy a replica should be")
    hours: int = flag(24, integer(1, 7 * 24), "How far to look ahead")
    most: int = flag(64, integer(1, 10_000), "Maximum number of replicas")
    format: str = flag("keda", one_of("keda", "json", "prometheus"), "Form of the answer")


class NoHistory(SidecarError):
    """There is nothing to forecast from."""

    code = "no_history"


@dataclass(frozen=True, slots=True)
class ForecastSpan:
    """From `start` to `end` (seconds since 1970) at least so many replicas."""

    start: int
    end: int
    replicas: int


def main(settings: ForecastSettings, as_json: bool = False) -> int:
    """Print the forecast. Returns 0. Raises NoHistory."""
    now = int(time.time())
    first, demand = _from_prometheus(settings, now) if settings.prometheus else _from_records(settings, now)
    spans = forecast(first, demand, now, settings)
    print(FORMATS["json" if as_json else settings.format](spans))
    return 0


def forecast(first: int, demand: Sequence[float], now: int, settings: ForecastSettings) -> list[ForecastSpan]:
    """The coming spans of equal numbers. `demand`: replicas kept busy in each quarter from `first` to now.

    Raises NoHistory.
    """
    if len(demand) < MIN_DAYS * SLOTS:
        raise NoHistory(f"a forecast needs at least a day of history; there are {len(demand) // 4} hours")
    begins = now // QUARTER_S * QUARTER_S
    wanted = []
    for at in range(begins, begins + settings.hours * HOUR_S, QUARTER_S):
        busy = forecast_of(demand, (at - first) // QUARTER_S, SLOTS)
        wanted.append((at, min(settings.most, math.ceil(busy / settings.target - 0.05))))
    spans = []
    for replicas, run in groupby(wanted, key=lambda slot: slot[1]):
        times = [at for at, _ in run]
        spans.append(ForecastSpan(times[0], times[-1] + QUARTER_S, replicas))
    return spans


def as_keda(spans: Sequence[ForecastSpan]) -> str:
    """Triggers of a ScaledObject. KEDA takes the largest of all; a cron trigger repeats until it is replaced."""
    lines = [
        "# sidecar forecast: floors of the coming day; write them again each day. Put them next to the other triggers."
    ]
    for span in spans:
        if span.replicas:
            start, end = (datetime.fromtimestamp(at, UTC) for at in (span.start, span.end))
            lines += [
                "- type: cron",
                "  metadata:",
                "    timezone: Etc/UTC",
                f'    start: "{start.minute} {start.hour} {start.day} {start.month} *"',
                f'    end: "{end.minute} {end.hour} {end.day} {end.month} *"',
                f'    desiredReplicas: "{span.replicas}"',
            ]
    return "\n".join(lines)


def as_json_text(spans: Sequence[ForecastSpan]) -> str:
    """An array of spans."""

    def shown(at: int) -> str:
        return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    return json.dumps([{"start": shown(s.start), "end": shown(s.end), "replicas": s.replicas} for s in spans], indent=1)


def as_prometheus(spans: Sequence[ForecastSpan]) -> str:
    """The present floor, for node_exporter's textfile collector or a pushgateway: run it each quarter of an hour."""
    return (
        "# HELP sidecar_forecast_replicas Replicas that this time of earlier days asked for.\n"
        f"# TYPE sidecar_forecast_replicas gauge\nsidecar_forecast_replicas {spans[0].replicas}"
    )


FORMATS: Final[dict[str, Callable[[Sequence[ForecastSpan]], str]]] = {
    "keda": as_keda,
    "json": as_json_text,
    "prometheus": as_prometheus,
}


def _from_records(settings: ForecastSettings, now: int) -> tuple[int, list[float]]:
    """Quarters of an hour until now: used GPU time over the GPUs of an engine. Raises NoHistory."""
    path = Path(settings.state_dir) / USAGE_FILE
    end = now // QUARTER_S * QUARTER_S
    first = end - (DAYS + 1) * DAY_S
    demand = [0.0] * ((end - first) // QUARTER_S)
    begins = end
    try:
        for key, sums in all_rows(path):
            if key.at + key.span <= first or key.at >= end:
                continue
            begins = min(begins, max(key.at, first))
            if key.outcome == IDLE or settings.model not in ("", key.model):
                continue
            busy = sums.gpu_seconds / key.rate.gpus / key.span
            for slot in range(max(key.at, first) // QUARTER_S, -(-min(key.at + key.span, end) // QUARTER_S)):
                at = slot * QUARTER_S
                seconds = min(key.at + key.span, at + QUARTER_S) - max(key.at, at)
                demand[(at - first) // QUARTER_S] += busy * seconds / QUARTER_S
    except FileNotFoundError:
        why = f"no usage records in {settings.state_dir}; name the state directory of a sidecar"
        raise NoHistory(f"--state-dir: {why}") from None
    except (OSError, sqlite3.Error) as e:
        raise NoHistory(f"--state-dir: the usage records {path} cannot be read: {e}") from None
    begins = -(-begins // QUARTER_S) * QUARTER_S
    return begins, demand[(begins - first) // QUARTER_S :]


def _from_prometheus(settings: ForecastSettings, now: int) -> tuple[int, list[float]]:
    """The same by a range query; where there is no value, nothing was busy. Raises NoHistory."""
    end = now // QUARTER_S * QUARTER_S
    first = end - (DAYS + 1) * DAY_S
    asked = {"query": settings.query, "start": first, "end": end - QUARTER_S, "step": QUARTER_S}
    address = f"{settings.prometheus}/api/v1/query_range?{urllib.parse.urlencode(asked)}"
    try:
        with urllib.request.urlopen(address, timeout=FETCH_TIMEOUT_S) as answer:
            found = json.loads(answer.read(MAX_ANSWER_BYTES))
        [series] = found["data"]["result"]
        values = {int(at): _number(value) for at, value in series["values"]}
    except (OSError, urllib.error.URLError, ValueError, LookupError, TypeError) as e:
        why = "the query must give one series" if isinstance(e, ValueError | LookupError | TypeError) else e
        raise NoHistory(f"--prometheus: no history at {settings.prometheus}: {why}") from None
    begins = min(values, default=end)
    return begins, [values.get(at, 0.0) for at in range(begins, end, QUARTER_S)]


def _number(value: Any) -> float:
    """A sample as a number; NaN and infinities are none."""
    found = float(value)
    return found if math.isfinite(found) else 0.0
