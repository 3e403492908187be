"""Each family of image processors: geometry, tensors and resized images against Hugging Face's own processor."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.images import tensor_layout
from sidecar.images.worker import tensors
from sidecar.kernels import families
from sidecar.kernels.grid import PatchSpec, ProcessorSpec, TileSpec

from . import by_torch, published


@dataclass(frozen=True)
class Family:
    """One row: the class and its module in transformers, settings of a real model, and the tensor that holds sizes."""

    name: str
    module: str
    config: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    most: int = 700  # sides of random images; bigger ones take long where the processor enlarges

    def spec(self) -> ProcessorSpec:
        found = families.from_config(published.settings(self.name, **self.config), self.model)
        assert found is not None
        return found

    def processor(self) -> Any:
        return getattr(importlib.import_module(f"transformers.models.{self.module}"), self.name)(
            **published.SIZES[self.name] | self.config
        )


ROWS = {
    "qwen2-vl": Family("Qwen2VLImageProcessor", "qwen2_vl.image_processing_qwen2_vl", {"max_pixels": 200_704}),
    "qwen3-vl": Family(
        "Qwen2VLImageProcessor",
        "qwen2_vl.image_processing_qwen2_vl",
        {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    ),
    "glm-4v": Family("Glm4vImageProcessor", "glm4v.image_processing_glm4v"),
    "glm-4v-small": Family(
        "Glm4vImageProcessor",
        "glm4v.image_processing_glm4v",
        {"size": {"shortest_edge": 12544, "longest_edge": 200_704}},
    ),
    "glm-4.6v": Family(
        "Glm46VImageProcessor",
        "glm46v.image_processing_glm46v",
        {"size": {"shortest_edge": 12544, "longest_edge": 200_704}},
    ),
    "paddleocr-vl": Family(
        "PaddleOCRVLImageProcessor", "paddleocr_vl.image_processing_paddleocr_vl", {"max_pixels": 400_000}
    ),
    "hunyuan-vl": Family(
        "HunYuanVLImageProcessor",
        "hunyuan_vl.image_processing_hunyuan_vl",
        {"min_pixels": 65_536, "max_pixels": 400_000, "resample": 1},
    ),
    "llava-1.5": Family(
        "CLIPImageProcessor",
        "clip.image_processing_clip",
        {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}},
        {"patch_size": 14},
    ),
    "llava-own": Family("LlavaImageProcessor", "llava.image_processing_llava"),
    "siglip": Family("SiglipImageProcessor", "siglip.image_processing_siglip", {"size": {"height": 384, "width": 384}}),
    "gemma-3": Family(
        "Gemma3ImageProcessor",
        "gemma3.image_processing_gemma3",
        {"size": {"height": 896, "width": 896}},
        {"image_seq_length": 256},
        400,
    ),
    "pixtral": Family("PixtralImageProcessor", "pixtral.image_processing_pixtral"),
    "mistral-3": Family(
        "PixtralImageProcessor",
        "pixtral.image_processing_pixtral",
        {"size": {"longest_edge": 308}, "patch_size": {"height": 14, "width": 14}},
        {"spatial_merge_size": 2},
    ),
    "idefics-3": Family(
        "Idefics3ImageProcessor", "idefics3.image_processing_idefics3", {}, {"image_seq_len": 169}, 300
    ),
    "smolvlm": Family(
        "SmolVLMImageProcessor",
        "smolvlm.image_processing_smolvlm",
        {"size": {"longest_edge": 512}, "max_image_size": {"longest_edge": 256}},
        {"image_seq_len": 64},
        300,
    ),
}
rows = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())


def picture(height: int, width: int) -> torch.Tensor:
    """uint8 (3, height, width) over memory in (height, width, 3) order, as decoders give it."""
    noise = np.random.default_rng(height * 7919 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    noise[: height // 2] //= 200
    return torch.from_numpy(noise).permute(2, 0, 1)


def theirs(row: Family, *images: torch.Tensor) -> dict[str, Any]:
    out: dict[str, Any] = row.processor()(images=list(images), return_tensors="pt")
    return out


def check(row: Family, height: int, width: int) -> None:
    """The tensors equal Hugging Face's; a resized image that may replace its original gives the same tensors."""
    spec, image = row.spec(), picture(height, width)
    try:
        wanted = theirs(row, image)
    except (ValueError, RuntimeError, ZeroDivisionError):
        assert min(height, width) < 30, "only odd sizes are refused"
        return
    geometry = spec.geometry(height, width)
    resized = tensors.resize(by_torch.rows(image), geometry, spec)
    assert resized.shape == (*geometry.size, 3)
    if spec.tensors and not isinstance(spec, TileSpec):
        got = by_torch.tensor(tensors.prepare(by_torch.rows(image), geometry, spec), spec.dtype)
        pixels = wanted["pixel_values"]
        if isinstance(spec, PatchSpec):  # one row for each patch, whatever the shape of a row
            pixels = pixels.flatten(1)
        assert torch.equal(got, pixels if pixels.ndim == 2 else pixels[0])
        shapes = spec.shapes([geometry])
        assert {k: v[1] for k, v in shapes.items()} == {k: list(torch.as_tensor(wanted[k]).shape) for k in shapes}
    if spec.keeps(geometry):
        again = theirs(row, by_torch.planes(resized))
        assert set(again) == set(wanted)
        for name, value in wanted.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(torch.as_tensor(again[name]), torch.as_tensor(value)), name


@rows
@settings(max_examples=12)
@given(data=st.data())
def test_any_size_gives_the_processors_bits(row: Family, data: st.DataObject) -> None:
    """Random sizes: tensors equal in every bit, and a resized image that may replace its original is a fixed point."""
    side = st.integers(1, row.most)
    check(row, data.draw(side, "height"), data.draw(side, "width"))


