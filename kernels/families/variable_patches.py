"""Families whose processors make a variable number of patches, by resize rules that depend on the original's size.

A resized image therefore cannot replace the original.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from sidecar.kernels.families import reading
from sidecar.kernels.families.any_resolution import MAX_TILES
from sidecar.kernels.families.reading import Config
from sidecar.kernels.grid import (
    ABREAST,
    BICUBIC,
    FILLED,
    ROWS,
    STRIPS,
    Geometry,
    ImageView,
    Integers,
    ProcessorSpec,
    Size,
    TileSpec,
    i64,
)

GEMMA_TOKENS: Final = (70, 140, 280, 560, 1120)  # what its processor accepts
IDENTITY_MEAN_STD: Final = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemma4Spec(TileSpec):
    """Gemma 4's: as many patches as its tokens allow, for any size of the image; then zeros up to that number."""

    batch: ClassVar[str] = FILLED
    layout: ClassVar[str] = ROWS

    patch: int  # pixels per side of a small patch
    pooling: int  # small patches per side of one token
    max_tokens: int
    joins: bool = False  # whether the small patches of one token are one patch

    def geometry(self, height: int, width: int) -> Geometry:
        height, width = reading.check_positive(height, width)
        step = self.pooling * self.patch
        size = self._size(height, width, step)
        tile = step if self.joins else self.patch
        tokens = size[0] * size[1] // step**2
        return Geometry(
            *size,
            1,
            size[0] // tile,
            size[1] // tile,
            tokens,
            views=(ImageView(size, size, (tile, tile)),),
            original=(height, width),
        )

    def _size(self, height: int, width: int, step: int) -> Size:
        most = self.max_tokens * self.pooling**2 * self.patch**2
        factor = math.sqrt(most / (height * width))
        new_height, new_width = (math.floor(factor * side / step) * step for side in (height, width))
        if not new_height and not new_width:
            raise ValueError("both sides would become 0")
        longest = self.max_tokens * step
        if not new_height:
            new_height, new_width = step, min(math.floor(width / height) * step, longest)
        elif not new_width:
            new_height, new_width = min(math.floor(height / width) * step, longest), step
        if new_height * new_width > most:
            raise ValueError("too many patches")
        return new_height, new_width

    @property
    def rows(self) -> int:
        """Patches per image, including those of zeros."""
        return self.max_tokens if self.joins else self.max_tokens * self.pooling**2

    def pixels(self, images: Sequence[Geometry]) -> list[int]:
        return [len(images), self.rows, 3 * images[0].views[0].tile[0] ** 2]

    def integers(self, images: Sequence[Geometry]) -> dict[str, Integers]:
        places = [n for g in images for n in self._places(g)]
        return {
            "image_position_ids": i64([len(images), self.rows, 2], places),
            "num_soft_tokens_per_image": i64([len(images)], (g.tokens for g in images)),
        }

    def _places(self, g: Geometry) -> list[int]:
        """Column and row of each patch; -1 for those of zeros."""
        real = [n for y in range(g.grid_h) for x in range(g.grid_w) for n in (x, y)]
        return real + [-1] * (2 * self.rows - len(real))


