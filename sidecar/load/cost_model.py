"""Pure: request size -> GPU milliseconds -> model units (MU).

    gpu_ms = k + a*u + b*u*(c + u/2) + d*o + f*o*(n + o/2) + g*e + h*items + q*s        n = u + c
    MU     = gpu_ms / gpu_ms(3500 in, 300 out)

u uncached and c cached input tokens, o output tokens, e encoder tokens of images, audio and video, each in those of images; s the square of each image's tokens, summed: in
its encoder every token may see every other of the same image. u*(c + u/2) and o*(n + o/2) are the tokens that
lie before each new one, summed; of a share `windowed` of the layers, each sees the last `window` of them at most. The coefficients
belong to a (model, hardware) pair. Where they come from is `Coefficients.source`: the default, a roofline, or a measurement.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final

from sidecar.errors import UsageError
from sidecar.events import RequestSize, Usage

REFERENCE = RequestSize(uncached=3500, output=300)
TERMS: Final = ("k", "a", "b", "d", "f", "g", "h", "q")
FILE_VERSION: Final = 2  # of a coefficients file. 1, which had no number, had no q: it was measured without


@dataclass(frozen=True, slots=True)
class Coefficients:
    """Milliseconds of GPU time per unit of each term.

    Defaults: roofline of a dense 8B model in bf16 (32 layers, hidden 4096, 8 KV heads of 128) on an H100 SXM (990 TFLOP/s
    dense, 3.35 TB/s, half and 70 % of them reached), decode in a batch of 32:
    a = 2*8e9 / 495e12 s; b = 4*32*4096 / 495e12 s; d = 16e9 / 2.3e12 / 32 s; f = 131072 / 2.3e12 s (KV bytes per token);
    g = 2*0.67e9*4 / 495e12 s (a 0.67B vision tower, 4 patches merge into one token); q = 16*4*32*1280 / 495e12 s (its 32 layers of
    width 1280, 16 pairs of patches to one of tokens); k, h = launch and glue, in ms.
    """

    k: float = 2.0
    a: float = 0.0323
    b: float = 1.06e-6
    d: float = 0.217
    f: float = 5.7e-5
    g: float = 0.0108
    h: float = 1.0
    q: float = 5.3e-6
    audio: float = (
        0.5  # price of an encoder token of audio, in those of an image: Whisper's encoder, two frames to a token
    )
    video: float = 1.0  # likewise of video: the same tower
    window: float = 0.0  # tokens that a layer with a sliding window sees; 0: there are none
    windowed: float = 0.0  # share of the work with the context, that such layers do
    batch: float = 32.0  # requests that decode together where d holds: they share the reading of the weights
    fingerprint: str = "default-8b-h100"
    source: str = "default"
    gpu: str = ""  # NVML's name
    # What `sidecar calibrate` adds: what was measured, errors on held-out shapes, MU in flight that kept p95 within slo_seconds.
    model: str = ""
    engine: str = ""
    flags: str = ""  # name=value, divided by commas
    mape: float = 0.0
    p90: float = 0.0
    r2: float = 0.0
    mu_in_flight: float = 0.0
    slo_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class CostTerms:
    """GPU milliseconds of one request, by cause."""

    overhead: float
    prefill: float
    attention: float
    decode: float
    kv_read: float
    images: float

    @property
    def before_first_token(self) -> float:
        """Milliseconds that must pass before the first token can: everything but decoding."""
        return self.overhead + self.prefill + self.attention + self.images

    @property
    def total(self) -> float:
        """Milliseconds in all."""
        return self.before_first_token + self.decode + self.kv_read


def terms(work: RequestSize, co: Coefficients) -> CostTerms:
    """Price each term of one request in GPU milliseconds."""
    one, u, attended, o, read, encoded, items, squares = features(work, co)
    return CostTerms(
        overhead=co.k * one,
        prefill=co.a * u,
        attention=co.b * attended,
        decode=co.d * o,
        kv_read=co.f * read,
        images=co.g * encoded + co.h * items + co.q * squares,
    )


def features(work: RequestSize, co: Coefficients) -> tuple[float, ...]:
    """What each coefficient is multiplied by, in the order of TERMS. Of `co` only the sliding window counts."""
    u, c, o = work.uncached, work.cached, work.output
    encoded = work.image_tokens + co.audio * work.audio_tokens + co.video * work.video_tokens
    items = work.images + work.audios + work.videos
    return 1.0, u, attended_tokens(c, u, co), o, attended_tokens(u + c, o, co), encoded, items, work.image_squares


def attended_tokens(before: float, tokens: float, co: Coefficients) -> float:
    """Tokens that each of `tokens` new ones sees before it, summed; `before` lie before the first."""
    whole = tokens * (before + tokens / 2)
    if co.windowed <= 0 or before + tokens <= co.window:
        return whole
    growing = max(0.0, co.window - before)  # new tokens until the window is full
    seen = growing * (before + growing / 2) + (tokens - growing) * co.window
    return (1 - co.windowed) * whole + co.windowed * seen


def decode_ms(before: int, tokens: int, co: Coefficients) -> float:
    """GPU milliseconds of `tokens` of output, of a prompt of `before` tokens."""
    return co.d * tokens + co.f * attended_tokens(before, tokens, co)


def gpu_ms(work: RequestSize, co: Coefficients) -> float:
    """GPU milliseconds of one request."""
    return terms(work, co).total


def unit_ms(co: Coefficients) -> float:
    """GPU milliseconds of one MU."""
    return gpu_ms(REFERENCE, co)


def mu(work: RequestSize, co: Coefficients) -> float:
    """Model units of one request."""
    return gpu_ms(work, co) / unit_ms(co)


def by_cause(work: RequestSize, co: Coefficients) -> tuple[tuple[str, float], ...]:
    """GPU milliseconds of one request by the names of Terms."""
    return tuple(asdict(terms(work, co)).items())


def line(co: Coefficients) -> tuple[tuple[str, float], ...]:
    """gpu_ms as gamma + alpha * in + beta * out, for consumers that can multiply only: exact for one MU and for nothing."""
    one = terms(REFERENCE, co)
    return (
        ("alpha", (one.prefill + one.attention) / REFERENCE.uncached),
        ("beta", (one.decode + one.kv_read) / REFERENCE.output),
        ("gamma", one.overhead),
    )


def is_measured(co: Coefficients) -> bool:
    """Whether somebody measured them, on what they are used for."""
    return not co.source.startswith(("default", "roofline"))


def max_mu_per_minute(co: Coefficients) -> float:
    """MU that the hardware can do in a minute: 60 s of GPU time over the price of one MU."""
    return 60_000 / unit_ms(co)


def max_mu_in_flight(co: Coefficients, slo_seconds: float) -> float:
    """MU in flight at which a request takes `slo_seconds`: as measured at that SLO, else at full flow by Little's law."""
    if co.mu_in_flight > 0 and co.slo_seconds == slo_seconds:
        return co.mu_in_flight
    return max_mu_per_minute(co) / 60 * slo_seconds


