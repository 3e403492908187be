"""Make the tiles or patches of several views of an image, bit for bit as the processor's torchvision backend.

Rules: as in tensors.py. Each view is resized in uint8, a part of it at a time where it has a box, placed on a canvas of
zeros if it has one, cut, and only then rescaled and normalised. That is the processors' own order: padding gets the
value of black, not 0. Rows of zeros that fill a view up come after that, and are 0.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from sidecar.images.worker.tensors import (
    KERNEL_KINDS,
    Pixels,
    Values,
    from_bfloat16,
    normalise,
    resize,
    round_to,
    to_bfloat16,
)
from sidecar.kernels import fused
from sidecar.kernels.grid import FILLED_ROWS, MIXED, ROWS, TILES, Geometry, ImageView, ProcessorSpec, Size, TileSpec

MAX_VECTOR_TILE: Final = 16  # side of the largest tile that the compiled kernel lays out with vectors


def prepare(pixels: Pixels, geometry: Geometry, spec: TileSpec) -> Values:
    """The values of one image, uint8 (height, width, 3), in the order of `pixel_values`: all its views."""
    resized_by_steps: dict[tuple[Size, ...], Pixels] = {(): _padded(pixels, geometry.padded)}
    if spec.layout == TILES:
        return _tiles(resized_by_steps, geometry.views, spec)
    if spec.layout == MIXED:
        return np.concatenate([_tiles(resized_by_steps, (view,), spec).reshape(-1) for view in geometry.views])
    if spec.layout == FILLED_ROWS:
        return round_to(_filled_rows(resized_by_steps, geometry.views, spec), spec.dtype)
    lay = _rows if spec.layout == ROWS else _strips
    made = [lay(canvas(resized_by_steps, view, spec), view, spec) for view in geometry.views]
    return round_to(made[0] if len(made) == 1 else np.concatenate(made, axis=-1), spec.dtype)


def _padded(pixels: Pixels, size: Size) -> Pixels:
    """The pixels with black below and right, up to `size`."""
    height, width = pixels.shape[:2]
    if size in ((0, 0), (height, width)):
        return pixels
    black = np.zeros((*size, 3), np.uint8)
    black[:height, :width] = pixels
    return black


def _resized(resized_by_steps: dict[tuple[Size, ...], Pixels], steps: tuple[Size, ...], spec: ProcessorSpec) -> Pixels:
    """The pixels after resizing by `steps`; `resized_by_steps` memoises each intermediate result."""
    if steps not in resized_by_steps:
        resized_by_steps[steps] = resize(_resized(resized_by_steps, steps[:-1], spec), Geometry(*steps[-1]), spec)
    return resized_by_steps[steps]


def _boxed(resized_by_steps: dict[tuple[Size, ...], Pixels], view: ImageView, spec: ProcessorSpec) -> Pixels:
    """What `view` is resized from: its box of the image as it was resized before."""
    source = _resized(resized_by_steps, view.before, spec)
    if view.box is None:
        return source
    top, left, height, width = view.box
    return np.ascontiguousarray(source[top : top + height, left : left + width])


def canvas(resized_by_steps: dict[tuple[Size, ...], Pixels], view: ImageView, spec: ProcessorSpec) -> Pixels:
    """uint8 (height, width, 3): the resized image on its canvas."""
    height, width = view.size
    if view.box is None:
        resized = _resized(resized_by_steps, (*view.before, view.size), spec)
    else:
        resized = resize(_boxed(resized_by_steps, view, spec), Geometry(*view.size), spec)
    if view.canvas == view.size:
        return resized
    black = np.zeros((*view.canvas, 3), np.uint8)
    black[view.top : view.top + height, view.left : view.left + width] = resized
    return black


def _tiles(resized_by_steps: dict[tuple[Size, ...], Pixels], views: tuple[ImageView, ...], spec: TileSpec) -> Values:
    """(tiles, 3, height, width), for views with tiles of one size."""
    first = views[0]
    height, width = first.tile
    kind = KERNEL_KINDS[spec.dtype]
    in_bfloat16 = spec.dtype == "BF16" and not spec.half  # the processor computes in it: the kernel only rounds to it
    if not in_bfloat16 and len(views) == 1 and height == width <= MAX_VECTOR_TILE:
        made = fused.cut(canvas(resized_by_steps, first, spec), first.canvas, (height, 1, 1), spec, kind)
        return made.reshape(-1, 3, height, width)
    out = np.empty((sum(view.tiles for view in views), 3, height, width), fused.KINDS[kind][1])
    at = 0
    for view in views:
        part = out[at : at + view.tiles]
        if in_bfloat16:
            _look_up(canvas(resized_by_steps, view, spec), view, bfloat16_table(spec), part)
        else:
            steps = (*view.before, view.size)
            # a result that another view starts from is made once
            is_shared = view.box is None and any(v.before[: len(steps)] == steps for v in views)
            source = _resized(resized_by_steps, steps, spec) if is_shared else _boxed(resized_by_steps, view, spec)
            fused.tiles(source, view, spec, kind, part)
        at += view.tiles
    return out


def _look_up(canvas: Pixels, view: ImageView, table: NDArray[np.uint16], out: NDArray[np.uint16]) -> None:
    """Cut a canvas into `out` (tiles, 3, height, width), each byte replaced by its value in `table` (3, 256)."""
    tiles = _cut(canvas, view.tile).transpose(4, 0, 2, 1, 3).reshape(3, view.tiles, *view.tile)
    for channel in range(3):
        out[:, channel] = table[channel][tiles[channel]]


def bfloat16_table(spec: ProcessorSpec) -> NDArray[np.uint16]:
    """The value of each byte of each channel where the processor rescales and normalises in bfloat16: (3, 256)."""
    rounded = from_bfloat16(to_bfloat16(np.arange(256, dtype=np.float32) * np.float32(spec.rescale_factor)))
    mean, std = (
        from_bfloat16(to_bfloat16(np.array(v, np.float32)))[:, None] for v in (spec.image_mean, spec.image_std)
    )
    above = from_bfloat16(to_bfloat16(rounded - mean))
    return to_bfloat16(above / std)


def _rows(canvas: Pixels, view: ImageView, spec: TileSpec) -> Values:
    """(tiles, height * width * 3)."""
    pixels = _cut(canvas, view.tile).transpose(0, 2, 1, 3, 4).reshape(-1, 3)
    planes = np.ascontiguousarray(pixels.T)[:, :, None]
    return normalise(planes, spec)[:, :, 0].T.reshape(view.tiles, -1)


def _filled_rows(
    resized_by_steps: dict[tuple[Size, ...], Pixels], views: tuple[ImageView, ...], spec: TileSpec
) -> Values:
    """(views, rows, height * width * 3): the patches of each view, then zeros."""
    height, width = views[0].tile
    out = np.zeros((len(views), spec.rows, height * width * 3), np.float32 if spec.floats else np.uint8)
    for view, part in zip(views, out, strict=True):
        part[: view.tiles] = _rows(canvas(resized_by_steps, view, spec), view, spec)
    return out


def _strips(canvas: Pixels, view: ImageView, spec: TileSpec) -> Values:
    """(3, patch, patches * patch): the patches of each tile next to each other."""
    patch = spec.strip
    tiles = _cut(canvas, view.tile).transpose(0, 2, 1, 3, 4)
    rows, columns, height, width, _ = tiles.shape
    patches = tiles.reshape(rows, columns, height // patch, patch, width // patch, patch, 3)
    return normalise(patches.transpose(6, 3, 0, 1, 2, 4, 5).reshape(3, patch, -1), spec)


def _cut(canvas: Pixels, tile: Size) -> Pixels:
    """(rows, height, columns, width, 3) of a canvas."""
    height, width, _ = canvas.shape
    return canvas.reshape(height // tile[0], tile[0], width // tile[1], tile[1], 3)
