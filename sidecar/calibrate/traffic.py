"""Requests of a chosen size against a live engine, a fixed number of them open at all times, and what each cost.

The cost of a request is the engine's time for it under load: with a fixed number open, the mean time that one takes over that number
(Little's law). Alone, a request would be charged for weights that others read along with it.

Rules: prompts are random, so that nothing is cached by accident; what was really used is what the engine's `usage` says; a request has
a deadline; an engine that refuses ends the measurement with its own words.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

import aiohttp

from sidecar.calibrate.fit import Measured
from sidecar.calibrate.shapes import Shape
from sidecar.errors import SidecarError
from sidecar.facts import Work

SECONDS: Final = 300.0  # deadline of one request
WORDS: Final = ("red", "blue", "tree", "house", "seven", "river", "stone", "light", "paper", "north", "glass", "winter")


class EngineRefused(SidecarError):
    """The engine does not do what calibration needs."""

    code = "calibration_refused"


@dataclass(frozen=True, slots=True)
class Target:
    """The engine, and how it is asked. `ids`: it takes prompts as token ids, of which `vocabulary` are safe."""

    url: str
    model: str
    key: str = ""
    ids: bool = True
    vocabulary: int = 256


@dataclass(slots=True)
class Sample:
    """What a run at one shape and concurrency showed, of requests that began and ended while all others were open, too. Seconds."""

    concurrency: int
    latencies: list[float]
    works: Counter[Work]

    def cost(self) -> Measured:
        """The cost of the commonest size seen."""
        return Measured(self.works.most_common(1)[0][0], statistics.mean(self.latencies) * 1000 / self.concurrency)

    def p95(self) -> float:
        """The 95th percentile of latency, seconds."""
        ranked = sorted(self.latencies)
        return ranked[min(len(ranked) - 1, int(0.95 * len(ranked)))]


class Traffic:
    """Sends requests of given shapes."""

    def __init__(self, session: aiohttp.ClientSession, target: Target, seed: int = 0) -> None:
        self._session = session
        self._target = target
        self._random = random.Random(seed)

    async def run(self, shape: Shape, concurrency: int, seconds: float, rounds: int = 2) -> Sample:
        """Keep `concurrency` requests open for `seconds`, and until `rounds` of them have counted. Raises EngineRefused."""
        sample = Sample(concurrency, [], Counter())
        prefix = self._tokens(shape.cached)
        if shape.cached:
            await self._one(prefix + self._tokens(1), 1)
        until, enough = time.monotonic() + seconds, asyncio.Event()
        warm = concurrency  # the first of each worker does not count: not all others were open yet

        async def worker() -> None:
            nonlocal warm
            while True:
                started, counts = time.monotonic(), warm <= 0
                work = await self._one(prefix + self._tokens(shape.uncached), shape.output)
                warm -= 1
                if counts:
                    sample.latencies.append(time.monotonic() - started)
                    sample.works[work] += 1
                if len(sample.latencies) >= rounds * concurrency and time.monotonic() >= until:
                    enough.set()

        async with asyncio.TaskGroup() as group:
            workers = [group.create_task(worker()) for _ in range(concurrency)]
            ended = group.create_task(enough.wait())
            await asyncio.wait([ended, *workers], return_when=asyncio.FIRST_COMPLETED)
            for task in (ended, *workers):  # a worker ends by itself only when it failed
                task.cancel()
        return sample

    def _tokens(self, count: int) -> list[int]:
        return [self._random.randrange(self._target.vocabulary) for _ in range(count)]

    def _prompt(self, tokens: list[int]) -> Any:
        if self._target.ids:
            return tokens
        return " ".join(WORDS[token % len(WORDS)] for token in tokens)

    async def _one(self, tokens: list[int], output: int) -> Work:
        body = {
            "model": self._target.model, "prompt": self._prompt(tokens), "max_tokens": output, "min_tokens": output,
            "ignore_eos": True, "temperature": 0.0, "stream": False,
        }  # fmt: skip
        headers = {"authorization": f"Bearer {self._target.key}"} if self._target.key else {}
        timeout = aiohttp.ClientTimeout(total=SECONDS)
        try:
            async with self._session.post(
                f"{self._target.url}/v1/completions", json=body, headers=headers, timeout=timeout
            ) as answer:
                text = await answer.text()
                if answer.status != 200:
                    raise EngineRefused(f"the engine answered {answer.status}: {words(text)}")
                return used(json.loads(text))
        except (aiohttp.ClientError, OSError, TimeoutError) as e:
            raise EngineRefused(f"the engine broke off ({type(e).__name__}); is it still running?") from None
        except ValueError:
            raise EngineRefused("the engine's answer is no JSON with a usage object") from None


def used(answer: Any) -> Work:
    """What an answer says that it used. Raises ValueError."""
    try:
        usage = answer["usage"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return Work(usage["prompt_tokens"] - cached, cached, usage["completion_tokens"])
    except (KeyError, TypeError, AttributeError):
        raise ValueError("no usage") from None


def words(text: str) -> str:
    """An engine's error in one short line."""
    try:
        error = json.loads(text)
        text = str(error.get("error", {}).get("message") or error.get("message") or text)
    except (ValueError, AttributeError):
        pass
    return " ".join(text.split())[:200]
