"""Pure: request shape -> expected work, learned from the engine's answers to earlier requests.

Rules:
- Prompt tokens are counted by a tokenizer, else they are text bytes over a ratio learned per model and script.
- Output tokens come from decayed histograms (output_length), capped by the client's limit.
- A request is admitted at its expected price; tenant limits reserve the price of its 90th percentile.
- All tables are bounded; the least recently used entry is evicted.
- Each relay process learns alone: the histograms are good after some ten answers, and sharing would cost more.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Final

import msgspec
from msgspec import structs

from sidecar.events import TAIL_MULTIPLES, RequestSize, Usage
from sidecar.load import cost_model
from sidecar.load.output_length import OutputForecast, OutputLengths
from sidecar.load.request_shape import RequestShape

DEFAULT_BYTES_PER_TOKEN: Final = 4.0  # English text in a vocabulary of 100k to 150k
DEFAULT_IMAGE_TOKENS: Final = 1000  # unknown size: about 1 Mpx at 28x28 pixels per token (Qwen2-VL)
DEFAULT_AUDIO_TOKENS: Final = 250  # not decoded here: ten seconds at 25 tokens per second (Qwen2-Audio)
DEFAULT_FRAME_TOKENS: Final = 128  # likewise of a video: two frames per step of 256 tokens (Qwen2-VL)
PROMPT_TOKENS_PER_WINDOW: Final = 4  # of a recording: Whisper's start, language, task and no timestamps
_OBSERVATION_WEIGHT: Final = 0.05
_MAX_MODELS: Final = 256
RESERVED_QUANTILE: Final = 0.9  # share of answers that a reservation covers


class DecayedMeans:
    """Decayed means by key, at most `limit` of them."""

    def __init__(self, start: float, limit: int) -> None:
        self._start, self._limit = start, limit
        self._means: OrderedDict[Hashable, float] = OrderedDict()

    def get(self, key: Hashable) -> float:
        return self._means.get(key, self._start)

    def add(self, key: Hashable, value: float) -> None:
        """Move the mean of `key` toward `value`."""
        self._means[key] = self.get(key) + _OBSERVATION_WEIGHT * (value - self.get(key))
        self._means.move_to_end(key)
        if len(self._means) > self._limit:
            self._means.popitem(last=False)


class ChatTemplateOverhead:
    """Tokens that a model's chat template adds, as a line over the number of messages: decayed least squares.

    Starts as ChatML: 4 per message, and 3 that open the answer.
    """

    __slots__ = ("_m", "_mm", "_my", "_n", "_y")

    def __init__(self) -> None:
        self._n = self._m = self._mm = self._y = self._my = 0.0
        for messages in (1, 2, 3):
            self.add(messages, 4 * messages + 3)

    def add(self, messages: int, tokens: float) -> None:
        """Learn that a prompt of `messages` messages had `tokens` more tokens than its text."""
        keep = 1 - _OBSERVATION_WEIGHT
        self._n = keep * self._n + 1
        self._m = keep * self._m + messages
        self._mm = keep * self._mm + messages * messages
        self._y = keep * self._y + tokens
        self._my = keep * self._my + messages * tokens

    def tokens(self, messages: int) -> float:
        """Tokens added to `messages` messages; the recent mean if all prompts had the same number."""
        spread = self._n * self._mm - self._m * self._m
        slope = (self._n * self._my - self._m * self._y) / spread if spread > 1e-3 * self._n * self._n else 0.0
        return max(0.0, (self._y - slope * self._m) / self._n + slope * messages)


class Estimate(msgspec.Struct, frozen=True, gc=False):
    """The expected work of a request, and its price in MU. `tail` is that of events.Admitted, of streams only."""

    work: RequestSize
    mu: float
    tail: tuple[int, ...] = ()


class Estimator:
    """Expected work of requests, and its price in model units."""

    def __init__(self, coefficients: cost_model.Coefficients) -> None:
        self._coefficients, self._unit_ms = coefficients, cost_model.unit_ms(coefficients)
        self._ratios = DecayedMeans(DEFAULT_BYTES_PER_TOKEN, _MAX_MODELS)  # by model and script
        self._templates: OrderedDict[str, ChatTemplateOverhead] = OrderedDict()
        self._outputs = OutputLengths()

    def estimate(
        self, tenant: str, shape: RequestShape, image_tokens: list[int], counted: int | None = None
    ) -> Estimate:
        """Estimate a request. `image_tokens`: of images of known size; `counted`: of the text, by a tokenizer."""
        images = max(shape.images, len(image_tokens))
        each = image_tokens + [DEFAULT_IMAGE_TOKENS] * (images - len(image_tokens))
        encoder, squares = sum(each), sum(tokens * tokens for tokens in each)
        if counted is None:
            text = self.text_tokens(shape)
        else:
            template = self._templates.get(shape.model, _CHATML)
            text = round(counted * shape.repeated)
            if shape.messages and shape.prompts == 1:
                text += round(template.tokens(shape.messages))
        windows = cost_model.audio_windows(shape.audio_seconds) if shape.audio_seconds else 0
        text += PROMPT_TOKENS_PER_WINDOW * windows
        audio, video = DEFAULT_AUDIO_TOKENS * shape.audios, DEFAULT_FRAME_TOKENS * shape.video_frames
        media = encoder, images, audio, shape.audios, video, shape.videos, squares
        prompt = max(1, text + shape.token_ids + encoder + audio + video)
        prompts = max(shape.prompts, windows)
        sequences = prompts * shape.choices
        parts = *media, prompts, sequences, shape.skew, shape.audio_seconds, shape.video_frames
        if not shape.generative or shape.told_output:
            output = shape.told_output if shape.max_output is None else min(shape.told_output, shape.max_output)
            work = RequestSize(prompt, 0, output, *parts)
            return Estimate(work, self.mu(work))
        forecast = self.forecast(tenant, shape, prompt)
        work = RequestSize(prompt, 0, round(max(forecast.mean(), shape.min_output) * sequences), *parts)
        tail = forecast.remaining([at * work.output / sequences for at in TAIL_MULTIPLES]) if shape.stream else ()
        return Estimate(work, self.mu(work), tuple(round(tokens * sequences) for tokens in tail))

    def text_tokens(self, shape: RequestShape) -> int:
        """Tokens of a prompt's text, by the learned ratio of its model and script."""
        return round(shape.text_bytes / self._ratios.get((shape.model, shape.script)))

    def forecast(self, tenant: str, shape: RequestShape, prompt: int) -> OutputForecast:
        """The forecast of one answer's tokens; `prompt`: tokens of all prompts."""
        limit = None if shape.max_output is None else shape.max_output // (shape.choices * shape.prompts)
        return self._outputs.forecast(tenant, shape.model, prompt // shape.prompts, limit)

    def mu(self, work: RequestSize) -> float:
        return cost_model.gpu_ms(work, self._coefficients) / self._unit_ms

    def prefill_seconds(self, work: RequestSize) -> float:
        """Seconds before the first token, by the cost model."""
        return cost_model.terms(work, self._coefficients).before_first_token / 1000

    def high_output(self, tenant: str, shape: RequestShape, expected: RequestSize) -> int:
        """The 90th percentile of output tokens; at least the expected ones."""
        if not shape.generative or shape.told_output:
            return expected.output
        forecast = self.forecast(tenant, shape, expected.uncached)
        return max(round(forecast.quantile(RESERVED_QUANTILE) * expected.sequences), expected.output)

    def reserved_mu(self, tenant: str, shape: RequestShape, expected: RequestSize) -> float:
        """The price with the high output, which a tenant limit reserves."""
        return self.mu(structs.replace(expected, output=self.high_output(tenant, shape, expected)))

    def learn(self, tenant: str, shape: RequestShape, usage: Usage, counted: int | None = None) -> None:
        """Learn from the usage of a finished request. `counted`: tokens of its whole text, by a tokenizer."""
        text_tokens = usage.prompt_tokens - shape.token_ids
        has_media = shape.images or shape.audios or shape.videos or shape.audio_seconds
        if not has_media and text_tokens > 0 and shape.text_bytes > 0:
            # The template of a short prompt outweighs its text; tokenizers yield 0.5 to 16 bytes per token.
            self._ratios.add((shape.model, shape.script), min(16.0, max(0.5, shape.text_bytes / text_tokens)))
            if counted is not None and shape.messages and shape.prompts == 1:
                template = self._templates.setdefault(shape.model, ChatTemplateOverhead())
                template.add(shape.messages, text_tokens - counted)
                self._templates.move_to_end(shape.model)
                if len(self._templates) > _MAX_MODELS:
                    self._templates.popitem(last=False)
        if shape.generative and not shape.told_output:
            cut = shape.max_output is not None and usage.completion_tokens >= shape.max_output
            tokens = usage.completion_tokens / (shape.choices * shape.prompts)
            self._outputs.learn(tenant, shape.model, usage.prompt_tokens // shape.prompts, tokens, cut=cut)


_CHATML: Final = ChatTemplateOverhead()
