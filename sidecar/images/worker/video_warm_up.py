"""Decode a video that is made here, so that OpenCV loads what it loads late before files are out of reach."""

from __future__ import annotations

import contextlib
import io
import struct
from collections.abc import Callable
from typing import Final

from PIL import Image

from sidecar.images.protocol import TENSORS, Data, Frame, ImageLimits, VideoJob
from sidecar.kernels.families.videos import VideoSpec
from sidecar.kernels.grid import BICUBIC

SIDE, FRAMES, FPS = 32, 4, 2
SPEC: Final = VideoSpec(
    resample=BICUBIC,
    do_rescale=True,
    rescale_factor=1 / 255,
    do_normalize=True,
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.5, 0.5, 0.5),
    patch_size=8,
    merge_size=1,
    temporal_patch_size=2,
    min_pixels=64,
    max_pixels=4096,
    whole=True,
)


def preimport() -> None:
    """Import OpenCV if it is installed, and keep it to one thread."""
    with contextlib.suppress(ImportError):
        import cv2

        cv2.setNumThreads(1)


def run(prepare: Callable[[VideoJob, Data], tuple[Frame, Data]], limits: ImageLimits, seconds: float) -> None:
    """Prepare a small video."""
    prepare(VideoJob(TENSORS, SPEC.to_json(), False, limits, seconds), clip())


def clip() -> bytes:
    """An AVI of four black JPEGs."""
    out = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE)).save(out, "JPEG")
    jpeg = out.getvalue()
    main = struct.pack("<14I", 1_000_000 // FPS, 0, 0, 0x10, FRAMES, 0, 1, len(jpeg), SIDE, SIDE, 0, 0, 0, 0)
    stream = struct.pack(
        "<4s4sIHH8I4H", b"vids", b"MJPG", 0, 0, 0, 0, 1, FPS, 0, FRAMES, len(jpeg), 0, 0, 0, 0, SIDE, SIDE
    )
    bitmap = struct.pack("<3I2H4s5I", 40, SIDE, SIDE, 1, 24, b"MJPG", 3 * SIDE * SIDE, 0, 0, 0, 0)
    headers = _list(b"hdrl", _chunk(b"avih", main) + _list(b"strl", _chunk(b"strh", stream) + _chunk(b"strf", bitmap)))
    movie = _list(b"movi", _chunk(b"00dc", jpeg) * FRAMES)
    entry = len(_chunk(b"00dc", jpeg))
    index = b"".join(struct.pack("<4s3I", b"00dc", 0x10, 4 + n * entry, len(jpeg)) for n in range(FRAMES))
    return _chunk(b"RIFF", b"AVI " + headers + movie + _chunk(b"idx1", index))


def _chunk(name: bytes, content: bytes) -> bytes:
    return name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)


def _list(name: bytes, content: bytes) -> bytes:
    return _chunk(b"LIST", name + content)
