"""Pure: request shape -> expected work, learned from the engine's answers to earlier requests.

Rules:
- Prompt tokens are counted by a tokenizer, else they are text bytes over a ratio learned per tenant, model and script.
- The share of them that the engine has cached is learned per tenant, model and size (cached_share).
- Output tokens come from decayed histograms (output_length), capped by the client's limit.
- What is learned of one tenant hardly moves another's price (tenant_means).
- A request is admitted at its expected price; tenant limits reserve the price of its 90th percentile, uncached.
- All tables are bounded; the least recently used entry is evicted.
- Each relay process learns alone: the histograms are good after some ten answers, and sharing would cost more.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

import msgspec
from msgspec import structs

from sidecar.events import TAIL_MULTIPLES, RequestSize, Usage
from sidecar.load import cost_model
from sidecar.load.cached_share import CachedShares
from sidecar.load.output_length import OutputForecast, OutputLengths
from sidecar.load.request_shape import RequestShape
from sidecar.load.tenant_means import Prior, TenantMeans

# Bytes per token: 4 for English text in a vocabulary of 100k to 150k. Its weight is in tokens; what tenants have in
# common stays within a factor of 2, as scripts and vocabularies do.
DEFAULT_BYTES_PER_TOKEN: Final = Prior(start=4.0, weight=256.0, bounds=(2.0, 8.0))
BYTES_PER_TOKEN_BOUNDS: Final = (0.5, 16.0)  # of one answer, as tokenizers yield them
MAX_RATIO_WEIGHT: Final = 4096.0  # tokens that one answer counts for
MAX_TEMPLATE_TOKENS: Final = 32  # that a chat template adds per message; any excess came from the request
DEFAULT_IMAGE_TOKENS: Final = 1000  # unknown size: about 1 Mpx at 28x28 pixels per token (Qwen2-VL)
PROMPT_TOKENS_PER_WINDOW: Final = 4  # of a recording: Whisper's start, language, task and no timestamps
_OBSERVATION_WEIGHT: Final = 0.05
_MAX_MODELS: Final = 256
_MAX_RATIOS: Final = 4096
RESERVED_QUANTILE: Final = 0.9  # share of answers that a reservation covers


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
        self._ratios = TenantMeans(DEFAULT_BYTES_PER_TOKEN, _MAX_RATIOS)  # bytes per token, by model and script
        self.cached = CachedShares()
        self._templates: OrderedDict[str, ChatTemplateOverhead] = OrderedDict()
        self._outputs = OutputLengths()

    def estimate(
        self, tenant: str, shape: RequestShape, image_tokens: Sequence[int], counted: int | None = None
    ) -> Estimate:
        """Estimate a request. `image_tokens`: of images of known size; `counted`: of the text, by a tokenizer."""
        images = max(shape.images, len(image_tokens))
        encoder = squares = 0
        if images:
            each = [*image_tokens, *[DEFAULT_IMAGE_TOKENS] * (images - len(image_tokens))]
            encoder, squares = sum(each), sum(tokens * tokens for tokens in each)
        if counted is None:
            text = self.text_tokens(tenant, shape)
        else:
            template = self._templates.get(shape.model, _CHATML)
            text = round(counted * shape.repeated)
            if shape.messages and shape.prompts == 1:
                text += round(template.tokens(shape.messages))
        windows = cost_model.audio_windows(shape.audio_seconds) if shape.audio_seconds else 0
        text += PROMPT_TOKENS_PER_WINDOW * windows + shape.video_text
        audio, video = shape.audio_tokens, shape.video_tokens
        media = encoder, images, audio, shape.audios, video, shape.videos, squares
        prompt = max(1, text + shape.token_ids + encoder + audio + video)
        prompts = max(shape.prompts, windows)
        sequences = prompts * shape.choices
        parts = *media, prompts, sequences, shape.skew, shape.audio_seconds, shape.video_frames
        share = 0.0 if windows else self.cached.expected(tenant, shape.model, prompt // prompts)
        cached = min(prompt - 1, int(prompt * share))
        if not shape.generative or shape.told_output:
            output = shape.told_output if shape.max_output is None else min(shape.told_output, shape.max_output)
            work = cost_model.with_cached(RequestSize(prompt, 0, output, *parts), cached)
            return Estimate(work, self.mu(work))
        forecast = self.forecast(tenant, shape, prompt)
        work = RequestSize(prompt, 0, round(max(forecast.mean(), shape.min_output) * sequences), *parts)
        work = cost_model.with_cached(work, cached)
        tail = forecast.remaining([at * work.output / sequences for at in TAIL_MULTIPLES]) if shape.stream else ()
        return Estimate(work, self.mu(work), tuple(round(tokens * sequences) for tokens in tail))

    def text_tokens(self, tenant: str, shape: RequestShape) -> int:
        """Tokens of a prompt's text, by the learned ratio of its tenant, model and script."""
        return round(shape.text_bytes / self._ratios.get(tenant, (shape.model, shape.script)))

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
        forecast = self.forecast(tenant, shape, expected.uncached + expected.cached)
        return max(round(forecast.quantile(RESERVED_QUANTILE) * expected.sequences), expected.output)

    def reserved_mu(self, tenant: str, shape: RequestShape, expected: RequestSize) -> float:
        """The price with the high output and nothing cached, which a tenant limit reserves.

        A tenant with a learned cached share can lose its cache hits at any time, in many requests at once.
        """
        whole, output = expected.uncached + expected.cached, self.high_output(tenant, shape, expected)
        return self.mu(structs.replace(expected, uncached=whole, cached=0, output=output))

    def learn_cached(self, tenant: str, shape: RequestShape, prompt: int, cached: int) -> None:
        """Learn how much of a request's prompts was cached."""
        if not shape.audio_seconds:
            prompts = max(1, shape.prompts)
            self.cached.learn(tenant, shape.model, prompt // prompts, cached // prompts)

    def learn(self, tenant: str, shape: RequestShape, usage: Usage, counted: int | None = None) -> None:
        """Learn from the usage of a finished request. `counted`: tokens of its whole text, by a tokenizer."""
        text_tokens = usage.prompt_tokens - shape.token_ids
        has_media = shape.images or shape.audios or shape.videos or shape.audio_seconds
        self.learn_cached(tenant, shape, usage.prompt_tokens, usage.cached_tokens)
        if not has_media and text_tokens > 0 and shape.text_bytes > 0:
            # By tokens, as the template of a short prompt outweighs its text.
            low, high = BYTES_PER_TOKEN_BOUNDS
            ratio, weight = min(high, max(low, shape.text_bytes / text_tokens)), min(text_tokens, MAX_RATIO_WEIGHT)
            self._ratios.add(tenant, (shape.model, shape.script), ratio, weight)
            if counted is not None and shape.messages and shape.prompts == 1:
                if (template := self._templates.get(shape.model)) is None:
                    template = self._templates[shape.model] = ChatTemplateOverhead()
                added = min(text_tokens - counted, MAX_TEMPLATE_TOKENS * (shape.messages + 1))
                template.add(shape.messages, added)
                self._templates.move_to_end(shape.model)
                if len(self._templates) > _MAX_MODELS:
                    self._templates.popitem(last=False)
        if shape.generative and not shape.told_output:
            cut = shape.max_output is not None and usage.completion_tokens >= shape.max_output
            tokens = usage.completion_tokens / (shape.choices * shape.prompts)
            self._outputs.learn(tenant, shape.model, usage.prompt_tokens // shape.prompts, tokens, cut=cut)


_CHATML: Final = ChatTemplateOverhead()
