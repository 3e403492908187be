"""The engine's answer to work, on its way to the client and measured as it passes.

Rules: an answer goes out chunk by chunk as it comes; while a write waits for the client, the admission knows. An answer that has
begun and cannot be ended as the engine would have, ends by an error event where it is a stream between two events, else by a
broken connection, so that no client takes a part for the whole.
"""

from __future__ import annotations

import asyncio
from typing import Final

import aiohttp
from aiohttp import web

from sidecar.errors import RequestError
from sidecar.relay import client_io
from sidecar.relay.admission import Admission
from sidecar.relay.headers import Headers
from sidecar.relay.outcomes import EngineBroke
from sidecar.relay.sse import SSE, BodyTail, error_event, priced, usage_of

SMALL: Final = 256 << 10  # bytes: an answer of known length up to here is read whole and written at once
_PARTING_SECONDS: Final = 1.0  # for the last event to a client that may not read


def is_stream(answer: aiohttp.ClientResponse) -> bool:
    """Whether an answer is a stream of server-sent events, whatever its encoding."""
    return answer.headers.get("content-type", "").startswith("text/event-stream")


def is_plain(answer: aiohttp.ClientResponse) -> bool:
    """Whether an answer's bytes are as they mean: not compressed."""
    return "content-encoding" not in answer.headers


def is_short(answer: aiohttp.ClientResponse) -> bool:
    """Whether an answer is read whole before it goes on."""
    return (answer.content_length or SMALL + 1) <= SMALL


def is_whole(answer: aiohttp.ClientResponse) -> bool:
    """Whether an answer means nothing before its end, however it is sent: its first bytes are no first token."""
    return answer.content_type == "application/json"


def is_read(answer: aiohttp.ClientResponse) -> bool:
    """Whether an answer that is plain may be changed on its way."""
    return is_stream(answer) or is_short(answer)


async def pass_on(
    request: web.BaseRequest, answer: aiohttp.ClientResponse, admission: Admission, passed: Headers
) -> web.StreamResponse:
    """Send the answer with the headers `passed`.

    Raises EngineBroke before anything was sent where a short answer broke.
    """
    if is_plain(answer) and is_stream(answer):
        return await _stream(request, answer, admission, passed)
    if is_short(answer):
        return await _small(request, answer, admission, passed)
    return await _long(request, answer, admission, passed)


async def part(request: web.BaseRequest, admission: Admission, error: RequestError) -> web.StreamResponse:
    """End an answer that has begun: the client learns of `error` as far as the answer's form allows."""
    begun = admission.begun
    assert begun is not None
    if begun.sse is None or not begun.sse.whole or begun.response.content_length is not None:
        return client_io.hang_up(request)
    try:
        async with asyncio.timeout(_PARTING_SECONDS):
            await begun.response.write(error_event(error.body()["error"], admission.route))
            await begun.response.write_eof()
    except (ConnectionError, TimeoutError):
        return client_io.hang_up(request, at_once=True)
    return begun.response


async def _stream(
    request: web.BaseRequest, answer: aiohttp.ClientResponse, admission: Admission, passed: Headers
) -> web.StreamResponse:
    """An event stream."""
    sse = SSE(admission.shape.ask_usage, admission.price)
    response = web.StreamResponse(status=answer.status, reason=answer.reason, headers=passed)
    await _start(request, response, admission, sse)
    try:
        while chunk := await client_io.next_chunk(answer):
            before = sse.tokens
            piece = sse.feed(chunk)
            admission.deliver(sse.tokens - before, len(chunk), sse.started)
            if piece:
                await _write(response, piece, admission)
        if rest := sse.finish():
            await _write(response, rest, admission)
    finally:
        admission.usage = sse.usage
    await _end(response, admission)
    return response


async def _long(
    request: web.BaseRequest, answer: aiohttp.ClientResponse, admission: Admission, passed: Headers
) -> web.StreamResponse:
    """A body that is no stream we can read, and may be long."""
    tail = BodyTail()
    # where events cannot be told apart, each chunk counts as one
    opaque_stream = int(is_stream(answer))
    started = answer.ok and not is_whole(answer)
    response = web.StreamResponse(status=answer.status, reason=answer.reason, headers=passed)
    await _start(request, response, admission, None)
    while chunk := await client_io.next_chunk(answer):
        tail.feed(chunk)
        admission.deliver(opaque_stream, len(chunk), started)
        await _write(response, chunk, admission)
    admission.usage = tail.usage if is_plain(answer) else None
    await _end(response, admission)
    return response


async def _small(
    request: web.BaseRequest, answer: aiohttp.ClientResponse, admission: Admission, passed: Headers
) -> web.StreamResponse:
    """A short answer: one read, one write; what it tells is read when the client has it. Before, a break is an error it can read."""
    try:
        body = await answer.read()
    except client_io.BREAKS:
        raise EngineBroke from None
    sent = priced(body, admission.price) if admission.price is not None and is_plain(answer) else body
    response = web.Response(status=answer.status, reason=answer.reason, headers=passed, body=sent)
    try:
        await _start(request, response, admission, None)
        await _end(response, admission)
    finally:
        admission.usage = usage_of(body)
        admission.deliver(0, len(body), started=False)
    return response


async def _start(request: web.BaseRequest, response: web.StreamResponse, admission: Admission, sse: SSE | None) -> None:
    admission.writing()
    await client_io.start(response, request)
    admission.begin(response, sse)
    admission.written()


async def _write(response: web.StreamResponse, data: bytes | bytearray, admission: Admission) -> None:
    admission.writing()
    await client_io.write(response, data)
    admission.written()


async def _end(response: web.StreamResponse, admission: Admission) -> None:
    admission.writing()
    await client_io.end(response)
    admission.written()
