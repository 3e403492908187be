"""Connections of clients: requests in, one after the other, and their answers out.

Rules:
- What llhttp refuses is a 400 and the end of the connection: no bytes that two parsers could read in two ways go on.
- Requests that are sent ahead wait for their turn. A client that leaves cancels what is done for it.
- A client may end its side before its answer begins, and still read: its requests are answered. Whether it has left
  altogether shows only when something is written to it, so a "100 Continue", which every client skips, is written to
  one that waits.
- Heads, bodies and idle connections have deadlines, all looked at by one timer of the server.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

import httptools

from sidecar.errors import HeadTooLarge, Malformed, NoOpenFiles, RequestError, TooSlow
from sidecar.relay.http.body import Body
from sidecar.relay.http.connection import Connection
from sidecar.relay.http.head import (
    MAX_HEAD_BYTES,
    Field,
    Fields,
    answer_head,
    chunk,
    fault_of,
    has_body,
    is_length,
    last_chunk,
    with_length,
)
from sidecar.runtime import open_files

if TYPE_CHECKING:
    from sidecar.relay.http.server import Server

HEAD_TIMEOUT_S: Final = 30.0  # from the first byte of a head, or from the connection to its first head
BODY_TIMEOUT_S: Final = 60.0  # between two pieces of a body that is waited for
MIN_BODY_RATE: Final = 8 << 10  # bytes a second, after as long: a body that drips holds memory that others need
IDLE_TIMEOUT_S: Final = 3630.0  # longer than Envoy keeps a connection
# From the end of a client's side to the questions whether it is still there: the first is answered by a reset, which
# the second one meets. Later ones find a client that leaves while it waits.
LEFT_PROBES_S: Final = (0.1, 0.1, 5.0)
LINGER_S: Final = 2.0  # for the rest of a body that is not wanted, so that the client reads its answer
MAX_AHEAD: Final = 32  # requests that wait for their turn on one connection
SLICE_BYTES: Final = 2048  # of requests sent ahead, parsed at once
MAX_HELD_BYTES: Final = 256 << 10  # of another protocol, while the engine has not answered the handshake
CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


class Request:
    """One request, and the way to answer it."""

    __slots__ = (
        "body",
        "connection",
        "expects",
        "fields",
        "has_body",
        "keep_alive",
        "method",
        "reply",
        "target",
        "version",
    )

    def __init__(self, connection: ClientConnection, method: str, target: bytes, version: str, fields: Fields) -> None:
        self.connection = connection
        self.method = method
        self.target = target
        self.version = version
        self.fields = fields
        self.body = Body(connection)
        self.has_body = bool(fields.length()) or b"transfer-encoding" in fields
        self.expects = version == "1.1" and fields.get(b"expect").lower() == "100-continue"
        self.keep_alive = False
        self.reply = Reply(self)

    @property
    def peer(self) -> str:
        """The client's address; "" if there is none."""
        return self.connection.peer

    @property
    def scheme(self) -> bytes:
        """How the client speaks to this server."""
        return b"https" if self.connection.is_tls else b"http"

    def want_body(self) -> None:
        """Send 100 Continue if the client waits for it (curl does, above 1 MiB)."""
        if self.expects and not self.reply.begun:
            self.expects = False
            self.connection.write(CONTINUE)


