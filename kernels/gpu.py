"""The exact resize in Triton: two launches for a ragged batch, the integers of reference.py, hence the same bits.

    across   source rows (height, width, 3) -> scratch planes (3, rows, width), uint8
    down     scratch -> the values in their final layout: rows of RGB, planes, or patches with their temporal copies

Memory traffic is the limit, so each byte moves once. A 1080p image to Qwen2-VL's 728x1316 as bfloat16 patches: 6.2 MB
of source in, 4.3 MB of scratch out and in (it may stay in the second-level cache), 11.5 MB of patches out. That is 26
MB: 5.5 us at the 4.8 TB/s of an H200, at most 11 us at half of that; 20,000 images/s leave 50 us. Not measured yet:
benchmarks/gpu_all.py.

The kernel stays near that limit because it needs few loads. Across, the bytes of a pixel are not aligned: four taps of
three channels are 12 bytes, loaded as three aligned words and shifted, instead of 12 loads of one byte; neighbouring
lanes read neighbouring words. Down, the planes' rows are aligned, so a lane loads 16 bytes at once, and rows that
windows share come from the first-level cache. Values come from a table of 256 per channel that the CPU made by the
processor's own operations: a division on a GPU need not round alike. Sums fit 32 bits (see csrc/passes.hpp).

Rules: nothing imports this at run time. `make cubins` compiles it ahead of time, and cuda_resize.py launches what that
made. With TRITON_INTERPRET=1 at import, Triton runs it on the CPU, for tests; `launch` is for those and for benchmarks.
Layout and descriptors: ragged.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from sidecar.kernels import ragged

GPU_TILES: Final = ragged.GPU_TILES
# There, the cost of an operation does not depend on its size.
INTERPRETER_TILES: Final = ragged.Tiles((64, 512), (64, 512))
NUM_WARPS: Final = 4

SOURCE, ROW_BYTES, TOP, ROWS = (tl.constexpr(i) for i in (ragged.SOURCE, ragged.ROW_BYTES, ragged.TOP, ragged.ROWS))
WIDTH, HEIGHT, SCRATCH, STRIDE = (tl.constexpr(i) for i in (ragged.WIDTH, ragged.HEIGHT, ragged.SCRATCH, ragged.STRIDE))
ACROSS_FIRST, ACROSS_START = tl.constexpr(ragged.ACROSS_FIRST), tl.constexpr(ragged.ACROSS_START)
DOWN_FIRST, DOWN_START = tl.constexpr(ragged.DOWN_FIRST), tl.constexpr(ragged.DOWN_START)
OUT, TABLE, PATCH, MERGE = (tl.constexpr(i) for i in (ragged.OUT, ragged.TABLE, ragged.PATCH, ragged.MERGE))
DOWN_MERGED, ACROSS_MERGED = tl.constexpr(ragged.DOWN_MERGED), tl.constexpr(ragged.ACROSS_MERGED)
CHANNEL, COPY, COPIES = (tl.constexpr(i) for i in (ragged.CHANNEL, ragged.COPY, ragged.COPIES))
FIELDS = tl.constexpr(ragged.FIELDS)
ALIGN = tl.constexpr(ragged.ALIGN_BYTES)


@triton.jit
def _byte(total, bits):
    """Scale and clamp a sum of weighted bytes to a byte."""
    return tl.minimum(tl.maximum(total >> bits, 0), 255).to(tl.uint8)


@triton.jit
def _shifted(low, high, by):
    """The 32 bits that begin `by` (0, 8, 16 or 24) bits into two words."""
    return (low >> by) | ((high << 1) << (31 - by))


@triton.jit
def _tap(v, shift: tl.constexpr, weight):
    """One byte of a word times a weight."""
    return ((v >> shift) & 255).to(tl.int32) * weight


@triton.jit
def across(words, tables, descriptors, owners, scratch, TILE_ROWS: tl.constexpr, TILE_WIDTH: tl.constexpr) -> None:
    """One tile of one image's horizontal pass. `words` is the sources as 32-bit words."""
    program = tl.program_id(0)
    d = descriptors + tl.load(owners + program) * FIELDS
    rows, width = tl.load(d + ROWS), tl.load(d + WIDTH).to(tl.int32)
    first_at, weights_at = tl.load(d + ACROSS_FIRST), tl.load(d + ACROSS_FIRST + 1)
    taps, bits = tl.load(d + ACROSS_FIRST + 2).to(tl.int32), tl.load(d + ACROSS_FIRST + 3).to(tl.int32)
    # not declared as aligned: lanes would get 8 columns each, and their loads would be far apart
    stride = tl.load(d + STRIDE)
    tile = program - tl.load(d + ACROSS_START).to(tl.int32)
    tiles = (width + TILE_WIDTH - 1) // TILE_WIDTH
    y = tile // tiles * TILE_ROWS + tl.arange(0, TILE_ROWS)
    x = tile % tiles * TILE_WIDTH + tl.arange(0, TILE_WIDTH)
    inside = (y < rows)[:, None] & (x < width)[None, :]

    first = tl.load(tables + first_at + x, mask=x < width, other=0)
    at = (tl.load(d + TOP) + y) * tl.load(d + ROW_BYTES)
    byte = at[:, None] + 3 * first[None, :]
    word = words + tl.load(d + SOURCE) + (byte >> 2)
    by = ((byte & 3) * 8).to(tl.uint32)
    half = (1 << (bits - 1)).to(tl.int32)
    red = tl.full((TILE_ROWS, TILE_WIDTH), 0, tl.int32) + half
    green, blue = red, red
    weight = tables + weights_at + x
    last = tl.load(word, mask=inside, other=0).to(tl.uint32, bitcast=True)
    for _ in range(0, taps, 4):
        a = last
        b = tl.load(word + 1, mask=inside, other=0).to(tl.uint32, bitcast=True)
        c = tl.load(word + 2, mask=inside, other=0).to(tl.uint32, bitcast=True)
        last = tl.load(word + 3, mask=inside, other=0).to(tl.uint32, bitcast=True)
        w0 = tl.load(weight, mask=x < width, other=0)[None, :]
        w1 = tl.load(weight + width, mask=x < width, other=0)[None, :]
        w2 = tl.load(weight + 2 * width, mask=x < width, other=0)[None, :]
        w3 = tl.load(weight + 3 * width, mask=x < width, other=0)[None, :]
        v0, v1, v2 = _shifted(a, b, by), _shifted(b, c, by), _shifted(c, last, by)
        # r0 g0 b0 r1 | g1 b1 r2 g2 | b2 r3 g3 b3, from the lowest byte on
        red += _tap(v0, 0, w0) + _tap(v0, 24, w1) + _tap(v1, 16, w2) + _tap(v2, 8, w3)
        green += _tap(v0, 8, w0) + _tap(v1, 0, w1) + _tap(v1, 24, w2) + _tap(v2, 16, w3)
        blue += _tap(v0, 16, w0) + _tap(v1, 8, w1) + _tap(v2, 0, w2) + _tap(v2, 24, w3)
        word += 3
        weight += 4 * width

    plane = stride * rows
    to = scratch + tl.load(d + SCRATCH) + (y * stride)[:, None] + x[None, :]
    tl.store(to, _byte(red, bits), mask=inside)
    tl.store(to + plane, _byte(green, bits), mask=inside)
    tl.store(to + 2 * plane, _byte(blue, bits), mask=inside)


