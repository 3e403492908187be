"""Phi-4-multimodal's processor: its tokens are known, its tensors are not made here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from sidecar.kernels.families import reading
from sidecar.kernels.families.any_resolution import MAX_TILES, closest_grid
from sidecar.kernels.families.reading import Config
from sidecar.kernels.grid import BICUBIC, Geometry, ProcessorSpec, Size

WHOLE_TOKENS = 256 + 1 + 16  # of the small copy of the whole image, with separators


@dataclass(frozen=True, slots=True, kw_only=True)
class Phi4Spec(ProcessorSpec):
    """Phi-4-multimodal's: whole tiles, padded, and a small copy, which is resized in floating point."""

    tensors: ClassVar[bool] = False
    inline: ClassVar[bool] = False

    tile: int
    patch: int
    max_tiles: int

    def geometry(self, height: int, width: int) -> Geometry:
        height, width = reading.check_positive(height, width)
        columns, rows = self._grid(height, width)
        canvas = self.tile * rows, self.tile * columns
        across, down = canvas[1] / width, canvas[0] / height
        size = (int(height * across), canvas[1]) if across < down else (canvas[0], int(width * down))
        if min(size) < 10:
            raise ValueError("one side would have less than 10 pixels")
        side = self.tile // self.patch
        down_tokens, across_tokens = (
            _even(side * n, (c - s) // self.patch, side) for n, c, s in zip((rows, columns), canvas, size, strict=True)
        )
        return Geometry(
            *canvas, tokens=down_tokens * across_tokens + down_tokens + WHOLE_TOKENS, original=(height, width)
        )

    def _grid(self, height: int, width: int) -> Size:
        """Columns and rows: as many as the image fills, or else those of the closest aspect, as in InternVL."""
        columns, rows = math.ceil(width / self.tile), math.ceil(height / self.tile)
        if columns * rows <= self.max_tiles:
            return columns, rows
        return closest_grid(_grids(self.max_tiles), height, width, (self.tile, self.tile))

    def pixels(self, images: Sequence[Geometry]) -> list[int]:
        raise NotImplementedError


def _even(patches: int, padding: int, side: int) -> int:
    """The number of every other patch of each tile, without the padding."""
    return sum(i % side % 2 == 0 for i in range(patches - padding))


@lru_cache(8)
def _grids(most: int) -> tuple[Size, ...]:
    """By number of tiles; ties are in set order, because the processor sorts a set."""
    grids = {(x, y) for n in range(1, most + 1) for x in range(1, n + 1) for y in range(1, n + 1) if 1 <= x * y <= most}
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


# --- from a model's files ---


def read_phi_4(config: Config, model: Config) -> ProcessorSpec:
    reading.check_steps(config)
    height, width = reading.require_pair(config, "size")
    if height != width:
        raise ValueError("not accepted by this processor")
    return Phi4Spec(
        **reading.read_common(config, BICUBIC, reading.HALF_MEAN_STD),
        tile=height,
        patch=reading.require_count(config, "patch_size", 256),
        max_tiles=reading.require_count(config, "dynamic_hd", MAX_TILES),
    )
