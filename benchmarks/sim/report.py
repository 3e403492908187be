"""Tallies and trials as Markdown tables, and detection times as an SVG."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import ceil, log10
from xml.sax.saxutils import escape

from sim.alarms import ALARMS
from sim.detectors import CHECKS
from sim.modes import LOADS, Trial
from sim.weeks import WEEK, Tally, label

OURS = ("sidecar, liveness", "sidecar, readiness")
NO_FALSE = 3.0  # rule of three: none seen in n means a rate under 3/n, with 95 % confidence


def quantile(values: Sequence[float], share: float) -> float:
    """The nearest-rank quantile of at least one value."""
    return sorted(values)[max(0, ceil(share * len(values)) - 1)]


def times(trials: Iterable[Trial], detector: str) -> list[float | None]:
    """Detection seconds of one detector, None where it missed."""
    return [{OURS[0]: t.liveness, OURS[1]: t.readiness, **t.baselines}[detector] for t in trials]


def cell(found: Sequence[float | None]) -> str:
    """`share, p50 / p99` of a list of detections."""
    seen = [s for s in found if s is not None]
    if not found:
        return ""
    share = f"{len(seen)}/{len(found)}"
    return f"{share} {quantile(seen, 0.5):.0f} / {quantile(seen, 0.99):.0f}" if seen else share


def detection(trials: Sequence[Trial]) -> str:
    """One row per mode and load, one column per detector: found/all, then p50 / p99 seconds."""
    names = (*OURS, *CHECKS)
    lines = [f"| mode | load | {' | '.join(names)} | our last state |", "|" + "---|" * (len(names) + 3)]
    for key in sorted({(t.mode, LOADS.index(t.load)) for t in trials}):
        rows = [t for t in trials if (t.mode, LOADS.index(t.load)) == key]
        reasons = sorted({t.reason for t in rows})
        cells = " | ".join(cell(times(rows, n)) for n in names)
        lines.append(
            f"| {key[0]}{' (part)' if rows[0].part else ''} | {LOADS[key[1]]} | {cells} | {', '.join(reasons)} |"
        )
    return "\n".join(lines)


def summary(trials: Sequence[Trial]) -> str:
    """Per load, over the modes that stop the whole engine: found/all, p50 / p99 of each detector."""
    whole = [t for t in trials if not t.part]
    lines = [f"| detector | {' | '.join(LOADS)} |", "|" + "---|" * (len(LOADS) + 1)]
    for name in (*OURS, *CHECKS):
        cells = (cell(times([t for t in whole if t.load == load], name)) for load in LOADS)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    late = [t for t in whole if t.load == "long prefill"]
    kept = sum(t.liveness is not None and t.liveness <= 3 * t.predicted + 30 for t in late)
    return "\n".join([*lines, "", f"Long prefill: {kept} of {len(late)} found within 3 x predicted + 30 s."])


def alarms(tally: Tally) -> str:
    """One row per alarm: how often it happened, our suspicions and kills, and the kills of each baseline."""
    lines = [
        f"| alarm | times | suspect | killed | {' | '.join(CHECKS)} |",
        "|" + "---|" * (len(CHECKS) + 4),
    ]
    for name in (*(label(a) for a in ALARMS), "natural window"):
        if not (n := tally.events.get(name, 0)):
            continue
        theirs = " | ".join(str(tally.baseline.get((d, name), 0)) for d in CHECKS)
        lines.append(f"| {name} | {n} | {tally.suspects.get(name, 0)} | {tally.kills.get(name, 0)} | {theirs} |")
    ours = sum(tally.kills.values())
    sums = [sum(n for (d, _), n in tally.baseline.items() if d == name) for name in CHECKS]
    rates = " | ".join(f"{n / tally.weeks:.4f}" for n in sums)
    lines.append(f"| **false kills per engine-week** | | | {ours / tally.weeks:.4f} | {rates} |")
    return "\n".join(lines)


def coverage(tally: Tally) -> str:
    """How much was simulated, and how."""
    return (
        f"{tally.weeks:.1f} engine-weeks, {tally.full / tally.weeks:.0f} s of each "
        f"({100 * tally.full / (tally.weeks * WEEK):.3f} %, {tally.full / WEEK:.2f} weeks in all) in full resolution, "
        f"{sum(tally.events.values())} events; {tally.windows} natural windows by the bound, {tally.drawn} of them drawn"
        + (f" (none of them a kill: under {NO_FALSE / tally.drawn:.1%} each, with 95 % confidence)"
           if tally.drawn and not tally.kills.get("natural window") else "")
        + f"; {tally.unrecovered} worlds had to be replaced because the verdict was not calm again in time. "
        "The rest was passed over; benchmarks/sim/weeks.py says why that hides no false kill, and a test holds it against full resolution."
    )  # fmt: skip


def findings(tally: Tally, most: int = 3) -> str:
    """The first false kills of each alarm: seed, site, trail."""
    lines: list[str] = []
    for name in sorted({k.alarm for k in tally.examples}):
        for kill in [k for k in tally.examples if k.alarm == name][:most]:
            trail = "; ".join(f"{at} {state} ({reason})" for at, state, reason in kill.trail)
            s = kill.site
            lines.append(
                f"- {name}: `--only-week {kill.seed}`; killed after {kill.after:.1f} s; trace {s.trace}, slowness {s.slowness:.2f}, "
                f"streams {s.streams}, lacks {sorted(s.lacks)}, page {s.page}: {trail}"
            )
    return "\n".join(lines) or "None."


def plot(trials: Sequence[Trial]) -> str:
    """An SVG: for each detector and load the detection times of the whole-engine modes (log scale), misses at the right edge."""
    names = (*OURS, *CHECKS)
    row, left, width, top = 14, 190, 560, 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 80}" height="{top + row * (len(LOADS) + 1) * len(names)}"'
        ' font-family="sans-serif" font-size="10"><text x="8" y="14">Seconds from the hang to its detection '
        "(each dot a trial; right edge: missed)</text>"
    ]
    parts += [f'<text x="{left + x(s) * width}" y="32" fill="#666">{s:g}</text>' for s in (1, 3, 10, 30, 100, 300)]
    y = top
    for name in names:
        parts.append(f'<text x="8" y="{y + row}" font-weight="bold">{escape(name)}</text>')
        for load in LOADS:
            y += row
            parts.append(f'<text x="{left - 8}" y="{y}" text-anchor="end">{load}</text>')
            for s in times([t for t in trials if t.load == load and not t.part], name):
                at, colour = (1.06, "#c33") if s is None else (x(s), "#369")
                parts.append(
                    f'<circle cx="{left + at * width:.1f}" cy="{y - 3}" r="2.5" fill="{colour}" fill-opacity="0.35"/>'
                )
        y += row
    return "\n".join([*parts, "</svg>", ""])


def x(seconds: float) -> float:
    """0..1 on a logarithmic axis from 0.5 to 600 s."""
    return log10(max(seconds, 0.5) / 0.5) / log10(1200)
