"""The fluid model of fleets over weeks: arrivals as described, first come first served, policies in their limits."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

SLOTS = 144  # windows of a day
# Of the fluid model from discrete events: it queues where an engine takes many requests into its batch at once.
KEPT_DIFFERENCE, HOURS_DIFFERENCE = 0.1, 0.3
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from replay import clients, fluid, plot, weeks  # noqa: E402  # the path above must come first
from replay.clients import WINDOW_S, Client  # noqa: E402
from replay.fluid import STEP_S, Arrivals, Lane  # noqa: E402
from replay.policies import RULES, Calm, Observed, Plan, Reactive, Wva  # noqa: E402
from replay.weeks import Weeks, claims, plan_of, smallest  # noqa: E402

from sidecar.load.scaling_rule import ScalingRule  # noqa: E402

FEW = [ScalingRule(target, 45.0, 1200, 1, quantile) for target in (0.5, 0.8) for quantile in (0.0, 0.9)]


def client(rates: list[float], dispersion: float = 1.0, seconds: float = 0.1, name: str = "a") -> Client:
    """A client whose requests keep a replica busy for `seconds` each."""
    count = len(rates)

    def every(value: float) -> Any:
        return np.full(count, value)

    of = (every(dispersion), every(seconds), every(seconds**2 * 1.5), every(2.0), every(0.05))
    return Client(name, np.array(rates), *of, copies=1.0)


@pytest.mark.parametrize("dispersion", [1.0, 25.0])
def test_arrivals_have_the_rate_and_the_irregularity(dispersion: float) -> None:
    """Counts of steps have the rate's mean, and its mean times the dispersion as variance; work is count times size."""
    arrivals = Arrivals([Lane(client([40.0] * 50, dispersion), 1, 5.0, 0)])
    drawn = [arrivals.window(n) for n in range(1, 50)]
    counts, works = (np.concatenate([part[which][:, 0] for part in drawn]) for which in (0, 1))
    assert counts.mean() == pytest.approx(400, rel=0.02)
    assert counts.var() == pytest.approx(400 * dispersion, rel=0.1)
    assert works.mean() == pytest.approx(40, rel=0.02)


def test_copies_do_not_act_at_once() -> None:
    """Copies are shifted by up to a window, so a window goes from the rate before to its own; one client jumps."""
    one = client([0.0, 60.0])
    lanes = [Lane(one, 1, 5.0, 0), Lane(replace(one, copies=200.0, name="many"), 1, 5.0, 0)]
    counts, _ = Arrivals(lanes).window(1)
    assert counts[:6, 0].mean() == pytest.approx(600, rel=0.1)
    assert counts[:6, 1].mean() < 0.15 * counts[-6:, 1].mean()
    assert counts[:, 1].mean() == pytest.approx(300, rel=0.1)


def test_all_lanes_of_a_seed_see_the_same_arrivals() -> None:
    """Policies and start times are compared on the same requests; another seed, or other gaps, give others."""
    one = client([40.0, 40.0], 9.0)
    lanes = [Lane(one, 1, 5.0, 0), Lane(one, 1, 60.0, 1), Lane(one, 2, 5.0, 0), Lane(clients.poisson(one), 1, 5.0, 0)]
    counts, _ = Arrivals(lanes).window(1)
    assert (counts[:, 0] == counts[:, 1]).all()
    assert (counts[:, 0] != counts[:, 2]).all() and (counts[:, 0] != counts[:, 3]).all()


@given(backlog=st.floats(0, 100), rate=st.floats(0, 20), serving=st.integers(0, 20), bound=st.floats(0.1, 2.0))
def test_the_share_in_time_is_that_of_a_queue(backlog: float, rate: float, serving: int, bound: float) -> None:
    """Held against single arrivals, each of which waits for what is before it."""
    share = fluid._share_in_time(*(np.array([x]) for x in (backlog, rate, float(serving), bound)))[0]
    waiting, good, count = backlog, 0, 2000
    for _ in range(count):
        good += serving > 0 and waiting / max(serving, 1) <= bound
        waiting = max(0.0, waiting + (rate - serving) * STEP_S / count)
    assert share == pytest.approx(good / count, abs=0.01)


def test_a_static_fleet() -> None:
    """It keeps what it has room for, costs its size, and is the smallest that is enough."""
    steady = client([100.0] * 8)  # ten replicas kept busy
    sizes = (8, 10, 11, 14, 20)
    lanes = [Lane(steady, 1, 5.0, 0, size) for size in sizes]
    result = fluid.run(lanes, Reactive(np.full(len(lanes), 5.0)), range(1, 8))
    assert result.hours == pytest.approx([size * 7 / 6 for size in sizes])
    assert result.kept[0] < 0.3 and result.kept[3] > 0.99 and result.kept[4] > 0.999
    assert (np.diff(result.kept) >= 0).all()
    kept = dict(zip(sizes, map(float, result.kept), strict=True))
    assert smallest(kept, 0.99) in (11, 14) and smallest(kept, 0.1) == 10 and smallest({4: 0.5}, 0.99) == 4


