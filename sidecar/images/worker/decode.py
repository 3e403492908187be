"""Decode image bytes to the RGB pixels that the engine would have seen, or raise ImageRejected with a reason.

Rules: the size is checked on the header before anything is allocated. What is put behind transparent parts follows
from settings and versions of the engine: an image whose place is to be taken is refused for them, any other is put on
white, as by vLLM 0.33 and transformers 5.23. Plain JPEGs go through simplejpeg, whose pixels equal Pillow's bit for bit
in two thirds of the time: both are libjpeg-turbo, but Pillow keeps four bytes a pixel. Everything else, and what
simplejpeg refuses or warns of, goes through Pillow in the engine's own order (vLLM's
ImageMediaIO): rotate by EXIF or XMP, load, flatten alpha on white, convert to RGB.

Pixels are contiguous uint8 arrays (height, width, 3).
"""

from __future__ import annotations

import contextlib
import io
from typing import Any, Final

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, ImageOps

from sidecar.images.file_headers import Header
from sidecar.images.protocol import ImageLimits

try:
    import simplejpeg
except ImportError:  # it is optional: a Python for which it has no wheel yet
    simplejpeg = None

Pixels = NDArray[np.uint8]


def formats(version: str) -> tuple[str, ...]:
    """What this version of Pillow is used for.

    Before 13.0 it reads beyond the tiles of a damaged TIFF and shows what lies there, which may be another tenant's
    image (GHSA-462x-pgg6-55fp), and decodes a BMP's run lengths otherwise than engines, whose Pillow is newer.
    """
    newer = ("BMP", "TIFF") if int(version.partition(".")[0]) >= SAFE_PILLOW else ()
    return ("JPEG", "PNG", "WEBP", "GIF", *newer)


SAFE_PILLOW: Final = 13
FORMATS: Final = formats(PIL.__version__)
OPAQUE: Final = 255
ORIENTATION: Final = 0x0112
TRANSPOSED: Final = range(5, 9)  # orientations that swap rows and columns
FLIPS: Final[dict[int, int | tuple[int, int]]] = {
    2: 1,
    3: (0, 1),
    4: 0,
    6: 1,
    7: (0, 1),
    8: 0,
}  # orientation -> axes that are flipped then


class ImageRejected(Exception):
    """An image is refused. `reason` is its code; the message never quotes the image."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def decode(data: bytes, header: Header, limits: ImageLimits, *, flatten: bool = True) -> Pixels:
    """The pixels of one image. Raises ImageRejected, also for one with transparent parts unless `flatten`."""
    check_size(header.height, header.width, limits)
    if header.plain and simplejpeg is not None and (pixels := _fast(data, header)) is not None:
        return turn(pixels, orientation(data)) if header.tagged else pixels
    return _pillow(data, limits, flatten=flatten)


def check_size(height: int, width: int, limits: ImageLimits) -> None:
    """Raise ImageRejected for a size over a limit. A size of 0 x 0 is not known yet and passes."""
    if height * width > limits.max_pixels:
        text = f"it has {width} x {height} pixels and the limit is {limits.max_pixels} pixels"
        raise ImageRejected("image_too_many_pixels", text)
    if max(height, width) > limits.max_side:
        text = f"a side has {max(height, width)} pixels and the limit is {limits.max_side}"
        raise ImageRejected("image_too_long", text)


def orientation(data: bytes) -> int:
    """1..8: the orientation that Pillow's exif_transpose applies, which also depends on whether it can edit it."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as opened:
            stand_in = Image.new("L", (1, 1))
            stand_in.info = dict(opened.info)
        ImageOps.exif_transpose(stand_in)
        return int(stand_in.getexif().get(ORIENTATION, 1))
    except Exception:  # noqa: BLE001  like the engine: an image with broken metadata is not rotated
        return 1


def _fast(data: bytes, header: Header) -> Pixels | None:
    """Decode a JPEG by simplejpeg; None if it refuses, or if libjpeg-turbo warns: Pillow then decides."""
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False)
    except ValueError:
        return None
    return pixels if pixels.shape == (header.height, header.width, 3) else None


def turn(pixels: Pixels, how: int) -> Pixels:
    """Rotate pixels by an EXIF orientation: a transposition, then flips of the axes."""
    turned = pixels.swapaxes(0, 1) if how in TRANSPOSED else pixels
    return np.ascontiguousarray(np.flip(turned, FLIPS[how]) if how in FLIPS else turned)


def turned(height: int, width: int, how: int) -> tuple[int, int]:
    """The size of an image of this size after it is rotated."""
    return (width, height) if how in TRANSPOSED else (height, width)


def _pillow(data: bytes, limits: ImageLimits, *, flatten: bool = True) -> Pixels:
    try:
        image: Any = Image.open(io.BytesIO(data), formats=FORMATS)
        check_size(image.height, image.width, limits)
        with contextlib.suppress(Exception):
            image = ImageOps.exif_transpose(image)
        image.load()
        return np.asarray(_as_rgb(image, flatten=flatten))
    except (ImageRejected, MemoryError):
        raise
    except Exception:  # noqa: BLE001  a hostile file can raise anything in a decoder
        raise ImageRejected("image_broken", "it is cut off or damaged") from None


def _as_rgb(image: Any, *, flatten: bool) -> Any:
    """An opened image in RGB, put on white. Raises ImageRejected for one with transparent parts unless `flatten`."""
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return image if image.mode == "RGB" else image.convert("RGB")
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    if not flatten and rgba.getchannel("A").getextrema()[0] < OPAQUE:
        raise ImageRejected("image_transparent", "it has transparent parts")
    flat = Image.new("RGB", rgba.size, "white")
    flat.paste(rgba, mask=rgba.getchannel("A"))
    return flat
