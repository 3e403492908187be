"""Settings of image processors as models publish them: the numbers that sizes follow from, and whole files."""

from __future__ import annotations

from typing import Any, Final

CLIP: Final = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
HALF: Final = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
QWEN_PATCHES: Final = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
# what transformers 4's fast processors save besides their own settings
FAST: Final = {
    "crop_size": None, "data_format": "channels_first", "default_to_square": True, "device": None, "disable_grouping": None,
    "do_center_crop": None, "do_convert_rgb": True, "do_normalize": True, "do_pad": None, "do_rescale": True, "do_resize": True,
    "input_data_format": None, "pad_size": None, "rescale_factor": 1 / 255, "return_tensors": None,
}  # fmt: skip
# and what their slow ones do
SLOW: Final = {"do_normalize": True, "do_rescale": True, "do_resize": True, "resample": 3, "rescale_factor": 1 / 255}
WHISPER: Final = {
    "chunk_length": 300, "dither": 0.0, "feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 128, "hop_length": 160,
    "n_fft": 400, "n_samples": 4800000, "nb_max_frames": 30000, "padding_side": "right", "padding_value": 0.0,
    "return_attention_mask": True, "sampling_rate": 16000,
}  # fmt: skip
GEMMA_AUDIO: Final = {
    "dither": 0.0, "feature_extractor_type": "Gemma3nAudioFeatureExtractor", "feature_size": 128, "fft_length": 1024,
    "fft_overdrive": True, "frame_length": 512, "hop_length": 160, "input_scale_factor": 1.0, "max_frequency": 7600.0,
    "mel_floor": 1e-05, "min_frequency": 125.0, "padding_side": "right", "padding_value": 0.0, "per_bin_mean": None,
    "per_bin_stddev": None, "preemphasis": 0.97, "preemphasis_htk_flavor": True, "return_attention_mask": False,
    "sampling_rate": 16000,
}  # fmt: skip

# The numbers that sizes follow from, of a model of each class: no file of one lacks them.
SIZES: Final[dict[str, dict[str, Any]]] = {
    "Qwen2VLImageProcessor": {"min_pixels": 3136, "max_pixels": 1_003_520, **QWEN_PATCHES},
    "Glm4vImageProcessor": {"size": {"shortest_edge": 12544, "longest_edge": 11_760_000}, **QWEN_PATCHES},
    "CLIPImageProcessor": {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}},
    "LlavaImageProcessor": {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}},
    "SiglipImageProcessor": {"size": {"height": 224, "width": 224}},
    "Gemma3ImageProcessor": {"size": {"height": 224, "width": 224}},
    "PixtralImageProcessor": {"size": {"longest_edge": 1024}, "patch_size": {"height": 16, "width": 16}},
    "Idefics3ImageProcessor": {"size": {"longest_edge": 1456}, "max_image_size": {"longest_edge": 364}},
    "SmolVLMImageProcessor": {"size": {"longest_edge": 1456}, "max_image_size": {"longest_edge": 364}},
    "GotOcr2ImageProcessor": {"size": {"height": 384, "width": 384}, "min_patches": 1, "max_patches": 12},
    "LlavaNextImageProcessor": {
        "size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336},
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    },
    "LlavaOnevisionImageProcessor": {
        "size": {"height": 384, "width": 384},
        "image_grid_pinpoints": [[384 * y, 384 * x] for y in range(1, 7) for x in range(1, 7)],
    },
    "Llama4ImageProcessor": {"size": {"height": 336, "width": 336}, "max_patches": 16},
    "Gemma4ImageProcessor": {"max_soft_tokens": 280, "patch_size": 16, "pooling_kernel_size": 3},
    "Gemma4UnifiedImageProcessor": {"max_soft_tokens": 280, "patch_size": 16, "pooling_kernel_size": 3},
    "Kimi_K25ImageProcessor": {"size": {"max_height": 512, "max_width": 512}, "patch_size": 14, "merge_size": 2, "max_patches": 16384},
    "MiniCPMV4_6ImageProcessor": {"scale_resolution": 448, "patch_size": 14, "max_slice_nums": 9},
    "Phi4MultimodalImageProcessor": {"size": {"height": 448, "width": 448}, "patch_size": 14, "dynamic_hd": 36},
}  # fmt: skip
SIZES["Qwen2_5_VLImageProcessor"] = SIZES["Qwen3VLImageProcessor"] = SIZES["Qwen2VLImageProcessor"]


def settings(name: str, **more: Any) -> dict[str, Any]:
    """A file's content for the class `name`, with the sizes of a model of it but for `more`."""
    return {"image_processor_type": name, **SIZES[name], **more}


# --- whole files: preprocessor_config.json, processor_config.json, the model's architecture ---

Files = tuple[dict[str, Any], dict[str, Any], str]