def test_a_start_takes_its_time() -> None:
    """After nothing, requests wait as long as the first replica takes to start; with a floor they need not."""
    burst = client([0.0] * 2 + [20.0] * 4)
    lanes = [Lane(burst, 1, 5.0, 0), Lane(burst, 1, 60.0, 0), Lane(burst, 1, 180.0, 0), Lane(burst, 1, 180.0, 3)]
    result = fluid.run(lanes, Reactive(np.array([5.0, 60.0, 180.0, 180.0])), range(6))
    assert result.kept[0] > result.kept[1] > result.kept[2] and result.kept[3] > result.kept[2]
    assert result.p99[0] <= 10 < result.p99[1] <= 90 < result.p99[2] <= 240
    assert result.by_window[0, 0, 0] == 0, "nothing is asked for, so nothing runs"


@pytest.mark.parametrize("maker", weeks.MAKERS)
def test_each_policy_serves_all_it_can(maker: Any) -> None:
    """Up with the load and down again, at least the floor, more than nothing where requests wait."""
    day = client([1.0] * 3 + [60.0] * 12 + [0.0] * 8)
    lanes = [Lane(day, 1, 60.0, 1), Lane(day, 1, 5.0, 0)]
    result = fluid.run(lanes, maker(np.array([60.0, 5.0])), range(23))
    assert result.kept.min() > 0.75 and result.most.max() <= fluid.MOST_REPLICAS
    if maker is Wva:  # one replica fewer in each 300 s
        assert result.by_window[-1, 0, 0] < result.by_window[10:16, 0, 0].max()
    else:
        assert result.by_window[-1, 0, 0] == 1.0 and result.by_window[-1, 0, 1] == 0.0
    assert result.by_window[10, 0].min() >= 6.0, "what is asked for"


def test_rivals_grow_within_the_limits_of_an_hpa() -> None:
    """At most doubled or four more at a time, however long the queue."""
    seen = Observed.of([Lane(client([400.0] * 2), 1, 60.0, 1)], STEP_S)
    seen.enter([Lane(client([400.0] * 2), 1, 60.0, 1)], 1)
    for there in (1.0, 6.0):
        one = np.array([there])
        seen.see(work=one * 400, served=one * STEP_S, backlog=one * 400, serving=one, pending=one * 0)
        wanted = weeks.MAKERS[2](np.array([60.0])).wanted(seen)
        assert wanted[0] == max(2 * there, there + 4)


def test_calm_holds_each_lane_for_its_time() -> None:
    """The largest number of the last seconds, which differ by lane."""
    lanes = [Lane(client([1.0]), 1, 5.0, 0)] * 2
    seen, calm = Observed.of(lanes, STEP_S), Calm(np.array([60.0, 300.0]))
    held = []
    for step in range(60):
        seen.steps = step + 1
        held.append(calm.hold(np.array([9.0, 9.0]) if step == 0 else np.array([1.0, 1.0]), seen))
    ends = [max(step for step, row in enumerate(held) if row[lane] == 9.0) * STEP_S for lane in (0, 1)]
    assert 30 <= ends[0] <= 60 and 270 <= ends[1] <= 300


def test_a_plan_starts_replicas_before_the_load() -> None:
    """From the third day on, those of a daily job are there when it begins: its own past chose the season."""
    day = [0.5] * SLOTS
    day[60:63], day[100:103] = [60.0] * 3, [40.0] * 3
    lane = Lane(client(day * 4), 1, 180.0, 1)
    plan, start_s = plan_of(lane, range(4 * SLOTS), FEW), np.array([180.0])
    assert plan.rules[0] == RULES[180.0] and plan.rules[3].quantile > 0
    kept = {}
    for policy in (Reactive(start_s), Reactive(start_s, [plan])):
        result = fluid.run([lane], policy, range(4 * SLOTS))
        last = result.by_window[-SLOTS:, :, 0]
        kept[policy.name] = last[:, 2].sum() / last[:, 3].sum()
        if policy.name == "ours":
            assert last[59, 0] >= 6, "in the window before"
    assert kept["ours"] > 0.99 > kept["ours, one setting"]


def test_a_plan_knows_the_past_only() -> None:
    """The rule and the season of a day are the same whatever that day and those after it bring."""
    day = [0.5] * SLOTS
    day[60:70] = [50.0] * 10
    one, other = (
        plan_of(Lane(client(day * 2 + after), 1, 60.0, 1), range(3 * SLOTS), FEW) for after in (day, [90.0] * SLOTS)
    )
    assert one.rules == other.rules and len(one.rules) == 3
    assert one.seasons[:2] == other.seasons[:2] and one.seasons[2] == other.seasons[2]


