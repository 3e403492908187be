"""JPEG files as no encoder writes them: any number of components, any sampling, any frame, from random coefficients.

The Huffman codes have one length, so that writing needs no tables: 4 bits per DC class, 8 per AC symbol.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass

BASELINE, PROGRESSIVE = 0xC0, 0xC2
DC_CLASSES = 12
AC_SYMBOLS = (0x00, 0xF0, *(run << 4 | size for run in range(15) for size in range(1, 11)))
AC_CODE = {symbol: code for code, symbol in enumerate(AC_SYMBOLS)}
RUNS = tuple(size << 4 for size in range(15))  # of a progressive scan: so many empty blocks
YCC, RGB = (1, 2, 3), (82, 71, 66)


@dataclass
class Bits:
    """Bits on their way to bytes, a zero stuffed behind each FF."""

    out: bytearray
    value: int = 0
    count: int = 0

    def put(self, value: int, count: int) -> None:
        self.value, self.count = self.value << count | value, self.count + count
        while self.count >= 8:
            self.count -= 8
            byte = self.value >> self.count & 0xFF
            self.out += b"\xff\0" if byte == 0xFF else bytes((byte,))
        self.value &= (1 << self.count) - 1

    def number(self, value: int, size: int) -> None:
        self.put(value if value >= 0 else value + (1 << size) - 1, size)

    def end(self) -> bytearray:
        if self.count:
            self.put((1 << (8 - self.count)) - 1, 8 - self.count)
        return self.out


def segment(marker: int, body: bytes) -> bytes:
    """One marker with its length and content."""
    return struct.pack("!BBH", 0xFF, marker, len(body) + 2) + body


def adobe(transform: int) -> bytes:
    """Adobe's marker: 0 means RGB or CMYK, 1 YCbCr, 2 YCCK."""
    return segment(0xEE, b"Adobe" + struct.pack("!HHHB", 100, 0, 0, transform))


def frame(
    marker: int, width: int, height: int, sampling: Sequence[tuple[int, int]], ids: Sequence[int], bits: int
) -> bytes:
    """A frame header."""
    parts = (struct.pack("!BBB", id, h << 4 | v, 0) for id, (h, v) in zip(ids, sampling, strict=True))
    return segment(marker, struct.pack("!BHHB", bits, height, width, len(ids)) + b"".join(parts))


def tables(ac_symbols: Sequence[int] = AC_SYMBOLS) -> bytes:
    """One quantisation table and the Huffman tables of all components."""
    dc = bytes((0, 0, 0, DC_CLASSES)) + bytes(12) + bytes(range(DC_CLASSES))
    ac = bytes(7) + bytes((len(ac_symbols),)) + bytes(8) + bytes(ac_symbols)
    return segment(0xDB, b"\0" + bytes(4 + i // 4 for i in range(64))) + segment(0xC4, b"\0" + dc + b"\x10" + ac)


def scan_head(ids: Sequence[int], first: int = 0, last: int = 63, high: int = 0, low: int = 0) -> bytes:
    """The header of a scan over these components."""
    return segment(
        0xDA, bytes((len(ids),)) + b"".join(bytes((id, 0)) for id in ids) + bytes((first, last, high << 4 | low))
    )


def block(bits: Bits, before: int, dice: random.Random) -> int:
    """One block of random coefficients; returns its DC value."""
    value = max(-200, min(200, before + dice.randint(-30, 30)))
    size = abs(value - before).bit_length()
    bits.put(size, 4)
    bits.number(value - before, size)
    at = 1
    while at < 64 and dice.random() < 0.7:
        run, size = dice.randint(0, 5), dice.randint(1, 4)
        if at + run + 1 > 64:
            break
        at += run + 1
        bits.put(AC_CODE[run << 4 | size], 8)
        bits.number(dice.choice((-1, 1)) * dice.randint(1 << size - 1, (1 << size) - 1), size)
    if at < 64:
        bits.put(AC_CODE[0], 8)
    return value


def jpeg(
    width: int,
    height: int,
    sampling: Sequence[tuple[int, int]],
    *,
    ids: Sequence[int] = YCC,
    marker: int = BASELINE,
    bits: int = 8,
    extra: bytes = b"",
    seed: int = 0,
) -> bytes:
    """A file of one interleaved scan. `extra`: segments behind the start."""
    ids = (*ids, 4, 5, 6)[: len(sampling)]
    dice, data, before = random.Random(seed), Bits(bytearray()), [0] * len(sampling)
    across, down = (max(factors) for factors in zip(*sampling, strict=True))
    alone = len(sampling) == 1
    if alone:
        across = down = 1
    units = -(-width // (8 * across)) * -(-height // (8 * down))
    for _ in range(units):
        for i, (h, v) in enumerate(sampling):
            for _ in range(1 if alone else h * v):
                before[i] = block(data, before[i], dice)
    head = frame(marker, width, height, sampling, ids, bits)
    return b"\xff\xd8" + extra + tables() + head + scan_head(ids) + bytes(data.end()) + b"\xff\xd9"


def scans(width: int, height: int, count: int) -> bytes:
    """A progressive grey file with `count` empty scans, each over all of its blocks: few bytes, much work."""
    blocks = -(-width // 8) * -(-height // 8)
    flat, empty = Bits(bytearray()), Bits(bytearray())
    for _ in range(blocks):
        flat.put(0, 4)
    while blocks:
        size = min(blocks.bit_length() - 1, 14)
        step = min(blocks, (2 << size) - 1)
        empty.put(RUNS.index(size << 4), 8)
        empty.put(step - (1 << size), size)
        blocks -= step
    start = b"\xff\xd8" + tables(RUNS) + frame(PROGRESSIVE, width, height, [(1, 1)], (1,), 8)
    again = scan_head((1,), 1, 63) + bytes(empty.end())
    return start + scan_head((1,), 0, 0) + bytes(flat.end()) + again * count + b"\xff\xd9"
