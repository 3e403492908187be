"""Idefics 3's and SmolVLM's processor: resizes in steps, each from the last result.

The first step is a fixed point: its result can replace the original.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from sidecar.kernels.families import reading
from sidecar.kernels.families.reading import Config
from sidecar.kernels.grid import LANCZOS, Geometry, ImageView, Integers, ProcessorSpec, Repeated, Size, TileSpec

MAX_SIDE: Final = 4096  # pixels of the longer side


@dataclass(frozen=True, slots=True, kw_only=True)
class Idefics3Spec(TileSpec):
    """Idefics 3's and SmolVLM's: the longer side to `longest`, then whole tiles; then the whole image as one tile."""

    inline: ClassVar[bool] = True

    longest: int
    tile: int
    splits: bool = True
    tokens_per_tile: int = 0

    def geometry(self, height: int, width: int) -> Geometry:
        first = _below(*_to_longest(*reading.check_positive(height, width), self.longest))
        tile = (self.tile, self.tile)
        canvas = self._canvas(*first) if self.splits else tile
        views = [ImageView(canvas, canvas, tile, before=(first,))]
        if canvas != tile:
            views.append(ImageView(tile, tile, tile, before=(first, canvas)))
        tokens = self.tokens_per_tile * sum(view.tiles for view in views)
        return Geometry(*first, tokens=tokens, views=tuple(views), original=(height, width))

    def _canvas(self, height: int, width: int) -> Size:
        """Whole tiles: the longer side rounded up, then the other one by the aspect."""
        aspect, tile = width / height, self.tile
        if width >= height:
            width = math.ceil(width / tile) * tile
            height = math.ceil(int(width / aspect) / tile) * tile
        else:
            height = math.ceil(height / tile) * tile
            width = math.ceil(int(height * aspect) / tile) * tile
        return height, width

    def pixels(self, images: Sequence[Geometry]) -> list[int]:
        return [1, *TileSpec.pixels(self, images)]

    def integers(self, images: Sequence[Geometry]) -> dict[str, Integers]:
        shape = [1, sum(g.tiles for g in images), self.tile, self.tile]
        return {"pixel_attention_mask": (("I64", shape), Repeated(1, math.prod(shape)))}


def _to_longest(height: int, width: int, longest: int) -> Size:
    """Resize the longer side to `longest`; the other one keeps the aspect and becomes even."""
    aspect = width / height
    if width >= height:
        width, height = longest, int(longest / aspect)
        height += height % 2
    else:
        height, width = longest, int(longest * aspect)
        width += width % 2
    return max(height, 1), max(width, 1)


def _below(height: int, width: int) -> Size:
    aspect = width / height
    if width >= height and width > MAX_SIDE:
        width, height = MAX_SIDE, int(MAX_SIDE / aspect)
    elif height > width and height > MAX_SIDE:
        height, width = MAX_SIDE, int(MAX_SIDE * aspect)
    return max(height, 1), max(width, 1)


# --- from a model's files ---


def read_idefics(config: Config, model: Config) -> ProcessorSpec:
    reading.check_steps(config, do_pad=True, return_row_col_info=False)
    size, tile = reading.require(config, "size"), reading.require(config, "max_image_size")
    if set(size) != {"longest_edge"} or set(tile) != {"longest_edge"}:
        raise ValueError("not a size of this processor")
    splits = config.get("do_image_splitting", True)
    return Idefics3Spec(
        **reading.read_common(config, LANCZOS, reading.HALF_MEAN_STD),
        longest=reading.check_count(size["longest_edge"], 1 << 14),
        tile=reading.check_count(tile["longest_edge"], 1 << 14),
        splits=splits is not False,
        tokens_per_tile=reading.optional_count(model.get("image_seq_len")),
    )
