"""Pure: what a scaling rule would have kept and paid over a fleet's own past, and the cheapest rule that suffices.

A fluid model with steps of STEP_S: work comes evenly within a minute and is served first come, first served; its first
token is in time if it waits for at most the objective. A trial takes one day after the other and knows no later one,
so that the rule for a day comes from the days before it alone.

benchmarks/fleet.py runs the chosen rules against the days that follow, in finer steps and with other policies.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sidecar.load.scaling_rule import HOLD_S, LOST_IN_TRIAL, ScalingRule
from sidecar.load.seasonal_forecast import forecast_of

MINUTE_S: Final = 60
STEP_S: Final = 20
DAY_MINUTES: Final = 1440
SLOT_MINUTES: Final = 15  # of the season
DAY_SLOTS: Final = DAY_MINUTES // SLOT_MINUTES
TRIAL_DAYS: Final = 7  # that a rule is chosen from


@dataclass(frozen=True, slots=True)
class TriedDay:
    """Seconds of a replica: work that came, work whose first token was in time, and replicas paid for."""

    asked: float
    kept: float
    paid: float


class Trial:
    """A fleet under one rule. `start_s`: to start a replica; `ttft_s`: the objective; `most`: replicas."""

    def __init__(self, rule: ScalingRule, start_s: float, ttft_s: float, most: int) -> None:
        self.rule = rule
        self._delay = 1 + round(start_s / STEP_S)  # what is wanted at the end of a step starts with the next one
        self._ttft, self._most = ttft_s, most
        self._serving, self._starting, self._queue = rule.floor, 0, 0.0
        self._ready: deque[tuple[int, int]] = deque()  # (step, replicas) that begin to serve
        self._demand, self._before = _Largest(round(rule.calm / STEP_S)), 0.0
        self._wanted = _Largest(round(HOLD_S / STEP_S))
        self._step = 0

    def day(self, demand: Sequence[float], season: Sequence[float]) -> TriedDay:
        """Serve a day. `demand`: replicas kept busy by what comes in each minute; `season`: by slot of SLOT_MINUTES."""
        asked = kept = paid = 0.0
        least = [self.rule.least(busy) for busy in season]
        for minute, rate in enumerate(demand):
            if not rate and self._is_at_rest(least[minute // SLOT_MINUTES]):  # nights are most of a bursty week
                paid += self._serving * MINUTE_S
                self._step += MINUTE_S // STEP_S
                continue
            for part in range(1, MINUTE_S // STEP_S + 1):
                if self._ready and self._ready[0][0] <= self._step:
                    count = self._ready.popleft()[1]
                    self._serving += count
                    self._starting -= count
                came = rate * STEP_S
                if came:
                    asked += came
                    kept += came * self._share_in_time(rate)
                served = min(self._queue + came, self._serving * STEP_S)
                self._queue += came - served
                paid += (self._serving + self._starting) * STEP_S
                mean = self._before + (rate - self._before) * part * STEP_S / MINUTE_S  # of the last minute
                self._scale(mean, least[minute // SLOT_MINUTES])
                self._step += 1
            self._before = rate
        return TriedDay(asked, kept, paid)

    def _is_at_rest(self, least: int) -> bool:
        """Whether a minute without work changes nothing."""
        if self._queue or self._before or self._ready or self._serving != least:
            return False
        return not self._demand.largest and self._wanted.largest <= least

    def _scale(self, demand: float, least: int) -> None:
        wanted = max(least, self.rule.replicas(self._demand.of(demand, self._step), self._queue))
        change = int(self._wanted.of(min(self._most, wanted), self._step)) - self._serving - self._starting
        if change > 0:
            self._ready.append((self._step + self._delay, change))
            self._starting += change
        elif change < 0:  # what starts is not cut short
            self._serving = max(self._serving + change, min(self._serving, 1))

    def _share_in_time(self, rate: float) -> float:
        """The share of a step's work for which queue + (rate - serving) * t <= objective * serving."""
        growth, spare = rate - self._serving, self._ttft * self._serving - self._queue
        if not self._serving or spare < 0 <= growth:
            return 0.0
        if growth > 0:
            return min(1.0, spare / growth / STEP_S)
        return 1.0 if spare >= 0 else max(0.0, 1.0 - spare / growth / STEP_S)


