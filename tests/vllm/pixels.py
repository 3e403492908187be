"""Print what vLLM's own code makes of the images of chat bodies; run by the vLLM environment's python.

    PYTHON pixels.py MODEL BODY.json ...

Prints a JSON list with one entry per body: for each of its images the tensors that go to the vision tower, by name, as
shape, dtype and SHA-256 of their bytes. "patches" are those of vLLM's default processing (uint8 if the model normalises
on its device), "floats" those of the complete Hugging Face processor.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from vllm.config import ModelConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import TimingContext
from vllm.multimodal.processing.inputs import ProcessorInputs
from vllm.renderers.chat_utils import parse_chat_messages

Images = list[dict[str, Any]]


def seen(model: ModelConfig, body: dict[str, Any]) -> Images:
    """The tensors of each image of a chat body, by vLLM's parsing, decoding and processing."""
    _, data, uuids = parse_chat_messages(body["messages"], model, content_format="openai")
    processor = MULTIMODAL_REGISTRY.create_processor(model)
    ids = processor.info.get_tokenizer().convert_tokens_to_ids
    part = [ids("<|vision_start|>"), ids("<|image_pad|>"), ids("<|vision_end|>")]
    items = processor.info.parse_mm_data(data)
    inputs = ProcessorInputs(part * len(data["image"]), items, mm_uuid_items=uuids)
    made = processor.apply(inputs, TimingContext(enabled=False))
    return [{name: summary(value) for name, value in image.get_data().items()} for image in made["mm_kwargs"]["image"]]


def summary(tensor: torch.Tensor) -> dict[str, Any]:
    raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    sha256 = hashlib.sha256(raw).hexdigest()
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype), "sha256": sha256}


def main(directory: str, *bodies: str) -> None:
    kinds = {
        "patches": ModelConfig(directory, dtype="float32"),
        "floats": ModelConfig(directory, dtype="float32", mm_device_do_normalize=False),
    }
    read = [json.loads(Path(body).read_text()) for body in bodies]
    print(json.dumps([{kind: seen(model, body) for kind, model in kinds.items()} for body in read]))


if __name__ == "__main__":
    main(*sys.argv[1:])
