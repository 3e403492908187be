"""Families whose processors show an image as a whole and, where it is large or long, crops that are resized one by one.

The crops depend on the original's size, so a resized image cannot replace it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Final

from sidecar.kernels.families import reading
from sidecar.kernels.families.any_resolution import MAX_TILES, closest_grid
from sidecar.kernels.families.reading import Config
from sidecar.kernels.families.single_view import Gemma3Spec, read_fixed
from sidecar.kernels.grid import (
    BILINEAR,
    FILLED_ROWS,
    MIXED,
    SPLIT,
    Box,
    Geometry,
    ImageView,
    Integers,
    ProcessorSpec,
    Size,
    TileSpec,
    i64,
)

MAX_PATCHES: Final = 1 << 16  # of one view of LFM2-VL's
# Pixels of a side that become one token of Step 3.7's: its class has a patch of 14 and four of them for a token.
STEP_3_TOKEN_SIDE: Final = 56


@dataclass(frozen=True, slots=True, kw_only=True)
class PanAndScanSpec(TileSpec):
    """Gemma 3's with pan-and-scan: the whole image in one size; of a long one also crops along its longer side."""

    height: int
    width: int
    min_crop: int
    max_crops: int
    min_ratio: float
    tokens_per_tile: int = 0

    def geometry(self, height: int, width: int) -> Geometry:
        height, width = reading.check_positive(height, width)
        size = self.height, self.width
        boxes = self._boxes(height, width)
        views = (ImageView(size, size, size), *(ImageView(size, size, size, box=box) for box in boxes))
        return Geometry(*size, tokens=self.tokens_per_tile * len(views), views=views, original=(height, width))

    def _boxes(self, height: int, width: int) -> list[Box]:
        """The crops of a long image, in order; of the last one, what is left."""
        longer, shorter = (width, height) if width >= height else (height, width)
        if longer / shorter < self.min_ratio:
            return []
        crops = min(math.floor(longer / self.min_crop), math.floor(longer / shorter + 0.5))
        crops = min(self.max_crops, max(2, crops))
        step = math.ceil(longer / crops)
        if min(step, shorter) < self.min_crop:
            return []
        starts = range(0, step * crops, step)
        if max(starts) >= longer:
            raise ValueError("a crop would be empty")
        return [
            (0, at, height, min(step, width - at)) if width >= height else (at, 0, min(step, height - at), width)
            for at in starts
        ]

    def integers(self, images: Sequence[Geometry]) -> dict[str, Integers]:
        return {"num_crops": i64([len(images)], (len(g.views) - 1 for g in images))}


