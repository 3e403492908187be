"""What a relay costs: the same load straight to an engine and through each rival, in turns, in one run.

    python benchmarks/relay.py [--rivals NAMES] [--rounds N] [--seconds S] [--streams N ...] [--quick] [--write]

Engine and client are compiled (routes/load.cpp) and share one core; each rival has the other one, with all its
processes, and all of them are counted: user and system time by the clock of each process. The sidecar runs as
`sidecar run` with its defaults, so that everything is admitted, priced and recorded; interpreted, and compiled
(`make compiled`). "Added" is the time of a request less that of the same round's direct one. A paced stream has a
chunk each 50 ms; its delay is from the engine's write to the client's read. The forwarder moves bytes between two
sockets and is the least that any relay can cost here. Figures are medians over the rounds. Answers are compared with
the engine's own before anything is timed. The engine's metrics page is short; scrape.py has the cost of long ones.
`--write` keeps the tables and a plot.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import resource
import statistics
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from routes import ends, plot, processes
from routes.ends import Figures, Load
from routes.plot import Bar
from routes.processes import cpu_seconds
from routes.report import RESULTS, heading, publish, table
from routes.rivals import COMPILED, DIRECT, INTERPRETED, RIVALS, SIDECARS, Absent, Rival, Route, serving

PACE_MS = 50.0
ENDLESS, SHORT = 1_000_000, 200  # chunks of a stream
SETTLED_SHARE, SETTLE_TIMEOUT_S = 0.2, 20.0


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    connections: tuple[int, ...] = (1, 32, 256)
    streams: tuple[int, ...] = (64, 512, 2000)
    rounds: int = 3
    seconds: float = 4.0

    def requests(self) -> list[Load]:
        return [Load(c) for c in self.connections]

    def paced(self) -> list[Load]:
        return [Load(n, ENDLESS, PACE_MS) for n in self.streams]

    def unpaced(self) -> list[Load]:
        return [Load(n, SHORT) for n in self.streams]

    def counted(self) -> Load:
        """The requests whose CPU time is counted: neither idle between two of them nor a crowd."""
        return Load(32 if 32 in self.connections else self.connections[-1])


FULL, QUICK = Plan(), Plan(connections=(32,), streams=(16,), rounds=1, seconds=0.2)


@dataclass(frozen=True, slots=True)
class Window:
    """One load on one route: what the client saw, and what all processes between used."""

    figures: Figures
    cpu: dict[int, float]
    memory: tuple[float, float]

    @property
    def cpu_us(self) -> float:
        return sum(self.cpu.values()) * 1e6


Windows = dict[tuple[Rival, Load], list[Window]]


def check(direct: Route, route: Route) -> None:
    """A route's answers are the engine's."""
    for stream in (False, True):
        expected, got = (answer(r.port, stream) for r in (direct, route))
        if got != expected:
            raise SystemExit(f"{route.rival.name} changes answers: {got[-300:]!r} instead of {expected[-300:]!r}")


def answer(port: int, stream: bool) -> bytes:
    """An answer without its chunks' times."""
    body = {"model": "m", "max_tokens": 3, "stream": stream, "messages": [{"role": "user", "content": "Say a word."}]}
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    asked = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(asked, timeout=30) as got:
        return re.sub(rb'"t\d+"', b'"t"', got.read())


def measure(route: Route, load: Load, seconds: float) -> Window:
    with ends.client(route.port, load) as client:
        client.until_all_answered(load.connections)
        time.sleep(seconds / 4)
        pids = route.pids()  # takes a while
        client.look()
        before = cpu_seconds(pids)
        time.sleep(seconds)
        figures, after = client.look(), cpu_seconds(pids)
        # one that began meanwhile counts from its start, one that ended counts as far as it was seen
        after = cpu_seconds([pid for pid in route.pids() if pid not in after]) | after
        memory = route.memory()
    settle(route)
    return Window(figures, {pid: max(0.0, used - before.get(pid, 0.0)) for pid, used in after.items()}, memory)


def settle(route: Route) -> None:
    """Wait until the end of a load's connections keeps no process busy: the next rival needs the core."""
    pids = route.pids()
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    while time.monotonic() < deadline:
        before = sum(cpu_seconds(pids).values())
        time.sleep(0.1)
        if sum(cpu_seconds(pids).values()) - before < 0.1 * SETTLED_SHARE:
            return


