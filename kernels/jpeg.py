"""A baseline JPEG as quantised coefficients, by the compiled entropy decoder: csrc/jpeg_coefficients.hpp.

Rules: what it does not decode, because it is damaged, progressive, RGB or anything else out of the ordinary, is None:
another decoder decides what that is. Coefficients are int16 in blocks of 8 x 8, row by row; of each component its
blocks row by row, padded to whole units of the scan; components one after the other. Arithmetic: jpeg_reference.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

try:
    from sidecar.kernels import _fused  # type: ignore[attr-defined]  # compiled, so it has no types
except ImportError:
    _fused = None

BLOCK: Final = 8
Coefficients = NDArray[np.int16]


@dataclass(frozen=True, slots=True)
class JpegPlane:
    """One component: its blocks, its size in samples, and how often a sample counts across and down."""

    wide: int  # blocks
    high: int
    width: int  # samples that belong to the image
    height: int
    across: int
    down: int

    @property
    def blocks(self) -> int:
        return self.wide * self.high


@dataclass(frozen=True, slots=True)
class JpegLayout:
    """The frame of a JPEG: grey, or YCbCr with full luma. `sampling` is (across, down) of each component."""

    height: int
    width: int
    sampling: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot be; the numbers may come from another process."""
        first = self.sampling[0] if self.sampling else (0, 0)
        factors = [factor for pair in self.sampling for factor in pair]
        if len(self.sampling) not in (1, 3) or not all(1 <= factor <= 4 for factor in factors):
            raise ValueError("a JPEG has one or three components, with sampling factors 1..4")
        if any(first[0] % h or first[1] % v for h, v in self.sampling) or min(self.height, self.width) < 1:
            raise ValueError("chroma must be a whole fraction of luma")
        if len(self.sampling) == 1 and first != (1, 1):
            raise ValueError("the factors of grey are 1")

    @property
    def planes(self) -> tuple[JpegPlane, ...]:
        """The components, in order."""
        h, v = self.sampling[0]
        across, down = -(-self.width // (BLOCK * h)), -(-self.height // (BLOCK * v))
        return tuple(
            JpegPlane(across * ch, down * cv, -(-self.width * ch // h), -(-self.height * cv // v), h // ch, v // cv)
            for ch, cv in self.sampling
        )

    @property
    def coefficients(self) -> int:
        """The number of coefficients of all components."""
        return BLOCK * BLOCK * sum(plane.blocks for plane in self.planes)


class JpegFile:
    """A file whose head was read: its layout, and its quantisation tables (components, 64) in natural order."""

    def __init__(self, opened: Any, layout: JpegLayout, tables: NDArray[np.uint16]) -> None:
        self._opened = opened
        self.layout = layout
        self.tables = tables

    def decode(self, out: Coefficients) -> bool:
        """Decode all coefficients into `out`, of exactly their number. False if the file is damaged."""
        return bool(_fused.jpeg_coefficients(self._opened, out))


def open_jpeg(data: bytes) -> JpegFile | None:
    """Read a file up to its scan; None if it is not for this decoder."""
    found = _fused.open_jpeg(data) if _fused is not None else None
    if found is None:
        return None
    opened, height, width, (sampling, tables), _ = found
    numbers = np.frombuffer(tables, np.uint16).reshape(len(sampling), BLOCK * BLOCK)
    return JpegFile(opened, JpegLayout(height, width, sampling), numbers)
