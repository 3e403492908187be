"""Pure: request shape -> expected work. What is not known before the engine answers is learned from what it answered.

Rules: prompt tokens are text bytes over a ratio learned per model; output tokens are a decayed mean per (tenant, model),
capped by what the client allows. Both tables are bounded and forget what was used least recently. One per relay process.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final, Generic, TypeVar

from sidecar import units
from sidecar.facts import Usage, Work
from sidecar.relay.shapes import Shape

K = TypeVar("K")

BYTES_PER_TOKEN: Final = 4.0  # English text in a 100k-150k vocabulary
OUTPUT_TOKENS: Final = 256.0  # mean of conversation traces (Azure 2023: 211 tokens)
IMAGE_TOKENS: Final = 1000  # an image nobody measured: about 1 Mpx at 28x28 pixels per token (Qwen2-VL's kind)
_WEIGHT: Final = 0.05  # of one new observation
_MODELS: Final = 256
_PAIRS: Final = 4096


class Means(Generic[K]):
    """Decayed means by key, at most `limit` of them."""

    def __init__(self, start: float, limit: int) -> None:
        self._start = start
        self._limit = limit
        self._means: OrderedDict[K, float] = OrderedDict()

    def get(self, key: K) -> float:
        """The mean of `key`; the start value when it was never seen."""
        return self._means.get(key, self._start)

    def add(self, key: K, value: float) -> None:
        """Move the mean of `key` toward `value`."""
        self._means[key] = self.get(key) + _WEIGHT * (value - self.get(key))
        self._means.move_to_end(key)
        if len(self._means) > self._limit:
            self._means.popitem(last=False)


class Estimator:
    """Expected work of requests, and its price in model units."""

    def __init__(self, coefficients: units.Coefficients) -> None:
        self._coefficients = coefficients
        self._unit_ms = units.unit_ms(coefficients)
        self._ratios: Means[str] = Means(BYTES_PER_TOKEN, _MODELS)
        self._outputs: Means[tuple[str, str]] = Means(OUTPUT_TOKENS, _PAIRS)

    def work(self, tenant: str, shape: Shape, image_tokens: list[int]) -> Work:
        """Expected work. `image_tokens`: the known ones; images beyond them count IMAGE_TOKENS each."""
        images = max(shape.images, len(image_tokens))
        encoder = sum(image_tokens) + IMAGE_TOKENS * (images - len(image_tokens))
        text = round(shape.text_bytes / self._ratios.get(shape.model))
        return Work(
            uncached=max(1, text + shape.token_ids + encoder),
            output=self._output(tenant, shape),
            image_tokens=encoder,
            images=images,
        )

    def mu(self, work: Work) -> float:
        """The price of `work` in model units."""
        return units.gpu_ms(work, self._coefficients) / self._unit_ms

    def learn(self, tenant: str, shape: Shape, usage: Usage) -> None:
        """Take in what a request of this shape really used. Prompts with images teach nothing about text."""
        text_tokens = usage.prompt_tokens - shape.token_ids
        if shape.images == 0 and text_tokens > 0 and shape.text_bytes > 0:
            # templates of short prompts weigh more than their text: 0.5 to 16 bytes a token is what a tokenizer can do
            self._ratios.add(shape.model, min(16.0, max(0.5, shape.text_bytes / text_tokens)))
        if shape.generative:
            self._outputs.add((tenant, shape.model), usage.completion_tokens / shape.choices)

    def _output(self, tenant: str, shape: Shape) -> int:
        if not shape.generative:
            return 0
        expected = round(self._outputs.get((tenant, shape.model)) * shape.choices)
        return expected if shape.max_output is None else min(expected, shape.max_output)
