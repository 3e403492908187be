"""How a request's CPU grows with tenants and with workers: the load of relay.py, in turns, in one run.

    python benchmarks/growth.py [--rounds N] [--seconds S] [--write]

One-token requests over 32 connections, named after so many tenants in turn. Each setting is a `sidecar run` of its own,
interpreted, with its defaults but for the flags named; all its processes share one core. Figures are medians of rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

from relay import Window, measure
from routes import ends, processes
from routes.ends import Load
from routes.report import heading, publish, table
from routes.rivals import Route, serving, sidecar_with

CONNECTIONS = 32
TENANTS = (0, 1, 100, 2_000, 50_000)  # the last ones are more than have labels of their own
WORKERS = (1, 2, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each window")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    ends.program()
    processes.stay_off_the_route()
    windows: dict[tuple[str, int], list[Window]] = defaultdict(list)
    names: dict[int, str] = {}
    with ExitStack() as stack:
        engine = stack.enter_context(ends.engine())
        routes: list[tuple[Route, tuple[int, ...]]] = []
        for workers in WORKERS:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            route = stack.enter_context(serving(sidecar_with("--workers", str(workers)), engine, folder))
            names |= route.process_names()
            routes.append((route, TENANTS if workers == 1 else (0,)))
        for turn in range(args.rounds):
            for route, tenants in routes:
                for count in tenants:
                    print(f"round {turn + 1}: {route.rival.name}, {count} tenants", file=sys.stderr, flush=True)
                    load = Load(CONNECTIONS, tenants=count)
                    windows[route.rival.name, count].append(measure(route, load, args.seconds))
    rows = [[name, f"{count:,}", *costs(several, names)] for (name, count), several in windows.items()]
    head = ["settings", "tenants", "CPU per request, µs", "of which relay", "control", "RSS, MiB"]
    publish([*heading("Growth", "medians"), *table(head, rows)], "growth" if args.write else "")


def costs(several: list[Window], names: dict[int, str]) -> list[str]:
    def per_request(process: str = "") -> str:
        return f"{statistics.median(used(window, process) for window in several):.0f}"

    def used(window: Window, process: str) -> float:
        seconds = sum(s for pid, s in window.cpu.items() if not process or names.get(pid) == process)
        return seconds * 1e6 / max(1, window.figures.requests)

    memory = statistics.median(window.memory[0] for window in several)
    return [per_request(), per_request("relay"), per_request("control"), f"{memory:.0f}"]


if __name__ == "__main__":
    main()
