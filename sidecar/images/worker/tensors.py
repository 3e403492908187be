"""Pixels -> what the model's processor makes of them, bit for bit as the torchvision backend does on the CPU.

Rules: uint8 through the antialiased integer resize; memory stays (height, width, channel), which is 2-4 times faster than
planes; floats come from the processor's own operations in its own order, so that they round alike. The compiled kernel does
it in one pass; where it was not built, torchvision and torch do it in several, with the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from sidecar.kernels import fused
from sidecar.kernels.grid import BILINEAR, LANCZOS, Geometry, ImageView, PatchSpec, ProcessorSpec

HALF_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16}
KERNEL_KINDS: dict[str, fused.Kind] = {"U8": "uint8", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
INTERPOLATION_MODES = {BILINEAR: InterpolationMode.BILINEAR, LANCZOS: InterpolationMode.LANCZOS}


def resize(pixels: Tensor, geometry: Geometry, spec: ProcessorSpec) -> Tensor:
    """uint8 (3, height, width) in the geometry's final size; the same tensor where it has that size."""
    if fused.missing() or tuple(pixels.shape[-2:]) == (geometry.height, geometry.width):
        return crop(by_torchvision(pixels, geometry, spec), geometry)
    resized = fused.resize(_rows(pixels), geometry.height, geometry.width, spec.resample)
    return crop(torch.from_numpy(resized).permute(2, 0, 1), geometry)


def prepare(pixels: Tensor, geometry: Geometry, spec: ProcessorSpec) -> Tensor:
    """`pixel_values` of an image in its own size, uint8 (3, height, width): see `values`."""
    if fused.missing() or not (isinstance(spec, PatchSpec) or geometry.crop is None):
        return round_to_half(values(resize(pixels, geometry, spec), geometry, spec), spec)
    if not isinstance(spec, PatchSpec):
        out = torch.empty((3, *geometry.size), dtype=torch.float32 if spec.floats else torch.uint8)
        view = ImageView(geometry.size, geometry.size, geometry.size)
        fused.tiles(_rows(pixels), view, spec, "float32" if spec.floats else "uint8", out.numpy())
        return round_to_half(out, spec)
    made = torch.from_numpy(fused.patches(_rows(pixels), geometry, spec, KERNEL_KINDS[spec.dtype]))
    return made.view(torch.bfloat16) if spec.dtype == "BF16" else made


def round_to_half(made: Tensor, spec: ProcessorSpec) -> Tensor:
    """Values in half precision where `spec` wants that: to the nearest, ties to even."""
    return made.to(HALF_DTYPES[spec.half]) if spec.half else made


def values(pixels: Tensor, geometry: Geometry, spec: ProcessorSpec) -> Tensor:
    """`pixel_values` of one resized image: its patches, or its planes (3, height, width)."""
    if isinstance(spec, PatchSpec):
        return patches(pixels, geometry, spec)
    return normalise(pixels, spec).contiguous()


def crop(pixels: Tensor, geometry: Geometry) -> Tensor:
    """The part of a resized image that the model sees."""
    if geometry.crop is None:
        return pixels
    top, left, height, width = geometry.crop
    return pixels[:, top : top + height, left : left + width]


def _rows(pixels: Tensor) -> Any:
    """(3, height, width) as contiguous (height, width, 3); no copy where memory lies so already."""
    return pixels.permute(1, 2, 0).contiguous().numpy()


def by_torchvision(pixels: Tensor, geometry: Geometry, spec: ProcessorSpec) -> Tensor:
    """uint8 (3, height, width) or (n, 3, height, width) on any device in the geometry's size before it is cut. Exact on the CPU."""
    if tuple(pixels.shape[-2:]) == (geometry.height, geometry.width):
        return pixels
    mode = INTERPOLATION_MODES.get(spec.resample, InterpolationMode.BICUBIC)
    if pixels.ndim == 3:
        pixels = pixels.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return tvf.resize(pixels, [geometry.height, geometry.width], interpolation=mode, antialias=True)


def resized_ppm(pixels: Tensor, geometry: Geometry, spec: ProcessorSpec) -> memoryview:
    """`ppm(resize(...))`, resized straight into the file where nothing is cut off."""
    size = geometry.height, geometry.width
    if fused.missing() or geometry.crop is not None or tuple(pixels.shape[-2:]) == size:
        return ppm(resize(pixels, geometry, spec))
    file, body = _empty_ppm(*size)
    fused.resize(_rows(pixels), *size, spec.resample, out=body)
    return file


def ppm(pixels: Tensor) -> memoryview:
    """A binary PPM (P6): a header and the pixels as they are. Pillow reads it in 1 ms, and BMP would swap the channels."""
    height, width = pixels.shape[-2:]
    file, body = _empty_ppm(height, width)
    torch.from_numpy(body).copy_(pixels.permute(1, 2, 0))
    return file


def _empty_ppm(height: int, width: int) -> tuple[memoryview, Any]:
    """A PPM of which only the header is written, and its pixels (height, width, 3)."""
    header = b"P6\n%d %d\n255\n" % (width, height)
    file = np.empty(len(header) + 3 * height * width, np.uint8)
    file[: len(header)] = np.frombuffer(header, np.uint8)
    return file.data, file[len(header) :].reshape(height, width, 3)


def normalise(pixels: Tensor, spec: ProcessorSpec) -> Tensor:
    """Rescaled and normalised floats of uint8 (3, height, width); uint8 where the processor does neither."""
    if not spec.do_normalize:
        return pixels * spec.rescale_factor if spec.do_rescale else pixels
    mean, std = (torch.tensor(v, dtype=torch.float32, device=pixels.device) for v in (spec.image_mean, spec.image_std))
    if spec.do_rescale:
        mean, std = mean * (1.0 / spec.rescale_factor), std * (1.0 / spec.rescale_factor)
    # planes of bytes first: turning rows of RGB and widening them at once takes three times as long
    floats: Any = pixels.contiguous().to(torch.float32)
    return floats.sub_(mean[:, None, None]).div_(std[:, None, None])


def table(spec: ProcessorSpec) -> Tensor:
    """What each byte of each channel becomes: float32 (3, 256)."""
    levels = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
    return normalise(levels, spec).to(torch.float32).reshape(3, 256)


def patches(pixels: Tensor, geometry: Geometry, spec: PatchSpec) -> Tensor:
    """`pixel_values` of one image: (grid_h * grid_w, 3 * temporal * patch * patch), patches that merge beside each other."""
    p, m, t = spec.patch_size, spec.merge_size, spec.temporal_patch_size
    values = normalise(pixels, spec)
    # contiguous planes first: whole rows of a patch are then copied at once
    blocks = values.contiguous().view(3, geometry.grid_h // m, m, p, geometry.grid_w // m, m, p)
    ordered = blocks.permute(1, 4, 2, 5, 0, 3, 6).unsqueeze(5)
    return ordered.expand(-1, -1, -1, -1, -1, t, -1, -1).reshape(-1, 3 * t * p * p)
