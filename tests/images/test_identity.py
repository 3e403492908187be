"""Which models' processors are known: what is published is, and what only bears a known name is not."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from sidecar.kernels import families
from sidecar.kernels.families import identity
from sidecar.kernels.grid import ProcessorSpec

from .published import CLIP, HALF, PUBLISHED, SLOW, settings

SIGLIP = {**SLOW, **HALF, "image_processor_type": "SiglipImageProcessor"}
TILING = {**SIGLIP, "size": {"height": 448, "width": 448}}
CROPPED = {
    **SLOW,
    **CLIP,
    "image_processor_type": "CLIPImageProcessor",
    "do_center_crop": True,
    "size": {"shortest_edge": 336},
    "crop_size": {"height": 336, "width": 336},
}
OWN_CODE = {"AutoProcessor": "processing.Processor", "AutoImageProcessor": "processing.SiglipImageProcessor"}

# what a directory holds besides a known class's name -> what is to be said of it
STRANGERS: dict[str, tuple[dict[str, dict[str, Any]], str]] = {
    "code of its own, own bounds": (
        {"preprocessor_config.json": {**SIGLIP, "min_pixels": 3136, "max_pixels": 1 << 20, "auto_map": OWN_CODE}},
        "auto_map",
    ),
    "code of its own, no size": ({"preprocessor_config.json": {**SIGLIP, "auto_map": OWN_CODE}}, "auto_map"),
    "bounds without auto_map": (
        {"preprocessor_config.json": {**TILING, "min_pixels": 3136, "max_pixels": 1 << 20}},
        "max_pixels, min_pixels",
    ),
    "bounds of Qwen's for CLIP": (
        {"preprocessor_config.json": {**CROPPED, "max_pixels": 2408448, "min_pixels": 200704}},
        "max_pixels, min_pixels",
    ),
    "no size at all": ({"preprocessor_config.json": SIGLIP}, "size is missing"),
    "no crop size": (
        {"preprocessor_config.json": {k: v for k, v in CROPPED.items() if k != "crop_size"}},
        "crop_size is missing",
    ),
    "one number as a size": ({"preprocessor_config.json": {**SIGLIP, "size": 384}}, "shorter side"),
    "a processor that tiles, by its class": (
        {"preprocessor_config.json": {**TILING, "processor_class": "TilingProcessor"}},
        "TilingProcessor",
    ),
    "a processor that tiles, by its file": (
        {
            "preprocessor_config.json": TILING,
            "processor_config.json": {"processor_class": "TilingProcessor", "max_tiles": 12},
        },
        "max_tiles",
    ),
    "a processor that tiles, by its code": (
        {
            "preprocessor_config.json": TILING,
            "processor_config.json": {"processor_class": "SiglipProcessor", "auto_map": OWN_CODE},
        },
        "auto_map",
    ),
    "a processor that tiles, in the model's file": (
        {"preprocessor_config.json": TILING, "config.json": {"auto_map": OWN_CODE, "architectures": ["SiglipModel"]}},
        "config.json",
    ),
    "a processor that tiles, in the tokenizer's file": (
        {"preprocessor_config.json": TILING, "tokenizer_config.json": {"auto_map": OWN_CODE}},
        "tokenizer_config.json",
    ),
    "a processor that tiles, by the tokenizer's word": (
        {"preprocessor_config.json": TILING, "tokenizer_config.json": {"processor_class": "TilingProcessor"}},
        "TilingProcessor",
    ),
    "a processor that tiles, by its model": (
        {
            "preprocessor_config.json": {**TILING, "processor_class": "SiglipProcessor"},
            "config.json": {"architectures": ["Ovis2_5"]},
        },
        "Ovis2_5",
    ),
    "tiles around a CLIP that crops": (
        {"preprocessor_config.json": CROPPED, "config.json": {"architectures": ["LlavaLlamaForCausalLM"]}},
        "LlavaLlamaForCausalLM",
    ),
    "a known model of another processor": (
        {
            "preprocessor_config.json": {**CROPPED, "processor_class": "LlavaProcessor"},
            "config.json": {"architectures": ["CLIPModel"]},
        },
        "CLIPModel",
    ),
    "two processors": (
        {
            "preprocessor_config.json": {**settings("GotOcr2ImageProcessor"), "processor_class": "GotOcr2Processor"},
            "processor_config.json": {"processor_class": "InternVLProcessor"},
        },
        "different processors",
    ),
    "padded to a size": (
        {
            "preprocessor_config.json": {
                **settings("PixtralImageProcessor"),
                "pad_size": {"height": 2048, "width": 2048},
            }
        },
        "pad_size",
    ),
    "channels last": ({"preprocessor_config.json": {**TILING, "data_format": "channels_last"}}, "data_format"),
    "code named in a strange form": ({"preprocessor_config.json": TILING, "config.json": {"auto_map": 7}}, "not known"),
    "the nested one is code of its own": (
        {
            "preprocessor_config.json": TILING,
            "processor_config.json": {"image_processor": {**TILING, "auto_map": OWN_CODE}},
        },
        "auto_map",
    ),
}


def written(folder: Path, files: dict[str, dict[str, Any]]) -> str:
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return str(folder)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_known(tmp_path: Path, name: str) -> None:
    """Files of several versions lead to a processor, whatever they say besides; a tokenizer's own code is allowed."""
    config, model, architecture = PUBLISHED[name]
    files = {"config.json": {"architectures": [architecture], "auto_map": {"AutoConfig": "x.X"}}} | (
        {"preprocessor_config.json": config} if config else {}
    )
    files |= {"processor_config.json": model} if model else {}
    files["tokenizer_config.json"] = {"auto_map": {"AutoTokenizer": ["x.X", None]}, "processor_class": "Anything"}
    if "processor_class" not in config | model:
        del files["tokenizer_config.json"]["processor_class"]
    found = families.explain(written(tmp_path, files))
    assert isinstance(found, ProcessorSpec), found


