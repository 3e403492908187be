"""Runs as Markdown tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence

from replay import jobs
from replay.jobs import FAST, MIN_KEPT_SHARE, SERVICES, TARGETS, Routed, Scaled
from replay.pricing import calibrated
from replay.routing import OURS, POLICIES

Groups = dict[tuple[str, float, int], list[Routed]]


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def page(replicas: int, seeds: int, routed: Sequence[Routed], scaled: Sequence[Scaled], seconds: float) -> str:
    """All tables."""
    co, worth = calibrated(FAST)
    prices = ", ".join(f"{name} {getattr(co, name):.3g}" for name in ("k", "a", "b", "d", "f"))
    parts = [
        "# Fleet replay, simulated",
        f"Simulated, not measured; {seconds:.0f} s. Coefficients fitted to the simulated engine from outside: "
        f"{prices}; held-out MAPE {worth.mape:.1%}, P90 {worth.p90:.1%}. "
        f"An oracle (`{POLICIES[-1].name}`) shows what any router could reach.",
    ]
    if routed:
        parts.append(
            f"## Routing: {replicas} replicas, {seeds} seed(s); time to first token, median over seeds [least - most]"
        )
    for key, group in groups(routed).items():
        parts += [f"### {title(*key)}", routing(group)]
    if scaled:
        parts.append(f"## Autoscaling: least GPU hours with {MIN_KEPT_SHARE:.0%} of the requests within the SLO")
        parts += [savings(scaled), "## Autoscaling: every run", every(scaled)]
    return "\n\n".join(parts)


def title(trace: str, load: float, slow: int) -> str:
    """A group's heading."""
    return f"{trace}, load {load:g}" + (f", {slow} replica half as fast" if slow else "")


def groups(routed: Sequence[Routed]) -> Groups:
    """Runs by trace, load and slow replicas."""
    found: Groups = {}
    for r in routed:
        found.setdefault((r.job.trace, r.job.load, r.job.slow), []).append(r)
    return found


def routing(group: Sequence[Routed]) -> str:
    """One row per policy, with the median over seeds of round robin's p99 over its own, for the same requests."""
    base = {r.job.seed: r.p99 for r in group if r.job.policy == 0}
    rows = []
    for n, policy in enumerate(POLICIES):
        mine = [r for r in group if r.job.policy == n]
        if mine:
            name = f"**{policy.name}**" if policy is OURS else policy.name
            ratios = statistics.median(base[r.job.seed] / r.p99 for r in mine)
            rows.append(
                (
                    name,
                    spread(mine, lambda r: r.p50),
                    spread(mine, lambda r: r.p99),
                    f"{ratios:.2f}",
                    f"{median(mine, lambda r: r.kept):.1%}",
                    f"{median(mine, lambda r: r.busy):.0%}",
                    f"{median(mine, lambda r: r.preemptions):.0f}",
                )
            )
    return table(("policy", "p50, s", "p99, s", "round robin / this, p99", "within SLO", "busy", "preempted"), rows)


def median(runs: Sequence[Routed], of: Callable[[Routed], float]) -> float:
    return statistics.median(map(of, runs))


def spread(runs: Sequence[Routed], of: Callable[[Routed], float]) -> str:
    """The median, and the range if there are several runs."""
    values = sorted(map(of, runs))
    ends = f" [{values[0]:.2f} - {values[-1]:.2f}]" if len(values) > 1 else ""
    return f"{statistics.median(values):.2f}{ends}"


def savings(scaled: Sequence[Scaled]) -> str:
    """Per trace and pace: the smallest static fleet, and each signal's cheapest run that meets the SLO."""
    rows = []
    for trace in dict.fromkeys(s.job.trace for s in scaled):
        static = next(s for s in scaled if s.job.trace == trace and s.job.signal == "static")
        rows.append(
            (
                trace,
                "static peak",
                "",
                f"{static.most}",
                f"{static.kept:.2%}",
                f"{static.p99:.2f}",
                f"{static.gpu_hours:.1f}",
                "",
            )
        )
        for pace in dict.fromkeys(s.job.pace for s in scaled if s.job.trace == trace and s.job.signal != "static"):
            for signal in TARGETS:
                best = cheapest([s for s in scaled if (s.job.trace, s.job.pace, s.job.signal) == (trace, pace, signal)])
                name = f"{signal}, starts in {pace[0]:g} s, calm {pace[1]:g} s"
                if best is None:
                    rows.append((trace, name, "none kept it", "", "", "", "", ""))
                else:
                    rows.append(
                        (
                            trace,
                            name,
                            f"{best.job.target:g}",
                            f"{best.most}",
                            f"{best.kept:.2%}",
                            f"{best.p99:.2f}",
                            f"{best.gpu_hours:.1f}",
                            f"{1 - best.gpu_hours / static.gpu_hours:.0%}",
                        )
                    )
    return table(("trace", "fleet", "target", "most replicas", "within SLO", "p99, s", "GPU hours", "saved"), rows)


def cheapest(runs: Sequence[Scaled]) -> Scaled | None:
    """The run with the least GPU hours among those that meet the SLO."""
    return min((s for s in runs if s.kept >= MIN_KEPT_SHARE), key=lambda s: s.gpu_hours, default=None)


def every(scaled: Sequence[Scaled]) -> str:
    """One row per run."""
    rows = [
        (
            s.job.trace,
            s.job.signal,
            f"{s.job.target:g}",
            f"{s.job.pace[0]:g} / {s.job.pace[1]:g}",
            s.most,
            f"{s.kept:.2%}",
            f"{s.p99:.2f}",
            f"{s.gpu_hours:.1f}",
        )
        for s in scaled
        if s.job.signal != "static"
    ]
    promised = "; ".join(f"{name} {s.first:g} s, each request {s.copies} times" for name, s in SERVICES.items())
    head = ("trace", "signal", "target", "start / calm, s", "most replicas", "within SLO", "p99, s", "GPU hours")
    return (
        f"{jobs.SCALING_TRACE_S:g} s of each trace. First token within: {promised}; "
        f"{jobs.MAX_PER_TOKEN_S:g} s per token.\n\n" + table(head, rows)
    )
