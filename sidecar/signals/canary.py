"""One token from the engine, read to the end of its stream: the canary.

One at a time; its cost is one token; its answer is not kept. It goes straight to the engine, past the relay, so that a relay in
trouble does not look like an engine in trouble. It is never counted as a tenant's work.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp

from sidecar.facts import CanaryResult

MAX_ANSWER = 1 << 20  # bytes read of a canary's answer
Clock = Callable[[], float]


# model name -> (path, JSON body)
MakeRequest = Callable[[str], tuple[str, dict[str, Any]]]


class CanarySignal:
    """Sends canaries. `send` never raises; the caller sees to it that only one is under way."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        engine: str,
        make: MakeRequest,
        headers: dict[str, str],
        model: str = "",
        clock: Clock = time.monotonic,
    ) -> None:
        self._session = session
        self._engine = engine
        self._make = make
        self._headers = headers
        self._chosen = self._model = model
        self._clock = clock

    async def send(self, allowed: float) -> CanaryResult:
        """Send one; it is starved when its stream has not ended after `allowed` seconds."""
        started = self._clock()
        outcome, detail = await self._outcome(self._attempt, allowed)
        return CanaryResult(outcome, started, self._clock(), allowed, detail)

    async def _outcome(self, attempt: Callable[[], Awaitable[tuple[Any, str]]], allowed: float) -> tuple[Any, str]:
        try:
            async with asyncio.timeout(allowed):
                return await attempt()
        except TimeoutError:
            return "starved", f"no token within {allowed:.1f} s"
        except aiohttp.ClientConnectorError:
            return "refused", "the engine takes no connection"
        except (aiohttp.ClientError, OSError, ValueError) as e:
            return "failed", f"the answer broke off ({type(e).__name__})"

    async def _attempt(self) -> tuple[Any, str]:
        if not self._model and (refusal := await self._discover()):
            return refusal
        path, body = self._make(self._model)
        async with self._session.post(self._engine + path, json=body, headers=self._headers) as answer:
            if answer.status != 200:
                return _refusal(answer.status)
            return await _read(answer)

    async def _discover(self) -> tuple[str, str] | None:
        """Learn the first name of /v1/models. Returns the outcome when there is none."""
        async with self._session.get(self._engine + "/v1/models", headers=self._headers) as answer:
            if answer.status != 200:
                return _refusal(answer.status)
            raw = json.loads(await answer.content.read(MAX_ANSWER))
        models = raw.get("data") if isinstance(raw, dict) else None
        if isinstance(models, list) and models and isinstance(models[0], dict):
            self._model = str(models[0].get("id", ""))
        return None if self._model else ("rejected", "the engine names no model; set --canary-model")

    def forget_model(self) -> None:
        """The engine was restarted: it may serve another model now."""
        self._model = self._chosen


def _refusal(status: int) -> tuple[str, str]:
    if status in (429, 503):
        return "busy", f"HTTP {status}"
    return ("failed" if status >= 500 else "rejected"), f"HTTP {status}"


async def _read(answer: aiohttp.ClientResponse) -> tuple[str, str]:
    """Read to the end: a stream that starts and never ends is a hang too."""
    size = 0
    async for chunk in answer.content.iter_any():
        size += len(chunk)
        if size > MAX_ANSWER:
            return "failed", "the answer has no end"
    return ("ok", "") if size else ("failed", "the answer is empty")
