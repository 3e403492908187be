"""Measure the coefficients and the capacity of this (model, hardware): requests of many shapes against an idle engine.

    sidecar calibrate --engine http://127.0.0.1:8000 --out coefficients.json

Each shape is run in several turns, each in an order of its own, with as many requests open as fill the engine; some shapes are held
out of the fit and say what it is worth. Ended in between, it goes on where it was. The file is for `sidecar run --coefficients`.
"""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import json
import statistics
import sys
import time
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import aiohttp

from sidecar.errors import UsageError
from sidecar.flags import ENGINE_KINDS, existing_dir, file_path, flag, gpu, integer, number, one_of, text, url
from sidecar.load import cost_model
from sidecar.load.roofline import roofline
from sidecar.settings import require_writable
from sidecar.tools.calibrate import capacity_search, contention, fit, hardware, report
from sidecar.tools.calibrate.capabilities import EngineCapabilities, meet
from sidecar.tools.calibrate.checkpoint import Checkpoint, CheckpointEntry, Done, GridPlan
from sidecar.tools.calibrate.shapes import GridShape, least, ordered, plan
from sidecar.tools.calibrate.traffic import BackgroundLoad, CalibrationTraffic, EngineRefused

SEARCH_SHARE: Final = 0.2  # of the time, for the search at the SLO
LEAST_SHARE: Final = 0.5  # of the time, for the grid, however long the search took
LEAST_TURNS: Final = 2
MOST_TURNS: Final = 8
QUIET: Final = 60.0  # seconds to wait until an engine that serves others is idle again
LOOK: Final = 2.0


@dataclass(frozen=True, slots=True)
class CalibrateSettings:
    """What `sidecar calibrate` may be told."""

    engine: str = flag("", url, "Base URL of the engine")
    engine_key: str = flag("", text, "Bearer key for the engine", secret=True)
    engine_kind: str = flag("auto", one_of(*ENGINE_KINDS), "Engine")
    model: str = flag("", existing_dir, "The model's directory, for exact image tokens")
    gpu: str = flag("", gpu, "The engine's GPUs; default: those of this machine")
    out: str = flag("coefficients.json", file_path, "File to write")
    measurements: str = flag("", file_path, "File to keep every single measurement in")
    seconds: float = flag(480.0, number(5, 36_000, "seconds"), "Time to take")
    concurrency: int = flag(0, integer(0, 1024), "Requests open at all times; 0: as fill the engine")
    slo_seconds: float = flag(10.0, number(0.05, 3600, "seconds"), "Latency that p95 is to keep")
    context: int = flag(0, integer(0, 1 << 20, "tokens"), "Context length; 0: ask the engine")


def main(chosen: CalibrateSettings) -> int:
    """Measure, report, write. Returns 0. Raises UsageError and EngineRefused."""
    if not chosen.engine:
        raise UsageError("--engine is missing; expected the engine's base URL, e.g. --engine http://127.0.0.1:8000")
    out, kept = Path(chosen.out), Path(chosen.measurements) if chosen.measurements else None
    for name, path in (("out", out), ("measurements", kept)):
        if path is not None:
            require_writable(name, str(path))
    try:
        found, journal = asyncio.run(calibrate(chosen, out))
    except KeyboardInterrupt:
        say("")
        print("ended; the same command goes on from here", file=sys.stderr)
        return 1
    print(report.text(found, chosen.slo_seconds))
    out.write_text(cost_model.to_json(found.co) + "\n")
    journal.close(kept)
    print(f"written: {out}; use it with sidecar run --coefficients {out}")
    return 0


@dataclass(frozen=True, slots=True)
class Rig:
    """What measuring needs."""

    session: aiohttp.ClientSession
    met: EngineCapabilities
    beside: BackgroundLoad

    def traffic(self, seed: int) -> CalibrationTraffic:
        """Requests that are new with the seed."""
        return CalibrationTraffic(self.session, self.met.target, seed, self.beside)


async def calibrate(chosen: CalibrateSettings, out: Path) -> tuple[report.CalibrationReport, Checkpoint]:
    """The whole measurement against the live engine."""
    started = time.monotonic()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        met = await meet(session, chosen.engine, chosen.engine_key, chosen.engine_kind, chosen.model, chosen.context)
        say(f"{met.target.model} on {met.kind} {met.version}, {met.context} tokens of context")
        for note in met.notes:
            say(note, lasting=True)
        await quiet(met)
        pids = await asyncio.to_thread(contention.pids_of, chosen.engine)
        rig = Rig(session, met, BackgroundLoad(met.load, contention.Cores(pids) if pids else None))
        journal = Checkpoint(out, identity(chosen, met))
        planned, done = journal.read()
        seconds = chosen.seconds * (1 - SEARCH_SHARE)
        if planned is None:
            planned = await decided(rig, chosen)
            journal.begin(planned)
            seconds = max(LEAST_SHARE * chosen.seconds, chosen.seconds - (time.monotonic() - started))
        await grid(rig, planned, journal, done, seconds)
        say("")
        return findings(planned, done, chosen, met), journal


async def decided(rig: Rig, chosen: CalibrateSettings) -> GridPlan:
    """The plan. Raises UsageError where the context is too short for one."""
    seconds = chosen.seconds * SEARCH_SHARE, chosen.seconds * (1 - SEARCH_SHARE)
    try:
        span = least(rig.met.context, rig.met.target.tokens), rig.met.context
        found = await capacity_search.plan(rig.traffic(4), span, chosen.slo_seconds, seconds, chosen.concurrency, say)
        shapes_of(found, rig.met)
    except ValueError as e:
        raise UsageError(f"--context: {e}") from None
    return found


