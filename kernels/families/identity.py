"""Check that a model's image processor really is the known one: a class name may stand for other code.

Rules: each name in a model's files (the processor's caller, the model's architecture) must be on a list here. Each
setting must be one that the class has. No file may name custom code. tests/images/test_identity.py checks the lists
against the installed transformers and against published files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from sidecar.kernels.families.reading import Config

# Characters of a name in a message, and number of names.
_SHOWN, _NAMES = 64, 3
# The parts of an `auto_map` that concern images; configuration, weights and tokenizer may be custom code.
_PROCESSORS: Final = frozenset(("AutoProcessor", "AutoImageProcessor"))


def words(text: str) -> frozenset[str]:
    """The words of `text`."""
    return frozenset(text.split())


# Settings that all image processors of transformers have, and other keys of their files.
SETTINGS: Final = words(
    "auto_map crop_size data_format default_to_square device disable_grouping do_center_crop do_convert_rgb "
    "do_normalize do_pad do_rescale do_resize feature_extractor_type image_mean image_processor_type "
    "image_seq_length image_std input_data_format pad_size processor_class resample rescale_factor return_tensors "
    "size _processor_class _valid_kwargs_names _valid_processor_keys"
)

# Settings of an audio processor in the same file; none of them changes an image.
AUDIO: Final[Mapping[str, frozenset[str]]] = {
    "WhisperFeatureExtractor": words(
        "chunk_length dither feature_size hop_length n_fft n_samples nb_max_frames padding_side padding_value "
        "return_attention_mask sampling_rate"
    ),
    "Gemma3nAudioFeatureExtractor": words(
        "dither feature_size fft_length fft_overdrive frame_length hop_length input_scale_factor max_frequency "
        "mel_floor min_frequency padding_side padding_value per_bin_mean per_bin_stddev preemphasis "
        "preemphasis_htk_flavor return_attention_mask sampling_rate"
    ),
}

# Processors that pass an image unchanged to their image processor -> the architectures of the models that use them.
CALLERS: Final[Mapping[str, frozenset[str]]] = {
    "Qwen2VLProcessor": words("Qwen2VLForConditionalGeneration"),
    "Qwen2_5_VLProcessor": words("Qwen2_5_VLForConditionalGeneration"),
    "Qwen3VLProcessor": words(
        "Qwen3VLForConditionalGeneration Qwen3VLMoeForConditionalGeneration Qwen3_5ForConditionalGeneration "
        "Qwen3_5MoeForConditionalGeneration"
    ),
    "Qwen2_5OmniProcessor": words("Qwen2_5OmniModel Qwen2_5OmniForConditionalGeneration"),
    "Qwen3OmniMoeProcessor": words("Qwen3OmniMoeForConditionalGeneration"),
    "Glm4vProcessor": words("Glm4vForConditionalGeneration Glm4vMoeForConditionalGeneration"),
    "Glm46VProcessor": words("Glm46VForConditionalGeneration"),
    "PaddleOCRVLProcessor": words("PaddleOCRVLForConditionalGeneration"),
    "HunYuanVLProcessor": words("HunYuanVLForConditionalGeneration"),
    "CLIPProcessor": words("CLIPModel"),
    "LlavaProcessor": words("LlavaForConditionalGeneration VipLlavaForConditionalGeneration"),
    "SiglipProcessor": words("SiglipModel"),
    "PaliGemmaProcessor": words("PaliGemmaForConditionalGeneration"),
    "Gemma3nProcessor": words("Gemma3nForConditionalGeneration"),
    "Gemma3Processor": words("Gemma3ForConditionalGeneration"),
    "PixtralProcessor": words("LlavaForConditionalGeneration Mistral3ForConditionalGeneration"),
    "Idefics3Processor": words("Idefics3ForConditionalGeneration"),
    "SmolVLMProcessor": words("SmolVLMForConditionalGeneration"),
    "GotOcr2Processor": words("GotOcr2ForConditionalGeneration"),
    "InternVLProcessor": words("InternVLForConditionalGeneration"),
    "AyaVisionProcessor": words("AyaVisionForConditionalGeneration"),
    "QianfanOCRProcessor": words("QianfanOCRForConditionalGeneration"),
    "Ovis2Processor": words("Ovis2ForConditionalGeneration"),
    "Cohere2VisionProcessor": words("Cohere2VisionForConditionalGeneration"),
    "LlavaNextProcessor": words("LlavaNextForConditionalGeneration"),
    "Granite4VisionProcessor": words("Granite4VisionForConditionalGeneration"),
    "LlavaOnevisionProcessor": words("LlavaOnevisionForConditionalGeneration"),
    "Llama4Processor": words("Llama4ForConditionalGeneration"),
    "Gemma4Processor": words("Gemma4ForConditionalGeneration"),
    "Gemma4UnifiedProcessor": words("Gemma4UnifiedForConditionalGeneration"),
    "Kimi_K25Processor": words("Kimi_K25ForConditionalGeneration"),
    "MiniCPMV4_6Processor": words("MiniCPMV4_6ForConditionalGeneration"),
    "Lfm2VlProcessor": words("Lfm2VlForConditionalGeneration"),
    "Step3p7Processor": words("Step3p7ForConditionalGeneration"),
    "Phi4MultimodalProcessor": words("Phi4MultimodalForCausalLM"),
}

# Their settings in `processor_config.json`: parts, and numbers and words for the prompt.
CALLERS_SETTINGS: Final = words(
    "audio_ms_per_token audio_processor audio_seq_length auto_map cat_extra_token chat_template "
    "downsample_factor downsample_rate "
    "end_of_image_token end_of_img_token fake_image_token feature_extractor image_break_token image_end_token "
    "image_placeholder_token image_processor image_seq_len image_seq_length image_token img_line_break_token "
    "img_patch_token img_size num_additional_image_tokens num_image_tokens patch_size patch_token "
    "pixel_shuffle_ratio processor_class spatial_merge_size start_of_image_token start_of_img_token "
    "tile_global_token tile_token tile_x_separator_token tile_y_separator_token tokenizer video_processor "
    "video_token vision_aspect_ratio vision_feature_select_strategy"
)


@dataclass(frozen=True, slots=True)
class Files:
    """The objects of a model's other files; empty if there are none."""

    model: Config = field(default_factory=dict)  # processor_config.json
    tokenizer: Config = field(default_factory=dict)  # tokenizer_config.json
    config: Config = field(default_factory=dict)  # config.json


