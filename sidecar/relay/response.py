"""The engine's answer to work, on its way to the client and measured as it passes.

Rules: an answer goes out as it comes: each piece in the moment in which it arrives. While the client does not read,
the engine is not read, and the admission says since when. An answer that began and cannot end as the engine would have
ended it, ends by an error event if it is a stream between two events, else by a broken connection, so that no client
takes a part for the whole.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from msgspec import structs

from sidecar.errors import RequestError
from sidecar.load import answer_scan, usage_forms
from sidecar.load.answer_scan import AnswerScan, Members
from sidecar.relay import client_io, compression
from sidecar.relay.admission import Admission
from sidecar.relay.http.client import Request
from sidecar.relay.http.engine import Answer, EngineError
from sidecar.relay.http.head import Field
from sidecar.relay.open_requests import OpenRequests
from sidecar.relay.outcomes import EngineBroke
from sidecar.relay.sse import JSON_LINES, SSE, add_price, error_event

MAX_SHORT_BYTES: Final = 256 << 10  # an answer of known length up to this is read whole and written at once
_ERROR_EVENT_TIMEOUT_S: Final = 1.0  # for the last event to a client that may not read
_CHOICE_ROUTES: Final = ("chat", "completions")
# Their streams have an end of their own: one without it is no answer, however its connection ended.
_ENDED_ROUTES: Final = (*_CHOICE_ROUTES, "messages", "responses", "ollama_chat", "ollama_generate", "cohere_chat")
_MAX_END_BYTES: Final = 64  # of a choice: its name, its value, and spaces


def is_stream(answer: Answer) -> bool:
    """Whether an answer is a stream of events or lines, in any encoding."""
    media_type = answer.fields.media_type()
    return media_type == "text/event-stream" or media_type in JSON_LINES


def decoder_of(answer: Answer) -> compression.Decoder | None:
    """What unpacks an answer; None if it is not compressed, or in a way that is not known."""
    return compression.decoder(answer.fields.get(b"content-encoding"))


def _unpacked(decode: Callable[[bytes], bytes], chunk: bytes) -> bytes:
    try:
        return decode(chunk)
    except compression.BROKEN:
        raise EngineError("the engine's compressed answer is broken") from None


def can_change(answer: Answer) -> bool:
    """Whether an answer may be changed on its way: its form is known, and an event or all of it is held at once."""
    return _is_plain(answer) and (is_stream(answer) or is_short(answer))


def _is_plain(answer: Answer) -> bool:
    return answer.fields.get(b"content-encoding", "identity").strip().lower() == "identity"


def is_short(answer: Answer) -> bool:
    """Whether an answer is read whole."""
    return (answer.fields.length() or MAX_SHORT_BYTES + 1) <= MAX_SHORT_BYTES


@dataclass(slots=True, eq=False)
class ResponseSender:
    """Sends one answer to the client with the header fields `passed`."""

    _request: Request
    _answer: Answer
    _passed: list[Field]
    _admission: Admission
    _open_requests: OpenRequests
    _decoder: compression.Decoder | None = None  # of a stream that is compressed and must be changed

    async def send(self) -> None:
        """Send it. Raises EngineBroke, if the answer is short before anything was sent."""
        if is_stream(self._answer) and (_is_plain(self._answer) or self._decoder is not None):
            await self._send_stream()
        else:
            await (self._send_short() if is_short(self._answer) else self._send_long())

    async def _send_stream(self) -> None:
        admission, is_lines = self._admission, self._answer.fields.media_type() in JSON_LINES
        shape = admission.shape
        sse = SSE(shape.ask_usage, admission.price, is_lines=is_lines, choices=shape.choices, prompts=shape.prompts)
        details = admission.answer
        reply, deliver, feed = self._request.reply, self._open_requests.deliver, sse.feed
        decode = None if self._decoder is None else self._decoder.decompress

        def take(chunk: bytes) -> None:
            before = sse.tokens
            text = chunk if decode is None else _unpacked(decode, chunk)
            if details is not None:
                details.feed(text)
            piece = feed(text)
            if piece:
                reply.write(piece)
            deliver(admission, sse.tokens - before, len(chunk), started=sse.started)

        self._begin(sse)
        try:
            await self._pipe(take)
            reply.write(sse.finish())
            sse.failed = sse.failed or (admission.route in _ENDED_ROUTES and not sse.has_ended)
        finally:
            admission.told, admission.failed = sse.told, sse.failed
        await self._end()

    async def _send_long(self) -> None:
        """A body that may be long, and is no stream whose events can be read."""
        answer, admission, reply = self._answer, self._admission, self._request.reply
        scan = AnswerScan()
        # events cannot be separated in a compressed stream: each chunk counts as one
        tokens = int(is_stream(answer))
        # JSON means nothing before its end: its first bytes are no first token
        started = answer.ok and answer.fields.media_type() != "application/json"

        has_failed, before = False, b""

        def take(chunk: bytes) -> None:
            nonlocal has_failed, before
            reply.write(chunk)
            scan.feed(chunk)
            has_failed = has_failed or self._has_failed_choice(before + chunk)
            before = chunk[-_MAX_END_BYTES:]
            self._open_requests.deliver(admission, tokens, len(chunk), started=started)

        self._begin(None)
        is_whole = False
        try:
            await self._pipe(take)
            is_whole = True
        finally:
            self._read(scan.items(), is_whole=is_whole, has_failed=has_failed)
        await self._end()

    async def _send_short(self) -> None:
        """One read, one write; the usage is parsed after the client has the answer."""
        body = await client_io.read_answer(self._answer)
        price = self._admission.price
        sent = add_price(body, price) if price is not None and _is_plain(self._answer) else body
        try:
            self._begin(None, body=sent)
            await self._wait()
        finally:
            self._read(answer_scan.read(body), is_whole=True, has_failed=self._has_failed_choice(body))
            if self._admission.answer is not None and _is_plain(self._answer):
                self._admission.answer.body(body)
            self._admission.bytes += len(body)  # settled at once: nothing of it is left to report

    def _has_failed_choice(self, text: bytes) -> bool:
        """Whether a piece of the answer says that a choice failed."""
        return self._admission.route in _CHOICE_ROUTES and usage_forms.has_failed_choice(text)

    def _read(self, items: list[Members], *, is_whole: bool, has_failed: bool) -> None:
        """Record the usage of a non-streamed answer; for errors the status suffices."""
        if self._answer.ok:
            admission, choices = self._admission, self._admission.shape.choices
            told = usage_forms.with_header(usage_forms.read(items, choices), self._answer.fields.get, choices)
            admission.told = told if told is None or is_whole else structs.replace(told, final=False)
            admission.failed = has_failed or any(map(usage_forms.has_failed, items))

    def _begin(self, sse: SSE | None, body: bytes | None = None) -> None:
        answer = self._answer
        self._request.reply.begin(answer.status, answer.reason, self._passed, body=body)
        self._admission.events = sse

    async def _pipe(self, take: Callable[[bytes], None]) -> None:
        """Give each piece of the answer to `take`, which writes it; the engine waits while the client does not read."""
        request, answer, admission = self._request, self._answer, self._admission
        connection = request.connection

        def pass_on(chunk: bytes) -> None:
            take(chunk)
            if connection.is_blocked and admission.writing_since is None:
                admission.writing_since = time.monotonic()
                answer.pause()

        def go_on() -> None:
            if admission.writing_since is not None:
                self._open_requests.end_write(admission)
                answer.resume()

        connection.on_resume = go_on
        try:
            await answer.body.pipe(pass_on)
        except EngineError:
            raise EngineBroke("the engine's answer ended early") from None
        finally:
            connection.on_resume = None

    async def _end(self) -> None:
        self._request.reply.end(self._answer.body.trailers)
        await self._wait()

    async def _wait(self) -> None:
        """Wait until the client has read enough."""
        if self._request.reply.is_blocked:
            self._admission.writing_since = self._admission.writing_since or time.monotonic()
            await client_io.drain(self._request)
        if self._admission.writing_since is not None:
            self._open_requests.end_write(self._admission)


async def end_with_error(request: Request, admission: Admission, error: RequestError) -> None:
    """End an answer that has begun. The client learns of `error` as far as the answer's form allows."""
    reply, events = request.reply, admission.events
    if events is None or not events.is_between_events or reply.is_delimited:
        client_io.hang_up(request)
        return
    reply.write(events.release() + error_event(error.body()["error"], admission.route, is_line=events.is_lines))
    reply.end()
    try:
        async with asyncio.timeout(_ERROR_EVENT_TIMEOUT_S):
            await reply.drain()
    except (ConnectionError, TimeoutError):
        client_io.hang_up(request, at_once=True)
