"""Requests that are not known as engine work: both bodies pass unread, and nothing is admitted.

Rules: a short body is read, so that it may be sent again on a fresh connection; a long one streams. Calls that pause
the engine or let it go on are reported, and the body of one that resumes is read for the parts that it names. Any
other call that may be work is reported while it is with the engine.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Awaitable
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Final

from aiohttp import web

from sidecar.events import LoadReport
from sidecar.relay import client_io, engine_io, engine_pauses, headers, websocket
from sidecar.relay.open_requests import OpenRequests
from sidecar.relay.unread_call import WORKING_METHODS, UnreadCall

_pause_call_ids: Final = itertools.count(1)


async def forward(
    request: web.BaseRequest,
    id: str,
    engine: engine_io.EngineClient,
    open_requests: OpenRequests,
    max_body_bytes: int,
    report: LoadReport | None,
) -> web.StreamResponse:
    """Pass a request to the engine, and its answer back. `report`: the load report for the answer's header."""
    if websocket.is_wanted(request):
        passed = headers.to_engine(request, id=id)
        return await websocket.relay(request, engine.fresh, engine.url(request), passed)
    path, _, query = engine_io.origin_form(request.raw_path).partition("?")
    route, is_partial, data = engine_pauses.route_of(request.method, path), False, None
    if route is not None and route.turn == "resumes":
        data = await client_io.read(request, max_body_bytes)
        is_partial = engine_pauses.is_partial(query, data)
    elif request.body_exists and (request.content_length or math.inf) <= engine_io.MAX_REPEATED_BYTES:
        data = await client_io.read(request, engine_io.MAX_REPEATED_BYTES)
    pause = engine_pauses.PauseCall(open_requests.emit, time.monotonic, next(_pause_call_ids), route, is_partial)
    with open_requests.passing(is_work=route is None and request.method in WORKING_METHODS) as call:
        client = _Client(request, call, open_requests)
        with closing(pause):
            body: Any = data
            if data is None and request.body_exists:
                await client_io.expect(request)
                body = engine_io.stream(client.read, pause.sent)
            else:
                pause.sent()
            answer = await engine.send(request, id, body)
            pause.answered(answer.status)
        call.status = answer.status
        with closing(answer):
            passed = headers.to_client(request.headers, answer.headers, id, report, {})
            response = web.StreamResponse(status=answer.status, reason=answer.reason, headers=passed)
            await client.write(response.prepare(request))
            while chunk := await client_io.next_chunk(answer):
                open_requests.receive(call, len(chunk))
                await client.write(response.write(chunk))
            await client.write(response.write_eof())
            return response


@dataclass(frozen=True, slots=True)
class _Client:
    """The client of an unread call: while it is waited for, the engine is not to blame."""

    _request: web.BaseRequest
    _call: UnreadCall
    _open_requests: OpenRequests

    async def read(self) -> bytes:
        """The next piece of its upload; empty at the end."""
        self._call.reading_since = time.monotonic()
        piece = await self._request.content.readany()
        self._call.reading_since = None
        self._open_requests.resume(self._call)
        return piece

    async def write(self, step: Awaitable[object]) -> None:
        """Send it the answer's head, a part of it, or its end."""
        self._call.writing_since = time.monotonic()
        await client_io.send(step)
        self._call.writing_since = None
        self._open_requests.resume(self._call)