class Reply:
    """The answer to one request. Writing to a client that has left does nothing: its handler is being cancelled."""

    __slots__ = ("_is_chunked", "_request", "_sends_body", "begun", "ended", "is_delimited")

    def __init__(self, request: Request) -> None:
        self._request = request
        self._is_chunked = False
        self._sends_body = True
        self.begun = False
        self.ended = False
        self.is_delimited = False  # its length was announced

    def begin(self, status: int, reason: bytes, fields: Iterable[Field], *, body: bytes | None = None) -> None:
        """Send the head. With `body`, the whole answer: its length is added."""
        request, connection = self._request, self._request.connection
        passed = list(fields)
        self._sends_body = has_body(request.method, status)
        if body is not None and self._sends_body:
            passed = with_length(passed, len(body))
            self.is_delimited = True
        else:
            self.is_delimited = any(is_length(name) for name, _ in passed)
        if self._sends_body and not self.is_delimited:
            if request.version == "1.1":
                self._is_chunked = True
                passed.append((b"transfer-encoding", b"chunked"))
            else:
                request.keep_alive = False
        if not request.keep_alive:
            passed.append((b"connection", b"close"))
        elif request.version == "1.0":
            passed.append((b"connection", b"keep-alive"))
        self.begun = True
        connection.write(answer_head(status, reason, passed, body if body is not None and self._sends_body else b""))
        self.ended = body is not None

    def upgrade(self, status: int, reason: bytes, fields: Iterable[Field]) -> None:
        """Send the head that ends HTTP on this connection."""
        self.begun = self.ended = True
        self._request.connection.write(answer_head(status, reason, fields))

    def inform(self, status: int, reason: bytes, fields: Iterable[Field]) -> None:
        """Pass on an interim answer (1xx)."""
        if self._request.version == "1.1" and not self.begun:
            self._request.connection.write(answer_head(status, reason, fields))

    def write(self, data: bytes | memoryview) -> None:
        """Send a piece of the body."""
        if data and self._sends_body:
            self._request.connection.write(chunk(data) if self._is_chunked else data)

    def end(self, trailers: Iterable[Field] = ()) -> None:
        """The body is complete."""
        if not self.ended:
            self.ended = True
            if self._is_chunked:
                self._request.connection.write(last_chunk(trailers))
            elif not self.is_delimited and self._sends_body:
                self._request.keep_alive = False

    @property
    def is_blocked(self) -> bool:
        """Whether the client has to read before more is written."""
        return self._request.connection.is_blocked

    async def drain(self) -> None:
        """Wait until the client has read enough."""
        await self._request.connection.drain()


