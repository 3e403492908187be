"""Pure: the values of single images, as the workers gave them -> `pixel_values` of the batch, in pieces and in its order.

Rules: nothing is joined or copied; zeros are shared. How images lie in a batch is the processor's: see kernels/grid.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final

from sidecar.jobs import Data
from sidecar.kernels.grid import ABREAST, FILLED, PLANES, Geometry, ProcessorSpec

SIZES: Final = {"I64": 8, "I32": 4, "F32": 4, "BF16": 2, "F16": 2, "U8": 1}  # bytes of one element
MOST_ZEROS: Final = 1 << 20


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
            yield from _zeros(item * math.prod(shape[1:]) - len(data))
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


def _zeros(count: int) -> Iterator[list[Data]]:
    """So many bytes, of which few are held at once."""
    some = memoryview(bytes(min(count, MOST_ZEROS)))
    for at in range(0, count, MOST_ZEROS):
        yield [some[: count - at]]


def _abreast(values: Sequence[Data], rows: int) -> Iterator[list[Data]]:
    """Each of the leading rows, with the part of each image in it."""
    views = [memoryview(data) for data in values]
    for row in range(rows):
        yield [view[row * len(view) // rows : (row + 1) * len(view) // rows] for view in views]
