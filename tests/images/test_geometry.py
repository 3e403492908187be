"""The geometry of image processors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as tried
from hypothesis import strategies as st

from sidecar.kernels import families
from sidecar.kernels.grid import ProcessorSpec

from .published import settings

QWEN2 = settings("Qwen2VLImageProcessor", max_pixels=12_845_056)
QWEN3 = {
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "size": {"longest_edge": 16_777_216, "shortest_edge": 65_536},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
SMALL = settings("Qwen2VLImageProcessor", max_pixels=1_003_520)

sides = st.integers(1, 9000)


def spec_of(config: dict[str, object]) -> ProcessorSpec:
    spec = families.from_config(config)
    assert spec is not None
    return spec


@pytest.mark.parametrize("config", [QWEN2, QWEN3, SMALL], ids=["qwen2", "qwen3", "small"])
@tried(max_examples=500)
@given(height=sides, width=sides)
def test_geometry_is_the_processors(config: dict[str, object], height: int, width: int) -> None:
    """Size, grid and refusal equal Hugging Face's smart_resize for any size."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    spec = spec_of(config)
    factor = spec.patch_size * spec.merge_size
    try:
        wanted = smart_resize(height, width, factor, spec.min_pixels, spec.max_pixels)
    except ValueError:
        with pytest.raises(ValueError, match="200 times"):
            spec.geometry(height, width)
        return
    got = spec.geometry(height, width)
    assert (got.height, got.width) == wanted
    assert (got.grid_t, got.grid_h * spec.patch_size, got.grid_w * spec.patch_size) == (1, *wanted)
    assert got.tokens * factor * factor == wanted[0] * wanted[1]


@pytest.mark.parametrize("config", [QWEN2, QWEN3, SMALL], ids=["qwen2", "qwen3", "small"])
@tried(max_examples=500)
@given(height=sides, width=sides)
def test_a_resized_image_keeps_its_size(config: dict[str, object], height: int, width: int) -> None:
    """The processor leaves a resized image alone, except very long ones, which `keeps` detects."""
    spec = spec_of(config)
    try:
        got = spec.geometry(height, width)
    except ValueError:
        return
    if max(height, width) / min(height, width) < 50 and min(height, width) >= 28:
        assert spec.keeps(got)
    if spec.keeps(got):
        assert spec.geometry(got.height, got.width) == got


def test_a_long_image_that_would_be_refused_resized_is_not_kept() -> None:
    """A strip that the processor accepts, but would refuse in its resized size, is detected."""
    spec = spec_of(SMALL)
    assert not spec.keeps(spec.geometry(19_000, 100))


@pytest.mark.parametrize(
    "change",
    [
        {"image_processor_type": "MiniCPMOcrImageProcessor"},
        {"image_processor_type": None},
        {"do_resize": False},
        {"do_convert_rgb": False},
        {"do_center_crop": True},
        {"do_pad": True},
        {"resample": 0},
        {"patch_size": 0},
        {"patch_size": "14"},
        {"image_mean": [0.5]},
        {"image_std": [0.5, 0, 0.5]},
        {"size": {"height": 224, "width": 224}, "min_pixels": None, "max_pixels": None},
        {"max_pixels": None, "size": {"shortest_edge": 3136}},
        {"rescale_factor": 0},
    ],
    ids=str,
)
def test_what_is_not_known_is_none(change: dict[str, object]) -> None:
    """A processor, or a step of it, that is not known gives None: the image passes."""
    assert families.from_config({**QWEN2, **change}) is None


def test_the_spec_is_the_processors_own_numbers(tmp_path: Path) -> None:
    """What Hugging Face's processor saves is read back with its own numbers, in every spelling."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    for config in (QWEN2, QWEN3, SMALL):
        kind = {k: v for k, v in config.items() if k != "image_processor_type"}
        processor = Qwen2VLImageProcessor(**kind)
        folder = tmp_path / spec_of(config).fingerprint
        processor.save_pretrained(folder)
        assert families.from_dir(str(folder)) == spec_of(config)
        assert (processor.size.shortest_edge, processor.size.longest_edge) == (
            spec_of(config).min_pixels,
            spec_of(config).max_pixels,
        )


def test_two_files_that_disagree_are_none(tmp_path: Path) -> None:
    """If a directory has both files and they differ, it is unknown which one the engine reads."""
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(QWEN2))
    assert families.from_dir(str(tmp_path)) == spec_of(QWEN2)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": QWEN2}))
    assert families.from_dir(str(tmp_path)) == spec_of(QWEN2)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": SMALL}))
    assert families.from_dir(str(tmp_path)) is None


def test_a_directory_without_a_readable_file_is_none(tmp_path: Path) -> None:
    """No file, no JSON, or no object: None."""
    assert families.from_dir(str(tmp_path)) is None
    for text in ("", "[]", "{", "7"):
        (tmp_path / "preprocessor_config.json").write_text(text)
        assert families.from_dir(str(tmp_path)) is None


def test_the_spec_survives_json_and_its_fingerprint_changes_with_it() -> None:
    """to_json and from_json are inverse; another number gives another fingerprint."""
    spec = spec_of(QWEN3)
    assert families.from_json(spec.to_json()) == spec
    assert len({spec_of(c).fingerprint for c in (QWEN2, QWEN3, SMALL, {**SMALL, "image_mean": [0.5] * 3})}) == 4
