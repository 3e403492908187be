"""Forecast the replicas that the coming day needs, from usage records or Prometheus, as KEDA triggers or numbers.

    sidecar forecast --state-dir all --target 0.7 --format keda > cron.yaml
    sidecar forecast --prometheus http://prometheus:9090 --query 'sum(sidecar_mu_utilization_part_ratio{part="flow"})'
    sidecar forecast --state-dir all --start-seconds 60 --keep 0.99

The forecast is a floor for an autoscaler that also reacts: what the same time of earlier days asked for. It needs days
of history; with none it says so. Usage records of many pods are merged first (`sidecar usage merge`).

With `--start-seconds`, the settings of the whole rule (target, calm, floor, season) are those that would have kept the
share `--keep` over the last days for the fewest replicas (sidecar/load/rule_trial.py).
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
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from sidecar.errors import SidecarError
from sidecar.flags import directory, flag, integer, number, one_of, text, url
from sidecar.load.rule_trial import DAY_MINUTES, TRIAL_DAYS, TriedDay, cheapest, smallest_static, sum_of, tried
from sidecar.load.scaling_rule import ScalingRule, candidates
from sidecar.load.seasonal_forecast import DAYS, QUANTILE, forecast_of
from sidecar.report.usage_query import all_rows
from sidecar.report.usage_rows import DAY_S, HOUR_S, IDLE, MINUTE_S, QUARTER_S
from sidecar.report.usage_store import USAGE_FILE
from sidecar.tools.scaled_object import cron_triggers, scaled_object

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
    target: float = flag(0.7, number(0.05, 1), "How busy a replica should be; not used with --start-seconds")
    start_seconds: float = flag(0, number(0, 3600), "Seconds to start a replica: chooses all settings; 0: --target's")
    keep: float = flag(0.99, number(0.5, 1), "Share of the work whose first token is to be in time")
    ttft_seconds: float = flag(2, number(0.1, 600), "In time, in seconds; as --slo-ttft-seconds")
    least: int = flag(1, integer(0, 10_000), "Fewest replicas to choose; 0 needs a queue before the pods")
    hours: int = flag(24, integer(1, 7 * 24), "How far to look ahead")
    most: int = flag(64, integer(1, 10_000), "Maximum number of replicas")
    format: str = flag(
        "keda", one_of("keda", "json", "prometheus"), "Form of the answer; keda: triggers, or a whole spec"
    )


class NoHistory(SidecarError):
    """There is nothing to forecast from."""

    code = "no_history"


@dataclass(frozen=True, slots=True)
class ForecastSpan:
    """From `start` to `end` (seconds since 1970) at least so many replicas."""

    start: int
    end: int
    replicas: int


@dataclass(frozen=True, slots=True)
class ChosenRule:
    """The settings, what they would have kept and paid over so many days, and a static fleet that keeps as much."""

    rule: ScalingRule
    days: int
    tried: TriedDay
    static: int


def main(settings: ForecastSettings, as_json: bool = False) -> int:
    """Print the forecast. Returns 0. Raises NoHistory."""
    now, chosen = int(time.time()), None
    if settings.start_seconds:
        chosen = choose(history(settings, now, MINUTE_S)[1], settings)
    first, demand = history(settings, now, QUARTER_S)
    spans = forecast(first, demand, now, settings, chosen.rule if chosen else None)
    print(FORMATS["json" if as_json else settings.format](spans, chosen, settings))
    return 0


def choose(demand: Sequence[float], settings: ForecastSettings) -> ChosenRule:
    """The rule for the coming day. `demand`: replicas kept busy by minute until now. Raises NoHistory."""
    days = min(TRIAL_DAYS, len(demand) // DAY_MINUTES)
    if not days:
        raise NoHistory(f"settings need at least a day of history; there are {len(demand) // 60} hours")
    demand = demand[-days * DAY_MINUTES :]
    start_s, ttft_s = settings.start_seconds, settings.ttft_seconds
    found = tried(demand, candidates(start_s, settings.least), start_s, ttft_s, settings.most)
    rule = cheapest(found, settings.keep)
    total = sum_of(found[rule])
    return ChosenRule(
        rule, days, total, smallest_static(demand, total.kept / max(total.asked, 1e-9), ttft_s, settings.most)
    )


def forecast(
    first: int, demand: Sequence[float], now: int, settings: ForecastSettings, rule: ScalingRule | None = None
) -> list[ForecastSpan]:
    """The coming spans of equal numbers. `demand`: replicas kept busy in each quarter from `first` to now.

    With a rule, its season and floor. Raises NoHistory.
    """
    if len(demand) < MIN_DAYS * SLOTS:
        raise NoHistory(f"a forecast needs at least a day of history; there are {len(demand) // 4} hours")
    rule = rule or ScalingRule(settings.target, 1.0, 0, 0, QUANTILE)
    begins = now // QUARTER_S * QUARTER_S
    wanted = []
    for at in range(begins, begins + settings.hours * HOUR_S, QUARTER_S):
        slot = (at - first) // QUARTER_S
        busy = forecast_of(demand, slot, SLOTS, rule.quantile) if rule.quantile else 0.0
        wanted.append((at, min(settings.most, rule.least(busy))))
    spans = []
    for replicas, run in groupby(wanted, key=lambda slot: slot[1]):
        times = [at for at, _ in run]
        spans.append(ForecastSpan(times[0], times[-1] + QUARTER_S, replicas))
    return spans


def as_keda(spans: Sequence[ForecastSpan], chosen: ChosenRule | None, settings: ForecastSettings) -> str:
    """Triggers of a ScaledObject, or its settings."""
    if not chosen:
        return cron_triggers([(span.start, span.end, span.replicas) for span in spans])
    above = [(span.start, span.end, span.replicas) for span in spans if span.replicas > chosen.rule.floor]
    kept = chosen.tried.kept / max(chosen.tried.asked, 1e-9)
    hours, static = chosen.tried.paid / HOUR_S, chosen.static * chosen.days * DAY_S / HOUR_S
    why = [
        f"sidecar forecast: settings for replicas that start in {settings.start_seconds:g} s; write them again daily.",
        f"On the last {chosen.days} days, {kept:.2%} of the work would have had its first token within "
        f"{settings.ttft_seconds:g} s,",
        f"for {hours:.0f} replica hours; {chosen.static} static replicas keep as much for {static:.0f}.",
    ]
    return scaled_object(why, chosen.rule, settings.ttft_seconds, settings.most, settings.prometheus, above)


def as_json_text(spans: Sequence[ForecastSpan], chosen: ChosenRule | None, settings: ForecastSettings) -> str:
    """An array of spans; with settings, an object."""

    def shown(at: int) -> str:
        return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    rows = [{"start": shown(s.start), "end": shown(s.end), "replicas": s.replicas} for s in spans]
    if not chosen:
        return json.dumps(rows, indent=1)
    total = chosen.tried
    trial = {
        "days": chosen.days,
        "kept": total.kept / max(total.asked, 1e-9),
        "replica_hours": total.paid / HOUR_S,
        "static_replicas": chosen.static,
    }
    return json.dumps({"rule": asdict(chosen.rule), "trial": trial, "floors": rows}, indent=1)


def as_prometheus(spans: Sequence[ForecastSpan], chosen: ChosenRule | None, settings: ForecastSettings) -> str:
    """The present floor, for node_exporter's textfile collector or a pushgateway: run it each quarter of an hour."""
    return (
        "# HELP sidecar_forecast_replicas Replicas that this time of earlier days asked for.\n"
        f"# TYPE sidecar_forecast_replicas gauge\nsidecar_forecast_replicas {spans[0].replicas}"
    )


