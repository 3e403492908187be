"""One run: send requests when they are due, and record each outcome as the client sees it. No content is kept."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Final

import aiohttp

from sidecar.relay.sse import SSE
from sidecar.tools.bench.tally import DROP_STATUSES, BenchRecord, Outcome
from sidecar.tools.calibrate.prompts import Prompts, PromptTarget
from sidecar.tools.calibrate.shapes import GridShape

# The run's own timeout counts from the arrival.
NO_TIMEOUT: Final = aiohttp.ClientTimeout(total=None)
STREAM_OPTIONS: Final = {"stream": True, "stream_options": {"include_usage": True}}


@dataclass
class BenchRun:
    """Sends one run's requests. `records` holds those that ended; `open` counts the others.

    - A request that finds `max_open` others open is dropped without being sent, so that nothing piles up.
    - A request that does not end within `timeout` seconds of its arrival is stalled; its connection is closed.
    - 429 and 503 count as dropped by the engine. Requests open when the run is cancelled are cancelled.
    - `one_at_a_time`: the engine gets no request before the last one ended.
    """

    target: PromptTarget
    shape: GridShape
    max_open: int
    timeout: float
    seed: int
    one_at_a_time: bool
    records: list[BenchRecord] = field(default_factory=list)
    open: int = 0

    def __post_init__(self) -> None:
        self._prompts = Prompts(self.target, self.seed)
        self._gate: AbstractAsyncContextManager[object] = asyncio.Semaphore(1) if self.one_at_a_time else nullcontext()

    async def run(self, due: Iterable[float]) -> None:
        """Send a request at each time (seconds from now), and wait until all have ended."""
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for at in due:
                await asyncio.sleep(began + at - time.monotonic())
                if self.open >= self.max_open:
                    self.records.append(BenchRecord("dropped", 0.0))
                    continue
                self.open += 1
                group.create_task(self._send())

    async def _send(self) -> None:
        """Send one request, already counted in `open`."""
        began, first, stream = time.monotonic(), None, SSE(hide_usage=False)
        ended: Outcome = "cancelled"
        try:
            async with asyncio.timeout(self.timeout), self._gate, self._post() as response:
                if response.status == 200:
                    async for chunk in response.content.iter_any():
                        stream.feed(chunk)
                        if first is None and stream.started:
                            first = time.monotonic() - began
                whole = stream.done and first is not None
                ended = "dropped" if response.status in DROP_STATUSES else "completed" if whole else "failed"
        except TimeoutError:
            ended = "stalled"
        except (aiohttp.ClientError, OSError):
            ended = "failed"
        finally:
            self.open -= 1
            tokens = stream.usage.completion_tokens if stream.usage else stream.tokens  # one per event
            self.records.append(BenchRecord(ended, time.monotonic() - began, first, tokens))

    def _post(self) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        path, body = self._prompts.next(self.shape)
        url, headers = self.target.url + path, self.target.headers
        return self.target.session.post(url, json={**body, **STREAM_OPTIONS}, headers=headers, timeout=NO_TIMEOUT)
