"""Arrange the workers' values of single images as the tensors of a batch, in pieces and in the batch's order.

Rules: pure; nothing is joined or copied, and repeated bytes are shared. kernels/grid.py defines the batch layouts.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from sidecar.images.protocol import Data
from sidecar.kernels.grid import ABREAST, FILLED, PLANES, SPLIT, Geometry, Integers, ProcessorSpec, Repeated

ELEMENT_BYTES: Final = {"I64": 8, "I32": 4, "F32": 4, "BF16": 2, "F16": 2, "U8": 1}
ARRAY_CODES: Final = {"I64": "q", "I32": "i"}  # type codes of `array`
MAX_REPEATED_BYTES: Final = 1 << 20


def integers(tensors: Iterable[Integers]) -> Iterator[list[Data]]:
    """All bytes of the integer tensors, one after the other."""
    for (dtype, _), numbers in tensors:
        if isinstance(numbers, Repeated):
            max_count = MAX_REPEATED_BYTES // ELEMENT_BYTES[dtype]
            block = memoryview(array(ARRAY_CODES[dtype], [numbers.number]) * min(numbers.times, max_count)).cast("B")
            yield from _repeat(block, ELEMENT_BYTES[dtype] * numbers.times)
        else:
            yield [array(ARRAY_CODES[dtype], numbers).tobytes()]


def pieces(values: Sequence[Data], images: Sequence[Geometry], spec: ProcessorSpec) -> Iterator[list[Data]]:
    """All bytes of the tensors of pixels, in groups that are each worth one write."""
    shape, element_bytes = spec.pixels(images), ELEMENT_BYTES[spec.dtype]
    if spec.batch == ABREAST:
        yield from _interleave(values, math.prod(shape[:-1]))
        return
    if spec.batch == SPLIT:
        first = element_bytes * math.prod(shape[1:])
        for part in (slice(first), slice(first, None)):
            for data in values:
                yield [memoryview(data)[part]]
        return
    for data, image in zip(values, images, strict=True):
        yield pad_planes(data, image.size, shape, element_bytes) if spec.batch == PLANES else [data]
        if spec.batch == FILLED:
            zeros = element_bytes * math.prod(shape[1:]) - len(data)
            yield from _repeat(memoryview(bytes(min(zeros, MAX_REPEATED_BYTES))), zeros)


def pad_planes(values: Data, size: tuple[int, int], shape: list[int], element_bytes: int) -> list[Data]:
    """One image's planes (3, *size) as pieces of (3, *shape[2:]): rows, with zeros to the right and below."""
    (height, width), (full_height, full_width) = size, shape[2:]
    view = memoryview(values)
    if (height, width) == (full_height, full_width):
        return [view]
    row, right = element_bytes * width, memoryview(bytes(element_bytes * (full_width - width)))
    below = memoryview(bytes(element_bytes * full_width * (full_height - height)))
    made: list[Data] = []
    for plane in range(3):
        for y in range(plane * height, (plane + 1) * height):
            made += (view[y * row : (y + 1) * row], right)
        made.append(below)
    return made


def _repeat(block: memoryview, count: int) -> Iterator[list[Data]]:
    """`count` bytes: `block` repeated."""
    for at in range(0, count, len(block) or 1):
        yield [block[: count - at]]


def _interleave(values: Sequence[Data], rows: int) -> Iterator[list[Data]]:
    """Each leading row, with each image's part of it."""
    views = [memoryview(data) for data in values]
    for row in range(rows):
        yield [view[row * len(view) // rows : (row + 1) * len(view) // rows] for view in views]
