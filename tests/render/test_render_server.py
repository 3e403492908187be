"""`sidecar render`: what it answers, what it does not render, what it refuses, and what bounds it."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from sidecar.errors import NotRendered, StartError
from sidecar.render.protocol import CHAT, RenderCall, RenderSettings
from sidecar.render.workers import RenderWorkers
from tests.render import cases
from tests.render.cases import CHAT as CHAT_PATH
from tests.render.cases import COMPLETIONS as COMPLETIONS_PATH
from tests.render.conftest import MODELS

Serve = Callable[..., Any]
HELLO = cases.user("hello")
PHOTO = cases.encoded(cases.picture(1280, 720))


async def post(http: aiohttp.ClientSession, body: Any, path: str = CHAT_PATH) -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with http.post(path, data=io.BytesIO(data)) as answer:
        return answer.status, await answer.json()


async def test_a_prompt_with_an_image(serve: Serve) -> None:
    """Tokens, hash and place of an image; with ?layout=1 also its size, grid and tokens."""
    http = await serve()
    body = cases.chat(cases.user([cases.image_part(PHOTO), cases.text_part("?")]))
    status, made = await post(http, body)
    layout = (await post(http, body, f"{CHAT_PATH}?layout=1"))[1]["images"]
    (place,) = made["features"]["mm_placeholders"]["image"]
    (image,) = layout
    assert status == 200 and "images" not in made
    assert (image["format"], image["grid_thw"][0]) == ("jpeg", 1)
    assert image["tokens"] == place["length"] == image["grid_thw"][1] * image["grid_thw"][2] // 4
    assert len(set(made["token_ids"][place["offset"] : place["offset"] + place["length"]])) == 1
    assert [image["mm_hash"]] == made["features"]["mm_hashes"]["image"]


async def test_a_router_need_not_ask_for_no_tensors(serve: Serve) -> None:
    """Without mm_payload the answer is that to "none"; tensors are not made."""
    http = await serve()
    body = cases.chat(cases.user([cases.image_part(PHOTO)]))
    without = {name: value for name, value in body.items() if name != "mm_payload"}
    assert (await post(http, without))[0] == 200
    assert (await post(http, body | {"mm_payload": "tensors"}))[0] == 501
    assert (await post(http, without | {"return_mm_kwargs": True}))[0] == 501


async def test_what_depends_on_the_engine_is_left_out(serve: Serve) -> None:
    """Where the engine's flags or constraints decide about sampling, the prompt is rendered and its parameters not."""
    http = await serve()
    plain = (await post(http, cases.chat(HELLO)))[1]
    for more in ({"tools": cases.TOOLS}, {"response_format": {"type": "json_object"}}, {"top_p": 7}):
        status, made = await post(http, cases.chat(HELLO, **more))
        assert status == 200 and "sampling_params" not in made and "sampling_params" in plain
    assert (await post(http, cases.chat(HELLO, response_format={"type": "json_object"})))[1]["token_ids"] == plain[
        "token_ids"
    ]


IMAGE = cases.image_part(PHOTO)
NOT = (501, "not_rendered")
NOT_RENDERED: dict[str, dict[str, Any]] = {
    "unknown member": cases.chat(HELLO, invented=1),
    "truncated": cases.chat(HELLO, truncate_prompt_tokens=3),
    "own template": cases.chat(HELLO, chat_template="{{ 1 }}"),
    "reserved variable": cases.chat(HELLO, chat_template_kwargs={"tools": []}),
    "developer": cases.chat({"role": "developer", "content": "x"}),
    "member of a message": cases.chat(HELLO | {"weight": 1}),
    "member of a part": cases.chat(cases.user([cases.text_part("x") | {"cache_control": {}}])),
    "member of a tool": cases.chat(HELLO, tools=[{"type": "function", "function": {"name": "f", "x": 1}}]),
    "video": cases.chat(cases.user([{"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AA=="}}])),
    "link": cases.chat(cases.user([{"type": "image_url", "image_url": {"url": "https://example.com/a.jpg"}}])),
    "uuid alone": cases.chat(cases.user([{"type": "image_url", "image_url": None, "uuid": "x"}])),
    "gif": cases.chat(cases.user([cases.image_part(cases.encoded(cases.picture(), "GIF"))])),
    "placeholder in a text": cases.chat(cases.user([IMAGE, cases.text_part("a<|image_pad|>b")])),
    "half a character": cases.chat(cases.user("\ud800")),
}


