"""The exact uint8 antialiased resize in slow integers, which every fast form must equal bit for bit.

Rules: separable, the horizontal pass first, uint8 between the passes. A pass that does not change the size is
skipped. A weight is a float kernel (cubic with a = -0.5, triangle, or three-lobed Lanczos), stretched by the scale
when shrinking, normalised, then rounded to an integer at the largest precision at which the axis's largest weight is
below 2**15. Sums start at one half, are shifted down and clamped to 0..255. numpy only, for its int64.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Taps = list[tuple[int, NDArray[np.int64]]]  # for each output position: first input position, weights

MAX_PRECISION = 22


def cubic(x: float) -> float:
    """Keys' cubic convolution kernel with a = -0.5."""
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * -0.5 if x < 2 else 0.0


def triangle(x: float) -> float:
    """The kernel of linear interpolation."""
    return max(0.0, 1 - abs(x))


def lanczos(x: float) -> float:
    """The sinc function under a sinc window of three lobes."""
    return sinc(x) * sinc(x / 3) if -3 < x < 3 else 0.0


def sinc(x: float) -> float:
    """sin(pi x) / (pi x)."""
    return math.sin(math.pi * x) / (math.pi * x) if x else 1.0


# PIL's number -> kernel, radius
KERNELS: dict[int, tuple[Callable[[float], float], int]] = {1: (lanczos, 3), 2: (triangle, 1), 3: (cubic, 2)}


def resize(image: Pixels, height: int, width: int, resample: int = 3) -> Pixels:
    """Resize `image` (height, width, channels). `resample` is PIL's number: 1 Lanczos, 2 bilinear, 3 bicubic."""
    across = image if image.shape[1] == width else _pass(image, width, resample)
    if across.shape[0] == height:
        return across
    return _pass(across.transpose(1, 0, 2), height, resample).transpose(1, 0, 2)


def taps(source: int, target: int, resample: int) -> tuple[Taps, int]:
    """Integer weights of one axis, and their precision in bits."""
    kernel, radius = KERNELS[resample]
    scale = source / target
    stretch = max(scale, 1.0)
    support = radius * stretch
    real: list[tuple[int, list[float]]] = []
    for i in range(target):
        center = scale * (i + 0.5)
        first = max(int(center - support + 0.5), 0)
        count = min(int(center + support + 0.5), source) - first
        weights = [kernel((j + first - center + 0.5) * (1 / stretch)) for j in range(count)]
        total = sum(weights)
        real.append((first, [w / total for w in weights]))
    bits = _precision(max(max(weights) for _, weights in real))
    return [(first, np.array([_round(w * (1 << bits)) for w in weights])) for first, weights in real], bits


def _precision(largest: float) -> int:
    bits = 0
    while bits < MAX_PRECISION and int(0.5 + largest * (1 << (bits + 1))) < 1 << 15:
        bits += 1
    return bits


def _round(x: float) -> int:
    return int(x + (0.5 if x >= 0 else -0.5))


def _pass(image: Pixels, target: int, resample: int) -> Pixels:
    """One pass along axis 1."""
    weights, bits = taps(image.shape[1], target, resample)
    out = np.empty((image.shape[0], target, image.shape[2]), np.uint8)
    for i, (first, w) in enumerate(weights):
        window = image[:, first : first + len(w)].astype(np.int64)
        sums = np.tensordot(window, w, axes=([1], [0])) + (1 << (bits - 1))
        out[:, i] = np.clip(sums >> bits, 0, 255)
    return out
