"""Which pixels a vision-language model's image processor makes of an image of a given size: its numbers and its geometry.

Rules: pure integers and floats, no torch, no I/O. A spec is one processor of one model; each family of processors is a
subclass in families.py. Sizes are (height, width) in pixels.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar, Final

BILINEAR, BICUBIC, LANCZOS = 2, 3, 1  # PIL's numbers, as the config file has them
RESAMPLES: Final = (BILINEAR, BICUBIC, LANCZOS)

Size = tuple[int, int]
Shape = tuple[str, list[int]]  # safetensors dtype, shape


@dataclass(frozen=True, slots=True)
class Geometry:
    """What an image becomes: resized to (height, width), then cut to `crop` (top, left, height, width) where there is one.

    The patch grid is 0 where the processor makes no patches; `tokens` are those that the language model sees, 0 where the
    processor's own files do not say.
    """

    height: int
    width: int
    grid_t: int = 0
    grid_h: int = 0
    grid_w: int = 0
    tokens: int = 0
    crop: tuple[int, int, int, int] | None = None

    @property
    def size(self) -> Size:
        """Height and width of what the model sees."""
        return self.crop[2:] if self.crop is not None else (self.height, self.width)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessorSpec(ABC):
    """One image processor, in numbers: what all families have."""

    resample: int
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]

    tensors: ClassVar[bool] = True  # whether /v1/preprocess can give this family's processor output

    @abstractmethod
    def geometry(self, height: int, width: int) -> Geometry:
        """What an image of this size becomes. Raises ValueError where the processor refuses it."""

    @abstractmethod
    def shapes(self, images: Sequence[tuple[Size, tuple[int, int, int]]]) -> dict[str, Shape]:
        """The processor's tensors of a batch, by its names: integers first. An image is its final size and its grid."""

    def keeps(self, geometry: Geometry) -> bool:
        """Whether the processor leaves an image alone that already has the final size of `geometry`."""
        height, width = geometry.size
        try:
            again = self.geometry(height, width)
        except ValueError:
            return False
        whole = again.crop in (None, (0, 0, height, width))
        return whole and (again.height, again.width, again.tokens) == (height, width, geometry.tokens)

    @property
    def floats(self) -> bool:
        """Whether the processor's output is float32; else it is the bytes."""
        return self.do_normalize or self.do_rescale

    @property
    def dtype(self) -> str:
        """The safetensors dtype of `pixel_values`."""
        return "F32" if self.floats else "U8"

    def to_json(self) -> str:
        """The spec as JSON with sorted keys: equal specs give equal texts."""
        return json.dumps({"family": type(self).__name__, **asdict(self)}, sort_keys=True)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with anything that changes a pixel."""
        return hashlib.blake2b(self.to_json().encode(), digest_size=8).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchSpec(ProcessorSpec):
    """A processor whose output is rows of patches: (grid_h * grid_w, 3 * temporal * patch * patch)."""

    patch_size: int
    merge_size: int
    temporal_patch_size: int

    def shapes(self, images: Sequence[tuple[Size, tuple[int, int, int]]]) -> dict[str, Shape]:
        rows = sum(t * h * w for _, (t, h, w) in images)
        row = 3 * self.temporal_patch_size * self.patch_size**2
        return {"image_grid_thw": ("I64", [len(images), 3]), "pixel_values": (self.dtype, [rows, row])}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaneSpec(ProcessorSpec):
    """A processor whose output is planes: (images, 3, height, width), smaller ones padded with zeros below and to the right."""

    def shapes(self, images: Sequence[tuple[Size, tuple[int, int, int]]]) -> dict[str, Shape]:
        height, width = max(s[0] for s, _ in images), max(s[1] for s, _ in images)
        return {"pixel_values": (self.dtype, [len(images), 3, height, width])}
