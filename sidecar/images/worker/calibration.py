"""Measure the unit costs of cost_rule.py on this machine, in a worker: about half a second, once.

Rules: CPU time of this thread, so that a busy machine changes little; the least of a few runs, after one that warms up.
The engine's side is measured with what engines use: Pillow and `json`. Its torchvision and torch are not installed
here: their times follow from those of the same work in our kernel and in numpy.
"""

from __future__ import annotations

import io
import json
import mmap
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import numpy as np
import pybase64
from numpy.random import default_rng
from PIL import Image

from sidecar.images import file_headers
from sidecar.images.cost_rule import STEPS
from sidecar.images.protocol import ImageLimits
from sidecar.images.worker.decode import decode
from sidecar.images.worker.tensors import prepare, resize
from sidecar.kernels.families.single_view import Qwen2VLSpec
from sidecar.kernels.grid import BICUBIC, Geometry

RUNS: Final = 3
MAX_SECONDS: Final = 1.5  # of CPU time: what is not measured by then is not measured better
LIMITS: Final = ImageLimits(1 << 24, 1 << 24)
LARGE: Final = (896, 1344)  # height and width in pixels: beyond the caches, as photographs are
SMALL: Final = (448, 672)
BYTES: Final = 4 << 20
# An estimate: beyond `json` and base64, an engine receives a body, joins, validates and copies it from task to task.
ENGINE_COPIES: Final = 4
# Torchvision's resize over our kernel's, and torch's patch layout over numpy's: 3.06 to 1.09 ms and 9.83 to 7.00 ms for
# LARGE to SMALL on one thread of an Intel Xeon with AVX-512, 2026-11-30.
TORCHVISION_RESIZE: Final = 2.8
TORCH_LAYOUT: Final = 1.4
SPEC: Final = Qwen2VLSpec(
    resample=BICUBIC,
    do_rescale=False,
    rescale_factor=1 / 255,
    do_normalize=False,
    image_mean=(0.5,) * 3,
    image_std=(0.5,) * 3,
    patch_size=14,
    merge_size=2,
    temporal_patch_size=2,
    min_pixels=1,
    max_pixels=1 << 40,
)


def measure() -> tuple[tuple[str, float], ...]:
    """Nanoseconds by step."""
    began = time.thread_time()
    picture = _picture(*LARGE)
    count, small_count = LARGE[0] * LARGE[1], SMALL[0] * SMALL[1]
    found: dict[str, float] = {}
    for format, options in {"jpeg": {"quality": 85}, "png": {"compress_level": 1}, "webp": {"method": 0}}.items():
        sample = picture if format == "jpeg" else picture.crop((0, 0, SMALL[1], SMALL[0]))
        file = io.BytesIO()
        sample.save(file, format, **options)
        data, pixels = file.getvalue(), sample.width * sample.height
        header = file_headers.read(data)
        assert header is not None
        late = time.thread_time() - began > MAX_SECONDS
        runs = 1 if late else RUNS
        found[f"decode_{format}"] = _least(partial(decode, data, header, LIMITS), runs) / pixels
        found[f"engine_decode_{format}"] = _least(partial(_open, data), runs) / pixels
    rows = np.array(picture)
    shrunk = np.array(picture.resize((SMALL[1], SMALL[0])))
    same, half = _geometry(*LARGE), _geometry(*SMALL)
    found["resize_out"] = 0.0  # the pass over the original is nearly all of it
    found["resize_in"] = _least(lambda: resize(rows, half, SPEC)) / count
    found["patches_out"] = _least(lambda: prepare(shrunk, half, SPEC)) / small_count
    found["engine_resize_in"] = TORCHVISION_RESIZE * found["resize_in"]
    found["engine_process_out"] = TORCH_LAYOUT * _least(lambda: _process(picture, same)) / count
    plain = bytes(BYTES)
    text = pybase64.b64encode(plain)
    found["base64"] = _least(lambda: pybase64.b64encode(plain)) / BYTES
    body = b'{"url":"' + text + b'"}'
    parse = _least(lambda: pybase64.b64decode(json.loads(body)["url"], validate=True))
    copy = _least(lambda: bytearray(body))
    found["text"] = (parse + ENGINE_COPIES * copy) / len(text)
    found["write"] = _least(lambda: _write(plain)) / BYTES
    return tuple((step, found[step]) for step in STEPS)


def _picture(height: int, width: int) -> Image.Image:
    """Something like a photograph: smooth, with some noise."""
    noise = default_rng(1).integers(0, 24, (height, width, 3), np.uint8)
    slope = np.linspace(0, 200, width, dtype=np.uint8)[None, :, None]
    return Image.fromarray(noise + slope)


def _geometry(height: int, width: int) -> Geometry:
    return Geometry(height, width, 1, height // SPEC.patch_size, width // SPEC.patch_size)


def _open(data: bytes) -> Image.Image:
    """An image as vLLM opens it."""
    image = Image.open(io.BytesIO(data))
    image.load()
    return image.convert("RGB")


def _process(picture: Image.Image, geometry: Geometry) -> Any:
    """What the processor does with an image of the right size, in numpy: to an array, to planes, to patches."""
    p, m, t = SPEC.patch_size, SPEC.merge_size, SPEC.temporal_patch_size
    planes = np.ascontiguousarray(np.array(picture).transpose(2, 0, 1))
    blocks = planes.reshape(3, geometry.grid_h // m, m, p, geometry.grid_w // m, m, p)
    ordered = blocks.transpose(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None]
    return np.broadcast_to(ordered, (*ordered.shape[:5], t, p, p)).reshape(-1, 3 * t * p * p)


def _write(data: bytes) -> None:
    """Bytes into shared memory that did not exist before."""
    with mmap.mmap(-1, len(data), flags=mmap.MAP_SHARED) as memory:
        memory[:] = data


def _least(run: Callable[[], Any], runs: int = RUNS) -> float:
    """Nanoseconds of CPU time."""
    taken = []
    for _ in range(runs + 1):
        start = time.thread_time_ns()
        run()
        taken.append(time.thread_time_ns() - start)
    return float(min(taken[1:]))
