"""The connection to the engine: one client session for all requests, and bodies that go out without being copied.

Rules: nothing is decoded, redirected, stored or limited in time here; a connection that was not read to its end is closed,
which is how an engine learns that its client left.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Sequence
from typing import Final

import aiohttp
from aiohttp import hdrs, payload
from aiohttp.abc import AbstractStreamWriter
from yarl import URL

from sidecar.errors import BadTarget
from sidecar.relay.bodies import Buffer

MAX_HEADER: Final = 64 << 10  # bytes of one header or request line, both ways (uvicorn's limit for all of them)
READ_BUFFER: Final = 256 << 10
_CONNECT_SECONDS: Final = 5.0  # the engine is on this machine
_IDLE_SECONDS: Final = 3.0  # uvicorn closes an idle connection after 5 s; a POST must not meet that close
_STEP: Final = 256 << 10  # bytes handed to the socket at once
_ABSOLUTE: Final = re.compile(r"https?://[^/?#]*(.*)", re.IGNORECASE)
_AUTO: Final = (hdrs.ACCEPT, hdrs.ACCEPT_ENCODING, hdrs.USER_AGENT, hdrs.CONTENT_TYPE)


class Pieces(payload.Payload):
    """A request body in pieces. `sent` is called when the last of them has been written; then they are dropped, unless `kept`."""

    _autoclose = True  # holds nothing that needs closing

    def __init__(self, pieces: Sequence[Buffer], sent: Callable[[], None]) -> None:
        super().__init__(None)
        self._pieces = pieces
        self._sent = sent
        self.kept = False
        self._size = sum(len(piece) for piece in pieces)

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return b"".join(self._pieces).decode(encoding, errors)

    async def write(self, writer: AbstractStreamWriter) -> None:
        for piece in self._pieces:
            if len(piece) <= _STEP:
                await writer.write(piece)
                continue
            view = memoryview(piece)
            for at in range(0, len(view), _STEP):
                await writer.write(view[at : at + _STEP])
        self._sent()
        if not self.kept:
            self.drop()

    def drop(self) -> None:
        """Let go of the bytes: they are not sent a second time."""
        self.kept = False
        self._pieces = ()


def open_session() -> aiohttp.ClientSession:
    """The one session of a relay process. Its connections are bounded by those of the clients."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_SECONDS, family=socket.AF_UNSPEC)
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=_AUTO,
        auto_decompress=False,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS),
        read_bufsize=READ_BUFFER,
        max_line_size=MAX_HEADER,
        max_field_size=MAX_HEADER,
    )


def origin_form(raw_path: str) -> str:
    """A request target as path and query, bytes as they came. Raises BadTarget for what has no path (`*`, CONNECT's)."""
    if raw_path.startswith("/"):
        return raw_path
    absolute = _ABSOLUTE.fullmatch(raw_path)
    if absolute is None:
        raise BadTarget("only request targets with a path can be passed to the engine")
    rest = absolute[1]
    return rest if rest.startswith("/") else "/" + rest


def target(base: str, path: str) -> URL:
    """The engine's URL for a target in origin form, byte for byte (but for a `?` with nothing behind it)."""
    return URL(base + path, encoded=True)
