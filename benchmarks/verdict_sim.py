"""The verdict simulator: production progress and verdict code, and the field's detectors, against hangs and alarms.

    python benchmarks/verdict_sim.py [--weeks N] [--trials N] [--seed N] [--processes N] [--traces DIR] [--quick]
    [--write] python benchmarks/verdict_sim.py --weeks 10000 --keep FILE   # keeps results in FILE; the same command
    resumes there python benchmarks/verdict_sim.py --only-week SEED:NUMBER     # one week again, with all its findings

Simulated, not measured: an engine model under a simulated clock (benchmarks/sim/engine.py) drives
`sidecar.control.state.ControlState`. Prints how many hangs each detector finds, when (p50 / p99 seconds) and with which
reason, and how many healthy engines each would have killed. benchmarks/sim/weeks.py describes an engine-week. `--write`
puts the tables and a plot into benchmarks/results/. Progress and remaining time go to stderr.
"""

from __future__ import annotations

import argparse
import datetime
import random
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path

from sim import modes, report, traces
from sim.keep import Job, Kept
from sim.plot import plot
from sim.weeks import Tally, week

from sidecar.load.cost_model import Coefficients

HERE = Path(__file__).resolve().parent
TRACES = HERE.parent.parent / "shared" / "traces"
CO = Coefficients()
BATCH = 10  # weeks of one job
Result = tuple[
    Tally, list[modes.Trial], list[modes.Trial], float
]  # trials, those at sites with less telemetry, CPU seconds


def main() -> None:
    """Simulate, print, and write where asked."""
    args = parsed()
    if args.only_week:
        tally = week(args.only_week, loaded(args.traces), CO)
        print(report.coverage(tally), report.alarms(tally), report.findings(tally, 99), sep="\n\n")
        return
    began, seconds = time.monotonic(), 0.0
    tally, trials, poor = Tally(), [], []
    work = planned(args)
    for done, (part, found, less, cpu) in enumerate(results(args, work), 1):
        tally.add(part)
        trials.extend(found)
        poor.extend(less)
        seconds += cpu
        if done % 20 == 0 or done == len(work):
            left = (time.monotonic() - began) * (len(work) / done - 1)
            print(
                f"{done}/{len(work)} jobs, {tally.weeks:.0f} weeks, {len(trials)} trials; {left:.0f} s left",
                file=sys.stderr,
            )
    text = page(args, tally, trials, poor, (time.monotonic() - began, seconds))
    print(text)
    if args.write:
        stem = HERE / "results" / f"verdict-{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"
        stem.with_suffix(".md").write_text(text + "\n")
        stem.with_suffix(".svg").write_text(
            plot(trials, f"Time to detect a hang of the whole engine, {len(trials)} simulated trials")
        )


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
    parser.add_argument("--keep", type=Path, default=None, metavar="FILE", help="resume from this file, and add to it")
    parser.add_argument("--only-week", default="", metavar="SEED:NUMBER")
    args = parser.parse_args()
    if args.quick:
        args.weeks, args.trials = 12, 1
    if args.weeks < 1 or args.trials < 0 or args.processes < 1:
        parser.error("--weeks and --processes must be at least 1, --trials at least 0")
    if args.only_week and not re.fullmatch(r"\d+:\d+", args.only_week):
        parser.error(f"--only-week: {args.only_week!r} is not SEED:NUMBER, as the findings name a week")
    if args.keep and not args.keep.parent.is_dir():
        parser.error(f"--keep: the directory of {args.keep} does not exist")
    return args


@lru_cache
def loaded(folder: Path) -> dict[str, traces.Trace]:
    """The traces, once per process."""
    return traces.load(folder)


def planned(args: argparse.Namespace) -> list[Job]:
    """All jobs: weeks in batches, then rounds of trials."""
    weeks = [("week", f"{args.seed}", first, min(BATCH, args.weeks - first)) for first in range(0, args.weeks, BATCH)]
    return weeks + [("quick" if args.quick else "trial", f"{args.seed}", n, 1) for n in range(args.trials)]


