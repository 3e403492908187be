"""Make the tiles or patches of several views of an image, bit for bit as the processor's torchvision backend.

Rules: as in tensors.py. Each view is resized in uint8, placed on a canvas of zeros if it has one, cut, and only then
rescaled and normalised. That is the processors' own order: padding gets the value of black, not 0.
"""

from __future__ import annotations

from itertools import product
from typing import Final, Literal

import torch
from torch import Tensor

from sidecar.images.worker.tensors import normalise, resize
from sidecar.kernels import fused
from sidecar.kernels.grid import ROWS, TILES, Geometry, ImageView, ProcessorSpec, Size, TileSpec

DTYPES: Final = {"F32": torch.float32, "BF16": torch.bfloat16, "U8": torch.uint8}
KERNEL_KINDS: Final[dict[str, Literal["uint8", "float32"]]] = {"F32": "float32", "U8": "uint8"}
MAX_VECTOR_TILE: Final = 16  # side of the largest tile that the compiled kernel lays out with vectors
SMALL_TILE_PIXELS: Final = 1 << 12  # a tile of fewer is not worth a separate step


def prepare(pixels: Tensor, geometry: Geometry, spec: TileSpec) -> Tensor:
    """The values of one image, uint8 (3, height, width), in the order of `pixel_values`: all its views."""
    resized_by_steps: dict[tuple[Size, ...], Tensor] = {(): pixels}
    if spec.layout == TILES:
        return _tiles(resized_by_steps, geometry, spec)
    lay = _rows if spec.layout == ROWS else _strips
    made = [lay(canvas(resized_by_steps, view, spec), view, spec) for view in geometry.views]
    return made[0] if len(made) == 1 else torch.cat(made, dim=-1)


def _resized(resized_by_steps: dict[tuple[Size, ...], Tensor], steps: tuple[Size, ...], spec: ProcessorSpec) -> Tensor:
    """uint8 (3, height, width) after resizing by `steps`; `resized_by_steps` memoises each intermediate result."""
    if steps not in resized_by_steps:
        resized_by_steps[steps] = resize(_resized(resized_by_steps, steps[:-1], spec), Geometry(*steps[-1]), spec)
    return resized_by_steps[steps]


def canvas(resized_by_steps: dict[tuple[Size, ...], Tensor], view: ImageView, spec: ProcessorSpec) -> Tensor:
    """uint8 (height, width, 3), contiguous: the resized image on its canvas."""
    height, width = view.size
    resized = _resized(resized_by_steps, (*view.before, view.size), spec).permute(1, 2, 0)
    if view.canvas == view.size:
        return resized.contiguous()
    black = torch.zeros((*view.canvas, 3), dtype=torch.uint8)
    black[view.top : view.top + height, view.left : view.left + width] = resized
    return black


def _tiles(resized_by_steps: dict[tuple[Size, ...], Tensor], geometry: Geometry, spec: TileSpec) -> Tensor:
    """(tiles, 3, height, width)."""
    first = geometry.views[0]
    height, width = first.tile
    kind = None if fused.missing() else KERNEL_KINDS.get(spec.dtype)
    if kind and len(geometry.views) == 1 and height == width <= MAX_VECTOR_TILE:
        made = fused.cut(canvas(resized_by_steps, first, spec).numpy(), first.canvas, (height, 1, 1), spec, kind)
        return torch.from_numpy(made).view(-1, 3, height, width)
    out = torch.empty((geometry.tiles, 3, height, width), dtype=DTYPES[spec.dtype])
    at = 0
    for view in geometry.views:
        part = out[at : at + view.tiles]
        if kind:
            steps = (*view.before, view.size)
            # a result that another view starts from is made once
            is_shared = any(v.before[: len(steps)] == steps for v in geometry.views)
            source = _resized(resized_by_steps, steps if is_shared else view.before, spec).permute(1, 2, 0).contiguous()
            fused.tiles(source.numpy(), view, spec, kind, part.numpy())
        else:
            cut(canvas(resized_by_steps, view, spec), view, spec, part)
        at += view.tiles
    return out


def cut(canvas: Tensor, view: ImageView, spec: TileSpec, out: Tensor) -> None:
    """Cut a canvas into `out`; large tiles one by one, while each is in the caches."""
    tiles = _cut(canvas, view.tile).permute(0, 2, 4, 1, 3)
    to = out.view(*view.grid, 3, *view.tile)
    if view.tile[0] * view.tile[1] < SMALL_TILE_PIXELS:
        fill(to, tiles.contiguous(), spec)
        return
    for row, column in product(*map(range, view.grid)):
        fill(to[row, column], tiles[row, column].contiguous(), spec)


def _rows(canvas: Tensor, view: ImageView, spec: TileSpec) -> Tensor:
    """(tiles, height * width * 3)."""
    pixels = _cut(canvas, view.tile).permute(0, 2, 1, 3, 4).reshape(-1, 3)
    return normalise(pixels.t()[:, :, None], spec)[:, :, 0].t().reshape(view.tiles, -1)


def _strips(canvas: Tensor, view: ImageView, spec: TileSpec) -> Tensor:
    """(3, patch, patches * patch): the patches of each tile next to each other."""
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
