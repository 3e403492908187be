"""Pure: an image's size from its first bytes (BMP, PNG, JPEG). Decodes no pixels and needs no imaging library.

A size that cannot be read is None.
"""

from __future__ import annotations

import struct

Size = tuple[int, int]  # width, height in pixels

# JPEG frame headers: SOF0..SOF15 without DHT, JPG and DAC, which share the range.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def size_of(head: bytes) -> Size | None:
    """Width and height, or None for an unknown format or header."""
    try:
        if head.startswith(b"\x89PNG\r\n\x1a\n"):
            width, height = struct.unpack_from(">II", head, 16)
        elif head.startswith(b"BM"):
            width, height = struct.unpack_from("<ii", head, 18)
        elif head.startswith(b"\xff\xd8"):
            return _jpeg(head)
        else:
            return None
    except struct.error:
        return None
    return (width, abs(height)) if width > 0 and height else None


def is_resized(head: bytes) -> bool:
    """True for BMP, whose preprocessing is too cheap to count."""
    return head.startswith(b"BM")


def _jpeg(head: bytes) -> Size | None:
    at = 2
    while True:  # ends: `at` grows by at least 2 in each turn, and unpack_from raises past the end
        marker, length = struct.unpack_from(">HH", head, at)
        if marker >> 8 != 0xFF or length < 2:
            return None
        if marker & 0xFF in _FRAMES:
            height, width = struct.unpack_from(">HH", head, at + 5)
            return (width, height) if width and height else None
        at += 2 + length
