"""Build requests of a given shape, and read what they used from the response.

Prompts are random and photos are new, so that nothing is cached by accident. The engine's `usage` is what counts.
"""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

import aiohttp

from sidecar.events import RequestSize
from sidecar.tools.calibrate.shapes import GridShape
from sidecar.tools.synthetic_photos import pixels

WORDS: Final = ["red", "blue", "tree", "house", "seven", "river", "stone", "light", "paper", "north", "glass", "winter"]
# Until it is measured: about the maximum, for a tokenizer without any of these words.
TOKENS_PER_WORD: Final = 3.0
_picture = cache(pixels)


@dataclass(frozen=True, slots=True)
class PromptTarget:
    """The engine, a session to reach it, and its prompt format.

    `ids`: it accepts token ids, of which the first `vocabulary` are safe; otherwise prompts are words.
    `tokens`: encoder tokens of one photo, by its longer side; empty if it accepts none. `counted`: what `usage` counts
    for it, and at side 0 what it counts for the text of such a request.
    """

    session: aiohttp.ClientSession
    url: str
    model: str = ""
    key: str = ""
    ids: bool = True
    vocabulary: int = 256
    tokens_per_word: float = TOKENS_PER_WORD
    tokens: Mapping[int, int] = field(default_factory=dict)
    counted: Mapping[int, int] = field(default_factory=dict)

    @property
    def headers(self) -> dict[str, str]:
        """The headers of every request."""
        return {"authorization": f"Bearer {self.key}"} if self.key else {}


# Fewer tokens are no image: the engine counts a placeholder.
MIN_COUNTED_TOKENS: Final = 32

Prompt = tuple[str, dict[str, Any]]  # a request's path and body


class Prompts:
    """Builds new requests. Those of one lane share a cached prefix, as the turns of a conversation do.

    One prefix for all would be cheaper than in service: data that all requests read stays in the processor's caches.
    """

    def __init__(self, target: PromptTarget, seed: int = 0) -> None:
        self._target = target
        self._random = random.Random(seed)
        self._shifts = random.Random(seed)
        self._prefixes: dict[int, list[int] | list[str]] = {}

    def lead(self, shape: GridShape, lane: int = 0) -> Prompt:
        """The request that puts the cached prefix of a lane into the engine's cache."""
        prefix = self._prefixes[lane] = self._pieces(shape.cached)
        return self._completion([*prefix, *self._pieces(1)], 1)

    def next(self, shape: GridShape, lane: int = 0) -> Prompt:
        """A request of this shape, a chat if it has a side. A photo takes milliseconds: call this on a thread."""
        if shape.side:
            return self._chat(shape)
        prefix = self._prefixes[lane] if shape.cached else []
        return self._completion([*prefix, *self._pieces(shape.uncached)], shape.output)

    def _completion(self, pieces: list[int | str], output: int) -> Prompt:
        prompt = pieces if self._target.ids else " ".join(map(str, pieces))
        return "/v1/completions", {"prompt": prompt, **self._common(output)}

    def _chat(self, shape: GridShape) -> Prompt:
        urls = [photo_url(shape.side, self._shifts.getrandbits(32)) for _ in range(shape.images)]
        content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        text = {"type": "text", "text": " ".join(self._words(shape.uncached))}
        return "/v1/chat/completions", {
            "messages": [{"role": "user", "content": [*content, text]}],
            **self._common(shape.output),
        }

    def _common(self, output: int) -> dict[str, Any]:
        length = {"max_tokens": output, "min_tokens": output, "ignore_eos": True}
        return {"model": self._target.model, **length, "temperature": 0.0, "stream": False}

    def _pieces(self, tokens: int) -> list[int] | list[str]:
        """As many ids or words as make about `tokens` tokens."""
        return self._ids(tokens) if self._target.ids else self._words(tokens)

    def _ids(self, tokens: int) -> list[int]:
        return [self._random.randrange(self._target.vocabulary) for _ in range(tokens)]

    def _words(self, tokens: int) -> list[str]:
        return self._random.choices(WORDS, k=max(1, round(tokens / self._target.tokens_per_word)))


def photo_url(side: int, seed: int) -> str:
    """A 4:3 JPEG as a data URL, different for each seed: one picture per size, shifted cyclically."""
    import numpy as np
    from PIL import Image

    out, picture = io.BytesIO(), _picture(side, side * 3 // 4, seed=side)
    Image.fromarray(np.roll(picture, divmod(seed, side), axis=(0, 1))).save(out, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


@dataclass(frozen=True, slots=True)
class RequestUse:
    """What a request used according to the response. `tells_cached`: it reports how much of the prompt was cached."""

    work: RequestSize
    tells_cached: bool


def read_usage(answer: Any, shape: GridShape, target: PromptTarget) -> RequestUse:
    """The use according to a response. Cached tokens are in OpenAI's details or in llama.cpp's timings.

    Raises ValueError.
    """
    try:
        usage = answer["usage"]
        told = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        if told is None:
            told = (answer.get("timings") or {}).get("cache_n")
        cached = min(told or 0, usage["prompt_tokens"])
        each, encoded = target.tokens.get(shape.side, 0), encodings(usage["prompt_tokens"], shape, target)
        new, output = usage["prompt_tokens"] - cached, usage["completion_tokens"]
        work = RequestSize(new, cached, output, encoded * each, shape.images, image_squares=encoded * each * each)
        return RequestUse(work, told is not None)
    except (KeyError, TypeError, AttributeError):
        raise ValueError("no usage") from None


def encodings(prompt_tokens: int, shape: GridShape, target: PromptTarget) -> int:
    """How many times the engine encoded a photo, by the prompt tokens that it counts.

    llama.cpp encodes two photos of a Qwen2-VL as two frames of one video, with the tokens of one (seen).
    """
    each = target.counted.get(shape.side, 0)
    if shape.images < 2 or each < MIN_COUNTED_TOKENS:
        return shape.images
    return max(1, min(shape.images, round((prompt_tokens - target.counted[0]) / each)))


def shorten_error(text: str) -> str:
    """An engine's error as one short line."""
    with suppress(ValueError, AttributeError):
        error = json.loads(text)
        text = str(error.get("error", {}).get("message") or error.get("message") or text)
    return " ".join(text.split())[:200]
