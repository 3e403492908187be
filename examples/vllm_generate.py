"""Ask a vLLM about images through its token interface, with the sidecar's tensors instead of images.

    pip install '.[client]'
    vllm serve Qwen/Qwen2-VL-2B-Instruct --enable-scale-out
    sidecar run --engine http://127.0.0.1:8000 --model DIRECTORY_OF_THE_MODEL
    python examples/vllm_generate.py "What is in these pictures?" a.jpg b.png

Your own program needs `expanded` and `features`: they make the body of `POST /inference/v1/generate`. Written for vLLM
0.32 and compared with its own `/render` (tests/vllm/test_generate.py): the same bytes, except for the order of an
item's tensors, which vLLM takes from a set. The format is internal to vLLM and may change with any version. Only
processors that make patches (`pixel_values` and `image_grid_thw`, like Qwen's) are supported, with the prompt of Qwen's
chat template. vLLM normalises those models' pixels on its device and expects bytes; with `--no-mm-device-do-normalize`
it expects floats (`--floats`).
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import secrets
import struct
import sys
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Final

import aiohttp
import numpy as np

from sidecar.client import Client, Preprocessed, PreprocessError

IMAGE_TOKEN: Final = "<|image_pad|>"
PROMPT: Final = "<|im_start|>user\n{images}{question}<|im_end|>\n<|im_start|>assistant\n"
RAW: Final = 3  # vLLM's msgpack extension for the bytes of an array
DTYPE_NAMES: Final = ("uint8", "float32", "int64")  # in numpy and vLLM


def expanded(token_ids: Sequence[int], image_token: int, made: Preprocessed) -> list[int]:
    """Replace the one `image_token` of each image by as many as the model sees. Raises ValueError."""
    if list(token_ids).count(image_token) != len(made.images):
        raise ValueError("the prompt must have one image token for each image")
    counts = iter([image.tokens for image in made.images])
    return [t for token in token_ids for t in ([token] * next(counts) if token == image_token else [token])]


def features(token_ids: Sequence[int], image_token: int, made: Preprocessed, salt: bytes) -> dict[str, Any]:
    """`features` for an expanded prompt.

    vLLM identifies an image by its hash: `salt` is a secret of each tenant, so that no one can name another tenant's
    image. Raises ValueError for tensors of another kind of processor.
    """
    if set(made.tensors) != {"pixel_values", "image_grid_thw"}:
        raise ValueError("only the tensors of processors that make patches are supported")
    starts = list(accumulate((image.tokens for image in made.images), initial=0))
    places = [at for at, token in enumerate(token_ids) if token == image_token]
    if len(places) != starts[-1]:
        raise ValueError("the prompt must be expanded: as many image tokens as the images have")
    names = [hashlib.blake2b(i.content_hash.encode(), key=salt, digest_size=32).hexdigest() for i in made.images]
    holders = [{"offset": places[first], "length": end - first} for first, end in pairwise(starts)]
    return {
        "mm_hashes": {"image": names},
        "mm_placeholders": {"image": holders},
        "kwargs_data": {"image": [base64.b64encode(packed(item)).decode() for item in items(made)]},
    }


def items(made: Preprocessed) -> list[dict[str, Any]]:
    """Each image's tensors, and how vLLM joins them; for `packed`."""
    grids, patches = made.tensors["image_grid_thw"], made.tensors["pixel_values"]
    rows = list(accumulate((int(np.prod(grid)) for grid in grids), initial=0))
    slices = [[[first, end, None]] for first, end in pairwise(rows)]
    flat = ["flat", {"keep_on_cpu": False, "slices": slices, "dim": 0}]
    whole = ["batched", {"keep_on_cpu": True}]
    return [
        {
            "pixel_values": {"data": patches[first:end], "field": flat},
            "image_grid_thw": {"data": grid, "field": whole},
        }
        for (first, end), grid in zip(pairwise(rows), grids, strict=True)
    ]


