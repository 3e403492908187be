"""Two weeks of 17 production clients: what each policy keeps and costs, and which client misses which target.

Weeks are a fluid model (fluid.py). Discrete events, with the production ledger, estimator and load inside (fleet.py),
are held against it in chosen hours. Arrivals are drawn twice: with the trace's irregular gaps, and as Poisson's within
windows of ten minutes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from replay import clients, fluid, policies
from replay.clients import PEAK_REPLICAS, WINDOW_S, Numbers
from replay.engine import Hardware
from replay.fleet import Fleet, Outcome
from replay.fluid import FIRST_TOKEN_S, Arrivals, Lane
from replay.policies import RULES, Plan, Policy
from replay.report import table
from replay.routing import OURS as ROUTING
from replay.scaling import Scaling
from sidecar.load.rule_trial import DAY_MINUTES, MINUTE_S, cheapest, season_of, tried
from sidecar.load.scaling_rule import HOLD_S, ScalingRule, candidates
from sidecar.report.usage_rows import HOUR_S

WINDOWS = 2016
STARTS = ((5.0, 0), (60.0, 1), (180.0, 1))  # seconds to start a replica, replicas that never stop
SIZES = range(4, 26)
GAPS = ("Poisson", "irregular")
KEPT = 0.99
DOLLARS_PER_GPU_HOUR = 2.5
BURSTY = 8.0  # peak over mean
KEEP = {5.0: 0.99, 60.0: 0.99, 180.0: 0.98}  # what ours is to keep
MAKERS: tuple[Callable[[Numbers], Policy], ...] = (
    policies.Reactive,
    policies.HpaUtilization,
    policies.HpaConcurrency,
    policies.Wva,
)
OURS, CEILING = "ours", "clairvoyant"
RIVALS = ("KEDA, utilization", "KEDA, concurrency", "WVA")
CEILING_TARGETS = (0.6, 0.7, 0.8, 0.9, 1.0)  # of which each client's ceiling takes its best
# (client, first window, windows): rising edges from nothing, of clients whose requests are long, so that there are
# fewer than millions of events.
PIECES = (("m-mid/21", 1070, 3), ("m-mid/80", 1434, 2), ("m-mid/52", 1397, 2))


@dataclass(frozen=True, slots=True)
class Weeks:
    """A policy on one client, over all seeds: means, and the least kept share."""

    client: str
    burstiness: float
    gaps: str
    start_s: float
    policy: str
    kept: float
    least_kept: float
    p99: float
    hours: float
    saved: float  # against the smallest static fleet that keeps as much
    saved_at_99: float  # against the smallest static fleet that keeps 99 %
    dollars_per_thousand: float  # successful requests


@dataclass(frozen=True, slots=True)
class Piece:
    """The same hours as discrete events and as fluid."""

    client: str
    start_s: float
    requests: int
    events: tuple[float, float]  # kept, replica hours
    fluid: tuple[float, float]


def simulate(
    folder: Path, seeds: Sequence[int], windows: range, progress: Callable[[str], None], gaps: Sequence[str] = GAPS
) -> list[Weeks]:
    """All policies on all clients, and static fleets, in one run."""
    own = clients.load(folder, Hardware())
    both = [client for client in (*map(clients.poisson, own), *own) if client.gaps in gaps]
    lanes = [Lane(client, seed, start, floor) for client in both for start, floor in STARTS for seed in seeds]
    starts, plans = np.array([lane.start_s for lane in lanes]), []
    for done, lane in enumerate(lanes, 1):
        plans.append(plan_of(lane, windows))
        progress(f"{done} of {len(lanes)} plans")
    tried = [policies.Reactive(starts, plans), *(maker(starts) for maker in MAKERS)]
    tried += [policies.Clairvoyant(starts, target) for target in CEILING_TARGETS]
    fleets = [Lane(client, seeds[0], 5.0, 0, size) for client in both for size in SIZES]
    every = [*(lane for _ in tried for lane in lanes), *fleets]
    parts = [(policy, slice(n * len(lanes), (n + 1) * len(lanes))) for n, policy in enumerate(tried)]
    progress(f"{len(every)} fleets")
    result = fluid.run(every, policies.Together(parts), windows)
    static: dict[tuple[str, str], dict[int, float]] = {}
    for lane, share in zip(fleets, result.kept[len(every) - len(fleets) :], strict=True):
        static.setdefault((lane.client.name, lane.client.gaps), {})[lane.static] = float(share)
    rows = [row for policy, part in parts for row in _rows(lanes, policy.name, result.of(part), static, len(seeds))]
    return [row for row in rows if row.policy != CEILING] + _ceilings(rows)


def _ceilings(rows: Sequence[Weeks]) -> list[Weeks]:
    """What knowing the rates would save of each client, with the headroom that is best for it in hindsight."""
    by_lane: dict[tuple[str, str, float], list[Weeks]] = {}
    for row in rows:
        if row.policy == CEILING:
            by_lane.setdefault((row.client, row.gaps, row.start_s), []).append(row)
    # The most saved of those that keep 99 %, or of those that keep most.
    return [max(found, key=lambda row: (min(row.kept, KEPT), row.saved_at_99)) for found in by_lane.values()]


def plan_of(lane: Lane, windows: range, rules: Sequence[ScalingRule] = ()) -> Plan:
    """The rule of each day, chosen from the days before it alone; on the first, that of all clients.

    What a day asked for is known by minute from usage records, which count requests when they came.
    """
    arrivals, per_minute = Arrivals([lane]), int(MINUTE_S / fluid.STEP_S)
    works = np.concatenate([arrivals.window(number)[1][:, 0] for number in range(windows.stop)])
    demand = (works.reshape(-1, per_minute).sum(axis=1) / MINUTE_S).tolist()
    rules = rules or candidates(lane.start_s, lane.floor)
    days = tried(demand, rules, lane.start_s, FIRST_TOKEN_S, fluid.MOST_REPLICAS)
    count = -(-len(demand) // DAY_MINUTES)
    chosen = [RULES[lane.start_s]]
    chosen += [cheapest({rule: of[:day] for rule, of in days.items()}, KEEP[lane.start_s]) for day in range(1, count)]
    return Plan(chosen, [season_of(demand[: day * DAY_MINUTES], rule.quantile) for day, rule in enumerate(chosen)])


def _rows(
    lanes: Sequence[Lane],
    policy: str,
    result: fluid.Kept,
    static: dict[tuple[str, str], dict[int, float]],
    seeds: int,
) -> Iterator[Weeks]:
    for first in range(0, len(lanes), seeds):
        lane, part = lanes[first], slice(first, first + seeds)
        kept, hours = float(result.kept[part].mean()), float(result.hours[part].mean())
        whole = len(result.by_window) * WINDOW_S / HOUR_S
        fleets = static[lane.client.name, lane.client.gaps]
        good = float((result.kept[part] * result.requests[part]).mean())
        yield Weeks(
            lane.client.name,
            lane.client.burstiness,
            lane.client.gaps,
            lane.start_s,
            policy,
            kept,
            float(result.kept[part].min()),
            float(result.p99[part].mean()),
            hours,
            1 - hours / (smallest(fleets, kept) * whole),
            1 - hours / (smallest(fleets, KEPT) * whole),
            1000 * hours * DOLLARS_PER_GPU_HOUR / max(good, 1e-9),
        )


def smallest(kept: dict[int, float], share: float) -> int:
    """The smallest static fleet that keeps a share; the largest one where none does."""
    return next((size for size in sorted(kept) if kept[size] >= share), max(kept))


# --- discrete events ---


def pieces(
    folder: Path,
    seed: int,
    chosen: Sequence[tuple[str, int, int]] = PIECES,
    starts: Sequence[tuple[float, int]] = STARTS[1:],
) -> Iterator[Piece]:
    """Chosen hours with the production code inside, next to the fluid model of the same hours."""
    own = {client.name: client for client in clients.load(folder, Hardware())}
    for name, window, count in chosen:
        client = clients.poisson(own[name])
        for start_s, floor in starts:
            rule = RULES[start_s]
            requests = clients.arrivals(folder, client, window * WINDOW_S, count * WINDOW_S, seed)
            scaling = Scaling(
                "flow and queue",
                rule.target,
                every=fluid.STEP_S,
                calm=HOLD_S,
                demand_calm=rule.calm,
                startup=start_s,
                doubling=0.0,
                least=floor,
                drain=rule.drain,
            )
            outcome = Fleet([Hardware()], ROUTING, str(seed), scaling, flush=1.0).run(requests)
            lane = Lane(client, seed, start_s, floor)
            flow = fluid.run([lane], policies.Reactive(np.array([start_s])), range(window, window + count))
            yield Piece(
                name,
                start_s,
                len(requests),
                (kept_of(outcome), outcome.gpu_seconds / HOUR_S),
                (float(flow.kept[0]), float(flow.hours[0])),
            )


def kept_of(outcome: Outcome) -> float:
    """The share whose first token came in time."""
    return sum(s.first <= FIRST_TOKEN_S for s in outcome.served) / max(1, len(outcome.served))


# --- what is reached ---


@dataclass(frozen=True, slots=True)
class Claim:
    """At a start time, so many of the bursty clients should save and keep so much, and all keep `all_keep`."""

    start_s: float
    saved: float
    kept: float
    clients: int | None  # None: all
    all_keep: float


CLAIMS = (Claim(5.0, 0.85, 0.99, None, 0.99), Claim(60.0, 0.80, 0.99, 7, 0.98), Claim(180.0, 0.75, 0.98, 6, 0.0))
NEAR_CEILING = 0.05


def claims(rows: Sequence[Weeks], gaps: str) -> list[str]:
    """The targets, how far they are reached, and by which clients they are missed."""
    lines = []
    for claim in CLAIMS:
        mine = {(r.client, r.policy): r for r in rows if (r.gaps, r.start_s) == (gaps, claim.start_s)}
        ours = [r for r in mine.values() if r.policy == OURS]
        bursty = [r for r in ours if r.burstiness >= BURSTY]
        lines += [_reached(claim, bursty, mine), _near_ceiling(claim, ours, mine), _ahead(claim, bursty, mine)]
    return lines


def _reached(claim: Claim, bursty: Sequence[Weeks], mine: Mapping[tuple[str, str], Weeks]) -> str:
    good = [r for r in bursty if r.saved >= claim.saved and r.least_kept >= claim.kept]
    strict = [r for r in good if r.saved_at_99 >= claim.saved]
    below = [r.client for r in bursty if r.least_kept < claim.all_keep]
    missed = [
        f"{r.client} (peak/mean {r.burstiness:.0f}): kept {r.least_kept:.2%}, saved {r.saved:.1%}, "
        f"the ceiling saves {mine[r.client, CEILING].saved:.1%}"
        for r in bursty
        if r not in good
    ]
    least = claim.clients or len(bursty)
    verdict = "reached" if len(good) >= least and not below else "missed"
    text = (
        f"- Start {claim.start_s:.0f} s: {len(good)} of {len(bursty)} bursty clients save {claim.saved:.0%} and keep "
    )
    text += f"{claim.kept:.0%} (target {least}"
    text += f", and all keep {claim.all_keep:.0%}: {', '.join(below) or 'none'} below" if claim.all_keep else ""
    text += f"): **{verdict}**. Against the static fleet that keeps 99 %: {len(strict)}."
    return text + (f" Not: {'; '.join(missed)}." if missed else "")


def _near_ceiling(claim: Claim, ours: Sequence[Weeks], mine: Mapping[tuple[str, str], Weeks]) -> str:
    steady = [r for r in ours if r.burstiness < BURSTY]
    far = [
        f"{r.client} {r.saved_at_99:.2f} of {mine[r.client, CEILING].saved_at_99:.2f}"
        for r in steady
        if r.saved_at_99 < mine[r.client, CEILING].saved_at_99 - NEAR_CEILING
    ]
    text = (
        f"- Start {claim.start_s:.0f} s, the others: {len(steady) - len(far)} of {len(steady)} within 5 points of the "
    )
    return text + "ceiling" + (f". Not: {'; '.join(far)}." if far else ".")


def _ahead(claim: Claim, bursty: Sequence[Weeks], mine: Mapping[tuple[str, str], Weeks]) -> str:
    """A rival is ahead where it keeps the target's share, or as much as ours, and saves more."""
    behind = [
        f"{r.client}: {name} keeps {other.least_kept:.2%} and saves {other.saved_at_99:.1%}"
        for r in bursty
        for name in RIVALS
        if (other := mine[r.client, name]).least_kept >= min(claim.kept, r.least_kept)
        and other.saved_at_99 > r.saved_at_99
    ]
    text = f"- Start {claim.start_s:.0f} s, rivals that keep {claim.kept:.0%}, or as much as ours, and save more: "
    return text + (f"{'; '.join(behind)}." if behind else "none.")


