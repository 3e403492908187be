"""Keep a fixed number of requests of one shape open on a live engine, and measure their cost.

The cost of a request is its share of a loaded engine: mean latency divided by the number of open requests (Little's
law). A single request would be charged for weights whose reading others share.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

import aiohttp

from sidecar.errors import SidecarError
from sidecar.events import RequestSize
from sidecar.tools.calibrate.contention import Cores
from sidecar.tools.calibrate.fit import Measured
from sidecar.tools.calibrate.prompts import Prompt, Prompts, PromptTarget, read_usage, shorten_error
from sidecar.tools.calibrate.shapes import GridShape

REQUEST_TIMEOUT: Final = aiohttp.ClientTimeout(total=300.0)
# The metrics page costs the engine milliseconds.
LOAD_CHECK_INTERVAL_S: Final = 1.0
# Consecutive checks with requests of other clients: a single one may show requests that were just cancelled.
FOREIGN_CHECKS: Final = 3

Load = Callable[[], Awaitable[float | None]]  # running and queued requests; None if unknown


class EngineRefused(SidecarError):
    """The engine cannot be calibrated."""

    code = "calibration_refused"


@dataclass(slots=True)
class LatencySample:
    """A run at one shape and concurrency: requests that started and ended while all others were open. Seconds.

    `others`: requests of other clients throughout the run. `waited`: the share of the time in which the engine waited
    for a core, which no request is charged for.
    """

    concurrency: int
    latencies: list[float] = field(default_factory=list)
    works: Counter[RequestSize] = field(default_factory=Counter)
    others: int = 0
    waited: float = 0.0

    def cost(self) -> Measured:
        """The cost of the most common size."""
        seconds = statistics.mean(self.latencies) * (1 - self.waited)
        return Measured(self.works.most_common(1)[0][0], seconds * 1000 / self.concurrency)

    def p95(self) -> float:
        """The 95th percentile of latency, seconds."""
        ranked = sorted(self.latencies)
        return ranked[min(len(ranked) - 1, int(0.95 * len(ranked)))] * (1 - self.waited)


@dataclass
class CalibrationTraffic:
    """Sends requests of given shapes. `load` and `cores` are watched during a run."""

    target: PromptTarget
    seed: int = 0
    load: Load | None = None
    cores: Cores = field(default_factory=lambda: Cores(()))

    def __post_init__(self) -> None:
        self._prompts = Prompts(self.target, self.seed)

    async def once(self, shape: GridShape) -> RequestSize:
        """Send a single request. Raises EngineRefused."""
        if shape.cached:
            await self._ask(self._prompts.lead(shape), shape)
        return await self._ask(await self._next(shape), shape)

    async def burst(self, shape: GridShape, number: int) -> float:
        """Seconds until `number` requests sent at once are all answered. Raises EngineRefused."""
        started = time.monotonic()
        await asyncio.gather(*(self.once(shape) for _ in range(number)))
        return time.monotonic() - started

    async def run(self, shape: GridShape, concurrency: int, seconds: float) -> LatencySample:
        """Keep `concurrency` requests open for `seconds`, until as many counted. Raises EngineRefused, in a group."""
        sample = LatencySample(concurrency)
        if shape.cached:
            await self._ask(self._prompts.lead(shape), shape)
        until, enough = time.monotonic() + seconds, asyncio.Event()
        warm = concurrency  # the first request of each worker does not count: not all were open

        async def worker() -> None:
            nonlocal warm
            while True:
                prompt = await self._next(shape)
                started, counts = time.monotonic(), warm <= 0
                work = await self._ask(prompt, shape)
                warm -= 1
                if warm == 0:
                    self.cores.mark()
                if counts:
                    sample.latencies.append(time.monotonic() - started)
                    sample.works[work] += 1
                if len(sample.latencies) >= concurrency and time.monotonic() >= until:
                    enough.set()

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(worker()) for _ in range(concurrency)]
            tasks.append(group.create_task(self._watch_others(sample)))
            await enough.wait()
            sample.waited = self.cores.waited()
            for task in tasks:
                task.cancel()
        return sample

    async def _watch_others(self, sample: LatencySample) -> None:
        """Record other clients' requests on the engine until cancelled."""
        seen = 0
        while self.load is not None:
            await asyncio.sleep(LOAD_CHECK_INTERVAL_S)
            more = int((await self.load() or 0) - sample.concurrency)
            seen = seen + 1 if more > 0 else 0
            if seen >= FOREIGN_CHECKS:
                sample.others = max(sample.others, more)

    async def _next(self, shape: GridShape) -> Prompt:
        if shape.images:  # encoding a JPEG would block the loop
            return await asyncio.to_thread(self._prompts.next, shape)
        return self._prompts.next(shape)

    async def _ask(self, prompt: Prompt, shape: GridShape) -> RequestSize:
        path, body = prompt
        url, headers = self.target.url + path, self.target.headers
        try:
            async with self.target.session.post(url, json=body, headers=headers, timeout=REQUEST_TIMEOUT) as answer:
                text = await answer.text()
                if answer.status != 200:
                    raise EngineRefused(f"the engine returned {answer.status}: {shorten_error(text)}")
                return read_usage(json.loads(text), shape, self.target)
        except (aiohttp.ClientError, OSError) as e:
            why = type(e).__name__
            raise EngineRefused(f"the connection to the engine failed ({why}); is it still running?") from None
        except ValueError:
            raise EngineRefused("the engine's response is not JSON with a usage object") from None
