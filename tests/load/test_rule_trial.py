"""The scaling rule tried on a fleet's own past: a queue as it is, replicas that take their time, no look ahead."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.load.rule_trial import (
    DAY_MINUTES,
    DAY_SLOTS,
    MINUTE_S,
    STEP_S,
    Trial,
    TriedDay,
    cheapest,
    season_of,
    smallest_static,
    sum_of,
    tried,
)
from sidecar.load.scaling_rule import HOLD_S, ScalingRule, candidates

RULE = ScalingRule(0.8, 15.0, 300, 1)
NO_SEASON = [0.0] * DAY_SLOTS
DAY_S = DAY_MINUTES * MINUTE_S


def day(*busy: tuple[int, int, float], base: float = 0.0) -> list[float]:
    """A day with so many replicas kept busy from one minute to another."""
    demand = [base] * DAY_MINUTES
    for start, end, rate in busy:
        demand[start:end] = [rate] * (end - start)
    return demand


def test_a_fleet_that_is_large_enough_keeps_all_and_pays_for_its_size() -> None:
    """Four replicas for a load of three: all of it in time, and four replicas for a day."""
    found = Trial(ScalingRule(1.0, 15.0, 300, 4), 60.0, 2.0, 4).day(day(base=3.0), NO_SEASON)
    assert found == TriedDay(pytest.approx(3 * DAY_S), pytest.approx(3 * DAY_S), 4 * DAY_S)


def test_what_waits_longer_than_the_objective_is_not_kept() -> None:
    """One replica, a load of two for ten minutes: the first 2 s are in time, and nothing until the queue is gone."""
    found = Trial(ScalingRule(1.0, 15.0, 300, 1), 60.0, 2.0, 1).day(day((0, 10, 2.0)), NO_SEASON)
    assert found.asked == 1200 and found.kept == pytest.approx(2 * 2.0)


@pytest.mark.parametrize("start_s", [5.0, 60.0, 180.0])
def test_a_start_takes_its_time(start_s: float) -> None:
    """A burst loses about the time of a start and of working off what waits; it costs the burst, the calm, the hold."""
    rule = ScalingRule(0.8, 15.0, 600, 1)
    found = Trial(rule, start_s, 2.0, 64).day(day((600, 660, 8.0)), NO_SEASON)
    lost = (found.asked - found.kept) / 8.0
    assert start_s - 2 <= lost <= 2.5 * start_s + 90
    busy = 60 * MINUTE_S * 10
    assert busy < found.paid - DAY_S < busy * 1.6 + 20 * 64 * 60


def test_fewer_replicas_after_the_calm_and_the_hold() -> None:
    """A demand holds for `calm`, and its number for HOLD_S; then the floor is all that is paid for."""
    trial = Trial(ScalingRule(0.8, 15.0, 600, 1), 60.0, 2.0, 64)
    short = trial.day(day((0, 60, 3.0)), NO_SEASON)
    long = Trial(ScalingRule(0.8, 15.0, 3600, 1), 60.0, 2.0, 64).day(day((0, 60, 3.0)), NO_SEASON)
    assert long.paid - short.paid == pytest.approx(3 * 3000, rel=0.05)
    assert trial.day(day(), NO_SEASON).paid == DAY_S, "the day after has none of it"
    assert short.paid - DAY_S > 3 * (3600 + 600 + HOLD_S) - 4 * STEP_S * 3 - 3 * 120


@given(
    demand=st.lists(st.floats(0, 12), min_size=DAY_MINUTES // 48, max_size=DAY_MINUTES // 48),
    rule=st.sampled_from(candidates(60.0, 0)),
)
def test_shares_and_costs_are_possible(demand: list[float], rule: ScalingRule) -> None:
    """No more is kept than came, at least the floor is paid for, and never more than the most."""
    busy = [rate for rate in demand for _ in range(48)]
    found = Trial(rule, 60.0, 2.0, 16).day(busy, NO_SEASON)
    assert 0 <= found.kept <= found.asked + 1e-6
    assert rule.floor * DAY_S <= found.paid <= 16 * DAY_S


def test_a_day_knows_no_later_one() -> None:
    """What a rule kept on a day, and the season of that day, are the same whatever follows."""
    past = [*day((500, 600, 5.0)), *day((520, 610, 6.0))]
    rules = [ScalingRule(0.8, 15.0, 300, 1), ScalingRule(0.8, 15.0, 300, 1, 0.9)]
    calm, wild = (tried([*past, *after], rules, 60.0, 2.0, 64) for after in (day(), day((0, 1440, 40.0))))
    for rule in rules:
        assert calm[rule][:2] == wild[rule][:2] and calm[rule][2] != wild[rule][2]
    assert season_of(past, 0.9) == season_of([*past, *[]], 0.9) and season_of([], 0.9) == NO_SEASON
    assert season_of(past, 0.0) == NO_SEASON
    assert season_of(past, 0.9)[520 // 15] == pytest.approx(6.0)


def test_a_daily_job_needs_a_season_and_a_rare_burst_does_not() -> None:
    """With slow starts, short daily jobs are kept by their season alone; one burst of the week is not worth a floor."""
    daily = [rate for _ in range(7) for rate in day((540, 570, 6.0), (900, 930, 4.0), base=0.2)]
    few = [rule for rule in candidates(180.0, 1) if rule.calm == 1200 and rule.target in (0.5, 0.8)]
    found = tried(daily, few, 180.0, 2.0, 64)
    chosen = cheapest({rule: days[1:] for rule, days in found.items()}, 0.99)
    assert chosen.quantile > 0 and chosen.floor == 1
    steady = [rate for _ in range(7) for rate in day(base=0.5)]
    found = tried(steady, few, 60.0, 2.0, 64)
    chosen = cheapest(found, 0.99)
    assert (chosen.floor, sum_of(found[chosen]).paid) == (1, 7 * DAY_S)


def test_the_cheapest_that_keeps_enough() -> None:
    """Of those that keep the share the cheapest; where none does, the one that keeps most; of equals the cheaper."""
    one, two, three = (ScalingRule(target, 15.0, 300, 1) for target in (0.5, 0.6, 0.7))
    days = {one: [TriedDay(100, 100, 50)], two: [TriedDay(100, 99, 40)], three: [TriedDay(100, 90, 30)]}
    assert [cheapest(days, keep) for keep in (0.99, 0.98, 0.8)] == [one, two, three], (
        "a trial loses less than is allowed"
    )
    assert cheapest({two: days[two], three: days[three]}, 0.999) is two
    assert cheapest({one: [TriedDay(1, 1, 9)], two: [TriedDay(1, 1, 8)]}, 0.5) is two
    old = {one: [TriedDay(100, 0, 1), *[TriedDay(100, 100, 50)] * 7], two: [TriedDay(100, 100, 40)] * 8}
    assert cheapest({one: old[one]}, 0.99) is one and cheapest(old, 0.99) is two


def test_the_smallest_static_fleet() -> None:
    """It keeps as much as asked for, one replica fewer does not; where none does, it is the most."""
    rng = random.Random(1)
    demand = [rng.uniform(0, 9) for _ in range(DAY_MINUTES)]
    size = smallest_static(demand, 0.99, 2.0, 64)

    def kept(size: int) -> float:
        found = Trial(ScalingRule(1.0, 1.0, 0, size), 0.0, 2.0, size).day(demand, NO_SEASON)
        return found.kept / found.asked

    assert kept(size) >= 0.99 > kept(size - 1)
    assert smallest_static(demand, 1.0, 2.0, 3) == 3
    assert smallest_static(day(), 0.99, 2.0, 64) == 1


def test_the_rule_is_the_sum_of_demand_and_queue() -> None:
    """Replicas for the demand, more for what waits, never fewer than the season or the floor asks for."""
    assert [RULE.replicas(demand, 0.0) for demand in (0.0, 0.8, 0.9, 8.0)] == [0, 1, 2, 10]
    assert RULE.replicas(0.8, 30.0) == 3
    assert RULE.replicas(0.01, 0.0) == RULE.replicas(0.0, 0.1) == 1, "a single request needs one"
    assert [RULE.least(season) for season in (0.0, 0.8, 2.4)] == [1, 1, 3]
    assert math.isclose(min(rule.target for rule in candidates(60.0, 1)), 0.4)
    assert {rule.floor for rule in candidates(60.0, 2)} == {2}
