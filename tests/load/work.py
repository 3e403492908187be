"""A synthetic engine of known cost: windows of its work, and request histories on the scripted engine's scheduler."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from sidecar.events import Admitted, Delivered, Event, FirstToken, RequestSize, Settled, Usage
from sidecar.load import cost_model
from sidecar.load.cost_model import Coefficients
from sidecar.load.drift import Drift
from sidecar.load.work_windows import WINDOW_TERMS, WorkWindow
from sidecar.tools.scripted_engine.behaviour import Behaviour
from sidecar.tools.scripted_engine.scheduler import ScheduledSequence, Scheduler, SchedulerLimits

PIECE = 16  # tokens of a delivery
ENGINE = SchedulerLimits(20_000.0, 0.010, 64, 2048, 131_072, 2048)  # the defaults of `sidecar engine`


def ms(window: dict[str, float], co: Coefficients, shared: float) -> float:
    """The time that a window's work takes on an engine that pays a share `shared` of d per step."""
    decode = co.d * ((1 - shared) * window["d"] + shared * co.batch * window["step"])
    return decode + sum(getattr(co, name) * window[name] for name in cost_model.TERMS if name != "d")


def windows(
    co: Coefficients, count: int, seed: int, *, shared: float = 0.8, noise: float = 0.1, images: bool = True
) -> Iterator[WorkWindow]:
    """Windows of mixed load on it, with log-normal noise."""
    rng = random.Random(seed)
    for at in range(count):
        requests, together = rng.randint(1, 8), rng.choice((1.0, 2.0, 6.5, 16.0, 40.0))
        work = dict.fromkeys(WINDOW_TERMS, 0.0)
        for _ in range(requests):
            pictures = rng.randint(0, 2) if images else 0
            w = RequestSize(
                int(rng.lognormvariate(6.5, 1)),
                int(rng.choice((0, 1000))),
                int(rng.lognormvariate(4.5, 1)),
                400 * pictures,
                pictures,
                image_squares=400**2 * pictures,
            )
            for name, value in zip(cost_model.TERMS, cost_model.features(w, co), strict=True):
                work[name] += value
        work["step"] = work["d"] / together
        took = ms(work, co, shared) * rng.lognormvariate(0, noise)
        yield WorkWindow(10.0 * at, took, tuple(work[name] for name in WINDOW_TERMS), together)


def found(drift: Drift, seen: Iterable[WorkWindow]) -> int | None:
    """The number of windows until the coefficients were stale."""
    for number, window in enumerate(seen, 1):
        drift.add(window)
        if drift.memory.stale:
            return number
    return None


def slower(seen: Iterator[WorkWindow], times: float) -> Iterator[WorkWindow]:
    """The same windows on an engine that takes `times` as long."""
    return (replace(window, ms=window.ms * times) for window in seen)


@dataclass(slots=True)
class _Request:
    id: str
    sequence: ScheduledSequence
    at: float
    first: float | None = None
    sent: int = 0


def history(
    co: Coefficients, seconds: float, seed: int, *, rate: float, slow: float = 1.0, start: float = 0.0
) -> Iterator[tuple[float, Event]]:
    """Events of users of the scripted engine's scheduler, in simulated time; every step takes `slow` times as long."""
    rng = random.Random(seed)
    scheduler, how = Scheduler(ENGINE), Behaviour(step_factor=slow)
    now, due, number = start, start + rng.expovariate(rate), 0
    open_: dict[ScheduledSequence, _Request] = {}
    while now < start + seconds:
        while due <= now:
            prompt, limit = int(rng.lognormvariate(6.5, 0.8)) + 1, int(rng.lognormvariate(4.5, 0.7)) + 1
            number += 1
            request = _Request(f"{start}-{number}", ScheduledSequence(prompt, limit), due)
            open_[request.sequence] = request
            scheduler.add(request.sequence)
            work = RequestSize(prompt, output=100)
            yield due, Admitted(request.id, due, "t", "m", "chat", True, work, limit, cost_model.mu(work, co))
            due += rng.expovariate(rate)
        if not scheduler.is_busy():
            now = due
            continue
        step = scheduler.plan(how)
        now += step.seconds
        for output in scheduler.apply(step):
            yield from _told(open_, output.sequence, now, done=output.done)


def _told(
    open_: dict[ScheduledSequence, _Request], sequence: ScheduledSequence, now: float, *, done: bool
) -> Iterator[tuple[float, Event]]:
    request = open_[sequence]
    request.sent += 1
    if request.first is None:
        request.first = now
        yield now, FirstToken(request.id, now)
    if request.sent % PIECE == 1:
        yield now, Delivered(request.id, now, min(PIECE, request.sent), 5)
    if done:
        del open_[sequence]
        used = Usage(sequence.prompt, request.sent)
        yield now, Settled(request.id, now, "ok", 200, used, request.sent, 5, request.first, request.at, 0.0)