class _Largest:
    """The largest value of the last `steps` steps: a queue of values that fall."""

    def __init__(self, steps: int) -> None:
        self._steps = max(1, steps)
        self._values: deque[tuple[int, float]] = deque()

    @property
    def largest(self) -> float:
        """As of the last step."""
        return self._values[0][1] if self._values else 0.0

    def of(self, value: float, step: int) -> float:
        """With the value of this step."""
        values = self._values
        while values and values[-1][1] <= value:
            values.pop()
        values.append((step, value))
        if values[0][0] <= step - self._steps:
            values.popleft()
        return values[0][1]


def season_of(past: Sequence[float], quantile: float) -> list[float]:
    """The day that follows `past` (whole days of minutes), by slot: what the same time of its days asked for."""
    slots = [sum(past[at : at + SLOT_MINUTES]) / SLOT_MINUTES for at in range(0, len(past), SLOT_MINUTES)]
    if not quantile or not slots:
        return [0.0] * DAY_SLOTS
    return [forecast_of(slots, slot, DAY_SLOTS, quantile) for slot in range(len(slots), len(slots) + DAY_SLOTS)]


def tried(
    demand: Sequence[float], rules: Sequence[ScalingRule], start_s: float, ttft_s: float, most: int
) -> dict[ScalingRule, list[TriedDay]]:
    """Each rule on each whole day of `demand` (by minute); each day with the season of those before it."""
    trials = [Trial(rule, start_s, ttft_s, most) for rule in rules]
    found: dict[ScalingRule, list[TriedDay]] = {rule: [] for rule in rules}
    for first in range(0, len(demand) - DAY_MINUTES + 1, DAY_MINUTES):
        day = demand[first : first + DAY_MINUTES]
        seasons = {quantile: season_of(demand[:first], quantile) for quantile in {rule.quantile for rule in rules}}
        for trial in trials:
            found[trial.rule].append(trial.day(day, seasons[trial.rule.quantile]))
    return found


def cheapest(days: Mapping[ScalingRule, Sequence[TriedDay]], keep: float) -> ScalingRule:
    """The rule for a day that should keep the share `keep`: of those that lost little enough, the one that paid least.

    Where none did, the one that kept most. The last TRIAL_DAYS of `days` count. At least one rule.
    """
    keep = 1 - LOST_IN_TRIAL * (1 - keep)
    sums = {rule: sum_of(of_rule[-TRIAL_DAYS:]) for rule, of_rule in days.items()}
    enough = [rule for rule, day in sums.items() if day.kept >= keep * day.asked]
    if enough:
        return min(enough, key=lambda rule: sums[rule].paid)
    return max(sums, key=lambda rule: (sums[rule].kept, -sums[rule].paid))


def sum_of(days: Sequence[TriedDay]) -> TriedDay:
    return TriedDay(sum(d.asked for d in days), sum(d.kept for d in days), sum(d.paid for d in days))


def smallest_static(demand: Sequence[float], keep: float, ttft_s: float, most: int) -> int:
    """The smallest fleet that keeps the share `keep` of `demand` (by minute) unscaled; `most` where none does."""

    def keeps(size: int) -> bool:
        day = Trial(ScalingRule(1.0, 1.0, 0, size), 0.0, ttft_s, size).day(
            demand, [0.0] * (len(demand) // SLOT_MINUTES + 1)
        )
        return day.kept >= keep * day.asked - 1e-9

    return bisect_left(range(most), True, lo=1, key=keeps)
