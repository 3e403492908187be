"""What the engine reports about itself, and what it supports: token ids, cached tokens in `usage`, photos.

An unsupported feature is left out of the measurement, with a note. Only what every measurement needs is an error.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from sidecar.engines import metrics_parser, model_list, registry
from sidecar.kernels import families
from sidecar.signals.identify import ProbeAnswers, request_pages
from sidecar.tools.calibrate.prompts import PromptTarget
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
    max_images: int
    flags: Mapping[str, str]
    notes: tuple[str, ...]


async def probe_capabilities(target: PromptTarget, kind: str, model: str, context: int) -> EngineCapabilities:
    """Read its pages and try its features. `kind` may be "auto", `model` is a directory or "". Raises EngineRefused."""
    pages = await _pages(target, *registry.FIRST_PATHS, *registry.FURTHER_PATHS)
    card = _card(pages, target.url)
    known = registry.KINDS[registry.recognise(pages) if kind == "auto" else kind]

    async def load() -> float | None:
        try:
            page = (await _pages(target, known.metrics_path)).get(known.metrics_path, b"")
            read = metrics_parser.parse(page, known)
        except ValueError:
            return None
        return None if read.running is None else read.running + (read.waiting or 0)

    target = await _warm_up(replace(target, model=card["id"]))
    prefix = GridShape(8, WARM_UP_TOKENS - 64, 1)
    cached = (await CalibrationTraffic(target, seed=2).once(prefix)).cached > WARM_UP_TOKENS // 4
    target, max_images, why = await _measure_photos(target, model)
    context = context or int(card.get("max_model_len") or DEFAULT_CONTEXT_TOKENS)
    version, flags = registry.identity(pages).engine or "unknown", registry.flags(pages.get("/metrics", b""))
    notes = tuple(note for note in (why, "" if cached else NO_CACHE_NOTE) if note)
    return EngineCapabilities(target, context, cached, version, known.name, load, max_images, flags, notes)


async def text_target(target: PromptTarget) -> PromptTarget:
    """The target with the model that the engine serves, warmed up. Raises EngineRefused."""
    card = _card(await _pages(target, "/v1/models"), target.url)
    return await _warm_up(replace(target, model=card["id"]))


async def _warm_up(target: PromptTarget) -> PromptTarget:
    """Find out whether the engine accepts token ids, and warm it up."""
    try:
        await CalibrationTraffic(target).once(GridShape(16, 0, 1))
    except EngineRefused:
        target = replace(target, ids=False)
        await CalibrationTraffic(target).once(GridShape(16, 0, 1))
    await CalibrationTraffic(target, seed=1).burst(GridShape(WARM_UP_TOKENS // 2, 0, 8), 2)
    return target


async def _measure_photos(target: PromptTarget, model: str) -> tuple[PromptTarget, int, str]:
    """(target with the encoder tokens of photos, maximum photos per request, why there are none)."""

    async def prompt_tokens(images: int, side: int) -> int:
        """Prompt tokens in `usage` of a chat whose text never changes."""
        shape = GridShape(PHOTO_TEXT_TOKENS, 0, 1, images=images, side=side)
        work = await CalibrationTraffic(target, seed=3).once(shape)
        return work.uncached + work.cached

    if not all(map(importlib.util.find_spec, ("numpy", "PIL"))):
        why = "numpy and Pillow are missing; pip install 'inference-sidecar[images]'"
        return target, 0, f"images are not measured: {why}"
    try:
        counted = {side: await prompt_tokens(1, side) for side in PHOTO_SIDES_PX}
    except EngineRefused as e:
        return target, 0, f"images are not measured: {e}"
    most = MAX_IMAGES
    try:
        await prompt_tokens(most, PHOTO_SIDES_PX[0])
    except EngineRefused:
        most = 1
    text = await prompt_tokens(0, PHOTO_SIDES_PX[0])
    spec = families.from_dir(model) if model else None  # the processor's own count, where it is known
    tokens = {
        side: (spec.geometry(side * 3 // 4, side).tokens if spec else 0) or max(1, count - text)
        for side, count in counted.items()
    }
    return replace(target, tokens=tokens), most, ""


def _card(pages: Mapping[str, bytes], url: str) -> dict[str, Any]:
    """The entry of the engine's model: of several, one that is loaded, else the first. Raises EngineRefused."""
    page = pages.get("/v1/models")
    if not page:
        remedy = "start the engine, and check --engine and --engine-key"
        raise EngineRefused(f"/v1/models does not answer at {url}; {remedy}")
    cards = model_list.listed(page)
    if not cards:
        raise EngineRefused("/v1/models lists no model; wait until the engine has loaded it")
    loaded = model_list.choose(page).model
    return next((card for card in cards if card["id"] == loaded), cards[0])


async def _pages(target: PromptTarget, *paths: str) -> dict[str, bytes]:
    """The bodies of pages with status 200."""
    answers = ProbeAnswers()
    await request_pages(answers, target.session, target.url, paths, target.headers, PAGE_TIMEOUT_S)
    return answers.pages