class ClientConnection(Connection):
    """One connection of a client at `peer`, and the task that handles its requests one after the other."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self._server = server
        self._parser = httptools.HttpRequestParser(self)
        self.task: asyncio.Task[None] | None = None
        self._queue: deque[Request | RequestError] = deque()
        self._next: asyncio.Future[None] | None = None
        self._reading: Request | None = None  # whose body is coming
        self._current: Request | None = None  # which is being handled
        self._fields: list[Field] = []
        self._target = b""
        self._head_bytes = 0
        self._in_head = False
        self._is_again = False  # a head that is known is parsed once more
        self._is_refused = False  # nothing that comes is read any more
        self._ahead = bytearray()  # what comes after more requests than may wait
        self._half_closed = False
        self._since = time.monotonic()  # of the head, of the last piece of a body, or of being idle
        self._served = 0
        self._tunnel: Callable[[bytes], None] | None = None
        self._held: bytearray | None = None  # what came after a request to upgrade that is undecided
        self._head_since = self._since
        self.peer = ""
        self.is_tls = False

    # --- asyncio.Protocol ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        peer = transport.get_extra_info("peername")
        self.peer = str(peer[0]) if isinstance(peer, tuple) else ""
        self.is_tls = transport.get_extra_info("sslcontext") is not None
        self._server.connections.add(self)
        self.task = self._loop.create_task(self._serve())
        if not self._server.has_room():
            self._refuse(NoOpenFiles(open_files.EXHAUSTED_TEXT))

    def data_received(self, data: bytes) -> None:
        if self._ahead:
            self._ahead += data
        elif len(data) > SLICE_BYTES and data.count(b"\r\n\r\n") > MAX_AHEAD:
            self._parse_ahead(data)
        else:
            self._parse(data)

    def _parse_ahead(self, data: bytes) -> None:
        """Parse requests that were sent ahead while few wait; the rest is kept as bytes, which take less memory."""
        while data and len(self._queue) <= MAX_AHEAD:
            self._parse(data[:SLICE_BYTES])
            data = data[SLICE_BYTES:]
        self._ahead = bytearray(data)
        if data or len(self._queue) > MAX_AHEAD:
            self.pause()
        else:
            self.resume()

    def _parse(self, data: bytes) -> None:
        if self._tunnel is not None:
            self._tunnel(data)
            return
        if self._held is not None:
            self._held += data
            if len(self._held) > MAX_HELD_BYTES:
                self.pause()
            return
        if self._is_refused:
            return
        self._since = self._server.now
        if self._in_head or self._reading is None:
            self._head_bytes += len(data)
            if not self._in_head and data.find(b"  ", 0, _end_of_first_line(data)) >= 0:
                self._refuse(Malformed("there is more than one space in the request line"))
                return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as e:
            self._upgrade(data[e.args[0] :])
        except httptools.HttpParserError:
            self._refuse(Malformed("the request is not valid HTTP/1.1, or could be read in two ways"))
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(HeadTooLarge(f"the request line and the headers are longer than {MAX_HEAD_BYTES} bytes"))

    def eof_received(self) -> bool:
        if self._tunnel is not None:
            self._tunnel(b"")
            return True
        current = self._current
        if self._in_head or self._reading is not None or (current is None and not self._queue):
            return False
        if current is not None and current.reply.begun and not current.reply.ended:
            return False  # it left: what it wanted to say, it said before its answer began
        self._half_closed = True
        last = self._queue[-1] if self._queue else current
        if isinstance(last, Request):
            last.keep_alive = False
        self._loop.call_later(LEFT_PROBES_S[0], self._probe, 1)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._server.connections.discard(self)
        if self._reading is not None:
            self._reading.body.fail(ConnectionResetError())
        if self.task is not None:
            self.task.cancel()

    # --- llhttp ---

    def on_message_begin(self) -> None:
        if self._is_again:
            return
        self._in_head, self._fields, self._target = True, [], b""
        self._head_since = self._server.now

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_again:
            return
        if self._in_head:
            self._fields.append((name, value))
        elif self._reading is not None:
            self._reading.body.trailers.append((name, value))

    def on_headers_complete(self) -> None:
        if self._is_again:
            return
        self._in_head, self._head_bytes = False, 0
        parser = self._parser
        request = Request(
            self, parser.get_method().decode("latin-1"), self._target, parser.get_http_version(), Fields(self._fields)
        )
        if fault := fault_of(request.method, request.target, request.version, request.fields):
            self._refuse(Malformed(fault))
            return
        self._reading = request
        request.keep_alive = parser.should_keep_alive()
        self._put(request)

    def on_body(self, data: bytes) -> None:
        if self._reading is not None:
            self._reading.body.feed(data)

    def on_message_complete(self) -> None:
        request = self._reading
        if request is not None and not (self._parser.should_upgrade() and request.has_body):
            request.body.end()
            self._reading = None

    # --- flow ---

    def take_over(self, tunnel: Callable[[bytes], None]) -> None:
        """From now on each piece goes to `tunnel`; an empty one at the end of the client's side."""
        self._tunnel, held, self._held = tunnel, self._held, None
        self.resume()
        if held:
            tunnel(bytes(held))

    # --- requests ---

    @property
    def is_busy(self) -> bool:
        """Whether a request is being handled, or waits for it."""
        return self._current is not None or bool(self._queue)

    def check(self, now: float) -> None:
        """Close the connection if a deadline has passed."""
        waited = now - self._since
        request = self._current
        if request is not None:
            if request.body.wanted and self._reading is request and not self._is_paused:
                self._check_body(request.body, waited)
            return
        if self._in_head and now - self._head_since > HEAD_TIMEOUT_S:
            self._refuse(TooSlow(f"the head was not complete within {HEAD_TIMEOUT_S:.0f} s"))
        elif not self._in_head and waited > (IDLE_TIMEOUT_S if self._served else HEAD_TIMEOUT_S):
            self.close()

    @property
    def is_idle(self) -> bool:
        """Whether it has been kept after an answer, and nothing has come since."""
        return self._served > 0 and not self._in_head and not self.is_busy and self._tunnel is None

    def _check_body(self, body: Body, waited: float) -> None:
        body.waited += self._server.interval
        if waited > BODY_TIMEOUT_S:
            body.fail(TooSlow(f"no byte of the body came for {BODY_TIMEOUT_S:.0f} s"))
        elif body.waited > BODY_TIMEOUT_S + body.received / MIN_BODY_RATE:
            body.fail(TooSlow(f"the body came slower than {MIN_BODY_RATE} bytes a second"))

    def _put(self, item: Request | RequestError) -> None:
        self._queue.append(item)
        if len(self._queue) > MAX_AHEAD:
            self.pause()
        if self._next is not None and not self._next.done():
            self._next.set_result(None)

    def _refuse(self, error: RequestError) -> None:
        """Answer with an error when its turn comes, and read nothing more."""
        if self._is_refused:
            return
        self._is_refused, self._in_head = True, False
        if self._reading is not None:
            self._reading.keep_alive = False
            self._reading.body.fail(error)
            self._reading = None
        else:
            self._put(error)

    def _upgrade(self, rest: bytes) -> None:
        """The client asks for another protocol. Only a WebSocket is spoken; other offers are ignored."""
        if self._reading is not None:  # llhttp takes its body for the other protocol
            self._read_body(self._reading, rest)
            return
        request = self._queue[-1] if self._queue else self._current
        if isinstance(request, Request) and "websocket" in request.fields.tokens(b"upgrade"):
            self._held = bytearray(rest)
        else:
            self._start_again(rest)

    def _read_body(self, request: Request, data: bytes) -> None:
        """Parse what comes as the body of a request whose head is known."""
        length = request.fields.length()
        framing = b"transfer-encoding: chunked" if length is None else b"content-length: %d" % length
        self._parser = httptools.HttpRequestParser(self)
        self._is_again = True
        self._parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n\r\n" % framing)
        self._is_again = False
        if data:
            self.data_received(data)

    def _start_again(self, data: bytes) -> None:
        """Parse what comes as a request."""
        self._parser = httptools.HttpRequestParser(self)
        if data:
            self.data_received(data)

    def _probe(self, n: int) -> None:
        """Ask a client that has ended its side whether it still waits for its answer, for the n-th time."""
        request = self._current
        if request is not None and not request.reply.begun and request.version == "1.1" and not self.is_closed:
            self.write(CONTINUE)
            self._loop.call_later(LEFT_PROBES_S[min(n, len(LEFT_PROBES_S) - 1)], self._probe, n + 1)

    async def _serve(self) -> None:
        try:
            while not self.is_closed:
                while not self._queue:
                    if self._half_closed or self._is_refused:
                        return
                    self._since = self._server.now
                    self._next = self._loop.create_future()
                    await self._next
                item = self._queue.popleft()
                if self._ahead:
                    self._parse_ahead(bytes(self._ahead))
                elif len(self._queue) <= MAX_AHEAD:
                    self.resume()
                if isinstance(item, RequestError):
                    self._server.refuse(self, item)
                    return
                self._current = item
                try:
                    await self._server.handle(item)
                finally:
                    self._current, self.on_resume = None, None
                    self._server.on_idle()
                self._served += 1
                if self._tunnel is not None or not await self._finish(item):
                    return
                if self._held is not None:  # the engine refused the handshake
                    held, self._held = bytes(self._held), None
                    self._start_again(held)
        finally:
            if self._tunnel is None:
                self.close()
            self._server.on_idle()

    async def _finish(self, request: Request) -> bool:
        """Whether the connection can serve another request."""
        if not request.reply.ended:
            return False
        if not request.body.ended and request.body.error is None and not self.is_closed:
            request.body.discard()
            try:
                async with asyncio.timeout(LINGER_S):
                    await request.body.next()
            except (TimeoutError, OSError, RequestError):
                return False
        return request.keep_alive and not self._server.is_closing and request.body.ended


def _end_of_first_line(data: bytes) -> int:
    """Where the request line ends, after blank lines before it; the end of `data` if it goes on."""
    start = 0
    while data[start : start + 1] in (b"\r", b"\n"):
        start += 1
    end = data.find(b"\r\n", start)
    return len(data) if end < 0 else end