def run(rivals: list[Rival], plan: Plan) -> tuple[Windows, list[str], dict[int, str]]:
    """(windows, notes about what is missing, names of the sidecar's processes)."""
    windows: Windows = defaultdict(list)
    notes: list[str] = []
    names: dict[int, str] = {}
    with ExitStack() as stack:
        engine_port = stack.enter_context(ends.engine())
        routes: list[Route] = []
        for rival in rivals:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            try:
                route = stack.enter_context(serving(rival, engine_port, folder))
            except (Absent, processes.StartFailed) as e:
                notes.append(f"{rival.name} is missing: {e}")
                continue
            check(Route(DIRECT, engine_port), route)
            routes.append(route)
            names |= route.process_names()
        for turn in range(plan.rounds):
            for load in (*plan.requests(), *plan.paced(), *plan.unpaced()):
                print(f"round {turn + 1} of {plan.rounds}: {describe(load)}", file=sys.stderr, flush=True)
                for route in routes[turn % len(routes) :] + routes[: turn % len(routes)]:
                    windows[route.rival, load].append(measure(route, load, plan.seconds))
    return windows, notes, names


def describe(load: Load) -> str:
    if not load.chunks:
        return f"c={load.connections}"
    return f"{load.connections:,} streams" + (f", a chunk each {load.pace_ms:.0f} ms" if load.pace_ms else ", unpaced")


# --- tables ---


def middle(windows: list[Window], value: Callable[[Window], float]) -> float:
    return statistics.median(map(value, windows))


def added(windows: Windows, rival: Rival, load: Load) -> str:
    """p50 / p99 that a rival adds; of direct, its own."""
    pairs = list(zip(windows[rival, load], windows[DIRECT, load], strict=True))

    def of(get: Callable[[Figures], float]) -> float:
        return statistics.median(get(r.figures) - (get(d.figures) if rival != DIRECT else 0) for r, d in pairs)

    return f"{of(lambda f: f.p50_us):,.0f} / {of(lambda f: f.p99_us):,.0f}"


def request_row(windows: Windows, rival: Rival, plan: Plan) -> list[str]:
    counted = windows[rival, plan.counted()]
    rate = middle(counted, lambda w: w.figures.requests / w.figures.seconds)
    cost = middle(counted, lambda w: w.cpu_us / max(1, w.figures.requests))
    return [
        *(added(windows, rival, load) for load in plan.requests()),
        f"{rate:,.0f}",
        f"{cost:.0f}" if rival != DIRECT else "",
    ]


def paced_cost(windows: list[Window], load: Load) -> str:
    """CPU per chunk, µs; with the share of the chunks that came in time, where it is not all of them."""
    cost = middle(windows, lambda w: w.cpu_us / max(1, w.figures.chunks))
    share = middle(windows, lambda w: w.figures.chunks / (load.connections * w.figures.seconds / PACE_MS * 1e3))
    return f"{cost:.1f}" + (f" ({share:.0%} came)" if share < 0.97 else "")


def paced_row(windows: Windows, rival: Rival, plan: Plan) -> list[str]:
    loads = plan.paced()
    delays = (
        f"{middle(windows[rival, x], lambda w: w.figures.p50_us) / 1e3:,.2f} / "
        f"{middle(windows[rival, x], lambda w: w.figures.p99_us) / 1e3:,.2f}"
        for x in loads
    )
    if rival == DIRECT:
        return ["" for _ in loads] + [*delays, "", ""]
    memory = [middle(windows[rival, loads[-1]], lambda w, i=i: w.memory[i]) for i in (0, 1)]  # type: ignore[misc]
    return [*(paced_cost(windows[rival, x], x) for x in loads), *delays, *(f"{mib:.0f}" for mib in memory)]


def unpaced_row(windows: Windows, rival: Rival, plan: Plan) -> list[str]:
    def rate(load: Load) -> str:
        return f"{middle(windows[rival, load], lambda w: w.figures.chunks / w.figures.seconds):,.0f}"

    def cost(load: Load) -> str:
        if rival == DIRECT:
            return ""
        return f"{middle(windows[rival, load], lambda w: w.cpu_us / max(1, w.figures.chunks)):.2f}"

    return [*map(rate, plan.unpaced()), *map(cost, plan.unpaced())]


def process_rows(windows: Windows, names: dict[int, str], plan: Plan) -> list[list[str]]:
    """Which of the sidecar's processes uses what: share of a core under each load, and per request or chunk."""
    rows = []
    counted = plan.counted()
    sidecar = COMPILED if windows.get((COMPILED, counted)) else INTERPRETED
    for load in (counted, *plan.paced()):
        several = windows[sidecar, load]
        for name in sorted({names.get(pid, "other") for w in several for pid in w.cpu}):
            used = [sum(s for pid, s in w.cpu.items() if names.get(pid, "other") == name) for w in several]
            share = statistics.median(u / w.figures.seconds for u, w in zip(used, several, strict=True))
            each = statistics.median(
                u * 1e6 / max(1, w.figures.chunks or w.figures.requests) for u, w in zip(used, several, strict=True)
            )
            rows.append([describe(load), name, f"{share:.1%}", f"{each:.1f}"])
    return rows