def results(args: argparse.Namespace, work: list[Job]) -> Iterator[Result]:
    """All results: first those in the file, then the rest in order."""
    kept = Kept(args.keep, HERE)
    yield from (kept.done[each] for each in work if each in kept.done)
    rest = [each for each in work if each not in kept.done]
    if args.processes == 1:
        for each in rest:
            yield kept.add(each, job(*each, args.traces))
    elif rest:
        with ProcessPoolExecutor(args.processes) as pool:
            found = pool.map(job, *zip(*rest, strict=True), [args.traces] * len(rest))
            for each, result in zip(rest, found, strict=True):
                yield kept.add(each, result)


def job(kind: str, seed: str, first: int, count: int, folder: Path) -> Result:
    """Some weeks, or one trial of each mode under each of its loads, plus decoding at sites with less telemetry.

    Deterministic in its arguments, except for the CPU seconds.
    """
    tally, began = Tally(), time.process_time()
    if kind == "week":
        for n in range(first, first + count):
            tally.add(week(f"{seed}:{n}", loaded(folder), CO))
        return tally, [], [], time.process_time() - began
    loads, horizon = (("idle", "decoding"), 150.0) if kind == "quick" else (modes.LOADS, modes.HORIZON_S)
    found, less = [], []
    for mode in (*modes.MODES, *modes.FIELD_MODES):
        for load in (x for x in mode.loads if x in loads or mode.is_field):
            rng = random.Random(f"{seed}:{first}:{mode.number}:{load}")
            found.append(modes.trial(modes.made_for(mode, rng), mode, load, horizon))
        if mode.whole and "decoding" in mode.loads and kind != "quick":
            rng = random.Random(f"{seed}:{first}:{mode.number}:less")
            less.append(modes.trial(modes.made_for(mode, rng, tells=False), mode, "decoding", horizon))
    return tally, found, less, time.process_time() - began


def page(
    args: argparse.Namespace,
    tally: Tally,
    trials: list[modes.Trial],
    poor: list[modes.Trial],
    spent: tuple[float, float],
) -> str:
    """All tables."""
    names = ", ".join(sorted(loaded(args.traces)))
    alarms = (
        "Kills of a healthy engine. Ours count from the first tick of a failing liveness, theirs from the last of "
        "their failing probes. Requests ended: by the control, while the engine was healthy. Harmed: canaries that "
        "killed an engine whose memory was released."
    )
    return "\n\n".join(
        (
            f"# Progress verdicts, simulated, {datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
            f"Simulated, not measured. Seed {args.seed}, traces: {names}; {spent[0]:.0f} s ({spent[1]:.0f} s of CPU) "
            f"on {args.processes} process(es).",
            report.coverage(tally),
            "## Figures\n\nHangs of the whole engine, except those during a long prefill.\n\n"
            + report.figures(tally, trials),
            "## Both axes, in the terms of Chen, Toueg and Aguilera (2002)\n\n" + report.quality(tally, trials),
            "## Whole-engine hangs: found/all, then p50 / p99 seconds to the first failing check\n\n"
            + report.summary(trials)
            + "\n\n"
            + report.right(trials),
            "## The same by what waited: found/all, then p50 / p99 seconds to /readyz failing and to the kill\n\n"
            + report.by_queue(trials),
            "## Hangs of the field's reports: found/all, then p50 / p99 seconds\n\n" + report.field(trials),
            "## Long prefills: detection against the prefill that was outstanding\n\n" + report.long_prefills(trials),
            "## Hangs of a part, of one request, of a start-up\n\n" + report.parts(trials),
            "## The whole engine again, decoding, without a metrics page and with half the answers in one piece\n\n"
            + report.summary(poor),
            "## Healthy engines: what each alarm did\n\n" + alarms + "\n\n" + report.alarms(tally),
            "## Every hang mode: found/all, then p50 / p99 seconds\n\n" + report.detection(trials),
            "## The first false kills, and healthy requests ended, of each alarm\n\n" + report.findings(tally),
        )
    )


if __name__ == "__main__":
    main()
