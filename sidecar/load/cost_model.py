"""Pure: request size -> GPU milliseconds -> model units (MU).

    gpu_ms = k*p + a*u + b*u*(c + u/2)/p + d*o + f*o*(n/p + o/2/m) + g*e + h*items + q*s + w*t        n = u + c
    MU     = gpu_ms / gpu_ms(3500 in, 300 out)

u, c     uncached and cached input tokens
o        output tokens
e        encoder tokens of images, audio and video, in units of an image token
items    images, recordings and videos
s        the sum of the squares of each image's tokens, as in the encoder each token attends to its whole image
p, m     prompts, and the sequences that they give: more with `n` answers to each
t        seconds of audio that is transcribed

Tokens are sums over all sequences, but each attends to its own sequence only. u*(c + u/2) and o*(n + o/2) sum up the
tokens before each new one, in sequences of equal length; the first is multiplied by RequestSize.skew. In a share
`windowed` of the layers, a token attends to the last `window` tokens only. Coefficients belong to one model on one kind
of hardware; `Coefficients.source`: whether they are the default, a roofline, or measured.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Final

import msgspec
from msgspec import structs

from sidecar.errors import UsageError
from sidecar.events import RequestSize, Usage

REFERENCE = RequestSize(uncached=3500, output=300)
TERMS: Final = ("k", "a", "b", "d", "f", "g", "h", "q", "w")
AUDIO_WINDOW_S: Final = 30.0
AUDIO_FLOPS: Final = 50 * (2 * 0.635e9 + 4 * 32 * 1280 * 1500)  # of a second of audio
FILE_VERSION: Final = 3  # 1 has no number and no q; 1 and 2 do not list what was not measured


@dataclass(frozen=True, slots=True)
class Coefficients:
    """Milliseconds of GPU time per unit of each term.

    Defaults: roofline of a dense 8B model in bf16 (32 layers, hidden 4096, 8 KV heads of 128) on an H100 SXM (990
    TFLOP/s dense, 3.35 TB/s, of which it achieves 50 % and 70 %), decode in a batch of 32:
    a = 2*8e9 / 495e12 s; b = 4*32*4096 / 495e12 s; d = 16e9 / 2.3e12 / 32 s; f = 131072 / 2.3e12 s (KV bytes per
    token); g = 2*0.67e9*4 / 495e12 s (a 0.67B vision tower, 4 patches per token); q = 16*4*32*1280 / 495e12 s
    (its 32 layers of width 1280, 16 pairs of patches per pair of tokens); w = AUDIO_FLOPS / 495e12 s (50 frames a
    second of Whisper's large encoder, each of which attends to 30 seconds); k, h = launch and glue, in ms.
    """

    k: float = 2.0
    a: float = 0.0323
    b: float = 1.06e-6
    d: float = 0.217
    f: float = 5.7e-5
    g: float = 0.0108
    h: float = 1.0
    q: float = 5.3e-6
    w: float = 0.153
    audio: float = 0.5  # price of an audio encoder token, in image tokens: Whisper's encoder, two frames per token
    video: float = 1.0  # likewise of a video token: the same tower
    window: float = 0.0  # tokens that a layer with a sliding window attends to; 0: there are none
    windowed: float = 0.0  # share of the attention work done by such layers
    batch: float = 32.0  # batch size that d is for: its requests share the reading of the weights
    fingerprint: str = "default-8b-h100"
    source: str = "default"
    gpu: str = ""  # NVML's name
    # Added by `sidecar calibrate`: what was measured, errors on held-out shapes, MU in flight with p95 in slo_seconds.
    model: str = ""
    engine: str = ""
    flags: str = ""  # name=value, comma-separated
    mape: float = 0.0
    median_ape: float = 0.0
    p90: float = 0.0
    r2: float = 0.0
    mu_in_flight: float = 0.0
    slo_seconds: float = 0.0
    # Why these are not measured, and what to do about it; "" if they are.
    no_capacity: str = ""  # MU per minute, which is then a lower bound: the engine was never full
    no_cached: str = ""  # cost of a partially cached prompt


class CostTerms(msgspec.Struct, frozen=True, gc=False):
    """GPU milliseconds of one request, by cause."""

    overhead: float
    prefill: float
    attention: float
    decode: float
    kv_read: float
    images: float
    audio: float

    @property
    def before_first_token(self) -> float:
        return self.overhead + self.prefill + self.attention + self.images + self.audio

    @property
    def total(self) -> float:
        return self.before_first_token + self.decode + self.kv_read


def terms(work: RequestSize, co: Coefficients) -> CostTerms:
    """Price each term of one request in GPU milliseconds."""
    prompts, u, attended, o, read, encoded, items, squares, seconds = features(work, co)
    images = co.g * encoded + co.h * items + co.q * squares
    return CostTerms(co.k * prompts, co.a * u, co.b * attended, co.d * o, co.f * read, images, co.w * seconds)


def features(work: RequestSize, co: Coefficients) -> tuple[float, ...]:
    """The factor of each coefficient, in the order of TERMS. Uses only the prices of media and the window of `co`."""
    u, c, o, prompts = work.uncached, work.cached, work.output, work.prompts
    encoded = work.image_tokens + co.audio * work.audio_tokens + co.video * work.video_tokens
    items = work.images + work.audios + work.videos
    attended = prompts * work.skew * attended_tokens(c / prompts, u / prompts, co)
    return prompts, u, attended, o, read_tokens(work, o, co), encoded, items, work.image_squares, work.audio_seconds


def attended_tokens(before: float, tokens: float, co: Coefficients) -> float:
    """Tokens that `tokens` new tokens attend to, summed; `before` tokens precede the first."""
    whole = tokens * (before + tokens / 2)
    if co.windowed <= 0 or before + tokens <= co.window:
        return whole
    growing = max(0.0, co.window - before)  # new tokens before the window is full
    seen = growing * (before + growing / 2) + (tokens - growing) * co.window
    return (1 - co.windowed) * whole + co.windowed * seen


def read_tokens(work: RequestSize, tokens: float, co: Coefficients) -> float:
    """Tokens that `tokens` of output attend to, summed; they come from all sequences alike."""
    m = work.sequences
    return m * attended_tokens((work.uncached + work.cached) / work.prompts, tokens / m, co)


def decode_ms(work: RequestSize, tokens: int, co: Coefficients) -> float:
    """GPU milliseconds of `tokens` output tokens after the prompts of `work`."""
    return co.d * tokens + co.f * read_tokens(work, tokens, co)


def gpu_ms(work: RequestSize, co: Coefficients) -> float:
    return terms(work, co).total


def unit_ms(co: Coefficients) -> float:
    """GPU milliseconds of one MU."""
    return gpu_ms(REFERENCE, co)


def mu(work: RequestSize, co: Coefficients) -> float:
    return gpu_ms(work, co) / unit_ms(co)


def by_cause(work: RequestSize, co: Coefficients) -> tuple[tuple[str, float], ...]:
    """GPU milliseconds of one request, by the names of CostTerms."""
    return tuple(structs.asdict(terms(work, co)).items())


def line(co: Coefficients) -> tuple[tuple[str, float], ...]:
    """gpu_ms as gamma + alpha * in + beta * out, for consumers that can only do that. Exact for REFERENCE alone."""
    one = terms(REFERENCE, co)
    alpha, beta = (one.prefill + one.attention) / REFERENCE.uncached, (one.decode + one.kv_read) / REFERENCE.output
    return ("alpha", alpha), ("beta", beta), ("gamma", one.overhead)


def is_measured(co: Coefficients) -> bool:
    return not co.source.startswith(("default", "roofline"))


def max_mu_per_minute(co: Coefficients) -> float:
    return 60_000 / unit_ms(co)


def max_mu_in_flight(co: Coefficients, slo_seconds: float) -> float:
    """MU in flight at which a request takes `slo_seconds`: measured at that SLO, else Little's law at full flow."""
    if co.mu_in_flight > 0 and co.slo_seconds == slo_seconds:
        return co.mu_in_flight
    return max_mu_per_minute(co) / 60 * slo_seconds


def settled_work(expected: RequestSize, usage: Usage | None, delivered_tokens: int) -> RequestSize:
    """The actual work of a request: from the engine's `usage`, else the estimate with the delivered tokens."""
    if usage is None:
        return structs.replace(expected, output=delivered_tokens)
    if usage.audio_seconds > 0 and expected.audio_seconds > 0:
        expected = with_audio_seconds(expected, usage.audio_seconds)
        if not usage.prompt_tokens and not usage.completion_tokens:  # for transcripts, engines report seconds only
            return structs.replace(expected, output=max(expected.output, delivered_tokens))
    work = structs.replace(expected, uncached=usage.prompt_tokens, cached=0, output=usage.completion_tokens)
    return with_cached(work, min(usage.cached_tokens, usage.prompt_tokens))


def with_cached(work: RequestSize, cached: int) -> RequestSize:
    """The size of an uncached request, with `cached` of its prompt tokens cached."""
    if not cached:
        return work
    uncached = work.uncached - cached
    work = structs.replace(work, uncached=uncached, cached=cached)
    encoded = work.image_tokens + work.audio_tokens + work.video_tokens
    if encoded <= uncached:
        return work
    # Encoder tokens are part of the prompt, so those beyond `uncached` were cached.
    names = ("image_tokens", "audio_tokens", "video_tokens", "image_squares")
    return structs.replace(work, **{name: getattr(work, name) * uncached // encoded for name in names})


def part_of(work: RequestSize, share: float) -> RequestSize | None:
    """The work of a prompt of which a share was computed; None if that is not a token."""
    if share >= 1:
        return work
    names = ("uncached", "image_tokens", "audio_tokens", "video_tokens", "image_squares")
    part = structs.replace(work, **{name: round(getattr(work, name) * share) for name in names})
    return part if part.uncached else None


def with_audio_seconds(work: RequestSize, seconds: float) -> RequestSize:
    """The work of a recording, corrected to its actual length."""
    times, windows = seconds / work.audio_seconds, audio_windows(seconds)
    return structs.replace(
        work,
        uncached=round(work.uncached * windows / work.prompts),
        output=round(work.output * times),
        prompts=windows,
        sequences=windows,
        audio_seconds=seconds,
    )


def audio_windows(seconds: float) -> int:
    """The sequences of a recording: engines split it into windows of 30 seconds, Whisper's maximum."""
    return max(1, math.ceil(seconds / AUDIO_WINDOW_S))


def to_json(co: Coefficients) -> str:
    return json.dumps({"version": FILE_VERSION, **asdict(co)}, indent=1)


def from_json(text: str, name: str = "coefficients") -> Coefficients:
    """Read a coefficients file. Raises UsageError with one line if a key is unknown or a value is invalid."""
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{name}: not JSON (line {error.lineno})") from None
    if not isinstance(raw, dict):
        raise UsageError(f"{name}: expected a JSON object of coefficients")
    version = raw.pop("version", 1)
    if version not in range(1, FILE_VERSION + 1) or isinstance(version, bool):
        raise UsageError(f"{name}: unknown version {version!r} (latest: {FILE_VERSION}); run `sidecar calibrate` again")
    known = {f.name: f.type for f in fields(Coefficients)}
    for key, value in raw.items():
        if key not in known:
            raise UsageError(f"{name}: unknown key {key!r}; known: {', '.join(known)}")
        if known[key] == "str" and not isinstance(value, str):
            raise UsageError(f"{name}: {key} must be a string")
        if known[key] == "float" and (type(value) not in (int, float) or not 0 <= value < 1e9):
            raise UsageError(f"{name}: {key} must be a number of milliseconds >= 0, not {value!r}")
    co = Coefficients(**{"source": "file", **({"q": 0.0} if version == 1 else {}), **raw})
    if co.windowed > 1:
        raise UsageError(f"{name}: windowed must be a share of the layers from 0 to 1, not {co.windowed!r}")
    if unit_ms(co) <= 0:
        raise UsageError(f"{name}: all coefficients are 0")
    return co