async def test_what_is_not_exact_is_not_rendered(serve: Serve) -> None:
    """501 with a reason: nothing that is not known is ignored."""
    http = await serve()
    found = {name: await post(http, body) for name, body in NOT_RENDERED.items()}
    others = {name for name, (status, made) in found.items() if (status, made["error"]["code"]) != NOT}
    assert others == set()


def png(width: int, height: int) -> bytes:
    """A PNG's header, and nothing behind it but the end."""
    whole = cases.encoded(cases.picture(), "PNG")
    return whole[:16] + width.to_bytes(4, "big") + height.to_bytes(4, "big") + whole[24:33] + whole[-12:]


REJECTED: dict[str, Any] = {
    "not JSON": b"{",
    "deep JSON": b"[" * 200_000,
    "no object": b"[]",
    "no messages": {"model": "tiny"},
    "no message": cases.chat(),
    "message of text": {"messages": ["x"]},
    "damaged base64": cases.chat(cases.user([{"type": "image_url", "image_url": {"url": "data:;base64,?"}}])),
    "no base64": cases.chat(cases.user([{"type": "image_url", "image_url": {"url": "data:,x"}}])),
    "gigapixels": cases.chat(cases.user([cases.image_part(png(65_535, 65_535))])),
    "too long": cases.chat(cases.user([cases.image_part(png(30_000, 10))])),
    "too many images": cases.chat(cases.user([IMAGE] + [cases.image_part(png(1, 1))] * 128)),
    "too many tokens": cases.chat(cases.user("words " * 5000)),
    "tools empty": cases.chat(HELLO, tools=[]),
}


async def test_what_the_engine_would_refuse_is_refused(serve: Serve) -> None:
    """400: hostile headers and damaged requests are errors; nothing is decoded for them."""
    http = await serve()
    found = {name: await post(http, body) for name, body in REJECTED.items()}
    others = {
        name for name, (status, made) in found.items() if (status, made["error"]["code"]) != (400, "prompt_rejected")
    }
    assert others == set()


async def test_completions_are_checked(serve: Serve) -> None:
    """Prompts without tokens are refused, and those that are neither texts nor token ids are not rendered."""
    http = await serve()
    for prompt in ([], 5, [[]], "", None):
        assert (await post(http, {"prompt": prompt}, COMPLETIONS_PATH))[0] == 400
    for prompt in ([1, "x"], [[1], "x"], [-1], [True], [1.0]):
        assert (await post(http, {"prompt": prompt}, COMPLETIONS_PATH))[0] == 501
    assert (await post(http, {"prompt": "x", "echo": True}, COMPLETIONS_PATH))[0] == 501


async def test_bodies_are_bounded(serve: Serve) -> None:
    """A body over --max-body-bytes is 413, a path that is not known 400, health is reported."""
    http = await serve(max_body_bytes=1 << 20)
    assert (await post(http, b" " * ((1 << 20) + 1)))[0] == 413
    assert (await post(http, {}, "/v1/chat/completions"))[0] == 400
    async with http.get("/readyz") as answer:
        assert (answer.status, await answer.json()) == (200, {"status": "ok", "images": "rendered"})


async def test_text_is_rendered_where_images_are_not(serve: Serve, model: Callable[..., Path]) -> None:
    """A model of an architecture without a row renders text; an image gets 501."""
    config = json.loads((MODELS / "qwen2-vl" / "config.json").read_text()) | {"architectures": ["Unknown"]}
    http = await serve(model(config=json.dumps(config)))
    assert (await post(http, cases.chat(HELLO)))[0] == 200
    status, made = await post(http, cases.chat(cases.user([IMAGE])))
    assert status == 501 and "architecture" in made["error"]["message"]


