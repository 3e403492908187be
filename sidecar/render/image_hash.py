"""The name that vLLM gives an image: a digest of the file as it came and of the model, or the request's own `uuid`.

vLLM 0.32, vllm/multimodal/hasher.py and processing/inputs.py: no pixel takes part. The digest's input is a stream of
chunks, each after its length in eight bytes, in which a tag says what kind of value comes next. An image that has to
be converted to RGB has the conversion's options next to its bytes.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol

from sidecar.errors import StartError

SEQUENCE, MAPPING, LEAF = b"\x01", b"\x02", b"\x03"
# What vLLM converts an image to by default (ImageMediaIO), and on which colour it puts transparent parts.
CONVERSION: Final = {"image_mode": "RGB", "rgba_background_color": (255, 255, 255)}
ALGORITHMS: Final = ("blake3", "sha256", "sha512")


class Digest(Protocol):
    """What hashlib and blake3 have in common."""

    def update(self, data: Any, /) -> object: ...

    def hexdigest(self) -> str: ...


def hasher(algorithm: str) -> Callable[[], Digest]:
    """A new digest of vLLM's `--mm-hasher-algorithm`. Raises StartError where its package is missing."""
    if algorithm != "blake3":
        return lambda: hashlib.new(algorithm)
    try:
        from blake3 import blake3
    except ImportError:
        raise StartError("image hashes need the package blake3: pip install 'inference-sidecar[render]'") from None
    return lambda: blake3()


def image_hash(new_digest: Callable[[], Digest], model_id: str, data: bytes, *, is_rgb: bool) -> str:
    """The hash of an image file for the model that the engine was started with."""
    digest = new_digest()
    converted = {"io_config": CONVERSION, "data": data}
    for chunk in _members({"image": _Item("image", data if is_rgb else converted), "model_id": model_id}):
        digest.update(chunk)
    return digest.hexdigest()


class _Item:
    """A value that names itself again within its own leaf."""

    def __init__(self, name: str, value: Any) -> None:
        self.name, self.value = name, value


def _members(values: dict[str, Any]) -> Iterator[bytes]:
    for name, value in values.items():
        yield from _framed(name.encode())
        yield from _value(value)


def _value(value: Any) -> Iterator[bytes]:
    match value:
        case dict():
            yield MAPPING + _length(len(value))
            yield from _members(value)
        case tuple():
            yield SEQUENCE + _length(len(value))
            for item in value:
                yield from _value(item)
        case _Item():
            yield LEAF
            yield from _members({value.name: value.value})
        case str():
            yield LEAF
            yield from _framed(value.encode())
        case int():
            yield LEAF
            yield from _framed(struct.pack("<q", value))
        case _:
            yield LEAF
            yield from _framed(value)


def _framed(chunk: bytes) -> Iterator[bytes]:
    yield _length(len(chunk))
    yield chunk


def _length(count: int) -> bytes:
    return struct.pack("<Q", count)
