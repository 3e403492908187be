"""Pure: request shape -> expected work. What is not known before the engine answers is learned from what it answered.

Rules: prompt tokens are counted (see counting.py), or else text bytes over a ratio learned per model and script; output tokens come from
decayed histograms (outputs.py), capped by what the client allows. The expected value prices the hold; the 90th percentile is what a limit
reserves. All tables are bounded and forget what was used least recently. Each relay process learns alone: the histograms are good
after some ten answers, and a second process would have to be told what this one forgets again.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Final, Generic, TypeVar

from sidecar.events import TAIL_MULTIPLES, RequestSize, Usage
from sidecar.load import cost_model
from sidecar.load.output_length import OutputForecast, OutputLengths
from sidecar.load.request_shape import RequestShape

K = TypeVar("K")

DEFAULT_BYTES_PER_TOKEN: Final = 4.0  # English text in a 100k-150k vocabulary
DEFAULT_IMAGE_TOKENS: Final = 1000  # an image nobody measured: about 1 Mpx at 28x28 pixels per token (Qwen2-VL's kind)
DEFAULT_AUDIO_TOKENS: Final = (
    250  # of one recording, which nobody decodes here: ten seconds at 25 a second (Qwen2-Audio's kind)
)
DEFAULT_VIDEO_TOKENS: Final = 4096  # likewise of one video: 32 frames, two to a step, of 256 tokens
_OBSERVATION_WEIGHT: Final = 0.05  # of one new observation
_MAX_MODELS: Final = 256
RESERVED_QUANTILE: Final = 0.9  # the share of answers that a reservation covers


class DecayedMeans(Generic[K]):
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
        self._means[key] = self.get(key) + _OBSERVATION_WEIGHT * (value - self.get(key))
        self._means.move_to_end(key)
        if len(self._means) > self._limit:
            self._means.popitem(last=False)


class ChatTemplateOverhead:
    """Tokens that a model's chat template adds, as a line over the number of messages: decayed least squares.

    Begins as ChatML does: 4 a message and 3 that open the answer.
    """

    __slots__ = ("_m", "_mm", "_my", "_n", "_y")

    def __init__(self) -> None:
        self._n = self._m = self._mm = self._y = self._my = 0.0
        for messages in (1, 2, 3):
            self.add(messages, 4 * messages + 3)

    def add(self, messages: int, tokens: float) -> None:
        """A prompt of so many messages had so many tokens more than its text."""
        keep = 1 - _OBSERVATION_WEIGHT
        self._n = keep * self._n + 1
        self._m = keep * self._m + messages
        self._mm = keep * self._mm + messages * messages
        self._y = keep * self._y + tokens
        self._my = keep * self._my + messages * tokens

    def tokens(self, messages: int) -> float:
        """What it adds to so many messages; where all had as many, as much as lately."""
        spread = self._n * self._mm - self._m * self._m
        slope = (self._n * self._my - self._m * self._y) / spread if spread > 1e-3 * self._n * self._n else 0.0
        return max(0.0, (self._y - slope * self._m) / self._n + slope * messages)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a request is expected to be. `mu` is the price of `work`.

    `tail`: output tokens still expected once `TAIL_MULTIPLES` times the expected ones have come (facts.Admitted); of streams, as only they show how
    far they are.
    """

    work: RequestSize
    mu: float
    tail: tuple[int, ...] = ()


