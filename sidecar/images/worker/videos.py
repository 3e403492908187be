"""Frames of a video -> the video processor's output, bit for bit as its torchvision backend on the CPU.

Rules: as in tensors.py. A step is `temporal_patch_size` frames, the last of which is repeated where frames are missing.
Steps are laid out one by one as frames come, so that no more than a step's frames are held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from sidecar.images.worker.tensors import KERNEL_KINDS, Pixels, Values
from sidecar.kernels import fused
from sidecar.kernels.families.videos import VideoSpec
from sidecar.kernels.grid import Geometry

Put = Callable[[Pixels, Pixels], object]  # writes a frame, the second, into a step


def lay_out(frames: Iterable[Pixels], geometry: Geometry, spec: VideoSpec, put: Put = np.copyto) -> Values:
    """`pixel_values_videos` of as many frames as `geometry` is for; each is contiguous uint8 (height, width, 3).

    `put` makes RGB of a frame that is none.
    """
    rows = geometry.grid_h * geometry.grid_w
    kind = KERNEL_KINDS[spec.dtype]
    out = fused.empty((geometry.grid_t * rows, 3 * spec.temporal_patch_size * spec.patch_size**2), kind)
    done = 0
    for step in _steps(frames, spec.temporal_patch_size, put):
        fused.video(step, geometry, spec, kind, into=out[done : done + rows])
        done += rows
    if done != len(out):
        raise ValueError(f"{done} of {len(out)} rows were made")  # the rest is memory of other jobs
    return out


def _steps(frames: Iterable[Pixels], size: int, put: Put) -> Iterator[Pixels]:
    """Arrays (size, height, width, 3); the last frame fills up the last one. Each is valid until the next."""
    step: Pixels | None = None
    held = 0
    for frame in frames:
        if step is None:
            step = np.empty((size, *frame.shape), np.uint8)
        put(step[held], frame)
        held += 1
        if held == size:
            yield step
            held = 0
    if step is not None and held:
        step[held:] = step[held - 1]
        yield step
