"""Families whose processors resize an image to a canvas of whole tiles and add a small copy of the whole image.

The tiles depend on the original's size, so a resized image cannot replace it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import Any, ClassVar, Final

from sidecar.kernels.families import reading
from sidecar.kernels.families.reading import Config
from sidecar.kernels.grid import (
    BICUBIC,
    BILINEAR,
    FILLED,
    Geometry,
    ImageView,
    Integers,
    ProcessorSpec,
    Size,
    TileSpec,
    i64,
)

MAX_TILES: Final = 256
MAX_PINPOINTS: Final = 1024

# Caller of GotOcr2ImageProcessor -> whether it cuts tiles, regardless of the file; None: as the file says.
CUTS: Final[Mapping[str | None, bool | None]] = {
    None: None,
    "GotOcr2Processor": False,
    "InternVLProcessor": True,
    "AyaVisionProcessor": True,
    "QianfanOCRProcessor": True,
}
# Of Ovis 2: every grid of so many tiles is tried with every one of its tiles.
MAX_COVERING_TILES: Final = 32
COVERED: Final = 0.9  # the share of an image that its tiles are to cover


@dataclass(frozen=True, slots=True, kw_only=True)
class InternVLSpec(TileSpec):
    """InternVL's: stretched to the grid of tiles with the closest aspect; then the whole image as one more tile."""

    height: int
    width: int
    min_tiles: int
    max_tiles: int
    cuts: bool
    tokens_per_tile: int = 0

    def geometry(self, height: int, width: int) -> Geometry:
        height, width = reading.check_positive(height, width)
        tile = self.height, self.width
        columns, rows = self._grid(height, width) if self.cuts else (1, 1)
        canvas = self.height * rows, self.width * columns
        views = (ImageView(canvas, canvas, tile), ImageView(tile, tile, tile))[: 2 if rows * columns > 1 else 1]
        tokens = self.tokens_per_tile * sum(view.tiles for view in views)
        return Geometry(*canvas, tokens=tokens, views=views, original=(height, width))

    def _grid(self, height: int, width: int) -> Size:
        """Columns and rows of tiles."""
        return closest_grid(_grids(self.min_tiles, self.max_tiles), height, width, (self.height, self.width))

    def integers(self, images: Sequence[Geometry]) -> dict[str, Integers]:
        return {"num_patches": i64([len(images)], (g.tiles for g in images))}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cohere2VisionSpec(InternVLSpec):
    """Command A Vision's: the grid of tiles that needs least enlarging, else least shrinking; then as InternVL's."""

    def _grid(self, height: int, width: int) -> Size:
        # a tile is as wide as it is high to the processor, whatever its width
        scales = {
            grid: min(self.height * grid[0] / width, self.height * grid[1] / height)
            for grid in _grids(1, self.max_tiles)
        }
        enlarging = [grid for grid, scale in scales.items() if scale >= 1]
        return min(enlarging, key=scales.__getitem__) if enlarging else max(scales, key=scales.__getitem__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ovis2Spec(InternVLSpec):
    """Ovis 2's: the whole image as one tile, then stretched to the fewest tiles that cover nine tenths of it."""

    covers: bool = True  # else the grid of tiles with the closest aspect, as InternVL's

    def geometry(self, height: int, width: int) -> Geometry:
        found = InternVLSpec.geometry(self, height, width)
        return replace(found, views=found.views[::-1])

    def _grid(self, height: int, width: int) -> Size:
        if not self.covers:
            return InternVLSpec._grid(self, height, width)
        # the processor splits by (rows, columns), and takes what it finds for (columns, rows)
        return covering_grid(_grids(1, self.max_tiles), height, width, self.height)

    def integers(self, images: Sequence[Geometry]) -> dict[str, Integers]:
        return {"grids": i64([len(images), 2], (n for g in images for n in g.views[-1].grid))}


def covering_grid(grids: Iterable[Size], height: int, width: int, side: int) -> Size:
    """The grid of fewest parts whose copies within `side` show over nine tenths of the image; else that shows most."""
    shares = {grid: _covered(height, width, grid, side) / (width * height) for grid in grids}
    enough = [grid for grid, share in shares.items() if share > COVERED]
    if enough:
        return min(enough, key=lambda grid: (grid[0] * grid[1], -shares[grid]))
    return min(shares, key=lambda grid: (-shares[grid], grid[0] * grid[1]))


def _covered(height: int, width: int, grid: Size, side: int) -> float:
    """The sum, over the parts of a grid, of their areas after the longer side was limited to `side`."""
    rows, columns = grid
    row, column = height // rows, width // columns
    heights = [row] * (rows - 1) + [height - row * (rows - 1)]
    widths = [column] * (columns - 1) + [width - column * (columns - 1)]
    return sum(_area(h, w, side) for h in heights for w in widths)


def _area(height: int, width: int, side: int) -> float:
    longer, shorter = max(height, width), min(height, width)
    return longer * shorter if longer <= side else side * (shorter / longer * side)


def closest_grid(grids: Iterable[Size], height: int, width: int, tile: Size) -> Size:
    """The (columns, rows) closest to the image's aspect; on a tie the later one, if the image fills half of it."""
    best, smallest = (1, 1), math.inf
    for columns, rows in grids:
        difference = abs(width / height - columns / rows)
        half = 0.5 * tile[0] * tile[1] * columns * rows
        if difference < smallest or (difference == smallest and width * height > half):
            best, smallest = (columns, rows), difference
    return best


@lru_cache(8)
def _grids(lowest: int, most: int) -> tuple[Size, ...]:
    """(columns, rows) of `lowest` to `most` tiles, fewer tiles first."""
    all_grids = ((x, y) for x in range(1, most + 1) for y in range(1, most + 1) if lowest <= x * y <= most)
    return tuple(sorted(all_grids, key=lambda grid: grid[0] * grid[1]))


@dataclass(frozen=True, slots=True, kw_only=True)
class AnyResolutionSpec(TileSpec):
    """LLaVA-NeXT's and LLaVA-OneVision's: the whole image as one tile, then the best of a list of sizes, padded.

    Tokens: `side` per side of a tile, `base` for the whole image, minus `less`; rows and columns over `most_tiles`
    tiles are thinned out.
    """

    batch: ClassVar[str] = FILLED

    tile: int
    pinpoints: tuple[Size, ...]
    counts_images: bool = False
    side: int = 0
    base: int = 0
    less: int = 0
    most_tiles: int = 0

    def geometry(self, height: int, width: int) -> Geometry:
        height, width = reading.check_positive(height, width)
        canvas = self._canvas(height, width)
        across, down = canvas[1] / width, canvas[0] / height
        if across < down:
            size = min(math.ceil(height * across), canvas[0]), canvas[1]
        else:
            size = canvas[0], min(math.ceil(width * down), canvas[1])
        tile = (self.tile, self.tile)
        views = (
            ImageView(tile, tile, tile),
            ImageView(size, canvas, tile, (canvas[0] - size[0]) // 2, (canvas[1] - size[1]) // 2),
        )
        tokens = self._tokens(height, width, canvas) if self.side else 0
        return Geometry(*canvas, tokens=tokens, views=views, original=(height, width))

    def _canvas(self, height: int, width: int) -> Size:
        """The size that keeps most of the image's pixels; on a tie, the one that wastes least."""
        best, most, lowest = (0, 0), 0, math.inf
        for canvas in self.pinpoints:
            scale = min(canvas[1] / width, canvas[0] / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            wasted = canvas[0] * canvas[1] - kept
            if kept > most or (kept == most and wasted < lowest):
                best, most, lowest = canvas, kept, wasted
        return best

    def _tokens(self, height: int, width: int, canvas: Size) -> int:
        """Tokens of the tiles without padding, one more per row, plus those of the whole image."""
        rows, columns = self.side * (canvas[0] // self.tile), self.side * (canvas[1] // self.tile)
        if width / height > columns / rows:
            rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
        else:
            columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
        if self.most_tiles:
            ratio = math.sqrt(rows * columns / (self.most_tiles * self.side**2))
            if ratio > 1.1:
                rows, columns = int(rows // ratio), int(columns // ratio)
        return rows * columns + rows + self.base - self.less

    def pixels(self, images: Sequence[Geometry]) -> list[int]:
        return [len(images), max(g.tiles for g in images), 3, self.tile, self.tile]

    def integers(self, images: Sequence[Geometry]) -> dict[str, Integers]:
        sizes = {"image_sizes": i64([len(images), 2], (side for g in images for side in g.original))}
        return sizes | ({"batch_num_images": i64([len(images)], [1] * len(images))} if self.counts_images else {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama4Spec(TileSpec):
    """Llama 4's: the canvas that needs least resizing, padded below and right; then the whole image as one more tile.

    Values are computed in bfloat16; sizes are rounded to float32 where Hugging Face computes them with tensors.
    """

    tile: int
    max_tiles: int
    largest: bool = False  # whether an image is enlarged as far as the canvases allow
    tokens_per_tile: int = 0

    @property
    def dtype(self) -> str:
        return "BF16" if self.do_normalize else "F32" if self.do_rescale else "U8"

    def geometry(self, height: int, width: int) -> Geometry:
        height, width = reading.check_positive(height, width)
        canvas = self._canvas(height, width)
        size = self._size(height, width, canvas)
        tile = (self.tile, self.tile)
        views = (ImageView(size, canvas, tile), ImageView(tile, tile, tile))[: 2 if canvas != tile else 1]
        tokens = self.tokens_per_tile * sum(view.tiles for view in views)
        return Geometry(*canvas, tokens=tokens, views=views, original=(height, width))

    def _canvas(self, height: int, width: int) -> Size:
        """The smallest canvas among those that need the least enlargement, or else the least shrinking."""
        scales = {c: min(single(c[0] / height), single(c[1] / width)) for c in _canvases(self.tile, self.max_tiles)}
        larger = [scale for scale in scales.values() if scale >= 1]
        scale = max(scales.values()) if not larger else max(larger) if self.largest else min(larger)
        return min((c for c, s in scales.items() if s == scale), key=lambda c: c[0] * c[1])

    def _size(self, height: int, width: int, canvas: Size) -> Size:
        """The image's own aspect within the canvas, no larger than the image or one tile.

        A scale is float32 if it comes from the canvas's side, which is a tensor there, else float64.
        """
        if self.largest:
            most, rounds = canvas, (True, True)
        else:
            wanted = max(height, self.tile), max(width, self.tile)
            most = min(wanted[0], canvas[0]), min(wanted[1], canvas[1])
            rounds = canvas[0] < wanted[0], canvas[1] < wanted[1]
        down, across = ((single if r else float)(m / s) for r, m, s in zip(rounds, most, (height, width), strict=True))
        if (single(across) < single(down)) if rounds[0] != rounds[1] else (across < down):
            new_height = (single if rounds[1] else float)(height * across)
            return max(1, min(math.floor(new_height), most[0])), most[1]
        new_width = (single if rounds[0] else float)(width * down)
        return most[0], max(1, min(math.floor(new_width), most[1]))

    def integers(self, images: Sequence[Geometry]) -> dict[str, Integers]:
        return {"aspect_ratios": i64([len(images), 2], (n for g in images for n in g.views[0].grid))}


def single(value: float) -> float:
    """Round a double to float32; quotients and products of float32s then equal float32 arithmetic."""
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded


@lru_cache(8)
def _canvases(tile: int, most: int) -> tuple[Size, ...]:
    """All canvases of 1 to `most` tiles in the processor's order: by aspect, in order of first appearance."""
    by_aspect: dict[float, list[Size]] = {}
    for tiles in range(most, 0, -1):
        for rows in (n for n in range(1, tiles + 1) if tiles % n == 0):
            by_aspect.setdefault(rows / (tiles // rows), []).append((tile * rows, tile * (tiles // rows)))
    return tuple(canvas for canvases in by_aspect.values() for canvas in canvases)


# --- from a model's files ---


def read_intern_vl(config: Config, model: Config) -> ProcessorSpec:
    reading.check_steps(config)
    cuts = CUTS[reading.get_or(config, "processor_class", model.get("processor_class"))]
    if cuts is None:
        cuts = reading.get_or(config, "crop_to_patches", False)
    if type(cuts) is not bool:
        raise ValueError("crop_to_patches is neither true nor false")
    height, width = reading.require_pair(config, "size")
    lowest, most = (
        reading.require_count(config, key, MAX_TILES) if cuts else 1 for key in ("min_patches", "max_patches")
    )
    return InternVLSpec(
        **reading.read_common(config, BICUBIC, reading.CLIP_MEAN_STD),
        height=height,
        width=width,
        cuts=cuts,
        min_tiles=lowest,
        max_tiles=most,
        tokens_per_tile=reading.optional_count(model.get("image_seq_length")),
    )


def read_ovis_2(config: Config, model: Config) -> ProcessorSpec:
    reading.check_steps(config)
    cuts, covers = reading.require(config, "crop_to_patches"), reading.get_or(config, "use_covering_area_grid", True)
    if type(cuts) is not bool or type(covers) is not bool:
        raise ValueError("crop_to_patches or use_covering_area_grid is neither true nor false")
    height, width = reading.require_pair(config, "size")
    most = reading.require_count(config, "max_patches", MAX_COVERING_TILES) if cuts else 1
    lowest = reading.require_count(config, "min_patches", MAX_COVERING_TILES) if cuts and not covers else 1
    return Ovis2Spec(
        **reading.read_common(config, BICUBIC, reading.CLIP_MEAN_STD),
        height=height,
        width=width,
        cuts=most > 1,
        covers=covers,
        min_tiles=lowest,
        max_tiles=most,
        tokens_per_tile=reading.optional_count(model.get("image_seq_length")),
    )


def read_cohere_2_vision(config: Config, model: Config) -> ProcessorSpec:
    reading.check_steps(config)
    cuts = reading.require(config, "crop_to_patches")
    if type(cuts) is not bool:
        raise ValueError("crop_to_patches is neither true nor false")
    height, width = reading.require_pair(config, "size")
    return Cohere2VisionSpec(
        **reading.read_common(config, BICUBIC, reading.CLIP_MEAN_STD),
        height=height,
        width=width,
        cuts=cuts,
        min_tiles=1,  # the processor has a setting and does not use it
        max_tiles=reading.require_count(config, "max_patches", MAX_TILES) if cuts else 1,
        tokens_per_tile=reading.optional_count(config.get("patch_size")) ** 2,
    )


def read_llava_next(config: Config, model: Config) -> ProcessorSpec:
    reading.require(config, "crop_size")
    if reading.get_or(config, "aspect_ratio_setting", "anyres") != "anyres":
        raise ValueError("aspect_ratio_setting is not anyres")
    spec = _read_any_resolution(config)
    patch = reading.optional_count(model.get("patch_size"))
    side = int(spec["tile"] // patch * _rate(model.get("downsample_rate"))) if patch else 0
    base = side * side + reading.optional_count(model.get("num_additional_image_tokens"))
    less = int(model.get("vision_feature_select_strategy") == "default")
    return AnyResolutionSpec(**spec, side=side, base=base, less=less)


def _rate(value: Any) -> Fraction:
    """Tokens per patch of a side, as Granite 4 Vision's file says it ("1/4"); 1 without it. Raises ValueError."""
    try:
        rate = Fraction(1 if value is None else value)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        rate = Fraction(0)
    if not 0 < rate <= 1:
        raise ValueError("downsample_rate is not a part of one")
    return rate


def read_llava_one_vision(config: Config, model: Config) -> ProcessorSpec:
    spec = _read_any_resolution(config)
    base = reading.optional_count(model.get("num_image_tokens"))
    aspect = str(model.get("vision_aspect_ratio", "anyres_max_9")).removeprefix("anyres_max_")
    less = int(model.get("vision_feature_select_strategy") == "default")
    most = reading.check_count(int(aspect), 1 << 10) if base else 0
    return AnyResolutionSpec(**spec, counts_images=True, side=math.isqrt(base), base=base, less=less, most_tiles=most)


def _read_any_resolution(config: Config) -> dict[str, Any]:
    """The common fields. Raises ValueError if a tile would be resized or cut again."""
    reading.check_steps(config, do_pad=True, do_center_crop=...)
    size, crop = reading.require(config, "size"), config.get("crop_size")
    height, width = reading.check_pair(size["shortest_edge"] if set(size) == {"shortest_edge"} else size)
    if height != width or (crop is not None and reading.check_pair(crop) != (height, width)):
        raise ValueError("tiles of another size than the whole image's")
    points = tuple(
        (reading.check_count(y, 1 << 14), reading.check_count(x, 1 << 14))
        for y, x in reading.require(config, "image_grid_pinpoints")
    )
    if not 0 < len(points) <= MAX_PINPOINTS or any(y % height or x % width for y, x in points):
        raise ValueError("image_grid_pinpoints are not whole numbers of tiles")
    return {**reading.read_common(config, BICUBIC, reading.CLIP_MEAN_STD), "tile": height, "pinpoints": points}


def read_llama_4(config: Config, model: Config) -> ProcessorSpec:
    reading.check_steps(config)
    height, width = reading.require_pair(config, "size")
    largest = reading.get_or(config, "resize_to_max_canvas", False)
    numbers = reading.read_common(config, BILINEAR, reading.HALF_MEAN_STD)
    if height != width or type(largest) is not bool or (numbers["do_normalize"] and not numbers["do_rescale"]):
        raise ValueError("not accepted by this processor")
    patch, shuffle = reading.optional_count(model.get("patch_size")), model.get("pixel_shuffle_ratio")
    tokens = (height // patch) ** 2 // round(1.0 / shuffle**2) if patch and shuffle else 0
    return Llama4Spec(
        **numbers,
        tile=height,
        max_tiles=reading.require_count(config, "max_patches", MAX_TILES),
        largest=largest,
        tokens_per_tile=tokens,
    )