class Estimator:
    """Expected work of requests, and its price in model units."""

    def __init__(self, coefficients: cost_model.Coefficients) -> None:
        self._coefficients = coefficients
        self._unit_ms = cost_model.unit_ms(coefficients)
        self._ratios: DecayedMeans[tuple[str, int]] = DecayedMeans(DEFAULT_BYTES_PER_TOKEN, _MAX_MODELS)
        self._templates: OrderedDict[str, ChatTemplateOverhead] = OrderedDict()
        self._outputs = OutputLengths()

    def estimate(
        self, tenant: str, shape: RequestShape, image_tokens: list[int], counted: int | None = None
    ) -> Estimate:
        """`image_tokens`: the known ones; images beyond them count DEFAULT_IMAGE_TOKENS each. `counted`: the text's, by a tokenizer."""
        images = max(shape.images, len(image_tokens))
        each = image_tokens + [DEFAULT_IMAGE_TOKENS] * (images - len(image_tokens))
        encoder, squares = sum(each), sum(tokens * tokens for tokens in each)
        text = self.text_tokens(shape) if counted is None else counted + self.template_tokens(shape)
        audio, video = DEFAULT_AUDIO_TOKENS * shape.audios, DEFAULT_VIDEO_TOKENS * shape.videos
        media = encoder, images, audio, shape.audios, video, shape.videos, squares
        prompt = max(1, text + shape.token_ids + encoder + audio + video)
        if not shape.generative:
            work = RequestSize(prompt, 0, 0, *media)
            return Estimate(work, self.mu(work))
        forecast = self.forecast(tenant, shape, prompt)
        work = RequestSize(prompt, 0, round(forecast.mean() * shape.choices), *media)
        tail = tail_of(forecast, work.output, shape.choices) if shape.stream else ()
        return Estimate(work, self.mu(work), tail)

    def text_tokens(self, shape: RequestShape) -> int:
        """The tokens of a prompt's text, by what this model made of such text lately."""
        return round(shape.text_bytes / self._ratios.get((shape.model, shape.script)))

    def template_tokens(self, shape: RequestShape) -> int:
        """What the model's chat template adds to a text that was counted."""
        if not shape.messages:
            return 0
        return round(self._templates.get(shape.model, _CHATML).tokens(shape.messages))

    def forecast(self, tenant: str, shape: RequestShape, prompt: int) -> OutputForecast:
        """The tokens of one choice."""
        limit = None if shape.max_output is None else shape.max_output // shape.choices
        return self._outputs.forecast(tenant, shape.model, prompt, limit)

    def mu(self, work: RequestSize) -> float:
        """The price of `work` in model units."""
        return cost_model.gpu_ms(work, self._coefficients) / self._unit_ms

    def high_output(self, tenant: str, shape: RequestShape, expected: RequestSize) -> int:
        """Output tokens that 9 of 10 such answers do not exceed; no less than the expected."""
        if not shape.generative:
            return 0
        forecast = self.forecast(tenant, shape, expected.uncached)
        return max(round(forecast.quantile(RESERVED_QUANTILE) * shape.choices), expected.output)

    def reserved_mu(self, tenant: str, shape: RequestShape, expected: RequestSize) -> float:
        """The price of the expected work with its high output: what a limit keeps for it."""
        return self.mu(replace(expected, output=self.high_output(tenant, shape, expected)))

    def learn(self, tenant: str, shape: RequestShape, usage: Usage, counted: int | None = None) -> None:
        """Take in what a request of this shape really used; `counted` is its text's, all of it. Other media teach nothing about text."""
        text_tokens = usage.prompt_tokens - shape.token_ids
        if not (shape.images or shape.audios or shape.videos) and text_tokens > 0 and shape.text_bytes > 0:
            # templates of short prompts weigh more than their text: 0.5 to 16 bytes a token is what a tokenizer can do
            self._ratios.add((shape.model, shape.script), min(16.0, max(0.5, shape.text_bytes / text_tokens)))
            if counted is not None and shape.messages:
                self._template(shape.model).add(shape.messages, text_tokens - counted)
        if shape.generative:
            cut = shape.max_output is not None and usage.completion_tokens >= shape.max_output
            tokens = usage.completion_tokens / shape.choices
            self._outputs.learn(tenant, shape.model, usage.prompt_tokens, tokens, cut=cut)

    def _template(self, model: str) -> ChatTemplateOverhead:
        template = self._templates.setdefault(model, ChatTemplateOverhead())
        self._templates.move_to_end(model)
        if len(self._templates) > _MAX_MODELS:
            self._templates.popitem(last=False)
        return template


_CHATML: Final = ChatTemplateOverhead()


def tail_of(forecast: OutputForecast, expected: int, choices: int) -> tuple[int, ...]:
    """The tail of an estimate of `expected` output tokens over all choices."""
    left = forecast.remaining([at * expected / choices for at in TAIL_MULTIPLES])
    return tuple(round(tokens * choices) for tokens in left)
