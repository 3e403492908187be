"""Whether decoding a file would take far more time than its size suggests; found by walking its structure.

Rules: pure functions of the whole file. Decoders are bounded by pixels and bytes nearly everywhere; here is what is
left: scans of a JPEG, each of which goes over all blocks, and parts that are walked in Python, some of them at a
quadratic cost. The bounds lie far above what encoders write. A file that is not walked to its end is one that decoders
refuse. What this misses ends by the CPU limit of its job.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Final

from sidecar.images import file_headers
from sidecar.images.file_headers import Header
from sidecar.images.protocol import ImageLimits

# Encoders write about ten scans. Each takes 0.2 to 1.3 ns per pixel, however few bytes it has: 406 in 327 kB took a
# worker ten seconds. So many are allowed for an image of the most pixels, and more for a smaller one.
MAX_SCANS: Final = 12
# Bytes before the first scan that Pillow reads one by one: 0.3 µs each.
MAX_UNWALKED_BYTES: Final = 1 << 20
# A 20-megabyte PNG has 2,500 chunks if its encoder writes 8 KiB at a time; each costs Pillow some µs.
MAX_PNG_CHUNKS: Final = 1 << 15
MAX_PNG_PROFILES: Final = 4  # each may unpack to a megabyte
# Pillow reads them one by one, and older ones join those of a comment at a quadratic cost. Metadata has some hundreds.
MAX_GIF_BLOCKS: Final = 4096
# Each uncompressed strip costs Pillow 30 µs; strips are 8 KiB or one row.
MAX_TIFF_STRIPS: Final = 1 << 14
MAX_TIFF_TAG_BYTES: Final = 1 << 28  # of all tags' values, which may lie over each other; older Pillows copy each
# Pillow unpacks run lengths in Python: half a second for each megabyte of them, or for eight million pixels.
MAX_BMP_RUNS_BYTES: Final = 1 << 20
MAX_BMP_RUNS_PIXELS: Final = 8 << 20

SCAN_MARK: Final = b"\xff\xda"  # within a scan FF is followed by 0 or by a restart marker
TIFF_KIND_BYTES: Final = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
STRIP_OFFSETS, TILE_OFFSETS = 273, 324
TOO_MANY_SCANS, TOO_MANY_PARTS = "image_too_many_scans", "image_too_many_parts"

Excess = tuple[str, str]  # reason code, and what it is, in words
Walk = Callable[[bytes, Header, ImageLimits], Excess | None]


def find_excess(data: bytes, header: Header, limits: ImageLimits) -> Excess | None:
    """Why an image is not to be decoded here, by its whole file; None if its cost is within bounds."""
    # by its first bytes, as Pillow chooses: a file that begins as a BMP and goes on as a WebP is a BMP to it
    walk = next((walk for name, walk in WALKS.items() if data.startswith(file_headers.MAGICS[name])), None)
    try:
        return walk(data, header, limits) if walk else None
    except (struct.error, IndexError):  # cut off: decoders stop there, too
        return None


def _jpeg(data: bytes, header: Header, limits: ImageLimits) -> Excess | None:
    """The number of scans is an upper bound: one in a thumbnail or after the end counts, too."""
    scans = data.count(SCAN_MARK)
    if scans * header.height * header.width > MAX_SCANS * limits.max_pixels:
        return TOO_MANY_SCANS, f"it is a JPEG with {scans} scans, too many for its size"
    if file_headers.first_scan(data) is None and len(data) > MAX_UNWALKED_BYTES:
        return TOO_MANY_PARTS, "it is a JPEG with too many or damaged segments before its first scan"
    return None


def _png(data: bytes, _: Header, __: ImageLimits) -> Excess | None:
    at, profiles = 8, 0
    for _chunk in range(MAX_PNG_CHUNKS):
        size, kind = struct.unpack_from("!I4s", data, at)
        profiles += kind == b"iCCP"
        if profiles > MAX_PNG_PROFILES:
            return TOO_MANY_PARTS, f"it is a PNG with more than {MAX_PNG_PROFILES} profiles"
        if kind == b"IEND":
            return None
        at += 12 + size
    return TOO_MANY_PARTS, f"it is a PNG with more than {MAX_PNG_CHUNKS} chunks"


def _gif(data: bytes, _: Header, __: ImageLimits) -> Excess | None:
    """Blocks before the first image; behind it nothing is read."""
    flags = data[10]
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    blocks = 0
    while blocks <= MAX_GIF_BLOCKS:
        if data[at] != 0x21:  # an image, the end, or junk, which Pillow skips a byte at a time
            junk = data[at] not in (0x2C, 0x3B) and len(data) > MAX_UNWALKED_BYTES
            return (TOO_MANY_PARTS, "it is a GIF with damaged blocks before its first image") if junk else None
        at, blocks = at + 2, blocks + 1
        while data[at]:
            at, blocks = at + 1 + data[at], blocks + 1
            if blocks > MAX_GIF_BLOCKS:
                break
        at += 1
    return TOO_MANY_PARTS, f"it is a GIF with more than {MAX_GIF_BLOCKS} blocks before its first image"


def _tiff(data: bytes, _: Header, __: ImageLimits) -> Excess | None:
    """The first directory: its strips, and the bytes of its values."""
    order = "<" if data[:2] == b"II" else ">"
    (at,) = struct.unpack_from(order + "I", data, 4)
    (entries,) = struct.unpack_from(order + "H", data, at)
    total = 0
    for entry in range(entries):
        tag, kind, count = struct.unpack_from(order + "HHI", data, at + 2 + 12 * entry)
        total += min(count * TIFF_KIND_BYTES.get(kind, 0), len(data))
        if tag in (STRIP_OFFSETS, TILE_OFFSETS) and count > MAX_TIFF_STRIPS:
            return TOO_MANY_PARTS, f"it is a TIFF with {count} strips or tiles"
        if total > MAX_TIFF_TAG_BYTES:
            return TOO_MANY_PARTS, "it is a TIFF whose tags lie over each other"
    return None


def _bmp(data: bytes, _: Header, __: ImageLimits) -> Excess | None:
    size, width, height, compression = struct.unpack_from("<Iii4xI", data, 14)
    many = len(data) > MAX_BMP_RUNS_BYTES or abs(width * height) > MAX_BMP_RUNS_PIXELS
    return (
        (TOO_MANY_PARTS, "it is a large BMP of run lengths") if size >= 40 and compression in (1, 2) and many else None
    )


WALKS: Final[Mapping[str, Walk]] = {
    "jpeg": _jpeg,
    "png": _png,
    "gif": _gif,
    "tiff": _tiff,
    "bmp": _bmp,
}
