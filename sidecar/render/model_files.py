"""What rendering needs of a model's directory: tokenizer, chat template, image processor and defaults.

Nothing is guessed: files that name what is not supported here raise StartError, and a model whose images are not
supported renders text alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from sidecar.errors import NotRendered, StartError
from sidecar.kernels import families
from sidecar.kernels.grid import ProcessorSpec
from sidecar.render.placeholders import IMAGE_TOKENS

TOKENIZER_FILE: Final = "tokenizer.json"
INSTALL: Final = "pip install 'inference-sidecar[render]'"
# Settings of tokenizers by which transformers changes what tokenizer.json says.
CHANGES: Final = ("add_bos_token", "add_eos_token", "add_prefix_space", "do_lower_case", "split_special_tokens")
# Architectures for which vLLM 0.32 has renderers of its own, beside that for Hugging Face's templates (config/model.py,
# renderers/online_renderer.py).
OTHER_RENDERERS: Final = frozenset(
    [
        "MoonshotKimiaForCausalLM",
        "KimiK3ForConditionalGeneration",
        "DeepseekV32ForCausalLM",
        "DeepseekV4ForCausalLM",
        "DeepseekV4ForConditionalGeneration",
        "DeepseekV41ForCausalLM",
        "InklingForCausalLM",
        "InklingForConditionalGeneration",
        "GptOssForCausalLM",
    ]
)
MISTRAL_FILES: Final = ("tekken.json", "tokenizer.model.v*")
DEFAULTS: Final = (
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
)


@dataclass(frozen=True, slots=True)
class ImageRules:
    """How images of this model become tokens: the processor's geometry, and the token that stands for one."""

    spec: ProcessorSpec
    token: int
    text: str  # where the template takes content as one text


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model as far as rendering needs it. `no_images` says why `images` is None."""

    encode: Callable[[str, bool], list[int]]
    images: ImageRules | None
    no_images: str = ""
    sampling: dict[str, Any] = field(default_factory=dict)


def load(folder: Path) -> ModelFiles:
    """Read a model's directory. Takes up to some seconds. Raises StartError."""
    from sidecar.render.chat_template import read_json

    try:
        import tokenizers
    except ImportError:
        raise StartError(f"rendering needs the package tokenizers: {INSTALL}") from None
    file = folder / TOKENIZER_FILE
    if not file.is_file():
        raise StartError(f"the model directory has no {TOKENIZER_FILE}; name one that has with --model DIR")
    config = read_json(folder / "config.json")
    _check_renderer(folder, config)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as e:  # noqa: BLE001  the package raises nothing more specific
        raise StartError(f"{TOKENIZER_FILE} cannot be used ({type(e).__name__})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _check_tokenizer(tokenizer, read_json(folder / "tokenizer_config.json"))
    images, why = _image_rules(folder, config, tokenizer)
    generation = read_json(folder / "generation_config.json")
    sampling = {name: generation[name] for name in DEFAULTS if generation.get(name) is not None}
    if generation.get("max_new_tokens") is not None:
        sampling["max_tokens"] = generation["max_new_tokens"]

    def encode(text: str, add_special_tokens: bool) -> list[int]:
        try:
            return list(tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
        except (TypeError, UnicodeEncodeError):  # half of a surrogate pair
            raise NotRendered("a text is not valid Unicode") from None

    return ModelFiles(encode, images, why, sampling)


def _check_renderer(folder: Path, config: dict[str, Any]) -> None:
    """Raise StartError for a model whose prompts vLLM makes in another way."""
    if OTHER_RENDERERS.intersection(_architectures(config)) or config.get("is_encoder_decoder"):
        raise StartError(
            "vLLM makes this architecture's prompts with a renderer of its own, which is not supported here"
        )
    if any(next(folder.glob(pattern), None) for pattern in MISTRAL_FILES):
        raise StartError("the model has Mistral's tokenizer files, which vLLM may choose; they are not supported here")


def _architectures(config: dict[str, Any]) -> list[str]:
    listed = config.get("architectures")
    return [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []


def _check_tokenizer(tokenizer: Any, config: dict[str, Any]) -> None:
    """Raise StartError where tokenizer_config.json changes what tokenizer.json says."""
    if config.get("auto_map"):
        raise StartError("the tokenizer is code of the model's own, which is not run here")
    for name in CHANGES:
        if config.get(name):
            raise StartError(f"tokenizer_config.json sets {name}, which is not supported here")
    added = tokenizer.get_added_tokens_decoder()
    listed = config.get("added_tokens_decoder")
    for id, token in (listed if isinstance(listed, dict) else {}).items():
        known = added.get(int(id)) if str(id).isdigit() else None
        wanted = {name: token.get(name) for name in ("content", "special", "lstrip", "rstrip", "single_word")}
        if known is None or any(value is not None and getattr(known, name) != value for name, value in wanted.items()):
            raise StartError(f"tokenizer_config.json and {TOKENIZER_FILE} disagree about token {id}")


def _image_rules(folder: Path, config: dict[str, Any], tokenizer: Any) -> tuple[ImageRules | None, str]:
    """The rules of a model's images, or why there are none."""
    names = _architectures(config)
    known = [IMAGE_TOKENS[name] for name in names if name in IMAGE_TOKENS]
    if len(names) != 1 or not known:
        return None, "prompts with images of this model's architecture are not rendered here"
    spec = families.explain(str(folder))
    if isinstance(spec, str):
        return None, spec
    token, text = known[0]
    id = tokenizer.token_to_id(token)
    if id is None or config.get("image_token_id") not in (None, id):
        return None, f"the tokenizer and config.json disagree about {token}"
    return ImageRules(spec, id, text), ""