@triton.jit
def down(
    scratch,
    tables,
    descriptors,
    owners,
    values,
    out,
    LOOK_UP: tl.constexpr,
    TILE_HEIGHT: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
) -> None:
    """One tile of one channel of one image's vertical pass. With LOOK_UP, bytes become values by tables (3, 256)."""
    program = tl.program_id(0)
    d = descriptors + tl.load(owners + program) * FIELDS
    width, height = tl.load(d + WIDTH).to(tl.int32), tl.load(d + HEIGHT).to(tl.int32)
    rows, stride = tl.load(d + ROWS), tl.multiple_of(tl.load(d + STRIDE), ALIGN)
    first_at, weights_at = tl.load(d + DOWN_FIRST), tl.load(d + DOWN_FIRST + 1)
    taps, bits = tl.load(d + DOWN_FIRST + 2).to(tl.int32), tl.load(d + DOWN_FIRST + 3).to(tl.int32)
    tile = program - tl.load(d + DOWN_START).to(tl.int32)
    tiles = (width + TILE_WIDTH - 1) // TILE_WIDTH
    channel = tile // tiles % 3
    y = tile // (3 * tiles) * TILE_HEIGHT + tl.arange(0, TILE_HEIGHT)
    x = tile % tiles * TILE_WIDTH + tl.arange(0, TILE_WIDTH)

    first = tl.load(tables + first_at + y, mask=y < height, other=0)
    plane = scratch + tl.multiple_of(tl.load(d + SCRATCH), ALIGN) + channel * (stride * rows)
    half = (1 << (bits - 1)).to(tl.int32)
    total = tl.full((TILE_HEIGHT, TILE_WIDTH), 0, tl.int32) + half
    # whole vectors are loaded: up to the row's padded end, whose bytes are never stored
    columns = (x < stride)[None, :]
    weight = tables + weights_at + y
    for j in range(taps):
        row = first + j
        live = (row < rows) & (y < height)  # where a window is shorter, its last weights are 0
        w = tl.load(weight + j * height, mask=y < height, other=0)
        pixels = tl.load(plane + (row * stride)[:, None] + x[None, :], mask=live[:, None] & columns, other=0)
        total += pixels.to(tl.int32) * w[:, None]
    byte = _byte(total, bits)

    patch, merge = tl.load(d + PATCH).to(tl.int32), tl.load(d + MERGE).to(tl.int32)
    py, px = y // patch, x // patch
    to_y = py // merge * tl.load(d + DOWN_MERGED) + py % merge * tl.load(d + DOWN_MERGED + 1)
    to_y += y % patch * tl.load(d + DOWN_MERGED + 2)
    to_x = px // merge * tl.load(d + ACROSS_MERGED) + px % merge * tl.load(d + ACROSS_MERGED + 1)
    to_x += x % patch * tl.load(d + ACROSS_MERGED + 2)
    to = out + tl.load(d + OUT) + channel * tl.load(d + CHANNEL) + to_y[:, None] + to_x[None, :]
    result = tl.load(values + tl.load(d + TABLE) * 768 + channel * 256 + byte.to(tl.int32)) if LOOK_UP else byte
    inside = (y < height)[:, None] & (x < width)[None, :]
    copy = tl.load(d + COPY)
    for _ in range(tl.load(d + COPIES).to(tl.int32)):
        tl.store(to, result, mask=inside)
        to += copy


