"""Read an image's size from its first bytes, and decide whether preparing it inline is worth the cost.

Rules: pure; nothing is decoded. The size is as stored: a rotation keeps the pixel count and hardly changes the result.
"""

from __future__ import annotations

import base64
import binascii
from typing import Final

from sidecar.images import file_headers
from sidecar.images.protocol import Data
from sidecar.kernels.grid import Geometry, ProcessorSpec

# Bytes, or base64 characters, to read: nearly always the first is enough; some files begin with EXIF and ICC blocks.
HEADER_BYTES: Final = (4 << 10, 128 << 10)

# An image is prepared inline only if it loses half of its pixels or more. Otherwise decoding it here and sending plain
# pixels as base64 costs more than the engine saves. Plain pixels can have twenty times the size of a file: bound them.
MIN_SHRINK: Final = 2
MAX_GROWTH: Final = 1.5
MAX_SMALL_CHARS: Final = 4 << 20  # base64 characters that may be sent whatever the size of the original


def read_size(data: Data, is_base64: bool) -> file_headers.Header | None:
    """The header of a file, or of its base64 text; None if its first bytes contain no size."""
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


def predict(spec: ProcessorSpec, height: int, width: int) -> Geometry | None:
    """The geometry of an image by its header; None if its size is unknown until it is decoded, or refused then."""
    try:
        return spec.geometry(height, width)
    except ValueError:
        return None


def base64_chars(data: Data, is_base64: bool) -> int:
    """Characters that an image takes as base64 text."""
    return len(data) if is_base64 else _base64_chars(len(data))


def _base64_chars(size: int) -> int:
    return -(-size // 3) * 4


def is_worth_resizing(
    pixels: int, geometry: Geometry, client_chars: int, max_small_chars: int = MAX_SMALL_CHARS
) -> bool:
    """True if resizing an image of `pixels` pixels and `client_chars` base64 characters saves more than it costs."""
    height, width = geometry.size
    made = _base64_chars(len(b"P6\n%d %d\n255\n" % (width, height)) + 3 * height * width)
    return MIN_SHRINK * height * width <= pixels and (made <= max_small_chars or made <= MAX_GROWTH * client_chars)
