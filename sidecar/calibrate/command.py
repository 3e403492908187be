"""Measure the coefficients and the capacity of this (model, hardware): requests of many shapes against an idle engine.

    sidecar calibrate --engine http://127.0.0.1:8000 --out coefficients.json

Each shape is run twice, in another order, with several requests open at all times; some shapes are held out of the fit and say what it
is worth. Ended in between, it goes on where it was. The file is for `sidecar run --coefficients`.
"""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import aiohttp

from sidecar import units
from sidecar.calibrate import fit, report
from sidecar.calibrate.fit import Measured
from sidecar.calibrate.journal import Done, Journal
from sidecar.calibrate.shapes import Shape, plan, reference
from sidecar.calibrate.traffic import EngineRefused, Sample, Target, Traffic
from sidecar.errors import UsageError
from sidecar.facts import Work
from sidecar.flags import ENGINE_KINDS, flag, integer, number, one_of, text, url

TURNS: Final = 2
SEARCH_SHARE: Final = 0.2  # of the time, for the search at the SLO
MOST_OPEN: Final = 1024  # requests
CONTEXT: Final = 4096  # tokens, where the engine does not say


@dataclass(frozen=True, slots=True)
class CalibrateSettings:
    """What `sidecar calibrate` may be told."""

    engine: str = flag("", url, "Base URL of the engine", expected="a URL such as http://127.0.0.1:8000")
    engine_key: str = flag("", text, "Bearer key for the engine", expected="a key", secret=True)
    engine_kind: str = flag("auto", one_of(*ENGINE_KINDS), "Engine", expected="one of " + ", ".join(ENGINE_KINDS))
    out: str = flag("coefficients.json", text, "File to write", expected="a path")
    seconds: float = flag(480.0, number(5, 36_000), "Time to take", expected="seconds from 5 to 36000")
    concurrency: int = flag(8, integer(1, 1024), "Requests open at all times", expected="a whole number from 1 to 1024")
    slo_seconds: float = flag(
        10.0, number(0.05, 3600), "Latency that p95 is to keep", expected="seconds from 0.05 to 3600"
    )
    context: int = flag(0, integer(0, 1 << 20), "Context length; 0: ask the engine", expected="tokens")


@dataclass(frozen=True, slots=True)
class Met:
    """What the engine said of itself."""

    target: Target
    context: int
    cached: bool
    version: str


def main(chosen: CalibrateSettings) -> int:
    """Measure, report, write. Returns 0. Raises UsageError and EngineRefused."""
    if not chosen.engine:
        raise UsageError("--engine is missing; expected the engine's base URL, e.g. --engine http://127.0.0.1:8000")
    out = Path(chosen.out)
    if not out.parent.is_dir():
        raise UsageError(f"--out: the directory of {chosen.out} does not exist")
    found, met = asyncio.run(calibrate(chosen, out))
    print(report.text(found, chosen.slo_seconds))
    out.write_text(units.to_json(found.co) + "\n")
    Journal(out, identity(chosen, met)).close()
    print(f"written: {out}; use it with sidecar run --coefficients {out}")
    return 0


async def calibrate(chosen: CalibrateSettings, out: Path) -> tuple[report.Findings, Met]:
    """The whole measurement against the live engine."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        met = await meet(session, chosen)
        try:
            shapes = plan(met.context, cached=met.cached)
        except ValueError as e:
            raise UsageError(f"--context: {e}") from None
        journal = Journal(out, identity(chosen, met))
        done = journal.read()
        each = chosen.seconds * (1 - SEARCH_SHARE) / (TURNS * len(shapes))
        for turn in range(TURNS):
            for shape in shapes if turn % 2 == 0 else shapes[::-1]:
                if (shape, turn) not in done:
                    say(report.bar(len(done), TURNS * len(shapes), shape.name))
                    done[shape, turn] = await measure(session, met, shape, chosen.concurrency, each)
                    journal.add(shape, turn, done[shape, turn])
        fitted, held_out = merged(done, held_out=False), merged(done, held_out=True)
        co = fit.fit(fitted)
        search = await at_slo(session, met, co, chosen, chosen.seconds * SEARCH_SHARE)
        say("")
    return report.Findings(fitted, held_out, named(co, fitted, held_out, search, chosen, met), search), met


async def measure(session: aiohttp.ClientSession, met: Met, shape: Shape, concurrency: int, seconds: float) -> Measured:
    """One shape's cost."""
    seed = hash((shape, concurrency)) & 0xFFFF
    return (await refused(Traffic(session, met.target, seed).run(shape, concurrency, seconds))).cost()


async def refused(run: Coroutine[Any, Any, Sample]) -> Sample:
    """The run; of what its workers raised, the first that is ours."""
    try:
        return await run
    except* EngineRefused as group:
        raise _first(group) from None


def _first(group: BaseExceptionGroup[EngineRefused]) -> EngineRefused:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, EngineRefused)
    return error


