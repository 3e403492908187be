"""Which frames of a video are taken: as vLLM's loaders and the Hugging Face processors choose them.

Rules: pure numbers, in the order of their own arithmetic: numpy's `linspace`, torch's `arange` in float32. A rule that
they refuse raises ValueError. Nothing here is bounded: callers bound the frames of a file before they ask.
Sources: vLLM 0.32 `vllm/multimodal/video.py` (VideoBackend, Qwen2VLVideoBackend, Qwen3VLVideoBackend); transformers
5.23 `Qwen2VLVideoProcessor.sample_frames` and `Qwen3VLVideoProcessor.sample_frames`.
Tests: tests/images/test_video_families.py.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

DEFAULT_COUNT: Final = 32  # frames, vLLM's --media-io-kwargs '{"video": {"num_frames": 32}}'
DEFAULT_FPS: Final = 2.0  # of its loaders for Qwen2.5-VL and Qwen3-VL
MAX_FPS: Final = 30.0  # their limit
UNKNOWN_FPS: Final = 24.0  # what is assumed of a file that has none
VECTOR: Final = 8  # floats in a register of AVX2, which torch's `arange` uses; it matters beyond 10,000 frames
_FLOAT: Final = struct.Struct("f")


@dataclass(frozen=True, slots=True)
class VideoSource:
    """A video as its container describes it: number of frames, and frames per second (0: unknown)."""

    frames: int
    fps: float

    @property
    def seconds(self) -> float:
        return self.frames / self.fps if self.fps > 0 else 0.0


def number_by_count(source: VideoSource, count: int = DEFAULT_COUNT, fps: float = 0.0) -> int:
    """How many frames vLLM's usual loader takes: `count`, or those of `fps` if they are fewer. 0 or less: no bound."""
    taken = min(count, source.frames) if count > 0 else source.frames
    if fps > 0:
        taken = min(taken, math.floor(source.seconds * fps))
    return max(1, taken)


def by_count(source: VideoSource, count: int = DEFAULT_COUNT, fps: float = 0.0) -> list[int]:
    """vLLM's usual loader: as many frames, evenly."""
    total, taken = source.frames, number_by_count(source, count, fps)
    return list(range(taken)) if taken == total else [int(at) for at in _evenly(total, taken)]


def by_fps(source: VideoSource, fps: float = DEFAULT_FPS, least: int = 4, most: int = 768) -> list[int]:
    """Qwen3-VL's processor, and with `fps` of at most MAX_FPS vLLM's loader for it: frames at a rate, within bounds."""
    total = source.frames
    taken = int(total / (source.fps if source.fps > 0 else UNKNOWN_FPS) * fps)
    return rounded(total, min(max(taken, least), most, total))


def rounded(total: int, count: int) -> list[int]:
    """`count` of `total` frames evenly, each the nearest one."""
    return [round(at) for at in _evenly(total, count)]


def by_step(
    source: VideoSource, temporal: int, count: int = 0, fps: float = 0.0, least: int = 4, most: int = 768
) -> list[int]:
    """Qwen2.5-VL's processor where it samples: whole multiples of `temporal` frames, by count or by rate.

    Raises ValueError where it refuses: too few frames, or a file without a rate.
    """
    total = source.frames
    if count:
        taken = round(count / temporal) * temporal
    elif fps:
        if source.fps <= 0:
            raise ValueError("the video has no frame rate")
        most = math.floor(min(most, total) / temporal) * temporal
        taken = math.floor(min(max(total / source.fps * fps, least), most, total) / temporal) * temporal
    else:
        return list(range(total))
    if not 0 < taken <= total:
        raise ValueError(f"{taken} frames cannot be sampled from {total}")
    return _arange(total, total / taken)


def _arange(total: int, step: float) -> list[int]:
    """torch.arange(0, total, step).int(), which is in float32: VECTOR values at a time from the first, in pairs."""
    count = math.ceil(total / step)
    vectors = count // (2 * VECTOR) * 2 * VECTOR  # values that are made so; the others one by one
    first = [_rounded(i // VECTOR * VECTOR * step) + i % VECTOR * step for i in range(vectors)]
    return [int(_rounded(at)) for at in (*first, *(i * step for i in range(vectors, count)))]


def _rounded(value: float) -> float:
    """To float32."""
    return float(_FLOAT.unpack(_FLOAT.pack(value))[0])


def _evenly(total: int, count: int) -> Iterator[float]:
    """numpy.linspace(0, total - 1, count)."""
    step = (total - 1) / (count - 1) if count > 1 else 0.0
    for i in range(count - 1):
        yield i * step
    if count:
        yield float(total - 1) if count > 1 else 0.0
