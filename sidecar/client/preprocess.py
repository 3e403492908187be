"""A client of `POST /v1/preprocess`: encoded images in, the tensors of the model's processor out, as numpy arrays.

    from sidecar.client import Client

    async with Client("http://127.0.0.1:8080") as client:
        made = await client.preprocess([Path("a.jpg"), png_bytes])
        made.tensors["pixel_values"], made.images[0].tokens

Rules: it needs only numpy and aiohttp. Every response is checked before it is used and bounded before it is read. With
`shm=True` the tensors are mapped from shared memory: the client must see the sidecar's folder.
"""

from __future__ import annotations

import asyncio
import io
import json
import math
import mmap
import os
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Self

import aiohttp
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Data = memoryview | mmap.mmap
Values = Literal["", "float32", "bfloat16", "float16", "uint8"]

# BF16 as bits: numpy has no such type.
DTYPES: Final = {"I64": "<i8", "I32": "<i4", "F32": "<f4", "BF16": "<u2", "F16": "<f2", "U8": "|u1"}
SEGMENT_NAME: Final = re.compile(r"sidecar-images-[a-z0-9_]{1,32}/out-[0-9a-f]{32}")
HEADER_LENGTH: Final = struct.Struct("<Q")
MAX_HEADER_BYTES: Final = 4 << 20  # of the JSON before the tensors, or instead of them
MAX_ANSWER_BYTES: Final = 2 << 30
READ_BUFFER_BYTES: Final = 1 << 20
REQUEST_TIMEOUT_S: Final = 60.0


class PreprocessError(Exception):
    """A failed call. `code` is the sidecar's reason; `status` is 0 without a response; `retry_after` is in seconds."""

    def __init__(self, message: str, code: str, status: int = 0, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.code, self.status, self.retry_after = code, status, retry_after


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """One image's final size, patch grid (t, h, w; 0 if there is none), and tokens that the model sees."""

    format: str
    height: int
    width: int
    grid_thw: tuple[int, int, int]
    tokens: int
    content_hash: str  # of the image and the processor


@dataclass(frozen=True, slots=True)
class Preprocessed:
    """The tensors of all images by the processor's own names, in the order of the images.

    `processor` changes with anything that changes a pixel.
    """

    tensors: dict[str, Array]
    images: tuple[ImageLayout, ...]
    processor: str


class Client:
    """A client of the relay at `url`. `shm_dir`: its /dev/shm in this process; `max_bytes`: limit of a response."""

    def __init__(
        self,
        url: str,
        *,
        shm_dir: str = "/dev/shm",
        seconds: float = REQUEST_TIMEOUT_S,
        max_bytes: int = MAX_ANSWER_BYTES,
    ) -> None:
        self._url = url.rstrip("/") + "/v1/preprocess"
        self._shm_dir = Path(shm_dir)
        self._max_bytes = max_bytes
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=seconds), read_bufsize=READ_BUFFER_BYTES, auto_decompress=False
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._session.close()

    async def preprocess(
        self,
        images: Iterable[bytes | Path],
        *,
        values: Values = "",
        shm: bool = False,
        headers: Mapping[str, str] | None = None,
    ) -> Preprocessed:
        """Prepare encoded images. `values="uint8"` skips rescaling and normalising. Raises PreprocessError, OSError.

        `headers` are added to the request, such as the tenant's.
        """
        form = await _make_form(images)
        sent = dict(headers or {}) | ({"x-sidecar-handoff": "shm"} if shm else {})
        query = {"values": values} if values else {}
        try:
            async with self._session.post(self._url, data=form, params=query, headers=sent) as answer:
                if answer.status != 200:
                    raise await _read_error(answer)
                data = await _read_body(answer, MAX_HEADER_BYTES if shm else self._max_bytes)
        except (aiohttp.ClientError, TimeoutError) as e:
            raise PreprocessError(f"no response from the sidecar: {type(e).__name__}", "unreachable") from e
        if shm:
            return await asyncio.to_thread(self._map_shared, bytes(data))
        return parse(data)

    def _map_shared(self, text: bytes) -> Preprocessed:
        layout = _parse_object(text)
        try:
            (segment,) = layout["segments"]
            name, size = str(segment["name"]), int(segment["bytes"])
        except (KeyError, TypeError, ValueError):
            raise _invalid("it names no segment") from None
        if not SEGMENT_NAME.fullmatch(name) or not 0 < size <= self._max_bytes:
            raise _invalid("its segment has an invalid name or size")
        return parse(_map_file(self._shm_dir / name, size))