@dataclass(frozen=True, slots=True)
class Loaded:
    """A batch whose integers are on the device; it can be launched repeatedly."""

    batch: ragged.RaggedBatch
    descriptors: Tensor
    tables: Tensor
    across: Tensor
    down: Tensor


def load(batch: ragged.RaggedBatch, device: str) -> Loaded:
    """Copy descriptors and tables to the device."""
    arrays = (batch.descriptors, batch.tables, batch.across, batch.down)
    return Loaded(batch, *(torch.from_numpy(array).to(device) for array in arrays))


def launch(loaded: Loaded, sources: Tensor, scratch: Tensor, values: Tensor | None, out: Tensor) -> None:
    """Launch both passes on the current stream. All tensors are on one device. Raises ValueError.

    `sources`: uint8 (batch.source_bytes), images at batch.sources. `scratch`: uint8 (batch.scratch_bytes). `values`:
    (n, 3, 256) of out's dtype, or None if `out` is uint8. `out`: (batch.values), images at batch.outs.
    """
    batch = loaded.batch
    if sources.numel() < batch.source_bytes or scratch.numel() < batch.scratch_bytes or out.numel() < batch.values:
        raise ValueError("a buffer is too small for this batch")
    if values is not None and (values.dtype != out.dtype or values.shape[1:] != (3, 256)):
        raise ValueError("the tables must be (n, 3, 256), of the output's dtype")
    if not (sources.is_contiguous() and scratch.is_contiguous() and out.is_contiguous()):
        raise ValueError("the buffers must be contiguous")
    words = sources[: sources.numel() // 4 * 4].view(torch.int32)
    integers = (loaded.tables, loaded.descriptors)
    across[(batch.across.size,)](words, *integers, loaded.across, scratch, *batch.tiles.across, num_warps=NUM_WARPS)
    look_up = values is not None
    table = values if values is not None else out
    down[(batch.down.size,)](
        scratch, *integers, loaded.down, table, out, look_up, *batch.tiles.down, num_warps=NUM_WARPS
    )


def lay_out(images: Sequence[ragged.RaggedImage]) -> ragged.RaggedBatch:
    """ragged.lay_out for this kernel's tiles."""
    return ragged.lay_out(images, INTERPRETER_TILES if is_interpreted() else GPU_TILES)


def is_interpreted() -> bool:
    """True if Triton's interpreter runs the kernel, on CPU tensors."""
    return not isinstance(down, triton.JITFunction)
