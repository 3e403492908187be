"""Pure: the frames and tokens of a request's videos, as the engine will count them.

Rules: frames are sampled as vLLM does: for Qwen2.5-VL and Qwen3-VL two a second, 4 to 768; for others 32 of a video
evenly; or as the request's `media_io_kwargs` say. Where the model's video processor is known, its geometry gives the
tokens of their size, exactly what vLLM's `usage` counts; else DEFAULT_FRAME_TOKENS a frame. What a header does not
state is taken for the usual: ten seconds of 1280 x 720 at 30 frames a second. Never an exception: a video that the
engine would refuse costs what it would without a known processor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from msgspec import structs

from sidecar.images.video_headers import VideoHeader
from sidecar.kernels import video_sampling
from sidecar.kernels.families.videos import VideoSpec
from sidecar.kernels.video_sampling import VideoSource
from sidecar.load.request_shape import DEFAULT_FRAME_TOKENS, RequestShape
from sidecar.relay.pricing.tokenizer import TIME_TOKENS

USUAL_SIZE: Final = 720, 1280
USUAL_FPS: Final = 30.0
USUAL_FRAMES: Final = 300  # ten seconds
ALL_FRAMES: Final = -1  # vLLM's `num_frames`
MOST_FRAMES: Final = 1 << 12  # of one video
MAX_FPS: Final = 1000.0
LIST_FPS: Final = 1.0  # of a list of JPEGs, vLLM's
_STEP_MARKS: Final = 2  # tokens before and after the patches of a step
_VIDEO_MARKS: Final = 2  # of a video, in the prompt's template


@dataclass(frozen=True, slots=True)
class Sampling:
    """A request's `media_io_kwargs` for videos; 0: not given."""

    count: int = 0
    fps: float = 0.0


@dataclass(frozen=True, slots=True)
class VideoCost:
    """What one video costs: frames that the engine samples, tokens of its encoder, and tokens of text around them."""

    frames: int
    tokens: int
    text: int = 0


def sampling_of(options: Mapping[str, Any]) -> Sampling:
    """Read a request's options; one of another type counts as not given."""
    kwargs = options.get("media_io_kwargs")
    video = kwargs.get("video") if isinstance(kwargs, dict) else None
    return Sampling(_count(video.get("num_frames")), _rate(video.get("fps"))) if isinstance(video, dict) else Sampling()


def _count(value: Any) -> int:
    if type(value) is not int:
        return 0
    return MOST_FRAMES if value == ALL_FRAMES else min(max(0, value), MOST_FRAMES)


def _rate(value: Any) -> float:
    return float(value) if type(value) in (int, float) and 0 < value <= MAX_FPS else 0.0


def with_videos(
    shape: RequestShape,
    videos: Sequence[tuple[bool, VideoHeader]],
    sampling: Sampling,
    spec: VideoSpec | None = None,
    time_tokens: int = TIME_TOKENS,
) -> RequestShape:
    """A shape whose videos cost what their headers say: each with whether it is a list of JPEGs."""
    known = [cost_of(header, sampling, spec, time_tokens, is_list=is_list) for is_list, header in videos]
    other, left = cost_of(VideoHeader(), sampling, spec, time_tokens), max(0, shape.videos - len(known))
    return structs.replace(
        shape,
        video_frames=sum(cost.frames for cost in known) + left * other.frames,
        video_tokens=sum(cost.tokens for cost in known) + left * other.tokens,
        video_text=sum(cost.text for cost in known) + left * other.text,
    )


def cost_of(
    header: VideoHeader,
    sampling: Sampling,
    spec: VideoSpec | None,
    time_tokens: int = TIME_TOKENS,
    *,
    is_list: bool = False,
) -> VideoCost:
    """What a video costs, by its header."""
    source = VideoSource(header.frames or USUAL_FRAMES, header.fps or (LIST_FPS if is_list else USUAL_FPS))
    height, width = (header.height, header.width) if header.height else USUAL_SIZE
    count = sampling.count or video_sampling.DEFAULT_COUNT
    taken: Sequence[int]
    if is_list:  # as they come, and no more than the loader takes of any video
        taken, source = range(min(source.frames, count)), VideoSource(source.frames, sampling.fps or LIST_FPS)
    else:
        taken = range(video_sampling.number_by_count(source, count, sampling.fps))
    if spec is None:
        return VideoCost(len(taken), DEFAULT_FRAME_TOKENS * len(taken))
    try:
        taken = taken if is_list else spec.sampled_by_vllm(source, sampling.fps)
        geometry = spec.video(len(taken), height, width)
    except ValueError:
        return VideoCost(len(taken), DEFAULT_FRAME_TOKENS * len(taken))
    frames = len(taken)
    if not spec.whole:
        return VideoCost(frames, geometry.tokens, _VIDEO_MARKS)
    times = spec.timestamps(taken, source.fps)
    digits = sum(len(f"{time:.1f}") - 1 for time in times)
    return VideoCost(frames, geometry.tokens, _VIDEO_MARKS + digits + (time_tokens + _STEP_MARKS) * len(times))
