"""Connections to the engine: requests out, answers in, and a pool of those that are kept.

Rules: nothing is decoded, redirected, stored or limited in time here. A connection whose answer was not read to its
end is closed, which is how an engine learns that its client left.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import httptools

from sidecar.relay.http.body import Body
from sidecar.relay.http.connection import Connection
from sidecar.relay.http.head import MAX_HEAD_BYTES, Field, Fields, has_body

CONNECT_TIMEOUT_S: Final = 5.0  # the engine is on this machine
KEEPALIVE_S: Final = 3.0  # uvicorn closes an idle connection after 5 s

Inform = Callable[[int, bytes, Fields], None]
Send = Callable[["EngineConnection"], Coroutine[Any, Any, None]]


class EngineError(Exception):
    """The connection to the engine could not be made, or broke."""


class NotConnected(EngineError):
    """No connection could be made."""


class NoTls(NotConnected):
    """No connection could be made: the TLS handshake failed."""


class Unanswered(EngineError):
    """The connection broke before a byte of the answer came.

    `unread`: by a reset, which is how the kernel ends a connection whose owner closes it and has not read all of it. So
    the engine never saw the whole request.
    """

    def __init__(self, *, unread: bool = False) -> None:
        super().__init__()
        self.unread = unread


class Answer:
    """One answer: its head, and its body as it comes."""

    __slots__ = ("_connection", "_is_done", "body", "fields", "is_upgrade", "reason", "status", "version")

    def __init__(self, connection: EngineConnection, status: int, reason: bytes, version: str, fields: Fields) -> None:
        self._connection = connection
        self._is_done = False
        self.status = status
        self.reason = reason
        self.version = version
        self.fields = fields
        self.is_upgrade = status == 101
        self.body = Body(connection)

    @property
    def ok(self) -> bool:
        """Whether the engine did what it was asked for."""
        return self.status < 400

    def pause(self) -> None:
        """Let the engine wait: the client does not read."""
        self._connection.pause()

    def resume(self) -> None:
        """The client reads again."""
        self._connection.resume()

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the connection back; close it if the answer was not read to its end."""
        if not self._is_done:
            self._is_done = True
            self._connection.release(self)

    def tunnel(self, take: Callable[[bytes], None]) -> EngineConnection:
        """The connection itself, after a 101: each piece goes to `take`, an empty one at the end."""
        self._is_done = True
        self._connection.take_over(take)
        return self._connection


@dataclass(frozen=True, slots=True)
class Place:
    """Where the engine listens. `prefix` goes before every target."""

    host: str
    port: int
    socket: str = ""
    tls: ssl.SSLContext | None = None
    authority: bytes = b""  # for the Host field
    prefix: bytes = b""


