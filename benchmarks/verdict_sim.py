"""The verdict simulator: the production progress and verdict code against hangs and alarms, beside the field's detectors.

    python benchmarks/verdict_sim.py [--weeks N] [--trials N] [--seed N] [--processes N] [--traces DIR] [--quick] [--write]
    python benchmarks/verdict_sim.py --only-week SEED:NUMBER     # one week again, with all that it found

Simulated, not measured: an engine model under a simulated clock (benchmarks/sim/engine.py) drives `sidecar.control.Control` itself.
Prints how many hangs each detector finds and when (p50 / p99 seconds), and how many healthy engines each would have killed.
`--write` puts the tables and a plot into benchmarks/results/. Progress goes to stderr.
"""

from __future__ import annotations

import argparse
import datetime
import random
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path

from sim import modes, report, traces
from sim.weeks import Tally, week

from sidecar.units import Coefficients

HERE = Path(__file__).resolve().parent
TRACES = HERE.parent.parent / "shared" / "traces"
CO = Coefficients()
BATCH = 10  # weeks, or trials, of one job


def main() -> None:
    """Simulate, print, and write where asked."""
    args = parsed()
    if args.only_week:
        tally = week(args.only_week, loaded(args.traces), CO)
        print(report.coverage(tally), report.alarms(tally), report.findings(tally, 99), sep="\n\n")
        return
    began = time.monotonic()
    tally, trials = Tally(), []
    for done, (part, found) in enumerate(jobs(args), 1):
        tally.add(part)
        trials.extend(found)
        if done % 10 == 0:
            print(f"{tally.weeks:.0f} weeks, {len(trials)} trials, {time.monotonic() - began:.0f} s", file=sys.stderr)
    text = page(args, tally, trials, time.monotonic() - began)
    print(text)
    if args.write:
        stem = HERE / "results" / f"verdict-{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"
        stem.with_suffix(".md").write_text(text + "\n")
        stem.with_suffix(".svg").write_text(report.plot(trials))


def parsed() -> argparse.Namespace:
    """The command line; `--quick` is 12 weeks and one short trial of each mode, idle and decoding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weeks", type=int, default=10_000)
    parser.add_argument("--trials", type=int, default=12, help="of each mode and load")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--traces", type=Path, default=TRACES, help="folder of traces; synthetic arrivals where it is absent"
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--only-week", default="", metavar="SEED:NUMBER")
    args = parser.parse_args()
    if args.quick:
        args.weeks, args.trials = 12, 1
    if args.weeks < 1 or args.trials < 0 or args.processes < 1:
        parser.error("--weeks and --processes must be at least 1, --trials at least 0")
    return args


@lru_cache
def loaded(folder: Path) -> dict[str, traces.Trace]:
    """The traces, once per process."""
    return traces.load(folder)


def jobs(args: argparse.Namespace) -> Iterator[tuple[Tally, list[modes.Trial]]]:
    """All jobs' results, as they come in order."""
    work = [("week", f"{args.seed}", first, min(BATCH, args.weeks - first)) for first in range(0, args.weeks, BATCH)]
    work += [("quick" if args.quick else "trial", f"{args.seed}", n, 1) for n in range(args.trials)]
    if args.processes == 1:
        yield from (job(*each, args.traces) for each in work)
        return
    with ProcessPoolExecutor(args.processes) as pool:
        yield from pool.map(job, *zip(*work, strict=True), [args.traces] * len(work))


def job(kind: str, seed: str, first: int, count: int, folder: Path) -> tuple[Tally, list[modes.Trial]]:
    """Some weeks, or one trial of each mode under each of its loads. Deterministic in its arguments."""
    tally = Tally()
    if kind == "week":
        for n in range(first, first + count):
            tally.add(week(f"{seed}:{n}", loaded(folder), CO))
        return tally, []
    loads, horizon = (("idle", "decoding"), 100.0) if kind == "quick" else (modes.LOADS, modes.HORIZON)
    rows = [(mode, load) for mode in modes.MODES for load in mode.loads if load in loads]
    rngs = (random.Random(f"{seed}:{first}:{mode.number}:{load}") for mode, load in rows)
    return tally, [
        modes.trial(modes.made_for(m, rng), m, load, horizon) for (m, load), rng in zip(rows, rngs, strict=True)
    ]


def page(args: argparse.Namespace, tally: Tally, trials: list[modes.Trial], seconds: float) -> str:
    """All tables."""
    names = ", ".join(sorted(loaded(args.traces)))
    return "\n\n".join((
        f"# Progress verdicts, simulated, {datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        f"Simulated, not measured. Seed {args.seed}, traces: {names}; {seconds:.0f} s on {args.processes} process(es).",
        report.coverage(tally),
        "## Whole-engine hangs: found/all, then p50 / p99 seconds\n\n" + report.summary(trials),
        "## Healthy engines: what each alarm did\n\n" + report.alarms(tally),
        "## Every hang mode: found/all, then p50 / p99 seconds\n\n" + report.detection(trials),
        "## The first false kills of each alarm\n\n" + report.findings(tally),
    ))  # fmt: skip


if __name__ == "__main__":
    main()
