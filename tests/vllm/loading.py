"""Print what an engine's own loading code and the Hugging Face processor make of image files; run by engine_sources.

    PYTHON loading.py vllm|sglang|mistral PROCESSOR.json FOLDER [PROCESSOR.json FOLDER ...]

Prints a JSON object: the version of the engine and of transformers, and for each folder, by file name, the SHA-256 of
`pixel_values`, or "refused"; null where transformers has no such processor. With {"image_processor_type": "pixels"} it
is that of the pixels alone. Nothing of the sidecar is imported.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

Load = Callable[[bytes], Any]


def by_vllm() -> tuple[str, Load]:
    import vllm
    from vllm.multimodal.media.image import ImageMediaIO

    io = ImageMediaIO()

    def load(data: bytes) -> Any:
        loaded = io.load_base64("image/unknown", base64.b64encode(data).decode())
        return getattr(loaded, "media", loaded)

    return vllm.__version__, load


def by_sglang() -> tuple[str, Load]:
    from sglang.srt.managers.schedule_batch import Modality
    from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor

    def load(data: bytes) -> Any:
        url = f"data:image/unknown;base64,{base64.b64encode(data).decode()}"
        return BaseMultimodalProcessor._load_single_item(url, Modality.IMAGE)

    return version("sglang"), load


def hugging_face(config: dict[str, Any]) -> Callable[[Any], Any] | None:
    import numpy
    import torch
    import transformers

    name = config.pop("image_processor_type")
    if name == "pixels":
        return lambda image: torch.from_numpy(numpy.array(image))
    if not hasattr(transformers, name):
        return None
    processor = getattr(transformers, name)(**config)
    return lambda image: processor(images=[image], return_tensors="pt")["pixel_values"]


def mistral(config: dict[str, Any]) -> Callable[[Any], Any]:
    """As vLLM calls it with Mistral's tokenizer (transformers_utils/processors/pixtral.py)."""
    import torch
    from mistral_common.protocol.instruct.chunk import ImageChunk
    from mistral_common.tokens.tokenizers.image import ImageConfig, ImageEncoder, SpecialImageIDs

    sizes = ImageConfig(image_patch_size=config["patch_size"], max_image_size=config["size"]["longest_edge"])
    encoder = ImageEncoder(sizes, SpecialImageIDs(img=1, img_break=2, img_end=3))
    return lambda image: torch.tensor(encoder(ImageChunk(image=image)).image)


def main(engine: str, *pairs: str) -> None:
    warnings.simplefilter("ignore")
    release, load = by_sglang() if engine == "sglang" else by_vllm()
    made: dict[str, dict[str, str] | None] = {}
    for config_path, folder in zip(pairs[::2], pairs[1::2], strict=True):
        config = json.loads(Path(config_path).read_text())
        process = mistral(config) if engine == "mistral" else hugging_face(config)
        made[folder] = None if process is None else all_of(folder, load, process)
    print(json.dumps({"engine": release, "transformers": version("transformers"), "made": made}))


def all_of(folder: str, load: Load, process: Callable[[Any], Any]) -> dict[str, str]:
    """What is made of each file of a folder, by its name."""
    made: dict[str, str] = {}
    for path in sorted(Path(folder).iterdir()):
        try:
            values = process(load(path.read_bytes()))
        except Exception:  # noqa: BLE001  whatever it is, the engine refuses the image
            made[path.name] = "refused"
        else:
            raw = values.contiguous().numpy().tobytes()
            made[path.name] = f"{tuple(values.shape)} {hashlib.sha256(raw).hexdigest()}"
    return made


if __name__ == "__main__":
    main(*sys.argv[1:])
