"""What torch and torchvision make of an image, as Hugging Face's processors do: the bits that workers must give.

Pixels are uint8 tensors of shape (3, height, width) over memory in (height, width, 3) order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torchvision.io.image  # noqa: F401  registers torch.ops.image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from sidecar.kernels.grid import BILINEAR, LANCZOS, Geometry, ImageView, PatchSpec, ProcessorSpec

RGB = 3  # ImageReadMode.RGB
MODES = {BILINEAR: InterpolationMode.BILINEAR, LANCZOS: InterpolationMode.LANCZOS}
DTYPES = {"U8": torch.uint8, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def planes(rows: Any) -> Tensor:
    """(height, width, 3) in numpy as (3, height, width)."""
    return torch.from_numpy(rows).permute(2, 0, 1)


def rows(pixels: Tensor) -> np.ndarray[Any, Any]:
    """(3, height, width) as contiguous (height, width, 3) in numpy."""
    return pixels.permute(1, 2, 0).contiguous().numpy()


def tensor(made: np.ndarray[Any, Any], dtype: str) -> Tensor:
    """An array of a worker as a tensor of this safetensors dtype: numpy has no bfloat16, so its bits come as uint16."""
    return torch.from_numpy(made).view(DTYPES[dtype])


def decode(data: bytes, format: str) -> Tensor | None:
    """torchvision's decoder; None if it refuses."""
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    try:
        pixels: Tensor = getattr(torch.ops.image, "decode_" + format)(encoded, RGB)
    except RuntimeError:
        return None
    return pixels


def resize(pixels: Tensor, geometry: Geometry, spec: ProcessorSpec) -> Tensor:
    """Resized by ATen's antialiased uint8 path, before any crop; on any device, exact on the CPU."""
    if tuple(pixels.shape[-2:]) == (geometry.height, geometry.width):
        return pixels
    mode = MODES.get(spec.resample, InterpolationMode.BICUBIC)
    if pixels.ndim == 3:
        pixels = pixels.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return tvf.resize(pixels, [geometry.height, geometry.width], interpolation=mode, antialias=True)


def crop(pixels: Tensor, geometry: Geometry) -> Tensor:
    """The part of a resized image that the model sees."""
    if geometry.crop is None:
        return pixels
    top, left, height, width = geometry.crop
    return pixels[:, top : top + height, left : left + width]


def normalise(pixels: Tensor, spec: ProcessorSpec) -> Tensor:
    """Rescaled and normalised by the processor's own operations; uint8 if it does neither."""
    if not spec.do_normalize:
        return pixels * spec.rescale_factor if spec.do_rescale else pixels
    mean, std = (torch.tensor(v, dtype=torch.float32, device=pixels.device) for v in (spec.image_mean, spec.image_std))
    if spec.do_rescale:
        mean, std = mean * (1.0 / spec.rescale_factor), std * (1.0 / spec.rescale_factor)
    # planes of bytes first: permuting and widening at once takes three times as long
    floats: Any = pixels.contiguous().to(torch.float32)
    return floats.sub_(mean[:, None, None]).div_(std[:, None, None])


def patches(pixels: Tensor, geometry: Geometry, spec: PatchSpec) -> Tensor:
    """`pixel_values` of one resized image, (grid_h * grid_w, 3 * temporal * patch * patch), in merged blocks."""
    p, m, t = spec.patch_size, spec.merge_size, spec.temporal_patch_size
    values = normalise(pixels, spec)
    # contiguous planes first: whole rows of a patch are then copied at once
    blocks = values.contiguous().view(3, geometry.grid_h // m, m, p, geometry.grid_w // m, m, p)
    ordered = blocks.permute(1, 4, 2, 5, 0, 3, 6).unsqueeze(5)
    return ordered.expand(-1, -1, -1, -1, -1, t, -1, -1).reshape(-1, 3 * t * p * p)


def values(pixels: Tensor, geometry: Geometry, spec: ProcessorSpec) -> Tensor:
    """`pixel_values` of an image in its own size: patches, or planes (3, height, width)."""
    resized = crop(resize(pixels, geometry, spec), geometry)
    if isinstance(spec, PatchSpec):
        return patches(resized, geometry, spec)
    return normalise(resized, spec).contiguous()


def tiles(pixels: Tensor, view: ImageView, spec: ProcessorSpec) -> Tensor:
    """(tiles, 3, height, width) of one view: resized, on a canvas of zeros, cut, and then normalised."""
    black = torch.zeros((3, *view.canvas), dtype=torch.uint8)
    height, width = view.size
    black[:, view.top : view.top + height, view.left : view.left + width] = resize(pixels, Geometry(*view.size), spec)
    cut = black.view(3, view.grid[0], view.tile[0], view.grid[1], view.tile[1]).permute(1, 3, 0, 2, 4)
    return torch.stack([normalise(tile, spec) for tile in cut.reshape(-1, 3, *view.tile)])
