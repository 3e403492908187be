"""The result of a calibration as text, and lines of progress."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from sidecar.load import cost_model
from sidecar.load.cost_model import Coefficients
from sidecar.tools.calibrate.checkpoint import GridPlan
from sidecar.tools.calibrate.fit import FitRow, accuracy, fit_line, line_accuracy, predicted_ms, variation, was_cached

BAR_CHARACTERS: Final = 24
# Spread of the turns above which the machine is reported as busy with other work.
NOISY_SHARE: Final = 0.15


@dataclass(frozen=True, slots=True)
class CalibrationReport:
    """Fitted and held-out shapes, and the result. `waited`: the median share of the time without a core.

    `turns`: how often each shape was measured. `notes`: what was skipped, and why.
    """

    fitted: Sequence[FitRow]
    held_out: Sequence[FitRow]
    co: Coefficients
    plan: GridPlan
    waited: float
    turns: int = 2
    notes: Sequence[str] = ()


def text(found: CalibrationReport, slo: float) -> str:
    """The report."""
    co, rows = found.co, [*found.fitted, *found.held_out]
    varies, spread = variation(rows, co), statistics.median(row.spread for row in rows)
    noisy = "; the machine is busy with other work: measure again when it is idle"
    once = "; nothing was measured twice: increase --seconds"
    decode = ", ".join(f"{s.open} open {1000 / s.rate / s.work.output:.3g} ms" for s in found.plan.decode)
    steps = ", ".join(
        f"{s.open} open: {s.p95:.2f} s, {s.rate * cost_model.mu(s.work, co) * 60:.0f} MU per minute"
        for s in found.plan.steps
    )
    terms = ", ".join(f"{name} {getattr(co, name):.4g}" for name in cost_model.TERMS)
    lines = [
        *table(found),
        "",
        *held_out(found),
        f"{_capacity(found)}; rates of the shapes differ by {varies:.1%} (coefficient of variation)",
        f"{found.turns} turns: those of one shape differ by {spread:.1%}; the engine waited for a core in "
        f"{found.waited:.1%} of the time, which is subtracted"
        + (noisy if max(spread, found.waited) > NOISY_SHARE else "")
        + (once if found.turns == 1 else ""),
        f"at p95 <= {slo:g} s: {_in_flight(found, slo)} ({steps})",
        f"a generated token: {decode}",
        f"1 MU = {cost_model.unit_ms(co):.1f} ms; {terms}",
        *([f"not measured: cached prompts: {co.no_cached}"] if co.no_cached else [cached_prompts(found)]),
        *found.notes,
    ]
    return "\n".join(lines)


def summary(found: CalibrationReport) -> dict[str, Any]:
    """The result for programs: coefficients, errors on held-out shapes as shares, and every shape in milliseconds."""
    co = found.co
    shapes = [
        {"shape": row.shape.name, "measured_ms": row.ms, "model_ms": predicted_ms(row, co), "held_out": row_is_held_out}
        for row_is_held_out, rows in ((False, found.fitted), (True, found.held_out))
        for row in rows
    ]
    return {
        "coefficients": asdict(co),
        "max_mu_per_minute": None if co.no_capacity else cost_model.max_mu_per_minute(co),
        "held_out": asdict(accuracy(found.held_out, co)),
        "shapes": shapes,
        "notes": list(found.notes),
    }


def _capacity(found: CalibrationReport) -> str:
    if found.co.no_capacity:
        return f"no capacity: {found.co.no_capacity}"
    return f"capacity with {found.plan.concurrency} open: {cost_model.max_mu_per_minute(found.co):.1f} MU per minute"


def cached_prompts(found: CalibrationReport) -> str:
    """How many of the expected prefixes were cached."""
    planned = [row for row in (*found.fitted, *found.held_out) if row.shape.cached]
    missed = [f"{row.shape.name} {_cached_share(row):.0%}" for row in planned if not was_cached(row.shape, row)]
    seen = f"cached prompts: {len(planned) - len(missed)} of {len(planned)} were cached, as reported by the engine"
    return f"{seen}; fitted as not cached, or in part: {', '.join(missed)}" if missed else seen


def explain_no_cached(rows: Sequence[FitRow], note: str) -> str:
    """Why the cost of cached prompts was not seen in these rows; `note` if none were sent. "" if it was seen."""
    planned = [row for row in rows if row.shape.cached]
    if not planned:
        return note
    if any(was_cached(row.shape, row) for row in planned):
        return ""
    return (
        f"{max(map(_cached_share, planned)):.0%} of them at most was in the engine's cache when repeated; is it "
        "smaller than the requests that were open (llama.cpp: slots), or are its blocks longer than the prompts?"
    )


def _cached_share(row: FitRow) -> float:
    """Share of the expected cached tokens that were cached."""
    return min(1.0, row.cached / row.shape.cached)


def held_out(found: CalibrationReport) -> list[str]:
    """The errors on the held-out shapes; if photos were measured, also without and with them."""
    fitted = fit_line(found.fitted)
    kinds = [("held out", found.held_out)]
    if photos := [r for r in found.held_out if r.shape.images]:
        kinds += [("of these text", [r for r in found.held_out if not r.shape.images]), ("of these photos", photos)]
    return [
        f"{name}: {accuracy(rows, found.co)}; alpha-beta line: {line_accuracy(rows, fitted)}" for name, rows in kinds
    ]


def table(found: CalibrationReport) -> list[str]:
    """One line for each shape, cheapest first."""
    rows = [("shape", "measured ms", "model ms", "error", "turns", "", "")]
    for kept, group in (("", found.fitted), ("held out", found.held_out)):
        for row in sorted(group, key=lambda row: row.ms):
            predicted = predicted_ms(row, found.co)
            error, spread = f"{predicted / row.ms - 1:+.0%}", f"±{row.spread / 2:.0%}"
            cached = f"{_cached_share(row):.0%} cached" if row.shape.cached else ""
            rows.append((row.shape.name, f"{row.ms:.1f}", f"{predicted:.1f}", error, spread, cached, kept))
    return align(rows)


def align(rows: Sequence[Sequence[str]], left: int = 0) -> list[str]:
    """Lines of aligned cells, the first `left` of each to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [str.ljust] * left + [str.rjust] * (len(widths) - left)
    return ["  ".join(side(cell, w) for side, cell, w in zip(sides, r, widths, strict=True)).rstrip() for r in rows]


def _in_flight(found: CalibrationReport, slo: float) -> str:
    if found.co.mu_in_flight > 0:
        return f"{found.co.mu_in_flight:.2f} MU in flight"
    if found.plan.steps[0].p95 > slo:
        return "none; even a single request of this size exceeds it"
    if found.co.no_capacity:
        return "not reached in the time"
    return f"not reached in the time; by Little's law {cost_model.max_mu_in_flight(found.co, slo):.2f} MU in flight"


def bar(done: float, of: float, what: str) -> str:
    """One line of progress, at most 100 %."""
    share = min(1.0, done / max(of, 1e-9))
    full = int(BAR_CHARACTERS * share)
    return f"[{'#' * full}{'.' * (BAR_CHARACTERS - full)}] {share:.0%} {what}"


def show_progress(line: str, *, lasting: bool = False) -> None:
    """Print progress; on a terminal, each line overwrites the last."""
    if sys.stderr.isatty():
        print("\r\x1b[K" + line, end="\n" if lasting else "", file=sys.stderr, flush=True)
    elif line:
        print(line, file=sys.stderr, flush=True)