@pytest.mark.parametrize("name", STRANGERS)
def test_a_known_name_alone_is_not_an_identity(tmp_path: Path, name: str) -> None:
    """Code, settings, callers and models that are not known pass, and what is said names the offender."""
    files, offender = STRANGERS[name]
    found = families.explain(written(tmp_path, files))
    assert isinstance(found, str) and offender in found


@pytest.mark.parametrize("name", families.FAMILIES)
def test_no_size_has_a_default(name: str) -> None:
    """Each number that sizes follow from is asked of the file: without it, the image passes."""
    whole = settings(name)
    assert families.from_config(whole) is not None
    for key in set(whole) - {"image_processor_type", "min_patches", "max_patches"}:
        assert families.from_config({k: v for k, v in whole.items() if k != key}) is None, key
        assert families.from_config(whole | {key: None}) is None, key


def test_tiles_of_an_image_have_bounds_of_the_file() -> None:
    """InternVL's numbers of tiles are asked of the file where it cuts tiles."""
    whole = settings("GotOcr2ImageProcessor", processor_class="InternVLProcessor")
    assert families.from_config(whole) is not None
    assert all(families.from_config(whole | {key: None}) is None for key in ("min_patches", "max_patches"))


def image_processor(name: str) -> Any:
    """The class of the installed transformers."""
    import transformers

    return getattr(transformers, name)


# names of files that were never, or are no longer, classes of transformers
NAMES_ONLY = ("Qwen2_5_VLImageProcessor", "Qwen3VLImageProcessor")
# settings in files that the class itself no longer has, or has without taking them (Cohere2Vision's patch_size), or
# computes itself (LFM2-VL's max_num_patches)
OF_FILES_ONLY = {"aspect_ratio_setting", "video_sampling", "patch_size", "max_num_patches"}


@pytest.mark.parametrize("name", [name for name in families.FAMILIES if name not in NAMES_ONLY])
def test_every_setting_of_the_class_is_known_and_no_other(name: str) -> None:
    """The settings of a family are those that the installed transformers' class takes, and what files say besides."""
    theirs = set(image_processor(name).valid_kwargs.__annotations__)
    ours = families.FAMILIES[name].settings
    assert theirs <= ours
    from transformers.processing_utils import ImagesKwargs

    assert set(ImagesKwargs.__annotations__) <= identity.SETTINGS
    assert ours - identity.SETTINGS - OF_FILES_ONLY <= theirs


@pytest.mark.parametrize("name", identity.AUDIO)
def test_every_setting_of_an_audio_processor_is_known(name: str) -> None:
    """What such a processor saves into the file that it shares with an image processor."""
    import transformers

    saved = set(getattr(transformers, name)().to_dict())
    assert saved - {"feature_extractor_type", "processor_class"} == set(identity.AUDIO[name])


def test_callers_and_their_models_are_transformers_own() -> None:
    """Each caller of a family exists, transformers maps its models to it, and its settings are known."""
    import transformers
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    models: dict[str, set[str]] = {}
    for name in dir(modeling_auto):
        if name.endswith("MAPPING_NAMES"):
            for kind, classes in getattr(modeling_auto, name).items():
                for one in (classes,) if isinstance(classes, str) else classes:
                    models.setdefault(one, set()).add(PROCESSOR_MAPPING_NAMES.get(kind) or "")
    for caller, architectures in identity.CALLERS.items():
        parameters = set(inspect.signature(getattr(transformers, caller).__init__).parameters)
        assert parameters - {"self", "kwargs"} <= identity.CALLERS_SETTINGS, caller
        for architecture in architectures - set(ELSEWHERE):
            assert caller in models.get(architecture, ()) | OTHERS.get(architecture, set()), (caller, architecture)


# published under another name than transformers' class has
ELSEWHERE = ("Qwen2_5OmniModel",)
# Pixtral is a LLaVA with another processor
OTHERS = {"LlavaForConditionalGeneration": {"PixtralProcessor"}}


def test_every_caller_is_one_of_a_family() -> None:
    """The lists are whole: a family names only callers that are known, and each caller belongs to a family."""
    named = {caller for family in families.FAMILIES.values() for caller in family.callers}
    assert named == set(identity.CALLERS)
