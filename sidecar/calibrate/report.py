"""Pure: what a calibration found, as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sidecar import units
from sidecar.calibrate.fit import Accuracy, Measured, accuracy, line, line_accuracy, variation
from sidecar.units import Coefficients

BAR = 24


@dataclass(frozen=True, slots=True)
class Search:
    """The search for the capacity at the SLO: (requests open, p95 seconds) of each step, and the MU in flight that held it."""

    steps: tuple[tuple[int, float], ...]
    mu_in_flight: float


@dataclass(frozen=True, slots=True)
class Findings:
    """Measurements that were fitted and that were held out, and what came of them."""

    fitted: Sequence[Measured]
    held_out: Sequence[Measured]
    co: Coefficients
    search: Search

    @property
    def ours(self) -> Accuracy:
        """The cost model's errors on what was held out."""
        return accuracy(self.held_out, self.co)

    @property
    def theirs(self) -> Accuracy:
        """Those of an alpha-beta line."""
        return line_accuracy(self.held_out, line(self.fitted))

    @property
    def variation(self) -> float:
        """How much the capacity differs between shapes."""
        return variation([*self.fitted, *self.held_out], self.co)


def text(found: Findings, slo: float) -> str:
    """The report."""
    rows = [("shape", "measured ms", "model ms", "error", "")]
    for kept, group in (("", found.fitted), ("held out", found.held_out)):
        for m in sorted(group, key=lambda m: m.ms):
            w, predicted = m.work, units.gpu_ms(m.work, found.co)
            name = f"{w.uncached}{f'+{w.cached}c' if w.cached else ''}/{w.output}"
            rows.append((name, f"{m.ms:.1f}", f"{predicted:.1f}", f"{predicted / m.ms - 1:+.0%}", kept))
    widths = [max(len(r[i]) for r in rows) for i in range(5)]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    ours, theirs = found.ours, found.theirs
    co = found.co
    return "\n".join(
        [
            *lines,
            "",
            f"held out: MAPE {ours.mape:.1%}, P90 {ours.p90:.1%}, R2 {ours.r2:.3f}; "
            f"alpha-beta line: MAPE {theirs.mape:.1%}, P90 {theirs.p90:.1%}, R2 {theirs.r2:.3f}",
            f"capacity: {units.max_mu_per_minute(co):.1f} MU per minute, coefficient of variation over the shapes {found.variation:.1%}",
            f"at p95 <= {slo:g} s: {found.search.mu_in_flight:.2f} MU in flight ("
            + ", ".join(f"{n} open: {p95:.2f} s" for n, p95 in found.search.steps)
            + ")",
            f"1 MU = {units.unit_ms(co):.1f} ms; "
            + ", ".join(f"{name} {getattr(co, name):.4g}" for name in ("k", "a", "b", "d", "f", "g", "h")),
        ]
    )


def bar(done: int, of: int, what: str) -> str:
    """One line of progress."""
    full = BAR * done // max(of, 1)
    return f"[{'#' * full}{'.' * (BAR - full)}] {done}/{of} {what}"
