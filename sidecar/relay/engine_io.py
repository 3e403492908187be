"""Requests to the engine: over a kept connection where a request may be sent twice, else over a fresh one.

Rules: an engine may close a kept connection just as it is reused: a request that breaks on one before a byte of its
answer came is sent once more, on a fresh one. What cannot be sent twice starts on a fresh one.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from typing import Final
from urllib.parse import urlsplit

from sidecar.errors import BadTarget
from sidecar.events import Trace
from sidecar.load.body_scan import Buffer
from sidecar.relay import headers
from sidecar.relay.http import client
from sidecar.relay.http.engine import Answer, EngineConnection, EngineError, Inform, Place, Pool, Send, Unanswered
from sidecar.relay.http.head import request_head
from sidecar.relay.open_requests import OpenRequests
from sidecar.relay.outcomes import engine_error
from sidecar.signals.engine_address import EngineAddress
from sidecar.signals.listening_socket import host_and_port, socket_path

# A connection that the engine was closing breaks at once, unless the engine is busy: one whose event loop stands still
# closes it later, with the request unread. What was read and breaks later may have been worked on: it is not repeated.
MAX_STALE_S: Final = 2.0
MAX_REPEATED_BYTES: Final = 64 << 10  # a body up to this is kept until its answer begins, and may be sent twice
_WRITE_BYTES: Final = 256 << 10  # passed to the socket at once
Take = Callable[[bytes], None]
_ABSOLUTE_FORM: Final = re.compile(rb"https?://[^/?#]*(.*)", re.IGNORECASE | re.DOTALL)


def place_of(address: EngineAddress) -> Place:
    """Where to connect to for an engine."""
    if path := socket_path(address.url):
        return Place("", 0, socket=path, authority=b"localhost")
    url = urlsplit(address.url)
    host, port = host_and_port(address.url)
    return Place(
        host, port, tls=address.tls(), authority=url.netloc.rpartition("@")[2].encode(), prefix=url.path.encode()
    )


class BodyPayload:
    """A request body in pieces. `sent` is called when the last of them has been written.

    A short body is kept until its answer begins, because it may be sent twice; a long one is dropped when written.
    """

    __slots__ = ("form", "original", "pieces", "sent", "size")

    def __init__(self, pieces: Sequence[Buffer], sent: Callable[[], None] = lambda: None) -> None:
        self.pieces = pieces
        self.sent = sent
        # builds the client's own body, if the engine may refuse this one
        self.original: Callable[[], BodyPayload] | None = None
        self.form = ""  # in which its images are
        self.size = sum(len(piece) for piece in pieces)

    @property
    def is_repeatable(self) -> bool:
        """Whether it may be sent twice."""
        return self.size <= MAX_REPEATED_BYTES

    async def write(self, engine: EngineConnection) -> None:
        """Write a long body, as fast as the engine reads it."""
        for piece in self.pieces:
            view = memoryview(piece)
            for at in range(0, len(view), _WRITE_BYTES):
                engine.write(view[at : at + _WRITE_BYTES])
                await engine.drain()
        self.sent()
        self.drop()

    def drop(self) -> None:
        """Release the bytes: they are not sent again."""
        self.pieces = ()


class _Ask:
    """One request as bytes, which may be asked over more than one connection. `send` writes a body that follows."""

    __slots__ = ("_bytes", "_inform", "_may_upgrade", "_method", "_send", "_sent")

    def __init__(
        self,
        method: str,
        data: bytes,
        inform: Inform | None,
        send: Send | None = None,
        may_upgrade: bool = False,
        sent: Callable[[], None] | None = None,
    ) -> None:
        self._method = method
        self._bytes = data
        self._inform = inform
        self._send = send
        self._may_upgrade = may_upgrade
        self._sent = sent

    async def over(self, engine: EngineConnection) -> Answer:
        """The head of the answer. Raises EngineError, and what `send` raises."""
        try:
            if self._send is not None:
                return await engine.ask_at_length(
                    self._method, self._bytes, self._inform, self._send, may_upgrade=self._may_upgrade
                )
            answering = engine.ask(self._method, self._bytes, self._inform, may_upgrade=self._may_upgrade)
            if self._sent is not None:
                self._sent()
            return await answering
        except BaseException:
            engine.close()
            raise


class EngineClient:
    """Sends clients' requests to the engine. What breaks is raised as an error for the client.

    Clients' connections bound the number of these.
    """

    def __init__(self, place: Place, open_requests: OpenRequests) -> None:
        self._place = place
        self._open_requests = open_requests
        self.pool = Pool(place)

    async def send(
        self,
        request: client.Request,
        id: str,
        body: BodyPayload | None,
        *,
        trace: Trace | None = None,
        stream: Send | None = None,
        is_upgrade: bool = False,
        plain: bool = False,
    ) -> Answer:
        """The head of the engine's answer, which the caller closes: left early, its connection closes too.

        `stream` writes a body that comes in pieces, with the client's own framing. `plain`: the answer will be changed.
        """
        length = None if body is None else body.size
        passed = headers.to_engine(
            request, self._place.authority, id=id, trace=trace, length=length, is_upgrade=is_upgrade, plain=plain
        )
        head = request_head(request.method, self._target(request.target), passed)
        inform = request.reply.inform
        is_repeatable = stream is None and not is_upgrade and (body is None or body.is_repeatable)
        if not is_repeatable:
            send = stream if body is None else body.write
            ask = _Ask(request.method, head, inform, send, is_upgrade)
        elif body is None:
            ask = _Ask(request.method, head, inform)
        else:
            ask = _Ask(request.method, b"".join((head, *body.pieces)), inform, sent=body.sent)
        try:
            answer = await self._ask(ask, is_repeatable)
        except EngineError as e:
            raise engine_error(e, self._open_requests.verdict) from None
        if body is not None:
            body.drop()
        return answer

    def _target(self, target: bytes) -> bytes:
        path = origin_form(target)
        return path if path == b"*" else self._place.prefix + path

    async def _ask(self, ask: _Ask, is_repeatable: bool) -> Answer:
        """Use a pooled connection if the request may be repeated; a new one if not, or if the pooled one was stale."""
        if is_repeatable and (kept := self.pool.kept()) is not None:
            reused_at = time.monotonic()
            try:
                return await ask.over(kept)
            except Unanswered as e:
                if not e.unread and time.monotonic() - reused_at >= MAX_STALE_S:
                    raise
        return await ask.over(await self.pool.fresh())

    async def close(self) -> None:
        self.pool.close()


def path_of(target: bytes) -> str:
    """The path of a request target, unchanged. Raises BadTarget if it has none."""
    return origin_form(target).partition(b"?")[0].decode("latin-1")


def origin_form(target: bytes) -> bytes:
    """A request target as path and query, bytes as they came. Raises BadTarget without a path (CONNECT's)."""
    if target.startswith(b"/") or target == b"*":
        return target
    absolute = _ABSOLUTE_FORM.fullmatch(target)
    if absolute is None:
        raise BadTarget("only request targets with a path can be passed to the engine")
    return absolute[1] if absolute[1].startswith(b"/") else b"/" + absolute[1]
