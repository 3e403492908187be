"""Video bytes -> the RGB frames that vLLM's default decoder gives: OpenCV's own FFmpeg, with its own arithmetic.

Rules: the header is checked first, by video_headers and then by what OpenCV reports. Frames are decoded in order and up
to the last that is taken, as vLLM does, one after the other: no more than one is held here. FFmpeg gets one thread: the
sandbox allows no other, and the bits do not depend on it. OpenCV is optional (the extra `video`).

Source: vLLM 0.32 `vllm/multimodal/video_decoders/opencv.py`. Decision 0073.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sidecar.images.protocol import ImageLimits
from sidecar.images.worker.decode import ImageRejected, Pixels, check_size
from sidecar.kernels.video_sampling import VideoSource

cv2: Any = None  # its types know no files in memory
with contextlib.suppress(ImportError):
    cv2 = importlib.import_module("cv2")

MISSING: Final = "videos are not decoded here; install the sidecar with its extra: inference-sidecar[video]"
# Pixels of all frames up to the last that is taken: 2,700 frames of 720p. One core decodes 300 to 500 million a second.
MAX_DECODED_PIXELS: Final = 2_500_000_000


@dataclass(frozen=True, slots=True)
class OpenVideo:
    """A video whose frames can be read."""

    capture: Any
    source: VideoSource
    height: int
    width: int


def open_video(data: bytes, limits: ImageLimits) -> OpenVideo:
    """Open a video. Raises ImageRejected for one that is damaged or over a limit."""
    if cv2 is None:
        raise ImageRejected("video_unsupported", MISSING)
    try:
        capture = cv2.VideoCapture(io.BytesIO(data), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    except cv2.error:
        raise _broken() from None
    if not capture.isOpened():
        raise _broken()
    height, width = int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT)), int(capture.get(cv2.CAP_PROP_FRAME_WIDTH))
    check_size(height, width, limits)
    source = VideoSource(_count(capture), capture.get(cv2.CAP_PROP_FPS))
    if source.frames <= 0 or height <= 0 or width <= 0:
        raise _broken()
    return OpenVideo(capture, source, height, width)


def check_length(indices: Sequence[int], height: int, width: int) -> None:
    """Raise ImageRejected if the frames up to the last of `indices` would take far too long."""
    if (most := (max(indices) + 1) * height * width) > MAX_DECODED_PIXELS:
        text = f"its frames up to the last that is taken have {most} pixels and the limit is {MAX_DECODED_PIXELS}"
        raise ImageRejected("video_too_long", f"{text}; send a shorter or smaller video")


def frames(video: OpenVideo, indices: Sequence[int]) -> Iterator[Pixels]:
    """The frames at `indices`, which ascend, as OpenCV has them: BGR. Raises ImageRejected if one cannot be decoded."""
    wanted = set(indices)
    for at in range(max(wanted) + 1):
        grabbed = video.capture.grab()
        if at not in wanted:
            continue
        good, frame = video.capture.retrieve() if grabbed else (False, None)
        if frame is None or not good or frame.shape != (video.height, video.width, 3):
            raise ImageRejected("video_broken", f"frame {at} of it cannot be decoded")
        yield frame


def put_rgb(to: Pixels, frame: Pixels) -> None:
    """Write a frame as RGB, as vLLM does."""
    cv2.cvtColor(frame, cv2.COLOR_BGR2RGB, to)


def _count(capture: Any) -> int:
    """The frames of a video, without those that a list of edits hides, as vLLM counts them."""
    total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    if total > 0 and capture.set(cv2.CAP_PROP_POS_AVI_RATIO, 1.0):
        visible = int(capture.get(cv2.CAP_PROP_POS_FRAMES))
        at_end = not capture.grab()
        capture.set(cv2.CAP_PROP_POS_FRAMES, 0)
        if at_end and 0 < visible < total - 1:
            return visible
    return total


def _broken() -> ImageRejected:
    return ImageRejected("video_broken", "it is damaged, or in a format or codec that is not decoded here")
