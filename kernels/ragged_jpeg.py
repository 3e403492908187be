"""The JPEGs of a batch as integers, which the GPU's JPEG kernels read in addition to coefficients.

Rules: pure numpy. Two launches turn coefficients into rows of RGB where the resize expects them: one program of the
first makes some blocks of one component, one of the second a tile of one image. Of each image come its coefficients,
aligned; behind all, their quantisation tables as 32-bit integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from sidecar.kernels.jpeg import BLOCK, JpegLayout, JpegPlane
from sidecar.kernels.jpeg_reference import MIN_FANCY_WIDTH
from sidecar.kernels.ragged import ALIGN_BYTES

# Blocks of a program of the first launch: one a thread.
BLOCKS: Final = 128
# Rows and columns of a program of the second launch.
COLOUR_TILE: Final = (4, 128)

# Fields of a component's descriptor, by position.
COEFFICIENTS, COUNT, WIDE, TABLE, SAMPLES, INVERSE_START = range(6)
INVERSE_FIELDS: Final = 6
# Fields of an image's descriptor, then those of each of its three components.
RGB, HEIGHT, WIDTH, IS_GREY, COLOUR_START = range(5)
PLANE_OFFSET, PLANE_STRIDE, LAST_X, LAST_Y, PLANE_ACROSS, PLANE_DOWN, FANCY_X, FANCY_Y = range(8)
FIRST_PLANE, PLANE_FIELDS = 5, 8
COLOUR_FIELDS: Final = FIRST_PLANE + 3 * PLANE_FIELDS


@dataclass(frozen=True, slots=True)
class JpegBatch:
    """Descriptors and the owner of each program, of both launches; and where parts lie, in bytes."""

    inverse: NDArray[np.int64]  # (components, INVERSE_FIELDS)
    inverse_owners: NDArray[np.int32]
    colour: NDArray[np.int64]  # (images, COLOUR_FIELDS)
    colour_owners: NDArray[np.int32]
    tables: NDArray[np.int32]  # (components, 64)
    coefficients: tuple[int, ...]  # byte offset of each image's coefficients
    coefficient_bytes: int
    sample_bytes: int


def is_fancy(plane: JpegPlane) -> tuple[bool, bool]:
    """Whether a component is interpolated across and down; libjpeg repeats samples otherwise."""
    wide_enough = plane.width >= MIN_FANCY_WIDTH
    across = plane.across == 2 and plane.down <= 2 and wide_enough
    down = plane.down == 2 and (plane.across == 1 or (plane.across == 2 and wide_enough))
    return across, down


def lay_out(layouts: Sequence[JpegLayout], tables: Sequence[NDArray[np.uint16]], rgb: Sequence[int]) -> JpegBatch:
    """The integers of a batch. `rgb`: where each image's rows of RGB belong, in bytes."""
    inverse: list[list[int]] = []
    colour: list[list[int]] = []
    starts: list[int] = []
    owners: tuple[list[int], list[int]] = ([], [])
    coefficients = samples = 0
    for layout, at in zip(layouts, rgb, strict=True):
        starts.append(coefficients)
        image = [at, layout.height, layout.width, int(len(layout.planes) == 1), sum(owners[1])]
        for plane in layout.planes:
            first = sum(owners[0])
            inverse.append([coefficients // 4, plane.blocks, plane.wide, BLOCK * BLOCK * len(inverse), samples, first])
            owners[0].append(-(-plane.blocks // BLOCKS))
            across, down = is_fancy(plane)
            image += [samples, plane.wide * BLOCK, plane.width - 1, plane.height - 1]
            image += [plane.across, plane.down, int(across), int(down)]
            coefficients += plane.blocks * BLOCK * BLOCK * 2
            samples += plane.blocks * BLOCK * BLOCK
        if len(layout.planes) == 1:
            image += 2 * image[-PLANE_FIELDS:]
        colour.append(image)
        owners[1].append(-(-layout.height // COLOUR_TILE[0]) * -(-layout.width // COLOUR_TILE[1]))
        coefficients = -(-coefficients // ALIGN_BYTES) * ALIGN_BYTES
    counts = [np.repeat(np.arange(len(count), dtype=np.int32), count) for count in owners]
    return JpegBatch(
        np.array(inverse, np.int64),
        counts[0],
        np.array(colour, np.int64),
        counts[1],
        np.concatenate([table.astype(np.int32) for table in tables]),
        tuple(starts),
        coefficients,
        samples,
    )
