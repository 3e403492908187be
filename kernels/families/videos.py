"""Processors of videos that are known word for word: Qwen2.5-VL's and Qwen3-VL's.

A video is resized frame by frame, and each patch holds `temporal_patch_size` frames of it. Qwen2.5-VL bounds the pixels
of a frame, Qwen3-VL those of the whole video. The number of tokens is that of patches / merge_size squared; the text
that names a time before each step of Qwen3-VL is not among them.

Sources: transformers 5.23 `video_processing_qwen2_vl.py`, `video_processing_qwen3_vl.py`; both are the same in 5.19.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sidecar.kernels import video_sampling
from sidecar.kernels.families import identity, reading
from sidecar.kernels.families.identity import SETTINGS, Files, words
from sidecar.kernels.families.reading import CLIP_MEAN_STD, HALF_MEAN_STD, Config
from sidecar.kernels.families.single_view import pixel_bounds, qwen_size
from sidecar.kernels.grid import BICUBIC, Geometry, Integers, PatchSpec, i64
from sidecar.kernels.video_sampling import VideoSource

MAX_FRAMES: Final = 768  # the most that a published model samples of one video


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoSpec(PatchSpec):
    """One video processor. `whole`: the bounds hold for all frames together, and times are written before each step."""

    min_pixels: int
    max_pixels: int
    whole: bool
    cap_tokens: int = 0  # `max_video_tokens` where `cap_pixels_per_frame` is set; 0: no cap
    samples: bool = False  # the processor samples by itself, where its caller has not
    fps: float = 0.0
    num_frames: int = 0
    min_frames: int = 4
    max_frames: int = MAX_FRAMES

    def geometry(self, height: int, width: int) -> Geometry:
        """The target of a video of one step."""
        return self.video(self.temporal_patch_size, height, width)

    def video(self, frames: int, height: int, width: int) -> Geometry:
        """The target of `frames` sampled frames of this size. Raises ValueError if the processor refuses them."""
        height, width = reading.check_positive(height, width)
        factor, temporal = self.patch_size * self.merge_size, self.temporal_patch_size
        if frames < (temporal if self.whole else 1):
            raise ValueError(f"it has {frames} frames")
        high = self._max_pixels(frames)
        if self.whole:
            if height < factor or width < factor:
                scale = max(factor / height, factor / width)
                height, width = int(height * scale), int(width * scale)
            counted = round(frames / temporal) * temporal
            new_height, new_width = qwen_size(height, width, factor, self.min_pixels, high, frames, counted)
        else:
            new_height, new_width = qwen_size(height, width, factor, self.min_pixels, high)
        grid = -(-frames // temporal), new_height // self.patch_size, new_width // self.patch_size
        return Geometry(new_height, new_width, *grid, tokens=grid[0] * grid[1] * grid[2] // self.merge_size**2)

    def _max_pixels(self, frames: int) -> int:
        if not self.cap_tokens:
            return self.max_pixels
        area, floor = (self.patch_size * self.merge_size) ** 2, int(self.min_pixels * 1.05)
        if self.whole:
            return frames * max(min(self.cap_tokens * area, self.max_pixels // frames), floor)
        total = int(self.cap_tokens * area * 0.9)
        return max(min(self.max_pixels, total * self.temporal_patch_size // frames), floor)

    def integers(self, images: Sequence[Geometry]) -> dict[str, Integers]:
        return {"video_grid_thw": i64([len(images), 3], (n for g in images for n in (g.grid_t, g.grid_h, g.grid_w)))}

    def values(self, images: Sequence[Geometry]) -> dict[str, list[int]]:
        return {"pixel_values_videos": self.pixels(images)}

    def sampled_by_vllm(self, source: VideoSource, fps: float = 0.0) -> list[int]:
        """The frames that vLLM 0.32 gives to the model: its loader samples by rate; `fps` is its option, 0: not given.

        Where it took all frames Qwen3-VL's processor samples once more. Raises ValueError for a file that it refuses.
        """
        rate = min(fps or video_sampling.DEFAULT_FPS, video_sampling.MAX_FPS)
        if not self.whole:
            taken = video_sampling.by_step(source, self.temporal_patch_size, fps=rate)
            return [min(at, source.frames - 1) for at in taken]  # float32 may step past the end
        taken = video_sampling.by_fps(source, rate)
        return self.sampled(source) if len(taken) == source.frames else taken

    def sampled(self, source: VideoSource, count: int = 0, fps: float = 0.0) -> list[int]:
        """The frames that the processor itself samples, by `count` or `fps`; neither: by its settings.

        Raises ValueError if it refuses.
        """
        if not count and not fps:
            count, fps = self.num_frames, self.fps
        least, most = self.min_frames, self.max_frames
        if not self.whole:
            return video_sampling.by_step(source, self.temporal_patch_size, count, fps, least, most)
        if count:
            return video_sampling.rounded(source.frames, count)
        return video_sampling.by_fps(source, fps or video_sampling.DEFAULT_FPS, least, most)

    def timestamps(self, indices: Sequence[int], fps: float) -> list[float]:
        """Seconds of each step of Qwen3-VL: the mean of its first and its last frame's; the last frame is repeated."""
        temporal = self.temporal_patch_size
        padded = [*indices, *[indices[-1]] * (-len(indices) % temporal)]
        seconds = [at / fps for at in padded]
        return [(seconds[i] + seconds[i + temporal - 1]) / 2 for i in range(0, len(seconds), temporal)]

    def second_per_grid(self, indices: Sequence[int], source: VideoSource) -> float:
        """Seconds that a step of Qwen2.5-VL stands for."""
        return self.temporal_patch_size / (len(indices) / source.frames * source.fps)