def packed(value: Any) -> bytes:
    """msgpack of None, bool, short strings, non-negative integers, lists, dicts and arrays. Raises TypeError."""
    match value:
        case None:
            return b"\xc0"
        case bool():
            return b"\xc3" if value else b"\xc2"
        case int() if value >= 0:
            return _integer(value)
        case str() if len(value.encode()) < 32:
            return bytes([0xA0 | len(value.encode())]) + value.encode()
        case dict() if len(value) < 16:
            return bytes([0x80 | len(value)]) + b"".join(packed(k) + packed(v) for k, v in value.items())
        case list() | tuple():
            return _length(len(value), 0x90, 16, (None, 0xDC, 0xDD)) + b"".join(map(packed, value))
        case np.ndarray() if value.dtype.name in DTYPE_NAMES:
            return b"\x93" + packed(value.dtype.name) + packed(value.shape) + _raw(value)
    raise TypeError(f"not part of an item: {type(value).__name__}")


def _integer(value: int) -> bytes:
    if value < 128:
        return bytes([value])
    for code, form, most in ((0xCC, ">B", 1 << 8), (0xCD, ">H", 1 << 16), (0xCE, ">I", 1 << 32)):
        if value < most:
            return bytes([code]) + struct.pack(form, value)
    return b"\xcf" + struct.pack(">Q", value)


def _length(count: int, fixed: int, below: int, codes: tuple[int | None, int, int]) -> bytes:
    """A msgpack length: in the code itself if it is small, else in 1, 2 or 4 bytes."""
    if count < below:
        return bytes([fixed | count])
    for code, form, most in zip(codes, (">B", ">H", ">I"), (1 << 8, 1 << 16, 1 << 32), strict=True):
        if code is not None and count < most:
            return bytes([code]) + struct.pack(form, count)
    raise TypeError("too long")


def _raw(array: np.ndarray[Any, Any]) -> bytes:
    data = np.ascontiguousarray(array).tobytes()
    return _length(len(data), 0, 0, (0xC7, 0xC8, 0xC9)) + bytes([RAW]) + data


async def ask(url: str, question: str, images: Sequence[Path], *, floats: bool, max_tokens: int) -> str:
    """The model's answer, through the relay at `url`. Raises PreprocessError, ClientError, OSError or ValueError."""
    async with Client(url) as client, aiohttp.ClientSession(raise_for_status=True) as http:

        async def post(path: str, **body: Any) -> Any:
            async with http.post(url + path, json=body) as answer:
                return await answer.json()

        made = await client.preprocess(images, values="" if floats else "uint8")
        async with http.get(url + "/v1/models") as answer:
            model = (await answer.json())["data"][0]["id"]

        async def tokens(text: str) -> list[int]:
            return list((await post("/tokenize", model=model, prompt=text, add_special_tokens=False))["tokens"])

        (image_token,) = await tokens(IMAGE_TOKEN)
        places = f"<|vision_start|>{IMAGE_TOKEN}<|vision_end|>" * len(images)
        ids = expanded(await tokens(PROMPT.format(images=places, question=question)), image_token, made)
        # a service keeps one per tenant, so that vLLM's cache recognises its images
        salt = secrets.token_bytes(32)
        generated = await post(
            "/inference/v1/generate",
            model=model,
            token_ids=ids,
            features=features(ids, image_token, made, salt),
            sampling_params={"max_tokens": max_tokens, "temperature": 0},
        )
        return str((await post("/detokenize", model=model, tokens=generated["choices"][0]["token_ids"]))["prompt"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the answer; on failure print one line of what is wrong and return 1."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("question")
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="the sidecar's relay (--listen)")
    parser.add_argument("--floats", action="store_true", help="for a vLLM with --no-mm-device-do-normalize")
    parser.add_argument("--max-tokens", type=int, default=64)
    chosen = parser.parse_args(arguments)
    asking = ask(
        chosen.url.rstrip("/"), chosen.question, chosen.images, floats=chosen.floats, max_tokens=chosen.max_tokens
    )
    try:
        print(asyncio.run(asking))
    except (PreprocessError, aiohttp.ClientError, OSError, ValueError) as e:
        print(f"no answer: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
