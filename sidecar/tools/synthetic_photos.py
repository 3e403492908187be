"""Synthetic pictures with the size and the entropy of photographs, for the demo, the tests and the benchmarks.

Equal arguments give equal pixels; the JPEG bytes may differ between versions of libjpeg. The spectrum of a photograph
falls with frequency, so a picture is a sum of noise octaves (light, texture), a few hard edges (objects) and sensor
noise: 0.15-0.35 bytes per pixel at quality 90. Needs numpy and Pillow, which are imported on use.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Plane = NDArray[np.float32]

# (cells along the longer side, amplitude in grey levels)
NOISE_OCTAVES = ((6, 60.0), (24, 26.0), (96, 9.0), (300, 5.0))
# Standard deviation in grey levels.
SENSOR_NOISE_LEVELS = 3.0
OBJECT_COUNT = 24


def photo(width: int, height: int, seed: int = 0, *, quality: int = 90, exif_orientation: int = 0) -> bytes:
    """A JPEG (4:2:0) of `width` x `height` pixels. `exif_orientation` 1..8 is written as EXIF, 0 writes none."""
    from PIL import Image

    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = exif_orientation
    extra = {"exif": exif} if exif_orientation else {}
    Image.fromarray(pixels(width, height, seed)).save(out, "JPEG", quality=quality, **extra)
    return out.getvalue()


def pixels(width: int, height: int, seed: int = 0) -> NDArray[np.uint8]:
    """The same picture as RGB, shape (height, width, 3)."""
    import numpy as np

    rng = np.random.default_rng(seed)
    light = 118 + sum((_octave(rng, width, height, cells, amp) for cells, amp in NOISE_OCTAVES), np.float32(0))
    light += rng.standard_normal((height, width), dtype=np.float32) * np.float32(SENSOR_NOISE_LEVELS)
    tint = [_octave(rng, width, height, 4, 28.0) for _ in range(3)]
    _objects(rng, light, tint)
    return np.stack([np.clip(light + t, 0, 255).astype(np.uint8) for t in tint], axis=2)


def _octave(rng: np.random.Generator, width: int, height: int, cells: int, amplitude: float) -> Plane:
    """Smooth noise with about `cells` bumps along the longer side."""
    import numpy as np
    from PIL import Image

    step = max(width, height) / cells
    size = (max(2, round(width / step)), max(2, round(height / step)))
    grid = Image.fromarray(rng.standard_normal((size[1], size[0]), dtype=np.float32) * np.float32(amplitude))
    return np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32).copy()


def _objects(rng: np.random.Generator, light: Plane, tint: list[Plane]) -> None:
    """Draw ellipses and boxes with hard edges, each lighter or darker than its background."""
    import numpy as np

    height, width = light.shape
    for i in range(OBJECT_COUNT):
        h, w = (max(1, int(side * rng.uniform(0.03, 0.25))) for side in (height, width))
        y, x = (int(rng.integers(0, max(1, side - length))) for side, length in ((height, h), (width, w)))
        part = np.s_[y : y + h, x : x + w]
        inside: Any = np.ones(light[part].shape, dtype=bool)
        if i % 2:
            down, across = np.ogrid[-1 : 1 : light[part].shape[0] * 1j, -1 : 1 : light[part].shape[1] * 1j]
            inside = down * down + across * across <= 1
        for plane, spread in ((light, 45.0), *((t, 20.0) for t in tint)):
            plane[part] += np.where(inside, np.float32(rng.uniform(-spread, spread)), np.float32(0))
