"""JPEG coefficients to rows of RGB in Triton: two launches for a ragged batch, the integers of jpeg_reference.py.

    inverse   coefficients -> planes of samples: dequantise, inverse DCT; one block a thread, in registers
    colour    planes -> rows of RGB where the resize reads them: upsampling, YCbCr to RGB

A program of `inverse` reports in `flags` whether any of its numbers is beyond the reference's limits: the host then
discards the image. Coefficients are read as 32-bit words, two at once, samples written as words of four.

Rules: as gpu.py. Layout and descriptors: ragged_jpeg.py.
"""

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl

from sidecar.kernels import jpeg_reference, ragged_jpeg

NUM_WARPS: Final = 4

COEFFICIENTS, COUNT, WIDE, TABLE, SAMPLES, INVERSE_START = (tl.constexpr(i) for i in range(6))
INVERSE_FIELDS, COLOUR_FIELDS = tl.constexpr(ragged_jpeg.INVERSE_FIELDS), tl.constexpr(ragged_jpeg.COLOUR_FIELDS)
RGB, HEIGHT, WIDTH, IS_GREY, COLOUR_START = (tl.constexpr(i) for i in range(5))
FIRST_PLANE, PLANE_FIELDS = tl.constexpr(ragged_jpeg.FIRST_PLANE), tl.constexpr(ragged_jpeg.PLANE_FIELDS)
PLANE_OFFSET, PLANE_STRIDE, LAST_X, LAST_Y = (tl.constexpr(i) for i in range(4))
PLANE_ACROSS, PLANE_DOWN, FANCY_X, FANCY_Y = (tl.constexpr(i) for i in range(4, 8))
MAX_NUMBER, MAX_SAMPLE = tl.constexpr(jpeg_reference.MAX_NUMBER), tl.constexpr(jpeg_reference.MAX_SAMPLE)


@triton.jit
def _idct(x0, x1, x2, x3, x4, x5, x6, x7, SHIFT: tl.constexpr):
    """The inverse DCT of eight numbers: jpeg_reference.idct. Columns drop 11 bits, rows 18."""
    z1 = (x2 + x6) * 4433
    low, high = z1 - x6 * 15137, z1 + x2 * 6270
    e0, e1 = ((x0 + x4) << 13) + high, ((x0 - x4) << 13) + low
    e2, e3 = ((x0 - x4) << 13) - low, ((x0 + x4) << 13) - high
    s3, s4 = x7 + x3, x5 + x1
    z5 = (s3 + s4) * 9633
    z1, z2 = -(x7 + x1) * 7373, -(x5 + x3) * 20995
    z3, z4 = z5 - s3 * 16069, z5 - s4 * 3196
    o0, o1 = x1 * 12299 + z1 + z4, x3 * 25172 + z2 + z3
    o2, o3 = x5 * 16819 + z2 + z4, x7 * 2446 + z1 + z3
    half: tl.constexpr = 1 << (SHIFT - 1)
    return (
        (e0 + o0 + half) >> SHIFT,
        (e1 + o1 + half) >> SHIFT,
        (e2 + o2 + half) >> SHIFT,
        (e3 + o3 + half) >> SHIFT,
        (e3 - o3 + half) >> SHIFT,
        (e2 - o2 + half) >> SHIFT,
        (e1 - o1 + half) >> SHIFT,
        (e0 - o0 + half) >> SHIFT,
    )


@triton.jit
def _checked(x, bad, LIMIT: tl.constexpr):
    """x, 0 where it is beyond the limit; and whether it or one before it was."""
    beyond = (x <= -LIMIT) | (x >= LIMIT)
    return tl.where(beyond, 0, x), bad | beyond


@triton.jit
def _pair(words, table, live, bad, ROW: tl.constexpr, PAIR: tl.constexpr):
    """Two neighbouring coefficients of each block, dequantised."""
    word = tl.load(words + 4 * ROW + PAIR, mask=live, other=0)
    left, bad = _checked(((word << 16) >> 16) * tl.load(table + 8 * ROW + 2 * PAIR), bad, MAX_NUMBER)
    right, bad = _checked((word >> 16) * tl.load(table + 8 * ROW + 2 * PAIR + 1), bad, MAX_NUMBER)
    return left, right, bad


