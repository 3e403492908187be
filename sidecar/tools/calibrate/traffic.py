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
from msgspec import structs

from sidecar.errors import SidecarError
from sidecar.events import RequestSize
from sidecar.readings import EngineSample
from sidecar.tools.calibrate.contention import Cores
from sidecar.tools.calibrate.fit import Measured, mix_of
from sidecar.tools.calibrate.prompts import Prompt, Prompts, PromptTarget, RequestUse, read_usage, shorten_error
from sidecar.tools.calibrate.shapes import GridShape

REQUEST_TIMEOUT: Final = aiohttp.ClientTimeout(total=300.0)
# The metrics page costs the engine milliseconds.
LOAD_CHECK_INTERVAL_S: Final = 1.0
# After a run: cancelled requests may go on to their end (llama.cpp, seen), but no longer than this many latencies.
DRAIN_LATENCIES: Final = 2
DRAIN_CHECK_INTERVAL_S: Final = 0.05
# If the engine does not report the size of its KV cache.
MAX_KV_TOKENS: Final = 1e9
# Share of the engine's KV cache that prefixes may occupy, so that requests do not evict them.
PREFIX_SHARE: Final = 0.5
# Consecutive checks with requests of other clients: a single one may show requests that were just cancelled.
FOREIGN_CHECKS: Final = 3

Load = Callable[[], Awaitable[float | None]]  # running and queued requests; None if unknown
Counters = Callable[[], Awaitable[EngineSample | None]]  # the engine's page; None if it has none
# Answers of an engine that accepts no more requests now.
FULL_STATUSES: Final = (429, 503)
# Of an engine that computed an answer and could not write it, which does not count: at most so many, and this share.
UNWRITTEN_STATUS: Final = 500
MAX_UNWRITTEN: Final = 2
MAX_UNWRITTEN_SHARE: Final = 0.5


class EngineRefused(SidecarError):
    """The engine cannot be calibrated. `status` is that of its answer; 0 if there was none."""

    code = "calibration_refused"

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


@dataclass(slots=True)
class LatencySample:
    """A run at one shape and concurrency: requests that started and ended while all others were open. Seconds.

    `tells_cached`: the engine reports cached prompt tokens. `others`: requests of other clients throughout the
    run. `waited`: the share of the time in which the engine waited for a core, which no request is charged for.
    """

    concurrency: int
    latencies: list[float] = field(default_factory=list)
    works: Counter[RequestSize] = field(default_factory=Counter)
    tells_cached: bool = False
    others: int = 0
    waited: float = 0.0

    def cost(self) -> Measured:
        """The mean cost of the requests."""
        seconds, mix = statistics.mean(self.latencies) * (1 - self.waited), mix_of(self.works)
        return Measured(mix[0][1], seconds * 1000 / self.concurrency, mix=mix if len(mix) > 1 else ())

    def set_cached(self, share: float) -> None:
        """Assume that this share of each prompt was cached."""
        works, self.works = self.works, Counter()
        for work, count in works.items():
            prompt = work.uncached + work.cached
            cached = round(share * prompt)
            self.works[structs.replace(work, uncached=prompt - cached, cached=cached)] += count

    def p95(self) -> float:
        """The 95th percentile of latency, seconds."""
        ranked = sorted(self.latencies)
        return ranked[min(len(ranked) - 1, int(0.95 * len(ranked)))] * (1 - self.waited)


