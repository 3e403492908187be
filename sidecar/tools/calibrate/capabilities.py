"""What the engine reports about itself, and what it supports: token ids, cached prompts, photos.

An unsupported feature is left out of the measurement, with a note. Only what every measurement needs is an error.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from sidecar.engines import metrics_parser, model_list, registry
from sidecar.kernels import families
from sidecar.readings import EngineSample
from sidecar.signals.identify import ProbeAnswers, request_pages
from sidecar.tools.calibrate.prompts import PromptTarget
from sidecar.tools.calibrate.shapes import PHOTO_SIDES_PX, PHOTO_TEXT_TOKENS, GridShape
from sidecar.tools.calibrate.traffic import MAX_KV_TOKENS, CalibrationTraffic, Counters, EngineRefused, Load

# If the engine does not report its context length.
DEFAULT_CONTEXT_TOKENS: Final = 4096
WARM_UP_TOKENS: Final = 256
TRIALS: Final = 4
PAGE_TIMEOUT_S: Final = 10.0
MAX_IMAGES: Final = 4
# Of a prompt that is sent again: several blocks of any engine, a sixth of the context at most.
MAX_PREFIX_TOKENS: Final = 2048
NOT_TOLD: Final = (
    "the engine does not report cached tokens (vLLM: --enable-prompt-tokens-details; SGLang: "
    "--enable-cache-report; llama.cpp: --metrics)"
)
NOT_CACHED: Final = (
    "the engine did not cache a repeated prompt (vLLM: --enable-prefix-caching; llama.cpp: "
    "--cache-prompt and a slot for each conversation)"
)


@dataclass(frozen=True, slots=True)
class EngineCapabilities:
    """The engine. `load` returns its number of requests; `flags` are the settings that its metrics page shows.

    `no_cached`: why no cached prompts are measured; "" if they are. `kv_tokens`: the size of its KV cache.
    """

    target: PromptTarget
    context: int
    no_cached: str
    version: str
    kind: str
    load: Load
    counters: Counters
    kv_tokens: float
    max_images: int
    flags: Mapping[str, str]
    notes: tuple[str, ...]

    @property
    def cached(self) -> bool:
        """Whether prompts of which a part is cached are measured."""
        return not self.no_cached


async def probe_capabilities(target: PromptTarget, kind: str, model: str, context: int) -> EngineCapabilities:
    """Read its pages and try its features. `kind` may be "auto", `model` is a directory or "". Raises EngineRefused."""
    pages = await _pages(target, *registry.FIRST_PATHS, *registry.FURTHER_PATHS)
    card = _card(pages, target.url)
    known = registry.KINDS[registry.recognise(pages) if kind == "auto" else kind]

    async def counters() -> EngineSample | None:
        try:
            return metrics_parser.parse((await _pages(target, known.metrics_path))[known.metrics_path], known)
        except (KeyError, ValueError):
            return None

    async def load() -> float | None:
        read = await counters()
        return None if read is None or read.running is None else read.running + (read.waiting or 0)

    identity = registry.identity(pages)
    context = context or int(card.get("max_model_len") or 0) or identity.max_context or DEFAULT_CONTEXT_TOKENS
    target = await _warm_up(replace(target, model=card["id"]))
    no_cached = await _explain_no_cached(CalibrationTraffic(target, seed=2, counters=counters), context)
    target, max_images, why = await _measure_photos(target, model)
    page = await counters()
    return EngineCapabilities(
        target,
        context,
        no_cached,
        identity.engine or "unknown",
        known.name,
        load,
        counters,
        (page and page.kv_capacity_tokens) or MAX_KV_TOKENS,
        max_images,
        registry.flags(pages.get("/metrics", b"")),
        (why,) if why else (),
    )


async def _explain_no_cached(traffic: CalibrationTraffic, context: int) -> str:
    """Why cached prompts cannot be measured; "" if a repeated prompt was cached, and the engine reported it."""
    prefix = min(MAX_PREFIX_TOKENS, context // 6)
    sample = await traffic.run(GridShape(8, prefix, 1), 1, 0.0)
    if not sample.tells_cached:
        return NOT_TOLD
    return "" if sample.cost().cached > prefix / 4 else NOT_CACHED


async def text_target(target: PromptTarget) -> PromptTarget:
    """The target with the model that the engine serves, warmed up. Raises EngineRefused."""
    card = _card(await _pages(target, "/v1/models"), target.url)
    return await _warm_up(replace(target, model=card["id"]))


async def _warm_up(target: PromptTarget) -> PromptTarget:
    """Find out whether the engine accepts token ids, and warm it up.

    What random ids make a model generate may be no text, which llama.cpp answers with 500 (seen); words do not.
    """
    trial = CalibrationTraffic(target)
    try:
        for _ in range(TRIALS):
            await trial.once(GridShape(WARM_UP_TOKENS // 2, 0, 32))  # one by one: a full queue refuses, too
    except EngineRefused:
        takes_ids = False
    else:
        takes_ids = trial.unwritten == 0
    if not takes_ids:
        target = await _measure_words(replace(target, ids=False))
    await CalibrationTraffic(target, seed=1).burst(GridShape(WARM_UP_TOKENS // 2, 0, 8), 2)
    return target


async def _measure_words(target: PromptTarget) -> PromptTarget:
    """The target with the tokens that one of its words has, from the difference between two prompts."""
    few, many = 8, 40
    traffic = CalibrationTraffic(replace(target, tokens_per_word=1.0))
    used = [await traffic.once(GridShape(words, 0, 1)) for words in (few, many)]
    first, second = (work.uncached + work.cached for work in used)
    return replace(target, tokens_per_word=max(0.25, (second - first) / (many - few)))


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
    each = {side: count - text for side, count in counted.items()}
    return replace(target, tokens=tokens, counted={**each, 0: text}), most, ""


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