def tables(windows: Windows, names: dict[int, str], plan: Plan) -> list[str]:
    rivals = list(dict.fromkeys(rival for rival, _ in windows))

    def rows(row: Callable[[Windows, Rival, Plan], list[str]]) -> list[list[str]]:
        return [[rival.title(), *row(windows, rival, plan)] for rival in rivals]

    counted, streams = plan.counted().connections, [f"{n:,}" for n in plan.streams]
    requests = [*(f"added p50 / p99 at c={c}, µs" for c in plan.connections)]
    requests += [f"requests/s at c={counted}", f"CPU per request at c={counted}, µs"]
    paced = [f"CPU per chunk, {n} streams, µs" for n in streams]
    paced += [f"delay p50 / p99, {n}, ms" for n in streams]
    paced += [f"RSS at {streams[-1]}, MiB", "PSS, MiB"]
    unpaced = [f"chunks/s, {n} streams" for n in streams] + [f"CPU per chunk, {n}, µs" for n in streams]
    lines = ["", "## One-token requests (direct: its own times)", *table(["route", *requests], rows(request_row))]
    lines += ["", f"## Streams, a chunk each {PACE_MS:.0f} ms", *table(["route", *paced], rows(paced_row))]
    lines += ["", f"## Streams of {SHORT} chunks, unpaced", *table(["route", *unpaced], rows(unpaced_row))]
    if names:
        head = ["load", "process", "share of a core", "µs per request or chunk"]
        lines += ["", "## The sidecar's processes", *table(head, process_rows(windows, names, plan))]
    return lines


def panels(windows: Windows, plan: Plan) -> list[tuple[str, list[Bar]]]:
    """The bars of a plot: CPU per request, then per paced chunk for each number of streams."""
    rivals = [rival for rival in dict.fromkeys(rival for rival, _ in windows) if rival != DIRECT]

    def bars_of(load: Load) -> list[Bar]:
        found = []
        for rival in rivals:
            several = windows[rival, load]
            cost = middle(several, lambda w: w.cpu_us / max(1, w.figures.chunks if load.chunks else w.figures.requests))
            found.append(Bar(rival.title(), cost, f"{cost:.0f} µs", rival in SIDECARS))
        return found

    counted = plan.counted()
    shown = [(f"CPU of all processes per one-token request, {describe(counted)}", bars_of(counted))]
    return shown + [(f"CPU per chunk, {describe(load)}", bars_of(load)) for load in plan.paced()]


def errors(windows: Windows) -> list[str]:
    return [
        f"{rival.name}: {count} failed at {describe(load)}."
        for (rival, load), several in windows.items()
        if (count := sum(w.figures.errors for w in several))
    ]


def foreign_share(began: float, busy: float, own: float) -> float:
    """Share of the machine that others used since `began`. `busy`, `own`: what was used by then."""
    wall = (time.monotonic() - began) * (os.cpu_count() or 1)
    return max(0.0, (processes.machine_busy_seconds() - busy) - (own_seconds() - own)) / wall


def own_seconds() -> float:
    """CPU time of this process and of all that it has started and waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def chosen(names: str) -> list[Rival]:
    """The rivals of a list of names; direct is always among them, because the others are compared with it."""
    wanted = set(names.split(",")) | {DIRECT.name} if names else {rival.name for rival in RIVALS}
    if unknown := wanted - {rival.name for rival in RIVALS}:
        raise SystemExit(f"--rivals: {', '.join(unknown)}; known are {', '.join(r.name for r in RIVALS)}")
    return [rival for rival in RIVALS if rival.name in wanted]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rivals", default="", help=f"some of {','.join(r.name for r in RIVALS)} [all]")
    parser.add_argument("--rounds", type=int, default=FULL.rounds)
    parser.add_argument("--seconds", type=float, default=FULL.seconds, help="of each window")
    parser.add_argument("--streams", type=int, nargs="+", default=FULL.streams, help="at once")
    parser.add_argument("--quick", action="store_true", help="only see that it works")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    plan = QUICK if args.quick else Plan(streams=tuple(args.streams), rounds=args.rounds, seconds=args.seconds)
    ends.program()
    processes.stay_off_the_route()
    began, busy, own = time.monotonic(), processes.machine_busy_seconds(), own_seconds()
    windows, notes, names = run(chosen(args.rivals), plan)
    remark = f"other work used {foreign_share(began, busy, own):.0%} of all cores meanwhile."
    lines = [*heading("Relay", remark), *(f"\n{note}" for note in notes + errors(windows))]
    publish([*lines, *tables(windows, names, plan)], "relay" if args.write else "")
    if args.write:
        (RESULTS / f"relay-{datetime.date.today()}.svg").write_text(plot.bars(panels(windows, plan)))


if __name__ == "__main__":
    main()