def settled_work(expected: RequestSize, usage: Usage | None, delivered_tokens: int) -> RequestSize:
    """What a request really was: the engine's `usage` where there is one, else the estimate with the delivered tokens."""
    if usage is None:
        return replace(expected, output=delivered_tokens)
    cached = min(usage.cached_tokens, usage.prompt_tokens)
    uncached = usage.prompt_tokens - cached
    work = replace(expected, uncached=uncached, cached=cached, output=usage.completion_tokens)
    return _without_cached_media(work) if cached else work


def _without_cached_media(work: RequestSize) -> RequestSize:
    """Less what no encoder did: what it made is part of the prompt, and what is more than `uncached` was cached."""
    tokens = work.image_tokens + work.audio_tokens + work.video_tokens
    if tokens <= work.uncached:
        return work
    names = ("image_tokens", "audio_tokens", "video_tokens", "image_squares")
    return replace(work, **{name: getattr(work, name) * work.uncached // tokens for name in names})


def to_json(co: Coefficients) -> str:
    """The coefficients as the text of a coefficients file."""
    return json.dumps({"version": FILE_VERSION, **asdict(co)}, indent=1)


def from_json(text: str, name: str = "coefficients") -> Coefficients:
    """Read a coefficients file. Raises UsageError with one line when a key is unknown or a number is not one."""
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{name}: not JSON (line {error.lineno})") from None
    if not isinstance(raw, dict):
        raise UsageError(f"{name}: expected a JSON object of coefficients")
    raw, measured_without = _migrate(raw, name)
    known = {f.name: f.type for f in fields(Coefficients)}
    for key, value in raw.items():
        if key not in known:
            raise UsageError(f"{name}: unknown key {key!r}; known: {', '.join(known)}")
        if known[key] == "str" and not isinstance(value, str):
            raise UsageError(f"{name}: {key} must be a text")
        if known[key] == "float" and (
            isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9
        ):
            raise UsageError(f"{name}: {key} must be a number of milliseconds >= 0, not {value!r}")
    co = Coefficients(**{"source": "file", **measured_without, **raw})
    if co.windowed > 1:
        raise UsageError(f"{name}: windowed is a share of the layers, from 0 to 1, not {co.windowed!r}")
    if unit_ms(co) <= 0:
        raise UsageError(f"{name}: all coefficients are 0")
    return co


def _migrate(raw: dict[str, Any], name: str) -> tuple[dict[str, Any], dict[str, float]]:
    """A file's keys but its version, and the terms that its version did not have. Raises UsageError."""
    version = raw.get("version", 1)
    if version not in range(1, FILE_VERSION + 1) or isinstance(version, bool):
        raise UsageError(
            f"{name}: version {version!r} is not known here, the latest is {FILE_VERSION}; calibrate again"
        )
    return {key: value for key, value in raw.items() if key != "version"}, {"q": 0.0} if version < 2 else {}
