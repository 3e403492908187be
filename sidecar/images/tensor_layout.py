"""Pure: the values of single images, as the workers gave them -> the tensors of the batch, in pieces and in its order.

Rules: nothing is joined or copied; what repeats is shared. How images lie in a batch is the processor's: see kernels/grid.py.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from sidecar.images.protocol import Data
from sidecar.kernels.grid import ABREAST, FILLED, PLANES, Geometry, Integers, ProcessorSpec, Repeated

SIZES: Final = {"I64": 8, "I32": 4, "F32": 4, "BF16": 2, "F16": 2, "U8": 1}  # bytes of one element
CODES: Final = {"I64": "q", "I32": "i"}  # of `array`
MOST_ALIKE: Final = 1 << 20  # bytes that repeat


def integers(tensors: Iterable[Integers]) -> Iterator[list[Data]]:
    """All bytes of the tensors of integers, one after the other."""
    for (dtype, _), numbers in tensors:
        if isinstance(numbers, Repeated):
            most = MOST_ALIKE // SIZES[dtype]
            some = memoryview(array(CODES[dtype], [numbers.number]) * min(numbers.times, most)).cast("B")
            yield from _again(some, SIZES[dtype] * numbers.times)
        else:
            yield [array(CODES[dtype], numbers).tobytes()]


def pieces(values: Sequence[Data], images: Sequence[Geometry], spec: ProcessorSpec) -> Iterator[list[Data]]:
    """All bytes of `pixel_values`, in groups of which each is worth a write of its own."""
    shape, item = spec.pixels(images), SIZES[spec.dtype]
    if spec.batch == ABREAST:
        yield from _abreast(values, math.prod(shape[:-1]))
        return
    for data, image in zip(values, images, strict=True):
        if spec.batch == PLANES:
            yield padded(data, image.size, shape, item)
        elif spec.batch == FILLED:
            yield [data]
            zeros = item * math.prod(shape[1:]) - len(data)
            yield from _again(memoryview(bytes(min(zeros, MOST_ALIKE))), zeros)
        else:
            yield [data]


def padded(values: Data, size: tuple[int, int], shape: list[int], item: int) -> list[Data]:
    """One image's planes (3, *size) as pieces of (3, *shape[2:]): rows, with zeros to the right and below."""
    (height, width), (full_height, full_width) = size, shape[2:]
    view = memoryview(values)
    if (height, width) == (full_height, full_width):
        return [view]
    row, right = item * width, memoryview(bytes(item * (full_width - width)))
    below = memoryview(bytes(item * full_width * (full_height - height)))
    made: list[Data] = []
    for plane in range(3):
        for y in range(plane * height, (plane + 1) * height):
            made += (view[y * row : (y + 1) * row], right)
        made.append(below)
    return made


def _again(some: memoryview, count: int) -> Iterator[list[Data]]:
    """So many bytes, `some` again and again."""
    for at in range(0, count, len(some) or 1):
        yield [some[: count - at]]


def _abreast(values: Sequence[Data], rows: int) -> Iterator[list[Data]]:
    """Each of the leading rows, with the part of each image in it."""
    views = [memoryview(data) for data in values]
    for row in range(rows):
        yield [view[row * len(view) // rows : (row + 1) * len(view) // rows] for view in views]
