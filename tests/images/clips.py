"""Videos of every kind, made by FFmpeg: frames that differ visibly, in the containers and codecs that clients send."""

from __future__ import annotations

import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

# name -> container, codec, its options, those of the container
KINDS: dict[str, tuple[str, str, dict[str, str], dict[str, str]]] = {
    "mp4": ("mp4", "libx264", {"bf": "0"}, {}),
    "mp4, B-frames": ("mp4", "libx264", {"bf": "3"}, {}),
    "mp4, index first": ("mp4", "libx264", {}, {"movflags": "faststart"}),
    "mp4 in fragments": ("mp4", "libx264", {"g": "10"}, {"movflags": "frag_keyframe+empty_moov+default_base_moof"}),
    "mp4, MPEG-4": ("mp4", "mpeg4", {}, {}),
    "mov": ("mov", "libx264", {}, {}),
    "webm, VP9": ("webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}, {}),
    "webm, VP8": ("webm", "libvpx", {"deadline": "realtime", "cpu-used": "8"}, {}),
    "mkv": ("matroska", "libx264", {}, {}),
    "mkv, live": ("matroska", "libx264", {"g": "10"}, {"live": "1"}),
    "avi": ("avi", "mpeg4", {}, {}),
}


def pictures(count: int, width: int, height: int) -> list[np.ndarray[Any, Any]]:
    """Frames with a moving edge and some noise, which tell their own number."""
    noise = np.random.default_rng(7).integers(0, 40, (height, width, 3), dtype=np.uint8)
    made = []
    for n in range(count):
        frame = noise + np.uint8(n * 5 % 160)
        frame[:, : 1 + n * 7 % width] += 50
        made.append(frame)
    return made


def clip(kind: str = "mp4", count: int = 30, width: int = 320, height: int = 240, fps: Fraction | int = 30) -> bytes:
    """A video file of `count` frames."""
    container, codec, options, muxing = KINDS[kind]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip"  # a file: an index is moved to its front by reading it again
        _encode(path, container, codec, options, muxing, pictures(count, width, height), Fraction(fps))
        return path.read_bytes()


def _encode(
    path: Path,
    container: str,
    codec: str,
    options: dict[str, str],
    muxing: dict[str, str],
    frames: list[np.ndarray[Any, Any]],
    rate: Fraction,
) -> None:
    with av.open(str(path), "w", format=container, options=muxing) as file:
        stream = file.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        file.mux(stream.encode(None))
