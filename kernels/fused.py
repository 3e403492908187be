"""The compiled resize fused with the patch layout: the bits of ATen's uint8 path and torch's operations, in one pass.

Rules: numpy arrays in and out, memory in (height, width, channel) order. Inputs are never changed. The GIL is released.
If the module was not built, `missing()` returns the reason, and nothing else here can be called.
Source: csrc/. Specification: reference.py. Tests: tests/images/test_fused.py. Figures: benchmarks/images.py.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from sidecar.kernels.grid import Geometry, ImageView, PatchSpec, ProcessorSpec, Size

try:
    from sidecar.kernels import _fused  # type: ignore[attr-defined]  # compiled, so it has no types
except ImportError as error:
    _fused = None
    _import_error = str(error)
else:
    _import_error = ""

Pixels = NDArray[np.uint8]
Kind = Literal["uint8", "float32", "bfloat16", "float16"]
KINDS: Final[dict[Kind, tuple[int, Any]]] = {
    "uint8": (0, np.uint8),
    "float32": (1, np.float32),
    "bfloat16": (2, np.uint16),  # as bits: numpy has no such type
    "float16": (3, np.float16),
}
FASTEST, PLAIN, AVX2, AVX512 = range(4)
MAX_PLANS: Final = 64  # cached tables of about 0.1-0.3 MB each


def missing() -> str:
    """Why the compiled kernel is not available; "" if it is."""
    if _fused is not None:
        return ""
    return f"the compiled kernel is missing ({_import_error}); install a C++ compiler and the package from source"


def level() -> str:
    """The instruction set that the kernel uses: "avx512", "avx2" or "plain"; "none" if it is not built."""
    return str(_fused.level()) if _fused is not None else "none"


def refused() -> str:
    """The instruction set that is not used because its bits differ from the plain form's here; "" if none."""
    return str(_fused.refused()) if _fused is not None else ""


def resize(
    image: Pixels, height: int, width: int, resample: int, level: int = FASTEST, out: Pixels | None = None
) -> Pixels:
    """Resize contiguous uint8 (h, w, 3) to (height, width, 3), into `out` if given. Raises ValueError."""
    made = np.empty((height, width, 3), np.uint8) if out is None else out
    _fused.resize(_plan(*_size(image), height, width, resample), image, made, level)
    return made


def patches(
    image: Pixels,
    geometry: Geometry,
    spec: PatchSpec,
    kind: Kind,
    level: int = FASTEST,
    into: Pixels | None = None,
) -> NDArray[Any]:
    """`pixel_values` of uint8 (h, w, 3), contiguous: (grid_h * grid_w, 3 * temporal * patch * patch) of `kind`.

    `into`: the memory to write them to, of exactly their bytes, which begins where a page does.
    """
    layout = (spec.patch_size, spec.merge_size, spec.temporal_patch_size)
    return cut(image, (geometry.height, geometry.width), layout, spec, kind, level, into)


def video(
    frames: Pixels,
    geometry: Geometry,
    spec: PatchSpec,
    kind: Kind,
    level: int = FASTEST,
    into: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """`pixel_values_videos` of one step of a video: (grid_h * grid_w, 3 * temporal * patch * patch) of `kind`.

    `frames`: contiguous uint8 (temporal, h, w, 3), or (1, h, w, 3), whose frame is repeated. `into`: rows to write to.
    """
    number, dtype = KINDS[kind]
    count, patch, temporal = len(frames), spec.patch_size, spec.temporal_patch_size
    if frames.ndim != 4 or count not in (1, temporal) or not frames.flags.c_contiguous:
        raise ValueError(f"a step of a video is {temporal} contiguous frames or one, not {frames.shape}")
    shape = (geometry.grid_h * geometry.grid_w, 3 * temporal * patch**2)
    out = _aligned(shape, dtype) if into is None else into
    plan = _plan(*_size(frames[0]), geometry.height, geometry.width, spec.resample)
    _fused.patches(plan, frames, out, level, patch, spec.merge_size, temporal, number, *_values(spec))
    return out


def cut(
    image: Pixels,
    size: Size,
    layout: tuple[int, int, int],
    spec: ProcessorSpec,
    kind: Kind,
    level: int = FASTEST,
    into: Pixels | None = None,
) -> NDArray[Any]:
    """`patches` for any size and `layout`: side of a patch in pixels, side of a merged block in patches, copies."""
    number, dtype = KINDS[kind]
    patch, merge, temporal = layout
    shape = (size[0] // patch * (size[1] // patch), 3 * temporal * patch**2)
    out = _aligned(shape, dtype) if into is None else into.view(dtype).reshape(shape)
    plan = _plan(*_size(image), *size, spec.resample)
    _fused.patches(plan, image, out, level, patch, merge, temporal, number, *_values(spec))
    return out


def tiles(
    image: Pixels,
    view: ImageView,
    spec: ProcessorSpec,
    kind: Kind,
    out: NDArray[Any],
    level: int = FASTEST,
) -> None:
    """Resize contiguous uint8 (h, w, 3), place it on `view`'s canvas, cut it into `out` (tiles, 3, height, width)."""
    plan = _plan(*_size(image), *view.size, spec.resample)
    canvas = (*view.canvas, view.top, view.left, *view.tile)
    _fused.tiles(plan, image, out, level, canvas, KINDS[kind][0], *_values(spec))


def _size(image: Pixels) -> tuple[int, int]:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.flags.c_contiguous:
        raise ValueError(f"an image must be contiguous uint8 (height, width, 3), not {image.dtype} {image.shape}")
    return image.shape[0], image.shape[1]


@lru_cache(MAX_PLANS)
def _plan(h: int, w: int, height: int, width: int, resample: int) -> Any:
    return _fused.plan(h, w, height, width, resample)


def _values(spec: ProcessorSpec) -> tuple[bool, tuple[float, ...], tuple[float, ...], float]:
    """How a byte becomes a value: whether (x - mean) / std, else x * factor; float32, rounded like the processor."""
    scale = np.float32(1.0 / spec.rescale_factor) if spec.do_rescale else np.float32(1)
    mean, deviation = (np.array(v, np.float32) * scale for v in (spec.image_mean, spec.image_std))
    factor = spec.rescale_factor if spec.do_rescale else 1.0
    return spec.do_normalize, tuple(mean.tolist()), tuple(deviation.tolist()), factor


def empty(shape: tuple[int, int], kind: Kind) -> NDArray[Any]:
    """An empty array of `kind`, aligned as results are."""
    return _aligned(shape, KINDS[kind][1])


def _aligned(shape: tuple[int, int], dtype: Any) -> NDArray[Any]:
    """An empty array aligned to 64 bytes, so that it can be written around the caches."""
    size = shape[0] * shape[1] * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    array: NDArray[Any] = memory[start : start + size].view(dtype).reshape(shape)
    return array
