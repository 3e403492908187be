"""The relay's own /render: answered here where it equals the engine's, else the engine's as it came."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from sidecar.relay.render_api import RenderApi
from sidecar.render.protocol import CHAT, RenderCall, RenderSettings
from sidecar.render.workers import RenderWorkers
from tests.render import cases

from ..waiting import PATIENCE

MODEL = Path(__file__).parents[1] / "render" / "models" / "qwen2-vl"
HELLO = cases.user("hello")


@pytest.fixture
async def workers() -> AsyncIterator[RenderWorkers]:
    async with RenderWorkers(RenderSettings(str(MODEL)), 1) as running:
        yield running


class Engine:
    """A vLLM as far as rendering asks it: its model, its tokens, and a /render of its own."""

    def __init__(self, workers: RenderWorkers) -> None:
        self._workers = workers
        self.extra: list[int] = []  # tokens that only this engine's template gives
        self.key = ""  # that it wants; "" for none
        self.questions: list[str] = []
        self.rendered: list[bytes] = []

    async def __call__(self, request: web.BaseRequest) -> web.Response:
        body = await request.content.read()  # without a limit
        if request.path.endswith("/render"):
            self.rendered.append(body)
            return web.json_response({"engine": True})
        self.questions.append(f"{request.path} {request.headers.get('authorization')}")
        if self.key and request.headers.get("authorization") != self.key:
            return web.json_response({"error": "Unauthorized"}, status=401)
        if request.path == "/v1/models":
            return web.json_response({"data": [{"id": "tiny", "root": "org/model", "max_model_len": 4096}]})
        asked = json.loads(body)
        del asked["model"]
        made = json.loads(await self._workers.render(RenderCall(CHAT), json.dumps(asked).encode()))
        return web.json_response({"tokens": made["token_ids"] + self.extra})


@pytest.fixture
async def engine(workers: RenderWorkers) -> Engine:
    return Engine(workers)


@pytest.fixture
async def relay(rig: Any, serve: Any, engine: Engine) -> AsyncIterator[Any]:
    """A relay with --render on, whose worker has started."""
    render = RenderApi(RenderWorkers(RenderSettings(str(MODEL)), 1))
    running = asyncio.create_task(render.run())
    async with asyncio.timeout(PATIENCE):
        await render.ready.wait()
        yield await rig(await serve(engine), render=render)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def post(relay: Any, body: Any, path: str = cases.CHAT, **fields: str) -> Any:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with relay.client.post(relay.url + path, data=io.BytesIO(data), headers=fields) as answer:
        return answer.status, await answer.json()


async def test_what_is_exact_is_answered_here(relay: Any, engine: Engine, workers: RenderWorkers) -> None:
    """Text and images are rendered for the engine's own name of the model; the engine is asked once who it is."""
    image = cases.image_part(cases.encoded(cases.picture(320, 240)))
    body = cases.chat(cases.user([image, cases.text_part("?")]), request_id="mine")
    call = RenderCall(CHAT, engine_model="org/model", max_model_len=4096)
    expected = json.loads(await workers.render(call, json.dumps(body).encode()))
    for _ in range(2):
        assert await post(relay, body, authorization="Bearer key") == (200, expected)
    assert (await post(relay, {"prompt": "x"}, cases.COMPLETIONS))[1][0]["token_ids"]
    assert engine.rendered == []
    paths = "/v1/models", "/tokenize", "/tokenize"
    assert engine.questions == [f"{path} {key}" for key in ("Bearer key", None) for path in paths]


async def test_a_client_without_the_engines_key_gets_the_engines_answer(relay: Any, engine: Engine) -> None:
    """What one client may ask for, another one may not; one that is refused is not asked about each time."""
    engine.key = "Bearer key"
    for key, rendered in (("Bearer key", 0), ("Bearer wrong", 1), ("Bearer wrong", 2), ("Bearer key", 2)):
        assert (await post(relay, cases.chat(HELLO), authorization=key))[0] == 200
        assert len(engine.rendered) == rendered, key
    assert [question for question in engine.questions if "wrong" in question] == ["/v1/models Bearer wrong"]


PASSED: dict[str, Any] = {
    "tensors": cases.chat(cases.user([cases.image_part(cases.encoded(cases.picture()))])) | {"mm_payload": "tensors"},
    "tool choice": cases.chat(HELLO, tools=cases.TOOLS),
    "constraints": cases.chat(HELLO, response_format={"type": "json_object"}),
    "unknown": cases.chat(HELLO, invented=1),
    "refused": cases.chat(cases.user("words " * 5000)),
    "not JSON": b'{"messages":',
    "long": cases.chat(cases.user("x" * 3_000_000), invented=1),
}


@pytest.mark.parametrize("name", PASSED)
async def test_the_rest_reaches_the_engine_as_it_came(relay: Any, engine: Engine, name: str) -> None:
    """What cannot be exact, and what would be refused, is the engine's to answer, byte for byte."""
    body = PASSED[name] if isinstance(PASSED[name], bytes) else json.dumps(PASSED[name]).encode()
    assert await post(relay, body) == (200, {"engine": True})
    assert engine.rendered == [body]


async def test_an_engine_with_other_tokens_answers_itself(relay: Any, engine: Engine) -> None:
    """Its template is another one than that of --model: nothing is rendered for it, and it is not asked each time."""
    engine.extra = [1]
    for _ in range(2):
        assert await post(relay, cases.chat(HELLO)) == (200, {"engine": True})
    assert len(engine.questions) == 2
    assert len(engine.rendered) == 2


async def test_other_engines_answer_themselves(rig: Any, serve: Any, engine: Engine) -> None:
    """SGLang's path of that name is its own."""
    render = RenderApi(RenderWorkers(RenderSettings(str(MODEL)), 1))
    relay = await rig(await serve(engine), render=render, kind="sglang")
    assert await post(relay, cases.chat(HELLO)) == (200, {"engine": True})
    assert engine.questions == []


async def test_workers_that_do_not_start_pass_everything(rig: Any, serve: Any, engine: Engine, tmp_path: Path) -> None:
    """A directory without a tokenizer turns rendering off, with a line in the log; requests pass."""
    render = RenderApi(RenderWorkers(RenderSettings(str(tmp_path)), 1))
    relay = await rig(await serve(engine), render=render)
    await asyncio.wait_for(render.run(), PATIENCE)
    assert await post(relay, cases.chat(HELLO)) == (200, {"engine": True})
