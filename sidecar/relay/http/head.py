"""Pure: the heads of HTTP messages: header fields as the bytes that came, in their order."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Final

Field = tuple[bytes, bytes]

# All of a head, both ways. uvicorn takes as much.
MAX_HEAD_BYTES: Final = 128 << 10
# Statuses whose answers have no body, next to 1xx and whatever answers a HEAD (RFC 9112, 6.3).
NO_BODY: Final = frozenset({204, 304})


_LENGTH_CHARS: Final = len(b"content-length")
_HOST: Final = re.compile(rb"(?:[A-Za-z0-9._~!$&'()*+;=%-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")
_ABSOLUTE: Final = re.compile(rb"https?://([^/?#]*)", re.IGNORECASE)


class Fields:
    """Header fields. Names are looked up in lower case; values are read as Latin-1."""

    __slots__ = ("_first", "_names", "all")

    def __init__(self, fields: list[Field] | None = None) -> None:
        self.all: list[Field] = [] if fields is None else fields
        self._names: list[bytes] | None = None
        self._first: dict[bytes, bytes] | None = None

    @property
    def names(self) -> list[bytes]:
        """The names in lower case, in their order."""
        if self._names is None:
            self._names = [name.lower() for name, _ in self.all]
        return self._names

    def __iter__(self) -> Iterator[Field]:
        return iter(self.all)

    def __contains__(self, name: bytes) -> bool:
        return name in self._index()

    def get(self, name: bytes, default: str = "") -> str:
        """The first value of `name`, which is given in lower case."""
        value = self._index().get(name)
        return default if value is None else value.decode("latin-1")

    def last(self, name: bytes) -> bytes:
        """The last value of `name`: the one that the nearest gateway wrote."""
        return self.every(name)[-1] if name in self else b""

    def every(self, name: bytes) -> list[bytes]:
        """The values of all fields of that name, in their order."""
        if name not in self:
            return []
        return [value for key, (_, value) in zip(self.names, self.all, strict=True) if key == name]

    def length(self) -> int | None:
        """The announced length of the body."""
        value = self._index().get(b"content-length")
        return int(value) if value is not None and value.isdigit() else None

    def media_type(self) -> str:
        """The media type of the body, in lower case; "" if there is none."""
        return self.get(b"content-type").partition(";")[0].strip().lower()

    def tokens(self, name: bytes) -> set[str]:
        """The members of a list, over all fields of that name, in lower case."""
        values = [value.decode("latin-1") for value in self.every(name)]
        return {token.strip().lower() for value in values for token in value.split(",")} - {""}

    def _index(self) -> dict[bytes, bytes]:
        if self._first is None:
            pairs = zip(reversed(self.names), reversed(self.all), strict=True)  # the first of a name is kept
            self._first = {name: value for name, (_, value) in pairs}
        return self._first


def with_length(fields: list[Field], length: int) -> list[Field]:
    """The fields with this length of the body, in the place of the one that was announced."""
    value = b"%d" % length
    for i, (name, given) in enumerate(fields):
        if is_length(name):
            return fields if given.lstrip(b"0") == value else [*fields[:i], (name, value), *fields[i + 1 :]]
    return [*fields, (b"content-length", value)]


def is_length(name: bytes) -> bool:
    """Whether a field of that name announces the length of the body."""
    return len(name) == _LENGTH_CHARS and name.lower() == b"content-length"


def fault_of(method: str, target: bytes, version: str, fields: Fields) -> str:
    """What is wrong with a request's head that llhttp accepts; "" if nothing is (RFC 9112, 3.2 and 3.3)."""
    hosts = fields.every(b"host")
    if version not in ("1.0", "1.1"):
        return "only HTTP/1.0 and HTTP/1.1 are spoken here"
    if version == "1.0" and b"transfer-encoding" in fields:
        return "HTTP/1.0 has no chunks"
    if len(hosts) > 1 or (not hosts and version == "1.1"):
        return "there must be one Host header"
    if hosts and not _HOST.fullmatch(hosts[0]):
        return "the Host header is not valid"
    if target.startswith(b"/"):
        return ""
    absolute = _ABSOLUTE.match(target)
    if absolute is not None and hosts and absolute[1].lower() != hosts[0].lower():
        return "the target and the Host header name different hosts"
    is_form = absolute is not None or (target == b"*" and method == "OPTIONS")
    return "" if is_form else "the target is neither a path nor an http address"


def has_body(method: str, status: int) -> bool:
    """Whether an answer with this status to this method has a body."""
    return method != "HEAD" and status >= 200 and status not in NO_BODY


def request_head(method: str, target: bytes, fields: Iterable[Field]) -> bytes:
    """A request's head as bytes."""
    return b"".join((method.encode("latin-1"), b" ", target, b" HTTP/1.1\r\n", *_lines(fields), b"\r\n"))


def answer_head(status: int, reason: bytes, fields: Iterable[Field], body: bytes = b"") -> bytes:
    """An answer's head as bytes, and its body after it."""
    return b"".join((b"HTTP/1.1 %d " % status, reason, b"\r\n", *_lines(fields), b"\r\n", body))


def chunk(data: bytes | memoryview) -> bytes:
    """A chunk of a chunked body."""
    return b"".join((b"%x\r\n" % len(data), data, b"\r\n"))


def last_chunk(trailers: Iterable[Field] = ()) -> bytes:
    """The end of a chunked body."""
    return b"".join((b"0\r\n", *_lines(trailers), b"\r\n"))


def _lines(fields: Iterable[Field]) -> list[bytes]:
    pieces: list[bytes] = []
    for name, value in fields:
        pieces += (name, b": ", value, b"\r\n")
    return pieces