@dataclass(frozen=True, slots=True, kw_only=True)
class Lfm2VLSpec(TileSpec):
    """LFM2-VL's: whole patches near the image's size; a large one as tiles, then small. Zeros fill up each of them.

    Sizes are in pixels. `factor` is the side of one token, `fewest` and `most` are bounds of the small copy's pixels.
    """

    layout: ClassVar[str] = FILLED_ROWS

    patch: int
    factor: int
    fewest: int
    most: int
    tolerance: float
    tile: int
    min_tiles: int
    max_tiles: int
    splits: bool
    small: bool  # whether tiles are followed by a small copy of the whole image

    def geometry(self, height: int, width: int) -> Geometry:
        height, width = reading.check_positive(height, width)
        whole = self._whole(height, width)
        cut = self._is_cut(height, width)
        columns, rows = self._grid(height, width) if cut else (1, 1)
        if not cut:
            views = [self._view(whole)]
        else:
            canvas = rows * self.tile, columns * self.tile
            views = [self._view((self.tile, self.tile), canvas, box) for box in _boxes(rows, columns, self.tile)]
        if len(views) > 1 and self.small:
            views.append(self._view(whole))
        if max(view.tiles for view in views) > self.rows:
            raise ValueError("more patches than the processor has room for")
        # of one tile, the processor counts the tokens of the small copy in its place
        tokens = self._tokens(whole) if rows * columns == 1 else sum(self._tokens(view.size) for view in views)
        return Geometry(*views[-1].size, tokens=tokens, views=tuple(views), original=(height, width))

    def _view(self, size: Size, canvas: Size | None = None, box: Box | None = None) -> ImageView:
        before = () if canvas is None else (canvas,)
        return ImageView(size, size, (self.patch, self.patch), before=before, box=box)

    def _is_cut(self, height: int, width: int) -> bool:
        if not self.splits or self.min_tiles == self.max_tiles == 1:
            return False
        near_height, near_width = (max(self.patch, round(n / self.factor) * self.factor) for n in (height, width))
        return near_height * near_width > self.most * self.tolerance

    def _whole(self, height: int, width: int) -> Size:
        """Multiples of `factor` near the image's size, between two numbers of pixels."""
        factor = self.factor
        new_height, new_width = (max(factor, round(n / factor) * factor) for n in (height, width))
        if new_height * new_width > self.most:
            beta = math.sqrt((height * width) / self.most)
            new_height, new_width = (max(factor, math.floor(n / beta / factor) * factor) for n in (height, width))
        elif new_height * new_width < self.fewest:
            beta = math.sqrt(self.fewest / (height * width))
            new_height, new_width = (math.ceil(n * beta / factor) * factor for n in (height, width))
        return new_height, new_width

    def _grid(self, height: int, width: int) -> Size:
        """Columns and rows of tiles."""
        return closest_grid(_grids(self.min_tiles, self.max_tiles), height, width, (self.tile, self.tile))

    def _tokens(self, size: Size) -> int:
        """Patches of a view, in blocks of one token."""
        height, width = (math.ceil(side // self.patch / (self.factor // self.patch)) for side in size)
        return height * width

    @property
    def rows(self) -> int:
        return max(self.most // self.patch**2, (self.tile // self.patch) ** 2 if self.splits else 0)

    def pixels(self, images: Sequence[Geometry]) -> list[int]:
        return [sum(len(g.views) for g in images), self.rows, 3 * self.patch**2]

    def integers(self, images: Sequence[Geometry]) -> dict[str, Integers]:
        views = [view for g in images for view in g.views]
        mask = [n for view in views for n in [1] * view.tiles + [0] * (self.rows - view.tiles)]
        return {
            "spatial_shapes": i64([len(views), 2], (n for view in views for n in view.grid)),
            "pixel_attention_mask": (("I32", [len(views), self.rows]), mask),
        }


def _boxes(rows: int, columns: int, side: int) -> Iterator[Box]:
    """Squares, row by row."""
    return ((side * y, side * x, side, side) for y in range(rows) for x in range(columns))


@lru_cache(8)
def _grids(lowest: int, most: int) -> tuple[Size, ...]:
    """(columns, rows) of `lowest` to `most` tiles, fewer first; of as many, in the order of the processor's set."""
    found = {
        (x, y)
        for n in range(lowest, most + 1)
        for x in range(1, n + 1)
        for y in range(1, n + 1)
        if lowest <= x * y <= most
    }
    return tuple(sorted(found, key=lambda grid: grid[0] * grid[1]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Step3Spec(TileSpec):
    """Step 3.7's: the whole image as a square; of a large or long one also crops, each resized to a smaller square.

    The processor's masks of line breaks are for its prompt alone and are not made.
    """

    batch: ClassVar[str] = SPLIT
    layout: ClassVar[str] = MIXED

    whole: int  # side of the whole image
    crop: int  # side of a crop
    longest: int  # larger images are first shrunk to it
    whole_tokens: int = 0
    crop_tokens: int = 0

    def geometry(self, height: int, width: int) -> Geometry:
        original = height, width = reading.check_positive(height, width)
        padded = (0, 0)
        if min(height, width) < 32 and max(height / width, width / height) > 4:
            height = width = max(height, width)
            padded = height, width
        if max(height, width) > self.longest:
            scale = self.longest / max(height, width)
            height, width = int(height * scale), int(width * scale)
        if not height or not width:
            raise ValueError("one side would become 0")
        square, small = (self.whole, self.whole), (self.crop, self.crop)
        views = [ImageView(square, square, square, before=((height, width),))]
        if window := self._window(height, width):
            canvas = _whole_windows(height, window), _whole_windows(width, window)
            views += [
                ImageView(small, small, small, before=(canvas,), box=(y, x, *_part(canvas, y, x, window)))
                for y in range(0, canvas[0], window)
                for x in range(0, canvas[1], window)
            ]
        tokens = self.whole_tokens + self.crop_tokens * (len(views) - 1)
        return Geometry(*square, tokens=tokens, views=tuple(views), original=original, padded=padded)

    def _window(self, height: int, width: int) -> int:
        """The side of what becomes one crop; 0 for an image that is shown as a whole only."""
        shorter, longer = min(height, width), max(height, width)
        if longer <= self.whole:
            return shorter if longer / shorter > 1.5 else 0
        return min(shorter, self.crop) if longer / shorter > 4 else self.crop

    def values(self, images: Sequence[Geometry]) -> dict[str, list[int]]:
        crops = sum(len(g.views) - 1 for g in images)
        local = {"pixel_values_local": [crops, 3, self.crop, self.crop]} if crops else {}
        return {"pixel_values": self.pixels(images)} | local

    def pixels(self, images: Sequence[Geometry]) -> list[int]:
        return [len(images), 3, self.whole, self.whole]

    def integers(self, images: Sequence[Geometry]) -> dict[str, Integers]:
        return {"num_local_patches": i64([len(images)], (len(g.views) - 1 for g in images))}


def _whole_windows(side: int, window: int) -> int:
    """A side in whole windows, with one more for what is over a fifth of one; less than a window stays as it is."""
    return side if side < window else window * (side // window + (side % window > 0.2 * window))


def _part(canvas: Size, top: int, left: int, window: int) -> Size:
    return min(window, canvas[0] - top), min(window, canvas[1] - left)


# --- from a model's files ---


def read_gemma_3(config: Config, model: Config) -> ProcessorSpec:
    fields = read_fixed(config, model, BILINEAR)
    scans = reading.get_or(config, "do_pan_and_scan", False)
    if type(scans) is not bool:
        raise ValueError("do_pan_and_scan is neither true nor false")
    if not scans:
        return Gemma3Spec(**fields)
    ratio = reading.require(config, "pan_and_scan_min_ratio_to_activate")
    if type(ratio) not in (int, float):
        raise ValueError("pan_and_scan_min_ratio_to_activate is not a number")
    return PanAndScanSpec(
        min_crop=reading.require_count(config, "pan_and_scan_min_crop_size", 1 << 14),
        max_crops=reading.require_count(config, "pan_and_scan_max_num_crops", MAX_TILES),
        min_ratio=float(ratio),
        tokens_per_tile=fields.pop("tokens"),
        **fields,
    )


def read_lfm_2(config: Config, model: Config) -> ProcessorSpec:
    reading.check_steps(config, do_pad=True, do_resize=..., return_row_col_info=...)
    patch, merge = (reading.require_count(config, key, 256) for key in ("encoder_patch_size", "downsample_factor"))
    fewest, most = (reading.require_count(config, f"{end}_image_tokens", 1 << 16) for end in ("min", "max"))
    splits, small = (reading.require(config, key) for key in ("do_image_splitting", "use_thumbnail"))
    tolerance = reading.require(config, "max_pixels_tolerance")
    if type(splits) is not bool or type(small) is not bool or type(tolerance) not in (int, float):
        raise ValueError("not accepted by this processor")
    tile = reading.require_count(config, "tile_size", 1 << 14)
    low, high = (reading.require_count(config, f"{end}_tiles", MAX_TILES) if splits else 1 for end in ("min", "max"))
    spec = Lfm2VLSpec(
        **reading.read_common(config, BILINEAR, reading.HALF_MEAN_STD),
        patch=patch,
        factor=patch * merge,
        fewest=fewest * (patch * merge) ** 2,
        most=most * (patch * merge) ** 2,
        tolerance=float(tolerance),
        tile=tile,
        min_tiles=low,
        max_tiles=high,
        splits=splits,
        small=small,
    )
    if low > high or tile % patch or spec.rows > MAX_PATCHES:
        raise ValueError("not accepted by this processor")
    return spec


def read_step_3(config: Config, model: Config) -> ProcessorSpec:
    reading.check_steps(config)
    height, width = reading.require_pair(config, "size")
    if height != width:
        raise ValueError("the whole image is no square")
    crop = reading.require_count(config, "patch_size", 1 << 14)
    return Step3Spec(
        **reading.read_common(config, BILINEAR, reading.CLIP_MEAN_STD),
        whole=height,
        crop=crop,
        longest=reading.require_count(config, "max_image_size", 1 << 14),
        whole_tokens=(height // STEP_3_TOKEN_SIDE) ** 2,
        crop_tokens=(crop // STEP_3_TOKEN_SIDE) ** 2,
    )
