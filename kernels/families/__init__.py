"""The families of image processors that are known word for word, and how each is read from a model's files.

A processor that is not in FAMILIES, or that has a step of its own, is None, which callers take as "pass the image through
untouched": never a guess. The arithmetic of each is the processor's own, divisions in its order and rounding as Python rounds;
tests/images/test_families.py holds each against the installed transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from sidecar.kernels.families import any_resolution, idefics3, phi4, single_view, variable_patches
from sidecar.kernels.families.reading import Config
from sidecar.kernels.grid import BICUBIC, BILINEAR, ProcessorSpec

Reader = Callable[[Config, Config], ProcessorSpec]

# Class name in the file (its "Fast" form of transformers 4 is the same processor) -> how to read it.
FAMILIES: Final[Mapping[str, Reader]] = {
    "Qwen2VLImageProcessor": single_view.qwen,  # Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5 and others: one processor, other numbers
    "Qwen2_5_VLImageProcessor": single_view.qwen,
    "Qwen3VLImageProcessor": single_view.qwen,
    "Glm4vImageProcessor": single_view.glm,
    "CLIPImageProcessor": single_view.cropped,  # LLaVA-1.5
    "LlavaImageProcessor": single_view.cropped,
    "SiglipImageProcessor": single_view.fixed(BICUBIC),
    "Gemma3ImageProcessor": single_view.fixed(BILINEAR),
    "PixtralImageProcessor": single_view.pixtral,  # Mistral 3 and others
    "Idefics3ImageProcessor": idefics3.idefics,
    "SmolVLMImageProcessor": idefics3.idefics,
    "GotOcr2ImageProcessor": any_resolution.intern_vl,  # InternVL 3 and 3.5, Aya Vision, GOT-OCR 2
    "LlavaNextImageProcessor": any_resolution.llava_next,
    "LlavaOnevisionImageProcessor": any_resolution.llava_one_vision,
    "Llama4ImageProcessor": any_resolution.llama_4,
    "Gemma4ImageProcessor": variable_patches.gemma,
    "Gemma4UnifiedImageProcessor": variable_patches.gemma_unified,
    "Kimi_K25ImageProcessor": variable_patches.kimi,
    "MiniCPMV4_6ImageProcessor": variable_patches.minicpm,
    "Phi4MultimodalImageProcessor": phi4.phi_4,
}
CLASSES: Final[Mapping[str, type[ProcessorSpec]]] = {
    cls.__name__: cls
    for cls in (
        single_view.Qwen2VLSpec,
        single_view.SiglipSpec,
        single_view.ClipSpec,
        single_view.PixtralSpec,
        idefics3.Idefics3Spec,
        any_resolution.InternVLSpec,
        any_resolution.AnyResolutionSpec,
        any_resolution.Llama4Spec,
        variable_patches.Gemma4Spec,
        variable_patches.KimiSpec,
        variable_patches.MiniCPMSpec,
        phi4.Phi4Spec,
    )
}


def from_config(config: Config, model: Config | None = None) -> ProcessorSpec | None:
    """Read the content of a `preprocessor_config.json`. None where the processor, or a step of it, is not known.

    `model` is the top level of `processor_config.json`, which some families need for counting tokens.
    """
    found = _from_config(config, model or {})
    return found if isinstance(found, ProcessorSpec) else None


def _from_config(config: Config, model: Config) -> ProcessorSpec | str:
    """The processor, or why it is not known."""
    name = config.get("image_processor_type")
    if not isinstance(name, str):
        return "its files name no image processor"
    read = FAMILIES.get(name.removesuffix("Fast"))
    if read is None:
        return f"{name[:64]} is not one of the known image processors"
    try:
        return read(config, model)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        return f"{name[:64]} has a setting that is not known ({type(e).__name__}: {str(e)[:80]})"


def from_dir(path: str) -> ProcessorSpec | None:
    """Read a model's directory: `processor_config.json` (its image part) and `preprocessor_config.json`.

    Which of the two is read differs between versions of the engines' libraries: where both are there and disagree, None.
    """
    found = explained(path)
    return found if isinstance(found, ProcessorSpec) else None


def explained(path: str) -> ProcessorSpec | str:
    """The processor of a model's directory, or why it is not known: what to tell whoever wonders that images pass."""
    model = _read(Path(path) / "processor_config.json")
    configs = (model.get("image_processor"), _read(Path(path) / "preprocessor_config.json"))
    found = list(
        dict.fromkeys(_from_config(config, model) for config in configs if isinstance(config, dict) and config)
    )
    if not found:
        return "it has no preprocessor_config.json or processor_config.json that can be read"
    return found[0] if len(found) == 1 else "preprocessor_config.json and processor_config.json disagree"


def from_json(text: str) -> ProcessorSpec:
    """Inverse of ProcessorSpec.to_json."""
    raw: dict[str, Any] = json.loads(text)
    values: dict[str, Any] = {k: _frozen(v) for k, v in raw.items()}
    return CLASSES[values.pop("family")](**values)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value


def _read(path: Path) -> dict[str, Any]:
    """A JSON file's object; empty where there is none."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
