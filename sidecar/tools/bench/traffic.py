"""One run: send requests when they are due, and record each outcome as the client sees it.

- A request that finds `max_open` others open is dropped without being sent, so that nothing piles up.
- A request that does not end within `timeout` seconds of its arrival is stalled; its connection is closed.
- 429 and 503 count as dropped by the engine. Requests open when the run is cancelled are cancelled.
- No content is kept.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from typing import Final

import aiohttp

from sidecar.relay.sse import SSE
from sidecar.tools.bench.tally import DROP_STATUSES, BenchRecord, Outcome
from sidecar.tools.calibrate.prompts import Prompts, PromptTarget
from sidecar.tools.calibrate.shapes import GridShape

# The plan's own timeout counts from the arrival.
NO_TIMEOUT: Final = aiohttp.ClientTimeout(total=None)
STREAM_OPTIONS: Final = {"stream": True, "stream_options": {"include_usage": True}}


@dataclass(frozen=True, slots=True)
class BenchPlan:
    """`at_once`: requests sent to the engine at a time; 0: all that are open."""

    shape: GridShape
    max_open: int
    at_once: int
    timeout: float
    seed: int


class BenchRun:
    """Sends one run's requests. `records` holds those that ended; `open` counts the others."""

    def __init__(self, session: aiohttp.ClientSession, target: PromptTarget, plan: BenchPlan) -> None:
        self.records: list[BenchRecord] = []
        self.open = 0
        self._session = session
        self._target = target
        self._plan = plan
        self._prompts = Prompts(target, plan.seed)
        self._gate: AbstractAsyncContextManager[object] = (
            asyncio.Semaphore(plan.at_once) if plan.at_once else nullcontext()
        )

    async def run(self, due: Iterable[float]) -> None:
        """Send a request at each time (seconds from now), and wait until all have ended."""
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for at in due:
                await asyncio.sleep(began + at - time.monotonic())
                if self.open >= self._plan.max_open:
                    self.records.append(BenchRecord("dropped", 0.0))
                    continue
                self.open += 1
                group.create_task(self._send())

    async def send_one(self) -> BenchRecord:
        """Send one request now."""
        self.open += 1
        await self._send()
        return self.records[-1]

    async def _send(self) -> None:
        """Send one request, already counted in `open`."""
        answer = _Answer(time.monotonic())
        ended: Outcome = "cancelled"
        try:
            async with asyncio.timeout(self._plan.timeout), self._gate:
                ended = await self._ask(answer)
        except TimeoutError:
            ended = "stalled"
        except (aiohttp.ClientError, OSError):
            ended = "failed"
        finally:
            self.open -= 1
            self.records.append(BenchRecord(ended, time.monotonic() - answer.began, answer.first, answer.tokens))

    async def _ask(self, answer: _Answer) -> Outcome:
        prompt = self._prompts.next(self._plan.shape)
        body = {**prompt.body, **STREAM_OPTIONS}
        async with self._session.post(
            self._target.url + prompt.path, json=body, headers=self._target.headers, timeout=NO_TIMEOUT
        ) as response:
            if response.status in DROP_STATUSES:
                return "dropped"
            if response.status != 200:
                return "failed"
            async for chunk in response.content.iter_any():
                answer.feed(chunk)
        return answer.ended


class _Answer:
    """The part of a response received so far."""

    def __init__(self, began: float) -> None:
        self.began = began
        self.first: float | None = None
        self._stream = SSE(hide_usage=False)

    def feed(self, chunk: bytes) -> None:
        self._stream.feed(chunk)
        if self.first is None and self._stream.started:
            self.first = time.monotonic() - self.began

    @property
    def tokens(self) -> int:
        """From the engine's usage, otherwise one per event."""
        usage = self._stream.usage
        return usage.completion_tokens if usage else self._stream.tokens

    @property
    def ended(self) -> Outcome:
        """`completed` if the stream ended properly, otherwise `failed`."""
        return "completed" if self._stream.done and self.first is not None else "failed"
