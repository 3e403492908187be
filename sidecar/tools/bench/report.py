"""Pure: rows as a text table and as an SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Final

from sidecar.tools.bench.tally import OUTCOMES, BenchRow

COLUMNS: Final = (
    *("profile", "asked", *OUTCOMES, "tokens", "p50 s", "p95 s", "p99 s", "first p50", "first p95", "SLO"),
    *("$ / 1k completed", "$ / 1M tokens"),
)
COLOURS: Final[dict[str, str]] = {
    "completed": "#1b6ca8",
    "dropped": "#c9c9c9",
    "stalled": "#c0392b",
    "cancelled": "#e0b84c",
    "failed": "#7d3c98",
}
LEFT, WIDTH, ROW, TOP = 130, 460, 34, 56


def table(rows: Sequence[BenchRow]) -> str:
    """The rows in aligned columns."""
    lines = [COLUMNS, *(cells(r) for r in rows)]
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    return "\n".join(
        "  ".join([line[0].ljust(first), *(cell.rjust(w) for cell, w in zip(line[1:], others, strict=True))])
        for line in lines
    )


def cells(r: BenchRow) -> tuple[str, ...]:
    """One row's cells, in the order of COLUMNS."""
    verdict = ("pass" if r.slo_kept else "miss") if r.whole else "ended early"
    return (
        r.profile,
        str(r.requests),
        *(str(getattr(r, ended)) for ended in OUTCOMES),
        str(r.tokens),
        *(number(value, 2) for value in (r.p50, r.p95, r.p99, r.first_p50, r.first_p95)),
        verdict,
        number(r.dollars_per_1k_completed, 6),
        number(r.dollars_per_1m_tokens, 4),
    )


def number(value: float | None, digits: int) -> str:
    """A number, or a dash for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def plot(rows: Sequence[BenchRow], title: str) -> str:
    """An SVG: the outcomes of each run's requests, with p95 and price."""
    most = max((r.requests for r in rows), default=0) or 1
    height = TOP + ROW * len(rows) + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 250}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="18" font-weight="bold">{escape(title)}</text>',
    ]
    for n, ended in enumerate(OUTCOMES):
        x = LEFT + n * 92
        parts.append(f'<rect x="{x}" y="30" width="10" height="10" fill="{COLOURS[ended]}"/>')
        parts.append(f'<text x="{x + 14}" y="40">{ended}</text>')
    for n, r in enumerate(rows):
        parts += _bar(r, TOP + n * ROW, WIDTH / most)
    return "\n".join([*parts, "</svg>", ""])


def _bar(r: BenchRow, y: float, scale: float) -> list[str]:
    parts = [f'<text x="{LEFT - 8}" y="{y + 16}" text-anchor="end">{escape(r.profile)}</text>']
    x = float(LEFT)
    for ended in OUTCOMES:
        width = getattr(r, ended) * scale
        if width:
            parts.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="22" fill="{COLOURS[ended]}"/>')
        x += width
    price = "" if r.dollars_per_1k_completed is None else f", ${r.dollars_per_1k_completed:.4f} / 1k"
    words = f"{r.completed} ok, p95 {number(r.p95, 2)} s, SLO {'pass' if r.slo_kept else 'miss'}{price}"
    return [*parts, f'<text x="{x + 8:.1f}" y="{y + 16}">{words}</text>']
