"""Pure: what a file's first bytes tell before anything is decoded: its size, and whether it pays to prepare it inline.

Rules: a size is taken as stored, before turning: that changes neither the number of its pixels nor, but for little, what becomes of it.
"""

from __future__ import annotations

import base64
import binascii
from typing import Final

from sidecar.images import file_headers
from sidecar.images.protocol import Data
from sidecar.kernels.grid import Geometry

HEADER_BYTES: Final = (
    4 << 10,
    128 << 10,
)  # bytes, or base64 characters, looked at: nearly all files say it at once; EXIF and ICC blocks come first in some

# An image is prepared inline only where it loses half of its pixels or more: else decoding here, and base64 of plain pixels there,
# cost more than the engine's own processor saves. Nor may the body grow without bound: plain pixels are up to twenty times a file.
MIN_SHRINK: Final = 2
MAX_GROWTH: Final = 1.5
MAX_SMALL_CHARS: Final = 4 << 20  # bytes of base64 that may be sent whatever the file had


def read_size(data: Data, is_base64: bool) -> file_headers.Header | None:
    """The header of a file, or of its base64 text; None where its first bytes say no size."""
    for length in HEADER_BYTES:
        try:
            head = base64.b64decode(data[: min(length, len(data) & ~3)]) if is_base64 else bytes(data[:length])
        except binascii.Error:
            return None
        header = file_headers.read(head)
        if header is not None and header.height and header.width:
            return header
        if len(data) <= length:
            break
    return None


def base64_chars(data: Data, is_base64: bool) -> int:
    """Characters that an image takes as base64 text."""
    return len(data) if is_base64 else _base64_chars(len(data))


def _base64_chars(size: int) -> int:
    return -(-size // 3) * 4


def is_worth_resizing(pixels: int, geometry: Geometry, client_chars: int) -> bool:
    """Whether a resized image in a request saves more than it costs: of an image of so many pixels, `client_chars` characters of base64."""
    height, width = geometry.size
    made = _base64_chars(len(b"P6\n%d %d\n255\n" % (width, height)) + 3 * height * width)
    return MIN_SHRINK * height * width <= pixels and (made <= MAX_SMALL_CHARS or made <= MAX_GROWTH * client_chars)
