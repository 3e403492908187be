"""Sample traffic: several tenants, text streams and chats with photographs, sent to a relay like real clients.

- `plan_requests` makes the requests as pure data: equal seeds give equal requests at equal intervals.
- Open loop: requests are sent when due, independent of earlier ones. Above `in_flight` open requests, one is skipped
  and counted as such, so that a stalled engine does not pile up work here.
- Each request that was sent has exactly one outcome, as the client sees it. No content is kept or printed.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal

import aiohttp

from sidecar.errors import UsageError

Route = Literal["chat/completions", "completions"]

# The outcome of a request as its client sees it. "open": still in progress when the traffic ended.
OUTCOMES: Final = ("ok", "rejected", "unavailable", "engine_error", "broken", "timed_out", "open", "skipped")
UNAVAILABLE_STATUSES: Final = (502, 503, 504)
RESPONSE_TIMEOUT_S: Final = 120.0  # until the end of the response
TENANT_HEADER: Final = "x-tenant-id"

MEDIA_TYPES: Final = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png", ".webp": "image/webp"}
SYNTHETIC_SIZES: Final = ((1280, 720), (1920, 1080), (768, 1024), (1600, 1200), (640, 480), (1080, 1440))
MAX_PICTURES: Final = 32
MAX_PICTURE_BYTES: Final = 20 << 20  # the default limit of the relay
SAMPLE_TEXT: Final = "what does this say about the weather on that day and how would you put it in other words"


@dataclass(frozen=True, slots=True)
class TrafficShape:
    """A kind of request. `words` and `output` (tokens) are ranges; `weight` is its share of the traffic."""

    weight: int
    tenant: str
    route: Route
    words: tuple[int, int]
    output: tuple[int, int]
    pictures: int = 0


SHAPES: Final = (
    TrafficShape(5, "search", "completions", (20, 120), (4, 16)),
    TrafficShape(4, "assistant", "chat/completions", (40, 400), (30, 120)),
    TrafficShape(2, "batch", "completions", (800, 2500), (60, 160)),
    TrafficShape(3, "catalogue", "chat/completions", (10, 40), (20, 60), pictures=1),
    TrafficShape(1, "insurance", "chat/completions", (20, 80), (40, 90), pictures=2),
)


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request, `gap` seconds after the previous one. `pictures` are indices into the plan's pictures."""

    gap: float
    shape: TrafficShape
    prompt: str
    max_tokens: int
    pictures: tuple[int, ...]


@dataclass(slots=True)
class TrafficTally:
    """The traffic so far. `pictures` counts those of successful requests."""

    outcomes: Counter[str] = field(default_factory=Counter)
    pictures: int = 0
    open: int = 0
    last_ok: float = 0.0  # monotonic time of the last successful request; 0 before the first


@dataclass(frozen=True, slots=True)
class TrafficPlan:
    """Destination, amount and content. `rate`: mean requests per second; `pictures`: data URLs."""

    url: str
    rate: float
    in_flight: int
    seed: int
    model: str
    pictures: Sequence[str] = ()


def plan_requests(seed: int, rate: float, pictures: int) -> Iterator[PlannedRequest]:
    """An endless stream of requests: a Poisson process; without pictures only text."""
    rng = random.Random(seed)
    shapes = [shape for shape in SHAPES if pictures or not shape.pictures]
    weights, words = [shape.weight for shape in shapes], SAMPLE_TEXT.split()
    while True:
        shape = rng.choices(shapes, weights)[0]
        gap, prompt = rng.expovariate(rate), " ".join(rng.choices(words, k=rng.randint(*shape.words)))
        max_tokens, chosen = rng.randint(*shape.output), tuple(rng.randrange(pictures) for _ in range(shape.pictures))
        yield PlannedRequest(gap, shape, prompt, max_tokens, chosen)