def find_mismatch(name: str, settings: frozenset[str], callers: frozenset[str], config: Config, files: Files) -> str:
    """Why a model whose files name the image processor `name` may have another one; "" if there is no sign of it.

    `config`: the image processor's own settings; `settings`: all settings that this class has.
    """
    if config.get("auto_map"):
        return f"{name} is custom code of the model (auto_map)"
    if strange := set(config) - settings - AUDIO.get(str(config.get("feature_extractor_type")), frozenset()):
        return f"{name} has no setting {_shown(strange)}: another processor uses its name"
    return _caller_mismatch(name, callers, config, files)


def _caller_mismatch(name: str, callers: frozenset[str], config: Config, files: Files) -> str:
    """Why the image processor's caller may do more than call it; "" if there is no sign of it."""
    named = (
        ("processor_config.json", set(files.model.get("auto_map") or ())),
        ("tokenizer_config.json", _PROCESSORS & set(files.tokenizer.get("auto_map") or ())),
        ("config.json", _PROCESSORS & set(files.config.get("auto_map") or ())),
    )
    for file, own in named:
        if own:
            return f"{file} names a custom processor of the model (auto_map)"
    if strange := set(files.model) - CALLERS_SETTINGS:
        return f"processor_config.json has an unknown setting: {_shown(strange)}"
    classes = _named(files.model, config) or _named(files.tokenizer) or _named(files.config)  # transformers' own order
    if len(classes) > 1:
        return f"the files name different processors: {_shown(classes)}"
    if classes - callers:
        return f"{_shown(classes - callers)} is not known to call {name} unchanged (processor_class)"
    fitting = frozenset[str]().union(*(CALLERS[caller] for caller in classes or callers))
    if strange := {str(found) for found in files.config.get("architectures") or ()} - fitting:
        return f"{_shown(strange)} is not known to call {name} unchanged (architectures)"
    return ""


def _named(*found: Config) -> set[str]:
    return {str(one["processor_class"]) for one in found if one.get("processor_class")}


def _shown(names: set[str]) -> str:
    return ", ".join(sorted(name[:_SHOWN] for name in names)[:_NAMES])
