"""The engine's answer to work, on its way to the client and measured as it passes.

Rules: an answer goes out chunk by chunk as it comes. A write that waits for the client is marked in the admission. An
answer that began and cannot end as the engine would have ended it, ends by an error event if it is a stream between
two events, else by a broken connection, so that no client takes a part for the whole.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Final

import aiohttp
from aiohttp import web

from sidecar.errors import RequestError
from sidecar.relay import client_io
from sidecar.relay.admission import Admission
from sidecar.relay.headers import Headers
from sidecar.relay.open_requests import OpenRequests
from sidecar.relay.outcomes import EngineBroke
from sidecar.relay.sse import SSE, BodyTail, add_price, error_event, usage_of

MAX_SHORT_BYTES: Final = 256 << 10  # an answer of known length up to this is read whole and written at once
_ERROR_EVENT_TIMEOUT_S: Final = 1.0  # for the last event to a client that may not read


def is_stream(answer: aiohttp.ClientResponse) -> bool:
    """Whether an answer is a stream of server-sent events, in any encoding."""
    return answer.headers.get("content-type", "").startswith("text/event-stream")


def can_change(answer: aiohttp.ClientResponse) -> bool:
    """Whether an answer may be changed on its way: its form is known, and an event or all of it is held at once."""
    return _is_plain(answer) and (is_stream(answer) or _is_short(answer))


def _is_plain(answer: aiohttp.ClientResponse) -> bool:
    return "content-encoding" not in answer.headers


def _is_short(answer: aiohttp.ClientResponse) -> bool:
    return (answer.content_length or MAX_SHORT_BYTES + 1) <= MAX_SHORT_BYTES


@dataclass(frozen=True, slots=True)
class ResponseSender:
    """Sends one answer to the client with the headers `passed`."""

    _request: web.BaseRequest
    _answer: aiohttp.ClientResponse
    _passed: Headers
    _admission: Admission
    _open_requests: OpenRequests

    async def send(self) -> web.StreamResponse:
        """Send it. Raises EngineBroke, if the answer is short before anything was sent."""
        if _is_plain(self._answer) and is_stream(self._answer):
            return await self._send_stream()
        return await (self._send_short() if _is_short(self._answer) else self._send_long())

    async def _send_stream(self) -> web.StreamResponse:
        sse = SSE(self._admission.shape.ask_usage, self._admission.price)
        response = web.StreamResponse(status=self._answer.status, reason=self._answer.reason, headers=self._passed)
        await self._start(response, sse)
        try:
            while chunk := await client_io.next_chunk(self._answer):
                before = sse.tokens
                piece = sse.feed(chunk)
                self._open_requests.deliver(self._admission, sse.tokens - before, len(chunk), started=sse.started)
                if piece:
                    await self._put(response.write(piece))
            if rest := sse.finish():
                await self._put(response.write(rest))
        finally:
            self._admission.usage = sse.usage
        await self._put(response.write_eof())
        return response

    async def _send_long(self) -> web.StreamResponse:
        """A body that may be long, and is no stream whose events can be read."""
        tail = BodyTail()
        # events cannot be separated in a compressed stream: each chunk counts as one
        tokens = int(is_stream(self._answer))
        # JSON means nothing before its end: its first bytes are no first token
        started = self._answer.ok and self._answer.content_type != "application/json"
        response = web.StreamResponse(status=self._answer.status, reason=self._answer.reason, headers=self._passed)
        await self._start(response, None)
        while chunk := await client_io.next_chunk(self._answer):
            tail.feed(chunk)
            self._open_requests.deliver(self._admission, tokens, len(chunk), started=started)
            await self._put(response.write(chunk))
        self._admission.usage = tail.usage if _is_plain(self._answer) else None
        await self._put(response.write_eof())
        return response

    async def _send_short(self) -> web.StreamResponse:
        """One read, one write; the usage is parsed after the client has the answer."""
        try:
            body = await self._answer.read()
        except client_io.ENGINE_ERRORS:
            raise EngineBroke from None
        price = self._admission.price
        sent = add_price(body, price) if price is not None and _is_plain(self._answer) else body
        response = web.Response(status=self._answer.status, reason=self._answer.reason, headers=self._passed, body=sent)
        try:
            await self._start(response, None)
            await self._put(response.write_eof())
        finally:
            self._admission.usage = usage_of(body)
            self._admission.bytes += len(body)  # settled at once: nothing of it is left to report
        return response

    async def _start(self, response: web.StreamResponse, sse: SSE | None) -> None:
        await self._put(response.prepare(self._request))
        self._admission.answer, self._admission.events = response, sse

    async def _put(self, step: Awaitable[object]) -> None:
        self._admission.writing_since = time.monotonic()
        await client_io.send(step)
        self._open_requests.end_write(self._admission)


async def end_with_error(request: web.BaseRequest, admission: Admission, error: RequestError) -> web.StreamResponse:
    """End an answer that has begun. The client learns of `error` as far as the answer's form allows."""
    answer, events = admission.answer, admission.events
    if answer is None or events is None or not events.is_between_events or answer.content_length is not None:
        return client_io.hang_up(request)
    try:
        async with asyncio.timeout(_ERROR_EVENT_TIMEOUT_S):
            await answer.write(error_event(error.body()["error"], admission.route))
            await answer.write_eof()
    except (ConnectionError, TimeoutError):
        return client_io.hang_up(request, at_once=True)
    return answer
