"""Pixels -> the tiles or patches that a processor makes of several views of an image, bit for bit as the torchvision backend does.

Rules: as in patches.py. Each view is resized in uint8, laid on a canvas of zeros where it has one, cut, and only then rescaled and
normalised: that is the processors' own order, so that padding becomes what they make of black, and not 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sidecar.imaging.patches import normalise, resize
from sidecar.kernels.grid import ROWS, STRIPS, Geometry, ProcessorSpec, TileSpec, View


def prepare(pixels: Tensor, geometry: Geometry, spec: TileSpec) -> Tensor:
    """The values of one image, uint8 (3, height, width), as they lie in `pixel_values`: all its views, in their order."""
    cut = {ROWS: _rows, STRIPS: _strips}.get(spec.layout, _tiles)
    made = [cut(_canvas(pixels, view, spec), view, spec) for view in geometry.views]
    return made[0] if len(made) == 1 else torch.cat(made, dim=2 if spec.layout == STRIPS else 0)


def _canvas(pixels: Tensor, view: View, spec: ProcessorSpec) -> Tensor:
    """uint8 (height, width, 3), contiguous: the resized image at its place."""
    height, width = view.size
    resized = resize(pixels, Geometry(height, width), spec).permute(1, 2, 0)
    if view.canvas == view.size:
        return resized.contiguous()
    canvas = torch.zeros((*view.canvas, 3), dtype=torch.uint8)
    canvas[view.top : view.top + height, view.left : view.left + width] = resized
    return canvas


def _tiles(canvas: Tensor, view: View, spec: TileSpec) -> Tensor:
    """(tiles, 3, height, width)."""
    return values(_cut(canvas, view.tile).permute(0, 2, 4, 1, 3), spec).reshape(-1, 3, *view.tile)


def _rows(canvas: Tensor, view: View, spec: TileSpec) -> Tensor:
    """(tiles, height * width * 3)."""
    pixels = _cut(canvas, view.tile).permute(0, 2, 1, 3, 4).reshape(-1, 3)
    return values(pixels.t()[:, :, None], spec)[:, :, 0].t().reshape(view.tiles, -1)


def _strips(canvas: Tensor, view: View, spec: TileSpec) -> Tensor:
    """(3, patch, patches * patch): the patches of each tile side by side."""
    patch = spec.strip
    tiles = _cut(canvas, view.tile).permute(0, 2, 1, 3, 4)
    rows, columns, height, width, _ = tiles.shape
    patches = tiles.reshape(rows, columns, height // patch, patch, width // patch, patch, 3)
    return values(patches.permute(6, 3, 0, 1, 2, 4, 5).reshape(3, patch, -1), spec)


def _cut(canvas: Tensor, tile: tuple[int, int]) -> Tensor:
    """(rows, height, columns, width, 3) of a canvas."""
    height, width, _ = canvas.shape
    return canvas.view(height // tile[0], tile[0], width // tile[1], tile[1], 3)


def values(pixels: Tensor, spec: ProcessorSpec) -> Tensor:
    """uint8 (..., 3, height, width) rescaled and normalised, of the processor's type."""
    if spec.dtype != "BF16":
        return normalise(pixels, spec)
    halves = pixels.to(torch.bfloat16, memory_format=torch.contiguous_format) * spec.rescale_factor
    mean, std = (torch.tensor(v, dtype=torch.bfloat16)[:, None, None] for v in (spec.image_mean, spec.image_std))
    return halves.sub_(mean).div_(std)
