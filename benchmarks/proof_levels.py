"""The verdict at each level of proof: engine-weeks with false kills, and hangs with the time to readiness and kill.

    nice python benchmarks/proof_levels.py [--weeks N] [--rounds N] [--seed N] [--processes N] [--minutes N]
    [--keep FILE] [--traces DIR] [--write]

Simulated, as verdict_sim.py does it, whose weeks and hangs these are; sim/levels.py says how a week is lived at each
level. After `--minutes` no further week begins. `--keep FILE` keeps results; the same command resumes there. Prints one
table, and below it what was found false; `--write` keeps it in benchmarks/results/. Progress goes to stderr.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from sim import levels, modes, report
from sim.keep import Job, Kept
from sim.proofs import LEVELS
from sim.weeks import Tally
from verdict_sim import CO, HERE, TRACES, loaded

BATCH = 5  # weeks of one job
SAY_EVERY = 20  # jobs
Result = tuple[levels.Lived, list[modes.Trial]]


def main() -> None:
    """Simulate and print."""
    args = parsed()
    began, weeks, trials = time.monotonic(), {level: Tally() for level in LEVELS}, []
    for done, (lived, found) in enumerate(results(args, planned(args), began), 1):
        for level, tally in lived.items():
            weeks[level].add(tally)
        trials.extend(found)
        if done % SAY_EVERY == 0:
            print(f"{time.monotonic() - began:.0f} s", levels.table(weeks, trials), sep="\n", file=sys.stderr)
    total = Tally()
    for tally in weeks.values():
        total.add(tally)
    missed = [f"- mode {t.mode}, {t.load}, seen: {t.level}: {t.trail}" for t in trials if t.liveness is None]
    text = "\n\n".join(
        (
            f"# The verdict at each level of proof, simulated, {datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
            f"Simulated, not measured. Seed {args.seed}, traces: {', '.join(sorted(loaded(args.traces)))}; "
            f"{time.monotonic() - began:.0f} s on {args.processes} process(es).",
            levels.table(weeks, trials),
            "## False kills, and healthy requests ended\n\n" + report.findings(total, 20),
            "## Missed hangs\n\n" + ("\n".join(missed) or "None."),
        )
    )
    print(text)
    if args.write:
        file = HERE / "results" / f"proof-levels-{datetime.datetime.now(datetime.UTC):%Y-%m-%d}.md"
        file.write_text(text + "\n")


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weeks", type=int, default=10_000, help="at each level")
    parser.add_argument("--rounds", type=int, default=6, help="of all hangs, at each level")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=1e6)
    parser.add_argument("--keep", type=Path, default=None, metavar="FILE")
    parser.add_argument(
        "--traces", type=Path, default=TRACES, help="folder of traces; synthetic arrivals where it is absent"
    )
    parser.add_argument("--write", action="store_true")
    return parser.parse_args()


def planned(args: argparse.Namespace) -> list[Job]:
    """All jobs; the rounds are spread over the weeks, so that a run that is broken off has both."""
    weeks = [("week", str(args.seed), first, min(BATCH, args.weeks - first)) for first in range(0, args.weeks, BATCH)]
    rounds = [(f"hangs {level}", str(args.seed), n, 1) for n in range(args.rounds) for level in LEVELS]
    every = max(1, len(weeks) // max(1, len(rounds)))
    parts = [[*weeks[i * every : (i + 1) * every], job] for i, job in enumerate(rounds)]
    return [job for part in parts for job in part] + weeks[len(rounds) * every :]


def results(args: argparse.Namespace, work: list[Job], began: float) -> Iterator[Result]:
    """All results: those in the file, then the rest, until the time is over."""
    kept: Kept[Result] = Kept(args.keep, HERE)
    yield from (kept.done[each] for each in work if each in kept.done)
    rest = iter([each for each in work if each not in kept.done])
    with ProcessPoolExecutor(args.processes) as pool:
        open_jobs = []
        while True:
            while len(open_jobs) < 2 * args.processes and time.monotonic() - began < 60 * args.minutes:
                if (job := next(rest, None)) is None:
                    break
                open_jobs.append((job, pool.submit(done, job, args.traces)))
            if not open_jobs:
                return
            job, future = open_jobs.pop(0)
            yield kept.add(job, future.result())


def done(job: Job, folder: Path) -> Result:
    """One job: some weeks at each level, or a round of hangs at one. Deterministic in its arguments."""
    kind, seed, first, count = job
    if kind != "week":
        return {}, levels.trials(f"{seed}:{first}", kind.split()[1])
    weeks = {level: Tally() for level in LEVELS}
    for n in range(first, first + count):
        for level, tally in levels.lived(f"{seed}:{n}", loaded(folder), CO).items():
            weeks[level].add(tally)
    return weeks, []


if __name__ == "__main__":
    main()
