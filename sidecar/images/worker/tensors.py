"""Process pixels as the model's processor does, bit for bit as its torchvision backend on the CPU.

Rules: pixels are contiguous uint8 arrays (height, width, 3). The compiled kernel resizes, normalises and lays out in
one pass. What it does not lay out is done in numpy, by the processor's own operations in its own order, so that floats
round alike. Values in bfloat16, which numpy does not have, are their bits as uint16.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sidecar.kernels import fused
from sidecar.kernels.grid import Geometry, ImageView, PatchSpec, ProcessorSpec

Pixels = NDArray[np.uint8]
Values = NDArray[Any]

KERNEL_KINDS: Final[dict[str, fused.Kind]] = {"U8": "uint8", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def resize(pixels: Pixels, geometry: Geometry, spec: ProcessorSpec) -> Pixels:
    """The pixels in the geometry's final size; the same array if they have that size."""
    size = geometry.height, geometry.width
    resized = pixels if pixels.shape[:2] == size else fused.resize(pixels, *size, spec.resample)
    if geometry.crop is None:
        return resized
    top, left, height, width = geometry.crop
    return np.ascontiguousarray(resized[top : top + height, left : left + width])


def prepare(pixels: Pixels, geometry: Geometry, spec: ProcessorSpec, into: memoryview | None = None) -> Values:
    """`pixel_values` of an image in its own size: its patches, or its planes (3, height, width).

    `into`: memory of exactly their bytes, which patches are written to in the same pass; planes ignore it.
    """
    kind = KERNEL_KINDS[spec.dtype]
    if isinstance(spec, PatchSpec):
        memory = None if into is None else np.frombuffer(into, np.uint8)
        return fused.patches(pixels, geometry, spec, kind, into=memory)
    source = pixels if geometry.crop is None else resize(pixels, geometry, spec)
    out = np.empty((3, *geometry.size), fused.KINDS[kind][1])
    fused.tiles(source, ImageView(geometry.size, geometry.size, geometry.size), spec, kind, out)
    return out


def resized_ppm(pixels: Pixels, geometry: Geometry, spec: ProcessorSpec) -> memoryview:
    """`ppm(resize(...))`, resized directly into the file if there is no crop."""
    size = geometry.height, geometry.width
    if geometry.crop is not None or pixels.shape[:2] == size:
        return ppm(resize(pixels, geometry, spec))
    file, body = _empty_ppm(*size)
    fused.resize(pixels, *size, spec.resample, out=body)
    return file


def ppm(pixels: Pixels) -> memoryview:
    """A binary PPM (P6): a header and the plain pixels. Pillow reads it in 1 ms; BMP would swap the channels."""
    height, width = pixels.shape[:2]
    file, body = _empty_ppm(height, width)
    body[:] = pixels
    return file


def _empty_ppm(height: int, width: int) -> tuple[memoryview, Pixels]:
    """A PPM with only its header written, and a view of its pixels (height, width, 3)."""
    header = b"P6\n%d %d\n255\n" % (width, height)
    file = np.empty(len(header) + 3 * height * width, np.uint8)
    file[: len(header)] = np.frombuffer(header, np.uint8)
    return file.data, file[len(header) :].reshape(height, width, 3)


def normalise(planes: Pixels, spec: ProcessorSpec) -> Values:
    """Rescale and normalise uint8 (3, height, width) to float32; uint8 if the processor does neither."""
    if not spec.floats:
        return planes
    floats = planes.astype(np.float32)
    if not spec.do_normalize:
        floats *= np.float32(spec.rescale_factor)
        return floats
    # as float32 before they are multiplied: the processor's tensors are
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (spec.image_mean, spec.image_std))
    if spec.do_rescale:
        mean, std = mean * np.float32(1.0 / spec.rescale_factor), std * np.float32(1.0 / spec.rescale_factor)
    floats -= mean
    floats /= std
    return floats


def table(spec: ProcessorSpec) -> NDArray[np.float32]:
    """The value of each byte of each channel: float32 (3, 256)."""
    levels = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))
    return normalise(levels, spec).astype(np.float32).reshape(3, 256)


def round_to(made: Values, dtype: str) -> Values:
    """float32 values as BF16 or F16, to the nearest, ties to even; others as they are."""
    if made.dtype != np.float32 or dtype not in ("BF16", "F16"):
        return made
    return made.astype(np.float16) if dtype == "F16" else to_bfloat16(made)


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of finite values as bfloat16, to the nearest, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + ((bits >> np.uint32(16) & np.uint32(1)) + np.uint32(0x7FFF))) >> np.uint32(16)).astype(np.uint16)


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Inverse of to_bfloat16."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
