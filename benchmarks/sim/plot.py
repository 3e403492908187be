"""Detection times as an SVG: one row per detector and load, a box of quantiles and the share that was found.

No dots: with thousands of trials they hide each other, and a file of megabytes is no figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log10
from xml.sax.saxutils import escape

from sim.modes import LOADS, Trial
from sim.report import NAMES, OURS, quantile, times

ROW, GAP, LEFT, WIDTH, TOP = 15, 9, 250, 560, 52
MIN_AXIS_S, MAX_AXIS_S = 1.0, 600.0  # seconds, the ends of the axis
TICKS = (1, 3, 10, 30, 100, 300, 600)
COLOURS = {"ours": "#1b6ca8", "theirs": "#888888", "missed": "#c0392b"}
FONT = 'font-family="sans-serif" font-size="11"'


def plot(trials: Sequence[Trial], title: str) -> str:
    """An SVG of the modes that stop the whole engine: p5 to p99 as a line, quartiles as a box, the median as a bar."""
    whole = [t for t in trials if t.whole]
    names = (*OURS, *NAMES)
    height = TOP + len(names) * (len(LOADS) * ROW + GAP) + 26
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 120}" height="{height}" {FONT}>',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="18" font-size="13" font-weight="bold">{escape(title)}</text>',
        '<text x="10" y="34" fill="#555">Seconds from the hang to the first failing check: line p5 to p99, box '
        "quartiles, bar median; right: share found</text>",
    ]
    for s in TICKS:
        at = LEFT + _x(s) * WIDTH
        parts.append(f'<line x1="{at:.0f}" x2="{at:.0f}" y1="{TOP - 4}" y2="{height - 22}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{at:.0f}" y="{height - 8}" text-anchor="middle" fill="#555">{s:g}</text>')
    y = float(TOP)
    for name in names:
        parts.append(f'<text x="10" y="{y + 11}" font-weight="bold">{escape(name)}</text>')
        for load in LOADS:
            found = times([t for t in whole if t.load == load], name)
            parts.append(f'<text x="{LEFT - 10}" y="{y + 11}" text-anchor="end" fill="#333">{load}</text>')
            parts.extend(_box(found, y, COLOURS["ours" if name in OURS else "theirs"]))
            y += ROW
        y += GAP
    return "\n".join([*parts, "</svg>", ""])


def _box(found: Sequence[float | None], y: float, colour: str) -> list[str]:
    seen = [s for s in found if s is not None]
    share = len(seen) / len(found) if found else 0.0
    fill = colour if share == 1 else COLOURS["missed"]
    text = f'<text x="{LEFT + WIDTH + 12}" y="{y + 11}" fill="{fill}">{share:.0%}</text>'
    if not seen:
        return [text]
    low, first, middle, third, high = (LEFT + _x(quantile(seen, q)) * WIDTH for q in (0.05, 0.25, 0.5, 0.75, 0.99))
    mid, width = y + ROW / 2, max(1.0, third - first)
    box, bar = f'x="{first:.1f}" y="{mid - 4}" width="{width:.1f}"', f'x1="{middle:.1f}" x2="{middle:.1f}"'
    return [
        f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{mid}" y2="{mid}" stroke="{colour}"/>',
        f'<rect {box} height="8" fill="{colour}" fill-opacity="0.35"/>',
        f'<line {bar} y1="{mid - 5}" y2="{mid + 5}" stroke="{colour}" stroke-width="2.5"/>',
        text,
    ]


def _x(seconds: float) -> float:
    """0..1 on a logarithmic axis."""
    return log10(min(max(seconds, MIN_AXIS_S), MAX_AXIS_S) / MIN_AXIS_S) / log10(MAX_AXIS_S / MIN_AXIS_S)