@triton.jit
def _column(x0, x1, x2, x3, x4, x5, x6, x7, bad):
    """The first pass of one column of each block."""
    y0, y1, y2, y3, y4, y5, y6, y7 = _idct(x0, x1, x2, x3, x4, x5, x6, x7, 11)
    y0, bad = _checked(y0, bad, MAX_NUMBER)
    y1, bad = _checked(y1, bad, MAX_NUMBER)
    y2, bad = _checked(y2, bad, MAX_NUMBER)
    y3, bad = _checked(y3, bad, MAX_NUMBER)
    y4, bad = _checked(y4, bad, MAX_NUMBER)
    y5, bad = _checked(y5, bad, MAX_NUMBER)
    y6, bad = _checked(y6, bad, MAX_NUMBER)
    y7, bad = _checked(y7, bad, MAX_NUMBER)
    return y0, y1, y2, y3, y4, y5, y6, y7, bad


@triton.jit
def _columns(words, table, live, bad, PAIR: tl.constexpr):
    """Two neighbouring columns after the first pass."""
    a0, b0, bad = _pair(words, table, live, bad, 0, PAIR)
    a1, b1, bad = _pair(words, table, live, bad, 1, PAIR)
    a2, b2, bad = _pair(words, table, live, bad, 2, PAIR)
    a3, b3, bad = _pair(words, table, live, bad, 3, PAIR)
    a4, b4, bad = _pair(words, table, live, bad, 4, PAIR)
    a5, b5, bad = _pair(words, table, live, bad, 5, PAIR)
    a6, b6, bad = _pair(words, table, live, bad, 6, PAIR)
    a7, b7, bad = _pair(words, table, live, bad, 7, PAIR)
    a0, a1, a2, a3, a4, a5, a6, a7, bad = _column(a0, a1, a2, a3, a4, a5, a6, a7, bad)
    b0, b1, b2, b3, b4, b5, b6, b7, bad = _column(b0, b1, b2, b3, b4, b5, b6, b7, bad)
    return (a0, a1, a2, a3, a4, a5, a6, a7), (b0, b1, b2, b3, b4, b5, b6, b7), bad


@triton.jit
def _sample(x, bad):
    """A sample, and whether it is beyond the reference's limit."""
    beyond = (x < -MAX_SAMPLE) | (x >= MAX_SAMPLE)
    return tl.minimum(tl.maximum(x + 128, 0), 255), bad | beyond


@triton.jit
def _row(to, live, x0, x1, x2, x3, x4, x5, x6, x7, bad):
    """The second pass of one row of each block: its eight samples as two words."""
    y0, y1, y2, y3, y4, y5, y6, y7 = _idct(x0, x1, x2, x3, x4, x5, x6, x7, 18)
    y0, bad = _sample(y0, bad)
    y1, bad = _sample(y1, bad)
    y2, bad = _sample(y2, bad)
    y3, bad = _sample(y3, bad)
    y4, bad = _sample(y4, bad)
    y5, bad = _sample(y5, bad)
    y6, bad = _sample(y6, bad)
    y7, bad = _sample(y7, bad)
    tl.store(to, y0 | (y1 << 8) | (y2 << 16) | (y3 << 24), mask=live)
    tl.store(to + 1, y4 | (y5 << 8) | (y6 << 16) | (y7 << 24), mask=live)
    return bad


@triton.jit
def inverse(coefficients, tables, descriptors, owners, samples, flags, BLOCKS: tl.constexpr) -> None:
    """Some blocks of one component. `coefficients` and `samples` are words of 32 bits."""
    program = tl.program_id(0)
    d = descriptors + tl.load(owners + program) * INVERSE_FIELDS
    block = (program - tl.load(d + INVERSE_START).to(tl.int32)) * BLOCKS + tl.arange(0, BLOCKS)
    live = block < tl.load(d + COUNT)
    words = coefficients + tl.load(d + COEFFICIENTS) + block.to(tl.int64) * 32
    table = tables + tl.load(d + TABLE)
    bad = block < 0
    c0, c1, bad = _columns(words, table, live, bad, 0)
    c2, c3, bad = _columns(words, table, live, bad, 1)
    c4, c5, bad = _columns(words, table, live, bad, 2)
    c6, c7, bad = _columns(words, table, live, bad, 3)
    wide = tl.load(d + WIDE).to(tl.int32)
    stride = 2 * wide  # words of a row of samples
    to = samples + tl.load(d + SAMPLES) // 4 + (block // wide * 8).to(tl.int64) * stride + block % wide * 2
    for r in tl.static_range(8):
        bad = _row(to, live, c0[r], c1[r], c2[r], c3[r], c4[r], c5[r], c6[r], c7[r], bad)
        to += stride
    tl.store(flags + program, tl.max(bad.to(tl.int32), axis=0))


