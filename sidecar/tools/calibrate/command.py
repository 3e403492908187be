"""Measure coefficients and capacity of this (model, hardware) with requests of many shapes against an idle engine.

    sidecar calibrate --engine http://127.0.0.1:8000 --out coefficients.json

Some shapes are held out of the fit and show its accuracy. An interrupted calibration resumes. The file is for `sidecar
run --coefficients`.
"""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import json
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import aiohttp

from sidecar.errors import UsageError
from sidecar.flags import (
    ENGINE_KINDS,
    ca_file,
    engine_url,
    existing_dir,
    file_path,
    flag,
    gpu,
    integer,
    number,
    one_of,
    text,
)
from sidecar.load import cost_model
from sidecar.load.roofline import roofline
from sidecar.settings import require_writable
from sidecar.signals.engine_address import EngineAddress
from sidecar.tools.calibrate import contention, fit, hardware, report
from sidecar.tools.calibrate.capabilities import EngineCapabilities, probe_capabilities
from sidecar.tools.calibrate.capacity_search import (
    SearchTime,
    explain_no_capacity,
    find_concurrency_at_slo,
    make_plan,
)
from sidecar.tools.calibrate.checkpoint import Checkpoint, CheckpointEntry, Done, GridPlan
from sidecar.tools.calibrate.prompts import PromptTarget
from sidecar.tools.calibrate.report import show_progress
from sidecar.tools.calibrate.shapes import min_length, plan_shapes, shuffle_turn
from sidecar.tools.calibrate.traffic import CalibrationTraffic, EngineRefused

# Shares of the time: for the search, and the minimum for the grid, however long the search was.
SEARCH_SHARE: Final = 0.2
MIN_GRID_SHARE: Final = 0.5
MIN_TURNS: Final = 2
MAX_TURNS: Final = 8
# How long to wait for an engine that serves other clients to become idle.
IDLE_TIMEOUT_S: Final = 60.0
IDLE_CHECK_INTERVAL_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class CalibrateSettings:
    """Settings of `sidecar calibrate`."""

    engine: str = flag("", engine_url, "Base URL or socket of the engine")
    engine_ca: str = flag("", ca_file, "Authorities of an https engine's certificate (PEM); none: the system's")
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


def main(settings: CalibrateSettings, as_json: bool = False) -> int:
    """Measure, report, write. Returns 0, or 1 if interrupted. Raises UsageError and EngineRefused."""
    if not settings.engine:
        raise UsageError("--engine is missing; expected the engine's base URL, e.g. --engine http://127.0.0.1:8000")
    out, kept = Path(settings.out), Path(settings.measurements) if settings.measurements else None
    for name, path in (("out", out), ("measurements", kept)):
        if path is not None:
            require_writable(name, str(path))
    try:
        found, journal = asyncio.run(calibrate(settings, out))
    except KeyboardInterrupt:
        show_progress("")
        print("interrupted; run the same command again to resume", file=sys.stderr)
        return 1
    if not as_json:
        print(report.text(found, settings.slo_seconds))
    out.write_text(cost_model.to_json(found.co) + "\n")
    journal.close(kept)
    if as_json:
        print(json.dumps({"written": str(out)} | report.summary(found), indent=1))
    else:
        print(f"written: {out}; use it with sidecar run --coefficients {out}")
    return 0


async def calibrate(settings: CalibrateSettings, out: Path) -> tuple[report.CalibrationReport, Checkpoint]:
    """The whole measurement against the live engine. Raises UsageError and EngineRefused."""
    started = time.monotonic()
    address = EngineAddress(settings.engine, settings.engine_ca)
    async with aiohttp.ClientSession(connector=address.connector(limit=0)) as session:
        if trouble := await address.find_trouble(session):
            raise EngineRefused(trouble)
        target = PromptTarget(session, address.base, key=settings.engine_key)
        engine = await probe_capabilities(target, settings.engine_kind, settings.model, settings.context)
        show_progress(f"{engine.target.model} on {engine.kind} {engine.version}, {engine.context} tokens of context")
        for note in (*engine.notes, *([engine.no_cached] if engine.no_cached else [])):
            show_progress(note, lasting=True)
        await wait_until_idle(engine)
        cores = contention.Cores(await asyncio.to_thread(contention.pids_of, settings.engine))
        # New prompts each time: the engine may have those of an interrupted calibration in its cache.
        traffic = CalibrationTraffic(
            engine.target, time.time_ns(), engine.load, cores, engine.counters, engine.kv_tokens
        )
        journal = Checkpoint(out, identity(settings, engine))
        plan = journal.plan
        for_grid = settings.seconds * (1 - SEARCH_SHARE)
        if plan is None:
            span = min_length(engine.context, engine.target.tokens), engine.context
            most = settings.seconds * (1 - MIN_GRID_SHARE)
            seconds = SearchTime(settings.seconds * SEARCH_SHARE, most, for_grid)
            plan = await make_plan(traffic, span, settings.slo_seconds, seconds, settings.concurrency)
            journal.begin(plan)
            for_grid = max(MIN_GRID_SHARE * settings.seconds, settings.seconds - (time.monotonic() - started))
        await measure_grid(traffic, engine, plan, journal, for_grid)
        show_progress("")
        return build_report(plan, journal.done, settings, engine), journal