def body(request: PlannedRequest, model: str, pictures: Sequence[str]) -> dict[str, Any]:
    """The request's JSON body."""
    common = {"model": model, "max_tokens": request.max_tokens, "stream": True}
    if request.shape.route == "completions":
        return {**common, "prompt": request.prompt}
    parts: list[dict[str, Any]] = [{"type": "text", "text": request.prompt}]
    parts += [{"type": "image_url", "image_url": {"url": pictures[i]}} for i in request.pictures]
    return {**common, "messages": [{"role": "user", "content": parts if request.pictures else request.prompt}]}


def outcome(status: int, complete: bool) -> str:
    """The outcome of a response. `complete`: its stream ended properly and without an error."""
    if status < 400:
        return "ok" if complete else "broken"
    if status < 500:
        return "rejected"
    return "unavailable" if status in UNAVAILABLE_STATUSES else "engine_error"


class DemoTraffic:
    """Sends a plan's requests until cancelled; requests then in progress count as "open"."""

    def __init__(self, plan: TrafficPlan) -> None:
        self.plan: Final = plan
        self.tally: Final = TrafficTally()

    async def run(self, limit: int | None = None) -> None:
        """Send without end, or send `limit` requests and return when all have ended."""
        plan = self.plan
        timeout = aiohttp.ClientTimeout(total=RESPONSE_TIMEOUT_S)
        session = aiohttp.ClientSession(plan.url, timeout=timeout, connector=aiohttp.TCPConnector(limit=plan.in_flight))
        async with session as http, asyncio.TaskGroup() as group:
            due = time.monotonic()
            for request in islice(plan_requests(plan.seed, plan.rate, len(plan.pictures)), limit):
                due += request.gap
                await asyncio.sleep(due - time.monotonic())
                if self.tally.open >= plan.in_flight:
                    self.tally.outcomes["skipped"] += 1
                    continue
                self.tally.open += 1
                group.create_task(self._send(http, request))

    async def _send(self, http: aiohttp.ClientSession, request: PlannedRequest) -> None:
        result = "open"
        try:
            result = await self._answer(http, request)
        except TimeoutError:
            result = "timed_out"
        except aiohttp.ClientConnectorError:
            result = "unavailable"
        except (aiohttp.ClientError, ValueError):  # ValueError: a line that is too long
            result = "broken"
        finally:
            self.tally.open -= 1
            self.tally.outcomes[result] += 1
        if result == "ok":
            self.tally.pictures += len(request.pictures)
            self.tally.last_ok = time.monotonic()

    async def _answer(self, http: aiohttp.ClientSession, request: PlannedRequest) -> str:
        data = json.dumps(body(request, self.plan.model, self.plan.pictures)).encode()
        headers = {"Content-Type": "application/json", TENANT_HEADER: request.shape.tenant}
        async with http.post(f"/v1/{request.shape.route}", data=data, headers=headers) as response:
            done = failed = False
            async for line in response.content:
                failed = failed or line.startswith(b'data: {"error"')
                done = done or line.startswith(b"data: [DONE]")
            return outcome(response.status, done and not failed)


def make_pictures(seed: int) -> list[str]:
    """Some synthetic JPEGs as data URLs. Takes a second or two of CPU time; needs the `images` extra."""
    from sidecar.tools.synthetic_photos import photo

    return [_data_url("image/jpeg", photo(*size, seed + i)) for i, size in enumerate(SYNTHETIC_SIZES)]


def load_pictures(directory: Path) -> list[str]:
    """The first pictures of a directory by name, as data URLs. Raises UsageError if it has none."""
    files = sorted(path for path in directory.iterdir() if path.suffix.lower() in MEDIA_TYPES and path.is_file())
    files = [path for path in files if 0 < path.stat().st_size <= MAX_PICTURE_BYTES][:MAX_PICTURES]
    if not files:
        kinds = ", ".join(MEDIA_TYPES)
        raise UsageError(f"--images: {directory} contains no {kinds} file of up to {MAX_PICTURE_BYTES >> 20} MiB")
    return [_data_url(MEDIA_TYPES[path.suffix.lower()], path.read_bytes()) for path in files]


def _data_url(media_type: str, data: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"
