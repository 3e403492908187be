"""Pure: rows as a text table and as an SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Final

from sidecar.tools.bench.tally import OUTCOMES, BenchRow
from sidecar.tools.calibrate.report import align

COLUMNS: Final = (
    *("profile", "asked", *OUTCOMES, "tokens", "p50 s", "p95 s", "p99 s", "first p50", "first p95", "SLO"),
    *("$ / 1k completed", "$ / 1M tokens"),
)
COLOURS: Final = dict(zip(OUTCOMES, ("#1b6ca8", "#c9c9c9", "#c0392b", "#e0b84c", "#7d3c98"), strict=True))
LEFT, WIDTH, ROW, TOP = 130, 460, 34, 56


def table(rows: Sequence[BenchRow]) -> str:
    """The rows in aligned columns."""
    return "\n".join(align([COLUMNS, *map(cells, rows)], left=1))


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
    width, height = LEFT + WIDTH + 250, TOP + ROW * len(rows) + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="18" font-weight="bold">{escape(title)}</text>',
    ]
    for n, (ended, colour) in enumerate(COLOURS.items()):
        x = LEFT + n * 92
        parts.append(f'<rect x="{x}" y="30" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{x + 14}" y="40">{ended}</text>')
    for n, r in enumerate(rows):
        end, y = float(LEFT), TOP + n * ROW
        parts.append(f'<text x="{LEFT - 8}" y="{y + 16}" text-anchor="end">{escape(r.profile)}</text>')
        for ended, colour in COLOURS.items():
            if length := getattr(r, ended) * WIDTH / most:
                parts.append(f'<rect x="{end:.1f}" y="{y}" width="{length:.1f}" height="22" fill="{colour}"/>')
            end += length
        price = "" if r.dollars_per_1k_completed is None else f", ${r.dollars_per_1k_completed:.4f} / 1k"
        words = f"{r.completed} ok, p95 {number(r.p95, 2)} s, SLO {'pass' if r.slo_kept else 'miss'}{price}"
        parts.append(f'<text x="{end + 8:.1f}" y="{y + 16}">{words}</text>')
    return "\n".join([*parts, "</svg>", ""])
