"""Read an image file's header: its format, its size, and whether it is plain.

Rules: pure functions of bytes. Nothing is decoded, and no allocation depends on a length that the file gives. "Plain"
means a JPEG of which the fast decoder returns exactly the pixels of Pillow's `convert("RGB")`: one or three 8-bit
channels, no second frame; metadata may rotate it, see `tagged`. Pillow decodes everything else. A header that cannot be
read is not plain and has size 0 x 0.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Header:
    """A file's header. `tagged`: its metadata may hold an orientation. The size is as stored, before any rotation."""

    format: str
    height: int = 0
    width: int = 0
    plain: bool = False
    tagged: bool = False


def read(data: bytes) -> Header | None:
    """The header of an image; size 0 x 0 for a format that is only recognised, None for an unknown one."""
    for name, reader, offset, magics in FORMATS:
        if data.startswith(magics, offset):
            try:
                return reader(data) if reader else Header(name)
            except (struct.error, IndexError):
                return Header(name)
    return None


def _jpeg(data: bytes) -> Header:
    """Walk the segments up to the scan. Plain: one frame header, Huffman, 8 bits, one or three components."""
    frame: tuple[int, int, int, int] | None = None
    plain, tagged = True, False
    for marker, at in segments(data):
        if marker == SCAN:
            bits, height, width, components = frame or (0, 0, 0, 0)
            return Header("jpeg", height, width, plain and bits == 8 and components in (1, 3), tagged)
        if marker in FRAMES:
            plain = plain and frame is None and marker in HUFFMAN_FRAMES
            frame = struct.unpack_from("!BHHB", data, at)
        tagged = tagged or marker == APP1
        plain = plain and not (marker == APP2 and data[at : at + 4] == b"MPF\0")  # several images in one file
    return Header("jpeg", *(frame[1:3] if frame else (0, 0)))


def first_scan(data: bytes) -> int | None:
    """Where a JPEG's first scan begins; None if it has none, or too much or damaged data before it."""
    return next((at for marker, at in segments(data) if marker == SCAN), None)


SCAN, APP1, APP2 = 0xDA, 0xE1, 0xE2
FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
HUFFMAN_FRAMES: Final = frozenset((0xC0, 0xC1, 0xC2))  # baseline, extended, progressive
MAX_SEGMENTS: Final = 1000  # cameras and editors write tens; each costs 1 µs, also on the relay's event loop
MAX_FILL_BYTES: Final = 1 << 16  # in a row; decoders in Python read them one by one
_NO_FILL: Final = re.compile(rb"[^\xff]")


def segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Each segment's marker and content offset, up to the scan or to the first invalid segment."""
    at = 2
    for _ in range(MAX_SEGMENTS):
        if at + 4 > len(data) or data[at] != 0xFF:
            return
        marker, length = struct.unpack_from("!BH", data, at + 1)
        if marker == 0xFF:  # fill bytes
            found = _NO_FILL.search(data, at, at + MAX_FILL_BYTES)
            at = found.start() - 1 if found else len(data)
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without content
            at += 2
        elif length < 2 or marker == 0xD9:
            return
        else:
            yield marker, at + 4
            if marker == SCAN:
                return
            at += 2 + length


def _png(data: bytes) -> Header:
    width, height = struct.unpack_from("!II", data, 16)
    return Header("png", height, width)


def _webp(data: bytes) -> Header:
    kind = data[12:16]
    if kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
        return Header("webp", height, width)
    if kind == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return Header("webp", (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1)
    if kind == b"VP8X":
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
        return Header("webp", height, width)
    return Header("webp")


def _gif(data: bytes) -> Header:
    width, height = struct.unpack_from("<HH", data, 6)
    return Header("gif", height, width)


def _bmp(data: bytes) -> Header:
    old = struct.unpack_from("<I", data, 14)[0] < 40
    width, height = struct.unpack_from("<HH" if old else "<ii", data, 18)
    return Header("bmp", abs(height), abs(width))


def _tiff(data: bytes) -> Header:
    """The first directory's ImageWidth and ImageLength; Pillow opens a large TIFF lazily."""
    order = "<" if data[:2] == b"II" else ">"
    at = struct.unpack_from(order + "I", data, 4)[0]
    sides = {256: 0, 257: 0}
    for i in range(min(struct.unpack_from(order + "H", data, at)[0], 512)):
        tag, kind, _ = struct.unpack_from(order + "HHI", data, at + 2 + 12 * i)
        if tag in sides:
            sides[tag] = struct.unpack_from(order + ("H" if kind == 3 else "I"), data, at + 10 + 12 * i)[0]
    return Header("tiff", sides[257], sides[256])


# Name, reader, offset of the magic bytes, and those. Formats without a reader pass through: the engine may know them.
FORMATS: Final[tuple[tuple[str, Callable[[bytes], Header] | None, int, tuple[bytes, ...]], ...]] = (
    ("jpeg", _jpeg, 0, (b"\xff\xd8\xff",)),
    ("png", _png, 0, (b"\x89PNG\r\n\x1a\n",)),
    ("webp", _webp, 8, (b"WEBP",)),
    ("gif", _gif, 0, (b"GIF87a", b"GIF89a")),
    ("bmp", _bmp, 0, (b"BM",)),
    ("tiff", _tiff, 0, (b"II*\x00", b"MM\x00*")),
    ("bigtiff", None, 0, (b"II+\x00", b"MM\x00+")),
    ("heif", None, 4, (b"ftyp",)),  # AVIF, HEIC
    ("jpeg2000", None, 0, (b"\x00\x00\x00\x0cjP  \r\n", b"\xff\x4f\xff\x51")),
    ("pnm", None, 0, (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"Pf", b"PF")),
    ("qoi", None, 0, (b"qoif",)),
    ("psd", None, 0, (b"8BPS",)),
    ("dds", None, 0, (b"DDS ",)),
    ("icns", None, 0, (b"icns",)),
    ("ico", None, 0, (b"\x00\x00\x01\x00", b"\x00\x00\x02\x00")),
    ("sgi", None, 0, (b"\x01\xda",)),
    ("fits", None, 0, (b"SIMPLE  =",)),
)
MAGICS: Final = {name: magics for name, _, offset, magics in FORMATS if offset == 0}
DECODED_FORMATS: Final = frozenset(name for name, reader, *_ in FORMATS if reader)
