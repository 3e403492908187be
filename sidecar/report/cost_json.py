"""Pure: the price of a request of a given size: `GET /cost?in=3500&cached=0&out=300&images=1&image_tokens=900`.

`in` counts all input tokens, including cached ones and those of media. Missing ones are 0. All images have one size.
`gpu_ms` and its terms are milliseconds of all GPUs of the engine, `engine_ms` of the engine; `dollars` needs a price.
`prompts=100&sequences=200`: tokens are sums over so many prompts of equal length, which give so many answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from msgspec import structs

from sidecar.events import RequestSize
from sidecar.load import cost_model
from sidecar.load.cost_model import Coefficients
from sidecar.load.gpu_price import GpuPrice

MEDIA: Final = ("images", "image_tokens", "audios", "audio_tokens", "videos", "video_tokens")
PARAMETERS: Final = ("in", "cached", "out", "prompts", "sequences", "audio_seconds", *MEDIA)
MAX_COUNT: Final = 10**9


def render(asked: Mapping[str, str], co: Coefficients, price: GpuPrice) -> dict[str, Any]:
    """The price with its terms. Raises ValueError with one line for the client."""
    work = parse_size(asked)
    mu, engine_ms = cost_model.mu(work, co), cost_model.gpu_ms(work, co)
    dollars = price.dollars(price.gpu_seconds(engine_ms))
    return {
        "mu": mu,
        "mu_milli": round(1000 * mu),
        "gpu_ms": engine_ms * price.gpus,
        "terms_ms": {cause: ms * price.gpus for cause, ms in cost_model.by_cause(work, co)},
        "engine_ms": engine_ms,
        "gpus": price.gpus,
        **({"dollars": dollars} if price.dollars_per_gpu_hour else {}),
        "work": structs.asdict(work),
        "fingerprint": co.fingerprint,
        "source": co.source,
    }


def parse_size(asked: Mapping[str, str]) -> RequestSize:
    """The request that is asked about. Raises ValueError with one line for the client."""
    numbers = {name: _count(name, value) for name, value in asked.items()}
    cached = numbers.get("cached", 0)
    if cached > numbers.get("in", 0):
        raise ValueError("cached must not exceed in: cached tokens are input tokens")
    media = {name: numbers.get(name, 0) for name in MEDIA}
    squares = media["image_tokens"] ** 2 // max(1, media["images"])
    seconds = float(numbers.get("audio_seconds", 0))
    prompts = max(1, numbers.get("prompts", cost_model.audio_windows(seconds)))
    return RequestSize(
        *(numbers.get("in", 0) - cached, cached, numbers.get("out", 0)),
        **media,
        image_squares=squares,
        prompts=prompts,
        sequences=max(prompts, numbers.get("sequences", 1)),
        audio_seconds=seconds,
    )


def _count(name: str, value: str) -> int:
    if name not in PARAMETERS:
        raise ValueError(f"unknown parameter {name[:40]!r}; valid: {', '.join(PARAMETERS)}")
    if not (value.isascii() and value.isdigit() and len(value) < 12 and int(value) <= MAX_COUNT):
        raise ValueError(f"{name} must be a whole number from 0 to {MAX_COUNT}")
    return int(value)