def page(rows: Sequence[Weeks], found: Sequence[Piece], seeds: int, windows: range) -> str:
    """All tables."""
    parts = [
        "# Two weeks of 17 production clients, simulated",
        f"A fluid model; windows {windows.start} to {windows.stop - 1} of {WINDOWS}, of ten minutes each; {seeds} "
        f"seed(s); rates scaled so that {PEAK_REPLICAS} replicas are busy in the busiest window. Kept: first token "
        f"within {FIRST_TOKEN_S:g} s. Saved: replica hours against the smallest static fleet that keeps as much. Cells "
        "are kept / saved. With a start of 5 s no replica must stay; otherwise one does. `ours` chooses its settings "
        "each night from the days before, as `sidecar forecast` does; the first day, and `ours, one setting`, have "
        "those of all clients. The ceiling knows the mean rates, and its headroom is each client's best in hindsight.",
    ]
    for gaps, text in (
        ("Poisson", "Poisson's arrivals within each ten minutes"),
        ("irregular", "with the irregular gaps of the trace, drawn as gamma"),
    ):
        if not any(r.gaps == gaps for r in rows):
            continue
        parts += [f"## Arrivals: {text}", "\n".join(claims(rows, gaps))]
        for start, _ in STARTS:
            mine = [r for r in rows if (r.gaps, r.start_s) == (gaps, start)]
            parts += [f"### Start {start:.0f} s", _table(mine)]
    if found:
        head = ("client", "start", "requests", "kept, events", "kept, fluid", "replica hours, events", "fluid")
        cells = [
            (
                *(p.client, f"{p.start_s:.0f} s", p.requests, f"{p.events[0]:.2%}", f"{p.fluid[0]:.2%}"),
                *(f"{p.events[1]:.2f}", f"{p.fluid[1]:.2f}"),
            )
            for p in found
        ]
        parts += [
            "## Discrete events with the production code, and the fluid model of the same hours",
            table(head, cells),
        ]
    return "\n\n".join(parts)


def _table(rows: Sequence[Weeks]) -> str:
    names = list(dict.fromkeys(r.policy for r in rows))
    head = ("client", "peak/mean", *names, "p99, ours", "$ per 1000, ours", "$ per 1000, best rival")
    cells = []
    for client in dict.fromkeys(r.client for r in rows):
        mine = {r.policy: r for r in rows if r.client == client}
        shown = [f"{mine[name].kept:.2%} / {mine[name].saved:.2f}" for name in names]
        best = min(mine[name].dollars_per_thousand for name in RIVALS)
        own = mine[OURS]
        money = f"{own.dollars_per_thousand:.3f}", f"{best:.3f}"
        cells.append((client, f"{own.burstiness:.1f}", *shown, f"{own.p99:g} s", *money))
    means = [f"{statistics.mean(r.kept for r in rows if r.policy == name):.1%}" for name in names]
    saved = [f"{statistics.mean(r.saved for r in rows if r.policy == name):.2f}" for name in names]
    both = [f"{kept} / {part}" for kept, part in zip(means, saved, strict=True)]
    return table(head, [*cells, ("**mean**", "", *both, "", "", "")])
