"""Make the models of these tests, without weights: rendering needs none, in vLLM's renderer either.

    PYTHON tests/render/tiny_models.py

Run by the vLLM environment's python from the project's folder. Each has a template of another form.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import Qwen2_5_VLConfig

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


# Model -> how it is made, and its template; "": that of the other tests.
MAKERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "text": (tiny_models.make_text, PRINTING),
    "qwen2-vl": (tiny_models.make_vision, ""),
    "qwen2.5-vl": (make_qwen2_5, PRINTING),
    "qwen3-vl": (tiny_models.make_qwen3, PRINTING_PARTS),
}
NAMED = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "max_new_tokens": 512}  # as published models have them


def main() -> None:
    torch.manual_seed(tiny_models.SEED)
    for name, (make, template) in MAKERS.items():
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
    main()
