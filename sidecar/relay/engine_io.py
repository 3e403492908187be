"""The connections to the engine, and bodies that go out without being copied.

Rules: nothing is decoded, redirected, stored or limited in time here. A connection that was not read to its end is
closed, which is how an engine learns that its client left. An engine may close a kept connection just as it is reused:
a request that breaks on one before a byte of its answer came is sent once more, on a fresh one. What cannot be sent
twice starts on a fresh one.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from types import SimpleNamespace
from typing import Any, Final

import aiohttp
from aiohttp import hdrs, payload, web
from aiohttp.abc import AbstractStreamWriter
from yarl import URL

from sidecar.errors import BadTarget
from sidecar.events import Trace
from sidecar.load.body_scan import Buffer
from sidecar.relay import client_io, headers
from sidecar.relay.open_requests import OpenRequests
from sidecar.relay.outcomes import engine_error
from sidecar.signals.engine_address import EngineAddress

MAX_HEADER_BYTES: Final = 64 << 10  # one header or request line, both ways (uvicorn's limit for all of them)
READ_BUFFER_BYTES: Final = 256 << 10
_CONNECT_TIMEOUT_S: Final = 5.0  # the engine is on this machine
# A connection that the engine was closing breaks at once. What breaks later may have been worked on: it is not
# repeated.
MAX_STALE_S: Final = 2.0
MAX_REPEATED_BYTES: Final = 64 << 10  # a body up to this is kept until its answer begins, and may be sent twice
_KEEPALIVE_S: Final = 3.0  # uvicorn closes an idle connection after 5 s
_WRITE_BYTES: Final = 256 << 10  # passed to the socket at once
_ABSOLUTE_FORM: Final = re.compile(r"https?://[^/?#]*(.*)", re.IGNORECASE)
_AIOHTTP_HEADERS: Final = (hdrs.ACCEPT, hdrs.ACCEPT_ENCODING, hdrs.USER_AGENT, hdrs.CONTENT_TYPE)


class Unanswered(aiohttp.ClientConnectionError):
    """The connection broke before a byte of the answer came."""


class BodyPayload(payload.Payload):
    """A request body in pieces. `sent` is called when the last of them has been written.

    A short body is kept until its answer begins, because it may be sent twice; a long one is dropped when written.
    """

    _autoclose = True  # holds nothing that needs closing

    def __init__(self, pieces: Sequence[Buffer], sent: Callable[[], None]) -> None:
        super().__init__(None)
        self._pieces = pieces
        self._sent = sent
        # builds the client's own body, if the engine may refuse this one
        self.original: Callable[[], BodyPayload] | None = None
        self.form = ""  # in which its images are
        self._size = sum(len(piece) for piece in pieces)

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return b"".join(self._pieces).decode(encoding, errors)

    async def write(self, writer: AbstractStreamWriter) -> None:
        for piece in self._pieces:
            if len(piece) <= _WRITE_BYTES:
                await writer.write(piece)
                continue
            view = memoryview(piece)
            for at in range(0, len(view), _WRITE_BYTES):
                await writer.write(view[at : at + _WRITE_BYTES])
        self._sent()
        if not is_repeatable(self):
            self.drop()

    def drop(self) -> None:
        """Release the bytes: they are not sent again."""
        self._pieces = ()


class EngineClient:
    """Sends clients' requests to the engine, over kept and fresh connections.

    What breaks is raised as an error for the client. Clients' connections bound the number of these.
    """

    def __init__(self, engine: EngineAddress, open_requests: OpenRequests) -> None:
        self._base = engine.base
        self._open_requests = open_requests
        trace = aiohttp.TraceConfig()
        trace.on_connection_reuseconn.append(_note_reuse)
        self._kept = _session(engine, [trace], keepalive_timeout=_KEEPALIVE_S)
        self.fresh = _session(engine, [], force_close=True)  # each of its requests gets a connection of its own

    def url(self, request: web.BaseRequest) -> URL:
        """The engine's URL for a request's target, byte for byte (except a trailing `?`)."""
        return URL(self._base + origin_form(request.raw_path), encoded=True)

    async def send(
        self, request: web.BaseRequest, id: str, data: Any, *, trace: Trace | None = None, length: int | None = None
    ) -> aiohttp.ClientResponse:
        """The head of the engine's answer, which the caller closes: left early, its connection closes too."""
        passed = headers.to_engine(request, id=id, trace=trace, length=length)
        method, url, reused_at = request.method, self.url(request), list[float]()

        def ask(session: aiohttp.ClientSession) -> Awaitable[aiohttp.ClientResponse]:
            return session.request(
                method, url, headers=passed, data=data, allow_redirects=False, trace_request_ctx=reused_at
            )

        try:
            if not is_repeatable(data):
                return await ask(self.fresh)
            try:
                answer = await ask(self._kept)
            except Unanswered:
                if not reused_at or time.monotonic() - reused_at[0] >= MAX_STALE_S:
                    raise
                answer = await ask(self.fresh)
        except client_io.ENGINE_ERRORS as e:
            raise engine_error(e, self._open_requests.verdict) from None
        if isinstance(data, BodyPayload):
            data.drop()
        return answer

    async def close(self) -> None:
        await self._kept.close()
        await self.fresh.close()


async def _note_reuse(session: aiohttp.ClientSession, context: SimpleNamespace, params: object) -> None:
    context.trace_request_ctx.append(time.monotonic())


async def _once(request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """Send a request once: aiohttp itself repeats a GET on any connection that breaks."""
    try:
        return await send(request)
    except aiohttp.ClientConnectorError:
        raise
    except aiohttp.ServerDisconnectedError as e:
        # a message that is no text is the part of the head that came
        raise (Unanswered if isinstance(e.message, str) else aiohttp.ClientConnectionError)() from e
    except (aiohttp.ClientOSError, aiohttp.ClientConnectionResetError) as e:
        raise Unanswered from e


def is_repeatable(data: Any) -> bool:
    """Whether a body may be sent twice."""
    if isinstance(data, BodyPayload):
        return (data.size or 0) <= MAX_REPEATED_BYTES
    return data is None or isinstance(data, bytes)


def _session(engine: EngineAddress, traces: list[aiohttp.TraceConfig], **options: Any) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=engine.connector(limit=0, **options),
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=_AIOHTTP_HEADERS,
        auto_decompress=False,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S),
        read_bufsize=READ_BUFFER_BYTES,
        max_line_size=MAX_HEADER_BYTES,
        max_field_size=MAX_HEADER_BYTES,
        trace_configs=traces,
        middlewares=(_once,),
    )


async def stream(read: Callable[[], Awaitable[bytes]], sent: Callable[[], None]) -> AsyncIterator[bytes]:
    """A request body as `read` gets it from its client. `sent` is called when the last byte has been written."""
    while piece := await read():
        yield piece
    sent()


def origin_form(raw_path: str) -> str:
    """A request target as path and query, bytes as they came. Raises BadTarget without a path (`*`, CONNECT's)."""
    if raw_path.startswith("/"):
        return raw_path
    absolute = _ABSOLUTE_FORM.fullmatch(raw_path)
    if absolute is None:
        raise BadTarget("only request targets with a path can be passed to the engine")
    return absolute[1] if absolute[1].startswith("/") else "/" + absolute[1]
