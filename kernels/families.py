"""The families of image processors that are known word for word, and how each is read from a model's files.

A processor that is not in FAMILIES, or that has a step of its own, is None, which callers take as "pass the image through
untouched": never a guess. The arithmetic of each is the processor's own, divisions in its order and rounding as Python rounds;
tests/images/test_families.py holds each against the installed transformers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

from sidecar.kernels.grid import (
    BICUBIC,
    BILINEAR,
    LANCZOS,
    RESAMPLES,
    Geometry,
    PatchSpec,
    PlaneSpec,
    ProcessorSpec,
    Shape,
    Size,
)

MAX_ASPECT: Final = 200  # Qwen's and GLM's processors refuse longer images
IDEFICS_MOST: Final = 4096  # pixels of the longer side
CLIP: Final = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF: Final = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Smart(PatchSpec):
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
        height, width = _positive(height, width)
        if self.grows and (height < factor or width < factor):
            scale = max(factor / height, factor / width)
            height, width = int(height * scale), int(width * scale)
        if max(height, width) / min(height, width) > MAX_ASPECT:
            raise ValueError(f"one side is more than {MAX_ASPECT} times the other")
        # round() is round-half-to-even, and the order of the divisions matters: the processor's own arithmetic.
        new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
        if self.frames * new_height * new_width > self.max_pixels:
            beta = math.sqrt((self.frames * height * width) / self.max_pixels)
            new_height = max(factor, math.floor(height / beta / factor) * factor)
            new_width = max(factor, math.floor(width / beta / factor) * factor)
        elif self.frames * new_height * new_width < self.min_pixels:
            beta = math.sqrt(self.min_pixels / (self.frames * height * width))
            new_height = math.ceil(height * beta / factor) * factor
            new_width = math.ceil(width * beta / factor) * factor
        if not new_height or not new_width:
            raise ValueError("one side would become 0")
        return new_height, new_width


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed(PlaneSpec):
    """SigLIP's and Gemma 3's: one size for all images, whatever their shape."""

    height: int
    width: int
    tokens: int = 0

    def geometry(self, height: int, width: int) -> Geometry:
        _positive(height, width)
        return Geometry(self.height, self.width, tokens=self.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cropped(PlaneSpec):
    """CLIP's and LLaVA-1.5's: the shorter side to `shortest`, then the middle."""

    shortest: int
    crop_height: int
    crop_width: int
    tokens: int = 0

    def geometry(self, height: int, width: int) -> Geometry:
        height, width = _positive(height, width)
        short, long = min(height, width), max(height, width)
        new_long = int(self.shortest * long / short)
        new_height, new_width = (new_long, self.shortest) if width <= height else (self.shortest, new_long)
        top, left = int((new_height - self.crop_height) / 2.0), int((new_width - self.crop_width) / 2.0)
        return Geometry(new_height, new_width, tokens=self.tokens, crop=(top, left, self.crop_height, self.crop_width))


@dataclass(frozen=True, slots=True, kw_only=True)
class Longest(PlaneSpec):
    """Pixtral's and Mistral 3's: within (max_height, max_width), rounded up to whole patches. Each row of tokens ends with one more."""

    max_height: int
    max_width: int
    patch_height: int
    patch_width: int
    merge_size: int = 1

    def geometry(self, height: int, width: int) -> Geometry:
        height, width = _positive(height, width)
        ratio = max(height / self.max_height, width / self.max_width)
        if ratio > 1:
            height, width = math.floor(height / ratio), math.floor(width / ratio)
        grid_h, grid_w = (height - 1) // self.patch_height + 1, (width - 1) // self.patch_width + 1
        if not grid_h or not grid_w:
            raise ValueError("one side would become 0")
        tokens = grid_h // self.merge_size * (grid_w // self.merge_size + 1)
        return Geometry(grid_h * self.patch_height, grid_w * self.patch_width, 1, grid_h, grid_w, tokens)

    def shapes(self, images: Sequence[tuple[Size, tuple[int, int, int]]]) -> dict[str, Shape]:
        return {"image_sizes": ("I64", [len(images), 2]), **PlaneSpec.shapes(self, images)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Split(PlaneSpec):
    """Idefics 3's and SmolVLM's first step: the longer side to `longest`. The processor then cuts the image into tiles.

    What is handed on is the image after the first step; the tiles' tensors are not made here.
    """

    longest: int
    tile: int
    splits: bool = True
    tokens_per_tile: int = 0

    tensors: ClassVar[bool] = False

    def geometry(self, height: int, width: int) -> Geometry:
        new_height, new_width = _below(*_to_longest(*_positive(height, width), self.longest))
        tokens = self.tokens_per_tile * self._tiles(new_height, new_width)
        return Geometry(new_height, new_width, tokens=tokens)

    def _tiles(self, height: int, width: int) -> int:
        if not self.splits:
            return 1
        aspect, tile = width / height, self.tile
        if width >= height:
            width = math.ceil(width / tile) * tile
            height = math.ceil(int(width / aspect) / tile) * tile
        else:
            height = math.ceil(height / tile) * tile
            width = math.ceil(int(height * aspect) / tile) * tile
        rows, columns = height // tile, width // tile
        return rows * columns + 1 if rows > 1 or columns > 1 else 1


def _to_longest(height: int, width: int, longest: int) -> Size:
    """The longer side becomes `longest`, the other one follows and is made even."""
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
    if width >= height and width > IDEFICS_MOST:
        width, height = IDEFICS_MOST, int(IDEFICS_MOST / aspect)
    elif height > width and height > IDEFICS_MOST:
        height, width = IDEFICS_MOST, int(IDEFICS_MOST * aspect)
    return max(height, 1), max(width, 1)


def _positive(height: int, width: int) -> Size:
    if min(height, width) < 1:
        raise ValueError("an image without pixels")
    return height, width


# --- from a model's files ---


def _common(config: Config, resample: int, mean_std: tuple[tuple[float, ...], tuple[float, ...]]) -> dict[str, Any]:
    """The numbers that all families have. Raises ValueError, KeyError or TypeError for values that the arithmetic does not hold for."""
    values: dict[str, Any] = {
        "resample": resample, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": mean_std[0],
        "image_std": mean_std[1],
    }  # fmt: skip
    values |= {key: config[key] for key in values if config.get(key) is not None}
    values |= {key: tuple(float(v) for v in values[key]) for key in ("image_mean", "image_std")}
    sane = (
        values["resample"] in RESAMPLES
        and all(type(values[key]) is bool for key in ("do_rescale", "do_normalize"))
        and type(values["rescale_factor"]) in (int, float)
        and values["rescale_factor"] > 0
        and len(values["image_mean"]) == len(values["image_std"]) == 3
        and all(values["image_std"])
    )
    if not sane:
        raise ValueError("a value that is not known")
    return values


def _steps(config: Config, **wanted: Any) -> None:
    """Raises ValueError where a step has another value than the one that this family's arithmetic has; absent ones are defaults."""
    wanted = {
        "do_resize": True,
        "do_convert_rgb": True,
        "do_center_crop": False,
        "do_pad": False,
        "disable_resize": False,
    } | wanted
    if any(config.get(key, value) not in (value, None) for key, value in wanted.items() if value is not ...):
        raise ValueError("a step that is not known")


