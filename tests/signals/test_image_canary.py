"""The image canary, and whether an engine gets prepared images, over real HTTP. The engines count by transformers."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from PIL import Image

from sidecar.kernels import families
from sidecar.kernels.grid import ProcessorSpec
from sidecar.settings import Settings
from sidecar.signals import image_support
from sidecar.signals.engine_monitor import EngineMonitor
from sidecar.signals.image_canary import CHAT, CanaryImage, check_images, choose_images, data_url, judge

from ..engines.engine_faces import Shown, models, said
from ..images.published import settings as published
from ..seeing_engine import processor, prompt_tokens
from ..waiting import PATIENCE

SIZES = {"size": {"shortest_edge": 56 * 56, "longest_edge": 448 * 448}}
CONFIG = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    **SIZES,
}


def spec_of(config: dict[str, Any]) -> ProcessorSpec:
    spec = families.from_config(config)
    assert spec is not None
    return spec


class Sees:
    """A chat endpoint that counts an image's tokens with the sizes of `config`; `trouble`: statuses that come first."""

    def __init__(self, config: dict[str, Any], *trouble: int) -> None:
        self._processor = processor(config)
        self.trouble = list(trouble)
        self.asked = 0

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        self.asked += 1
        if self.trouble:
            return web.json_response({}, status=self.trouble.pop(0))
        tokens = prompt_tokens(await request.json(), self._processor)
        return web.json_response({"choices": [{}], "usage": {"prompt_tokens": tokens}})


def vllm(chat: Any, version: str = "0.32.0") -> Shown:
    return Shown({"/v1/models": models("vllm"), "/version": said(version=version)}, handlers={CHAT: chat})


@pytest.fixture(autouse=True)
def transformers(requires: Callable[[str], Path]) -> None:
    requires("python:transformers")


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


OTHER_SIZES = {
    "the same": (SIZES["size"], ""),
    "a smaller limit": ({"shortest_edge": 56 * 56, "longest_edge": 224 * 224}, "size_differs"),
    "a larger limit": ({"shortest_edge": 56 * 56, "longest_edge": 1280 * 1280}, "size_differs"),
    "enlarged": ({"shortest_edge": 448 * 448, "longest_edge": 448 * 448}, "size_differs"),
}


@pytest.mark.parametrize("name", OTHER_SIZES)
async def test_other_sizes_show(session: aiohttp.ClientSession, name: str) -> None:
    """An engine with the sizes of the model's files agrees; one that was started with others does not."""
    size, reason = OTHER_SIZES[name]
    async with vllm(Sees(CONFIG | {"size": size})) as engine:
        check = await check_images(session, engine.url, {}, "m", spec_of(CONFIG))
        assert (check.reason, check.is_final) == (reason, True)
        assert all(body["max_tokens"] == 1 for body in engine.bodies[CHAT])
        assert len(engine.bodies[CHAT]) == 3


@pytest.mark.parametrize(("status", "final"), [(400, True), (404, True), (401, False), (429, False), (503, False)])
async def test_an_engine_that_answers_no_image_is_not_trusted(
    session: aiohttp.ClientSession, status: int, final: bool
) -> None:
    """A refusal lasts; an engine that is busy, or that wants another key, is asked again."""
    async with vllm(Sees(CONFIG, status)) as engine:
        check = await check_images(session, engine.url, {}, "m", spec_of(CONFIG))
        assert (check.reason, check.is_final) == ("size_unchecked", final) and str(status) in check.detail


@pytest.mark.parametrize("answer", ["", "[]", '{"usage": null}', '{"usage": {"prompt_tokens": "9"}}', "[" * 100_000])
async def test_an_answer_without_a_count_proves_nothing(session: aiohttp.ClientSession, answer: str) -> None:
    """Whatever comes, the check ends with a reason to let images pass."""

    async def chat(_: web.Request) -> web.StreamResponse:
        return web.Response(text=answer, content_type="application/json")

    async with vllm(chat) as engine:
        assert (await check_images(session, engine.url, {}, "m", spec_of(CONFIG))).reason == "size_unchecked"


def test_the_image_is_a_png_of_its_size() -> None:
    """It opens, whole, in Pillow."""
    url = data_url(48, 64)
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
        image.load()
        assert (image.format, image.size, image.getextrema()) == ("PNG", (64, 48), (128, 128))


def test_no_model_is_asked_for_an_image_of_too_many_tokens() -> None:
    """At Qwen2.5-VL's published limit an image has 16384 tokens: none is sent, and images pass."""
    config = CONFIG | {"size": {"shortest_edge": 3136, "longest_edge": 12_845_056}}
    assert "more than 5000 tokens" in str(choose_images(spec_of(config)))


@pytest.mark.parametrize("name", ["PixtralImageProcessor", "Gemma3ImageProcessor"])
def test_the_large_image_is_at_the_limit(name: str) -> None:
    """For published processors the large image has the most tokens that an image of its shape can have."""
    model = {"image_seq_length": 256}
    spec = families.from_config(published(name), model)
    assert spec is not None
    images = choose_images(spec)
    assert not isinstance(images, str)
    most = max(spec.geometry(3 * n, 4 * n).tokens for n in range(16, 2000, 7))
    assert images[1].geometry.tokens == most


