"""Make the tiny models of these tests: random weights from a seed, a byte-level tokenizer, real formats.

    PYTHON tiny_models.py text DIR       Qwen2: text in, text out
    PYTHON tiny_models.py vision DIR     Qwen2-VL: with the real image processor's settings
    PYTHON tiny_models.py small DIR      the same with images of few pixels, so that most photographs shrink
    PYTHON tiny_models.py qwen3 DIR      Qwen3-VL, whose processor has other patches, with images of few pixels

Rules: run by the vLLM environment's python. No hub is contacted. The same seed gives the same weights. The weights
have a wide spread, so that the output depends visibly on every input token and pixel.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

SEED = 20
VOCABULARY = 640
WIDTH = 128
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
SENTENCES = [
    "A sidecar watches the engine and counts what it does.",
    "user assistant system: describe what is in this picture, please.",
    "The tokens come one by one, and each of them is progress.",
]
TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else -%}
{%- for part in message['content'] -%}
{%- if part['type'] in ('image', 'image_url') -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part['type'] in ('video', 'video_url') -%}<|vision_start|><|video_pad|><|vision_end|>
{%- else -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}
{%- endif -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""
MOST_PIXELS, FEW_PIXELS = 28 * 28 * 1280, 224 * 224
PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2VLProcessor",
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def make_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE with Qwen's special tokens and a ChatML template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - 64, special_tokens=SPECIAL, initial_alphabet=alphabet)
    bpe.train_from_iterator(SENTENCES, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL[1:],
        model_max_length=4096,
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return tokenizer


def text_shape(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The language model's part of both configurations."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "initializer_range": 0.1,
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "pad_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    }


def make_text(directory: Path) -> None:
    tokenizer = make_tokenizer(directory)
    Qwen2ForCausalLM(Qwen2Config(**text_shape(tokenizer))).save_pretrained(directory)


def make_vision(directory: Path, most: int = MOST_PIXELS) -> None:
    tokenizer = make_tokenizer(directory)
    rope = {"type": "mrope", "rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
    tower = {
        "depth": 2,
        "embed_dim": WIDTH // 2,
        "hidden_size": WIDTH,
        "num_heads": 2,
        "mlp_ratio": 2,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_channels": 3,
        "initializer_range": 0.1,
    }
    names = ("image_pad", "video_pad", "vision_start", "vision_end", "vision_pad")
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names}
    config = Qwen2VLConfig(
        text_config={**text_shape(tokenizer), "rope_parameters": rope, "rope_scaling": rope},
        vision_config=tower,
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        vision_token_id=ids["vision_pad"],
        initializer_range=0.1,
        tie_word_embeddings=False,
    )
    Qwen2VLForConditionalGeneration(config).save_pretrained(directory)
    bounds = {"size": {"shortest_edge": 56 * 56, "longest_edge": most}, "min_pixels": 56 * 56, "max_pixels": most}
    processor = PROCESSOR | bounds
    video = {key: value for key, value in processor.items() if key != "image_processor_type"}
    _write(directory / "preprocessor_config.json", processor)
    _write(directory / "video_preprocessor_config.json", {**video, "video_processor_type": "Qwen2VLVideoProcessor"})


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def make_small(directory: Path) -> None:
    make_vision(directory, FEW_PIXELS)


def make_qwen3(directory: Path) -> None:
    tokenizer = make_tokenizer(directory)
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 4, 4], "mrope_interleaved": True}
    text = text_shape(tokenizer) | {"head_dim": WIDTH // 4, "rope_parameters": rope, "rope_scaling": rope}
    tower = {
        "depth": 2,
        "hidden_size": WIDTH // 2,
        "out_hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_heads": 2,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_channels": 3,
        "num_position_embeddings": 24 * 24,
        "deepstack_visual_indexes": [0],
        "initializer_range": 0.1,
    }
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=tower,
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=False,
    )
    Qwen3VLForConditionalGeneration(config).save_pretrained(directory)
    processor = PROCESSOR | {"processor_class": "Qwen3VLProcessor", "patch_size": 16}
    processor |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    processor |= {"size": {"shortest_edge": 64 * 64, "longest_edge": 256 * 256}}
    video = {key: value for key, value in processor.items() if key != "image_processor_type"}
    _write(directory / "preprocessor_config.json", processor)
    _write(directory / "video_preprocessor_config.json", {**video, "video_processor_type": "Qwen3VLVideoProcessor"})


MAKERS = {"text": make_text, "vision": make_vision, "small": make_small, "qwen3": make_qwen3}


def main(kind: str, directory: str) -> None:
    torch.manual_seed(SEED)
    MAKERS[kind](Path(directory))


if __name__ == "__main__":
    main(*sys.argv[1:])
