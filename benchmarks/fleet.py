"""Fleet replay: real traces on simulated replicas; routing and autoscaling with the production ledger and prices.

    python benchmarks/fleet.py [--replicas N] [--seed N] [--seeds N] [--trace NAME] [--only PART] [--traces DIR]
                               [--processes N] [--quick] [--write]
    python benchmarks/fleet.py --only weeks [--gaps KIND] [--seeds N] [--quick] [--write]

Simulated, not measured. The cost model does not know the formulas of the engines (benchmarks/replay/engine.py); its
coefficients come from the fit of `sidecar.tools.calibrate`. Prints p99 of the time to first token, SLO attainment and
GPU hours; `--write` puts the tables and two plots into benchmarks/results/. Progress goes to stderr. Without the traces
it is skipped.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from replay import jobs, plot, report, weeks
from replay.jobs import Routed, Scaled

HERE = Path(__file__).resolve().parent
TRACES = HERE.parent.parent / "shared" / "traces"


def main() -> None:
    """Simulate, print, and write where asked."""
    args = parsed()
    if not args.traces.is_dir():
        print(f"skipped: no traces in {args.traces}; name their folder with --traces", file=sys.stderr)
        return
    began = time.monotonic()
    if args.only == "weeks":
        two_weeks(args)
        return
    seeds = range(args.seed, args.seed + args.seeds)
    routing = [] if args.only == "scaling" else jobs.routing(args.replicas, seeds, args.trace, quick=args.quick)
    scaling = [] if args.only == "routing" else jobs.scaling(args.seed, args.trace, quick=args.quick)
    routed = [r for r in results(args, routing) if isinstance(r, Routed)]
    scaled = [r for r in results(args, scaling) if isinstance(r, Scaled)]
    text = report.page(args.replicas, args.seeds, routed, scaled, time.monotonic() - began)
    print(text)
    if args.write:
        stem = f"fleet-{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"
        (HERE / "results" / f"{stem}.md").write_text(text + "\n")
        (HERE / "results" / f"{stem}-routing.svg").write_text(plot.routing(routed))
        (HERE / "results" / f"{stem}-scaling.svg").write_text(plot.scaling(scaled))


def two_weeks(args: argparse.Namespace) -> None:
    """Two weeks of production clients, and chosen hours of them as discrete events."""
    seeds = range(args.seed, args.seed + args.seeds)
    windows = range(weeks.WINDOWS // 2, weeks.WINDOWS) if args.quick else range(weeks.WINDOWS)
    began = time.monotonic()

    def progress(done: str) -> None:
        print(f"{time.monotonic() - began:.0f} s: {done}", file=sys.stderr)

    rows = weeks.simulate(args.traces, seeds, windows, progress, [args.gaps] if args.gaps else weeks.GAPS)
    found = [] if args.quick else list(weeks.pieces(args.traces, args.seed))
    text = weeks.page(rows, found, args.seeds, windows)
    print(text)
    if args.write:
        stem = f"fleet-weeks-{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"
        (HERE / "results" / f"{stem}.md").write_text(text + "\n")
        (HERE / "results" / f"{stem}.svg").write_text(plot.weeks(rows))


def parsed() -> argparse.Namespace:
    """The command line; `--quick` is one seed, one load and few targets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=8, help="for routing")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3, help="each with another third of the hour; for routing")
    parser.add_argument("--trace", default="", choices=("", *jobs.SERVICES), help="one trace only")
    parser.add_argument("--only", default="", choices=("", "routing", "scaling", "weeks"), help="one part only")
    parser.add_argument("--traces", type=Path, default=TRACES, help="their folder")
    parser.add_argument("--gaps", default="", choices=("", *weeks.GAPS), help="one kind of arrivals only; for weeks")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if args.replicas < 2 or args.seeds < 1 or args.processes < 1:
        parser.error("--replicas must be at least 2, --seeds and --processes at least 1")
    if args.quick:
        args.seeds = 1
    return args


def results(args: argparse.Namespace, work: list[jobs.Job]) -> Iterator[Routed | Scaled]:
    """All results, in the order of the jobs."""
    if args.processes == 1:
        found: Iterator[Routed | Scaled] = (jobs.run(job, args.traces) for job in work)
        yield from shown(found, len(work))
        return
    with ProcessPoolExecutor(args.processes) as pool:
        yield from shown(pool.map(jobs.run, work, [args.traces] * len(work)), len(work))


def shown(found: Iterator[Routed | Scaled], count: int) -> Iterator[Routed | Scaled]:
    """The results, with a line of progress every tenth."""
    for done, result in enumerate(found, 1):
        if done % max(1, count // 10) == 0:
            print(f"{done}/{count} runs", file=sys.stderr)
        yield result


if __name__ == "__main__":
    main()
