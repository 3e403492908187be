"""A ragged batch of images as one table of integers, which the GPU kernel reads in addition to pixels.

Rules: pure numpy, no torch. Every image has its own size, target, crop and layout, so any batch needs two launches. A
layout is eight strides: output pixel (c, y, x), with y = Y * patch + py and so on, and its temporal copy t, are at

    (Y // merge) * down_merged + (Y % merge) * down_patch + py * down_pixel
  + (X // merge) * across_merged + (X % merge) * across_patch + px * across_pixel + c * channel + t * copy

which covers patches, planes and rows of RGB (the latter two with patch = merge = 1). A crop is a slice of the tables,
and only source rows that a window touches are read. Weights are those of reference.py, vectorised, added in the same
order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sidecar.kernels.grid import BICUBIC, BILINEAR, LANCZOS, Geometry, PatchSpec
from sidecar.kernels.reference import MAX_PRECISION

KERNEL_RADIUS: Final = {LANCZOS: 3, BILINEAR: 1, BICUBIC: 2}
# Taps in three 32-bit words, which one step of the horizontal pass loads.
TAPS_PER_STEP: Final = 4
# Alignment of images and scratch rows, so that the vertical pass loads whole vectors.
ALIGN_BYTES: Final = 16
# Readable bytes after the last image: three pixels of a padded window, and two words.
SLACK_BYTES: Final = 64
# Cached tables, of 10-100 KB each.
MAX_AXES: Final = 128
# Integers in one image's descriptor.
FIELDS: Final = 32

# The descriptor's fields by position.
(
    SOURCE, ROW_BYTES, TOP, ROWS, WIDTH, HEIGHT, SCRATCH, STRIDE,
    ACROSS_FIRST, ACROSS_WEIGHTS, ACROSS_TAPS, ACROSS_BITS,
    DOWN_FIRST, DOWN_WEIGHTS, DOWN_TAPS, DOWN_BITS, OUT, TABLE, PATCH, MERGE, DOWN_MERGED, DOWN_PATCH, DOWN_PIXEL,
    ACROSS_MERGED, ACROSS_PATCH, ACROSS_PIXEL, CHANNEL, COPY, COPIES, ACROSS_START, DOWN_START,
) = range(31)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Axis:
    """Integer weights of one axis: `weights` is (taps, target), so that neighbouring targets are next to each other."""

    first: NDArray[np.int32]
    weights: NDArray[np.int32]
    bits: int

    def part(self, start: int, length: int) -> Axis:
        """The weights of target positions start .. start + length."""
        return Axis(self.first[start : start + length], self.weights[:, start : start + length], self.bits)

    def touched(self, source: int) -> tuple[int, int]:
        """First source position that any window touches, and one past the last."""
        return int(self.first.min()), min(source, int(self.first.max()) + self.weights.shape[0])


@dataclass(frozen=True, slots=True)
class RaggedImage:
    """One image of a batch: its size in pixels, its target, and the index of its table of values."""

    height: int
    width: int
    geometry: Geometry
    resample: int
    patches: PatchSpec | None = None  # None: no patches
    planes: bool = False  # planes instead of rows of RGB, where there are no patches
    table: int = 0

    @property
    def values(self) -> int:
        """The number of output values."""
        height, width = self.geometry.size
        return 3 * height * width * (self.patches.temporal_patch_size if self.patches else 1)


@dataclass(frozen=True, slots=True)
class Tiles:
    """Rows and columns of one program in each launch: powers of two."""

    across: tuple[int, int]
    down: tuple[int, int]


# What the shipped kernels were compiled for.
GPU_TILES: Final = Tiles((8, 128), (16, 256))


@dataclass(frozen=True, slots=True)
class RaggedBatch:
    """Descriptors, tables, the image of each program of both launches, and the memory of the batch."""

    descriptors: NDArray[np.int64]  # (images, FIELDS)
    tables: NDArray[np.int32]
    across: NDArray[np.int32]  # image of each program of the horizontal launch
    down: NDArray[np.int32]  # likewise, vertical
    sources: tuple[int, ...]  # byte offset of each image
    source_bytes: int
    scratch_bytes: int
    outs: tuple[int, ...]  # first value of each image
    values: int
    tiles: Tiles

    def memory(self, value_bytes: int) -> int:
        """Bytes of device memory, for values of `value_bytes` bytes."""
        tables = sum(a.nbytes for a in (self.descriptors, self.tables, self.across, self.down))
        return self.source_bytes + self.scratch_bytes + self.values * value_bytes + tables

    def moved(self, value_bytes: int) -> int:
        """Bytes that move between the chip and its memory: everything once, the scratch twice."""
        return self.memory(value_bytes) + self.scratch_bytes


def lay_out(images: Sequence[RaggedImage], tiles: Tiles) -> RaggedBatch:
    """The batch's integers. Raises ValueError for impossible sizes."""
    tables = _Tables()
    descriptors = np.zeros((len(images), FIELDS), np.int64)
    programs: tuple[list[int], list[int]] = ([], [])
    sources, outs = [], []
    source = scratch = values = 0
    for d, image in zip(descriptors, images, strict=True):
        x, y = _axes(image)
        top, bottom = y.touched(image.height)
        height, width = image.geometry.size
        stride = _round_up(width, ALIGN_BYTES)
        d[SOURCE], d[ROW_BYTES], d[TOP], d[ROWS] = source // 4, 3 * image.width, top, bottom - top
        d[WIDTH], d[HEIGHT], d[SCRATCH], d[STRIDE] = width, height, scratch, stride
        d[ACROSS_FIRST : ACROSS_BITS + 1] = tables.put(image, "x", x, 0)
        d[DOWN_FIRST : DOWN_BITS + 1] = tables.put(image, "y", y, top)
        d[OUT], d[TABLE] = values, image.table
        d[PATCH : COPIES + 1] = _strides(image)
        d[ACROSS_START], d[DOWN_START] = sum(programs[0]), sum(programs[1])
        programs[0].append(_tiles(bottom - top, width, tiles.across))
        programs[1].append(3 * _tiles(height, width, tiles.down))
        sources.append(source)
        outs.append(values)
        source += _round_up(3 * image.width * image.height, ALIGN_BYTES)
        scratch += 3 * stride * (bottom - top)
        values += _round_up(image.values, ALIGN_BYTES)
    numbers = np.arange(len(images), dtype=np.int32)
    owners = [np.repeat(numbers, count) for count in programs]
    return RaggedBatch(
        descriptors,
        tables.joined(),
        owners[0],
        owners[1],
        tuple(sources),
        source + SLACK_BYTES,
        scratch + SLACK_BYTES,
        tuple(outs),
        values,
        tiles,
    )