@rows
@pytest.mark.parametrize("size", [(480, 640), (1, 1), (20, 300), (300, 20), (3, 5), (768, 1365)], ids=str)
def test_sizes_of_interest_give_the_processors_bits(row: Family, size: tuple[int, int]) -> None:
    """A photograph, a pixel, strips, and less than a patch."""
    check(row, *size)


@rows
def test_ordinary_photographs_are_handed_on(row: Family) -> None:
    """The fixed point holds for what people send: otherwise inline images would silently never happen."""
    spec = row.spec()
    for size in ((480, 640), (1080, 1920), (3000, 4000), (1024, 1024), (1500, 1000)):
        assert spec.keeps(spec.geometry(*size)), size


@pytest.mark.parametrize("row", [ROWS["idefics-3"], ROWS["smolvlm"]], ids=["idefics-3", "smolvlm"])
@settings(max_examples=15)
@given(height=st.integers(30, 300), width=st.integers(30, 300))
def test_tiles_are_counted_as_the_processor_cuts_them(row: Family, height: int, width: int) -> None:
    """Tokens are per tile, the one of the whole image included."""
    wanted = theirs(row, picture(height, width))["pixel_values"].shape[1]
    assert row.spec().geometry(height, width).tokens == wanted * row.model["image_seq_len"]


def test_tokens_are_what_the_models_see() -> None:
    """Known counts of known models at known sizes."""
    assert ROWS["llava-1.5"].spec().geometry(480, 640).tokens == 576
    assert ROWS["gemma-3"].spec().geometry(480, 640).tokens == 256
    assert ROWS["siglip"].spec().geometry(480, 640).tokens == 0, "its files do not say"
    assert ROWS["pixtral"].spec().geometry(512, 1024).tokens == 32 * (64 + 1)


@pytest.mark.parametrize("name", ["glm-4.6v", "paddleocr-vl", "hunyuan-vl"])
@pytest.mark.parametrize("extra", [True, False])
def test_tokens_are_those_of_the_prompt(name: str, extra: bool) -> None:
    """As many image tokens as Hugging Face's processor writes into the prompt for this image."""
    row = ROWS[name]
    module = row.module.replace("image_processing", "processing")
    kind = getattr(importlib.import_module(f"transformers.models.{module}"), row.name.replace("Image", ""))
    counter = object.__new__(kind)
    vars(counter).update(image_processor=row.processor(), image_token="#", cat_extra_token=extra)
    config = published.settings(row.name, **row.config)
    spec = families.from_config(config, {"cat_extra_token": extra} if name == "hunyuan-vl" else {})
    assert spec is not None
    for height, width in ((480, 640), (1, 1), (300, 20), (768, 1365)):
        wanted = counter.replace_image_token(theirs(row, picture(height, width)), 0)
        assert spec.geometry(height, width).tokens == wanted.count("#")


def test_a_batch_of_planes_is_padded_as_the_processor_pads() -> None:
    """Two images of different sizes in one answer."""
    row = ROWS["mistral-3"]
    spec = row.spec()
    images = [picture(200, 300), picture(300, 100)]
    wanted = theirs(row, *images)["pixel_values"]
    geometries = [spec.geometry(*image.shape[-2:]) for image in images]
    rows = map(by_torch.rows, images)
    values = [tensors.prepare(image, g, spec).tobytes() for image, g in zip(rows, geometries, strict=True)]
    made = b"".join(piece for group in tensor_layout.pieces(values, geometries, spec) for piece in group)
    assert np.array_equal(np.frombuffer(made, np.float32).reshape(spec.pixels(geometries)), wanted.numpy())


@pytest.mark.parametrize(
    "config",
    [
        {"image_processor_type": "CLIPImageProcessor", "do_center_crop": False},
        {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 100}},
        {"image_processor_type": "CLIPImageProcessor", "size": {"height": 224, "width": 224}},
        {"image_processor_type": "LlavaImageProcessor", "do_pad": True},
        {"image_processor_type": "Gemma3ImageProcessor", "do_pan_and_scan": True},
        {"image_processor_type": "Glm4vImageProcessor", "max_pixels": 5},
        {"image_processor_type": "PixtralImageProcessor", "size": {"shortest_edge": 5}},
        {"image_processor_type": "PixtralImageProcessor", "patch_size": {"height": 16}},
        {"image_processor_type": "Idefics3ImageProcessor", "size": {"height": 100, "width": 100}},
        {"image_processor_type": "Phi4MultimodalImageProcessor", "size": {"height": 448, "width": 400}},
        {"image_processor_type": "MiniCPMOcrImageProcessor"},
        {"image_processor_type": ["CLIPImageProcessor"]},
        {"image_processor_type": "CLIPImageProcessor", "size": [7]},
    ],
    ids=str,
)
def test_a_step_that_is_not_known_is_none(config: dict[str, Any]) -> None:
    """An image passes if a model's file has anything that the arithmetic does not support."""
    sizes = published.SIZES.get(str(config["image_processor_type"]), {})
    assert families.from_config(sizes | config) is None


@rows
def test_a_spec_survives_json(row: Family) -> None:
    """What travels to the workers is the spec itself."""
    spec = row.spec()
    assert families.from_json(spec.to_json()) == spec


@rows
def test_the_files_that_the_processor_saves_are_read(row: Family, tmp_path: Any) -> None:
    """Hugging Face's own saved file gives the same spec, tokens aside."""
    row.processor().save_pretrained(tmp_path)
    found = families.from_dir(str(tmp_path))
    assert found == families.from_config(published.settings(row.name, **row.config))
