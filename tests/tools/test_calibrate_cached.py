"""Cached prompts in a calibration: cached tokens are those that the engine reports, never the planned ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from sidecar.events import RequestSize
from sidecar.load import cost_model
from sidecar.load.cost_model import Coefficients
from sidecar.tools.calibrate import capabilities, fit, report
from sidecar.tools.calibrate.fit import FitRow, Measured
from sidecar.tools.calibrate.prompts import PromptTarget, read_usage
from sidecar.tools.calibrate.shapes import GridShape, plan_shapes
from sidecar.tools.calibrate.traffic import CalibrationTraffic, EngineRefused

TRUE = Coefficients(k=5.0, a=0.2, b=2e-5, d=3.0, f=4e-4)


@dataclass
class CachingEngine:
    """Reports cached tokens. `keeps`: of a prompt that begins as an earlier one, the tokens that it still has cached.

    `tells`: where it does so: in OpenAI's details, in llama.cpp's timings, in llama.cpp's counters, or nowhere. A word
    has three tokens. `writes`: whether it can write what it generated from ids, as llama.cpp cannot if that is no text.
    """

    tells: str
    keeps: Callable[[int], int] = lambda common: common
    prompts: list[tuple[Any, ...]] = field(default_factory=list)
    computed: int = 0
    cached: int = 0
    writes: bool = True

    async def complete(self, request: web.Request) -> web.Response:
        body = await request.json()
        text = body["prompt"]
        if isinstance(text, list) and not self.writes and len(self.prompts) % 4 == 3:
            self.prompts.append(tuple(text))
            return web.json_response({"error": {"message": "The model produced output that is no text"}}, status=500)
        prompt = tuple(word for word in text.split() for _ in range(3)) if isinstance(text, str) else tuple(text)
        common = max((_common(prompt, old) for old in self.prompts), default=0)
        cached = self.keeps(min(common, len(prompt) - 1))
        self.prompts.append(prompt)
        self.computed, self.cached = self.computed + len(prompt) - cached, self.cached + cached
        answer: dict[str, Any] = {"usage": {"prompt_tokens": len(prompt), "completion_tokens": body["max_tokens"]}}
        if self.tells == "details":
            answer["usage"]["prompt_tokens_details"] = {"cached_tokens": cached}
        if self.tells == "timings":
            answer["timings"] = {"cache_n": cached, "prompt_n": len(prompt) - cached}
        return web.json_response(answer)

    async def page(self, request: web.Request) -> web.Response:
        counters = {"requests_processing": 0, "prompt_tokens_total": self.computed}
        if self.tells == "counters":
            counters["prompt_tokens_cached_total"] = self.cached
        return web.Response(text="".join(f"llamacpp:{name} {value}\n" for name, value in counters.items()))

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "m", "owned_by": "llamacpp", "max_model_len": 2048}]})

    @asynccontextmanager
    async def target(self) -> Any:
        """Serve on a free port; yields a PromptTarget."""
        app = web.Application()
        app.router.add_post("/v1/completions", self.complete)
        app.router.add_get("/metrics", self.page)
        app.router.add_get("/v1/models", self.models)
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            host, port = runner.addresses[0][:2]
            async with aiohttp.ClientSession() as session:
                yield PromptTarget(session, f"http://{host}:{port}")
        finally:
            await runner.cleanup()


def _common(a: tuple[Any, ...], b: tuple[Any, ...]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def nothing(common: int) -> int:
    return 0


def blocks(common: int) -> int:
    return common // 128 * 128


def alternate() -> Callable[[int], int]:
    """Every second time the prefix is gone."""
    turns: Iterator[bool] = iter([True, False] * 10_000)
    return lambda common: common if common > 100 and next(turns) else 0


@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        (CachingEngine("details"), ""),
        (CachingEngine("timings"), ""),
        (CachingEngine("counters"), ""),
        (CachingEngine("details", blocks), ""),
        (CachingEngine("nowhere"), capabilities.NOT_TOLD),
        (CachingEngine("details", nothing), capabilities.NOT_CACHED),
        (CachingEngine("timings", nothing), capabilities.NOT_CACHED),
        (CachingEngine("counters", nothing), capabilities.NOT_CACHED),
    ],
)
async def test_whether_cached_prompts_can_be_measured(engine: CachingEngine, expected: str) -> None:
    """Only if a repeated prompt is cached and the engine reports it, in one of three places."""
    async with engine.target() as target:
        found = await capabilities.probe_capabilities(target, "llamacpp", "", 0)
    assert (found.no_cached, found.cached, found.context) == (expected, not expected, 2048)


@pytest.mark.parametrize(
    ("engine", "cached"),
    [
        (CachingEngine("details"), {500}),
        (CachingEngine("details", blocks), {384}),
        (CachingEngine("details", nothing), {0}),
        (CachingEngine("counters"), {500}),
        (CachingEngine("counters", nothing), {0}),
        (CachingEngine("nowhere"), {0}),
        (CachingEngine("details", alternate()), {500, 0}),
    ],
)
async def test_a_sample_has_what_the_engine_had_cached(engine: CachingEngine, cached: set[int]) -> None:
    """Whole, in blocks, not at all or only at times: sizes and their shares are those that the engine reported."""
    async with engine.target() as base:
        target = replace(base, model="m")
        read = (await capabilities.probe_capabilities(target, "llamacpp", "", 0)).counters
        sample = await CalibrationTraffic(target, seed=7, counters=read).run(GridShape(20, 500, 1), 2, 0.05)
    sizes = sample.cost().sizes
    assert {size.cached for _, size in sizes} == cached and sum(share for share, _ in sizes) == pytest.approx(1.0)
    assert all(size.uncached + size.cached == 520 for _, size in sizes)
    assert sample.tells_cached is (engine.tells != "nowhere")


async def test_words_are_sent_where_ids_lead_to_answers_that_cannot_be_written() -> None:
    """One answer in four is 500 then. The prompts in words have the planned length, with the cached part."""
    engine = CachingEngine("details", writes=False)
    async with engine.target() as target:
        found = await capabilities.text_target(target)
        sample = await CalibrationTraffic(found, seed=7).run(GridShape(60, 300, 1), 2, 0.0)
    assert (found.ids, found.tokens_per_word) == (False, 3.0)
    assert all(size.uncached + size.cached == 360 and size.cached >= 300 for _, size in sample.cost().sizes)


async def test_an_engine_that_fails_is_not_measured() -> None:
    """A few answers that it could not write do not count; more are an error."""

    async def fail(request: web.Request) -> web.Response:
        return web.json_response({"error": {"message": "out of memory"}}, status=500)

    engine = CachingEngine("details")
    engine.complete = fail  # type: ignore[method-assign]
    async with engine.target() as target:
        with pytest.raises(EngineRefused, match="500: out of memory"):
            await CalibrationTraffic(target).run(GridShape(60, 0, 1), 2, 0.0)


async def test_each_open_request_has_a_prefix_of_its_own() -> None:
    """As conversations do; as many as half of the KV cache holds."""
    engine = CachingEngine("details")
    async with engine.target() as base:
        traffic = CalibrationTraffic(replace(base, model="m"), kv_tokens=3000)
        await traffic.run(GridShape(20, 500, 1), 8, 0.0)
    assert len({prompt[:500] for prompt in engine.prompts}) == 3


def test_llama_cpps_timings_report_cached_tokens() -> None:
    """From a real llama.cpp b10434; an older one has no `prompt_tokens_details`."""
    answer = json.loads(
        '{"usage":{"completion_tokens":8,"prompt_tokens":84,"total_tokens":92,"prompt_tokens_details":'
        '{"cached_tokens":83}},"timings":{"cache_n":83,"prompt_n":1,"prompt_ms":0.515,"predicted_n":8}}'
    )
    shape, target = GridShape(1, 83, 8), PromptTarget(None, "")  # type: ignore[arg-type]
    assert read_usage(answer, shape, target).work == RequestSize(1, 83, 8)
    del answer["usage"]["prompt_tokens_details"]
    assert read_usage(answer, shape, target).work == RequestSize(1, 83, 8)
    del answer["timings"]
    assert read_usage(answer, shape, target).work == RequestSize(84, 0, 8)
    assert not read_usage(answer, shape, target).tells_cached


def measure(shape: GridShape, *cached: float) -> Measured:
    """What this shape costs truly, if such shares of its prefix were cached in equally many requests each."""
    total = shape.uncached + shape.cached
    kept = [round(share * shape.cached) for share in cached]
    sizes = [RequestSize(total - each, each, shape.output) for each in kept]
    mix = tuple((1 / len(sizes), size) for size in sizes)
    ms = sum(share * cost_model.gpu_ms(size, TRUE) for share, size in mix)
    return Measured(sizes[0], ms, mix=mix if len(mix) > 1 else ())


@pytest.mark.parametrize("cached", [(1.0,), (0.0,), (0.75,), (1.0, 0.0), (1.0, 1.0, 0.0)])
def test_the_fit_uses_the_cached_share_of_prompts(cached: tuple[float, ...]) -> None:
    """However much of the prefixes was cached, the true coefficients are found; as planned, they would not be."""
    shapes = plan_shapes(8192, cached=True)
    rows = [measure(shape, *cached) for shape in shapes if not shape.held_out]
    held_out = [measure(shape, 1.0) for shape in shapes if shape.held_out]
    assert fit.accuracy(held_out, fit.fit(rows)).mape < 0.01
    fitted = [shape for shape in shapes if not shape.held_out]
    planned = [RequestSize(shape.uncached, shape.cached, shape.output) for shape in fitted]
    assumed = fit.fit([Measured(work, row.ms) for work, row in zip(planned, rows, strict=True)])
    assert (fit.accuracy(held_out, assumed).mape > 0.02) is (cached != (1.0,))


def test_a_turn_without_the_cache_is_a_row_of_its_own() -> None:
    """The lower quartile over turns must not mix what was cached with what was not."""
    shape = GridShape(64, 1024, 8)
    turns = [(shape, measure(shape, share)) for share in (1.0, 0.0, 1.0, 1.0)]
    rows = fit.merge_turns(turns)
    assert sorted(row.work.cached for row in rows) == [0, 1024]
    plain = GridShape(64, 0, 8)
    assert len(fit.merge_turns([(plain, Measured(RequestSize(64, c, 8), 9.0)) for c in (0, 3)])) == 1


@pytest.mark.parametrize(
    ("cached", "said"),
    [((1.0, 1.0), ""), ((0.0, 1.0), ""), ((0.0, 0.0), "0% of them at most was"), ((), "why none were sent")],
)
def test_the_file_states_that_cached_prompts_were_not_measured(cached: tuple[float, ...], said: str) -> None:
    """Unless at least one shape had its prefix cached."""
    shapes = [GridShape(64 + i, 1024, 8) for i in range(len(cached))]
    rows = [
        FitRow(m.work, m.ms, shape, 0.0)
        for shape, m in ((shape, measure(shape, share)) for shape, share in zip(shapes, cached, strict=True))
    ]
    why = report.explain_no_cached([*rows, FitRow(RequestSize(8), 1.0, GridShape(8, 0, 1), 0.0)], "why none were sent")
    assert why.startswith(said) and bool(why) is bool(said)


@pytest.mark.parametrize(
    ("prompt", "images", "encoded"), [(233, 1, 1), (232, 2, 1), (426, 4, 2), (427, 2, 2), (815, 4, 4), (45, 1, 1)]
)
def test_photos_that_the_engine_encodes_together_are_counted_so(prompt: int, images: int, encoded: int) -> None:
    """llama.cpp b10434 with a Qwen2-VL counted 233, 232 and 426 tokens for 1, 2 and 4 photos of 194 tokens each."""
    target = PromptTarget(None, "", tokens={448: 194}, counted={448: 194, 0: 39})  # type: ignore[arg-type]
    usage = {"usage": {"prompt_tokens": prompt, "completion_tokens": 1}}
    work = read_usage(usage, GridShape(32, 0, 1, images=images, side=448), target).work
    assert (work.images, work.image_tokens, work.image_squares) == (images, encoded * 194, encoded * 194**2)
    few = replace(target, counted={448: 1, 0: 39})  # a placeholder
    assert read_usage(usage, GridShape(32, 0, 1, images=images, side=448), few).work.image_tokens == images * 194