class _Tables:
    """The axes' tables one after the other; equal ones once."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[int, int, int, int]] = {}
        self._parts: list[NDArray[np.int32]] = []
        self._size = 0

    def put(self, image: RaggedImage, name: str, axis: Axis, less: int) -> tuple[int, int, int, int]:
        """Offsets of first positions (reduced by `less`) and of weights, the number of taps, their precision."""
        key = (name, image.height, image.width, image.geometry, image.resample)
        if key not in self._known:
            taps, length = axis.weights.shape
            self._known[key] = (self._size, self._size + length, taps, axis.bits)
            self._parts += [axis.first - np.int32(less), axis.weights.reshape(-1)]
            self._size += length * (1 + taps)
        return self._known[key]

    def joined(self) -> NDArray[np.int32]:
        return np.concatenate(self._parts)


def _axes(image: RaggedImage) -> tuple[Axis, Axis]:
    g = image.geometry
    top, left, height, width = g.crop or (0, 0, g.height, g.width)
    if not (0 <= top <= g.height - height and 0 <= left <= g.width - width and height > 0 and width > 0):
        raise ValueError("the crop does not lie within the resized image")
    across = axis(image.width, g.width, image.resample, TAPS_PER_STEP).part(left, width)
    return across, axis(image.height, g.height, image.resample, 1).part(top, height)


def _strides(image: RaggedImage) -> tuple[int, ...]:
    height, width = image.geometry.size
    if image.patches is None:
        x, channel = (1, height * width) if image.planes else (3, 1)
        return 1, 1, width * x, 0, 0, x, 0, 0, channel, 0, 1
    p, m, t = image.patches.patch_size, image.patches.merge_size, image.patches.temporal_patch_size
    if height % (p * m) or width % (p * m):
        raise ValueError("the resized image is not a whole number of merged patches")
    row = 3 * t * p * p
    return p, m, width // p * m * row, m * row, p, m * m * row, row, 1, t * p * p, p * p, t


def _tiles(height: int, width: int, tile: tuple[int, int]) -> int:
    return -(-height // tile[0]) * -(-width // tile[1])


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@lru_cache(MAX_AXES)
def axis(source: int, target: int, resample: int, group: int) -> Axis:
    """Weights of one axis, as reference.taps has them, padded with zeros to a multiple of `group` taps.

    Windows near the end move back, so that none reaches more than `group` - 1 positions past the last.
    """
    if source < 1 or target < 1:
        raise ValueError("an axis without pixels")
    scale = source / target
    stretch = max(scale, 1.0)
    support = KERNEL_RADIUS[resample] * stretch
    center = scale * (np.arange(target) + 0.5)
    first = np.maximum((center - support + 0.5).astype(np.int64), 0)
    count = np.minimum((center + support + 0.5).astype(np.int64), source) - first
    real = np.zeros((_round_up(int(count.max()), group), target))
    total = np.zeros(target)
    for j in range(int(count.max())):  # additions in this order, tap by tap, round as the reference's
        real[j] = np.where(j < count, _kernel((j + first - center + 0.5) * (1 / stretch), resample), 0.0)
        total += real[j]
    real /= total
    bits = 0
    while bits < MAX_PRECISION and int(0.5 + real.max() * (1 << (bits + 1))) < 1 << 15:
        bits += 1
    scaled = real * (1 << bits)
    weights = np.trunc(scaled + np.where(scaled >= 0, 0.5, -0.5)).astype(np.int32)
    back = np.clip(first + len(weights) - source, 0, np.minimum(first, len(weights) - count))
    moved = np.arange(len(weights))[:, None] - back
    weights = np.where(moved < 0, np.int32(0), np.take_along_axis(weights, np.maximum(moved, 0), 0))
    return Axis((first - back).astype(np.int32), weights, bits)


def _kernel(x: NDArray[np.float64], resample: int) -> NDArray[np.float64]:
    """reference.KERNELS on an array: the same operations, so the same doubles."""
    if resample == LANCZOS:
        # numpy's sine may differ from libm's in the last bit
        return np.array([_sinc(v) * _sinc(v / 3) if -3 < v < 3 else 0.0 for v in x.tolist()])
    x = np.abs(x)
    if resample == BILINEAR:
        return np.maximum(0.0, 1 - x)
    near = (1.5 * x - 2.5) * x * x + 1
    return np.where(x < 1, near, np.where(x < 2, (((x - 5) * x + 8) * x - 4) * -0.5, 0.0))


def _sinc(x: float) -> float:
    return math.sin(math.pi * x) / (math.pi * x) if x else 1.0
