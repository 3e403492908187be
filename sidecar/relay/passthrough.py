"""Requests that are not engine work: both bodies pass unread, and nothing is admitted.

Rules: a short body is read, so that it may be sent again on a fresh connection; a long one streams. Calls that pause
the engine or let it go on are reported, and the body of one that resumes is read for the parts that it names.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any, Final

from aiohttp import web

from sidecar.events import Event, LoadReport
from sidecar.relay import client_io, engine_io, engine_pauses, headers, websocket

_pause_call_ids: Final = itertools.count(1)


async def forward(
    request: web.BaseRequest,
    id: str,
    engine: engine_io.EngineClient,
    emit: Callable[[Event], None],
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
    pause = engine_pauses.PauseCall(emit, time.monotonic, next(_pause_call_ids), route, is_partial)
    with closing(pause) as call:
        body: Any = data
        if data is None and request.body_exists:
            await client_io.expect(request)
            body = engine_io.stream(request.content, call.sent)
        else:
            call.sent()
        answer = await engine.send(request, id, body)
        call.answered(answer.status)
    with closing(answer):
        passed = headers.to_client(request.headers, answer.headers, id, report, {})
        response = web.StreamResponse(status=answer.status, reason=answer.reason, headers=passed)
        await client_io.send(response.prepare(request))
        while chunk := await client_io.next_chunk(answer):
            await client_io.send(response.write(chunk))
        await client_io.send(response.write_eof())
        return response
