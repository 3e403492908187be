"""The numbers and the geometry of a vision-language model's image processor.

Rules: pure integers and floats, no torch, no I/O. A spec is one processor of one model; each family of processors is a
subclass in families/. Sizes are (height, width) in pixels.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar, Final

BILINEAR, BICUBIC, LANCZOS = 2, 3, 1  # PIL's numbers, as the config file has them
RESAMPLES: Final = (BILINEAR, BICUBIC, LANCZOS)

# How the images of a batch are laid out in `pixel_values`: one after the other; as planes with zeros to the right and
# below; with zeros after each image up to the shape's size; next to each other in each of the leading rows; or the
# first views of all images, then, in a tensor of their own, their other views.
JOINED, PLANES, FILLED, ABREAST, SPLIT = "joined", "planes", "filled", "abreast", "split"

# How the tiles of one image are laid out: (tile, channel, y, x); (tile, y, x, channel), also with zeros after each
# view; (channel, y, tile, x); or (tile, channel, y, x) of views whose tiles differ in size, one after the other.
TILES, ROWS, FILLED_ROWS, STRIPS, MIXED = "tiles", "rows", "filled rows", "strips", "mixed"

Size = tuple[int, int]
Box = tuple[int, int, int, int]  # top, left, height, width
Shape = tuple[str, list[int]]  # safetensors dtype, shape


@dataclass(frozen=True, slots=True)
class Repeated:
    """One number, repeated: a mask of ones would take tens of megabytes per image."""

    number: int
    times: int


Integers = tuple[Shape, Sequence[int] | Repeated]  # a tensor of integers


@dataclass(frozen=True, slots=True)
class ImageView:
    """A copy of an image, resized to `size`, placed at (top, left) on a black canvas, and cut into tiles row by row."""

    size: Size
    canvas: Size
    tile: Size
    top: int = 0
    left: int = 0
    before: tuple[Size, ...] = ()  # sizes that it is resized to first, in order
    box: Box | None = None  # what is then taken of it, before it is resized to `size`

    @property
    def grid(self) -> Size:
        """Rows and columns of tiles."""
        return self.canvas[0] // self.tile[0], self.canvas[1] // self.tile[1]

    @property
    def tiles(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True, slots=True)
class Geometry:
    """The target of an image: resized to (height, width), then cut to `crop` (top, left, height, width), if any.

    The patch grid is 0 if the processor makes no patches. `tokens` are those that the language model sees, 0 if the
    processor's files do not tell. With several views, (height, width) is the canvas of the largest one, and `original`
    the image's own size.
    """

    height: int
    width: int
    grid_t: int = 0
    grid_h: int = 0
    grid_w: int = 0
    tokens: int = 0
    crop: Box | None = None
    views: tuple[ImageView, ...] = ()
    original: Size = (0, 0)
    padded: Size = (0, 0)  # to which it is padded with black, below and right, before anything else

    @property
    def tiles(self) -> int:
        """The number of tiles of all views."""
        return sum(view.tiles for view in self.views)

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
    half: str = ""  # BF16 or F16: the floats are rounded to it at the end

    tensors: ClassVar[bool] = True  # whether /v1/preprocess can return this family's tensors
    inline: ClassVar[bool] = True  # whether a resized image can replace the original
    batch: ClassVar[str] = JOINED  # layout of a batch in `pixel_values`

    @abstractmethod
    def geometry(self, height: int, width: int) -> Geometry:
        """The target of an image of this size. Raises ValueError if the processor refuses it."""

    @abstractmethod
    def pixels(self, images: Sequence[Geometry]) -> list[int]:
        """The shape of a batch's `pixel_values`."""

    def integers(self, images: Sequence[Geometry]) -> dict[str, Integers]:
        """The processor's other tensors of a batch, by its names: 8-byte integers before smaller ones."""
        return {}

    def values(self, images: Sequence[Geometry]) -> dict[str, list[int]]:
        """The shapes of a batch's tensors of pixels, by the processor's names."""
        return {"pixel_values": self.pixels(images)}

    def shapes(self, images: Sequence[Geometry]) -> dict[str, Shape]:
        """The dtype and shape of each of a batch's tensors, by the processor's names: integers first."""
        integers = {name: shape for name, (shape, _) in self.integers(images).items()}
        return integers | {name: (self.dtype, shape) for name, shape in self.values(images).items()}

    def keeps(self, geometry: Geometry) -> bool:
        """True if the processor does not change an image that already has the final size of `geometry`."""
        if not self.inline:
            return False
        height, width = geometry.size
        try:
            again = self.geometry(height, width)
        except ValueError:
            return False
        whole = again.crop in (None, (0, 0, height, width))
        return whole and (again.height, again.width, again.tokens) == (height, width, geometry.tokens)

    @property
    def floats(self) -> bool:
        """True if the processor makes floats (float32 until they are rounded); else its output is the bytes."""
        return self.do_normalize or self.do_rescale

    @property
    def dtype(self) -> str:
        """The safetensors dtype of `pixel_values`."""
        return (self.half or "F32") if self.floats else "U8"

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

    def pixels(self, images: Sequence[Geometry]) -> list[int]:
        rows = sum(g.grid_t * g.grid_h * g.grid_w for g in images)
        return [rows, 3 * self.temporal_patch_size * self.patch_size**2]

    def integers(self, images: Sequence[Geometry]) -> dict[str, Integers]:
        return {"image_grid_thw": i64([len(images), 3], (n for g in images for n in (g.grid_t, g.grid_h, g.grid_w)))}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaneSpec(ProcessorSpec):
    """A processor whose output is planes, (images, 3, height, width); smaller ones get zeros below and right."""

    batch: ClassVar[str] = PLANES

    def pixels(self, images: Sequence[Geometry]) -> list[int]:
        return [len(images), 3, max(g.size[0] for g in images), max(g.size[1] for g in images)]


@dataclass(frozen=True, slots=True, kw_only=True)
class TileSpec(ProcessorSpec):
    """A processor that cuts views of an image into tiles, (tiles, 3, height, width), one image after the other."""

    inline: ClassVar[bool] = False
    layout: ClassVar[str] = TILES  # layout of one image's values

    @property
    def strip(self) -> int:
        """Height of a strip, for the layout STRIPS."""
        raise NotImplementedError

    @property
    def rows(self) -> int:
        """Patches of each view, those of zeros included, for the layout FILLED_ROWS."""
        raise NotImplementedError

    def pixels(self, images: Sequence[Geometry]) -> list[int]:
        return [sum(g.tiles for g in images), 3, *images[0].views[0].tile]


def i64(shape: list[int], numbers: Iterable[int]) -> Integers:
    """A tensor of 8-byte integers."""
    return ("I64", shape), list(numbers)
