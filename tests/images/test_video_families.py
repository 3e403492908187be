"""Qwen2.5-VL's and Qwen3-VL's videos: sizes, samples, times and tensors against Hugging Face's own processors."""

from __future__ import annotations

import dataclasses
import json
import logging
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata

from sidecar.images.worker import videos
from sidecar.kernels import families, fused, video_sampling
from sidecar.kernels.families.videos import VideoSpec, from_config
from sidecar.kernels.video_sampling import VideoSource

from . import published

QWEN3 = {
    "video_processor_type": "Qwen3VLVideoProcessor",
    "processor_class": "Qwen3VLProcessor",
    "size": {"shortest_edge": 4096, "longest_edge": 25_165_824},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}
QWEN2 = {
    "video_processor_type": "Qwen2VLVideoProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
    "size": {"shortest_edge": 3136, "longest_edge": 12_845_056},
    **published.QWEN_PATCHES,
}
SMALL = {"shortest_edge": 4096, "longest_edge": 131_072}
CLASSES = {"Qwen2VLVideoProcessor": Qwen2VLVideoProcessor, "Qwen3VLVideoProcessor": Qwen3VLVideoProcessor}
ROWS: dict[str, dict[str, Any]] = {
    "qwen2.5-vl": QWEN2,
    "qwen2.5-vl, small": QWEN2 | {"size": {"shortest_edge": 3136, "longest_edge": 28 * 28 * 16}},
    "qwen2.5-vl, capped": QWEN2 | {"cap_pixels_per_frame": True, "max_video_tokens": 2000},
    "qwen3-vl": QWEN3,
    "qwen3-vl, small": QWEN3 | {"size": SMALL},
    "qwen3-vl, capped": QWEN3 | {"cap_pixels_per_frame": True},
    "qwen3-vl, three frames a step": QWEN3 | {"size": SMALL, "temporal_patch_size": 3},
}
EACH = pytest.mark.parametrize("name", ROWS)


@cache
def theirs(name: str) -> Any:
    config = ROWS[name]
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return CLASSES[config["video_processor_type"]](**config)


def ours(name: str) -> VideoSpec:
    found = from_config(ROWS[name])
    assert isinstance(found, VideoSpec), found
    return found


