"""The kill policy's brake, simulated: hours a day without service of an engine that hangs again after each recovery.

    python benchmarks/brake.py [--days N] [--load SECONDS] [--found SECONDS] [--write]

The engine serves for a fixed or a random time (exponential), hangs, is found, is killed as soon as the policy allows,
is restarted as soon as kubelet's back-off allows, and loads. Policy and back-off are production code under a simulated
clock, in steps of ten seconds. Compared with the same engine, killed whenever a hang is found.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).parent.parent))

from sidecar.events import State
from sidecar.health.kill_policy import KillPolicy, kill_limits
from sidecar.health.probe_policy import Backoff
from sidecar.readings import Absent
from sidecar.settings import Settings

DAY_S: Final = 86_400
NO_GPU: Final = Absent("not read")
STEP_S: Final = 10
SERVED_MIN: Final = (0, 5, 9, 12, 20, 30, 60)
AVERAGE_MIN: Final = (12, 20, 30)
# Share of the day without service under the policy of version 0.2.0, whose interval doubled from kill to kill and was
# forgotten only after an hour of health, as measured on 2026-11-29; after two restarts with less than ten minutes of
# service it waited for an operator.
BEFORE: Final = {0: "all", 5: "all", 9: "all", 12: "76.7 %", 20: "62.5 %", 30: "45.5 %"}


@dataclass(frozen=True)
class Cycle:
    """The engine: seconds of service until it hangs, of loading, and until a hang is found."""

    served: float
    load: int = 180
    found: int = 60
    at_random: bool = False  # `served` is the average


@dataclass
class Outcome:
    """A simulated time: seconds without service, and kills."""

    down: int = 0
    kills: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--days", type=int, default=10)
    parser.add_argument("--load", type=int, default=180)
    parser.add_argument("--found", type=int, default=60)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if min(args.days, args.load, args.found) < 1:
        parser.error("--days, --load and --found must be at least 1")
    text = page(args.days, args.load, args.found)
    print(text)
    if args.write:
        (Path(__file__).parent / "results" / f"brake-{time.strftime('%Y-%m-%d')}.md").write_text(text + "\n")


def page(days: int, load: int, found: int) -> str:
    """The table, with its command, date and machine."""
    began, rows = time.process_time(), []
    for minutes, at_random in (*((n, False) for n in SERVED_MIN), *((n, True) for n in AVERAGE_MIN)):
        cycle = Cycle(60 * minutes, load, found, at_random)
        plain, ours = simulate(cycle, days * DAY_S, policy=False), simulate(cycle, days * DAY_S)
        name = f"at random, {minutes} min on average" if at_random else f"{minutes} min"
        before = "" if at_random else BEFORE.get(minutes, "")
        rows.append(
            f"| {name} | {hours(plain, days)} | {hours(ours, days)} | {ours.down / plain.down:.2f} | {before} |"
        )
    head = (
        "| hangs after serving | restarted whenever found: hours a day without service, kills a day | this policy "
        "| times the hours | before, share of the day |"
    )
    command = f"benchmarks/brake.py --days {days} --load {load} --found {found}"
    return "\n".join(
        (
            f"# The kill policy's brake, simulated, {time.strftime('%Y-%m-%d')}\n",
            f"`{command}`, {time.process_time() - began:.1f} s of CPU on {machine()}\n",
            f"Default settings; {load} s of loading, {found} s until a hang is found, kubelet's back-off included.\n",
            head,
            "|" + "---|" * 5,
            *rows,
        )
    )


def hours(outcome: Outcome, days: int) -> str:
    """Hours a day without service, their share, and kills a day."""
    share = outcome.down / (days * DAY_S)
    return f"{24 * share:.1f} h ({share:.1%}), {outcome.kills / days:.0f}"


def simulate(cycle: Cycle, seconds: int, *, policy: bool = True) -> Outcome:
    """So much time of an engine that serves at first, under the kill policy or without one."""
    brake, backoff, outcome = KillPolicy(kill_limits(Settings(engine="http://engine"), "llm-0")), Backoff(), Outcome()
    rng = random.Random(1)
    ready = 0.0  # when the engine serves next, or has begun to
    served = _served(cycle, rng)
    for now in range(0, seconds, STEP_S):
        hung = now - ready - served  # for so long
        state: State = "progressing"
        if now < ready:
            state = "starting"
        elif hung >= 0:
            state = "stalled" if hung >= cycle.found else "suspect"
        outcome.down += STEP_S * (state != "progressing")
        if policy:
            brake.tick(state, float(now) if state == "progressing" else None, NO_GPU, float(now))
        if state == "stalled" and (brake.hold is None or not policy):
            outcome.kills += 1
            ready, served = backoff.restart_at(now) + cycle.load, _served(cycle, rng)
    return outcome


def _served(cycle: Cycle, rng: random.Random) -> float:
    return rng.expovariate(1 / cycle.served) if cycle.at_random else cycle.served


def machine() -> str:
    """The processor and what runs on it."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    name = found[1] if found else platform.machine()
    return f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}"


if __name__ == "__main__":
    main()
