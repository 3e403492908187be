"""Process pixels as the model's processor does, bit for bit as its torchvision backend on the CPU.

Rules: uint8 goes through the antialiased integer resize. Memory stays (height, width, channel), which is 2-4 times
faster than planes. Floats come from the processor's own operations in its own order, so that they round alike. The
compiled kernel does all in one pass; without it, torchvision and torch give the same bits in several.
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
    """uint8 (3, height, width) in the geometry's final size; the same tensor if it has that size."""
    if fused.missing() or tuple(pixels.shape[-2:]) == (geometry.height, geometry.width):
        return crop(by_torchvision(pixels, geometry, spec), geometry)
    resized = fused.resize(_rows(pixels), geometry.height, geometry.width, spec.resample)
    return crop(torch.from_numpy(resized).permute(2, 0, 1), geometry)


def prepare(pixels: Tensor, geometry: Geometry, spec: ProcessorSpec, into: memoryview | None = None) -> Tensor:
    """`pixel_values` of an image in its own size, uint8 (3, height, width): see `values`.

    `into`: memory of exactly their bytes, which patches are written to in the same pass; other forms ignore it.
    """
    if fused.missing() or not (isinstance(spec, PatchSpec) or geometry.crop is None):
        return round_to_half(values(resize(pixels, geometry, spec), geometry, spec), spec)
    if not isinstance(spec, PatchSpec):
        out = torch.empty((3, *geometry.size), dtype=torch.float32 if spec.floats else torch.uint8)
        view = ImageView(geometry.size, geometry.size, geometry.size)
        fused.tiles(_rows(pixels), view, spec, "float32" if spec.floats else "uint8", out.numpy())
        return round_to_half(out, spec)
    memory = None if into is None else np.frombuffer(into, np.uint8)
    made = torch.from_numpy(fused.patches(_rows(pixels), geometry, spec, KERNEL_KINDS[spec.dtype], into=memory))
    return made.view(torch.bfloat16) if spec.dtype == "BF16" else made


def round_to_half(made: Tensor, spec: ProcessorSpec) -> Tensor:
    """Values in half precision if `spec` requires it: to the nearest, ties to even."""
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
    """(3, height, width) as contiguous (height, width, 3); no copy if memory has that order."""
    return pixels.permute(1, 2, 0).contiguous().numpy()


def by_torchvision(pixels: Tensor, geometry: Geometry, spec: ProcessorSpec) -> Tensor:
    """Resize uint8 (3, height, width) or (n, 3, height, width), on any device, before any crop. Exact on the CPU."""
    if tuple(pixels.shape[-2:]) == (geometry.height, geometry.width):
        return pixels
    mode = INTERPOLATION_MODES.get(spec.resample, InterpolationMode.BICUBIC)
    if pixels.ndim == 3:
        pixels = pixels.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return tvf.resize(pixels, [geometry.height, geometry.width], interpolation=mode, antialias=True)


def resized_ppm(pixels: Tensor, geometry: Geometry, spec: ProcessorSpec) -> memoryview:
    """`ppm(resize(...))`, resized directly into the file if there is no crop."""
    size = geometry.height, geometry.width
    if fused.missing() or geometry.crop is not None or tuple(pixels.shape[-2:]) == size:
        return ppm(resize(pixels, geometry, spec))
    file, body = _empty_ppm(*size)
    fused.resize(_rows(pixels), *size, spec.resample, out=body)
    return file


def ppm(pixels: Tensor) -> memoryview:
    """A binary PPM (P6): a header and the plain pixels. Pillow reads it in 1 ms; BMP would swap the channels."""
    height, width = pixels.shape[-2:]
    file, body = _empty_ppm(height, width)
    torch.from_numpy(body).copy_(pixels.permute(1, 2, 0))
    return file


def _empty_ppm(height: int, width: int) -> tuple[memoryview, Any]:
    """A PPM with only its header written, and a view of its pixels (height, width, 3)."""
    header = b"P6\n%d %d\n255\n" % (width, height)
    file = np.empty(len(header) + 3 * height * width, np.uint8)
    file[: len(header)] = np.frombuffer(header, np.uint8)
    return file.data, file[len(header) :].reshape(height, width, 3)


def normalise(pixels: Tensor, spec: ProcessorSpec) -> Tensor:
    """Rescale and normalise uint8 (3, height, width) to floats; uint8 if the processor does neither."""
    if not spec.do_normalize:
        return pixels * spec.rescale_factor if spec.do_rescale else pixels
    mean, std = (torch.tensor(v, dtype=torch.float32, device=pixels.device) for v in (spec.image_mean, spec.image_std))
    if spec.do_rescale:
        mean, std = mean * (1.0 / spec.rescale_factor), std * (1.0 / spec.rescale_factor)
    # planes of bytes first: permuting and widening at once takes three times as long
    floats: Any = pixels.contiguous().to(torch.float32)
    return floats.sub_(mean[:, None, None]).div_(std[:, None, None])


def table(spec: ProcessorSpec) -> Tensor:
    """The value of each byte of each channel: float32 (3, 256)."""
    levels = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
    return normalise(levels, spec).to(torch.float32).reshape(3, 256)


def patches(pixels: Tensor, geometry: Geometry, spec: PatchSpec) -> Tensor:
    """`pixel_values` of one image, (grid_h * grid_w, 3 * temporal * patch * patch), in the order of merged blocks."""
    p, m, t = spec.patch_size, spec.merge_size, spec.temporal_patch_size
    values = normalise(pixels, spec)
    # contiguous planes first: whole rows of a patch are then copied at once
    blocks = values.contiguous().view(3, geometry.grid_h // m, m, p, geometry.grid_w // m, m, p)
    ordered = blocks.permute(1, 4, 2, 5, 0, 3, 6).unsqueeze(5)
    return ordered.expand(-1, -1, -1, -1, -1, t, -1, -1).reshape(-1, 3 * t * p * p)
