"""Measure useful work: what an engine completes, steady and in bursts, one at a time and batched, and what it costs.

    sidecar bench --engine http://127.0.0.1:8000 --dollars-per-gpu-hour 2.50 --plot useful.svg

Four runs against one live engine, each of --seconds. The load overwhelms an engine that serves one request at a time,
so use only an idle engine.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import aiohttp

from sidecar.errors import UsageError
from sidecar.flags import ca_file, engine_url, file_path, flag, integer, number, one_of, parser, text
from sidecar.settings import require_writable
from sidecar.signals.engine_address import EngineAddress
from sidecar.tools.bench import report
from sidecar.tools.bench.arrivals import PROFILES, arrival_times
from sidecar.tools.bench.tally import BenchRow, sum_up
from sidecar.tools.bench.traffic import BenchRun
from sidecar.tools.calibrate.capabilities import text_target
from sidecar.tools.calibrate.prompts import PromptTarget
from sidecar.tools.calibrate.report import bar, show_progress
from sidecar.tools.calibrate.shapes import GridShape
from sidecar.tools.calibrate.traffic import EngineRefused

# Arrivals in the time that the engine needs for a single request, unless a rate is given: as in the reference matrix.
ARRIVALS_PER_LATENCY: Final = 6.4
# Between progress lines in a log and on a terminal.
PROGRESS_INTERVALS_S: Final = (10.0, 1.0)


@parser("some of " + ",".join(PROFILES), "NAMES")
def profiles(value: str) -> str:
    names = [name for name in value.split(",") if name]
    if not names or set(names) - set(PROFILES):
        raise ValueError
    return ",".join(names)


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """Settings of `sidecar bench`."""

    engine: str = flag("", engine_url, "Base URL or socket of the engine, or of a relay")
    engine_ca: str = flag("", ca_file, "Authorities of an https engine's certificate (PEM); none: the system's")
    engine_key: str = flag("", text, "Bearer key for the engine", secret=True)
    profiles: str = flag(",".join(PROFILES), profiles, "Runs, in order")
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


def main(settings: BenchSettings, as_json: bool = False) -> int:
    """Run and report. Returns 0, or 1 if interrupted. Raises UsageError and EngineRefused."""
    if not settings.engine:
        raise UsageError("--engine is missing; expected the engine's base URL, e.g. --engine http://127.0.0.1:8000")
    if settings.plot:
        require_writable("plot", settings.plot)
    rows: list[BenchRow] = []
    exit_code = 0
    try:
        asyncio.run(bench(settings, rows))
    except KeyboardInterrupt:
        show_progress("")
        print("interrupted; these are the results so far", file=sys.stderr)
        exit_code = 1
    print(
        json.dumps([asdict(r) for r in rows], indent=1) if as_json or settings.format == "json" else report.table(rows)
    )
    if settings.plot:
        load = f"{settings.input_tokens} in, {settings.output_tokens} out"
        Path(settings.plot).write_text(report.plot(rows, f"Useful work: {load}, p95 <= {settings.slo_seconds:g} s"))
        print(f"written: {settings.plot}", file=sys.stderr)
    return exit_code


async def bench(settings: BenchSettings, rows: list[BenchRow]) -> None:
    """All runs; each appends to `rows`, also one that is cancelled. Raises EngineRefused."""
    address = EngineAddress(settings.engine, settings.engine_ca)
    async with aiohttp.ClientSession(connector=address.connector(limit=0)) as session:
        if trouble := await address.find_trouble(session):
            raise EngineRefused(trouble)
        target = await text_target(PromptTarget(session, address.base, key=settings.engine_key))
        rate = settings.rate or ARRIVALS_PER_LATENCY / max(await measure_alone(target, settings), 1e-3)
        show_progress(f"{target.model}: {rate:.2f} requests a second", lasting=True)
        for profile in settings.profiles.split(","):
            run = make_run(target, settings, profile)
            began, whole = time.monotonic(), False
            progress = asyncio.create_task(keep_showing(run, profile, settings.seconds))
            try:
                await run.run(arrival_times(profile, rate, settings.seconds, settings.seed))
                whole = True
            finally:
                progress.cancel()
                show_progress("")
                price = settings.dollars_per_gpu_hour * settings.gpus
                elapsed = time.monotonic() - began
                rows.append(sum_up(profile, rate, elapsed, run.records, settings.slo_seconds, price, whole=whole))


def make_run(target: PromptTarget, settings: BenchSettings, profile: str) -> BenchRun:
    """The run of one profile."""
    shape, naive = GridShape(settings.input_tokens, 0, settings.output_tokens), profile.endswith("-naive")
    return BenchRun(target, shape, settings.max_open, settings.timeout, settings.seed, naive)


async def measure_alone(target: PromptTarget, settings: BenchSettings) -> float:
    """Seconds of a single request, the better of two. Raises EngineRefused."""
    run = make_run(target, settings, PROFILES[0])
    for _ in range(2):
        await run.run([0.0])
    good = [record.seconds for record in run.records if record.ended == "completed"]
    if not good:
        ended = run.records[-1].ended
        what = f"a request of {settings.input_tokens} tokens in and {settings.output_tokens} out {ended}"
        remedy = "see its log, and --input-tokens, --output-tokens, --timeout"
        raise EngineRefused(f"{what} on the idle engine; {remedy}")
    return min(good)


async def keep_showing(run: BenchRun, name: str, seconds: float) -> None:
    """Print progress lines until cancelled."""
    began = time.monotonic()
    while True:
        done = sum(record.ended == "completed" for record in run.records)
        counts = f"{name}: {done} completed, {len(run.records) - done} not completed, {run.open} open"
        show_progress(bar(time.monotonic() - began, seconds, counts))
        await asyncio.sleep(PROGRESS_INTERVALS_S[sys.stderr.isatty()])
