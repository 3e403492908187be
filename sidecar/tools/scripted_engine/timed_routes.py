"""Work that takes a time instead of tokens: images, speech, transcription, ranking.

It does not pass the scheduler, so that no gauge and no counter shows it, but it stands still while the core does. A
request may say how long it takes: `?seconds=N`.
"""

from __future__ import annotations

import asyncio
import base64
from dataclasses import dataclass
from typing import Final

from aiohttp import web

from sidecar.tools.scripted_engine.faults import Faults
from sidecar.tools.scripted_engine.requests import bad_request

# Between two pieces of an answer, and between two looks at whether the core still runs.
PIECE_S: Final = 0.1
PIECE_BYTES: Final = 3200
MAX_WORK_S: Final = 3600.0
EMPTY_IMAGE: Final = base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()


@dataclass(frozen=True, slots=True)
class TimedRoute:
    """A POST to `path` takes `seconds` and gets `answer`, or `media` in pieces meanwhile."""

    path: str
    seconds: float
    answer: dict[str, object] | None = None
    media: str = "audio/pcm"


TIMED_ROUTES: Final = (
    TimedRoute("/v1/images/generations", 1.0, {"created": 0, "data": [{"b64_json": EMPTY_IMAGE}]}),
    TimedRoute("/v1/audio/speech", 1.0),
    TimedRoute("/v1/audio/transcriptions", 0.2, {"text": "a light stone", "usage": {"type": "duration", "seconds": 1}}),
    TimedRoute("/v1/rerank", 0.02, {"id": "rerank-1", "results": [{"index": 0, "relevance_score": 0.5}]}),
)


def timed_routes(faults: Faults) -> list[web.RouteDef]:
    """The routes of the table."""
    return [web.post(row.path, _TimedHandler(row, faults).handle) for row in TIMED_ROUTES]


class _TimedHandler:
    """The handler of one row."""

    def __init__(self, row: TimedRoute, faults: Faults) -> None:
        self._row, self._faults = row, faults

    async def handle(self, request: web.Request) -> web.StreamResponse:
        seconds = seconds_of(request, self._row.seconds)
        await request.read()
        if self._row.answer is not None:
            await self._work(seconds)
            return web.json_response(self._row.answer)
        response = web.StreamResponse(headers={"Content-Type": self._row.media})
        await response.prepare(request)
        for _ in range(max(1, round(seconds / PIECE_S))):
            await self._work(PIECE_S)
            await response.write(bytes(PIECE_BYTES))
        await response.write_eof()
        return response

    async def _work(self, seconds: float) -> None:
        """Pass the time in which the core runs."""
        while seconds > 0:
            await self._faults.until(lambda how: how.stepping and how.answering)
            await asyncio.sleep(min(seconds, PIECE_S))
            seconds -= PIECE_S


def seconds_of(request: web.Request, default: float) -> float:
    """The number of the query `seconds`. Raises RequestRefused."""
    try:
        seconds = float(request.query.get("seconds", default))
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= MAX_WORK_S:
        raise bad_request(f"seconds must be a number from 0 to {MAX_WORK_S:g}")
    return seconds
