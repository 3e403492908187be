"""One SVG: what each route costs, as bars: CPU per request, and per chunk as streams grow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

FONT = 'font-family="sans-serif" font-size="11"'
LEFT, WIDTH, ROW = 250, 420, 18
OURS, THEIRS = "#1b6ca8", "#a9a9a9"


@dataclass(frozen=True, slots=True)
class Bar:
    """One route's figure; `text` is next to it."""

    label: str
    value: float
    text: str
    ours: bool


def bars(panels: Sequence[tuple[str, Sequence[Bar]]]) -> str:
    """A panel of bars for each title, each on a scale of its own. Shorter is better."""
    parts, y = [], 24
    for title, rows in panels:
        parts.append(f'<text x="10" y="{y}" {FONT} font-weight="bold">{escape(title)}</text>')
        y += 8
        most = max((bar.value for bar in rows), default=1.0) or 1.0
        for bar in rows:
            length = max(1.0, bar.value / most * WIDTH)
            colour = OURS if bar.ours else THEIRS
            parts.append(f'<text x="{LEFT - 8}" y="{y + 13}" {FONT} text-anchor="end">{escape(bar.label)}</text>')
            parts.append(f'<rect x="{LEFT}" y="{y + 3}" width="{length:.1f}" height="{ROW - 6}" fill="{colour}"/>')
            parts.append(f'<text x="{LEFT + length + 6:.1f}" y="{y + 13}" {FONT}>{escape(bar.text)}</text>')
            y += ROW
        y += 22
    width = LEFT + WIDTH + 90
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}" viewBox="0 0 {width} {y}">'
    return "\n".join([head, f'<rect width="{width}" height="{y}" fill="white"/>', *parts, "</svg>", ""])