def test_a_lane_follows_its_plan() -> None:
    """Each day has its floor, and each slot its season; what a flow asked for before is held over midnight."""
    quiet = Lane(client([1e-9] * 3 * SLOTS), 1, 60.0, 1)
    rules = [replace(RULES[60.0], floor=floor, target=1.0) for floor in (1, 3, 2)]
    season = [0.0] * 40 + [5.0] * 8 + [0.0] * 48
    plan = Plan(rules, [[0.0] * 96, season, [0.0] * 96])
    there = fluid.run([quiet], Reactive(np.array([60.0]), [plan]), range(3 * SLOTS)).by_window[:, 0, 0]
    assert (there[5:140].max(), there[150:200].max(), there[SLOTS + 62 : SLOTS + 70].min()) == (1.0, 3.0, 5.0)
    assert there[-SLOTS + 5 :].max() == 2.0
    calm, seen = Calm(np.array([600.0]), np.array([7.0])), Observed.of([quiet], STEP_S)
    seen.steps = SLOTS * 60
    assert calm.hold(np.array([1.0]), seen)[0] == 7.0


def test_requests_of_a_piece(tmp_path: Path, requires: Any) -> None:
    """Discrete requests have the client's rate, and copies of a request do not come at once."""
    folder = requires("../shared/traces")
    [found] = [c for c in clients.load(folder, weeks.Hardware()) if c.name == "m-mid/52"]
    start = 1399  # as busy as the one before
    drawn = clients.arrivals(folder, clients.poisson(found), start * WINDOW_S, WINDOW_S, 1)
    expected = (found.rate[start - 1] + found.rate[start]) / 2 * WINDOW_S
    assert len(drawn) == pytest.approx(expected, rel=0.1)
    gaps = np.diff([r.at for r in drawn])
    assert (gaps >= 0).all() and (gaps < 1e-6).mean() < 0.001


def test_events_and_fluid_agree(requires: Any) -> None:
    """Twenty minutes of a rising edge as discrete events, production code inside, and as fluid, which keeps less."""
    [piece] = weeks.pieces(requires("../shared/traces"), 1, [("m-mid/52", 1397, 2)], [(60.0, 1)])
    assert piece.requests > 1000
    assert -KEPT_DIFFERENCE <= piece.fluid[0] - piece.events[0] <= 0.02
    assert piece.fluid[1] == pytest.approx(piece.events[1], rel=HOURS_DIFFERENCE)


# --- the report ---


def row(name: str, kept: float, saved: float, **changed: Any) -> Weeks:
    base = Weeks(name, 20.0, "Poisson", 5.0, "ours", kept, kept, 1.0, 100.0, saved, saved, 0.5)
    return replace(base, **changed)


def rows_of(*ours: Weeks, rival: tuple[float, float] = (0.9, 0.1), ceiling: float = 0.95) -> list[Weeks]:
    """Rows of ours at all start times, next to rivals and a ceiling that keep and save so much."""
    others = dict.fromkeys(weeks.RIVALS, rival) | {weeks.CEILING: (0.999, ceiling)}
    return [
        replace(r, policy=name, kept=kept, least_kept=kept, saved=saved, saved_at_99=saved, start_s=start)
        for r in ours
        for name, (kept, saved) in ({"ours": (r.kept, r.saved)} | others).items()
        for start, _ in weeks.STARTS
    ]


def test_claims_name_who_misses() -> None:
    """A target is reached by as many clients as it asks for; the others are named with their numbers and ceiling."""
    ours = (row("a", 0.995, 0.9), row("b", 0.98, 0.9), row("c", 0.999, 0.5, burstiness=2.0))
    first, steady, ahead, *_ = claims(rows_of(*ours), "Poisson")
    assert "1 of 2" in first and "**missed**" in first
    assert "b (peak/mean 20): kept 98.00%, saved 90.0%, the ceiling saves 95.0%" in first
    assert "c (" not in first, "it is not bursty"
    assert "0 of 1" in steady and "c 0.50 of 0.95" in steady and "none." in ahead
    first, _, ahead, second, *_ = claims(rows_of(row("a", 0.995, 0.9), rival=(0.999, 0.92)), "Poisson")
    assert "**reached**" in first and "Not:" not in first and ahead.count("a: ") == 3
    assert "**missed**" in second, "seven are asked for"


def test_the_page_and_the_plot_have_all() -> None:
    """Each policy has a column, each client a row and points."""
    names = ("ours", "ours, one setting", *weeks.RIVALS, weeks.CEILING)
    rng = random.Random(1)
    rows = [
        row(c, rng.random(), rng.random(), policy=name, start_s=start, gaps=gaps)
        for gaps in ("Poisson", "irregular")
        for start, _ in weeks.STARTS
        for c in ("a", "b")
        for name in names
    ]
    text = weeks.page(rows, [weeks.Piece("a", 60.0, 10, (0.9, 1.0), (0.8, 1.1))], 1, range(10))
    assert all(name in text for name in names) and text.count("| a | 20.0 |") == 6
    svg = ElementTree.fromstring(plot.weeks(rows))
    assert len(svg.findall(".//{*}circle")) == len(rows)