@dataclass
class CalibrationTraffic:
    """Sends requests of given shapes. `load` and `cores` are watched during a run.

    `counters` report what the engine had cached if its responses do not. `kv_tokens`: the size of its KV cache.
    `unwritten`: answers that the engine computed and could not write, of `asked`.
    """

    target: PromptTarget
    seed: int = 0
    load: Load | None = None
    cores: Cores = field(default_factory=lambda: Cores(()))
    counters: Counters | None = None
    kv_tokens: float = MAX_KV_TOKENS
    asked: int = 0
    unwritten: int = 0

    def __post_init__(self) -> None:
        self._prompts = Prompts(self.target, self.seed)

    async def once(self, shape: GridShape) -> RequestSize:
        """Send a single request. Raises EngineRefused."""
        if shape.cached:
            await self._try(self._prompts.lead(shape), shape)
        while (use := await self._try(await self._next(shape), shape)) is None:
            pass
        return use.work

    async def burst(self, shape: GridShape, number: int) -> float:
        """Seconds until `number` requests sent at once are all answered. Raises EngineRefused."""
        started = time.monotonic()
        await asyncio.gather(*(self.once(shape) for _ in range(number)))
        return time.monotonic() - started

    async def run(self, shape: GridShape, concurrency: int, seconds: float) -> LatencySample:
        """Keep `concurrency` requests open for `seconds`, until as many counted. Raises EngineRefused."""
        sample = LatencySample(concurrency)
        lanes = await self._lead(shape, concurrency)
        before = await self.counters() if self.counters else None
        until, enough = time.monotonic() + seconds, asyncio.Event()
        warm = concurrency  # the first request of each worker does not count: not all were open

        async def worker(lane: int) -> None:
            nonlocal warm
            while True:
                prompt = await self._next(shape, lane)
                started, counts = time.monotonic(), warm <= 0
                if (use := await self._try(prompt, shape)) is None:
                    continue
                warm -= 1
                if warm == 0:
                    self.cores.mark()
                if counts:
                    sample.latencies.append(time.monotonic() - started)
                    sample.works[use.work] += 1
                    sample.tells_cached |= use.tells_cached
                if len(sample.latencies) >= concurrency and time.monotonic() >= until:
                    enough.set()

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(worker(number % lanes)) for number in range(concurrency)]
                tasks.append(group.create_task(self._watch_others(sample)))
                await enough.wait()
                sample.waited = self.cores.waited()
                for task in tasks:
                    task.cancel()
        except BaseExceptionGroup as group:
            raise _first_refusal(group) or group from None
        if before is not None and not sample.tells_cached:
            await self._count_cached(sample, before)
        await self._drain(DRAIN_LATENCIES * max(sample.latencies))
        return sample

    async def _drain(self, seconds: float) -> None:
        """Wait until the engine has no requests, so that they do not disturb the next run."""
        until = time.monotonic() + seconds
        while self.load is not None and await self.load() and time.monotonic() < until:  # noqa: ASYNC110
            await asyncio.sleep(DRAIN_CHECK_INTERVAL_S)

    async def _lead(self, shape: GridShape, concurrency: int) -> int:
        """Put prefixes into the engine's cache, one for each open request if they have room. Returns how many."""
        if not shape.cached:
            return 1
        lanes = max(1, min(concurrency, int(PREFIX_SHARE * self.kv_tokens // shape.cached)))
        await asyncio.gather(*(self._try(self._prompts.lead(shape, lane), shape) for lane in range(lanes)))
        return lanes

    async def _count_cached(self, sample: LatencySample, before: EngineSample) -> None:
        """Set what was cached from the engine's counters, if it has them."""
        after = await self.counters() if self.counters else None
        share = after.cached_share(before) if after else None
        if share is not None:
            sample.tells_cached = True
            sample.set_cached(share)

    async def _watch_others(self, sample: LatencySample) -> None:
        """Record other clients' requests on the engine until cancelled."""
        seen = 0
        while self.load is not None:
            await asyncio.sleep(LOAD_CHECK_INTERVAL_S)
            more = int((await self.load() or 0) - sample.concurrency)
            seen = seen + 1 if more > 0 else 0
            if seen >= FOREIGN_CHECKS:
                sample.others = max(sample.others, more)

    async def _next(self, shape: GridShape, lane: int = 0) -> Prompt:
        if shape.images:  # encoding a JPEG would block the loop
            return await asyncio.to_thread(self._prompts.next, shape, lane)
        return self._prompts.next(shape, lane)

    async def _try(self, prompt: Prompt, shape: GridShape) -> RequestUse | None:
        """Send one request; None if the engine could not write its answer. Raises EngineRefused."""
        self.asked += 1
        try:
            return await self._ask(prompt, shape)
        except EngineRefused as e:
            self.unwritten += e.status == UNWRITTEN_STATUS
            if e.status != UNWRITTEN_STATUS or self.unwritten > MAX_UNWRITTEN + MAX_UNWRITTEN_SHARE * self.asked:
                raise
            return None

    async def _ask(self, prompt: Prompt, shape: GridShape) -> RequestUse:
        path, body = prompt
        url, headers = self.target.url + path, self.target.headers
        try:
            async with self.target.session.post(url, json=body, headers=headers, timeout=REQUEST_TIMEOUT) as answer:
                text = await answer.text()
                if answer.status != 200:
                    raise EngineRefused(f"the engine returned {answer.status}: {shorten_error(text)}", answer.status)
                return read_usage(json.loads(text), shape, self.target)
        except (aiohttp.ClientError, OSError) as e:
            why = type(e).__name__
            raise EngineRefused(f"the connection to the engine failed ({why}); is it still running?") from None
        except ValueError:
            raise EngineRefused("the engine's response is not JSON with a usage object") from None


def _first_refusal(group: BaseExceptionGroup[BaseException]) -> EngineRefused | None:
    error: BaseException | None = group.subgroup(EngineRefused)
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error if isinstance(error, EngineRefused) else None
