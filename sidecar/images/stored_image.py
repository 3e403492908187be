"""What an engine's image library sees of a file before it decodes it: its upright size, and whether it is plain RGB.

vLLM opens an image with Pillow, rotates it by EXIF or XMP, and converts what is not RGB. Both decide what it counts:
the rotation the number of tokens, the conversion the image's hash. Both stand in the file's header.

Rules: nothing is decoded and no length in the file is trusted. What the header does not say for certain raises
Unclear: formats whose header is not enough, two frames in a row, compressed metadata. Orientation is asked of Pillow by
the metadata alone, put on an image of one pixel, as Pillow rotates only if it can also edit the metadata.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from sidecar.images import file_headers

try:  # without it, an image with such metadata is unclear
    from PIL import Image, ImageOps
except ImportError:
    Image = None

MAX_CHUNKS: Final = 10_000  # of a PNG or WebP file; each costs 0.3 µs
MAX_METADATA_BYTES: Final = 1 << 20
ORIENTATION: Final = 0x0112
TRANSPOSED: Final = range(5, 9)  # orientations that swap rows and columns


class Unclear(Exception):
    """The header does not say for certain what the engine would see. The message says why and quotes nothing."""


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image by its header: its size once rotated, and whether it needs no conversion to be RGB."""

    format: str
    height: int
    width: int
    is_rgb: bool


@dataclass(slots=True)
class _Metadata:
    """What may hold an orientation: EXIF, and XMP as Pillow finds it."""

    exif: bytes = b""
    xmp: bytes = b""

    def add(self, exif: bytes = b"", xmp: bytes = b"") -> None:
        if len(self.exif) + len(self.xmp) + len(exif) + len(xmp) > MAX_METADATA_BYTES:
            raise Unclear("its metadata is longer than 1 MiB")
        self.exif, self.xmp = self.exif + exif, xmp or self.xmp


def read(data: bytes) -> StoredImage:
    """The image in a file. Raises Unclear."""
    header = file_headers.read(data)
    reader = READERS.get(header.format) if header is not None else None
    if header is None or reader is None:
        raise Unclear("its format is not one whose header is enough: JPEG, PNG or WebP")
    metadata = _Metadata()
    try:
        is_rgb = reader(data, metadata)
    except (struct.error, IndexError):
        raise Unclear("its header is cut off") from None
    if not header.height or not header.width:
        raise Unclear("its header has no size")
    height, width = header.height, header.width
    if _is_transposed(metadata):
        height, width = width, height
    return StoredImage(header.format, height, width, is_rgb)


def _is_transposed(metadata: _Metadata) -> bool:
    if not metadata.exif and not metadata.xmp:
        return False
    if Image is None:
        raise Unclear("it has EXIF or XMP metadata, which needs Pillow: pip install 'inference-sidecar[render]'")
    try:
        stand_in = Image.new("L", (1, 1))
        found = {"exif": metadata.exif, "xmp": metadata.xmp}
        stand_in.info = {name: value for name, value in found.items() if value}
        ImageOps.exif_transpose(stand_in)
        return stand_in.getexif().get(ORIENTATION, 1) in TRANSPOSED
    except Exception:  # noqa: BLE001  like the engine: an image with broken metadata is not rotated
        return False


def _jpeg(data: bytes, metadata: _Metadata) -> bool:
    components = None
    for marker, at in file_headers.segments(data):
        body = data[at : at + struct.unpack_from("!H", data, at - 2)[0] - 2]
        if marker in file_headers.FRAMES:
            if components is not None or marker not in file_headers.HUFFMAN_FRAMES or body[0] != 8:
                raise Unclear("its JPEG frame is of a rare kind")
            components = body[5]
        elif marker == file_headers.APP1 and body.startswith(EXIF):
            metadata.add(exif=body[len(EXIF) :] if metadata.exif else body)
        elif marker == file_headers.APP1 and body.startswith(XMP):
            metadata.add(xmp=body[len(XMP) :])
        elif marker == file_headers.SCAN:
            if components not in (1, 3, 4):
                break
            return components == 3
    raise Unclear("its header is cut off or damaged")


def _png(data: bytes, metadata: _Metadata) -> bool:
    if data[8:16] != b"\0\0\0\rIHDR":
        raise Unclear("its PNG header is damaged")
    bits, colour = data[24], data[25]
    if colour not in PNG_BITS or bits not in PNG_BITS[colour]:
        raise Unclear("its PNG header is damaged")
    at = 8
    for _ in range(MAX_CHUNKS):
        if at + 12 > len(data):
            raise Unclear("its last chunk is missing")
        size, name = struct.unpack_from("!I4s", data, at)
        body = at + 8
        if name == b"eXIf":
            metadata.add(exif=EXIF + _within(data, body, size))
        elif name in (b"tEXt", b"zTXt", b"iTXt"):
            _png_text(name, data[body : body + min(size, MAX_METADATA_BYTES)], metadata)
        elif name == b"IEND":
            return colour == PNG_RGB
        at = body + size + 4
    raise Unclear("it has too many chunks")


def _png_text(name: bytes, text: bytes, metadata: _Metadata) -> None:
    """Metadata in a chunk of text: XMP that is not compressed; what is, or is EXIF as text, is unclear."""
    key, _, rest = text.partition(b"\0")
    if key == b"Raw profile type exif":
        raise Unclear("its EXIF is compressed or text")
    if key in (b"XML:com.adobe.xmp", b"xmp"):
        if name != b"iTXt" or rest[:1] != b"\0":
            raise Unclear("its XMP is compressed")
        metadata.add(xmp=rest[2:].split(b"\0", 2)[-1])


def _webp(data: bytes, metadata: _Metadata) -> bool:
    kind = data[12:16]
    if kind == b"VP8 ":
        return True
    if kind == b"VP8L":
        return not struct.unpack_from("<I", data, 21)[0] >> 28 & 1
    if kind != b"VP8X":
        raise Unclear("its WebP header is damaged")
    flags, at = data[20], 12
    wanted = {b"EXIF": bool(flags & 0x08), b"XMP ": bool(flags & 0x04)}
    for _ in range(MAX_CHUNKS):
        if at + 8 > len(data):
            break
        name, size = struct.unpack_from("<4sI", data, at)
        if wanted.get(name):
            wanted[name] = False  # the first of each
            content = _within(data, at + 8, size)
            metadata.add(**{"exif" if name == b"EXIF" else "xmp": content})
        at += 8 + size + size % 2
    return not flags & 0x10


def _within(data: bytes, at: int, size: int) -> bytes:
    if size > MAX_METADATA_BYTES or at + size > len(data):
        raise Unclear("its metadata is cut off or longer than 1 MiB")
    return data[at : at + size]


EXIF: Final = b"Exif\0\0"
XMP: Final = b"http://ns.adobe.com/xap/1.0/\0"
PNG_RGB: Final = 2
PNG_BITS: Final = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  # by colour type
READERS: Final = {"jpeg": _jpeg, "png": _png, "webp": _webp}
