"""JPEGs decoded at a half, a quarter or an eighth of their size: `--images-decode fast`. The one step here that is not exact.

libjpeg shrinks by inverse transforms of fewer frequencies, which cost less and leave less to convert and to resize. Rules: only what
the fast decoders take as it stands, whose sides both divide evenly (else all of the image would be stretched by up to a pixel), and
never below MARGIN times the size that it is resized to. Sizes and grids are still those of the whole image. Whatever goes wrong here is not
the image's fault yet: the exact way decides. Errors and times: benchmarks/fast.py, docs/images.md.
"""

from __future__ import annotations

import io
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sidecar.images.file_headers import Header
from sidecar.images.protocol import Limits
from sidecar.images.worker.decode import check_size, orientation, turn, turned
from sidecar.kernels.grid import Geometry, ProcessorSpec, Size

BY: Final = (
    8,
    4,
    2,
)  # Pillow's; libjpeg-turbo's other transforms have no vectors: 6/8 takes 1.5 times as long as the whole image
# Photographs of 2 megapixels, resized from there: 40 to 41 dB at a margin of 1, 42 to 45 at 1.5, 46 to 48 at 2, where an image of 12
# megapixels would not be shrunk for Qwen's 1 megapixel any more.
MARGIN: Final = 1.5


def fraction(own: Size, target: Size) -> int:
    """1, 2, 4 or 8: by how much an image of its `own` size may be shrunk while it is decoded, before it is resized to `target`."""
    sides = list(zip(own, target, strict=True))
    return next((by for by in BY if all(a % by == 0 and a // by >= MARGIN * b for a, b in sides)), 1)


def target(geometry: Geometry) -> Size:
    """The longest that each side becomes in any of the steps."""
    views = [size for view in geometry.views for size in (*view.before, view.size)]
    heights, widths = zip((geometry.height, geometry.width), *views, strict=True)
    return max(heights), max(widths)


def decode(data: bytes, header: Header, limits: Limits, spec: ProcessorSpec) -> tuple[Tensor, Size] | None:
    """The pixels of a shrunk image as decode.decode gives those of the whole one, and the whole one's height and width.

    None where it is not to be shrunk, or cannot be decoded so. Raises BadPixels for a size over a limit.
    """
    if header.format != "jpeg" or not header.plain:
        return None
    check_size(header.height, header.width, limits)
    how = orientation(data) if header.tagged else 1
    own = turned(header.height, header.width, how)
    try:
        by = fraction(own, target(spec.geometry(*own)))
    except ValueError:
        return None
    pixels = pillow(data, header, by) if by > 1 else None
    return (turn(pixels, how), own) if pixels is not None else None


def pillow(data: bytes, header: Header, by: int) -> Tensor | None:
    """The pixels as they are stored, at this fraction of their size; None where Pillow refuses."""
    height, width = header.height // by, header.width // by
    try:
        image: Any = Image.open(io.BytesIO(data), formats=("JPEG",))
        image.draft(None, (width, height))
        image.load()
        rows = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001  a hostile file can raise anything in a decoder
        return None
    return torch.from_numpy(rows).permute(2, 0, 1) if rows.shape == (height, width, 3) else None
