"""The image canary: two images of one colour, whose tokens show whether the engine resizes as the model's files say.

Sizes can be set in two places: in the model's files, which the sidecar reads, and in the engine's arguments (vLLM's
--mm-processor-kwargs). A prepared image is only exact where both agree.

- Three requests of one token each: text alone, a small image, and one at the largest size that the processor makes; a
  wide one where all sizes have as many tokens. Their prompts' tokens are compared with those that the processor's
  geometry counts.
- They go to the engine directly, and belong to no tenant. An image of more than MAX_CANARY_TOKENS tokens is not sent.
- The image is written here as a PNG, so that control needs no image library.
"""

from __future__ import annotations

import asyncio
import base64
import json
import struct
import zlib
from dataclasses import dataclass
from typing import Any, Final

import aiohttp

from sidecar.engines.image_loading import SIZE_DIFFERS, SIZE_UNCHECKED
from sidecar.kernels.grid import Geometry, ProcessorSpec
from sidecar.signals.http_body import read_body

CHAT: Final = "/v1/chat/completions"
# Of one image: Pixtral at its published limit has 4160. Qwen2.5-VL has 16384, which is too much to ask for; at such a
# limit next to nothing is prepared.
MAX_CANARY_TOKENS: Final = 5000
SMALL_SIDE: Final = 64
# Sides to try: the first at which twice the side makes no more tokens is at the processor's limit.
LARGE_SIDES: Final = (448, 672, 1008, 1344, 2016, 2688, 4032)
# Where any image has the same tokens, a wide one shows whether the engine adds crops (Gemma 3's pan-and-scan).
WIDE: Final = (1008, 4032)
# What templates put around an image: two tokens in Qwen's, a few in others'.
MAX_AROUND_IMAGE: Final = 16
# Of Idefics 3's and SmolVLM's: a fake token and a position for each tile, and a line break for each row.
MAX_AROUND_TILE: Final = 2.5
REQUEST_TIMEOUT_S: Final = 60.0
MAX_ANSWER_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class ImageCheck:
    """What the images showed. `reason`: why images pass, or "". `is_final`: the same engine would answer the same."""

    reason: str
    detail: str = ""
    is_final: bool = True


@dataclass(frozen=True, slots=True)
class CanaryImage:
    """A size, and what the processor makes of it."""

    height: int
    width: int
    geometry: Geometry

    def explains(self, tokens: int) -> bool:
        """Whether the image can be what adds this many tokens to a prompt."""
        tiles = self.geometry.tiles if self.geometry.views else 0
        return 0 <= tokens - self.geometry.tokens <= MAX_AROUND_IMAGE + MAX_AROUND_TILE * tiles


def choose_images(spec: ProcessorSpec) -> tuple[CanaryImage, CanaryImage] | str:
    """A small image, and one at the processor's limit or of another shape; or why there are none."""
    small, wide = _image(spec, SMALL_SIDE), CanaryImage(*WIDE, spec.geometry(*WIDE))
    if 0 < wide.geometry.tokens == small.geometry.tokens <= MAX_CANARY_TOKENS:
        return small, wide
    for side in LARGE_SIDES:
        large = _image(spec, side)
        if not large.geometry.tokens:
            return "the model's files do not say how many tokens an image has"
        if large.geometry.tokens > MAX_CANARY_TOKENS:
            return f"an image at the model's limit has more than {MAX_CANARY_TOKENS} tokens"
        if large.geometry.tokens == _image(spec, 2 * side).geometry.tokens:
            return small, large
    return "the model has no limit of size"


async def check_images(
    session: aiohttp.ClientSession, engine: str, headers: dict[str, str], model: str, spec: ProcessorSpec
) -> ImageCheck:
    """Ask the engine. Never raises."""
    try:
        images = choose_images(spec)
    except ValueError:
        images = "the processor accepts no plain image"
    if isinstance(images, str):
        return ImageCheck(SIZE_UNCHECKED, images)
    counts: list[int] = []
    try:
        for image in (None, *images):
            url = None if image is None else await asyncio.to_thread(data_url, image.height, image.width)
            status, tokens = await _prompt_tokens(session, engine, headers, model, url)
            if not tokens:
                is_final = 400 <= status < 500 and status not in (401, 403, 408, 429)
                return ImageCheck(
                    SIZE_UNCHECKED, f"HTTP {status} on {CHAT} with {'an' if url else 'no'} image", is_final
                )
            counts.append(tokens)
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, RecursionError) as e:
        return ImageCheck(SIZE_UNCHECKED, f"no answer on {CHAT} ({type(e).__name__})", is_final=False)
    return judge(counts[0], list(zip(images, counts[1:], strict=True)))


def judge(text: int, seen: list[tuple[CanaryImage, int]]) -> ImageCheck:
    """Compare the tokens of prompts with those that the processor counts. `text`: of the prompt without an image."""
    for image, tokens in seen:
        if not image.explains(tokens - text):
            size, expected = f"{image.width} x {image.height}", image.geometry.tokens
            return ImageCheck(SIZE_DIFFERS, f"an image of {size} has {tokens - text} tokens, by the files {expected}")
    (small, few), (large, many) = seen
    if not large.geometry.views and many - few != large.geometry.tokens - small.geometry.tokens:
        return ImageCheck(SIZE_DIFFERS, "the tokens of a small and a large image do not differ as the files say")
    return ImageCheck("")


def data_url(height: int, width: int) -> str:
    """A PNG of one colour."""
    rows = zlib.compress((b"\0" + b"\x80" * width) * height, 1)
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b""))
    body = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + body).decode()


async def _prompt_tokens(
    session: aiohttp.ClientSession, engine: str, headers: dict[str, str], model: str, url: str | None
) -> tuple[int, int]:
    """The status, and the tokens of the prompt; 0 if the engine does not say."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": "."}]
    if url is not None:
        parts.insert(0, {"type": "image_url", "image_url": {"url": url}})
    body = {"model": model, "messages": [{"role": "user", "content": parts}], "max_tokens": 1, "temperature": 0}
    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
    async with session.post(engine + CHAT, json=body, headers=headers, timeout=timeout) as response:
        if response.status != 200:
            return response.status, 0
        return 200, _read_tokens(await read_body(response, MAX_ANSWER_BYTES))


def _read_tokens(answer: bytes) -> int:
    """`usage.prompt_tokens`, or 0. Raises ValueError if the answer is no JSON."""
    found = json.loads(answer)
    usage = found.get("usage") if isinstance(found, dict) else None
    tokens = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return tokens if isinstance(tokens, int) and not isinstance(tokens, bool) and tokens > 0 else 0


def _image(spec: ProcessorSpec, side: int) -> CanaryImage:
    """Four by three."""
    height, width = side * 3 // 4, side
    return CanaryImage(height, width, spec.geometry(height, width))
