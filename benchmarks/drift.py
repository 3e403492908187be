"""Drift detection, simulated: time to detection, rate of false alarms, and the accuracy of the re-fit.

    python benchmarks/drift.py [--histories 40] [--windows 3000] [--write]

The engine is synthetic with known costs: mixed load (1 to 40 decoding together, images, cached prompts), log-normal
noise per window, a part of d per step and the rest per token. Detector and re-fit are production code.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from sidecar.load import cost_model
from sidecar.load.cost_model import Coefficients
from sidecar.load.drift import Drift
from sidecar.load.refit import Refit
from sidecar.load.work_windows import WINDOW_S
from tests.load.work import found, slower, windows

TRUE = Coefficients(k=5.0, a=0.2, b=2e-5, d=3.0, f=4e-4, g=0.05, h=4.0, batch=8, source="calibrated")
SHARED = (0.3, 0.6, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--histories", type=int, default=40)
    parser.add_argument("--windows", type=int, default=3000)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if args.histories < 1 or args.windows < 1:
        parser.error("--histories and --windows must be at least 1")
    lines = []
    for line in (*alarms(args.histories, args.windows), *refits(args.histories)):
        print(line)
        lines.append(line)
    if args.write:
        day, text = time.strftime("%Y-%m-%d"), "\n".join(lines)
        command = f"benchmarks/drift.py --histories {args.histories} --windows {args.windows}"
        page = f"# Drift and re-fit, simulated, {day}\n\n`{command}`\n\n```\n{text}\n```\n"
        (Path(__file__).parent / "results" / f"drift-{day}.md").write_text(page)


def alarms(histories: int, length: int) -> Iterator[str]:
    """False alarms in `length` windows, and the time to detect a slowdown; a line for each noise level."""
    yield "noise  false alarms/100 h of work   found after, windows of 10 s: median / 90th / missed in 60"
    for noise in (0.05, 0.15, 0.3):
        false = [
            found(Drift(TRUE, caching=True), windows(TRUE, length, seed, shared=SHARED[seed % 3], noise=noise))
            for seed in range(histories)
        ]
        hours = sum(n or length for n in false) * WINDOW_S / 3600
        cells = []
        for times in (1.3, 1.5, 2.0, 4.0):
            took = []
            for seed in range(histories):
                drift, shared = Drift(TRUE, caching=True), SHARED[seed % 3]
                found(drift, windows(TRUE, 300, seed + 1000, shared=shared, noise=noise))
                took.append(
                    found(drift, slower(windows(TRUE, 60, seed + 2000, shared=shared, noise=noise), times)) or 99
                )
            ranked = sorted(took)
            cells.append(f"{times:g}x {statistics.median(took):.0f}/{ranked[int(0.9 * len(ranked))]}/{took.count(99)}")
        yield f"{noise:5.0%}  {100 * sum(n is not None for n in false) / hours:26.2f}   " + ", ".join(cells)


def refits(histories: int) -> Iterator[str]:
    """The error of the re-fit after 300 windows, by its prior."""
    yield "re-fit after 300 windows at 10 % noise: price of one MU against the true one, by where it began"
    for name, prior in (("default", Coefficients(batch=8)), ("a half, d double", replace(TRUE, a=0.1, d=6.0))):
        off = []
        for seed in range(histories):
            refit = Refit(prior)
            for window in windows(TRUE, 300, seed, shared=SHARED[seed % 3]):
                refit.add(window)
            shadow = refit.shadow()
            assert shadow
            off.append(abs(cost_model.unit_ms(shadow) / cost_model.unit_ms(TRUE) - 1))
        start = cost_model.unit_ms(prior) / cost_model.unit_ms(TRUE) - 1
        yield f"  {name}: {start:+.0%} -> median {statistics.median(off):.1%}, worst {max(off):.1%}"


if __name__ == "__main__":
    main()