async def measure_grid(
    traffic: CalibrationTraffic, engine: EngineCapabilities, plan: GridPlan, journal: Checkpoint, seconds: float
) -> None:
    """Measure all shapes in two turns, or more while there is time, or in one if it needs all of the time."""
    done = journal.done
    shapes = plan_shapes(plan.length, cached=engine.cached, tokens=engine.target.tokens, max_images=engine.max_images)
    each = seconds / (MAX_TURNS * len(shapes))
    turn, turns = 0, MIN_TURNS
    while turn < turns:
        for shape in shuffle_turn(shapes, turn):
            if (shape, turn) not in done:
                spent = sum(entry.seconds for entry in done.values())
                show_progress(report.bar(spent, seconds, f"turn {turn + 1}: {shape.name}"))
                started = time.monotonic()
                while (sample := await traffic.run(shape, plan.concurrency, each)).others:
                    await wait_until_idle(engine)
                    started = time.monotonic()
                cost, took = sample.cost(), round(time.monotonic() - started, 3)
                journal.add(
                    CheckpointEntry(cost.work, cost.ms, shape, turn, took, round(sample.waited, 4), mix=cost.mix)
                )
        turn += 1
        spent = sum(entry.seconds for entry in done.values())
        turns = 1 if spent > seconds and turn == 1 else max(MIN_TURNS, min(MAX_TURNS, int(seconds / (spent / turn))))


async def wait_until_idle(engine: EngineCapabilities) -> None:
    """Wait until the engine has no requests. Raises EngineRefused after a timeout."""
    until = time.monotonic() + IDLE_TIMEOUT_S
    while load := await engine.load():
        show_progress(f"the engine has {load:.0f} requests of other clients; waiting until it is idle")
        if time.monotonic() > until:
            clients = f"{load:.0f} requests of other clients, which would distort the measurement"
            remedy = "take it out of traffic, then run the same command again to resume"
            raise EngineRefused(f"the engine serves {clients}; {remedy}")
        await asyncio.sleep(IDLE_CHECK_INTERVAL_S)


def build_report(
    plan: GridPlan, done: Done, settings: CalibrateSettings, engine: EngineCapabilities
) -> report.CalibrationReport:
    """Fit the coefficients and measure the accuracy of the fit."""
    rows = fit.merge_turns((entry.shape, entry) for entry in done.values())
    fitted, held_out = [r for r in rows if not r.shape.held_out], [r for r in rows if r.shape.held_out]
    count, gpu = hardware.gpus_of(settings.engine, settings.gpu)
    config, machine = read_config(settings.model), hardware.text(settings.engine, (count, gpu))
    prior = roofline(config, gpu, count) if config else cost_model.Coefficients()
    co = fit.fit(fitted, prior)
    worth = fit.accuracy(held_out, co)
    concurrency = find_concurrency_at_slo(plan.steps, settings.slo_seconds)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    no_capacity = explain_no_capacity(plan, settings.seconds)
    source = f"calibrated {today}" + (f" on {machine}" if machine else "") + (", not full" if no_capacity else "")
    named = json.dumps([identity(settings, engine), source, *(getattr(co, name) for name in cost_model.TERMS)])
    co = replace(
        co,
        source=source,
        fingerprint=hashlib.blake2b(named.encode(), digest_size=6).hexdigest(),
        model=engine.target.model,
        engine=engine.version,
        gpu=gpu,
        flags=",".join(f"{name}={value}" for name, value in sorted(engine.flags.items())),
        batch=float(plan.concurrency),
        mape=round(worth.mape, 4),
        median_ape=round(worth.median, 4),
        p90=round(worth.p90, 4),
        r2=round(worth.r2, 4),
        mu_in_flight=round(concurrency * cost_model.mu(plan.steps[0].work, co), 4),
        slo_seconds=settings.slo_seconds,
        no_capacity=no_capacity,
        no_cached=report.explain_no_cached(rows, engine.no_cached),
    )
    waited = statistics.median(entry.waited for entry in done.values())
    turns = 1 + max(turn for _, turn in done)
    return report.CalibrationReport(fitted, held_out, co, plan, waited, turns, engine.notes)


def read_config(model: str) -> dict[str, Any]:
    """The model's config.json; empty if there is none."""
    try:
        config = json.loads((Path(model) / "config.json").read_text()) if model else {}
        return config if isinstance(config, dict) else {}
    except (OSError, ValueError):
        return {}


def identity(settings: CalibrateSettings, engine: EngineCapabilities) -> dict[str, Any]:
    """Everything that a measurement depends on."""
    config = read_config(settings.model)
    return {
        "model": engine.target.model,
        "engine": f"{engine.kind} {engine.version}",
        "flags": dict(engine.flags),
        "context": engine.context,
        "dtype": str(config.get("dtype") or config.get("torch_dtype") or ""),
        "cached": engine.cached,
        "tokens": {str(side): count for side, count in engine.target.tokens.items()},
        "concurrency": settings.concurrency,
        "seconds": settings.seconds,
        "slo_seconds": settings.slo_seconds,
    }