STARTS: dict[str, tuple[dict[str, str | None], str]] = {
    "no tokenizer": ({"tokenizer": None}, "no tokenizer.json"),
    "a damaged tokenizer": ({"tokenizer": "{}"}, "cannot be used"),
    "an own renderer": ({"config": '{"architectures": ["GptOssForCausalLM"]}'}, "renderer of its own"),
    "own code": ({"tokenizer_config": '{"auto_map": {"AutoTokenizer": ["x", "y"]}}'}, "code of the model's own"),
    "two templates": ({"tokenizer_config": '{"chat_template": "other"}'}, "different chat templates"),
    "named templates": ({"tokenizer_config": '{"chat_template": [{"name": "x"}]}'}, "several chat templates"),
    "a damaged template": ({"chat_template": "{% if %}"}, "cannot be compiled"),
    "other tokens": (
        {"tokenizer_config": '{"added_tokens_decoder": {"0": {"content": "other", "special": true}}}'},
        "disagree about token 0",
    ),
}


@pytest.mark.parametrize("name", STARTS)
async def test_a_model_that_cannot_be_rendered_ends_the_start(
    serve: Serve, model: Callable[..., Path], name: str
) -> None:
    """One line that says what is wrong, instead of tokens that are."""
    files, why = STARTS[name]
    with pytest.raises(StartError, match=why):
        await serve(model(**files))


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


async def test_a_template_that_does_not_end_is_ended(model: Callable[..., Path]) -> None:
    """Its worker is killed at the deadline and replaced; the next request is rendered."""
    folder = model(
        chat_template="{% if messages[0].content == 'loop' %}" + LOOPS + "{% endif %}{{ messages | length }}"
    )
    call = RenderCall(CHAT)
    async with RenderWorkers(RenderSettings(str(folder)), 1, deadline=2.0) as workers:
        with pytest.raises(NotRendered, match="took longer"):
            await workers.render(call, json.dumps(cases.chat(cases.user("loop"))).encode())
        assert await rendered_in_the_end(workers, call)


async def rendered_in_the_end(workers: RenderWorkers, call: RenderCall) -> bool:
    """Whether a request is rendered once the replacement has started, however slow that is."""
    async with asyncio.timeout(120):
        while True:
            try:
                made = json.loads(await workers.render(call, json.dumps(cases.chat(HELLO)).encode()))
            except Exception as e:
                if getattr(e, "code", "") != "render_busy":
                    raise
            else:
                return bool(made["token_ids"])


async def test_a_cancelled_request_does_not_shift_answers(serve: Serve) -> None:
    """A client that leaves while its prompt is rendered costs a worker, never another client's answer."""
    async with RenderWorkers(RenderSettings(str(MODELS / "qwen2-vl")), 1) as workers:
        long = json.dumps(cases.chat(cases.user("words " * 20_000))).encode()
        task = asyncio.create_task(workers.render(RenderCall(CHAT, "first"), long))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        made = json.loads(await workers.render(RenderCall(CHAT, "second"), json.dumps(cases.chat(HELLO)).encode()))
        assert made["request_id"] == "chatcmpl-second"


class ScriptedTokenize:
    """What an engine says of its model, its tokens being those of our own renderer or not."""

    def __init__(self, workers: RenderWorkers, *, wrong: bool) -> None:
        self._workers, self._wrong = workers, wrong

    def app(self) -> web.Application:
        made = web.Application()
        made.add_routes([web.get("/v1/models", self.models), web.post("/tokenize", self.tokenize)])
        return made

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "tiny", "root": "org/model", "max_model_len": 77}]})

    async def tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        del body["model"]
        ids = json.loads(await self._workers.render(RenderCall(CHAT), json.dumps(body).encode()))["token_ids"]
        return web.json_response({"tokens": ids + [1] * self._wrong})


@pytest.mark.parametrize("wrong", [False, True])
async def test_an_engine_is_asked_at_the_start(serve: Serve, wrong: bool) -> None:
    """Its name for the model and its context length are taken over; other tokens than ours end the start."""
    async with RenderWorkers(RenderSettings(str(MODELS / "qwen2-vl")), 1) as workers:
        runner = web.AppRunner(ScriptedTokenize(workers, wrong=wrong).app())
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        engine = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            if wrong:
                with pytest.raises(StartError, match="other tokens"):
                    await serve(engine=engine)
                return
            asked = await serve(engine=engine)
            told = await serve(engine_model="org/model", max_model_len=77)
            body = cases.chat(cases.user([cases.image_part(base64.b64decode(TINY))]), request_id="same")
            assert await post(asked, body) == await post(told, body)
            assert (await post(asked, cases.chat(cases.user("words " * 80))))[0] == 400
        finally:
            await runner.cleanup()


TINY = base64.b64encode(cases.encoded(cases.picture(30, 30)))
