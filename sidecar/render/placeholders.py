"""Where images stand in a prompt: one token of the template each, which becomes as many as the model sees.

vLLM's own rules, by the architecture in `config.json`. Only rows that tests/vllm/test_render.py holds against the real
engine are here; for any other model a prompt with images is not rendered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from sidecar.errors import NotRendered

# Architecture -> the image token, and what stands for an image where the template takes its content as one text.
_QWEN: Final = ("<|image_pad|>", "<|vision_start|><|image_pad|><|vision_end|>")
IMAGE_TOKENS: Final = {
    "Qwen2VLForConditionalGeneration": _QWEN,
    "Qwen2_5_VLForConditionalGeneration": _QWEN,
    "Qwen3VLForConditionalGeneration": _QWEN,
    "Qwen3VLMoeForConditionalGeneration": _QWEN,
    "Qwen3_5ForConditionalGeneration": _QWEN,
    "Glm4vForConditionalGeneration": ("<|image|>", "<|begin_of_image|><|image|><|end_of_image|>"),
}


class Placeholder(NamedTuple):
    """A run of image tokens in a prompt."""

    offset: int
    length: int


def expand(token_ids: Sequence[int], image_token: int, lengths: Sequence[int]) -> tuple[list[int], list[Placeholder]]:
    """The prompt with each image token repeated, and where the runs are. Raises NotRendered.

    With more or fewer image tokens than images, for example from a user's text, engines differ in what they replace.
    """
    if token_ids.count(image_token) != len(lengths):
        raise NotRendered("the prompt does not have exactly one image token for each image")
    expanded: list[int] = []
    places: list[Placeholder] = []
    begin = 0
    for length in lengths:
        at = token_ids.index(image_token, begin)
        expanded += token_ids[begin:at]
        places.append(Placeholder(len(expanded), length))
        expanded += [image_token] * length
        begin = at + 1
    return expanded + list(token_ids[begin:]), places
