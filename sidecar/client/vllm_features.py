"""vLLM's `features` for `POST /inference/v1/generate` (--enable-scale-out), from the tensors of sidecar.client.preprocess: no image goes to the engine.

Pure. Written for vLLM 0.32 and held against its own `/render` (tests/vllm/test_generate.py): the same bytes, but for the order of
an item's tensors, which vLLM takes from a set, so that it differs from process to process. Only processors that make patches
(`pixel_values` and `image_grid_thw`, as Qwen's) are known. vLLM normalises those models' pixels on its device: ask for
`values="uint8"`, and for floats only where it runs with `--no-mm-device-do-normalize`.
"""

from __future__ import annotations

import base64
import hashlib
import struct
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, Final

import numpy as np

from sidecar.client.preprocess import Array, Preprocessed

RAW: Final = 3  # vLLM's msgpack extension for the bytes of an array
NAMES: Final = ("uint8", "float32", "int64")  # as numpy and vLLM call them


def expanded(token_ids: Sequence[int], image_token: int, made: Preprocessed) -> list[int]:
    """A prompt with one `image_token` for each image, with as many as the model sees. Raises ValueError."""
    if list(token_ids).count(image_token) != len(made.images):
        raise ValueError("the prompt must have one image token for each image")
    counts = iter([image.tokens for image in made.images])
    return [t for token in token_ids for t in ([token] * next(counts) if token == image_token else [token])]


def features(token_ids: Sequence[int], image_token: int, made: Preprocessed, salt: bytes) -> dict[str, Any]:
    """`features` for an expanded prompt.

    vLLM takes an image's hash for the image itself: `salt` is a secret, another one for each tenant, so that nobody can name
    the image of someone else. Raises ValueError for tensors of another kind of processor.
    """
    if set(made.tensors) != {"pixel_values", "image_grid_thw"}:
        raise ValueError("only the tensors of processors that make patches are known here")
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
    """Each image's tensors with how vLLM puts them together again; for `packed`."""
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
    """msgpack of what an item is made of: None, bool, small texts, non-negative integers, lists, dicts, arrays. Raises TypeError."""
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
        case np.ndarray() if value.dtype.name in NAMES:
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
    """A length of msgpack: in the code itself where it is small, else in 1, 2 or 4 bytes."""
    if count < below:
        return bytes([fixed | count])
    for code, form, most in zip(codes, (">B", ">H", ">I"), (1 << 8, 1 << 16, 1 << 32), strict=True):
        if code is not None and count < most:
            return bytes([code]) + struct.pack(form, count)
    raise TypeError("too long")


def _raw(array: Array) -> bytes:
    data = np.ascontiguousarray(array).tobytes()
    return _length(len(data), 0, 0, (0xC7, 0xC8, 0xC9)) + bytes([RAW]) + data