def _count(value: Any, most: int = 1 << 30) -> int:
    if type(value) is not int or not 0 < value <= most:
        raise ValueError("not a size")
    return value


def _pair(value: Any) -> Size:
    """A size as {"height", "width"} or one number."""
    if isinstance(value, Mapping):
        if set(value) - {"height", "width"}:
            raise ValueError("not a size")
        return _count(value["height"], 1 << 14), _count(value["width"], 1 << 14)
    return _count(value, 1 << 14), _count(value, 1 << 14)


def _smart(config: Config, size: Config, frames: int | None = 1, **more: Any) -> Smart:
    _steps(config)
    patch, merge, temporal = (
        _count(default if config.get(key) is None else config[key], 256)
        for key, default in (("patch_size", 14), ("merge_size", 2), ("temporal_patch_size", 2))
    )
    size = config.get("size") or size
    low = size["shortest_edge"] if config.get("min_pixels") is None else config["min_pixels"]
    high = size["longest_edge"] if config.get("max_pixels") is None else config["max_pixels"]
    return Smart(
        **_common(config, BICUBIC, CLIP), patch_size=patch, merge_size=merge, temporal_patch_size=temporal,
        min_pixels=_count(low, 1 << 40), max_pixels=_count(high, 1 << 40), frames=frames or temporal, **more,
    )  # fmt: skip


def _qwen(config: Config, model: Config) -> ProcessorSpec:
    return _smart(config, {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280})


def _glm(config: Config, model: Config) -> ProcessorSpec:
    if config.get("min_pixels") is not None or config.get("max_pixels") is not None:
        raise ValueError("not read by this processor")
    return _smart(config, {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 15000}, frames=None, grows=True)


def _fixed(resample: int) -> Callable[[Config, Config], ProcessorSpec]:
    def read(config: Config, model: Config) -> ProcessorSpec:
        _steps(config, do_pan_and_scan=False)
        height, width = _pair(config.get("size") or 224)
        tokens = _optional(model.get("image_seq_length"))
        return Fixed(**_common(config, resample, HALF), height=height, width=width, tokens=tokens)

    return read