@dataclass(frozen=True, slots=True, kw_only=True)
class KimiSpec(TileSpec):
    """Kimi K2.5's: shrunk to at most `max_patches`, then padded to whole merged patches."""

    patch: int
    merge: int
    max_patches: int
    max_side: int  # patches

    def geometry(self, height: int, width: int) -> Geometry:
        height, width = reading.check_positive(height, width)
        patches = max(1.0, height // self.patch) * max(1.0, width // self.patch)
        longest = self.max_side * self.patch
        scale = min(1.0, math.sqrt(self.max_patches / patches), longest / height, longest / width)
        size = min(max(1, int(height * scale)), longest), min(max(1, int(width * scale)), longest)
        step = self.merge * self.patch
        canvas = -(-size[0] // step) * step, -(-size[1] // step) * step
        grid = canvas[0] // self.patch, canvas[1] // self.patch
        view = ImageView(size, canvas, (self.patch, self.patch))
        return Geometry(*canvas, 1, *grid, grid[0] * grid[1] // self.merge**2, views=(view,), original=(height, width))

    def integers(self, images: Sequence[Geometry]) -> dict[str, Integers]:
        return {"image_grid_thw": i64([len(images), 3], (n for g in images for n in (1, g.grid_h, g.grid_w)))}


@dataclass(frozen=True, slots=True, kw_only=True)
class MiniCPMSpec(TileSpec):
    """MiniCPM-V 4.6's: the whole image at about `resolution`; for a large one also a grid of slices of that size."""

    batch: ClassVar[str] = ABREAST
    layout: ClassVar[str] = STRIPS

    patch: int
    resolution: int
    max_slices: int
    slices: bool
    merge: int  # patches per side of one token

    @property
    def strip(self) -> int:
        return self.patch

    def geometry(self, height: int, width: int) -> Geometry:
        height, width = reading.check_positive(height, width)
        grid = self._grid(height, width) if self.slices else None
        whole = self._best(height, width, enlarge=grid is None)
        views = [ImageView(whole, whole, whole)]
        if grid is not None:
            rows, columns = grid
            tile = self._best(_nearest(height, rows) / rows, _nearest(width, columns) / columns, enlarge=True)
            canvas = tile[0] * rows, tile[1] * columns
            views.append(ImageView(canvas, canvas, tile))
        tokens = sum(v.tiles * (v.tile[0] // self.patch * (v.tile[1] // self.patch) // self.merge**2) for v in views)
        return Geometry(*views[-1].canvas, tokens=tokens, views=tuple(views), original=(height, width))

    def _best(self, height: float, width: float, *, enlarge: bool) -> Size:
        """About `resolution` squared pixels if it has more or with `enlarge`, in whole merged patches."""
        if height * width > self.resolution * self.resolution or enlarge:
            aspect = width / height
            height = int(self.resolution / math.sqrt(aspect))
            width = int(height * aspect)
        step = self.patch * self.merge
        return _nearest(height, step), _nearest(width, step)

    def _grid(self, height: int, width: int) -> Size | None:
        """Rows and columns of slices with the aspect closest to the image's; None for a small image."""
        wanted = min(math.ceil(width * height / (self.resolution * self.resolution)), self.max_slices)
        if wanted <= 1:
            return None
        best, lowest = (1, 1), math.inf
        for slices in (wanted - 1, wanted, wanted + 1):
            if slices == 1 or slices > self.max_slices:
                continue
            for rows in (n for n in range(1, slices + 1) if slices % n == 0):
                error = abs(math.log(width / height) - math.log(slices // rows / rows))
                if error < lowest or (error == lowest and rows > best[0]):
                    best, lowest = (rows, slices // rows), error
        return best

    def pixels(self, images: Sequence[Geometry]) -> list[int]:
        length = sum(v.canvas[0] * v.canvas[1] // self.patch for g in images for v in g.views)
        return [1, 3, self.patch, length]

    def integers(self, images: Sequence[Geometry]) -> dict[str, Integers]:
        grids = [v for g in images for v in (g.views[1].grid if len(g.views) > 1 else (0, 0))]
        sizes = [side // self.patch for g in images for v in g.views for _ in range(v.tiles) for side in v.tile]
        return {
            "grids": i64([len(images), 2], grids),
            "num_patches_per_image": i64([len(images)], (g.tiles for g in images)),
            "target_sizes": (("I32", [len(sizes) // 2, 2]), sizes),
        }


def _nearest(length: float, step: int) -> int:
    return max(round(length / step) * step, step)


# --- from a model's files ---


def read_gemma(config: Config, model: Config) -> ProcessorSpec:
    return _read_gemma4(config, joins=False)


def read_gemma_unified(config: Config, model: Config) -> ProcessorSpec:
    return _read_gemma4(config, joins=True)


def _read_gemma4(config: Config, *, joins: bool) -> ProcessorSpec:
    reading.check_steps(config)
    tokens = reading.require(config, "max_soft_tokens")
    if tokens not in GEMMA_TOKENS:
        raise ValueError("a number of tokens that the processor does not accept")
    return Gemma4Spec(
        **reading.read_common({"do_normalize": False, **config}, BICUBIC, IDENTITY_MEAN_STD),
        patch=reading.require_count(config, "patch_size", 256),
        pooling=reading.require_count(config, "pooling_kernel_size", 16),
        max_tokens=tokens,
        joins=joins,
    )


def read_kimi(config: Config, model: Config) -> ProcessorSpec:
    reading.check_steps(config)
    size = reading.require(config, "size")
    if set(size) != {"max_height", "max_width"} or size["max_height"] != size["max_width"]:
        raise ValueError("not a size of this processor")
    return KimiSpec(
        **reading.read_common(config, BICUBIC, reading.HALF_MEAN_STD),
        patch=reading.require_count(config, "patch_size", 256),
        merge=reading.require_count(config, "merge_size", 16),
        max_patches=reading.require_count(config, "max_patches"),
        max_side=reading.check_count(size["max_height"], 1 << 14),
    )


def read_minicpm(config: Config, model: Config) -> ProcessorSpec:
    reading.check_steps(config)
    slices, mode = reading.get_or(config, "slice_mode", True), reading.get_or(config, "downsample_mode", "16x")
    if type(slices) is not bool or type(mode) is not str:
        raise ValueError("not accepted by this processor")
    return MiniCPMSpec(
        **reading.read_common(config, BICUBIC, reading.HALF_MEAN_STD),
        patch=reading.require_count(config, "patch_size", 256),
        resolution=reading.require_count(config, "scale_resolution", 1 << 14),
        max_slices=reading.require_count(config, "max_slice_nums", MAX_TILES),
        slices=slices,
        merge=2 if mode == "4x" else 4,
    )