def parse(data: Data) -> Preprocessed:
    """Parse the sidecar's safetensors file; the arrays share the memory of `data`. Raises PreprocessError."""
    head, start = _parse_header(data)
    described = head.pop("__metadata__", {})
    try:
        tensors = {str(name): _map_array(data, start, **entry) for name, entry in head.items()}
        images = tuple(ImageLayout(**i | {"grid_thw": tuple(i["grid_thw"])}) for i in json.loads(described["images"]))
        return Preprocessed(tensors, images, str(described["processor"]))
    except (KeyError, TypeError, ValueError) as e:
        raise _invalid(f"not the tensors of this version ({type(e).__name__})") from None


def _parse_header(data: Data) -> tuple[dict[str, Any], int]:
    """The JSON header, and the offset of the tensors."""
    if len(data) < HEADER_LENGTH.size:
        raise _invalid("it is cut off")
    (length,) = HEADER_LENGTH.unpack(data[: HEADER_LENGTH.size])
    start = HEADER_LENGTH.size + length
    if length > MAX_HEADER_BYTES or start > len(data):
        raise _invalid("its header is cut off or too long")
    return _parse_object(bytes(data[HEADER_LENGTH.size : start])), start


def _map_array(data: Data, start: int, dtype: str, shape: list[int], data_offsets: list[int]) -> Array:
    """One tensor, without a copy. Raises KeyError, TypeError or ValueError for an invalid entry."""
    kind = np.dtype(DTYPES[dtype])
    first, end = data_offsets
    count = math.prod(shape)
    if first < 0 or count < 1 or min(shape) < 0 or end - first != count * kind.itemsize or start + end > len(data):
        raise ValueError("a tensor outside the file")
    return np.frombuffer(data, kind, count, start + first).reshape(shape)


def _map_file(path: Path, size: int) -> mmap.mmap:
    """Map the file of `size` bytes copy-on-write and unlink it. Raises PreprocessError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except PermissionError:
        text = "the tensors in shared memory may not be read: run as root or as the sidecar's user"
        raise PreprocessError(text, "shm_permission") from None
    except OSError:
        text = "the tensors are not in shared memory here: is the sidecar's /dev/shm mounted here, as shm_dir?"
        raise PreprocessError(text, "shm_missing") from None
    try:
        path.unlink(missing_ok=True)
        if os.fstat(fd).st_size != size:
            raise _invalid("its segment has another size")
        return mmap.mmap(fd, size, access=mmap.ACCESS_COPY)
    finally:
        os.close(fd)


async def _make_form(images: Iterable[bytes | Path]) -> aiohttp.FormData:
    form, given = aiohttp.FormData(), list(images)
    if not given:
        raise PreprocessError("no image was given", "bad_request")
    for image in given:
        file = await asyncio.to_thread(image.read_bytes) if isinstance(image, Path) else image
        form.add_field("image", io.BytesIO(file), filename="image", content_type="application/octet-stream")
    return form


async def _read_body(answer: aiohttp.ClientResponse, max_bytes: int) -> memoryview:
    """Read the response into one buffer of the announced length."""
    size = answer.content_length
    if size is None or size > max_bytes:
        raise _invalid(f"it announces no length, or more than {max_bytes} bytes")
    buffer = np.empty(size, np.uint8).data
    at = 0
    async for chunk in answer.content.iter_any():
        buffer[at : at + len(chunk)] = chunk
        at += len(chunk)
    return buffer[:at]


async def _read_error(answer: aiohttp.ClientResponse) -> PreprocessError:
    """The sidecar's error in OpenAI's shape, or the status of any other server."""
    text = b""
    async for chunk in answer.content.iter_any():  # other servers may announce no length
        text += chunk
        if len(text) > MAX_HEADER_BYTES:
            break
    try:
        error = json.loads(text)["error"]
        message, code = str(error["message"]), str(error["code"])
    except (ValueError, KeyError, TypeError):
        message = f"status {answer.status}, not from a sidecar: is the URL that of its relay (--listen)?"
        code = "unknown"
    later = answer.headers.get("retry-after", "")
    return PreprocessError(message, code, answer.status, float(later) if later.isdecimal() else None)


def _parse_object(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise _invalid("it holds no JSON object")
    return found


def _invalid(why: str) -> PreprocessError:
    return PreprocessError(f"cannot read the sidecar's response: {why}", "unreadable")
