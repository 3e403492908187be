"""The connections to the engine, and bodies that go out without being copied.

Rules: nothing is decoded, redirected, stored or limited in time here. A connection that was not read to its end is
closed, which is how an engine learns that its client left. An engine may close a kept connection just as it is reused:
a request that breaks on one before a byte of its answer came is sent once more, on a fresh one. What cannot be sent
twice starts on a fresh one.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from types import SimpleNamespace
from typing import Any, Final

import aiohttp
from aiohttp import hdrs, payload, web
from aiohttp.abc import AbstractStreamWriter
from yarl import URL

from sidecar.errors import BadTarget
from sidecar.events import Trace
from sidecar.relay import client_io, headers
from sidecar.relay.headers import Headers
from sidecar.relay.open_requests import OpenRequests
from sidecar.relay.outcomes import engine_error
from sidecar.relay.request_body import Buffer

# One header or request line, both ways (uvicorn's limit for all of them).
MAX_HEADER_BYTES: Final = 64 << 10
READ_BUFFER_BYTES: Final = 256 << 10
# The engine is on this machine.
_CONNECT_TIMEOUT_S: Final = 5.0
# A connection that the engine was closing breaks at once. What breaks later may have been worked on: it is not
# repeated.
MAX_STALE_S: Final = 2.0
# A body up to this is kept until its answer begins, and may be sent twice.
MAX_REPEATED_BYTES: Final = 64 << 10
# uvicorn closes an idle connection after 5 s.
_KEEPALIVE_S: Final = 3.0
# Passed to the socket at once.
_WRITE_BYTES: Final = 256 << 10
_ABSOLUTE_FORM: Final = re.compile(r"https?://[^/?#]*(.*)", re.IGNORECASE)
_AIOHTTP_HEADERS: Final = (hdrs.ACCEPT, hdrs.ACCEPT_ENCODING, hdrs.USER_AGENT, hdrs.CONTENT_TYPE)


class Broken(aiohttp.ClientConnectionError):
    """The connection broke before the head of an answer was complete. `answered`: part of the answer had arrived."""

    def __init__(self, *, answered: bool) -> None:
        super().__init__("the connection broke before the answer")
        self.answered = answered


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

    @property
    def is_repeatable(self) -> bool:
        """Whether it may be sent twice."""
        return (self._size or 0) <= MAX_REPEATED_BYTES

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
        if not self.is_repeatable:
            self.drop()

    def drop(self) -> None:
        """Release the bytes: they are not sent again."""
        self._pieces = ()


class Connections:
    """A relay process's connections to its engine, kept and fresh ones. Clients' connections bound their number."""

    def __init__(self) -> None:
        kept = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S, family=socket.AF_UNSPEC)
        trace = aiohttp.TraceConfig()
        trace.on_connection_reuseconn.append(_note_reuse)
        self._kept = _session(kept, [trace])
        self._fresh = _session(aiohttp.TCPConnector(limit=0, force_close=True, family=socket.AF_UNSPEC), [])

    @property
    def fresh(self) -> aiohttp.ClientSession:
        """Each of its requests gets a connection of its own."""
        return self._fresh

    async def request(self, method: str, url: URL, headers: Headers, data: Any) -> aiohttp.ClientResponse:
        """The head of the engine's answer, which the caller closes: left early, its connection closes too."""
        if not _is_repeatable(data):
            return await self._fresh.request(method, url, headers=headers, data=data, allow_redirects=False)
        use = _ConnectionUse()
        try:
            answer = await self._kept.request(
                method, url, headers=headers, data=data, allow_redirects=False, trace_request_ctx=use
            )
        except Broken as e:
            if e.answered or not use.was_stale():
                raise
            answer = await self._fresh.request(method, url, headers=headers, data=data, allow_redirects=False)
        if isinstance(data, BodyPayload):
            data.drop()
        return answer

    async def close(self) -> None:
        """Close all connections."""
        await self._kept.close()
        await self._fresh.close()


class EngineClient:
    """Sends requests of clients to the engine at `base`; what breaks is raised as an error for the client."""

    def __init__(self, base: str, open_requests: OpenRequests) -> None:
        self._base = base
        self._open_requests = open_requests
        self._connections = Connections()

    @property
    def fresh(self) -> aiohttp.ClientSession:
        """Each of its requests gets a connection of its own."""
        return self._connections.fresh

    def url(self, request: web.BaseRequest) -> URL:
        """The engine's URL for a request's target."""
        return target(self._base, origin_form(request.raw_path))

    async def send(
        self, request: web.BaseRequest, id: str, data: Any, *, trace: Trace | None = None, length: int | None = None
    ) -> aiohttp.ClientResponse:
        """The head of the engine's answer, which the caller closes: left early, its connection closes too."""
        passed = headers.to_engine(request, id=id, trace=trace, length=length)
        try:
            return await self._connections.request(request.method, self.url(request), passed, data)
        except client_io.ENGINE_ERRORS as e:
            raise engine_error(e, self._open_requests.verdict) from None

    async def close(self) -> None:
        """Close all connections."""
        await self._connections.close()


class _ConnectionUse:
    """One request's use of a connection. `reused_at`: when it got one that had been used before; None for a new one."""

    __slots__ = ("reused_at",)

    def __init__(self) -> None:
        self.reused_at: float | None = None

    def was_stale(self) -> bool:
        """Whether the engine closed the connection before it can have worked on the request."""
        return self.reused_at is not None and time.monotonic() - self.reused_at < MAX_STALE_S


async def _note_reuse(session: aiohttp.ClientSession, context: SimpleNamespace, params: object) -> None:
    context.trace_request_ctx.reused_at = time.monotonic()


async def _once(request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """Send a request once: aiohttp itself repeats a GET on any connection that breaks."""
    try:
        return await send(request)
    except aiohttp.ClientConnectorError:
        raise
    except aiohttp.ServerDisconnectedError as e:
        raise Broken(answered=not isinstance(e.message, str)) from e  # otherwise it is the part of the head that came
    except (aiohttp.ClientOSError, aiohttp.ClientConnectionResetError) as e:
        raise Broken(answered=False) from e


def _is_repeatable(data: Any) -> bool:
    return data is None or isinstance(data, bytes) or (isinstance(data, BodyPayload) and data.is_repeatable)


def _session(connector: aiohttp.TCPConnector, traces: list[aiohttp.TraceConfig]) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=connector,
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


async def stream(content: aiohttp.StreamReader, sent: Callable[[], None]) -> AsyncIterator[bytes]:
    """A request body as it comes from its client. `sent` is called when the last byte has been written."""
    while piece := await content.readany():
        yield piece
    sent()


def origin_form(raw_path: str) -> str:
    """A request target as path and query, bytes as they came. Raises BadTarget without a path (`*`, CONNECT's)."""
    if raw_path.startswith("/"):
        return raw_path
    absolute = _ABSOLUTE_FORM.fullmatch(raw_path)
    if absolute is None:
        raise BadTarget("only request targets with a path can be passed to the engine")
    rest = absolute[1]
    return rest if rest.startswith("/") else "/" + rest


def target(base: str, path: str) -> URL:
    """The engine's URL for a target in origin form, byte for byte (except a trailing `?`)."""
    return URL(base + path, encoded=True)