PUBLISHED: Final[dict[str, Files]] = {
    "Qwen2-VL": (
        {"min_pixels": 3136, "max_pixels": 12845056, **QWEN_PATCHES, **CLIP, "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor"},
        {}, "Qwen2VLForConditionalGeneration",
    ),
    "Qwen2-VL, saved by transformers 4.46": (
        {**SLOW, **QWEN_PATCHES, **CLIP, "do_convert_rgb": True, "image_processor_type": "Qwen2VLImageProcessor", "max_pixels": 12845056, "min_pixels": 3136, "processor_class": "Qwen2VLProcessor", "size": {"max_pixels": 12845056, "min_pixels": 3136}},
        {}, "Qwen2VLForConditionalGeneration",
    ),
    "Qwen2.5-VL": (
        {"min_pixels": 3136, "max_pixels": 12845056, **QWEN_PATCHES, **CLIP, "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"},
        {}, "Qwen2_5_VLForConditionalGeneration",
    ),
    "Qwen2.5-VL, first file": (
        {"min_pixels": 3136, "max_pixels": 12845056, **QWEN_PATCHES, **CLIP, "image_processor_type": "Qwen2_5_VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"},
        {}, "Qwen2_5_VLForConditionalGeneration",
    ),
    "Qwen2.5-Omni": (
        {**WHISPER, **QWEN_PATCHES, **CLIP, "min_pixels": 3136, "max_pixels": 12845056, "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5OmniProcessor"},
        {}, "Qwen2_5OmniModel",
    ),
    "Qwen3-VL": (
        {"size": {"longest_edge": 16777216, "shortest_edge": 65536}, **QWEN_PATCHES, **HALF, "patch_size": 16, "processor_class": "Qwen3VLProcessor", "image_processor_type": "Qwen2VLImageProcessorFast"},
        {}, "Qwen3VLForConditionalGeneration",
    ),
    "Qwen3-VL, saved by transformers 4.57": (
        {**FAST, **QWEN_PATCHES, **HALF, "resample": 3, "patch_size": 16, "max_pixels": None, "min_pixels": None, "size": {"longest_edge": 16777216, "shortest_edge": 65536}, "processor_class": "Qwen3VLProcessor", "image_processor_type": "Qwen2VLImageProcessorFast"},
        {}, "Qwen3VLMoeForConditionalGeneration",
    ),
    "GLM-4.1V": (
        {"size": {"shortest_edge": 12544, "longest_edge": 9633792}, "do_rescale": True, **QWEN_PATCHES, **CLIP, "image_processor_type": "Glm4vImageProcessor", "processor_class": "Glm4vProcessor"},
        {}, "Glm4vForConditionalGeneration",
    ),
    "LLaVA-1.5": (
        {**SLOW, **CLIP, "do_center_crop": True, "do_convert_rgb": True, "crop_size": {"height": 336, "width": 336}, "size": {"shortest_edge": 336}, "image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor"},
        {"image_token": "<image>", "num_additional_image_tokens": 1, "patch_size": 14, "processor_class": "LlavaProcessor", "vision_feature_select_strategy": "default"},
        "LlavaForConditionalGeneration",
    ),
    "SigLIP": (
        {**SLOW, **HALF, "size": {"height": 384, "width": 384}, "image_processor_type": "SiglipImageProcessor", "processor_class": "SiglipProcessor"},
        {}, "SiglipModel",
    ),
    "PaliGemma": (
        {**SLOW, **HALF, "do_convert_rgb": None, "image_seq_length": 256, "size": {"height": 224, "width": 224}, "image_processor_type": "SiglipImageProcessor", "processor_class": "PaliGemmaProcessor", "_valid_processor_keys": ["images", "do_resize"]},
        {}, "PaliGemmaForConditionalGeneration",
    ),
    "Gemma 3": (
        {**SLOW, **HALF, "resample": 2, "do_convert_rgb": None, "do_pan_and_scan": None, "image_seq_length": 256, "pan_and_scan_max_num_crops": None, "pan_and_scan_min_crop_size": None, "pan_and_scan_min_ratio_to_activate": None, "size": {"height": 896, "width": 896}, "image_processor_type": "Gemma3ImageProcessor", "processor_class": "Gemma3Processor"},
        {"image_seq_length": 256, "processor_class": "Gemma3Processor"}, "Gemma3ForConditionalGeneration",
    ),
    "Gemma 3n": (
        {**FAST, **HALF, **GEMMA_AUDIO, "resample": 2, "do_convert_rgb": None, "do_normalize": False, "default_to_square": False, "image_seq_length": 256, "size": {"height": 768, "width": 768}, "image_processor_type": "SiglipImageProcessorFast", "processor_class": "Gemma3nProcessor"},
        {"audio_seq_length": 188, "image_seq_length": 256, "processor_class": "Gemma3nProcessor"}, "Gemma3nForConditionalGeneration",
    ),
    "Pixtral": (
        {**SLOW, **CLIP, "do_convert_rgb": True, "patch_size": {"height": 16, "width": 16}, "size": {"longest_edge": 1024}, "image_processor_type": "PixtralImageProcessor", "processor_class": "PixtralProcessor"},
        {"image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]", "image_token": "[IMG]", "patch_size": 16, "processor_class": "PixtralProcessor"},
        "LlavaForConditionalGeneration",
    ),
    "Mistral Small 3.1": (
        {**FAST, **CLIP, "resample": 3, "patch_size": {"height": 14, "width": 14}, "size": {"longest_edge": 1540}, "image_processor_type": "PixtralImageProcessorFast", "processor_class": "PixtralProcessor"},
        {"image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]", "image_token": "[IMG]", "patch_size": 14, "processor_class": "PixtralProcessor", "spatial_merge_size": 2},
        "Mistral3ForConditionalGeneration",
    ),
    "Idefics 3": (
        {**SLOW, **HALF, "resample": 1, "do_convert_rgb": True, "do_image_splitting": True, "do_pad": True, "max_image_size": {"longest_edge": 364}, "size": {"longest_edge": 1456}, "image_processor_type": "Idefics3ImageProcessor", "processor_class": "Idefics3Processor"},
        {"image_seq_len": 169, "processor_class": "Idefics3Processor"}, "Idefics3ForConditionalGeneration",
    ),
    "SmolVLM2": (
        {**SLOW, **HALF, "resample": 1, "do_convert_rgb": True, "do_image_splitting": True, "do_pad": True, "max_image_size": {"longest_edge": 512}, "size": {"longest_edge": 2048}, "video_sampling": {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 512}}, "image_processor_type": "SmolVLMImageProcessor", "processor_class": "SmolVLMProcessor"},
        {"image_seq_len": 64, "processor_class": "SmolVLMProcessor"}, "SmolVLMForConditionalGeneration",
    ),
    "InternVL 3.5": (
        {**FAST, **CLIP, "resample": 3, "crop_to_patches": False, "max_patches": 12, "min_patches": 1, "size": {"height": 448, "width": 448}, "image_processor_type": "GotOcr2ImageProcessorFast", "processor_class": "InternVLProcessor"},
        {"image_seq_length": 256, "processor_class": "InternVLProcessor"}, "InternVLForConditionalGeneration",
    ),
    "LLaVA-NeXT": (
        {**SLOW, **CLIP, "aspect_ratio_setting": "anyres", "do_center_crop": True, "do_convert_rgb": True, "do_pad": True, **SIZES["LlavaNextImageProcessor"], "image_processor_type": "LlavaNextImageProcessor", "processor_class": "LlavaNextProcessor"},
        {"image_token": "<image>", "patch_size": 14, "processor_class": "LlavaNextProcessor", "vision_feature_select_strategy": "default"},
        "LlavaNextForConditionalGeneration",
    ),
    "LLaVA-OneVision": (
        {**SLOW, **HALF, "do_convert_rgb": True, "do_pad": True, **SIZES["LlavaOnevisionImageProcessor"], "image_processor_type": "LlavaOnevisionImageProcessor", "processor_class": "LlavaOnevisionProcessor"},
        {"image_token": "<image>", "num_image_tokens": 729, "processor_class": "LlavaOnevisionProcessor", "video_token": "<video>", "vision_feature_select_strategy": "full"},
        "LlavaOnevisionForConditionalGeneration",
    ),
    "Llama 4": (
        {**FAST, **HALF, "resample": 2, "max_patches": 16, "resize_to_max_canvas": False, "size": {"height": 336, "width": 336}, "image_processor_type": "Llama4ImageProcessorFast", "processor_class": "Llama4Processor"},
        {"fake_image_token": "<|image|>", "image_token": "<|image|>", "patch_size": 14, "pixel_shuffle_ratio": 0.5, "processor_class": "Llama4Processor"},
        "Llama4ForConditionalGeneration",
    ),
    "Gemma 4": (
        {},
        {
            "audio_ms_per_token": 40, "audio_seq_length": 750, "image_seq_length": 280, "processor_class": "Gemma4Processor",
            "feature_extractor": {"feature_extractor_type": "Gemma4AudioFeatureExtractor"}, "video_processor": {"video_processor_type": "Gemma4VideoProcessor"},
            "image_processor": {"do_convert_rgb": True, "do_normalize": False, "do_rescale": True, "do_resize": True, "image_mean": [0.0] * 3, "image_std": [1.0] * 3, "image_seq_length": 280, "resample": 3, "rescale_factor": 1 / 255, **SIZES["Gemma4ImageProcessor"], "image_processor_type": "Gemma4ImageProcessor"},
        },
        "Gemma4ForConditionalGeneration",
    ),
}  # fmt: skip
