"""From a JPEG's coefficients to its pixels in slow integers: libjpeg-turbo's bits, which every fast form must equal.

Dequantise, inverse DCT (libjpeg's ISLOW), upsampling (its "fancy" one, which interpolates), YCbCr to RGB. All of it is
integer addition, multiplication and shifting, so any machine gives the same bits. Sources, libjpeg-turbo 3: jidctint.c,
jdsample.c, jdcolor.c.

libjpeg-turbo's vector forms keep products and some sums in 16 bits, its plain form in more, and they differ where 16 do
not suffice. No encoder writes such coefficients: a file whose numbers are near that gets no pixels here, and another
decoder decides. Within these limits 32 bits suffice for every sum.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from sidecar.kernels.jpeg import BLOCK, Coefficients, JpegLayout, JpegPlane

Plane = NDArray[np.int64]

# libjpeg's constants, times 2**13 (jidctint.c) and 2**16 (jdcolor.c).
CONST_BITS: Final = 13
PASS1_BITS: Final = 2
C0_298, C0_390, C0_541, C0_765, C0_899, C1_175 = 2446, 3196, 4433, 6270, 7373, 9633
C1_501, C1_847, C1_961, C2_053, C2_562, C3_072 = 12299, 15137, 16069, 16819, 20995, 25172
CR_RED, CB_BLUE, CB_GREEN, CR_GREEN = 91881, 116130, 22554, 46802
# Of a dequantised coefficient, and of a sum of the first pass: twice as much has 16 bits.
MAX_NUMBER: Final = 1 << 14
# Beyond, around the middle, the plain form's table of limits begins again: jidctint.c's RANGE_MASK.
MAX_SAMPLE: Final = 512
# Narrower planes are not interpolated across: jdsample.c.
MIN_FANCY_WIDTH: Final = 3


def pixels(layout: JpegLayout, tables: NDArray[np.uint16], coefficients: Coefficients) -> NDArray[np.uint8] | None:
    """RGB (height, width, 3); None where libjpeg-turbo's forms may differ."""
    full, first = [], 0
    for plane, table in zip(layout.planes, tables, strict=True):
        last = first + plane.blocks * BLOCK * BLOCK
        samples = inverse(coefficients[first:last].reshape(plane.high, plane.wide, BLOCK, BLOCK), table)
        if samples is None:
            return None
        full.append(upsample(samples[: plane.height, : plane.width], plane)[: layout.height, : layout.width])
        first = last
    return np.repeat(full[0][..., None], 3, axis=2).astype(np.uint8) if len(full) == 1 else rgb(*full)


def inverse(blocks: NDArray[np.int16], table: NDArray[np.uint16]) -> Plane | None:
    """The samples of (high, wide, 8, 8) coefficients as a plane; None where libjpeg-turbo's forms may differ."""
    x = blocks.astype(np.int64) * table.reshape(BLOCK, BLOCK)
    if not _fits(x):
        return None
    columns = idct(np.moveaxis(x, -2, 0), CONST_BITS - PASS1_BITS)
    if not _fits(columns):
        return None
    rows = idct(np.moveaxis(columns, -1, 0), CONST_BITS + PASS1_BITS + 3)  # (8 columns, 8 rows, high, wide)
    if rows.min() < -MAX_SAMPLE or rows.max() >= MAX_SAMPLE:
        return None
    high, wide = blocks.shape[:2]
    samples = np.clip(rows + 128, 0, 255)
    return samples.transpose(2, 1, 3, 0).reshape(high * BLOCK, wide * BLOCK)


def idct(x: Plane, shift: int) -> Plane:
    """The inverse DCT over the first axis, of length 8."""
    sums = x[0] + x[4], x[0] - x[4], x[7] + x[3], x[5] + x[1]
    z1 = (x[2] + x[6]) * C0_541
    low, high = z1 - x[6] * C1_847, z1 + x[2] * C0_765
    even = [(sums[0] << CONST_BITS) + high, (sums[1] << CONST_BITS) + low]
    even += [(sums[1] << CONST_BITS) - low, (sums[0] << CONST_BITS) - high]
    z5 = (sums[2] + sums[3]) * C1_175
    z1, z2 = -(x[7] + x[1]) * C0_899, -(x[5] + x[3]) * C2_562
    z3, z4 = z5 - sums[2] * C1_961, z5 - sums[3] * C0_390
    odd = [x[1] * C1_501 + z1 + z4, x[3] * C3_072 + z2 + z3, x[5] * C2_053 + z2 + z4, x[7] * C0_298 + z1 + z3]
    half = 1 << (shift - 1)
    first = [(e + o + half) >> shift for e, o in zip(even, odd, strict=True)]
    last = [(e - o + half) >> shift for e, o in zip(even, odd, strict=True)]
    return np.stack(first + last[::-1])


def _fits(x: Plane) -> bool:
    """Whether libjpeg-turbo's forms agree on these numbers."""
    return bool(np.abs(x).max() < MAX_NUMBER)


def upsample(samples: Plane, plane: JpegPlane) -> Plane:
    """A plane in the image's size or a little more: interpolated by 2, repeated by other factors and if very narrow."""
    fancy = plane.across < 2 or plane.width >= MIN_FANCY_WIDTH
    match plane.across, plane.down:
        case 1, 1:
            return samples
        case 2, 1 if fancy:
            return interpolate(samples, 1, (1, 2), 2)
        case 1, 2:
            return interpolate(samples, 0, (1, 2), 2)
        case 2, 2 if fancy:
            sums = interpolate(samples, 0, (0, 0), 0)
            return interpolate(sums, 1, (8, 7), 4)
    return samples.repeat(plane.down, axis=0).repeat(plane.across, axis=1)


def interpolate(samples: Plane, axis: int, bias: tuple[int, int], shift: int) -> Plane:
    """Twice as many samples along an axis: three parts the nearer one, one part the farther, at the edge itself."""
    moved = np.moveaxis(samples, axis, 0)
    before, after = np.concatenate([moved[:1], moved[:-1]]), np.concatenate([moved[1:], moved[-1:]])
    made = np.empty((2 * len(moved), *moved.shape[1:]), np.int64)
    made[0::2] = (3 * moved + before + bias[0]) >> shift
    made[1::2] = (3 * moved + after + bias[1]) >> shift
    return np.moveaxis(made, 0, axis)


def rgb(y: Plane, cb: Plane, cr: Plane) -> NDArray[np.uint8]:
    """YCbCr planes of one size to (height, width, 3)."""
    blue, red, half = cb - 128, cr - 128, 1 << 15
    parts = (
        y + ((CR_RED * red + half) >> 16),
        y + ((half - CB_GREEN * blue - CR_GREEN * red) >> 16),
        y + ((CB_BLUE * blue + half) >> 16),
    )
    made: NDArray[np.uint8] = np.clip(np.stack(parts, -1), 0, 255).astype(np.uint8)
    return made
