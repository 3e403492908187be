"""Which pixels a vision-language model's image processor makes of an image of a given size: its spec and its geometry.

Rules: pure integers and floats, no torch, no I/O except `from_dir`. A processor that is not known word for word is None,
which callers take as "pass the image through untouched": never a guess. Sizes are (height, width) in pixels.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

QWEN2_VL: Final = frozenset(
    {
        "Qwen2VLImageProcessor",  # Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5 and others: one processor, other numbers
        "Qwen2VLImageProcessorFast",
        "Qwen2_5_VLImageProcessor",
        "Qwen3VLImageProcessor",
        "Qwen3VLImageProcessorFast",
    }
)
MAX_ASPECT: Final = 200  # the processor refuses longer images
BILINEAR, BICUBIC = 2, 3  # PIL's numbers, as the config file has them
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# What Qwen2VLImageProcessor takes where the file is silent.
DEFAULTS: Final[Mapping[str, Any]] = {
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "resample": BICUBIC,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}
DEFAULT_SIZE: Final[Mapping[str, int]] = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
# Steps that we would have to leave out or add: with another value than this the processor is not ours.
REQUIRED: Final[Mapping[str, bool]] = {
    "do_resize": True,
    "do_convert_rgb": True,
    "do_center_crop": False,
    "do_pad": False,
    "disable_resize": False,
}


@dataclass(frozen=True, slots=True)
class Geometry:
    """The size an image is resized to, its patch grid, and the tokens that the language model sees of it."""

    height: int
    width: int
    grid_t: int
    grid_h: int
    grid_w: int
    tokens: int


@dataclass(frozen=True, slots=True)
class ProcessorSpec:
    """One image processor, in numbers. `min_pixels` and `max_pixels` bound the resized image."""

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    min_pixels: int
    max_pixels: int
    resample: int
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ProcessorSpec | None:
        """Read the content of a `preprocessor_config.json`. None where the processor, or a step of it, is not known."""
        if config.get("image_processor_type") not in QWEN2_VL:
            return None
        if any(config.get(key, wanted) not in (wanted, None) for key, wanted in REQUIRED.items()):
            return None
        values = {key: default if config.get(key) is None else config[key] for key, default in DEFAULTS.items()}
        size = config.get("size") or DEFAULT_SIZE
        try:
            values["min_pixels"] = size["shortest_edge"] if config.get("min_pixels") is None else config["min_pixels"]
            values["max_pixels"] = size["longest_edge"] if config.get("max_pixels") is None else config["max_pixels"]
            values["image_mean"] = tuple(float(v) for v in values["image_mean"])
            values["image_std"] = tuple(float(v) for v in values["image_std"])
        except (KeyError, TypeError, ValueError):
            return None
        return cls(**values) if _sane(values) else None

    @classmethod
    def from_dir(cls, path: str) -> ProcessorSpec | None:
        """Read a model's directory: `processor_config.json` (its image part) and `preprocessor_config.json`.

        Which of the two is read differs between versions of the engines' libraries: where both are there and disagree, None.
        """
        configs = (
            _read(Path(path) / "processor_config.json").get("image_processor"),
            _read(Path(path) / "preprocessor_config.json"),
        )
        specs = {cls.from_config(config) for config in configs if isinstance(config, dict) and config}
        return specs.pop() if len(specs) == 1 else None

    @classmethod
    def from_json(cls, text: str) -> ProcessorSpec:
        """Inverse of `to_json`."""
        raw: dict[str, Any] = json.loads(text)
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
        return cls(**values)

    def to_json(self) -> str:
        """The spec as JSON with sorted keys: equal specs give equal texts."""
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with anything that changes a pixel."""
        return hashlib.blake2b(self.to_json().encode(), digest_size=8).hexdigest()

    def geometry(self, height: int, width: int) -> Geometry:
        """What an image of this size becomes. Raises ValueError where the processor refuses it."""
        new_height, new_width = self._smart_resize(height, width)
        grid_h, grid_w = new_height // self.patch_size, new_width // self.patch_size
        return Geometry(new_height, new_width, 1, grid_h, grid_w, grid_h * grid_w // self.merge_size**2)

    def keeps(self, geometry: Geometry) -> bool:
        """Whether the processor leaves an image that already has this size alone; false for some very long images."""
        try:
            return self.geometry(geometry.height, geometry.width) == geometry
        except ValueError:
            return False

    def _smart_resize(self, height: int, width: int) -> tuple[int, int]:
        """Multiples of patch * merge near the image's size, with a pixel count between the two bounds."""
        if min(height, width) < 1:
            raise ValueError("an image without pixels")
        if max(height, width) / min(height, width) > MAX_ASPECT:
            raise ValueError(f"one side is more than {MAX_ASPECT} times the other")
        factor = self.patch_size * self.merge_size
        # round() is round-half-to-even, and the order of the divisions matters: the processor's own arithmetic.
        new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
        if new_height * new_width > self.max_pixels:
            beta = math.sqrt((height * width) / self.max_pixels)
            new_height = max(factor, math.floor(height / beta / factor) * factor)
            new_width = max(factor, math.floor(width / beta / factor) * factor)
        elif new_height * new_width < self.min_pixels:
            beta = math.sqrt(self.min_pixels / (height * width))
            new_height = math.ceil(height * beta / factor) * factor
            new_width = math.ceil(width * beta / factor) * factor
        if not new_height or not new_width:
            raise ValueError("one side would become 0")
        return new_height, new_width


def _read(path: Path) -> dict[str, Any]:
    """A JSON file's object; empty where there is none."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _sane(values: Mapping[str, Any]) -> bool:
    """Whether a file's values are of the kind and size that the arithmetic holds for."""
    counts = ("patch_size", "merge_size", "temporal_patch_size", "min_pixels", "max_pixels")
    return (
        all(type(values[key]) is int and values[key] > 0 for key in counts)
        and max(values[key] for key in counts[:3]) <= 256
        and values["resample"] in (BILINEAR, BICUBIC)
        and all(type(values[key]) is bool for key in ("do_rescale", "do_normalize"))
        and type(values["rescale_factor"]) in (int, float)
        and values["rescale_factor"] > 0
        and len(values["image_mean"]) == len(values["image_std"]) == 3
        and all(values["image_std"])
    )
