"""Requests of a chosen size against a live engine, a fixed number of them open at all times, and what each cost.

The cost of a request is the engine's time for it under load: with a fixed number open, the mean time that one takes over that number
(Little's law). Alone, a request would be charged for weights that others read along with it.

Rules: a request has a deadline; an engine that refuses ends the measurement with its own words; a run during which the engine
served others, too, says so, and does not count.
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

REQUEST_TIMEOUT_S: Final = 300.0  # deadline of one request
LOAD_CHECK_INTERVAL_S: Final = (
    1.0  # seconds between looks at what else the engine serves: its page costs it milliseconds
)
FOREIGN_CHECKS: Final = (
    3  # looks in a row with requests of others: one alone may show requests of ours that were just broken off
)

Load = Callable[[], Awaitable[float | None]]  # requests that the engine runs and queues; None where it does not say


class EngineRefused(SidecarError):
    """The engine does not do what calibration needs."""

    code = "calibration_refused"


@dataclass(frozen=True, slots=True)
class BackgroundLoad:
    """What is watched during a run: how many requests the engine has, and how long it waits for a core."""

    load: Load | None = None
    cores: Cores | None = None


@dataclass(slots=True)
class LatencySample:
    """What a run at one shape and concurrency showed, of requests that began and ended while all others were open, too. Seconds.

    `others`: requests of others that were there all the while; 0 where there were none. `waited`: the share of the time in which
    the engine had no core, which no request is charged for.
    """

    concurrency: int
    latencies: list[float] = field(default_factory=list)
    works: Counter[RequestSize] = field(default_factory=Counter)
    others: int = 0
    waited: float = 0.0

    def cost(self) -> Measured:
        """The cost of the commonest size seen."""
        seconds = statistics.mean(self.latencies) * (1 - self.waited)
        return Measured(self.works.most_common(1)[0][0], seconds * 1000 / self.concurrency)

    def p95(self) -> float:
        """The 95th percentile of latency, seconds."""
        ranked = sorted(self.latencies)
        return ranked[min(len(ranked) - 1, int(0.95 * len(ranked)))] * (1 - self.waited)


class CalibrationTraffic:
    """Sends requests of given shapes."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        target: PromptTarget,
        seed: int = 0,
        background: BackgroundLoad | None = None,
    ) -> None:
        self._session = session
        self._target = target
        self._prompts = Prompts(target, seed)
        self._background = background or BackgroundLoad()

    async def once(self, shape: GridShape) -> RequestSize:
        """One request alone. Raises EngineRefused."""
        if shape.cached:
            await self._ask(self._prompts.lead(shape), shape)
        return await self._ask(await self._next(shape), shape)

    async def burst(self, shape: GridShape, number: int) -> float:
        """Seconds until as many requests, sent at once, are all answered. Raises EngineRefused."""
        started = time.monotonic()
        await asyncio.gather(*(self.once(shape) for _ in range(number)))
        return time.monotonic() - started

    async def run(self, shape: GridShape, concurrency: int, seconds: float, rounds: int = 1) -> LatencySample:
        """Keep `concurrency` requests open for `seconds`, and until `rounds` of them have counted. Raises EngineRefused."""
        sample = LatencySample(concurrency)
        if shape.cached:
            await self._ask(self._prompts.lead(shape), shape)
        until, enough = time.monotonic() + seconds, asyncio.Event()
        warm = concurrency  # the first of each worker does not count: not all others were open yet

        async def worker() -> None:
            nonlocal warm
            while True:
                prompt = await self._next(shape)
                started, counts = time.monotonic(), warm <= 0
                work = await self._ask(prompt, shape)
                warm -= 1
                if warm == 0 and self._background.cores is not None:
                    self._background.cores.mark()
                if counts:
                    sample.latencies.append(time.monotonic() - started)
                    sample.works[work] += 1
                if len(sample.latencies) >= rounds * concurrency and time.monotonic() >= until:
                    enough.set()

        workers = [asyncio.create_task(worker()) for _ in range(concurrency)]
        watching, ended = asyncio.create_task(self._watch_background(sample)), asyncio.create_task(enough.wait())
        try:
            done, _ = await asyncio.wait([ended, *workers], return_when=asyncio.FIRST_COMPLETED)
            for task in done:  # a worker ends by itself only when it failed
                task.result()
            if self._background.cores is not None:
                sample.waited = self._background.cores.waited()
        finally:
            for task in (*workers, watching, ended):
                task.cancel()
            await asyncio.gather(*workers, watching, ended, return_exceptions=True)
        return sample

    async def _watch_background(self, sample: LatencySample) -> None:
        """Take down what the engine serves beside us. Ends with the run."""
        seen = 0
        while self._background.load is not None:
            await asyncio.sleep(LOAD_CHECK_INTERVAL_S)
            load = await self._background.load()
            more = int((load or 0) - sample.concurrency)
            seen = seen + 1 if more > 0 else 0
            if seen >= FOREIGN_CHECKS:
                sample.others = max(sample.others, more)

    async def _next(self, shape: GridShape) -> Prompt:
        if shape.images:  # a JPEG holds the loop up otherwise
            return await asyncio.to_thread(self._prompts.next, shape)
        return self._prompts.next(shape)

    async def _ask(self, prompt: Prompt, shape: GridShape) -> RequestSize:
        try:
            async with self._session.post(
                self._target.url + prompt.path, json=prompt.body, headers=self._target.headers,
                timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S),
            ) as answer:  # fmt: skip
                text = await answer.text()
                if answer.status != 200:
                    raise EngineRefused(f"the engine answered {answer.status}: {shorten_error(text)}")
                return read_usage(json.loads(text), shape, self._target)
        except (aiohttp.ClientError, OSError, TimeoutError) as e:
            raise EngineRefused(f"the engine broke off ({type(e).__name__}); is it still running?") from None
        except ValueError:
            raise EngineRefused("the engine's answer is no JSON with a usage object") from None
