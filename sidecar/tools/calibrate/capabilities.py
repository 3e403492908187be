"""What the engine reports about itself, and what it supports: token ids, cached tokens in `usage`, photos.

An unsupported feature is left out of the measurement, with a note. Only what every measurement needs is an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import aiohttp

from sidecar.engines import metrics_parser, model_list, registry
from sidecar.kernels import families
from sidecar.tools.calibrate.prompts import PromptTarget, can_make_photos
from sidecar.tools.calibrate.shapes import PHOTO_SIDES_PX, PHOTO_TEXT_TOKENS, GridShape
from sidecar.tools.calibrate.traffic import CalibrationTraffic, EngineRefused, Load

# If the engine does not report its context length.
DEFAULT_CONTEXT_TOKENS: Final = 4096
WARM_UP_TOKENS: Final = 256
PAGE_TIMEOUT_S: Final = 10.0
MAX_IMAGES: Final = 4
NO_CACHE_NOTE: Final = (
    "cached prompts are not measured: the engine does not report cached tokens (vLLM: --enable-prompt-tokens-details)"
)


@dataclass(frozen=True, slots=True)
class EngineCapabilities:
    """The engine. `load` returns its number of requests; `flags` are the settings that its metrics page shows."""

    target: PromptTarget
    context: int
    cached: bool
    version: str
    kind: str
    load: Load
    max_images: int = 0
    flags: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


async def probe_capabilities(
    session: aiohttp.ClientSession, url: str, key: str, kind: str, model: str, context: int
) -> EngineCapabilities:
    """Read its pages and try its features. `kind` may be "auto", `model` is a directory or "". Raises EngineRefused."""
    target = PromptTarget(url, "", key)
    pages = {path: await _page(session, target, path) for path in ("/v1/models", "/metrics", *registry.FURTHER_PATHS)}
    card = _card(pages["/v1/models"], url)
    known = registry.KINDS[registry.recognise({k: v for k, v in pages.items() if v}) if kind == "auto" else kind]
    target = replace(target, model=card["id"])

    async def load() -> float | None:
        try:
            read = metrics_parser.parse(await _page(session, target, known.metrics_path), known)
        except ValueError:
            return None
        return None if read.running is None else read.running + (read.waiting or 0)

    target = await _warm_up(session, target)
    cached = await _reports_cache(session, target)
    target, max_images, why = await _measure_photos(session, target, model)
    return EngineCapabilities(
        target,
        context or int(card.get("max_model_len") or DEFAULT_CONTEXT_TOKENS),
        cached,
        await _version(session, target),
        known.name,
        load,
        max_images,
        registry.flags(pages["/metrics"]),
        tuple(note for note in (why, "" if cached else NO_CACHE_NOTE) if note),
    )


async def text_target(session: aiohttp.ClientSession, url: str, key: str) -> PromptTarget:
    """The first model that the engine serves, warmed up. Raises EngineRefused."""
    target = PromptTarget(url, "", key)
    card = _card(await _page(session, target, "/v1/models"), url)
    return await _warm_up(session, replace(target, model=card["id"]))


async def _warm_up(session: aiohttp.ClientSession, target: PromptTarget) -> PromptTarget:
    """Find out whether the engine accepts token ids, and warm it up."""
    try:
        await CalibrationTraffic(session, target).once(GridShape(16, 0, 1))
    except EngineRefused:
        target = replace(target, ids=False)
        await CalibrationTraffic(session, target).once(GridShape(16, 0, 1))
    await CalibrationTraffic(session, target, seed=1).burst(GridShape(WARM_UP_TOKENS // 2, 0, 8), 2)
    return target


async def _reports_cache(session: aiohttp.ClientSession, target: PromptTarget) -> bool:
    """Whether `usage` reports a prefix sent before as cached."""
    work = await CalibrationTraffic(session, target, seed=2).once(GridShape(8, WARM_UP_TOKENS - 64, 1))
    return work.cached > WARM_UP_TOKENS // 4


async def _measure_photos(
    session: aiohttp.ClientSession, target: PromptTarget, model: str
) -> tuple[PromptTarget, int, str]:
    """(target with the encoder tokens of photos, maximum photos per request, why there are none)."""
    if not can_make_photos():
        why = "numpy and Pillow are missing; pip install 'inference-sidecar[images]'"
        return target, 0, f"images are not measured: {why}"
    try:
        prompt = [await _prompt_tokens(session, target, images=1, side=side) for side in PHOTO_SIDES_PX]
    except EngineRefused as e:
        return target, 0, f"images are not measured: {e}"
    try:
        await _prompt_tokens(session, target, images=MAX_IMAGES, side=PHOTO_SIDES_PX[0])
        most = MAX_IMAGES
    except EngineRefused:
        most = 1
    text = await _prompt_tokens(session, target, images=0, side=PHOTO_SIDES_PX[0])
    counted = {side: count - text for side, count in zip(PHOTO_SIDES_PX, prompt, strict=True)}
    tokens = {side: _by_processor(model, side) or max(1, counted[side]) for side in PHOTO_SIDES_PX}
    return replace(target, tokens=tokens), most, ""


async def _prompt_tokens(session: aiohttp.ClientSession, target: PromptTarget, *, images: int, side: int) -> int:
    """Prompt tokens in `usage` of a chat whose text never changes."""
    work = await CalibrationTraffic(session, target, seed=3).once(
        GridShape(PHOTO_TEXT_TOKENS, 0, 1, images=images, side=side)
    )
    return work.uncached + work.cached


def _by_processor(model: str, side: int) -> int:
    """The tokens of a photo according to the model's processor; 0 if unknown."""
    spec = families.from_dir(model) if model else None
    return spec.geometry(side * 3 // 4, side).tokens if spec else 0


def _card(page: bytes, url: str) -> dict[str, Any]:
    """The entry of the engine's model: of several, one that is loaded, else the first. Raises EngineRefused."""
    if not page:
        raise EngineRefused(
            f"/v1/models does not answer at {url}; start the engine, and check --engine and --engine-key"
        )
    cards = model_list.listed(page)
    if not cards:
        raise EngineRefused("/v1/models lists no model; wait until the engine has loaded it")
    loaded = model_list.choose(page).model
    return next((card for card in cards if card["id"] == loaded), cards[0])


async def _version(session: aiohttp.ClientSession, target: PromptTarget) -> str:
    try:
        return str(json.loads(await _page(session, target, "/version"))["version"])[:64]
    except (ValueError, LookupError, TypeError):
        return "unknown"


async def _page(session: aiohttp.ClientSession, target: PromptTarget, path: str) -> bytes:
    """The body of a page with status 200, otherwise empty."""
    try:
        async with session.get(
            target.url + path, headers=target.headers, timeout=aiohttp.ClientTimeout(total=PAGE_TIMEOUT_S)
        ) as answer:
            return await answer.read() if answer.status == 200 else b""
    except (aiohttp.ClientError, OSError, TimeoutError):
        return b""