@pytest.mark.parametrize(("ratio", "min_crop"), [(1.2, 256), (3.0, 896)])
async def test_an_engine_that_adds_crops_shows(session: aiohttp.ClientSession, ratio: float, min_crop: int) -> None:
    """Gemma 3's pan-and-scan in the engine's arguments only: a wide image has crops there, so images pass."""
    from transformers import Gemma3ImageProcessor

    config = published("Gemma3ImageProcessor")
    scan = {"pan_and_scan_min_crop_size": min_crop, "pan_and_scan_min_ratio_to_activate": ratio}
    plain = Gemma3ImageProcessor(**config)
    crops = Gemma3ImageProcessor(**config, do_pan_and_scan=True, pan_and_scan_max_num_crops=4, **scan)
    spec = families.from_config(config, {"image_seq_length": 256})
    assert spec is not None
    for images, reason in ((plain, ""), (crops, "size_differs")):
        async with vllm(CroppingChat(images)) as engine:
            assert (await check_images(session, engine.url, {}, "m", spec)).reason == reason


class CroppingChat:
    """A chat endpoint that counts 256 tokens for an image and for each of its crops, with 4 around each."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        tokens = 9
        for part in (await request.json())["messages"][0]["content"]:
            if part["type"] == "image_url":
                data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
                made = self._processor(Image.open(io.BytesIO(data)).convert("RGB"), return_tensors="pt")
                tokens += (256 + 4) * (1 + int(made["num_crops"][0]))
        return web.json_response({"choices": [{}], "usage": {"prompt_tokens": tokens}})


def test_a_tiling_processor_may_put_tokens_around_its_tiles() -> None:
    """SmolVLM's 17 tiles of 64 tokens come with 40 others; a tile more or less is still seen."""
    config = published("SmolVLMImageProcessor")
    spec = families.from_config(config, {"image_seq_len": 64})
    assert spec is not None
    images = choose_images(spec)
    assert not isinstance(images, str)
    geometry = images[1].geometry
    tiles = geometry.tiles
    around = 2 * tiles + 4
    seen: list[tuple[CanaryImage, int]] = [(image, 9 + image.geometry.tokens + around) for image in images]
    assert judge(9, seen).reason == ""
    other = [(image, tokens - 64) for image, tokens in seen]
    assert judge(9, other).reason == "size_differs"


# --- what the engine is, and what it showed ---


@pytest.fixture
async def watch(tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """A function: engine and files of its model -> an EngineMonitor that runs."""
    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
        tasks = []

        async def start(engine: Shown, *names: str, **chosen: Any) -> EngineMonitor:
            (tmp_path / "preprocessor_config.json").write_text(json.dumps(CONFIG))
            for name in names:
                (tmp_path / name).write_text("{}")
            monitor = EngineMonitor(session, Settings(engine=engine.url, model=str(tmp_path), **chosen))
            opened = asyncio.Event()
            opened.set()
            tasks.append(group.create_task(monitor.run(opened)))
            return monitor

        yield start
        for task in tasks:
            task.cancel()


async def until(monitor: EngineMonitor, reason: str) -> None:
    async with asyncio.timeout(PATIENCE):
        while monitor.images_pass != reason:  # noqa: ASYNC110  a state of another task without an event
            await asyncio.sleep(0.005)


async def test_images_pass_until_the_engine_has_shown_its_sizes(watch: Callable[..., Any]) -> None:
    """Nothing is prepared before the image canary; an engine that restarts with other sizes gets nothing prepared."""
    gate = asyncio.Event()
    sees = Sees(CONFIG)

    async def chat(request: web.Request) -> web.StreamResponse:
        await gate.wait()
        return await sees(request)

    async with vllm(chat) as engine:
        monitor = await watch(engine)
        assert monitor.images_pass == "engine_unknown"
        async with asyncio.timeout(PATIENCE):
            while not engine.asked[CHAT]:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        assert monitor.images_pass == "engine_unknown"
        gate.set()
        await until(monitor, "")
        sees._processor = processor(CONFIG | {"size": {"shortest_edge": 3136, "longest_edge": 224 * 224}})
        monitor.engine_restarted()
        assert monitor.images_pass == "engine_unknown"
        await until(monitor, "size_differs")


async def test_a_busy_engine_is_asked_again(watch: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """503 to the image canary lasts until the engine has time for it."""
    monkeypatch.setattr(image_support, "RETRY_INTERVAL_S", 0.01)
    async with vllm(Sees(CONFIG, 503, 503)) as engine:
        monitor = await watch(engine)
        await until(monitor, "size_unchecked")
        await until(monitor, "")


ROWS = {
    "an old vLLM": (vllm, "0.23.0", (), "engine_version"),
    "a vLLM that is not known yet": (vllm, "0.99.0", (), "engine_version"),
    "a vLLM that says no version": (vllm, "", (), "engine_unknown"),
    "a model with Mistral's tokenizer": (vllm, "0.32.0", ("tekken.json",), "mistral_tokenizer"),
}


@pytest.mark.parametrize("name", ROWS)
async def test_other_engines_are_not_asked(watch: Callable[..., Any], name: str) -> None:
    """By what the engine and the model are, images pass; no image canary is sent."""
    make, version, files, reason = ROWS[name]
    async with make(Sees(CONFIG), version) as engine:
        monitor = await watch(engine, *files)
        if reason == "engine_unknown":
            async with asyncio.timeout(PATIENCE):
                while not monitor.identity.models:  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
        await until(monitor, reason)
        assert CHAT not in engine.bodies or all("image" not in json.dumps(body) for body in engine.bodies[CHAT])
