"""A real vLLM sees the same pixels and gives the same answer, whether the sidecar prepared the image or not."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from PIL import Image

from sidecar.tools.synthetic_photos import photo, pixels

from . import client, processes
from .client import Http
from .processes import Engine, Sidecar

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(400),
    pytest.mark.parametrize("engine", ["small"], indirect=True),
]

PATH = "/v1/chat/completions"
QUESTION = "Describe what is in this picture, please."
LOSSLESS = ("data:image/bmp", "data:image/x-portable-pixmap")  # what a prepared image is sent as
PIXELS = Path(__file__).with_name("pixels.py")


def chat(*images: bytes, media_type: str = "image/jpeg") -> dict[str, Any]:
    """A greedy chat request about `images`, with the log-probabilities of the five likeliest tokens at each place."""
    urls = [f"data:{media_type};base64,{base64.b64encode(image).decode()}" for image in images]
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content = [*parts, {"type": "text", "text": QUESTION}]
    more = {"max_tokens": 24, "logprobs": True, "top_logprobs": 5}
    return client.completion(**more) | {"messages": [{"role": "user", "content": content}]}


def encoded(kind: str, width: int, height: int, **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels(width, height, 7)).save(out, kind, **options)
    return out.getvalue()


def see_through(width: int, height: int) -> bytes:
    """A PNG whose alpha runs from nothing to all, so that what is put behind it shows."""
    image = Image.fromarray(pixels(width, height, 8))
    image.putalpha(Image.linear_gradient("L").resize((width, height)))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


PASSES = "small, enlarged"  # it would not lose half of its pixels
TRANSPARENT = "alpha"  # what is put behind it is the engine's setting
BODIES: dict[str, dict[str, Any]] = {
    "1080p": chat(photo(1920, 1080, 1)),
    "720p": chat(photo(1280, 720, 2)),
    "12 MP": chat(photo(4000, 3000, 3)),
    "odd": chat(photo(613, 337, 4)),
    PASSES: chat(photo(40, 30, 5)),
    "long": chat(photo(1600, 90, 6)),
    **{f"EXIF {turn}": chat(photo(900, 600, 10 + turn, exif_orientation=turn)) for turn in range(1, 9)},
    "grey": chat(encoded("JPEG", 800, 500)),
    "PNG": chat(encoded("PNG", 500, 400), media_type="image/png"),
    "WebP": chat(encoded("WEBP", 640, 480, quality=80), media_type="image/webp"),
    TRANSPARENT: chat(see_through(640, 480), media_type="image/png"),
    "two": chat(photo(1280, 720, 20), photo(600, 800, 21, exif_orientation=6)),
}


class Recorder:
    """An HTTP server between the sidecar and the engine that passes everything on and keeps the chat bodies."""

    def __init__(self, engine_url: str, http: Http) -> None:
        self.bodies: list[dict[str, Any]] = []
        self._engine = engine_url
        self._http = http

    async def handle(self, request: web.Request) -> web.Response:
        body = await request.read()
        if request.path == PATH and b"logprobs" in body:  # not the image canary's
            self.bodies.append(json.loads(body))
        passed = {name: value for name, value in request.headers.items() if name.lower() in ("content-type", "accept")}
        async with self._http.request(
            request.method, self._engine + request.path_qs, data=io.BytesIO(body), headers=passed
        ) as answer:
            return web.Response(body=await answer.read(), status=answer.status, content_type=answer.content_type)


@asynccontextmanager
async def recording(engine_url: str, http: Http) -> AsyncIterator[tuple[str, Recorder]]:
    """A Recorder in front of `engine_url`, and its own URL."""
    recorder, port = Recorder(engine_url, http), processes.free_port()
    app = web.Application(client_max_size=64 << 20)
    app.router.add_route("*", "/{path:.*}", recorder.handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        yield f"http://127.0.0.1:{port}", recorder
    finally:
        await runner.cleanup()


async def sidecar_for(
    start_sidecar: Callable[..., Sidecar], engine_url: str, model: Path, http: Http, **more: str
) -> Sidecar:
    """A sidecar that prepares images for `model`, once its workers do and the engine has shown its image sizes."""
    sidecar = start_sidecar(engine_url, **({"model": str(model), "images": "inline"} | more))

    large = encoded("JPEG", 2400, 1800)  # of which any of the models leaves less than half
    url = f"data:image/jpeg;base64,{base64.b64encode(large).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}]
    body = client.completion(max_tokens=1) | {"messages": [{"role": "user", "content": parts}]}

    async def prepares() -> bool:
        await client.ask(http, sidecar.url + PATH, body)
        return await prepared_images(sidecar, http) > 0

    await client.until(prepares, "image workers and the engine's image sizes")
    return sidecar


async def prepared_images(sidecar: Sidecar, http: Http, **labels: str) -> float:
    """How many images the sidecar has prepared, or found in its cache."""
    page = f"{sidecar.admin}/metrics"
    found = [await client.sample(http, page, "sidecar_images_total", outcome=o, **labels) for o in ("ok", "cached")]
    return sum(found)


def formats(body: dict[str, Any]) -> list[str]:
    """The media types of a chat body's images."""
    parts = body["messages"][0]["content"]
    return [part["image_url"]["url"].partition(";")[0] for part in parts if part["type"] == "image_url"]


