"""Print what a vLLM with the plug-in makes of images, by itself and from files; run by the vLLM environment's python.

    PYTHON tensors.py MODEL "" | floats | half CASES.json

CASES.json: name -> chat bodies without and with files (tensor_files.py). Prints as the last line JSON, name -> the
images' tensors without and with them, as pixels.py does, and how often the image processor ran for the second.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from vllm.config import ModelConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import TimingContext
from vllm.multimodal.processing.inputs import ProcessorInputs
from vllm.plugins import load_general_plugins
from vllm.renderers.chat_utils import parse_chat_messages

KINDS: dict[str, dict[str, Any]] = {
    "": {"dtype": "float32"},
    "floats": {"dtype": "float32", "mm_device_do_normalize": False},
    "half": {"dtype": "bfloat16", "mm_device_do_normalize": False},
}


def main(directory: str, kind: str, cases: str) -> None:
    load_general_plugins()
    model = ModelConfig(directory, **KINDS[kind])
    processor = MULTIMODAL_REGISTRY.create_processor(model)
    runs: list[int] = []
    image_processor = type(processor.info.get_hf_processor().image_processor)
    preprocess = image_processor._preprocess

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        runs.append(1)
        return preprocess(self, *args, **kwargs)

    image_processor._preprocess = counted

    def seen(body: dict[str, Any]) -> list[Any]:
        _, data, uuids = parse_chat_messages(body["messages"], model, content_format="openai")
        ids = processor.info.get_tokenizer().convert_tokens_to_ids
        part = [ids("<|vision_start|>"), ids("<|image_pad|>"), ids("<|vision_end|>")]
        items = processor.info.parse_mm_data(data)
        made = processor.apply(
            ProcessorInputs(part * len(data["image"]), items, mm_uuid_items=uuids), TimingContext(enabled=False)
        )
        tensors = [
            {name: summary(value) for name, value in image.get_data().items()} for image in made["mm_kwargs"]["image"]
        ]
        return [tensors, made["prompt_token_ids"]]

    found = {}
    for name, (without, through) in json.loads(Path(cases).read_text()).items():
        own = seen(without)
        assert runs, "the counter sees the processor"
        runs.clear()
        found[name] = [own, seen(through), len(runs)]
    print(json.dumps(found))


def summary(tensor: torch.Tensor) -> dict[str, Any]:
    import hashlib

    raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype), "sha256": hashlib.sha256(raw).hexdigest()}


if __name__ == "__main__":
    main(*sys.argv[1:])
