"""Pure: the heads of HTTP messages: header fields as the bytes that came, in their order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

Field = tuple[bytes, bytes]

# All of a head, both ways. uvicorn takes as much.
MAX_HEAD_BYTES: Final = 128 << 10
# Statuses whose answers have no body, next to 1xx and whatever answers a HEAD (RFC 9112, 6.3).
NO_BODY: Final = frozenset({204, 304})


class Fields:
    """Header fields. Names are looked up in lower case; values are read as Latin-1."""

    __slots__ = ("_first", "all")

    def __init__(self, fields: Iterable[Field] = ()) -> None:
        self.all: list[Field] = list(fields)
        self._first: dict[bytes, bytes] | None = None

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
        return next((value for key, value in reversed(self.all) if key.lower() == name), b"")

    def length(self) -> int | None:
        """The announced length of the body."""
        value = self._index().get(b"content-length")
        return int(value) if value is not None and value.isdigit() else None

    def media_type(self) -> str:
        """The media type of the body, in lower case; "" if there is none."""
        return self.get(b"content-type").partition(";")[0].strip().lower()

    def tokens(self, name: bytes) -> set[str]:
        """The members of a list, over all fields of that name, in lower case."""
        values = (value.decode("latin-1") for key, value in self.all if key.lower() == name)
        return {token.strip().lower() for value in values for token in value.split(",")} - {""}

    def _index(self) -> dict[bytes, bytes]:
        if self._first is None:
            self._first = {name.lower(): value for name, value in reversed(self.all)}
        return self._first


def has_body(method: str, status: int) -> bool:
    """Whether an answer with this status to this method has a body."""
    return method != "HEAD" and status >= 200 and status not in NO_BODY


def request_head(method: str, target: bytes, fields: Iterable[Field]) -> bytes:
    """A request's head as bytes."""
    return b"%b %b HTTP/1.1\r\n%b\r\n" % (method.encode("latin-1"), target, _lines(fields))


def answer_head(status: int, reason: bytes, fields: Iterable[Field]) -> bytes:
    """An answer's head as bytes."""
    return b"HTTP/1.1 %d %b\r\n%b\r\n" % (status, reason, _lines(fields))


def chunk(data: bytes | memoryview) -> bytes:
    """A chunk of a chunked body."""
    return b"".join((b"%x\r\n" % len(data), data, b"\r\n"))


def last_chunk(trailers: Iterable[Field] = ()) -> bytes:
    """The end of a chunked body."""
    return b"0\r\n%b\r\n" % _lines(trailers)


def _lines(fields: Iterable[Field]) -> bytes:
    return b"".join([b"%b: %b\r\n" % field for field in fields])