async def test_the_answer_is_the_same(engine: Engine, start_sidecar: Callable[..., Sidecar], http: Http) -> None:
    """Text, log-probabilities and usage of an image chat have the same bits with and without the sidecar."""
    sidecar = await sidecar_for(start_sidecar, engine.url, engine.model, http)
    bodies = [BODIES[name] for name in ("1080p", "EXIF 6", "EXIF 7", "small, enlarged", "alpha", "two")]
    without = [await client.ask(http, engine.url + PATH, body) for body in bodies]
    through = [await client.ask(http, sidecar.url + PATH, body) for body in bodies]
    assert through == without
    assert all(len(answer["choices"][0]["logprobs"]["content"]) == 24 for answer in through)


async def test_another_picture_gives_another_answer(engine: Engine, http: Http) -> None:
    """The tiny model's log-probabilities change with a faint change of the image, so equal answers are evidence."""
    image = pixels(640, 480, 30)
    answers = []
    for brighter in (0, 1):
        out = io.BytesIO()
        Image.fromarray(image.clip(0, 254) + brighter).save(out, "PNG")
        answers.append(await client.ask(http, engine.url + PATH, chat(out.getvalue(), media_type="image/png")))
    assert answers[0]["choices"][0]["logprobs"] != answers[1]["choices"][0]["logprobs"]


async def test_the_pixels_are_the_same(
    engine: Engine, start_sidecar: Callable[..., Sidecar], http: Http, vllm_python: Path, tmp_path: Path
) -> None:
    """vLLM feeds the vision tower the same bits from the prepared image as from the original.

    Over sizes, all EXIF orientations, formats and modes. Every image was really prepared but two: one that would grow,
    and one with transparent parts.
    """
    async with recording(engine.url, http) as (url, recorder):
        sidecar = await sidecar_for(start_sidecar, url, engine.model, http)
        for body in BODIES.values():
            await client.ask(http, sidecar.url + PATH, body | {"max_tokens": 1})
    pairs = list(zip(BODIES.values(), recorder.bodies, strict=True))
    files = []
    for n, body in enumerate(body for pair in pairs for body in pair):
        files.append(tmp_path / f"{n}.json")
        files[-1].write_text(json.dumps(body))
    seen = see(vllm_python, engine.model, files)
    assert dict(zip(BODIES, seen[1::2], strict=True)) == dict(zip(BODIES, seen[::2], strict=True))
    prepared = {
        name: all(kind in LOSSLESS for kind in formats(sent)) for name, (_, sent) in zip(BODIES, pairs, strict=True)
    }
    assert [name for name, made in prepared.items() if not made] == [PASSES, TRANSPARENT]
    assert len({json.dumps(made) for made in seen}) == len(BODIES)


OWN_PROCESSING = {
    "1080p": {"mm_processor_kwargs": {"size": {"shortest_edge": 56 * 56, "longest_edge": 448 * 448}}},
    "alpha": {"media_io_kwargs": {"image": {"rgba_background_color": [0, 0, 0]}}},
}


@pytest.mark.parametrize("name", OWN_PROCESSING)
async def test_a_request_with_its_own_processing_is_left_alone(
    engine: Engine, start_sidecar: Callable[..., Sidecar], http: Http, name: str
) -> None:
    """A request that sets how vLLM processes its images gets the same answer as without the sidecar."""
    sidecar = await sidecar_for(start_sidecar, engine.url, engine.model, http)
    body = BODIES[name] | OWN_PROCESSING[name]
    without = await client.ask(http, engine.url + PATH, body)
    assert await client.ask(http, sidecar.url + PATH, body) == without
    assert await client.ask(http, engine.url + PATH, BODIES[name]) != without


async def test_images_are_counted(engine: Engine, start_sidecar: Callable[..., Sidecar], http: Http) -> None:
    """Each prepared image is counted by format and outcome, and its request settles with outcome ok."""
    sidecar = await sidecar_for(start_sidecar, engine.url, engine.model, http)
    before = await prepared_images(sidecar, http, format="jpeg")
    await client.ask(http, sidecar.url + PATH, BODIES["two"], tenant="acme")
    page = f"{sidecar.admin}/metrics"

    async def counted() -> bool:
        images = await prepared_images(sidecar, http, format="jpeg")
        requests = await client.sample(http, page, "sidecar_requests_total", tenant="acme", outcome="ok")
        return (images - before, requests) == (2, 1)

    await client.until(counted, "two images and one request")


def see(python: Path, model: Path, bodies: list[Path]) -> list[Any]:
    """What pixels.py, run by vLLM's own python, says of each body."""
    run = [str(python), str(PIXELS), str(model), *map(str, bodies)]
    env = os.environ | processes.ENGINE_ENV
    done = subprocess.run(run, env=env, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return list(json.loads(done.stdout))