@triton.jit
def _upsampled(samples, plane, x, y, inside):
    """A component's sample at pixels (y, x): interpolated or repeated, as jpeg_reference.upsample."""
    across, down = tl.load(plane + PLANE_ACROSS).to(tl.int32), tl.load(plane + PLANE_DOWN).to(tl.int32)
    fancy_x, fancy_y = tl.load(plane + FANCY_X).to(tl.int32), tl.load(plane + FANCY_Y).to(tl.int32)
    near_x, near_y = x // across, y // down
    far_x = near_x + fancy_x * (2 * (x & 1) - 1)
    far_y = near_y + fancy_y * (2 * (y & 1) - 1)
    far_x = tl.minimum(tl.maximum(far_x, 0), tl.load(plane + LAST_X).to(tl.int32))
    far_y = tl.minimum(tl.maximum(far_y, 0), tl.load(plane + LAST_Y).to(tl.int32))
    base = samples + tl.load(plane + PLANE_OFFSET)
    stride = tl.load(plane + PLANE_STRIDE)
    near_row, far_row = base + (near_y * stride)[:, None], base + (far_y * stride)[:, None]
    near, far = near_x[None, :], far_x[None, :]
    a = tl.load(near_row + near, mask=inside, other=0).to(tl.int32)
    b = tl.load(near_row + far, mask=inside, other=0).to(tl.int32)
    c = tl.load(far_row + near, mask=inside, other=0).to(tl.int32)
    e = tl.load(far_row + far, mask=inside, other=0).to(tl.int32)
    left = (1 + 2 * fancy_y) * a + fancy_y * c
    right = (1 + 2 * fancy_y) * b + fancy_y * e
    # 8 and 7 where both directions are interpolated, 1 and 2 where one is
    odd = fancy_x * (x & 1)[None, :] + (1 - fancy_x) * (y & 1)[:, None]
    both = fancy_x * fancy_y
    bias = both * (8 - odd) + (1 - both) * (fancy_x + fancy_y) * (1 + odd)
    return ((1 + 2 * fancy_x) * left + fancy_x * right + bias) >> (2 * fancy_x + 2 * fancy_y)


@triton.jit
def colour(samples, descriptors, owners, rgb, TILE_ROWS: tl.constexpr, TILE_WIDTH: tl.constexpr) -> None:
    """A tile of one image's rows of RGB."""
    program = tl.program_id(0)
    d = descriptors + tl.load(owners + program) * COLOUR_FIELDS
    height, width = tl.load(d + HEIGHT).to(tl.int32), tl.load(d + WIDTH).to(tl.int32)
    tile = program - tl.load(d + COLOUR_START).to(tl.int32)
    tiles = (width + TILE_WIDTH - 1) // TILE_WIDTH
    y = tile // tiles * TILE_ROWS + tl.arange(0, TILE_ROWS)
    x = tile % tiles * TILE_WIDTH + tl.arange(0, TILE_WIDTH)
    inside = (y < height)[:, None] & (x < width)[None, :]
    light = _upsampled(samples, d + FIRST_PLANE, x, y, inside)
    colours = 1 - tl.load(d + IS_GREY).to(tl.int32)
    blue = (_upsampled(samples, d + FIRST_PLANE + PLANE_FIELDS, x, y, inside) - 128) * colours
    red = (_upsampled(samples, d + FIRST_PLANE + 2 * PLANE_FIELDS, x, y, inside) - 128) * colours
    to = rgb + tl.load(d + RGB) + (y.to(tl.int64) * (3 * width))[:, None] + 3 * x[None, :]
    tl.store(to, _level(light + ((91881 * red + 32768) >> 16)), mask=inside)
    tl.store(to + 1, _level(light + ((32768 - 22554 * blue - 46802 * red) >> 16)), mask=inside)
    tl.store(to + 2, _level(light + ((116130 * blue + 32768) >> 16)), mask=inside)


@triton.jit
def _level(x):
    return tl.minimum(tl.maximum(x, 0), 255).to(tl.uint8)
