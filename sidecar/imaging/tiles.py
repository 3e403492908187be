"""Pixels -> the tiles or patches that a processor makes of several views of an image, bit for bit as the torchvision backend does.

Rules: as in patches.py. Each view is resized in uint8, laid on a canvas of zeros where it has one, cut, and only then rescaled and
normalised: that is the processors' own order, so that padding becomes what they make of black, and not 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Final

import torch
from torch import Tensor

from sidecar.imaging.patches import normalise, resize
from sidecar.kernels import fused
from sidecar.kernels.grid import ROWS, TILES, Geometry, ProcessorSpec, Size, TileSpec, View

KINDS: Final = {"F32": torch.float32, "BF16": torch.bfloat16, "U8": torch.uint8}
FEW: Final = 16  # pixels a side of the largest tile that the compiled kernel lays out with vectors
SMALL: Final = 1 << 12  # pixels of a tile that is not worth a step of its own


def prepare(pixels: Tensor, geometry: Geometry, spec: TileSpec) -> Tensor:
    """The values of one image, uint8 (3, height, width), as they lie in `pixel_values`: all its views, in their order."""
    known: dict[tuple[Size, ...], Tensor] = {(): pixels}
    canvases = ((_canvas(known, view, spec), view) for view in geometry.views)
    if spec.layout == TILES:
        tile = geometry.views[0].tile
        if len(geometry.views) == 1 and tile[0] == tile[1] <= FEW and spec.dtype != "BF16" and not fused.missing():
            return _patches(*next(canvases), spec)
        return _tiles(canvases, geometry, spec)
    cut = _rows if spec.layout == ROWS else _strips
    made = [cut(canvas, view, spec) for canvas, view in canvases]
    return made[0] if len(made) == 1 else torch.cat(made, dim=-1)


def _canvas(known: dict[tuple[Size, ...], Tensor], view: View, spec: ProcessorSpec) -> Tensor:
    """uint8 (height, width, 3), contiguous: the resized image at its place. `known`: what is there already, by the steps to it."""
    height, width = view.size
    for done, size in enumerate(steps := (*view.before, view.size)):
        if steps[: done + 1] not in known:
            known[steps[: done + 1]] = resize(known[steps[:done]], Geometry(*size), spec)
    resized = known[steps].permute(1, 2, 0)
    if view.canvas == view.size:
        return resized.contiguous()
    canvas = torch.zeros((*view.canvas, 3), dtype=torch.uint8)
    canvas[view.top : view.top + height, view.left : view.left + width] = resized
    return canvas


def _tiles(canvases: Iterable[tuple[Tensor, View]], geometry: Geometry, spec: TileSpec) -> Tensor:
    """(tiles, 3, height, width)."""
    height, width = geometry.views[0].tile
    out = torch.empty((geometry.tiles, 3, height, width), dtype=KINDS[spec.dtype])
    at = 0
    for canvas, view in canvases:
        some = out[at : at + view.tiles].view(*view.grid, 3, height, width)
        cut = _cut(canvas, view.tile).permute(0, 2, 4, 1, 3)
        if height * width < SMALL:
            fill(some, cut.contiguous(), spec)
        else:
            for row, column in product(*map(range, view.grid)):  # one is worked on while it is in the caches
                fill(some[row, column], cut[row, column].contiguous(), spec)
        at += view.tiles
    return out


def _patches(canvas: Tensor, view: View, spec: TileSpec) -> Tensor:
    """Tiles of a few pixels, as the compiled kernel cuts them."""
    kind: fused.Kind = "float32" if spec.floats else "uint8"
    made = fused.cut(canvas.numpy(), view.canvas, (view.tile[0], 1, 1), spec, kind)
    return torch.from_numpy(made).view(-1, 3, *view.tile)


def _rows(canvas: Tensor, view: View, spec: TileSpec) -> Tensor:
    """(tiles, height * width * 3)."""
    pixels = _cut(canvas, view.tile).permute(0, 2, 1, 3, 4).reshape(-1, 3)
    return normalise(pixels.t()[:, :, None], spec)[:, :, 0].t().reshape(view.tiles, -1)


def _strips(canvas: Tensor, view: View, spec: TileSpec) -> Tensor:
    """(3, patch, patches * patch): the patches of each tile side by side."""
    patch = spec.strip
    tiles = _cut(canvas, view.tile).permute(0, 2, 1, 3, 4)
    rows, columns, height, width, _ = tiles.shape
    patches = tiles.reshape(rows, columns, height // patch, patch, width // patch, patch, 3)
    return normalise(patches.permute(6, 3, 0, 1, 2, 4, 5).reshape(3, patch, -1), spec)


def _cut(canvas: Tensor, tile: tuple[int, int]) -> Tensor:
    """(rows, height, columns, width, 3) of a canvas."""
    height, width, _ = canvas.shape
    return canvas.view(height // tile[0], tile[0], width // tile[1], tile[1], 3)


def fill(out: Tensor, pixels: Tensor, spec: ProcessorSpec) -> None:
    """Rescale and normalise uint8 (3, height, width) into `out`, by the processor's own operations in its own order."""
    if not spec.do_normalize:
        out.copy_(pixels * spec.rescale_factor if spec.do_rescale else pixels)
        return
    mean, std = (torch.tensor(v, dtype=torch.float32)[:, None, None] for v in (spec.image_mean, spec.image_std))
    out.copy_(pixels)
    if out.dtype == torch.bfloat16:
        out.mul_(spec.rescale_factor)
        mean, std = mean.to(torch.bfloat16), std.to(torch.bfloat16)
    elif spec.do_rescale:
        mean, std = mean * (1.0 / spec.rescale_factor), std * (1.0 / spec.rescale_factor)
    out.sub_(mean).div_(std)
