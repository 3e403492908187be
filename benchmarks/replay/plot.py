"""Two SVGs: p99 of the time to first token by policy, and GPU hours against the share that misses the SLO."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from math import log10
from xml.sax.saxutils import escape

from replay.jobs import MIN_KEPT_SHARE, Routed, Scaled
from replay.report import groups, title
from replay.routing import OURS, POLICIES
from replay.weeks import Weeks

FONT = 'font-family="sans-serif" font-size="11"'
LEFT, WIDTH, ROW, TOP = 170, 520, 16, 44
OUR, THEIRS, STATIC = "#1b6ca8", "#888888", "#c0392b"
WEEK_COLOURS = {"ours": OUR, "ours, one setting": "#2e9e6b", "clairvoyant": STATIC}
COLOURS = {"utilization": OUR, "stock and flow": "#2e9e6b"}


def routing(routed: Sequence[Routed]) -> str:
    """One row per policy and group: the medians as a dot, the seeds' range as a line."""
    values = [r.p99 for r in routed] or [1.0]
    low, high = log10(min(values)) - 0.05, log10(max(values)) + 0.05

    def x(seconds: float) -> float:
        return LEFT + (log10(seconds) - low) / (high - low) * WIDTH

    parts, y = (
        [_text(10, 18, "p99 time to first token, simulated; dot: median over seeds, line: range", bold=True)],
        TOP,
    )
    for key, group in groups(routed).items():
        parts.append(_text(10, y + 10, title(*key), bold=True))
        y += ROW + 2
        for n, policy in enumerate(POLICIES):
            found = sorted(r.p99 for r in group if r.job.policy == n)
            if not found:
                continue
            colour, mid = OUR if policy is OURS else THEIRS, y + ROW / 2
            parts.append(_text(LEFT - 8, y + 12, policy.name, anchor="end"))
            parts.append(
                f'<line x1="{x(found[0]):.1f}" x2="{x(found[-1]):.1f}" y1="{mid}" y2="{mid}" stroke="{colour}"/>'
            )
            middle = statistics.median(found)
            parts.append(f'<circle cx="{x(middle):.1f}" cy="{mid}" r="4" fill="{colour}"/>')
            parts.append(_text(LEFT + WIDTH + 10, y + 12, f"{middle:.2f} s"))
            y += ROW
        y += 10
    grid = [s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= log10(s) <= high]
    for seconds in grid:
        parts.insert(
            1, f'<line x1="{x(seconds):.1f}" x2="{x(seconds):.1f}" y1="{TOP - 10}" y2="{y}" stroke="#e4e4e4"/>'
        )
        parts.append(_text(x(seconds), y + 12, f"{seconds:g}", anchor="middle"))
    return _svg(parts, LEFT + WIDTH + 80, y + 24)


def scaling(scaled: Sequence[Scaled]) -> str:
    """One panel per trace: each run a point, the smallest static fleet a square. Left and low is better."""
    parts, y = [_text(10, 18, "GPU hours against the share beyond the SLO, simulated", bold=True)], TOP
    for trace in dict.fromkeys(s.job.trace for s in scaled):
        runs = [s for s in scaled if s.job.trace == trace]
        most = max(s.gpu_hours for s in runs) * 1.05
        parts.append(_text(10, y + 10, trace, bold=True))
        for miss in (0.001, 0.01, 0.1, 1.0):
            at = y + 20 + _height(miss)
            stroke = STATIC if miss == 1 - MIN_KEPT_SHARE else "#e4e4e4"
            parts.append(f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{at:.1f}" y2="{at:.1f}" stroke="{stroke}"/>')
            parts.append(_text(LEFT - 8, at + 4, f"{miss:.1%}", anchor="end"))
        parts += [_point(s, LEFT + s.gpu_hours / most * WIDTH, y + 20 + _height(1 - s.kept)) for s in runs]
        y += 160
        ticks = (0.0, 0.25, 0.5, 0.75, 1.0)
        parts += [
            _text(LEFT + share / 1.05 * WIDTH, y + 8, f"{share * most / 1.05:.0f} h", anchor="middle")
            for share in ticks
        ]
        y += 26
    parts.append(
        _text(
            10,
            y + 8,
            "blue: on the headline utilisation; green: on stock and flow in MU; grey: on open requests; "
            "red square: smallest static fleet that keeps the SLO",
        )
    )
    return _svg(parts, LEFT + WIDTH + 80, y + 20)


def weeks(rows: Sequence[Weeks]) -> str:
    """One panel per kind of arrivals and start time: each client and policy a point. Right and low is better."""
    parts, y = (
        [_text(10, 18, "Two weeks of 17 clients: share beyond the SLO against replica hours saved", bold=True)],
        TOP,
    )
    for gaps, start in dict.fromkeys((r.gaps, r.start_s) for r in rows):
        mine = [r for r in rows if (r.gaps, r.start_s) == (gaps, start)]
        parts.append(_text(10, y + 10, f"{gaps} arrivals, start {start:g} s", bold=True))
        for miss in (0.001, 0.01, 0.1, 1.0):
            at = y + 20 + _height(miss)
            parts.append(f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{at:.1f}" y2="{at:.1f}" stroke="#e4e4e4"/>')
            parts.append(_text(LEFT - 8, at + 4, f"{miss:.1%}", anchor="end"))
        for r in sorted(mine, key=lambda r: r.policy in WEEK_COLOURS):
            x, at = LEFT + max(0.0, r.saved) * WIDTH, y + 20 + _height(1 - r.kept)
            name = escape(f"{r.client}, {r.policy}: {r.kept:.2%} kept, {r.saved:.0%} saved")
            colour = WEEK_COLOURS.get(r.policy, THEIRS)
            parts.append(
                f'<circle cx="{x:.1f}" cy="{at:.1f}" r="3.5" fill="{colour}" fill-opacity="0.75">'
                f"<title>{name}</title></circle>"
            )
        y += 150
        parts += [
            _text(LEFT + share * WIDTH, y + 4, f"{share:.0%}", anchor="middle") for share in (0, 0.2, 0.4, 0.6, 0.8, 1)
        ]
        y += 24
    parts.append(_text(10, y + 8, "blue: ours; green: one setting for all; grey: KEDA and WVA; red: clairvoyant"))
    return _svg(parts, LEFT + WIDTH + 80, y + 20)


def _height(miss: float) -> float:
    """Pixels from the panel's top: 0 for a share of 1, the full height for 0.1 % and less."""
    return -log10(min(1.0, max(miss, 0.001))) / 3 * 120


def _point(s: Scaled, x: float, y: float) -> str:
    name = escape(
        f"{s.job.signal} {s.job.target:g}, {s.job.pace[0]:g}/{s.job.pace[1]:g} s: {s.gpu_hours:.1f} h, {s.kept:.2%}"
    )
    if s.job.signal == "static":
        return (
            f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="{STATIC}"><title>{name}</title></rect>'
        )
    colour = COLOURS.get(s.job.signal, THEIRS)
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}" fill-opacity="0.8"><title>{name}</title></circle>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'


def _svg(parts: Sequence[str], width: float, height: float) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" {FONT}>'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>", ""])
