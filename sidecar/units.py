"""Pure: request size -> GPU milliseconds -> model units (MU).

    gpu_ms = k + a*u + b*u*(c + u/2) + d*o + f*o*(n + o/2) + g*e + h*items        n = u + c
    MU     = gpu_ms / gpu_ms(3500 in, 300 out)

u uncached and c cached input tokens, o output tokens, e encoder tokens of images. The coefficients belong to a (model,
hardware) pair. The defaults are a roofline, not a measurement; `Coefficients.source` says which of the two one has.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields

from sidecar.errors import UsageError
from sidecar.facts import Usage, Work

REFERENCE = Work(uncached=3500, output=300)


@dataclass(frozen=True, slots=True)
class Coefficients:
    """Milliseconds of GPU time per unit of each term.

    Defaults: roofline of a dense 8B model in bf16 (32 layers, hidden 4096, 8 KV heads of 128) on an H100 SXM (990 TFLOP/s
    dense, 3.35 TB/s, half and 70 % of them reached), decode in a batch of 32:
    a = 2*8e9 / 495e12 s; b = 4*32*4096 / 495e12 s; d = 16e9 / 2.3e12 / 32 s; f = 131072 / 2.3e12 s (KV bytes per token);
    g = 2*0.67e9*4 / 495e12 s (a 0.67B vision tower, 4 patches merge into one token); k, h = launch and glue, in ms.
    """

    k: float = 2.0
    a: float = 0.0323
    b: float = 1.06e-6
    d: float = 0.217
    f: float = 5.7e-5
    g: float = 0.0108
    h: float = 1.0
    fingerprint: str = "default-8b-h100"
    source: str = "default"
    # What `sidecar calibrate` adds: what was measured, errors on held-out shapes, MU in flight that kept p95 within slo_seconds.
    model: str = ""
    engine: str = ""
    mape: float = 0.0
    p90: float = 0.0
    r2: float = 0.0
    mu_in_flight: float = 0.0
    slo_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Terms:
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


def terms(work: Work, co: Coefficients) -> Terms:
    """Price each term of one request in GPU milliseconds."""
    u, c, o = work.uncached, work.cached, work.output
    return Terms(
        overhead=co.k,
        prefill=co.a * u,
        attention=co.b * u * (c + u / 2),
        decode=co.d * o,
        kv_read=co.f * o * (u + c + o / 2),
        images=co.g * work.image_tokens + co.h * work.images,
    )


def gpu_ms(work: Work, co: Coefficients) -> float:
    """GPU milliseconds of one request."""
    return terms(work, co).total


def unit_ms(co: Coefficients) -> float:
    """GPU milliseconds of one MU."""
    return gpu_ms(REFERENCE, co)


def mu(work: Work, co: Coefficients) -> float:
    """Model units of one request."""
    return gpu_ms(work, co) / unit_ms(co)


def max_mu_per_minute(co: Coefficients) -> float:
    """MU that the hardware can do in a minute: 60 s of GPU time over the price of one MU."""
    return 60_000 / unit_ms(co)


def max_mu_in_flight(co: Coefficients, slo_seconds: float) -> float:
    """MU in flight at which a request takes `slo_seconds`: as measured at that SLO, else at full flow by Little's law."""
    if co.mu_in_flight > 0 and co.slo_seconds == slo_seconds:
        return co.mu_in_flight
    return max_mu_per_minute(co) / 60 * slo_seconds


def settled_work(expected: Work, usage: Usage | None, delivered_tokens: int) -> Work:
    """What a request really was: the engine's `usage` where there is one, else the estimate with the delivered tokens."""
    if usage is None:
        return Work(expected.uncached, expected.cached, delivered_tokens, expected.image_tokens, expected.images)
    cached = min(usage.cached_tokens, usage.prompt_tokens)
    return Work(usage.prompt_tokens - cached, cached, usage.completion_tokens, expected.image_tokens, expected.images)


def to_json(co: Coefficients) -> str:
    """The coefficients as the text of a coefficients file."""
    return json.dumps(asdict(co), indent=1)


def from_json(text: str, name: str = "coefficients") -> Coefficients:
    """Read a coefficients file. Raises UsageError with one line when a key is unknown or a number is not one."""
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as e:
        raise UsageError(f"{name}: not JSON (line {e.lineno})") from None
    if not isinstance(raw, dict):
        raise UsageError(f"{name}: expected a JSON object of coefficients")
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
    co = Coefficients(**{"source": "file", **raw})
    if unit_ms(co) <= 0:
        raise UsageError(f"{name}: all coefficients are 0")
    return co
