"""Make the tiny models that llama.cpp serves: random weights from a seed, a tokenizer of bytes, a ChatML template.

    PYTHON tiny_gguf.py text DIR       DIR/tiny.gguf: Qwen2, text in, text out
    PYTHON tiny_gguf.py vision DIR     the same, and DIR/tiny.mmproj.gguf, a tower for images
    PYTHON tiny_gguf.py two DIR        two models of text, tiny and aside

Rules: run by the llama.cpp environment's python, which has numpy and gguf and no torch. No hub is contacted. The same
seed gives the same weights. A bias on the output keeps all that is generated printable, and never an end of the text.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import gguf
import numpy as np

SEED = 20
WIDTH, INNER, LAYERS, HEADS, KV_HEADS = 256, 512, 8, 4, 2
CONTEXT = 8192
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
TEMPLATE = """\
{%- if tools -%}<|im_start|>system
You may call functions: <tools>{%- for tool in tools %}{{ tool | tojson }}{% endfor -%}</tools>
Answer with <tool_call>{"name": NAME, "arguments": ARGUMENTS}</tool_call><|im_end|>
{% endif -%}
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""
EDGE, PATCH = 56, 14  # the side of an image and of a patch, in pixels


def byte_letters() -> list[str]:
    """The printable letter that stands for each byte, as in GPT-2: bytes that print stand for themselves."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (chr(0x100 + i) for i in range(256))
    return [chr(byte) if byte in plain else next(others) for byte in range(256)]


def add_words(writer: gguf.GGUFWriter) -> list[str]:
    """Write the vocabulary: special tokens, all bytes, and one merge, without which llama.cpp refuses the file."""
    letters = byte_letters()
    merged = letters[ord(" ")] + "t"
    tokens = [*SPECIAL, *letters, merged]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * len(SPECIAL) + [gguf.TokenType.NORMAL] * (len(letters) + 1))
    writer.add_token_merges([f"{letters[ord(' ')]} t"])
    writer.add_eos_token_id(SPECIAL.index("<|im_end|>"))
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    return tokens


def write_text(path: Path) -> None:
    random = np.random.default_rng(SEED)
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_name("tiny")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(1e4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    tokens = add_words(writer)

    def weights(name: str, *shape: int) -> None:
        writer.add_tensor(name, random.normal(0, 0.1, shape).astype(np.float32))

    def ones(name: str) -> None:
        writer.add_tensor(name, np.ones(WIDTH, np.float32))

    kv = WIDTH // HEADS * KV_HEADS
    weights("token_embd.weight", len(tokens), WIDTH)
    for block in range(LAYERS):
        for part, height in (("attn_q", WIDTH), ("attn_k", kv), ("attn_v", kv)):
            weights(f"blk.{block}.{part}.weight", height, WIDTH)
            weights(f"blk.{block}.{part}.bias", height)
        weights(f"blk.{block}.attn_output.weight", WIDTH, WIDTH)
        weights(f"blk.{block}.ffn_gate.weight", INNER, WIDTH)
        weights(f"blk.{block}.ffn_up.weight", INNER, WIDTH)
        weights(f"blk.{block}.ffn_down.weight", WIDTH, INNER)
        ones(f"blk.{block}.attn_norm.weight")
        ones(f"blk.{block}.ffn_norm.weight")
    ones("output_norm.weight")
    weights("output.weight", len(tokens), WIDTH)
    printable = [i >= len(SPECIAL) and token.isascii() and token.isprintable() for i, token in enumerate(tokens)]
    writer.add_tensor("output.bias", np.where(printable, 0, -1e4).astype(np.float32))
    finish(writer)


def write_tower(path: Path) -> None:
    """A tower of the simplest kind that llama.cpp has for images, LLaVA's: each image becomes 16 tokens."""
    random = np.random.default_rng(SEED)
    width, layers = 64, 2
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_name("tiny tower")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_uint32("clip.vision.image_size", EDGE)
    writer.add_uint32("clip.vision.patch_size", PATCH)
    writer.add_uint32("clip.vision.embedding_length", width)
    writer.add_uint32("clip.vision.feed_forward_length", 2 * width)
    writer.add_uint32("clip.vision.projection_dim", WIDTH)
    writer.add_uint32("clip.vision.block_count", layers)
    writer.add_uint32("clip.vision.attention.head_count", 2)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    writer.add_array("clip.vision.image_mean", [0.48145466, 0.4578275, 0.40821073])
    writer.add_array("clip.vision.image_std", [0.26862954, 0.26130258, 0.27577711])
    writer.add_bool("clip.use_gelu", True)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)

    def weights(name: str, *shape: int) -> None:
        writer.add_tensor(name, random.normal(0, 0.3, shape).astype(np.float32))

    def layer(name: str, height: int, breadth: int) -> None:
        weights(f"{name}.weight", height, breadth)
        weights(f"{name}.bias", height)

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))
        writer.add_tensor(f"{name}.bias", np.zeros(width, np.float32))

    weights("v.patch_embd.weight", width, 3, PATCH, PATCH)
    weights("v.class_embd", width)
    weights("v.position_embd.weight", (EDGE // PATCH) ** 2 + 1, width)
    norm("v.pre_ln")
    for block in range(layers):
        for part in ("attn_q", "attn_k", "attn_v", "attn_out"):
            layer(f"v.blk.{block}.{part}", width, width)
        layer(f"v.blk.{block}.ffn_down", 2 * width, width)  # LLaVA's converter swapped these two names
        layer(f"v.blk.{block}.ffn_up", width, 2 * width)
        norm(f"v.blk.{block}.ln1")
        norm(f"v.blk.{block}.ln2")
    layer("mm.0", WIDTH, width)
    layer("mm.2", WIDTH, WIDTH)
    finish(writer)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main(kind: str, folder: Path) -> None:
    folder.mkdir(parents=True)
    write_text(folder / "tiny.gguf")
    if kind == "vision":
        write_tower(folder / "tiny.mmproj.gguf")
    if kind == "two":
        shutil.copy(folder / "tiny.gguf", folder / "aside.gguf")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
