"""The supported families of image processors, and how each is read from a model's files.

Rules: never guess. A processor that is not in FAMILIES, has an unknown step or setting, or has an unknown caller is
None: images for it pass through untouched. The arithmetic of each family is the processor's own: divisions in its
order, rounding like Python. tests/images/test_families.py checks each against the installed transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sidecar.kernels.families import any_resolution, crops, idefics3, phi4, single_view, variable_patches, videos
from sidecar.kernels.families.identity import SETTINGS, Files, find_mismatch, words
from sidecar.kernels.families.reading import Config
from sidecar.kernels.grid import ProcessorSpec

Reader = Callable[[Config, Config], ProcessorSpec]


@dataclass(frozen=True, slots=True)
class Family:
    """One class of image processors: the reader of its settings, its spec, the settings it has, and its callers."""

    read: Reader
    spec_class: type[ProcessorSpec]
    settings: frozenset[str]
    callers: frozenset[str]


def _family(read: Reader, spec_class: type[ProcessorSpec], callers: str, settings: str = "") -> Family:
    """A family by its own settings, in addition to those that all have."""
    return Family(read, spec_class, SETTINGS | words(settings), words(callers))


_PATCHES: Final = "merge_size patch_size temporal_patch_size"
_GEMMA: Final = "max_soft_tokens patch_size pooling_kernel_size"
_QWEN: Final = _family(
    single_view.read_qwen,
    single_view.Qwen2VLSpec,
    "Qwen2VLProcessor Qwen2_5_VLProcessor Qwen3VLProcessor Qwen2_5OmniProcessor Qwen3OmniMoeProcessor",
    f"max_pixels min_pixels {_PATCHES}",
)
_IDEFICS: Final = _family(
    idefics3.read_idefics,
    idefics3.Idefics3Spec,
    "Idefics3Processor SmolVLMProcessor",
    "do_image_splitting max_image_size return_row_col_info video_sampling",
)

# By class name in the file; the "Fast" form of transformers 4 is the same processor.
FAMILIES: Final[Mapping[str, Family]] = {
    "Qwen2VLImageProcessor": _QWEN,  # Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5 and others: one processor, other numbers
    "Qwen2_5_VLImageProcessor": _QWEN,
    "Qwen3VLImageProcessor": _QWEN,
    "Glm4vImageProcessor": _family(single_view.read_glm, single_view.Qwen2VLSpec, "Glm4vProcessor", _PATCHES),
    "Glm46VImageProcessor": _family(single_view.read_glm, single_view.Qwen2VLSpec, "Glm46VProcessor", _PATCHES),
    "PaddleOCRVLImageProcessor": _family(
        single_view.read_paddle_ocr, single_view.RowsOfPatchesSpec, "PaddleOCRVLProcessor",
        f"max_pixels min_pixels {_PATCHES}",
    ),
    "HunYuanVLImageProcessor": _family(
        single_view.read_hunyuan, single_view.RowsOfPatchesSpec, "HunYuanVLProcessor",
        f"max_pixels min_pixels {_PATCHES}",
    ),
    # LLaVA-1.5
    "CLIPImageProcessor": _family(single_view.read_cropped, single_view.ClipSpec, "CLIPProcessor LlavaProcessor"),
    "LlavaImageProcessor": _family(single_view.read_cropped, single_view.ClipSpec, "LlavaProcessor"),
    "SiglipImageProcessor": _family(
        single_view.read_siglip, single_view.SiglipSpec,
        "SiglipProcessor PaliGemmaProcessor Gemma3nProcessor LlavaProcessor",
    ),
    "Gemma3ImageProcessor": _family(
        crops.read_gemma_3, single_view.Gemma3Spec, "Gemma3Processor",
        "do_pan_and_scan pan_and_scan_max_num_crops pan_and_scan_min_crop_size pan_and_scan_min_ratio_to_activate",
    ),
    # also Mistral 3
    "PixtralImageProcessor": _family(
        single_view.read_pixtral, single_view.PixtralSpec, "PixtralProcessor", "patch_size",
    ),
    "Idefics3ImageProcessor": _IDEFICS,
    "SmolVLMImageProcessor": _IDEFICS,
    "GotOcr2ImageProcessor": _family(  # InternVL 3 and 3.5, Aya Vision, GOT-OCR 2
        any_resolution.read_intern_vl, any_resolution.InternVLSpec,
        "GotOcr2Processor InternVLProcessor AyaVisionProcessor QianfanOCRProcessor",
        "crop_to_patches max_patches min_patches",
    ),
    "Ovis2ImageProcessor": _family(
        any_resolution.read_ovis_2, any_resolution.Ovis2Spec, "Ovis2Processor",
        "crop_to_patches max_patches min_patches use_covering_area_grid",
    ),
    "Cohere2VisionImageProcessor": _family(
        any_resolution.read_cohere_2_vision, any_resolution.Cohere2VisionSpec,
        "Cohere2VisionProcessor", "crop_to_patches max_patches min_patches patch_size",
    ),
    "LlavaNextImageProcessor": _family(  # also Granite 4 Vision
        any_resolution.read_llava_next, any_resolution.AnyResolutionSpec,
        "LlavaNextProcessor Granite4VisionProcessor", "aspect_ratio_setting image_grid_pinpoints",
    ),
    "LlavaOnevisionImageProcessor": _family(
        any_resolution.read_llava_one_vision, any_resolution.AnyResolutionSpec,
        "LlavaOnevisionProcessor", "image_grid_pinpoints",
    ),
    "Llama4ImageProcessor": _family(
        any_resolution.read_llama_4, any_resolution.Llama4Spec, "Llama4Processor", "max_patches resize_to_max_canvas",
    ),
    "Gemma4ImageProcessor": _family(
        variable_patches.read_gemma, variable_patches.Gemma4Spec, "Gemma4Processor", _GEMMA,
    ),
    "Gemma4UnifiedImageProcessor": _family(
        variable_patches.read_gemma_unified, variable_patches.Gemma4Spec, "Gemma4UnifiedProcessor", _GEMMA,
    ),
    "Kimi_K25ImageProcessor": _family(
        variable_patches.read_kimi, variable_patches.KimiSpec, "Kimi_K25Processor", "max_patches merge_size patch_size",
    ),
    "MiniCPMV4_6ImageProcessor": _family(
        variable_patches.read_minicpm, variable_patches.MiniCPMSpec, "MiniCPMV4_6Processor",
        "downsample_mode max_slice_nums patch_size scale_resolution slice_mode use_image_id",
    ),
    "Lfm2VlImageProcessor": _family(
        crops.read_lfm_2, crops.Lfm2VLSpec, "Lfm2VlProcessor",
        "do_image_splitting downsample_factor encoder_patch_size max_image_tokens max_num_patches max_pixels_tolerance "
        "max_tiles min_image_tokens min_tiles return_row_col_info tile_size use_thumbnail",
    ),
    "Step3p7ImageProcessor": _family(
        crops.read_step_3, crops.Step3Spec, "Step3p7Processor",
        "max_image_size patch_size",
    ),
    "Phi4MultimodalImageProcessor": _family(
        phi4.read_phi_4, phi4.Phi4Spec, "Phi4MultimodalProcessor", "dynamic_hd patch_size",
    ),
}  # fmt: skip
CLASSES: Final[Mapping[str, type[ProcessorSpec]]] = {
    **{family.spec_class.__name__: family.spec_class for family in FAMILIES.values()},
    crops.PanAndScanSpec.__name__: crops.PanAndScanSpec,
    videos.VideoSpec.__name__: videos.VideoSpec,
}


def from_config(config: Config, model: Config | None = None) -> ProcessorSpec | None:
    """Read the content of a `preprocessor_config.json`. None if the processor, or a step of it, is not known.

    `model` is the top level of `processor_config.json`, which some families need for counting tokens.
    """
    found = _from_config(config, Files(model or {}))
    return found if isinstance(found, ProcessorSpec) else None


def _from_config(config: Config, files: Files) -> ProcessorSpec | str:
    """The processor, or why it is not known (one line)."""
    name = config.get("image_processor_type")
    if not isinstance(name, str):
        return "its files name no image processor"
    name = name.removesuffix("Fast")
    family = FAMILIES.get(name)
    if family is None:
        return f"{name[:64]} is not one of the known image processors"
    try:
        return find_mismatch(name, family.settings, family.callers, config, files) or family.read(config, files.model)
    except ValueError as e:
        return f"{name}: {str(e)[:80]}"
    except (KeyError, TypeError, AttributeError) as e:
        return f"{name} has a setting that is not known ({type(e).__name__}: {str(e)[:80]})"


def from_dir(path: str) -> ProcessorSpec | None:
    """Read a model's directory: `processor_config.json` (its image part) and `preprocessor_config.json`.

    Versions of the engines' libraries differ in which of the two they read: if both exist and disagree, None.
    """
    found = explain(path)
    return found if isinstance(found, ProcessorSpec) else None


def explain(path: str) -> ProcessorSpec | str:
    """The processor of a model's directory, or why it is not known."""
    files = _read_files(path)
    configs = (files.model.get("image_processor"), _read(Path(path) / "preprocessor_config.json"))
    found = list(
        dict.fromkeys(_from_config(config, files) for config in configs if isinstance(config, dict) and config)
    )
    if not found:
        return "it has no preprocessor_config.json or processor_config.json that can be read"
    if len(found) == 1:
        return found[0]
    return next(
        (why for why in found if isinstance(why, str)), "preprocessor_config.json and processor_config.json disagree"
    )