def merged(done: Done, *, held_out: bool) -> list[Measured]:
    """The turns of each shape as one: the median cost."""
    shapes = {shape for shape, _ in done if shape.held_out is held_out}
    turns = {shape: [m for (s, _), m in done.items() if s == shape] for shape in shapes}
    return [Measured(ms[0].work, statistics.median(m.ms for m in ms)) for ms in turns.values()]


async def at_slo(
    session: aiohttp.ClientSession, met: Met, co: units.Coefficients, chosen: CalibrateSettings, seconds: float
) -> report.Search:
    """Open more and more requests of the reference's shape until their p95 is over the SLO; the last step before it counts."""
    steps: list[tuple[int, float]] = []
    shape, held = reference(met.context), 0
    each, number, until = seconds / 8, 1, time.monotonic() + seconds
    while number <= MOST_OPEN and time.monotonic() < until:
        say(f"{number} requests of {shape.name} open at all times")
        sample = await refused(Traffic(session, met.target, seed=number).run(shape, number, each))
        steps.append((number, sample.p95()))
        if sample.p95() > chosen.slo_seconds:
            break
        held, number = number, number * 2
    one = units.mu(Work(shape.uncached, output=shape.output), co)
    return report.Search(tuple(steps), held * one)


def named(
    co: units.Coefficients, fitted: Sequence[Measured], held_out: Sequence[Measured], search: report.Search,
    chosen: CalibrateSettings, met: Met,
) -> units.Coefficients:  # fmt: skip
    """The coefficients with their origin: what they were measured on, when, and how well they hold."""
    worth = fit.accuracy(held_out, co)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    text = json.dumps([identity(chosen, met), *(getattr(co, name) for name in fit.TERMS)])
    return replace(
        co, fingerprint=hashlib.blake2b(text.encode(), digest_size=6).hexdigest(), source=f"calibrated {today}",
        model=met.target.model, engine=met.version, mape=round(worth.mape, 4), p90=round(worth.p90, 4), r2=round(worth.r2, 4),
        mu_in_flight=round(search.mu_in_flight, 4), slo_seconds=chosen.slo_seconds,
    )  # fmt: skip


def identity(chosen: CalibrateSettings, met: Met) -> dict[str, Any]:
    """What a measurement depends on."""
    return {
        "model": met.target.model, "engine": met.version, "context": met.context, "cached": met.cached,
        "concurrency": chosen.concurrency, "seconds": chosen.seconds,
    }  # fmt: skip


# --- meeting the engine ---


async def meet(session: aiohttp.ClientSession, chosen: CalibrateSettings) -> Met:
    """Ask what it serves, and try what it can do. Raises EngineRefused."""
    card = await _model(session, chosen)
    model = str(card["id"])
    context = chosen.context or int(card.get("max_model_len") or CONTEXT)
    version = await _version(session, chosen)
    target = Target(chosen.engine, model, chosen.engine_key)
    probe = Shape(16, 0, 1)
    try:
        await refused(Traffic(session, target).run(probe, 1, 0.0))
    except EngineRefused:
        target = replace(target, ids=False)
        await refused(Traffic(session, target).run(probe, 1, 0.0))
    say(f"{model} on {version}: warming up")
    quarter = Shape(context // 4, 0, max(1, context // 64))
    await refused(Traffic(session, target, seed=1).run(quarter, min(2, chosen.concurrency), 0.0))
    again = await refused(Traffic(session, target, seed=2).run(Shape(8, context // 4, 1), 1, 0.0))
    cached = any(work.cached > context // 16 for work in again.works)
    return Met(target, context, cached, version)


async def _model(session: aiohttp.ClientSession, chosen: CalibrateSettings) -> dict[str, Any]:
    try:
        async with session.get(chosen.engine + "/v1/models", headers=_headers(chosen)) as answer:
            if answer.status != 200:
                raise EngineRefused(f"/v1/models answered {answer.status}; is --engine right, and --engine-key?")
            card = (await answer.json(content_type=None))["data"][0]
            return dict(card)
    except (aiohttp.ClientError, OSError, TimeoutError):
        raise EngineRefused(f"no engine answers at {chosen.engine}; start it, and name its base URL") from None
    except (ValueError, LookupError, TypeError):
        raise EngineRefused("/v1/models names no model; wait until the engine has loaded it") from None


async def _version(session: aiohttp.ClientSession, chosen: CalibrateSettings) -> str:
    try:
        async with session.get(chosen.engine + "/version", headers=_headers(chosen)) as answer:
            return str((await answer.json(content_type=None))["version"])[:64]
    except (aiohttp.ClientError, OSError, ValueError, LookupError, TypeError):
        return "unknown"


def _headers(chosen: CalibrateSettings) -> dict[str, str]:
    return {"authorization": f"Bearer {chosen.engine_key}"} if chosen.engine_key else {}


def say(line: str) -> None:
    """Progress for people: one line that is written over where a terminal reads."""
    if sys.stderr.isatty():
        print("\r\x1b[K" + line, end="", file=sys.stderr, flush=True)
    elif line:
        print(line, file=sys.stderr, flush=True)