class EngineConnection(Connection):
    """One connection; it has one request at a time."""

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self._pool = pool
        self._parser: httptools.HttpResponseParser | None = None
        self._method = ""
        self._may_upgrade = False
        self._waiter: asyncio.Future[Answer] | None = None
        self._inform: Inform | None = None
        self._answer: Answer | None = None
        self._fields: list[Field] = []
        self._reason = b""
        self._head_bytes = 0
        self._pieces: list[bytes] = []
        self._is_complete = False
        self._is_beyond = False  # what comes is no part of the answer
        self._until_close = False
        self._keep = False
        self._sending: asyncio.Task[None] | None = None
        self._tunnel: Callable[[bytes], None] | None = None
        self._rest = b""
        self.idle_since = 0.0

    # --- asyncio.Protocol ---

    def data_received(self, data: bytes) -> None:
        if self._tunnel is not None:
            self._tunnel(data)
            return
        if self._parser is None:  # nothing was asked
            self.close()
            return
        if self._answer is None:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._rest = data[upgrade.args[0] :]
        except httptools.HttpParserError as e:
            if not self._is_complete:
                self._break(EngineError(f"not HTTP: {type(e).__name__}"))
                return
            self._keep = False
        if self._answer is None and self._head_bytes > MAX_HEAD_BYTES:
            self._break(EngineError("the head is too long"))
            return
        self._flush()

    def eof_received(self) -> bool:
        if self._tunnel is not None:
            self._tunnel(b"")
            return True
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._pool.forget(self)
        if self._tunnel is not None:
            self._tunnel(b"")
        if self._answer is not None and self._until_close and exc is None:
            self._answer.body.end()
        unread = isinstance(exc, ConnectionResetError | BrokenPipeError)
        self._break(Unanswered(unread=unread) if self._head_bytes == 0 else EngineError("the connection closed"))

    # --- llhttp ---

    def on_message_begin(self) -> None:
        if self._is_complete:
            self._is_beyond, self._keep = True, False
            return
        self._fields, self._reason = [], b""

    def on_status(self, status: bytes) -> None:
        self._reason += status

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_beyond:
            return
        if self._answer is None:
            self._fields.append((name, value))
        else:
            self._answer.body.trailers.append((name, value))

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        if self._is_beyond:
            return
        status, fields = self._parser.get_status_code(), Fields(self._fields)
        if 100 <= status < 200 and status != 101:
            if self._inform is not None:
                self._inform(status, self._reason, fields)
            return
        if status == 101 and not self._may_upgrade:
            self._keep = False
            raise EngineError("an upgrade that was not asked for")
        self._answer = answer = Answer(self, status, self._reason, self._parser.get_http_version(), fields)
        self._keep = self._parser.should_keep_alive()
        is_framed = b"content-length" in fields or b"transfer-encoding" in fields
        if not has_body(self._method, status):
            self._is_complete = True
        elif not is_framed and status != 101:
            self._until_close = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(answer)

    def on_body(self, data: bytes) -> None:
        if self._is_complete:
            self._keep = False  # more than the answer
        else:
            self._pieces.append(data)

    def on_message_complete(self) -> None:
        if self._answer is not None:
            self._is_complete = True

    def _flush(self) -> None:
        """Pass on what came in one piece."""
        answer = self._answer
        if answer is None:
            return
        if pieces := self._pieces:
            self._pieces = []
            answer.body.feed(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        if self._is_complete and not answer.body.ended and not answer.is_upgrade:
            answer.body.end()

    # --- a request ---

    def ask(
        self, method: str, data: bytes, inform: Inform | None, *, may_upgrade: bool = False
    ) -> asyncio.Future[Answer]:
        """Send a whole request. The future is of the answer's head, or raises EngineError."""
        waiter = self._begin(method, inform)
        self._may_upgrade = may_upgrade
        self.write(data)
        return waiter

    async def ask_at_length(
        self, method: str, head: bytes, inform: Inform | None, send: Send, *, may_upgrade: bool = False
    ) -> Answer:
        """Send a request whose body `send` writes. Raises EngineError, and what `send` raises.

        The answer may come before all of it is sent.
        """
        waiter = self.ask(method, head, inform, may_upgrade=may_upgrade)
        self._sending = sending = self._loop.create_task(send(self))
        # what broke it is raised here, or has come too late to matter
        sending.add_done_callback(lambda task: None if task.cancelled() else task.exception())
        await asyncio.wait((sending, waiter), return_when=asyncio.FIRST_COMPLETED)
        if sending.done() and not waiter.done():
            sending.result()
        return await waiter

    def _begin(self, method: str, inform: Inform | None) -> asyncio.Future[Answer]:
        self._parser = httptools.HttpResponseParser(self)
        self._method, self._inform, self._answer, self._sending = method, inform, None, None
        self._is_complete = self._is_beyond = self._until_close = self._keep = False
        self._head_bytes, self._pieces = 0, []
        self._waiter = waiter = self._loop.create_future()
        if self.is_closed:
            self._break(Unanswered())
        return waiter

    # --- flow and end ---

    def take_over(self, take: Callable[[bytes], None]) -> None:
        """From now on each piece goes to `take`; an empty one at the end."""
        self._tunnel, rest, self._rest = take, self._rest, b""
        if rest:
            take(rest)
        if self.is_closed:
            take(b"")

    def release(self, answer: Answer) -> None:
        """The answer is done with."""
        is_whole = answer is self._answer and answer.body.ended and self._keep and not self._until_close
        if self._sending is not None and not self._sending.done():
            is_whole = False
        self._parser = self._waiter = self._inform = None
        if is_whole and not self.is_closed and not self.is_blocked:
            self.resume()
            self._pool.keep(self)
        else:
            self.close()

    def close(self, *, at_once: bool = False) -> None:
        if self._sending is not None:
            self._sending.cancel()
        super().close(at_once=at_once or self.is_blocked)

    def _break(self, error: EngineError) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)
            self._waiter.exception()  # it may have been given up
        if self._answer is not None:
            self._flush()
            self._answer.body.fail(error)
        if not self.is_closed:
            self.close()


class Pool:
    """The kept connections to one engine, and fresh ones."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._idle: deque[EngineConnection] = deque()
        self._all: set[EngineConnection] = set()

    def kept(self) -> EngineConnection | None:
        """A connection that was used before and is still open."""
        now = time.monotonic()
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_closed and now - connection.idle_since < KEEPALIVE_S:
                return connection
            connection.close()
        return None

    async def fresh(self) -> EngineConnection:
        """A new connection. Raises NotConnected."""
        place, loop = self._place, asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                if place.socket:
                    _, connection = await loop.create_unix_connection(lambda: EngineConnection(self), place.socket)
                else:
                    _, connection = await loop.create_connection(
                        lambda: EngineConnection(self), place.host, place.port, ssl=place.tls
                    )
        except ssl.SSLError as error:
            raise NoTls(str(error)) from error
        except (OSError, TimeoutError) as e:
            raise NotConnected(type(e).__name__) from e
        self._all.add(connection)
        return connection

    def keep(self, connection: EngineConnection) -> None:
        """A connection is free."""
        connection.idle_since = time.monotonic()
        self._idle.append(connection)

    def forget(self, connection: EngineConnection) -> None:
        """A connection is closed."""
        self._all.discard(connection)
        with suppress(ValueError):
            self._idle.remove(connection)

    def sweep(self, now: float) -> None:
        """Close those that have been free for too long."""
        while self._idle and now - self._idle[0].idle_since >= KEEPALIVE_S:
            self._idle.popleft().close()

    def close(self) -> None:
        """Close all."""
        for connection in list(self._all):
            connection.close()
