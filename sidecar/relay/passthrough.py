"""Requests that are not known as engine work: both bodies pass unread, and nothing is admitted.

Rules: a short body is read, so that it may be sent again on a fresh connection; a long one streams. Calls that pause
the engine or let it go on are reported, and read whole first: one that resumes may name parts. Any
other call that may be work is reported while it is with the engine, and counted by its class.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Awaitable
from contextlib import closing
from dataclasses import dataclass
from typing import Final

from sidecar import labels
from sidecar.events import LoadReport
from sidecar.load import api_routes
from sidecar.relay import admin_paths, client_io, engine_io, engine_pauses, headers
from sidecar.relay.canary_gate import CanaryGate
from sidecar.relay.engine_io import BodyPayload
from sidecar.relay.http.client import Request
from sidecar.relay.http.engine import Answer, EngineConnection, EngineError
from sidecar.relay.http.head import Field, chunk, last_chunk
from sidecar.relay.open_requests import OpenRequests
from sidecar.relay.outcomes import EngineBroke
from sidecar.relay.unread_call import UnreadCall
from sidecar.runtime.limited_log import LimitedLog

_MAX_LOGGED_CHARS: Final = 40
_LOGGED_SEGMENTS: Final = 2  # of a path: APIs are named by the first ones, keys and ids follow

_pause_call_ids: Final = itertools.count(1)


async def forward(
    request: Request,
    id: str,
    engine: engine_io.EngineClient,
    open_requests: OpenRequests,
    budget: client_io.BodyBudget,
    max_body_bytes: int,
    report: LoadReport | None,
    gate: CanaryGate | None = None,
    data: bytes | None = None,
) -> None:
    """Pass a request to the engine, and its answer back.

    `report`: the load report for the answer's header; `gate`: what a call waits for that stops the engine's work;
    `data`: its body, if it has been read.
    """
    target = engine_io.origin_form(request.target).decode("latin-1")
    path, _, query = target.partition("?")
    route, is_partial = engine_pauses.route_of(request.method, path), False
    with budget.reading() as held:
        if data is None and route is not None and route.turn != "during":  # what is never complete is no order
            data = await client_io.read(request, max_body_bytes, held)
            is_partial = route.turn == "resumes" and engine_pauses.is_partial(query, data)
        elif (
            data is None and request.has_body and (request.fields.length() or math.inf) <= engine_io.MAX_REPEATED_BYTES
        ):
            data = await client_io.read(request, engine_io.MAX_REPEATED_BYTES, held)
        pause = engine_pauses.PauseCall(open_requests.emit, time.monotonic, next(_pause_call_ids), route, is_partial)
        kind = ""
        is_pause = route is not None and route.turn != "idle"
        if not is_pause and (request.has_body or request.method in api_routes.WORKING_METHODS):
            kind = _class_of(request.method, path, open_requests.log)
        with open_requests.passing(kind) as call:
            client = _Client(request, call, open_requests)
            with closing(pause):
                if data is None and request.has_body:
                    request.want_body()
                    upload = _Upload(request, client, pause)
                    answer = await engine.send(request, id, None, stream=upload.write)
                else:
                    pause.sent()
                    if gate is not None and pause.stops_work:
                        await gate.wait(pause.id)
                    body = None if data is None else BodyPayload([data])
                    answer = await engine.send(request, id, body)
                pause.answered(answer.status)
            call.status = answer.status
            held.release()
            with closing(answer):
                passed = headers.to_client(request.fields, answer.fields, id, report, {})
                await _answer(request, answer, passed, client)


def _class_of(method: str, path: str, log: LimitedLog) -> str:
    """The class of a call whose work is not metered, as a label. One that may be anything is logged."""
    kind = "control" if admin_paths.is_control(method, path) else api_routes.path_class(path)
    if kind == "other":
        segments = path.split("/", _LOGGED_SEGMENTS + 1)
        named = labels.printable("/".join(segments[: _LOGGED_SEGMENTS + 1]), _MAX_LOGGED_CHARS)
        log.warning(
            "unmetered",
            "%s %s%s is not a known API: its work is not metered",
            method,
            named,
            "/..." * (len(segments) > _LOGGED_SEGMENTS + 1),
        )
    return kind


async def _answer(request: Request, answer: Answer, passed: list[Field], client: _Client) -> None:
    """Pass an answer on as it comes."""
    request.reply.begin(answer.status, answer.reason, passed)
    try:
        await answer.body.pipe(client.writer(answer))
    except EngineError:
        raise EngineBroke("the engine's answer ended early") from None
    finally:
        request.connection.on_resume = None
    request.reply.end(answer.body.trailers)
    await client.wait(client_io.drain(request))


@dataclass(frozen=True, slots=True)
class _Upload:
    """A body on its way from the client to the engine, in the client's framing."""

    _request: Request
    _client: _Client
    _pause: engine_pauses.PauseCall

    async def write(self, engine: EngineConnection) -> None:
        """Write all of it, as fast as the engine reads it."""
        is_chunked = b"transfer-encoding" in self._request.fields
        while piece := await self._client.read():
            engine.write(chunk(piece) if is_chunked else piece)
            await engine.drain()
        if is_chunked:
            engine.write(last_chunk(self._request.body.trailers))
        self._pause.sent()


@dataclass(frozen=True, slots=True)
class _Client:
    """The client of an unread call: while it is waited for, the engine is not to blame."""

    _request: Request
    _call: UnreadCall
    _open_requests: OpenRequests

    async def read(self) -> bytes:
        """The next piece of its upload; empty at the end."""
        self._call.reading_since = time.monotonic()
        piece = await self._request.body.next()
        self._call.reading_since = None
        self._open_requests.resume(self._call)
        return piece

    def writer(self, answer: Answer) -> engine_io.Take:
        """What takes each piece of an answer; the engine waits while the client does not read."""
        request, call, open_requests = self._request, self._call, self._open_requests
        connection, reply = request.connection, request.reply

        def take(piece: bytes) -> None:
            open_requests.receive(call, piece)
            reply.write(piece)
            if connection.is_blocked and call.writing_since is None:
                call.writing_since = time.monotonic()
                answer.pause()

        def go_on() -> None:
            if call.writing_since is not None:
                call.writing_since = None
                open_requests.resume(call)
                answer.resume()

        connection.on_resume = go_on
        return take

    async def wait(self, step: Awaitable[None]) -> None:
        """Wait for the client to take the last of it."""
        self._call.writing_since = self._call.writing_since or time.monotonic()
        await step
        self._call.writing_since = None
        self._open_requests.resume(self._call)
