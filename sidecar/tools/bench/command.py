"""Measure useful work: what an engine completes, steady and in bursts, one request at a time and batched, and what that costs.

    sidecar bench --engine http://127.0.0.1:8000 --dollars-per-gpu-hour 2.50 --plot useful.svg

Four runs against one live engine, each of --seconds. It sends as much as an engine that is used badly cannot do: idle engines only.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import aiohttp

from sidecar.errors import UsageError
from sidecar.flags import file_path, flag, integer, number, one_of, parser, text, url
from sidecar.settings import require_writable
from sidecar.tools.bench import report
from sidecar.tools.bench.arrivals import NAMES, PROFILES, Profile, rate_for, times
from sidecar.tools.bench.tally import BenchRow, row
from sidecar.tools.bench.traffic import BenchPlan, BenchRun
from sidecar.tools.calibrate.capabilities import text_target
from sidecar.tools.calibrate.command import say
from sidecar.tools.calibrate.prompts import PromptTarget
from sidecar.tools.calibrate.report import bar
from sidecar.tools.calibrate.shapes import GridShape
from sidecar.tools.calibrate.traffic import EngineRefused

SHOW: Final = (10.0, 1.0)  # seconds between lines of progress: in a log, on a terminal


@parser("some of " + ",".join(NAMES), "NAMES")
def profiles(value: str) -> str:
    names = [name for name in value.split(",") if name]
    if not names or set(names) - set(NAMES):
        raise ValueError
    return ",".join(names)


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """What `sidecar bench` may be told."""

    engine: str = flag("", url, "Base URL of the engine, or of a relay")
    engine_key: str = flag("", text, "Bearer key for the engine", secret=True)
    profiles: str = flag(",".join(NAMES), profiles, "Runs, in order")
    rate: float = flag(
        0.0, number(0, 10_000), "Requests per second on average; 0: 6.4 for each that the engine answers one at a time"
    )
    seconds: float = flag(60.0, number(1, 36_000, "seconds"), "Time in which requests come")
    input_tokens: int = flag(512, integer(1, 1 << 20, "tokens"), "Prompt of each request")
    output_tokens: int = flag(128, integer(1, 1 << 20, "tokens"), "Answer to each request")
    max_open: int = flag(64, integer(1, 10_000), "Requests open at a time; more are dropped")
    timeout: float = flag(60.0, number(0.1, 36_000, "seconds"), "Time after which a request is stalled")
    slo_seconds: float = flag(10.0, number(0.05, 3600, "seconds"), "Latency that p95 is to keep")
    dollars_per_gpu_hour: float = flag(0.0, number(0, 10_000, "dollars"), "Price of a GPU hour")
    gpus: int = flag(1, integer(1, 1024), "GPUs of the engine")
    seed: int = flag(0, integer(0, 2**63), "Seed of arrivals and prompts")
    format: str = flag("table", one_of("table", "json"), "Form of the report")
    plot: str = flag("", file_path, "SVG file to write")


def main(chosen: BenchSettings) -> int:
    """Run, report. 0, or 1 where it was ended early. Raises UsageError and EngineRefused."""
    if not chosen.engine:
        raise UsageError("--engine is missing; expected the engine's base URL, e.g. --engine http://127.0.0.1:8000")
    if chosen.plot:
        require_writable("plot", chosen.plot)
    rows: list[BenchRow] = []
    ended = 0
    try:
        asyncio.run(bench(chosen, rows))
    except KeyboardInterrupt:
        say("")
        print("ended early; this is what there was until then", file=sys.stderr)
        ended = 1
    print(json.dumps([asdict(r) for r in rows], indent=1) if chosen.format == "json" else report.table(rows))
    if chosen.plot:
        title = f"Useful work: {chosen.input_tokens} in, {chosen.output_tokens} out, p95 <= {chosen.slo_seconds:g} s"
        Path(chosen.plot).write_text(report.plot(rows, title))
        print(f"written: {chosen.plot}", file=sys.stderr)
    return ended


async def bench(chosen: BenchSettings, rows: list[BenchRow]) -> None:
    """All runs; `rows` grows with each, and with the one under way when this is cancelled. Raises EngineRefused."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        target = await text_target(session, chosen.engine, chosen.engine_key)
        rate = chosen.rate or rate_for(await alone(session, target, chosen))
        say(f"{target.model}: {rate:.2f} requests a second", lasting=True)
        for name in chosen.profiles.split(","):
            profile = PROFILES[NAMES.index(name)]
            run = BenchRun(session, target, plan(chosen, profile))
            began, whole = time.monotonic(), False
            try:
                async with shown(run, name, chosen):
                    await run.run(times(profile, rate, chosen.seconds, chosen.seed))
                whole = True
            finally:
                price = chosen.dollars_per_gpu_hour * chosen.gpus
                elapsed = time.monotonic() - began
                rows.append(row(name, rate, elapsed, run.records, chosen.slo_seconds, price, whole=whole))


def plan(chosen: BenchSettings, profile: Profile) -> BenchPlan:
    """How one profile is run."""
    shape = GridShape(chosen.input_tokens, 0, chosen.output_tokens)
    return BenchPlan(shape, chosen.max_open, 1 if profile.serving == "naive" else 0, chosen.timeout, chosen.seed)


async def alone(session: aiohttp.ClientSession, target: PromptTarget, chosen: BenchSettings) -> float:
    """Seconds of one request, the better of two. Raises EngineRefused."""
    run = BenchRun(session, target, plan(chosen, PROFILES[0]))
    records = [await run.alone(), await run.alone()]
    good = [record.seconds for record in records if record.ended == "completed"]
    if not good:
        raise EngineRefused(
            f"a request of {chosen.input_tokens} tokens in and {chosen.output_tokens} out {records[-1].ended} on the idle engine; "
            "see its log, and --input-tokens, --output-tokens, --timeout"
        )
    return min(good)


@asynccontextmanager
async def shown(run: BenchRun, name: str, chosen: BenchSettings) -> AsyncIterator[None]:
    """Lines of progress."""
    began = time.monotonic()

    async def show() -> None:
        while True:
            done = sum(record.ended == "completed" for record in run.records)
            counts = f"{name}: {done} completed, {len(run.records) - done} not, {run.open} open"
            say(bar(time.monotonic() - began, chosen.seconds, counts))
            await asyncio.sleep(SHOW[sys.stderr.isatty()])

    task = asyncio.create_task(show())
    try:
        yield
    finally:
        task.cancel()
        say("")
