"""Families whose processors make patches or planes of one resized copy of an image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from sidecar.kernels.families import reading
from sidecar.kernels.families.reading import Config
from sidecar.kernels.grid import BICUBIC, Geometry, Integers, PatchSpec, PlaneSpec, ProcessorSpec, Size, i64

MAX_ASPECT: Final = 200  # Qwen's and GLM's processors refuse longer images


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen2VLSpec(PatchSpec):
    """Qwen2-VL's and GLM-4V's: multiples of patch * merge near the image's size, with a pixel count between two bounds.

    `frames` is what GLM multiplies the pixel count by; Qwen counts one.
    """

    min_pixels: int
    max_pixels: int
    frames: int = 1
    grows: bool = False  # an image with a side below one patch is enlarged first

    def geometry(self, height: int, width: int) -> Geometry:
        new_height, new_width = self._size(height, width)
        grid_h, grid_w = new_height // self.patch_size, new_width // self.patch_size
        return Geometry(new_height, new_width, 1, grid_h, grid_w, grid_h * grid_w // self.merge_size**2)

    def _size(self, height: int, width: int) -> Size:
        factor = self.patch_size * self.merge_size
        height, width = reading.check_positive(height, width)
        if self.grows and (height < factor or width < factor):
            scale = max(factor / height, factor / width)
            height, width = int(height * scale), int(width * scale)
        return qwen_size(height, width, factor, self.min_pixels, self.max_pixels, self.frames)


def qwen_size(
    height: int, width: int, factor: int, low: int, high: int, frames: int = 1, counted: int | None = None
) -> Size:
    """Multiples of `factor` near a size, whose product is between two bounds. Raises ValueError for a long image.

    The bounds are those of `counted` frames together, `frames` if it is None; the size is scaled by `frames`.
    """
    counted = frames if counted is None else counted
    if max(height, width) / min(height, width) > MAX_ASPECT:
        raise ValueError(f"one side is more than {MAX_ASPECT} times the other")
    # round() is round-half-to-even, and the order of the divisions matters: the processor's own arithmetic.
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if counted * new_height * new_width > high:
        beta = math.sqrt((frames * height * width) / high)
        new_height = max(factor, math.floor(height / beta / factor) * factor)
        new_width = max(factor, math.floor(width / beta / factor) * factor)
    elif counted * new_height * new_width < low:
        beta = math.sqrt(low / (frames * height * width))
        new_height = math.ceil(height * beta / factor) * factor
        new_width = math.ceil(width * beta / factor) * factor
    if not new_height or not new_width:
        raise ValueError("one side would become 0")
    return new_height, new_width


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsOfPatchesSpec(PatchSpec):
    """PaddleOCR-VL's and HunyuanVL's: sized as Qwen2-VL's, with the patches row by row instead of by merged blocks.

    So `merge_size`, the side of a block in their order, is 1, and `merge` the side of what becomes one token.
    """

    merge: int
    min_pixels: int
    max_pixels: int
    grows: bool = False  # a side below a merged block becomes one, and the other grows with it
    planes: bool = False  # patches stay (3, patch, patch)
    extra: int = 0  # tokens of an image besides those of its rows
    per_row: int = 0  # tokens at the end of each row

    def geometry(self, height: int, width: int) -> Geometry:
        height, width = reading.check_positive(height, width)
        factor = self.patch_size * self.merge
        if self.grows and height < factor:
            height, width = factor, round(width * factor / height)
        if self.grows and width < factor:
            height, width = round(height * factor / width), factor
        new_height, new_width = qwen_size(height, width, factor, self.min_pixels, self.max_pixels)
        grid_h, grid_w = new_height // self.patch_size, new_width // self.patch_size
        tokens = grid_h // self.merge * (grid_w // self.merge + self.per_row) + self.extra
        return Geometry(new_height, new_width, 1, grid_h, grid_w, tokens)

    def pixels(self, images: Sequence[Geometry]) -> list[int]:
        rows, values = PatchSpec.pixels(self, images)
        patch = self.patch_size
        return [rows, values // patch**2, patch, patch] if self.planes else [rows, values]


@dataclass(frozen=True, slots=True, kw_only=True)
class SiglipSpec(PlaneSpec):
    """SigLIP's: one size for all images, whatever their shape."""

    height: int
    width: int
    tokens: int = 0

    def geometry(self, height: int, width: int) -> Geometry:
        reading.check_positive(height, width)
        return Geometry(self.height, self.width, tokens=self.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemma3Spec(SiglipSpec):
    """Gemma 3's: one size for all images, as SigLIP's, and a count of crops, which is 0 without pan-and-scan."""

    def integers(self, images: Sequence[Geometry]) -> dict[str, Integers]:
        return {"num_crops": i64([len(images)], [0] * len(images))}


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipSpec(PlaneSpec):
    """CLIP's and LLaVA-1.5's: the shorter side to `shortest`, then a central crop."""

    shortest: int
    crop_height: int
    crop_width: int
    tokens: int = 0

    def geometry(self, height: int, width: int) -> Geometry:
        height, width = reading.check_positive(height, width)
        short, long = min(height, width), max(height, width)
        new_long = int(self.shortest * long / short)
        new_height, new_width = (new_long, self.shortest) if width <= height else (self.shortest, new_long)
        top, left = int((new_height - self.crop_height) / 2.0), int((new_width - self.crop_width) / 2.0)
        return Geometry(new_height, new_width, tokens=self.tokens, crop=(top, left, self.crop_height, self.crop_width))


@dataclass(frozen=True, slots=True, kw_only=True)
class PixtralSpec(PlaneSpec):
    """Pixtral's and Mistral 3's: within (max_height, max_width), in whole patches; each row of tokens has one extra."""

    max_height: int
    max_width: int
    patch_height: int
    patch_width: int
    merge_size: int = 1

    def geometry(self, height: int, width: int) -> Geometry:
        height, width = reading.check_positive(height, width)
        ratio = max(height / self.max_height, width / self.max_width)
        if ratio > 1:
            height, width = math.floor(height / ratio), math.floor(width / ratio)
        grid_h, grid_w = (height - 1) // self.patch_height + 1, (width - 1) // self.patch_width + 1
        if not grid_h or not grid_w:
            raise ValueError("one side would become 0")
        tokens = grid_h // self.merge_size * (grid_w // self.merge_size + 1)
        return Geometry(grid_h * self.patch_height, grid_w * self.patch_width, 1, grid_h, grid_w, tokens)

    def integers(self, images: Sequence[Geometry]) -> dict[str, Integers]:
        return {"image_sizes": i64([len(images), 2], (side for g in images for side in g.size))}


# --- from a model's files ---


def _read_qwen2_vl(config: Config, frames: int | None = 1, **more: Any) -> Qwen2VLSpec:
    reading.check_steps(config)
    patch, merge, temporal = (
        reading.require_count(config, key, 256) for key in ("patch_size", "merge_size", "temporal_patch_size")
    )
    low, high = pixel_bounds(config)
    return Qwen2VLSpec(
        **reading.read_common(config, BICUBIC, reading.CLIP_MEAN_STD),
        patch_size=patch,
        merge_size=merge,
        temporal_patch_size=temporal,
        min_pixels=reading.check_count(low, 1 << 40),
        max_pixels=reading.check_count(high, 1 << 40),
        frames=frames or temporal,
        **more,
    )


def pixel_bounds(config: Config) -> tuple[Any, Any]:
    """The least and the most pixels. Raises ValueError if the file has none."""
    return _bound(config, "min_pixels", "shortest_edge"), _bound(config, "max_pixels", "longest_edge")


def _bound(config: Config, own: str, edge: str) -> Any:
    """A limit on pixels: by its own name, which takes precedence, or as an edge of `size`."""
    size = config.get("size") or {}
    if set(size) - {"shortest_edge", "longest_edge", "min_pixels", "max_pixels"}:
        raise ValueError("not a size of this processor")
    return config[own] if config.get(own) is not None else reading.require(size, edge)


def read_qwen(config: Config, model: Config) -> ProcessorSpec:
    return _read_qwen2_vl(config)


def read_glm(config: Config, model: Config) -> ProcessorSpec:
    if config.get("min_pixels") is not None or config.get("max_pixels") is not None:
        raise ValueError("not read by this processor")
    return _read_qwen2_vl(config, frames=None, grows=True)


def read_paddle_ocr(config: Config, model: Config) -> ProcessorSpec:
    return _rows_of_patches(_read_qwen2_vl(config), grows=True, planes=True)


def read_hunyuan(config: Config, model: Config) -> ProcessorSpec:
    read = _read_qwen2_vl({**config, "resample": BICUBIC})  # whatever its file says, as the processor does
    extra = reading.get_or(model, "cat_extra_token", True)
    if type(extra) is not bool:
        raise ValueError("cat_extra_token is neither true nor false")
    return _rows_of_patches(read, per_row=1, extra=2 if extra else 0)


def _rows_of_patches(read: Qwen2VLSpec, **more: Any) -> RowsOfPatchesSpec:
    values = asdict(read)
    del values["frames"], values["grows"]
    return RowsOfPatchesSpec(**values | {"merge": read.merge_size, "merge_size": 1} | more)


def read_siglip(config: Config, model: Config) -> ProcessorSpec:
    return SiglipSpec(**read_fixed(config, model, BICUBIC))


def read_fixed(config: Config, model: Config, resample: int) -> dict[str, Any]:
    """The fields of a processor with one size for all images."""
    reading.check_steps(config)
    size = reading.require(config, "size")
    if type(size) is int:
        raise ValueError("size is one number, which some versions apply to the shorter side")
    height, width = reading.check_pair(size)
    tokens = reading.optional_count(model.get("image_seq_length"))
    common = reading.read_common(config, resample, reading.HALF_MEAN_STD)
    return {**common, "height": height, "width": width, "tokens": tokens}


def read_cropped(config: Config, model: Config) -> ProcessorSpec:
    reading.check_steps(config, do_center_crop=True)
    size = reading.require(config, "size")
    if isinstance(size, Mapping) and set(size) == {"shortest_edge"}:
        size = size["shortest_edge"]
    elif config.get("default_to_square"):
        raise ValueError("one number for two sides")
    shortest = reading.check_count(size, 1 << 14)
    height, width = reading.require_pair(config, "crop_size")
    if max(height, width) > shortest:
        raise ValueError("the crop would be padded")
    patch = reading.optional_count(model.get("patch_size"))
    tokens = (height // patch) * (width // patch) if patch else 0
    return ClipSpec(
        **reading.read_common(config, BICUBIC, reading.CLIP_MEAN_STD),
        shortest=shortest,
        crop_height=height,
        crop_width=width,
        tokens=tokens,
    )


def read_pixtral(config: Config, model: Config) -> ProcessorSpec:
    reading.check_steps(config, do_pad=True)
    size = reading.require(config, "size")
    most = (
        (reading.check_count(size["longest_edge"], 1 << 14),) * 2
        if set(size) == {"longest_edge"}
        else reading.check_pair(size)
    )
    patch = reading.require_pair(config, "patch_size")
    merge = reading.optional_count(model.get("spatial_merge_size")) or 1
    return PixtralSpec(
        **reading.read_common(config, BICUBIC, reading.CLIP_MEAN_STD),
        max_height=most[0],
        max_width=most[1],
        patch_height=patch[0],
        patch_width=patch[1],
        merge_size=merge,
    )
