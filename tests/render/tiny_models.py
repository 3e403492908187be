"""Make the models of these tests, without weights: rendering needs none, in vLLM's renderer either.

    PYTHON tests/render/tiny_models.py [MODEL ...]

Run by the vLLM environment's python from the project's folder. Each has a template of another form.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    Glm4vConfig,
    Qwen2_5_VLConfig,
    Qwen3_5Config,
    Qwen3_5TextConfig,
    Qwen3VLMoeConfig,
    Qwen3VLMoeTextConfig,
)

from tests.vllm import tiny_models

MODELS = Path(__file__).parent / "models"
# All that a template can print, of content as one text, and of content piece by piece.
PRINTING = """\
{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ enable_thinking }}|{{ reasoning_effort }}|{{ documents }}|
{% for message in messages %}
  {{- message | tojson }}
  {%- if message.role == 'tool' %}{{ message.content ~ '!' }}{% endif %}
{% endfor %}
{{ tools | tojson(indent=1) if tools else 'no tools' }}{% generation %} marked{% endgeneration %}
{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"""
PRINTING_PARTS = """\
{%- macro show(content) -%}
  {%- if content is string -%}{{ content }}{%- else -%}
    {%- for part in content -%}
      {%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>{%- endif -%}{{ part | tojson }}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{{ (bos_token or '') ~ (tools | tojson if tools else '') }}
{%- for message in messages[0:] -%}
<|im_start|>{{ message.role }} {{ message.keys() | list | tojson }} {{ show(message.content) }}
{%- for call in message.tool_calls or [] %} {{ call | tojson }}{% endfor -%}
<|im_end|>
{% endfor -%}
{%- if not enable_thinking | default(true) -%}<quiet>{%- endif -%}
{%- if add_generation_prompt -%}<|im_start|>assistant{%- endif -%}"""


def make_qwen2_5(directory: Path) -> None:
    """The tiny Qwen2-VL's files under the newer architecture."""
    tiny_models.make_vision(directory)
    old = json.loads((directory / "config.json").read_text())
    tower = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 64,
        "out_hidden_size": tiny_models.WIDTH,
        "num_heads": 2,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "fullatt_block_indexes": [1],
        "window_size": 56,
    }
    ids = {key: old[key] for key in old if key.endswith("token_id") and old[key] is not None}
    config = Qwen2_5_VLConfig(text_config=old["text_config"], vision_config=tower, tie_word_embeddings=False, **ids)
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    config.save_pretrained(directory)
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        file = directory / name
        file.write_text(file.read_text().replace("Qwen2VLProcessor", "Qwen2_5_VLProcessor"))


def make_qwen3_kin(directory: Path, kin: Any, text: Any, more: dict[str, Any]) -> None:
    """The tiny Qwen3-VL's files for another architecture with the same processor."""
    tiny_models.make_qwen3(directory)
    old = json.loads((directory / "config.json").read_text())
    ids = {key: old[key] for key in old if key.endswith("token_id") and old[key] is not None}
    known = {key: value for key, value in old["text_config"].items() if key not in ("model_type", "architectures")}
    tower = {key: value for key, value in old["vision_config"].items() if key != "model_type"}
    config = kin(text_config=text(**known, **more).to_dict(), vision_config=tower, **ids)
    config.architectures = [kin.__name__.removesuffix("Config") + FOR]
    config.save_pretrained(directory)


FOR = "ForConditionalGeneration"
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


def make_qwen3_moe(directory: Path) -> None:
    make_qwen3_kin(directory, Qwen3VLMoeConfig, Qwen3VLMoeTextConfig, EXPERTS)


def make_qwen3_5(directory: Path) -> None:
    make_qwen3_kin(directory, Qwen3_5Config, Qwen3_5TextConfig, {"layer_types": ["linear_attention", "full_attention"]})


def make_glm(directory: Path) -> None:
    """GLM-4.1V: its own special tokens, and the processor's published settings with images of few pixels."""
    tiny_models.make_vision(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    names = [f"<|{name}|>" for name in ("image", "video")]
    names += [f"<|{end}_of_{name}|>" for name in ("image", "video") for end in ("begin", "end")]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    tokenizer.save_pretrained(directory)
    old = json.loads((directory / "config.json").read_text())
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in names}
    tower = {"depth": 2, "hidden_size": 64, "out_hidden_size": tiny_models.WIDTH, "num_heads": 2, "patch_size": 14}
    text = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": tiny_models.VOCABULARY}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192}
    config = Glm4vConfig(
        text_config=text | heads | {"rope_parameters": old["text_config"].get("rope_parameters")},
        vision_config=tower,
        image_token_id=ids["<|image|>"],
        video_token_id=ids["<|video|>"],
        image_start_token_id=ids["<|begin_of_image|>"],
        image_end_token_id=ids["<|end_of_image|>"],
        video_start_token_id=ids["<|begin_of_video|>"],
        video_end_token_id=ids["<|end_of_video|>"],
    )
    config.architectures = ["Glm4vForConditionalGeneration"]
    config.save_pretrained(directory)
    size = {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 1280}
    common = {key: tiny_models.PROCESSOR[key] for key in ("patch_size", "temporal_patch_size", "merge_size")}
    common |= {"processor_class": "Glm4vProcessor", "size": size}
    still = common | {"image_processor_type": "Glm4vImageProcessor"}
    moving = common | {"video_processor_type": "Glm4vVideoProcessor"}
    (directory / "preprocessor_config.json").write_text(json.dumps(still, indent=1))
    (directory / "video_preprocessor_config.json").write_text(json.dumps(moving, indent=1))


# Model -> how it is made, and its template; "": that of the other tests.
MAKERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "text": (tiny_models.make_text, PRINTING),
    "qwen2-vl": (tiny_models.make_vision, ""),
    "qwen2.5-vl": (make_qwen2_5, PRINTING),
    "qwen3-vl": (tiny_models.make_qwen3, PRINTING_PARTS),
    "qwen3-vl-moe": (make_qwen3_moe, ""),
    "qwen3.5": (make_qwen3_5, PRINTING_PARTS),
    "glm-4.1v": (
        make_glm,
        tiny_models.TEMPLATE.replace("vision_start", "begin_of_image")
        .replace("vision_end", "end_of_image")
        .replace("image_pad", "image"),
    ),
}
NAMED = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "max_new_tokens": 512}  # as published models have them


def main(*wanted: str) -> None:
    torch.manual_seed(tiny_models.SEED)
    for name, (make, template) in MAKERS.items():
        if wanted and name not in wanted:
            continue
        with tempfile.TemporaryDirectory() as made:
            make(Path(made))
            to = MODELS / name
            to.mkdir(parents=True, exist_ok=True)
            for file in [*Path(made).glob("*.json"), *Path(made).glob("*.jinja")]:
                (to / file.name).write_text(file.read_text().rstrip("\n") + "\n")
            if template:
                (to / "chat_template.jinja").write_text(template + "\n")
            if name == "qwen3-vl":
                (to / "generation_config.json").write_text(json.dumps(NAMED, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