def video_from_dir(path: str) -> videos.VideoSpec | None:
    """The video processor of a model's directory; None if it is not known."""
    found = explain_video(path)
    return found if isinstance(found, videos.VideoSpec) else None


def explain_video(path: str) -> videos.VideoSpec | str:
    """The video processor of a model's directory, or why it is not known.

    As in transformers: `processor_config.json` (its video part) or `video_preprocessor_config.json`, which must not
    disagree; without either, the settings of the image processor are those of the video processor, too.
    """
    files = _read_files(path)
    named = (files.model.get("video_processor"), _read(Path(path) / "video_preprocessor_config.json"))
    configs = [config for config in named if isinstance(config, dict) and config]
    found = list(
        dict.fromkeys(
            videos.from_config(config, files) for config in configs or [_read(Path(path) / "preprocessor_config.json")]
        )
    )
    if len(found) == 1:
        return found[0]
    return next(
        (why for why in found if isinstance(why, str)),
        "video_preprocessor_config.json and processor_config.json disagree",
    )


def _read_files(path: str) -> Files:
    return Files(
        *(_read(Path(path) / name) for name in ("processor_config.json", "tokenizer_config.json", "config.json"))
    )


def from_json(text: str) -> ProcessorSpec:
    """Inverse of ProcessorSpec.to_json."""
    raw: dict[str, Any] = json.loads(text)
    values: dict[str, Any] = {k: _frozen(v) for k, v in raw.items()}
    return CLASSES[values.pop("family")](**values)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value


def _read(path: Path) -> dict[str, Any]:
    """A JSON file's object; empty if there is none."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
