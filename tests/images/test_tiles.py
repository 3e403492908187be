"""Families with several views or their own patch grid: whole batches against Hugging Face's processor."""

from __future__ import annotations

import dataclasses
import importlib
import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.images import tensor_layout
from sidecar.images.worker import pipeline, tiles
from sidecar.images.worker.tensors import KERNEL_KINDS
from sidecar.kernels import families, fused
from sidecar.kernels.grid import ImageView, TileSpec

from . import by_torch
from .published import SIZES
from .published import settings as file
from .test_families import Family, picture

# small tiles, so that many sizes can be tried in little time; benchmarks/families.py asserts the models' own
ROWS = {
    "internvl": Family(
        "GotOcr2ImageProcessor",
        "got_ocr2.image_processing_got_ocr2",
        {"size": {"height": 56, "width": 42}, "crop_to_patches": True},
        {"image_seq_length": 16},
    ),
    "internvl-few": Family(
        "GotOcr2ImageProcessor",
        "got_ocr2.image_processing_got_ocr2",
        {"size": {"height": 100, "width": 100}, "crop_to_patches": True, "min_patches": 2, "max_patches": 6},
    ),
    "ovis-2": Family(
        "Ovis2ImageProcessor",
        "ovis2.image_processing_ovis2",
        {"size": {"height": 56, "width": 56}, "max_patches": 9},
        {"image_seq_length": 16},
    ),
    "ovis-2-oblong": Family(
        "Ovis2ImageProcessor", "ovis2.image_processing_ovis2", {"size": {"height": 56, "width": 42}, "max_patches": 4}
    ),
    "ovis-2-closest": Family(
        "Ovis2ImageProcessor",
        "ovis2.image_processing_ovis2",
        {"size": {"height": 48, "width": 48}, "min_patches": 2, "max_patches": 6, "use_covering_area_grid": False},
    ),
    "ovis-2-whole": Family(
        "Ovis2ImageProcessor",
        "ovis2.image_processing_ovis2",
        {"size": {"height": 48, "width": 48}, "crop_to_patches": False},
    ),
    "gemma-3-scan": Family(
        "Gemma3ImageProcessor",
        "gemma3.image_processing_gemma3",
        {
            "size": {"height": 64, "width": 64},
            "do_pan_and_scan": True,
            "pan_and_scan_min_crop_size": 40,
            "pan_and_scan_max_num_crops": 4,
            "pan_and_scan_min_ratio_to_activate": 1.2,
        },
        {"image_seq_length": 16},
    ),
    "gemma-3-scan-any": Family(
        "Gemma3ImageProcessor",
        "gemma3.image_processing_gemma3",
        {
            "size": {"height": 32, "width": 48},
            "do_pan_and_scan": True,
            "pan_and_scan_min_crop_size": 3,
            "pan_and_scan_max_num_crops": 7,
            "pan_and_scan_min_ratio_to_activate": 1,
        },
    ),
    "lfm2-vl": Family(
        "Lfm2VlImageProcessor",
        "lfm2_vl.image_processing_lfm2_vl",
        {"encoder_patch_size": 8, "tile_size": 64, "min_image_tokens": 4, "max_image_tokens": 16},
    ),
    "lfm2-vl-tiles-alone": Family(
        "Lfm2VlImageProcessor",
        "lfm2_vl.image_processing_lfm2_vl",
        {
            "encoder_patch_size": 4,
            "downsample_factor": 3,
            "tile_size": 40,
            "min_image_tokens": 2,
            "max_image_tokens": 30,
            "min_tiles": 1,
            "max_tiles": 6,
            "use_thumbnail": False,
            "max_pixels_tolerance": 1.3,
        },
    ),
    "lfm2-vl-whole": Family(
        "Lfm2VlImageProcessor",
        "lfm2_vl.image_processing_lfm2_vl",
        {"encoder_patch_size": 8, "do_image_splitting": False, "max_image_tokens": 40, "min_image_tokens": 4},
    ),
    "step-3.7": Family(
        "Step3p7ImageProcessor",
        "step3p7.image_processing_step3p7",
        {"size": {"height": 112, "width": 112}, "patch_size": 56, "max_image_size": 300},
    ),
    "step-3.7-odd": Family(
        "Step3p7ImageProcessor",
        "step3p7.image_processing_step3p7",
        {"size": {"height": 70, "width": 70}, "patch_size": 47, "max_image_size": 5000},
    ),
    "cohere2-vision": Family(
        "Cohere2VisionImageProcessor",
        "cohere2_vision.image_processing_cohere2_vision",
        {"size": {"height": 48, "width": 48}, "crop_to_patches": True, "max_patches": 12, "patch_size": 4},
        {"patch_size": 4},
    ),
    "cohere2-vision-oblong": Family(
        "Cohere2VisionImageProcessor",
        "cohere2_vision.image_processing_cohere2_vision",
        {"size": {"height": 56, "width": 42}, "crop_to_patches": True, "max_patches": 6, "patch_size": 4},
    ),
    "cohere2-vision-whole": Family(
        "Cohere2VisionImageProcessor",
        "cohere2_vision.image_processing_cohere2_vision",
        {"size": {"height": 48, "width": 48}, "crop_to_patches": False},
    ),
    "got-ocr": Family(
        "GotOcr2ImageProcessor", "got_ocr2.image_processing_got_ocr2", {"size": {"height": 64, "width": 64}}
    ),
    "llava-next": Family(
        "LlavaNextImageProcessor",
        "llava_next.image_processing_llava_next",
        {
            "size": {"shortest_edge": 48},
            "crop_size": {"height": 48, "width": 48},
            "image_grid_pinpoints": [[48, 96], [96, 48], [96, 96], [144, 48], [48, 144]],
        },
        {"patch_size": 12, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    ),
    "granite-4-vision": Family(
        "LlavaNextImageProcessor",
        "llava_next.image_processing_llava_next",
        {
            "size": {"height": 48, "width": 48},
            "crop_size": {"height": 48, "width": 48},
            "image_grid_pinpoints": [[48, 48 * x] for x in range(1, 5)] + [[48 * y, 48] for y in range(2, 5)],
        },
        {
            "patch_size": 8,
            "vision_feature_select_strategy": "full",
            "num_additional_image_tokens": 0,
            "downsample_rate": "4/8",
        },
    ),
    "llava-onevision": Family(
        "LlavaOnevisionImageProcessor",
        "llava_onevision.image_processing_llava_onevision",
        {
            "size": {"height": 32, "width": 32},
            "image_grid_pinpoints": [[32 * y, 32 * x] for y in range(1, 7) for x in range(1, 7)],
        },
        {"num_image_tokens": 16, "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9"},
    ),
    "llama-4": Family(
        "Llama4ImageProcessor",
        "llama4.image_processing_llama4",
        {"size": {"height": 48, "width": 48}},
        {"patch_size": 12, "pixel_shuffle_ratio": 0.5},
    ),
    "llama-4-real": Family("Llama4ImageProcessor", "llama4.image_processing_llama4", {"max_patches": 4}),
    "llama-4-largest": Family(
        "Llama4ImageProcessor",
        "llama4.image_processing_llama4",
        {"size": {"height": 32, "width": 32}, "max_patches": 6, "resize_to_max_canvas": True},
    ),
    "gemma-4": Family("Gemma4ImageProcessor", "gemma4.image_processing_gemma4", {"max_soft_tokens": 70}),
    "gemma-4-normalised": Family(
        "Gemma4ImageProcessor",
        "gemma4.image_processing_gemma4",
        {
            "max_soft_tokens": 70,
            "patch_size": 8,
            "do_normalize": True,
            "image_mean": [0.1, 0.2, 0.3],
            "image_std": [0.5, 0.6, 0.7],
        },
    ),
    "gemma-4-unified": Family(
        "Gemma4UnifiedImageProcessor",
        "gemma4_unified.image_processing_gemma4_unified",
        {"max_soft_tokens": 140, "patch_size": 4},
    ),
    "kimi-k2.5": Family(
        "Kimi_K25ImageProcessor",
        "kimi_k25.image_processing_kimi_k25",
        {"max_patches": 256, "size": {"max_height": 40, "max_width": 40}},
    ),
    "minicpm-v": Family(
        "MiniCPMV4_6ImageProcessor",
        "minicpmv4_6.image_processing_minicpmv4_6",
        {"scale_resolution": 112, "patch_size": 7},
    ),
    "minicpm-v-4x": Family(
        "MiniCPMV4_6ImageProcessor",
        "minicpmv4_6.image_processing_minicpmv4_6",
        {"scale_resolution": 112, "patch_size": 7, "downsample_mode": "4x", "max_slice_nums": 4},
    ),
    "idefics-3-small": Family(
        "Idefics3ImageProcessor",
        "idefics3.image_processing_idefics3",
        {"size": {"longest_edge": 200}, "max_image_size": {"longest_edge": 56}},
    ),
    "idefics-3-whole": Family(
        "Idefics3ImageProcessor", "idefics3.image_processing_idefics3", {"do_image_splitting": False}
    ),
    "smolvlm-small": Family(
        "SmolVLMImageProcessor",
        "smolvlm.image_processing_smolvlm",
        {"size": {"longest_edge": 128}, "max_image_size": {"longest_edge": 32}},
    ),
    "minicpm-v-whole": Family(
        "MiniCPMV4_6ImageProcessor",
        "minicpmv4_6.image_processing_minicpmv4_6",
        {"scale_resolution": 112, "slice_mode": False},
    ),
}
rows = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
# what a processor returns as plain lists, for its own writing of the prompt
FOR_PROMPTS = {"patch_newline_masks"}
KINDS = {"I64": torch.int64, "I32": torch.int32, "F32": torch.float32, "BF16": torch.bfloat16, "U8": torch.uint8}


def ours(row: Family, *images: torch.Tensor) -> dict[str, torch.Tensor]:
    """A batch as /v1/preprocess answers it."""
    spec = row.spec()
    assert isinstance(spec, TileSpec)
    geometries = [spec.geometry(*image.shape[-2:]) for image in images]
    made = [tiles.prepare(by_torch.rows(image), g, spec) for image, g in zip(images, geometries, strict=True)]
    groups = tensor_layout.pieces([pipeline.octets(tensor) for tensor in made], geometries, spec)
    joined = bytearray(b"".join(part for group in groups for part in group))
    data: dict[str, bytearray] = {}
    for name, shape in spec.values(geometries).items():
        size = tensor_layout.ELEMENT_BYTES[spec.dtype] * math.prod(shape)
        data[name], joined = joined[:size], joined[size:]
    assert not joined
    for name, tensor in spec.integers(geometries).items():
        data[name] = bytearray(b"".join(part for group in tensor_layout.integers([tensor]) for part in group))
    shapes = spec.shapes(geometries)
    return {
        name: torch.frombuffer(data[name], dtype=KINDS[dtype]).reshape(shape) for name, (dtype, shape) in shapes.items()
    }


def theirs(row: Family, *images: torch.Tensor, processor: Any = None) -> dict[str, Any]:
    """The processor's; lists of numbers as tensors. Raises what it raises."""
    out = (processor or row.processor())(images=list(images), return_tensors="pt")
    if "spatial_shapes" in out and out["pixel_attention_mask"].shape != out["pixel_values"].shape[:2]:
        raise ValueError("a strip has more patches than its own mask, and no model takes that")
    return {
        name: value if isinstance(value, torch.Tensor) else torch.from_numpy(np.array(value))
        for name, value in out.items()
        if name not in FOR_PROMPTS
    }


def test_a_mask_of_ones_is_never_built() -> None:
    """SmolVLM's mask for sixteen photographs is 570 MB; the relay sends one megabyte repeatedly instead."""
    spec = families.from_config(
        file("SmolVLMImageProcessor", size={"longest_edge": 2048}, max_image_size={"longest_edge": 512})
    )
    assert spec is not None
    tracemalloc.start()
    try:
        images = [spec.geometry(1500, 1500)] * 16
        sent = sum(len(part) for group in tensor_layout.integers(spec.integers(images).values()) for part in group)
        dtype, shape = spec.shapes(images)["pixel_attention_mask"]
        assert sent == tensor_layout.ELEMENT_BYTES[dtype] * math.prod(shape) == 16 * 17 * 512 * 512 * 8
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def check(row: Family, *sizes: tuple[int, int]) -> None:
    """Every tensor equal: its name, type, shape and bits. What is refused is refused alike."""
    images = [picture(*size) for size in sizes]
    try:
        wanted = theirs(row, *images)
    except (ValueError, RuntimeError, ZeroDivisionError):
        with pytest.raises((ValueError, RuntimeError, ZeroDivisionError)):
            ours(row, *images)
        return
    got = ours(row, *images)
    assert set(got) == set(wanted)
    for name, value in wanted.items():
        assert (got[name].shape, got[name].dtype) == (value.shape, value.dtype), name
        assert torch.equal(got[name], value), name


@rows
@settings(max_examples=8)
@given(data=st.data())
def test_any_batch_gives_the_processors_bits(row: Family, data: st.DataObject) -> None:
    """One to three images of random sizes: all tensors equal in every bit, padding included."""
    side = st.integers(1, 400)
    count = data.draw(st.integers(1, 3), "images")
    check(row, *(data.draw(st.tuples(side, side), "size") for _ in range(count)))


@rows
@pytest.mark.parametrize("size", [(480, 640), (1, 1), (20, 300), (300, 20), (3, 5), (768, 1365), (2000, 3)], ids=str)
def test_sizes_of_interest_give_the_processors_bits(row: Family, size: tuple[int, int]) -> None:
    """A photograph, a pixel, strips, and less than a tile."""
    check(row, size)


@rows
def test_every_resample_gives_the_processors_bits(row: Family) -> None:
    """Bilinear, bicubic and Lanczos; and bytes, if the processor's settings skip rescaling and normalising."""
    for resample in (1, 2, 3):
        check(dataclasses.replace(row, config=row.config | {"resample": resample}), (150, 211))
    plain = dataclasses.replace(row, config=row.config | {"do_rescale": False, "do_normalize": False})
    wanted, got = theirs(plain, picture(150, 211))["pixel_values"], ours(plain, picture(150, 211))["pixel_values"]
    assert got.dtype == torch.uint8 and torch.equal(got.to(wanted.dtype), wanted)


@rows
@settings(max_examples=100)
@given(height=st.integers(0, 1 << 32), width=st.integers(0, 1 << 32))
def test_whatever_a_header_claims_has_a_geometry_or_is_refused(row: Family, height: int, width: int) -> None:
    """Sizes from hostile headers give a geometry of whole tiles or ValueError, with bounded memory."""
    spec = row.spec()
    try:
        found = spec.geometry(height, width)
    except ValueError:
        return
    assert all(view.canvas[i] == view.grid[i] * view.tile[i] for view in found.views for i in (0, 1))
    assert all(view.canvas[i] >= view.size[i] > 0 for view in found.views for i in (0, 1)) and found.tiles < 20_000


class Tokenizer:
    """What Hugging Face's processors ask a tokenizer for when they count."""

    image_token = "<image>"
    image_token_id = 1

    def __getattr__(self, name: str) -> Any:
        return 2 if name.endswith("_id") else "<other>"

    def convert_tokens_to_ids(self, token: str) -> int:
        return 1


# the class that counts, and its module
COUNTERS = {
    "internvl": ("InternVLProcessor", "internvl.processing_internvl"),
    "llava-next": ("LlavaNextProcessor", "llava_next.processing_llava_next"),
    "granite-4-vision": ("Granite4VisionProcessor", "granite4_vision.processing_granite4_vision"),
    "llava-onevision": ("LlavaOnevisionProcessor", "llava_onevision.processing_llava_onevision"),
    "ovis-2": ("Ovis2Processor", "ovis2.processing_ovis2"),
    "gemma-3-scan": ("Gemma3Processor", "gemma3.processing_gemma3"),
    "lfm2-vl": ("Lfm2VlProcessor", "lfm2_vl.processing_lfm2_vl"),
    "lfm2-vl-tiles-alone": ("Lfm2VlProcessor", "lfm2_vl.processing_lfm2_vl"),
    "lfm2-vl-whole": ("Lfm2VlProcessor", "lfm2_vl.processing_lfm2_vl"),
    "step-3.7": ("Step3p7Processor", "step3p7.processing_step3p7"),
    "cohere2-vision": ("Cohere2VisionProcessor", "cohere2_vision.processing_cohere2_vision"),
    "llama-4": ("Llama4Processor", "llama4.processing_llama4"),
    "gemma-4": ("Gemma4Processor", "gemma4.processing_gemma4"),
    "kimi-k2.5": ("Kimi_K25Processor", "kimi_k25.processing_kimi_k25"),
    "minicpm-v": ("MiniCPMV4_6Processor", "minicpmv4_6.processing_minicpmv4_6"),
    "minicpm-v-4x": ("MiniCPMV4_6Processor", "minicpmv4_6.processing_minicpmv4_6"),
}


@pytest.mark.parametrize("name", COUNTERS)
@settings(max_examples=8)
@given(height=st.integers(20, 400), width=st.integers(20, 400))
def test_tokens_are_those_of_the_prompt(name: str, height: int, width: int) -> None:
    """As many image tokens as Hugging Face's processor writes into the prompt for this image."""
    row, (kind, module) = ROWS[name], COUNTERS[name]
    counter = object.__new__(getattr(importlib.import_module(f"transformers.models.{module}"), kind))
    numbers = {"num_additional_image_tokens": 0, "image_seq_length": 256} | row.model
    vars(counter).update(
        image_processor=row.processor(),
        tokenizer=Tokenizer(),
        image_token="#",
        start_image_token="<",
        end_image_token=">",
        boi_token="<",
        img_line_break_token=";",
        eoi_token=">",
        image_start_token="<",
        image_end_token=">",
        slice_start_token="<",
        slice_end_token=">",
        slice_mode=True,
        downsample_ratio=4,
        full_image_sequence="#" * row.model.get("image_seq_length", 0),
        image_feature_placeholder="#" * 4,  # (112 // 56)², and one for a crop of 56
        patch_feature_placeholder="#",
        **numbers,
    )
    own = {"return_row_col_info": True} if "lfm2" in name else {}
    made = row.processor()(images=[picture(height, width)], return_tensors="pt", **own)
    more = {"image_token_divisor": 4 if name.endswith("4x") else 16} if "minicpm" in name else {}
    text = counter.replace_image_token(made, 0, **more)
    spec = row.spec()
    counted = text.count({"llama-4": "<|patch|>", "ovis-2": "<IMG_ATOM>"}.get(name, "#"))
    assert spec.geometry(height, width).tokens == counted


PHI = Family(
    "Phi4MultimodalImageProcessor",
    "phi4_multimodal.image_processing_phi4_multimodal",
    {"size": {"height": 70, "width": 70}, "dynamic_hd": 6},
)


@settings(max_examples=25)
@given(height=st.integers(1, 600), width=st.integers(1, 600))
def test_phi_is_counted_though_not_made(height: int, width: int) -> None:
    """As many tokens as its processor says, and its refusals; 14 pixels to a patch, 5 patches to a tile."""
    try:
        wanted = PHI.processor()(images=[picture(height, width)], return_tensors="pt")["num_img_tokens"]
    except (ValueError, RuntimeError):
        with pytest.raises(ValueError):
            PHI.spec().geometry(height, width)
        return
    assert PHI.spec().geometry(height, width).tokens == int(wanted[0])


@pytest.mark.parametrize(
    "config",
    [
        {"image_processor_type": "GotOcr2ImageProcessor", "processor_class": "SomeOtherProcessor"},
        {"image_processor_type": "GotOcr2ImageProcessor", "crop_to_patches": "yes"},
        {"image_processor_type": "GotOcr2ImageProcessor", "crop_to_patches": True, "max_patches": 100_000},
        {
            "image_processor_type": "LlavaNextImageProcessor",
            "size": {"shortest_edge": 224},
            "crop_size": {"height": 224, "width": 224},
        },
        {"image_processor_type": "LlavaNextImageProcessor", "do_pad": False},
        {"image_processor_type": "LlavaOnevisionImageProcessor", "image_grid_pinpoints": []},
        {"image_processor_type": "LlavaOnevisionImageProcessor", "image_grid_pinpoints": [[384, 400]]},
        {"image_processor_type": "LlavaOnevisionImageProcessor", "crop_size": {"height": 300, "width": 300}},
        {"image_processor_type": "Llama4ImageProcessor", "do_rescale": False},
        {"image_processor_type": "Llama4ImageProcessor", "size": {"height": 336, "width": 300}},
        {"image_processor_type": "Gemma4ImageProcessor", "max_soft_tokens": 100},
        {"image_processor_type": "Kimi_K25ImageProcessor", "size": {"max_height": 512, "max_width": 100}},
        {"image_processor_type": "MiniCPMV4_6ImageProcessor", "slice_mode": 1},
        {"image_processor_type": "MiniCPMV4_6ImageProcessor", "do_resize": False},
    ],
    ids=str,
)
def test_a_setting_that_is_not_known_is_none(config: dict[str, Any]) -> None:
    """An image passes if the arithmetic does not support a setting."""
    assert families.from_config(SIZES[config["image_processor_type"]] | config) is None


def test_who_calls_the_processor_decides_whether_it_cuts() -> None:
    """InternVL's processor cuts tiles although its file says no; GOT-OCR's does not although its file says yes."""
    said = file("GotOcr2ImageProcessor", image_processor_type="GotOcr2ImageProcessorFast", crop_to_patches=False)
    cut = [families.from_config(said | {"processor_class": name}) for name in ("InternVLProcessor", "GotOcr2Processor")]
    assert [spec and spec.geometry(400, 1000).tiles for spec in cut] == [11, 1]


@rows
def test_a_spec_survives_files_and_json(row: Family, tmp_path: Any) -> None:
    """What Hugging Face saves is read back as the same spec, and what travels to the workers is the spec itself."""
    row.processor().save_pretrained(tmp_path)
    spec = families.from_config(file(row.name, **row.config))
    assert families.from_dir(str(tmp_path)) == spec is not None
    assert families.from_json(spec.to_json()) == spec
    assert spec.keeps(spec.geometry(480, 640)) == spec.inline, "never inline, but for Idefics 3's first step"


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_form_of_the_kernel_cuts_tiles_alike(data: st.DataObject) -> None:
    """Any canvas, any place on it, tiles narrower than a register: plain and fastest give torch's bits."""

    def draw(low: int, high: int, name: str) -> int:
        return data.draw(st.integers(low, high), name)

    tile = draw(1, 40, "tile height"), draw(1, 40, "tile width")
    canvas = tile[0] * draw(1, 3, "rows"), tile[1] * draw(1, 3, "columns")
    size = draw(1, canvas[0], "height"), draw(1, canvas[1], "width")
    view = ImageView(size, canvas, tile, draw(0, canvas[0] - size[0], "top"), draw(0, canvas[1] - size[1], "left"))
    image, spec = picture(draw(1, 60, "h"), draw(1, 60, "w")), ROWS["internvl"].spec()
    assert isinstance(spec, TileSpec)
    wanted = by_torch.tiles(image, view, spec)
    for level in (fused.PLAIN, fused.FASTEST):
        for name, kind in KERNEL_KINDS.items():
            chosen = spec if name != "U8" else dataclasses.replace(spec, do_rescale=False, do_normalize=False)
            got = np.empty(wanted.shape, fused.KINDS[kind][1])
            fused.tiles(by_torch.rows(image), view, chosen, kind, got, level)
            same = by_torch.tiles(image, view, chosen) if name == "U8" else wanted.to(by_torch.DTYPES[name])
            assert torch.equal(by_torch.tensor(got, name), same), (name, level)


def test_a_canvas_that_is_too_small_is_refused() -> None:
    """The kernel never writes beyond what it was given."""
    image, spec = np.zeros((9, 9, 3), np.uint8), ROWS["internvl"].spec()
    for view in (
        ImageView((9, 9), (8, 9), (8, 9)),
        ImageView((4, 4), (8, 8), (8, 3)),
        ImageView((4, 4), (8, 8), (8, 8), top=5),
    ):
        with pytest.raises(ValueError, match="canvas"):
            fused.tiles(image, view, spec, "uint8", np.empty((1, 3, 8, 8), np.uint8))


@rows
@pytest.mark.parametrize("half", ["BF16", "F16"])
def test_half_precision_is_the_floats_as_torch_rounds_them(row: Family, half: str) -> None:
    """Each layout, with values that are asked for in half precision."""
    spec = row.spec()
    assert isinstance(spec, TileSpec)
    if spec.dtype != "F32":
        return  # Llama 4 computes in bfloat16, and nothing else is given
    image = picture(150, 211)
    geometry = spec.geometry(150, 211)
    floats = tiles.prepare(by_torch.rows(image), geometry, spec)
    made = tiles.prepare(by_torch.rows(image), geometry, dataclasses.replace(spec, half=half))
    assert torch.equal(by_torch.tensor(made, half), torch.from_numpy(floats).to(by_torch.DTYPES[half]))