def frames(count: int, height: int, width: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Noise with flat parts, each frame different."""
    made = np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    made[:, : height // 3, : width // 2] = 255
    made[1::2, height // 2 :, width // 3 :] //= 255
    return made


def processed(name: str, video: np.ndarray[Any, Any], **options: Any) -> Any:
    return theirs(name)(videos=[video], do_sample_frames=False, return_tensors="pt", **options)


@EACH
@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 9), height=st.integers(8, 300), width=st.integers(8, 300), seed=st.integers(0, 99))
def test_a_video_gives_the_processors_tensors(name: str, count: int, height: int, width: int, seed: int) -> None:
    """Every value and the grid, for even and odd numbers of frames: the last one is repeated."""
    video, spec = frames(count, height, width, seed), ours(name)
    try:
        geometry = spec.video(count, height, width)
    except ValueError:
        with pytest.raises((ValueError, RuntimeError)):
            processed(name, video)
        return
    expected = processed(name, video)
    assert expected["video_grid_thw"].tolist() == [[geometry.grid_t, geometry.grid_h, geometry.grid_w]]
    assert expected["pixel_values_videos"].shape == tuple(spec.pixels([geometry]))
    made = videos.lay_out(list(video), geometry, spec)
    assert np.array_equal(made, expected["pixel_values_videos"].numpy())
    assert geometry.tokens == expected["video_grid_thw"].prod().item() // spec.merge_size**2


@pytest.mark.parametrize("level", [fused.FASTEST, fused.PLAIN], ids=["fastest", "plain"])
@pytest.mark.parametrize("kind", fused.KINDS)
@pytest.mark.parametrize("patch", [1, 7, 8, 14, 16, 17])
def test_each_form_of_the_kernel_lays_two_frames_out_alike(level: int, kind: fused.Kind, patch: int) -> None:
    """Patches of two frames are those of each frame alone, interleaved, for every size of patch and type of value."""
    spec = dataclasses.replace(ours("qwen3-vl"), patch_size=patch, temporal_patch_size=2)
    video = frames(2, 97, 131)
    geometry = spec.video(2, 97, 131)
    geometry = dataclasses.replace(geometry, height=4 * patch, width=6 * patch, grid_h=4, grid_w=6)
    made = fused.video(video, geometry, spec, kind, level)
    single = dataclasses.replace(spec, temporal_patch_size=1)
    alone = [fused.patches(frame, geometry, single, kind, fused.PLAIN).reshape(24, 3, patch**2) for frame in video]
    assert np.array_equal(made.reshape(24, 3, 2, patch**2), np.stack(alone, 2))
    repeated = fused.video(video[:1], geometry, spec, kind, level)
    assert np.array_equal(repeated.reshape(24, 3, 2, patch**2), np.stack([alone[0]] * 2, 2))


@EACH
@settings(max_examples=200, deadline=None)
@given(count=st.integers(1, 900), height=st.integers(1, 5000), width=st.integers(1, 5000))
def test_sizes_of_any_video_are_the_processors(name: str, count: int, height: int, width: int) -> None:
    """Also those that are too large to be made here: the grid of any number of frames of any size."""
    spec, processor = ours(name), theirs(name)

    def grid() -> int:
        if spec.whole:
            return int(processor.get_num_of_video_patches(count, height, width))
        meta = torch.empty((1, count, 3, height, width), dtype=torch.uint8, device="meta")
        made = processor.resize(
            meta,
            size=processor.size,
            resample=3,
            factor=spec.patch_size * spec.merge_size,
            temporal_factor=spec.temporal_patch_size,
            cap_pixels_per_frame=processor.cap_pixels_per_frame,
        )
        return -(-count // spec.temporal_patch_size) * made.shape[-2] * made.shape[-1] // spec.patch_size**2

    try:
        geometry = spec.video(count, height, width)
    except ValueError:
        with pytest.raises((ValueError, RuntimeError, ZeroDivisionError)):
            grid()
        return
    assert geometry.grid_t * geometry.grid_h * geometry.grid_w == grid()


SOURCES = {"total": st.integers(1, 30_000), "fps": st.floats(1, 120)}


@settings(max_examples=500)
@given(**SOURCES, rate=st.floats(0.1, 60))
def test_frames_by_rate_are_qwen3s(total: int, fps: float, rate: float) -> None:
    """Qwen3-VL's processor, by any rate."""
    processor = theirs("qwen3-vl")
    metadata = VideoMetadata(total_num_frames=total, fps=fps)
    expected = processor.sample_frames(metadata, fps=rate).tolist()
    assert video_sampling.by_fps(VideoSource(total, fps), rate) == expected


@settings(max_examples=300)
@given(total=st.integers(1, 30_000), count=st.integers(1, 768))
def test_frames_by_count_are_qwen3s(total: int, count: int) -> None:
    """Qwen3-VL's processor, by any count."""
    expected = np.linspace(0, total - 1, count).round().astype(int).tolist()
    metadata = VideoMetadata(total_num_frames=total, fps=24)
    processor = theirs("qwen3-vl")
    processor.fps = None  # a rate and a count exclude each other
    try:
        assert processor.sample_frames(metadata, num_frames=count).tolist() == expected
    finally:
        processor.fps = 2
    assert video_sampling.rounded(total, count) == expected


@settings(max_examples=500)
@given(**SOURCES, rate=st.sampled_from([0.5, 1, 2, 4, 8]), count=st.integers(2, 768), by_rate=st.booleans())
def test_frames_of_qwen2_5(total: int, fps: float, rate: float, count: int, by_rate: bool) -> None:
    """Qwen2.5-VL's processor, by rate and by count, with the same refusals."""
    processor, source = theirs("qwen2.5-vl"), VideoSource(total, fps)
    asked: dict[str, Any] = {"fps": rate} if by_rate else {"num_frames": count}
    try:
        expected = processor.sample_frames(VideoMetadata(total_num_frames=total, fps=fps), **asked).tolist()
    except (ValueError, ZeroDivisionError, RuntimeError):
        with pytest.raises(ValueError, match="frames"):
            video_sampling.by_step(source, 2, 0 if by_rate else count, rate if by_rate else 0.0)
        return
    assert video_sampling.by_step(source, 2, 0 if by_rate else count, rate if by_rate else 0.0) == expected


@settings(max_examples=300)
@given(**SOURCES, rate=st.sampled_from([0.0, 0.5, 1.0, 2.0, 12.0, 60.0]))
def test_frames_of_vllms_loaders_for_both(total: int, fps: float, rate: float) -> None:
    """vLLM's loaders for Qwen2.5-VL and Qwen3-VL: the processors' own frames at two a second or at a rate up to 30."""
    source, used = VideoSource(total, fps), min(rate or 2.0, 30.0)
    metadata = VideoMetadata(total_num_frames=total, fps=fps)
    if total > 1:
        expected = theirs("qwen2.5-vl").sample_frames(metadata, fps=used).clamp(max=total - 1).tolist()
        assert ours("qwen2.5-vl").sampled_by_vllm(source, rate) == expected
    expected = theirs("qwen3-vl").sample_frames(metadata, fps=used).tolist()
    if len(expected) == total:  # the processor then samples once more
        expected = theirs("qwen3-vl").sample_frames(metadata, fps=2).tolist()
    assert ours("qwen3-vl").sampled_by_vllm(source, rate) == expected


@settings(max_examples=500)
@given(**SOURCES, count=st.integers(1, 800), rate=st.one_of(st.just(0.0), st.floats(0.1, 60)))
def test_frames_of_vllms_loader(total: int, fps: float, count: int, rate: float) -> None:
    """vLLM's usual loader: evenly by numpy, the fewer of count and rate."""
    wanted = min(count, total)
    if rate > 0:
        wanted = min(wanted, int(np.floor(total / fps * rate)))
    wanted = max(1, wanted)
    expected = list(range(wanted)) if wanted == total else np.linspace(0, total - 1, wanted, dtype=int).tolist()
    assert video_sampling.by_count(VideoSource(total, fps), count, rate) == expected


@settings(max_examples=200)
@given(indices=st.lists(st.integers(0, 9000), min_size=1, max_size=60).map(sorted), fps=st.floats(1, 120))
def test_times_are_qwen3s(indices: list[int], fps: float) -> None:
    """The seconds before each step, for odd numbers of frames, too."""
    expected = Qwen3VLProcessor._calculate_timestamps(None, list(indices), fps, 2)  # type: ignore[arg-type]
    assert ours("qwen3-vl").timestamps(indices, fps) == expected


def test_seconds_per_step_are_qwen2_5s() -> None:
    """What a step of Qwen2.5-VL stands for follows from the sampled rate."""
    metadata = VideoMetadata(total_num_frames=300, fps=30.0, frames_indices=list(range(0, 300, 10)))
    expected = 2 / metadata.sampled_fps
    assert ours("qwen2.5-vl").second_per_grid(range(0, 300, 10), VideoSource(300, 30.0)) == expected


FILES: dict[str, tuple[dict[str, Any], str]] = {
    "Qwen3-VL's own file": (
        {"video_preprocessor_config.json": QWEN3, "preprocessor_config.json": {"image_processor_type": "x"}},
        "Qwen3VLVideoProcessor",
    ),
    "nested in processor_config.json": (
        {"processor_config.json": {"processor_class": "Qwen3VLProcessor", "video_processor": QWEN3}},
        "Qwen3VLVideoProcessor",
    ),
    "Qwen2.5-VL has only the image's": (
        {"preprocessor_config.json": published.PUBLISHED["Qwen2.5-VL"][0]},
        "Qwen2VLVideoProcessor",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_it_is_read_from_a_models_files(tmp_path: Path, name: str) -> None:
    """Wherever published models keep it, in the order of transformers."""
    files, processor = FILES[name]
    for file, content in files.items():
        (tmp_path / file).write_text(json.dumps(content))
    found = families.video_from_dir(str(tmp_path))
    assert found is not None
    expected = CLASSES[processor].from_pretrained(tmp_path)
    assert (found.min_pixels, found.max_pixels) == (expected.size["shortest_edge"], expected.size["longest_edge"])
    assert families.from_json(found.to_json()) == found


UNKNOWN: dict[str, dict[str, Any]] = {
    "custom code": QWEN3 | {"auto_map": {"AutoVideoProcessor": "x.Y"}},
    "a setting of another class": QWEN3 | {"tile_size": 3},
    "another caller": QWEN3 | {"processor_class": "MyProcessor"},
    "no size": {key: value for key, value in QWEN3.items() if key != "size"},
    "another name": QWEN3 | {"video_processor_type": "InternVLVideoProcessor"},
    "it does not resize": QWEN3 | {"do_resize": False},
    "a cap of another kind": QWEN3 | {"cap_pixels_per_frame": 7},
    "no name": {},
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_is_not_guessed(name: str) -> None:
    """Anything that may make another processor of it: one line that says why."""
    found = from_config(UNKNOWN[name])
    assert isinstance(found, str)
    assert found
    assert "\n" not in found