FORMATS: Final[dict[str, Callable[[Sequence[ForecastSpan], ChosenRule | None, ForecastSettings], str]]] = {
    "keda": as_keda,
    "json": as_json_text,
    "prometheus": as_prometheus,
}


def history(settings: ForecastSettings, now: int, step: int) -> tuple[int, list[float]]:
    """The first time, and the replicas kept busy in each `step` seconds from then until now. Raises NoHistory."""
    return (_from_prometheus if settings.prometheus else _from_records)(settings, now, step)


def _days_of(step: int) -> int:
    """A day more than is used; by minute as many as one answer of Prometheus may have samples for."""
    return TRIAL_DAYS if step == MINUTE_S else DAYS + 1


def _from_records(settings: ForecastSettings, now: int, step: int) -> tuple[int, list[float]]:
    """Used GPU time over the GPUs of an engine, at the time when the requests came. Raises NoHistory."""
    path = Path(settings.state_dir) / USAGE_FILE
    end = now // step * step
    first = end - _days_of(step) * DAY_S
    demand = [0.0] * ((end - first) // step)
    begins = end
    try:
        for key, sums in all_rows(path):
            # Rows have the time when requests ended. A fleet needs its replicas when they begin.
            lasted = sums.seconds / sums.requests if sums.requests else 0.0
            start, stop = key.at - lasted, key.at - lasted + key.span
            if stop <= first or key.at >= end:
                continue
            begins = min(begins, max(int(start), first))
            if key.outcome == IDLE or settings.model not in ("", key.model):
                continue
            busy = sums.gpu_seconds / key.rate.gpus / key.span
            for slot in range(int(max(start, first) // step), math.ceil(min(stop, end) / step)):
                at = slot * step
                seconds = min(stop, at + step) - max(start, at)
                demand[(at - first) // step] += busy * seconds / step
    except FileNotFoundError:
        why = f"no usage records in {settings.state_dir}; name the state directory of a sidecar"
        raise NoHistory(f"--state-dir: {why}") from None
    except (OSError, sqlite3.Error) as e:
        raise NoHistory(f"--state-dir: the usage records {path} cannot be read: {e}") from None
    begins = -(-begins // step) * step
    return begins, demand[(begins - first) // step :]


def _from_prometheus(settings: ForecastSettings, now: int, step: int) -> tuple[int, list[float]]:
    """The same by a range query; where there is no value, nothing was busy. Raises NoHistory."""
    end = now // step * step
    first = end - _days_of(step) * DAY_S
    asked = {"query": settings.query, "start": first, "end": end - step, "step": step}
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
    return begins, [values.get(at, 0.0) for at in range(begins, end, step)]


def _number(value: Any) -> float:
    """A sample as a number; NaN and infinities are none."""
    found = float(value)
    return found if math.isfinite(found) else 0.0
