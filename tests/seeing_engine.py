"""An engine's count of a chat's prompt tokens, by the Hugging Face processor and Qwen2-VL's template."""

from __future__ import annotations

import base64
import io
from typing import Any

TEXT_TOKENS = 9
AROUND_IMAGE = 2  # <|vision_start|>, <|vision_end|>


def processor(config: dict[str, Any]) -> Any:
    """transformers' own Qwen2-VL processor with the sizes of `config`."""
    from transformers import Qwen2VLImageProcessor

    known = ("patch_size", "temporal_patch_size", "merge_size", "size")
    return Qwen2VLImageProcessor(**{name: config[name] for name in known})


def prompt_tokens(body: dict[str, Any], images: Any) -> int:
    """The tokens of a chat's prompt; `images` is the processor."""
    from PIL import Image

    tokens = TEXT_TOKENS
    for part in body["messages"][0]["content"]:
        if part["type"] == "image_url":
            data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
            grid = images(Image.open(io.BytesIO(data)).convert("RGB"), return_tensors="np")["image_grid_thw"]
            tokens += int(grid.prod()) // images.merge_size**2 + AROUND_IMAGE
    return tokens