@dataclass(frozen=True, slots=True)
class VideoFamily:
    """One class of video processors: the reader of its settings, the settings that it has, and its callers."""

    read: Callable[[Config], VideoSpec]
    settings: frozenset[str]
    callers: frozenset[str]


def read_qwen2(config: Config) -> VideoSpec:
    low, high = pixel_bounds(config)
    return _read(config, low, high, CLIP_MEAN_STD, whole=False, usual_cap=128_000, rate=0.0)


def read_qwen3(config: Config) -> VideoSpec:
    if config.get("min_pixels") is not None or config.get("max_pixels") is not None:
        raise ValueError("not read by this processor")
    low, high = pixel_bounds(config)
    return _read(config, low, high, HALF_MEAN_STD, whole=True, usual_cap=768, rate=video_sampling.DEFAULT_FPS)


def _read(config: Config, low: Any, high: Any, mean_std: Any, *, whole: bool, usual_cap: int, rate: float) -> VideoSpec:
    reading.check_steps(config)
    patch, merge, temporal = (
        reading.require_count(config, key, 256) for key in ("patch_size", "merge_size", "temporal_patch_size")
    )
    caps, fps = reading.get_or(config, "cap_pixels_per_frame", False), reading.get_or(config, "fps", rate)
    if type(caps) is not bool or type(fps) not in (int, float) or not 0 <= fps <= 1000:
        raise ValueError("cap_pixels_per_frame or fps is not a value of it")
    return VideoSpec(
        **reading.read_common(config, BICUBIC, mean_std),
        patch_size=patch,
        merge_size=merge,
        temporal_patch_size=temporal,
        min_pixels=reading.check_count(low, 1 << 40),
        max_pixels=reading.check_count(high, 1 << 40),
        whole=whole,
        cap_tokens=reading.check_count(reading.get_or(config, "max_video_tokens", usual_cap)) if caps else 0,
        samples=reading.get_or(config, "do_sample_frames", whole) is True,
        fps=float(fps),
        num_frames=reading.optional_count(config.get("num_frames")),
        min_frames=reading.check_count(reading.get_or(config, "min_frames", 4), 1 << 20),
        max_frames=reading.check_count(reading.get_or(config, "max_frames", MAX_FRAMES), 1 << 20),
    )


_VIDEO_SETTINGS: Final = SETTINGS | words(
    "cap_pixels_per_frame do_sample_frames fps max_frames max_video_tokens merge_size min_frames num_frames patch_size "
    "return_metadata size_divisor temporal_patch_size video_metadata video_processor_type"
)
# By class name in the file.
FAMILIES: Final[Mapping[str, VideoFamily]] = {
    "Qwen2VLVideoProcessor": VideoFamily(  # Qwen2-VL, Qwen2.5-VL
        read_qwen2, _VIDEO_SETTINGS | {"max_pixels", "min_pixels"}, words("Qwen2VLProcessor Qwen2_5_VLProcessor")
    ),
    "Qwen3VLVideoProcessor": VideoFamily(read_qwen3, _VIDEO_SETTINGS, words("Qwen3VLProcessor")),  # also Qwen 3.5
}


def from_config(config: Config, files: Files | None = None) -> VideoSpec | str:
    """The video processor that a file describes, or why it is not known (one line).

    A file of an image processor stands for the video processor of the same name, as in transformers.
    """
    files = files or Files()
    name = config.get("video_processor_type")
    if name is None and isinstance(image := config.get("image_processor_type"), str):
        name = image.removesuffix("Fast").replace("ImageProcessor", "VideoProcessor")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        return "its files name none of the known video processors"
    try:
        why = identity.find_mismatch(str(name), family.settings, family.callers, config, files)
        return why or family.read(config)
    except ValueError as e:
        return f"{name}: {str(e)[:80]}"
    except (KeyError, TypeError, AttributeError) as e:
        return f"{name} has a setting that is not known ({type(e).__name__}: {str(e)[:80]})"