def shapes_of(planned: GridPlan, met: EngineCapabilities) -> list[GridShape]:
    """The shapes of a plan."""
    return plan(planned.length, cached=met.cached, tokens=met.target.tokens, most_images=met.most_images)


async def grid(rig: Rig, planned: GridPlan, journal: Checkpoint, done: Done, seconds: float) -> None:
    """Turns of all shapes, at least two, and more while another fits into the time. Fills `done`."""
    shapes = shapes_of(planned, rig.met)
    each = seconds / (MOST_TURNS * len(shapes))
    turn, turns = 0, LEAST_TURNS
    while turn < turns:
        for shape in ordered(shapes, turn):
            if (shape, turn) not in done:
                spent = sum(entry.seconds for entry in done.values())
                say(report.bar(spent, seconds, f"turn {turn + 1}: {shape.name}"))
                done[shape, turn] = await measure(rig, shape, planned.concurrency, each, turn)
                journal.add(shape, turn, done[shape, turn])
        turn += 1
        spent = sum(entry.seconds for entry in done.values())
        turns = max(LEAST_TURNS, min(MOST_TURNS, int(seconds / (spent / turn))))


async def measure(rig: Rig, shape: GridShape, concurrency: int, seconds: float, turn: int) -> CheckpointEntry:
    """One shape's cost; again where the engine served others meanwhile. Raises EngineRefused where it goes on doing so."""
    seed = zlib.crc32(f"{shape} {turn} {time.time_ns()}".encode())  # new prompts also when it is done again
    while True:
        started = time.monotonic()
        sample = await rig.traffic(seed).run(shape, concurrency, seconds)
        if not sample.others:
            return CheckpointEntry(sample.cost(), time.monotonic() - started, sample.waited)
        await quiet(rig.met)
        seed += 1


async def quiet(met: EngineCapabilities) -> None:
    """Wait until the engine has no requests. Raises EngineRefused where that does not come."""
    until = time.monotonic() + QUIET
    while load := await met.load():
        say(f"the engine has {load:.0f} requests of others; waiting until it is idle")
        if time.monotonic() > until:
            raise EngineRefused(
                f"the engine serves {load:.0f} requests that are not ours, which would be measured, too; take it out of traffic, "
                "then run the same command again: it goes on from here"
            )
        await asyncio.sleep(LOOK)


def findings(
    planned: GridPlan, done: Done, chosen: CalibrateSettings, met: EngineCapabilities
) -> report.CalibrationReport:
    """Fit, and say what the fit is worth."""
    rows = fit.merged([(shape, entry.measured) for (shape, _), entry in done.items()])
    fitted, held_out = [r for r in rows if not r.shape.held_out], [r for r in rows if r.shape.held_out]
    gpus = hardware.gpus_of(chosen.engine, chosen.gpu)
    co = fit.fit([r.measured for r in fitted], prior(chosen, gpus))
    worth = fit.accuracy([r.measured for r in held_out], co)
    in_flight = capacity_search.held(planned.steps, chosen.slo_seconds) * cost_model.mu(planned.steps[0].work, co)
    co = replace(
        co, source=origin(hardware.text(chosen.engine, gpus)), model=met.target.model, engine=met.version, gpu=gpus[1],
        flags=",".join(f"{name}={value}" for name, value in sorted(met.flags.items())),
        batch=float(planned.concurrency), mape=round(worth.mape, 4), p90=round(worth.p90, 4), r2=round(worth.r2, 4),
        mu_in_flight=round(in_flight, 4), slo_seconds=chosen.slo_seconds,
    )  # fmt: skip
    named = json.dumps([identity(chosen, met), co.source, *(getattr(co, name) for name in cost_model.TERMS)])
    co = replace(co, fingerprint=hashlib.blake2b(named.encode(), digest_size=6).hexdigest())
    waited = statistics.median(entry.waited for entry in done.values())
    return report.CalibrationReport(fitted, held_out, co, planned, waited)


def origin(machine: str) -> str:
    """Where the coefficients come from, and since when."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return f"calibrated {today} on {machine}" if machine else f"calibrated {today}"


def prior(chosen: CalibrateSettings, gpus: tuple[int, str]) -> cost_model.Coefficients:
    """A roofline of the model where its directory was given, else the documented default."""
    config = config_of(chosen.model)
    return roofline(config, gpus[1], gpus[0]) if config else cost_model.Coefficients()


def config_of(model: str) -> dict[str, Any]:
    """The model's config.json; empty where there is none."""
    try:
        config = json.loads((Path(model) / "config.json").read_text()) if model else {}
        return config if isinstance(config, dict) else {}
    except (OSError, ValueError):
        return {}


def identity(chosen: CalibrateSettings, met: EngineCapabilities) -> dict[str, Any]:
    """What a measurement depends on."""
    config = config_of(chosen.model)
    return {
        "model": met.target.model, "engine": f"{met.kind} {met.version}", "flags": dict(met.flags), "context": met.context,
        "dtype": str(config.get("dtype") or config.get("torch_dtype") or ""), "cached": met.cached,
        "tokens": {str(side): count for side, count in met.target.tokens.items()}, "concurrency": chosen.concurrency,
        "seconds": chosen.seconds, "slo_seconds": chosen.slo_seconds,
    }  # fmt: skip


def say(line: str, *, lasting: bool = False) -> None:
    """Progress for people: one line that is written over where a terminal reads."""
    if sys.stderr.isatty():
        print("\r\x1b[K" + line, end="\n" if lasting else "", file=sys.stderr, flush=True)
    elif line:
        print(line, file=sys.stderr, flush=True)
