"""Compressed bodies and answers, as far as they are read: within bounds, and never changed."""

from __future__ import annotations

import zlib
from typing import Final, Protocol

# What zlib unpacks, and its window: gzip's header, or zlib's.
_WINDOW_BITS: Final = {"gzip": 31, "x-gzip": 31, "deflate": 15}
UNREAD_FACTOR: Final = 4  # text over its compressed form, where that is not unpacked (zstd, brotli)
# Text that is held to be read: prompts shrink to a quarter or a tenth, rarely more.
HELD_BYTES: Final = 4 << 20
HELD_FACTOR: Final = 32
_COUNT_BYTES: Final = 64 << 10


class Decoder(Protocol):
    """Unpacks piece by piece. Raises BROKEN."""

    def decompress(self, data: bytes, /) -> bytes: ...


BROKEN: Final = zlib.error


def decoder(coding: str) -> Decoder | None:
    """What unpacks the coding; None if it is unknown, or none."""
    bits = _WINDOW_BITS.get(coding.strip().lower())
    return None if bits is None else zlib.decompressobj(bits)


def held_bytes(body: bytes, limit: int) -> int:
    """How much memory `unpack` may take."""
    return min(limit, HELD_BYTES + HELD_FACTOR * len(body))


def unpack(body: bytes, coding: str, limit: int) -> tuple[bytes, int]:
    """The text of a compressed body and its length, at most `limit`.

    The text is empty where it is not known: another coding, a broken body, one that takes more than `held_bytes`.
    """
    bits = _WINDOW_BITS.get(coding.strip().lower())
    if bits is None:
        return b"", len(body) * UNREAD_FACTOR
    unpacker = zlib.decompressobj(bits)
    try:
        text = unpacker.decompress(body, held_bytes(body, limit))
        size = len(text)
        while not unpacker.eof and size < limit:
            piece = unpacker.decompress(unpacker.unconsumed_tail, _COUNT_BYTES)
            if not piece:
                break  # the body was cut off
            text, size = b"", size + len(piece)
    except zlib.error:
        return b"", len(body)
    return text, min(size, limit)