def _cropped(config: Config, model: Config) -> ProcessorSpec:
    _steps(config, do_center_crop=True)
    size = config.get("size") or {"shortest_edge": 224}
    shortest = _count(
        size["shortest_edge"] if isinstance(size, Mapping) and set(size) == {"shortest_edge"} else size, 1 << 14
    )
    height, width = _pair(config.get("crop_size") or 224)
    if max(height, width) > shortest:
        raise ValueError("the crop would be padded")
    patch = _optional(model.get("patch_size"))
    tokens = (height // patch) * (width // patch) if patch else 0
    return Cropped(
        **_common(config, BICUBIC, CLIP), shortest=shortest, crop_height=height, crop_width=width, tokens=tokens
    )


def _pixtral(config: Config, model: Config) -> ProcessorSpec:
    _steps(config, do_pad=True)
    size = config.get("size") or {"longest_edge": 1024}
    most = (_count(size["longest_edge"], 1 << 14),) * 2 if "longest_edge" in size else _pair(size)
    patch = _pair(config.get("patch_size") or 16)
    merge = _optional(model.get("spatial_merge_size")) or 1
    return Longest(
        **_common(config, BICUBIC, CLIP), max_height=most[0], max_width=most[1], patch_height=patch[0], patch_width=patch[1],
        merge_size=merge,
    )  # fmt: skip


def _idefics(config: Config, model: Config) -> ProcessorSpec:
    _steps(config, do_pad=True)
    size, tile = config.get("size") or {"longest_edge": 4 * 364}, config.get("max_image_size") or {"longest_edge": 364}
    splits = config.get("do_image_splitting", True)
    return Split(
        **_common(config, LANCZOS, HALF), longest=_count(size["longest_edge"], 1 << 14), tile=_count(tile["longest_edge"], 1 << 14),
        splits=splits is not False, tokens_per_tile=_optional(model.get("image_seq_len")),
    )  # fmt: skip


def _optional(value: Any) -> int:
    return value if type(value) is int and 0 < value <= 1 << 20 else 0


Reader = Callable[[Config, Config], ProcessorSpec]

# Class name in the file (its "Fast" form of transformers 4 is the same processor) -> how to read it.
FAMILIES: Final[Mapping[str, Reader]] = {
    "Qwen2VLImageProcessor": _qwen,  # Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5 and others: one processor, other numbers
    "Qwen2_5_VLImageProcessor": _qwen,
    "Qwen3VLImageProcessor": _qwen,
    "Glm4vImageProcessor": _glm,
    "CLIPImageProcessor": _cropped,  # LLaVA-1.5
    "LlavaImageProcessor": _cropped,
    "SiglipImageProcessor": _fixed(BICUBIC),
    "Gemma3ImageProcessor": _fixed(BILINEAR),
    "PixtralImageProcessor": _pixtral,  # Mistral 3 and others
    "Idefics3ImageProcessor": _idefics,
    "SmolVLMImageProcessor": _idefics,
}
CLASSES: Final[Mapping[str, type[ProcessorSpec]]] = {c.__name__: c for c in (Smart, Fixed, Cropped, Longest, Split)}


def from_config(config: Config, model: Config | None = None) -> ProcessorSpec | None:
    """Read the content of a `preprocessor_config.json`. None where the processor, or a step of it, is not known.

    `model` is the top level of `processor_config.json`, which some families need for counting tokens.
    """
    name = config.get("image_processor_type")
    read = FAMILIES.get(name.removesuffix("Fast")) if isinstance(name, str) else None
    try:
        return read(config, model or {}) if read else None
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def from_dir(path: str) -> ProcessorSpec | None:
    """Read a model's directory: `processor_config.json` (its image part) and `preprocessor_config.json`.

    Which of the two is read differs between versions of the engines' libraries: where both are there and disagree, None.
    """
    model = _read(Path(path) / "processor_config.json")
    configs = (model.get("image_processor"), _read(Path(path) / "preprocessor_config.json"))
    specs = {from_config(config, model) for config in configs if isinstance(config, dict) and config}
    return specs.pop() if len(specs) == 1 else None


def from_json(text: str) -> ProcessorSpec:
    """Inverse of ProcessorSpec.to_json."""
    raw: dict[str, Any] = json.loads(text)
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
    return CLASSES[values.pop("family")](**values)


def _read(path: Path) -> dict[str, Any]:
    """A JSON file's object; empty where there is none."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
