"""Two weeks of 17 production clients: what each policy keeps and costs, and which client misses which target.

Weeks are a fluid model (fluid.py). Discrete events, with the production ledger, estimator and load inside (fleet.py),
are held against it in chosen hours. Arrivals are drawn twice: with the trace's irregular gaps, and as Poisson's within
windows of ten minutes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from replay import clients, fluid, policies
from replay.clients import PEAK_REPLICAS, WINDOW_S, Client, Numbers
from replay.engine import Hardware
from replay.fleet import Fleet, Outcome
from replay.fluid import FIRST_TOKEN_S, Lane
from replay.policies import TUNINGS, Policy
from replay.report import table
from replay.routing import OURS
from replay.scaling import Scaling
from sidecar.report.usage_rows import HOUR_S

WINDOWS = 2016
STARTS = ((5.0, 0), (60.0, 1), (180.0, 1))  # seconds to start a replica, replicas that never stop
SIZES = (4, 8, 10, 12, 14, 16, 20, 28, 48)
KEPT = 0.99
DOLLARS_PER_GPU_HOUR = 2.5
BURSTY = 8.0  # peak over mean
MAKERS: tuple[Callable[[Numbers], Policy], ...] = (
    policies.Reactive,
    lambda start_s: policies.Reactive(start_s, forecast=True),
    policies.HpaUtilization,
    policies.HpaConcurrency,
    policies.Wva,
    policies.Clairvoyant,
)
OWN, RIVALS = ("ours", "ours, with forecast"), ("KEDA, utilization", "KEDA, concurrency", "WVA")
CEILING = "clairvoyant"
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
    saved: float  # against the smallest static fleet that keeps as much, or 99 %
    dollars_per_thousand: float  # successful requests


@dataclass(frozen=True, slots=True)
class Piece:
    """The same hours as discrete events and as fluid."""

    client: str
    start_s: float
    requests: int
    events: tuple[float, float]  # kept, replica hours
    fluid: tuple[float, float]


def simulate(folder: Path, seeds: Sequence[int], windows: range, progress: Callable[[str], None]) -> list[Weeks]:
    """All policies on all clients."""
    own = clients.load(folder, Hardware())
    both = [*own, *map(clients.poisson, own)]
    static = _static(both, seeds[0], windows)
    progress("static fleets")
    found = []
    lanes = [Lane(client, seed, start, floor) for client in both for start, floor in STARTS for seed in seeds]
    starts = np.array([lane.start_s for lane in lanes])
    for maker in MAKERS:
        policy = maker(starts)
        result = fluid.run(lanes, policy, windows)
        found += list(_rows(lanes, policy.name, result, static, len(seeds)))
        progress(policy.name)
    return found


def _static(both: Sequence[Client], seed: int, windows: range) -> dict[tuple[str, str], dict[int, float]]:
    """What a fleet of each size keeps, by client."""
    lanes = [Lane(client, seed, 5.0, 0, size) for client in both for size in SIZES]
    result = fluid.run(lanes, policies.Clairvoyant(np.array([5.0] * len(lanes))), windows)
    kept: dict[tuple[str, str], dict[int, float]] = {}
    for lane, share in zip(lanes, result.kept, strict=True):
        kept.setdefault((lane.client.name, lane.client.gaps), {})[lane.static] = float(share)
    return kept


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
        whole = len(result.by_hour) * WINDOW_S / HOUR_S
        size = smallest(static[lane.client.name, lane.client.gaps], min(kept, KEPT))
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
            1 - hours / (size * whole),
            1000 * hours * DOLLARS_PER_GPU_HOUR / max(good, 1e-9),
        )


def smallest(kept: dict[int, float], share: float) -> int:
    """The smallest static fleet that keeps a share; the largest one where none does."""
    return next((size for size in sorted(kept) if kept[size] >= share), max(kept))


# --- discrete events ---


def pieces(folder: Path, seed: int) -> Iterator[Piece]:
    """Chosen hours with the production code inside, next to the fluid model of the same hours."""
    own = {client.name: client for client in clients.load(folder, Hardware())}
    for name, window, count in PIECES:
        client = clients.poisson(own[name])
        for start_s, floor in STARTS[1:]:
            tuning = TUNINGS[start_s]
            requests = clients.arrivals(folder, client, window * WINDOW_S, count * WINDOW_S, seed)
            scaling = Scaling(
                "flow and queue",
                tuning.target,
                every=fluid.STEP_S,
                calm=tuning.calm,
                startup=start_s,
                doubling=0.0,
                least=floor,
                drain=tuning.drain,
            )
            outcome = Fleet([Hardware()], OURS, str(seed), scaling, flush=1.0).run(requests)
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


def claims(rows: Sequence[Weeks], gaps: str) -> list[str]:
    """The targets, how far they are reached, and by which clients they are missed."""
    bursty = {row.client: row.burstiness for row in rows if row.burstiness >= BURSTY}
    lines = []
    for start, saved, kept, least, whose in (
        (5.0, 0.85, 0.99, len(bursty), "ours"),
        (60.0, 0.80, 0.99, 7, "ours"),
        (180.0, 0.75, 0.98, 6, "ours, with forecast"),
    ):
        mine = [r for r in rows if (r.gaps, r.start_s, r.policy) == (gaps, start, whose) and r.client in bursty]
        good = [r for r in mine if r.saved >= saved and r.least_kept >= kept]
        missed = "; ".join(
            f"{r.client} (peak/mean {r.burstiness:.0f}): kept {r.least_kept:.1%}, saved {r.saved:.0%}"
            for r in mine
            if r not in good
        )
        verdict = "reached" if len(good) >= least else "missed"
        text = f"start {start:.0f} s, {whose}: {len(good)} of {len(mine)} save {saved:.0%} and keep {kept:.0%}"
        lines.append(f"- {text} (target {least}): {verdict}" + (f". Not: {missed}" if missed else ""))
    return lines


def page(rows: Sequence[Weeks], found: Sequence[Piece], seeds: int, windows: range) -> str:
    """All tables."""
    parts = [
        "# Two weeks of 17 production clients, simulated",
        f"A fluid model; windows {windows.start} to {windows.stop - 1} of {WINDOWS}, of ten minutes each; {seeds} "
        f"seed(s); rates scaled to a peak of "
        f"{PEAK_REPLICAS} replicas. Kept: first token within {FIRST_TOKEN_S:g} s. Saved: replica hours against the "
        f"smallest static fleet that keeps as much, or {KEPT:.0%}. Cells are kept / saved. With a start of 5 s no "
        "replica must stay; otherwise one does.",
    ]
    for gaps, text in (
        ("Poisson", "Poisson's arrivals within each ten minutes"),
        ("irregular", "with the irregular gaps of the trace, drawn as gamma"),
    ):
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
        shown = [f"{mine[name].kept:.1%} / {mine[name].saved:.2f}" for name in names]
        best = min(mine[name].dollars_per_thousand for name in RIVALS)
        own = mine["ours"]
        money = f"{own.dollars_per_thousand:.3f}", f"{best:.3f}"
        cells.append((client, f"{own.burstiness:.1f}", *shown, f"{own.p99:g} s", *money))
    means = [f"{statistics.mean(r.kept for r in rows if r.policy == name):.1%}" for name in names]
    saved = [f"{statistics.mean(r.saved for r in rows if r.policy == name):.2f}" for name in names]
    both = [f"{kept} / {part}" for kept, part in zip(means, saved, strict=True)]
    return table(head, [*cells, ("**mean**", "", *both, "", "", "")])
