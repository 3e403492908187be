"""Canaries against real servers: the form that passes is remembered, and a rejection is not a hang."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from sidecar.engines.registry import KINDS
from sidecar.signals.canary import CanarySignal
from sidecar.signals.engine_address import EngineAddress
from sidecar.signals.engine_monitor import open_session
from sidecar.tools.scripted_engine.server import EngineSettings, ScriptedEngine

from ..engines.engine_faces import TOKEN, OnDemand, Shown, models
from ..waiting import PATIENCE

EMBEDDED = json.dumps({"object": "list", "data": [{"index": 0, "embedding": [0.5]}], "usage": {"prompt_tokens": 2}})
COMPLETIONS, CHAT, EMBEDDINGS = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"


@pytest.fixture
async def canary() -> AsyncIterator[Callable[..., CanarySignal]]:
    """A function: engine and kind -> its canary."""
    async with aiohttp.ClientSession() as session:
        yield lambda engine, kind="vllm", **more: CanarySignal(session, engine.url, KINDS[kind], {}, **more)


def engine(**answers: tuple[int, str]) -> Shown:
    return Shown({"/v1/models": models("vllm"), **{path.replace("_", "/"): a for path, a in answers.items()}})


@pytest.mark.parametrize(
    ("answers", "passes"),
    [
        ({COMPLETIONS: (200, TOKEN)}, COMPLETIONS),
        ({COMPLETIONS: (404, ""), CHAT: (200, TOKEN)}, CHAT),
        (
            {COMPLETIONS: (501, "no completions"), CHAT: (400, "no chat template"), EMBEDDINGS: (200, EMBEDDED)},
            EMBEDDINGS,
        ),
    ],
    ids=["base model", "chat only", "embeddings only"],
)
async def test_the_form_that_passes_is_found_once(
    canary: Callable[..., CanarySignal], answers: dict[str, Any], passes: str
) -> None:
    """Base models, chat-only servers and embedding models all take a canary; the next one asks for nothing else."""
    async with engine(**answers) as shown:
        signal = canary(shown)
        first = await signal.send(PATIENCE)
        assert (first.outcome, first.detail, first.prompt_tokens) == ("ok", passes, 2)
        before = shown.asked.copy()
        assert (await signal.send(PATIENCE)).outcome == "ok"
        assert shown.asked - before == {passes: 1}


async def test_a_canary_meets_no_connection_that_the_engine_is_closing() -> None:
    """Every canary succeeds against an engine that closes a reused connection, as llama.cpp may."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError), contextlib.closing(writer):
            await reader.readuntil(b"\r\n\r\n")
            text = TOKEN.encode()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(text), text))
            await reader.readuntil(b"\r\n\r\n")

    async with await asyncio.start_server(talk, "127.0.0.1", 0) as server, open_session(EngineAddress("")) as session:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        signal = CanarySignal(session, url, KINDS["llamacpp"], {}, model="m")
        assert [(await signal.send(PATIENCE)).outcome for _ in range(4)] == ["ok"] * 4


async def test_a_priority_that_is_refused_is_left_out(canary: Callable[..., CanarySignal]) -> None:
    """After an engine rejected a priority, with 400 or inside a stream, canaries are sent without one."""

    async def picky(request: web.Request) -> web.Response:
        if "priority" in await request.json():
            return web.Response(text='data: {"error": {"message": "priority is disabled", "code": 503}}\n\n')
        return web.Response(text=TOKEN)

    async with engine() as shown:
        shown.handlers[COMPLETIONS] = picky
        signal = canary(shown, priority=-9)
        assert [(await signal.send(PATIENCE)).outcome for _ in range(2)] == ["ok", "ok"]
        assert [body.get("priority") for body in shown.bodies[COMPLETIONS]] == [-9, None, None]


async def test_a_priority_that_is_taken_is_kept(canary: Callable[..., CanarySignal]) -> None:
    """An engine that takes the priority gets it with each canary."""
    async with engine(**{COMPLETIONS: (200, TOKEN)}) as shown:
        signal = canary(shown, priority=-9)
        assert [(await signal.send(PATIENCE)).outcome for _ in range(2)] == ["ok", "ok"]
        assert [body["priority"] for body in shown.bodies[COMPLETIONS]] == [-9, -9]


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        ((500, ""), "failed"),
        ((503, ""), "busy"),
        ((429, ""), "busy"),
        ((401, ""), "rejected"),
        ((404, ""), "rejected"),
        ((200, ""), "rejected"),
        ((200, "data: [DONE]\n\n"), "rejected"),
        ((200, 'data: {"error": {"message": "EngineCore died", "code": 500}}\n\n'), "failed"),
        ((200, "<html>"), "rejected"),
    ],
)
async def test_an_answer_without_a_token_never_passes(
    canary: Callable[..., CanarySignal], answer: tuple[int, str], outcome: str
) -> None:
    """Rejections, empty streams, pages and errors inside a stream have outcomes of their own, and none is a pass."""
    async with engine(**{COMPLETIONS: answer}) as shown:
        result = await canary(shown).send(PATIENCE)
        assert result.outcome == outcome and result.detail and not result.digest


async def test_an_engine_that_served_tokens_fails_without_them(canary: Callable[..., CanarySignal]) -> None:
    """A response without a token is a failure only if the engine has returned tokens before."""
    async with engine(**{COMPLETIONS: (200, TOKEN)}) as shown:
        signal = canary(shown)
        assert (await signal.send(PATIENCE)).outcome == "ok"
        shown.answers[COMPLETIONS] = (200, "data: [DONE]\n\n")
        assert (await signal.send(PATIENCE)).outcome == "failed"


async def test_a_renamed_model_is_learned_again(canary: Callable[..., CanarySignal]) -> None:
    """A model name that the engine no longer knows is looked up again."""

    async def by_name(request: web.Request) -> web.Response:
        known = (await request.json())["model"] == name
        return web.Response(text=TOKEN) if known else web.Response(status=404)

    name = "old"
    async with engine() as shown:
        shown.answers["/v1/models"] = models("vllm", name)
        shown.handlers[COMPLETIONS] = by_name
        signal = canary(shown)
        assert (await signal.send(PATIENCE)).outcome == "ok"
        name = "new"
        shown.answers["/v1/models"] = models("vllm", name)
        assert [(await signal.send(PATIENCE)).outcome for _ in range(3)] == ["rejected", "ok", "ok"]


async def test_a_stream_that_never_ends_starves(canary: Callable[..., CanarySignal]) -> None:
    """The first token is not enough: what begins and does not end is a hang."""

    async def begins(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(TOKEN.encode())
        await asyncio.Event().wait()
        return response

    async with engine() as shown:
        shown.handlers[COMPLETIONS] = begins
        assert (await canary(shown).send(0.2)).outcome == "starved"


async def test_the_answer_of_a_healthy_engine_is_always_the_same(canary: Callable[..., CanarySignal]) -> None:
    """Equal canaries have equal hashes, and garbage has another one."""
    async with ScriptedEngine(EngineSettings(listen=("127.0.0.1", 0), decode_step_ms=1.0)) as scripted:
        signal = canary(scripted, "scripted")
        passed = await signal.send(PATIENCE)
        assert passed.outcome == "ok" and passed.prompt_tokens and passed.digest
        assert (await signal.send(PATIENCE)).digest == passed.digest
        scripted.faults.start("gibberish")
        assert (await signal.send(PATIENCE)).digest != passed.digest


async def test_an_answer_without_end_is_bounded(
    canary: Callable[..., CanarySignal], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An endless response is abandoned at the limit."""
    monkeypatch.setattr("sidecar.signals.canary.MAX_ANSWER_BYTES", 1000)
    async with engine(**{COMPLETIONS: (200, TOKEN * 100)}) as shown:
        assert (await canary(shown).send(PATIENCE)).outcome == "failed"


async def test_no_connection_is_refused(canary: Callable[..., CanarySignal]) -> None:
    """A closed port is no hang."""
    async with engine() as shown:
        pass
    assert (await canary(shown).send(PATIENCE)).outcome == "refused"


@pytest.mark.parametrize(("says", "why"), [(True, "no model is loaded"), (False, "several models")])
async def test_no_model_is_loaded_for_a_canary(canary: Callable[..., CanarySignal], says: bool, why: str) -> None:
    """Of several models none is known to be loaded: none is asked for, and that says nothing of the engine."""
    server = OnDemand("a", "b", says=says)
    async with server.shown() as shown:
        signal = canary(shown, "llamacpp" if says else "openai")
        results = [await signal.send(PATIENCE) for _ in range(3)]
    assert {(r.outcome, r.detail.startswith(why)) for r in results} == {("rejected", True)}
    assert server.loads == []


@pytest.mark.parametrize("says", [True, False])
async def test_the_users_model_is_not_evicted_by_a_canary(canary: Callable[..., CanarySignal], says: bool) -> None:
    """It asks for what is loaded, or where nothing says so for what users used last, and follows when they change."""
    server = OnDemand("a", "b", "c", says=says, loaded="b")
    async with server.shown() as shown:
        signal = canary(shown, "llamacpp" if says else "openai")
        for model in ("b", "c", "b"):
            server.loaded = model
            for _ in range(2):
                result = await signal.send(PATIENCE, model)
                assert (result.outcome, result.model) == ("ok", model)
    assert server.loads == []


async def test_a_chosen_model_that_is_unloaded_is_not_loaded(canary: Callable[..., CanarySignal]) -> None:
    """--canary-model says which, not that it is worth an eviction; once it is loaded, it is asked for."""
    server = OnDemand("a", "b", says=True, loaded="a")
    async with server.shown() as shown:
        signal = canary(shown, "llamacpp", model="b")
        assert (await signal.send(PATIENCE)).outcome == "rejected"
        server.loaded = "b"
        assert (await signal.send(PATIENCE)).outcome == "ok"
    assert server.loads == []


async def test_a_second_model_of_an_unknown_server_is_noticed(canary: Callable[..., CanarySignal]) -> None:
    """It listed one, and users had it load another that was added later: the first is not loaded for a canary again."""
    server = OnDemand("a", says=False)
    async with server.shown() as shown:
        signal = canary(shown, "openai")
        assert (await signal.send(PATIENCE)).outcome == "ok"
        server.names, server.loaded = ("a", "new"), "new"
        assert (await signal.send(PATIENCE, "new")).model == "new"
    assert server.loads == ["a"]


async def test_a_model_list_that_fails_is_no_evidence(canary: Callable[..., CanarySignal]) -> None:
    """The list comes from a disk or a gateway: without it the canary cannot be sent, and the engine is not judged."""
    async with engine(**{COMPLETIONS: (200, TOKEN), "/v1/models": (500, "")}) as shown:
        result = await canary(shown, kind="openai").send(PATIENCE)
        assert result.outcome == "rejected" and "--canary-model" in result.detail
        assert COMPLETIONS not in shown.bodies


async def test_what_another_model_cannot_do_is_no_evidence(canary: Callable[..., CanarySignal]) -> None:
    """After one model passed, a second one that answers 500 or without a token is not taken for a hung engine."""

    async def by_model(request: web.Request) -> web.Response:
        model = (await request.json())["model"]
        return web.Response(text=TOKEN) if model == "chat" else web.Response(status=500 if model == "embed" else 200)

    models = json.dumps({"data": [{"id": name} for name in ("chat", "embed", "rank")]})
    async with engine(**{"/v1/models": (200, models)}) as shown:
        shown.handlers[COMPLETIONS] = shown.handlers["/v1/chat/completions"] = by_model
        signal = canary(shown, kind="openai")
        outcomes = [(await signal.send(PATIENCE, used)).outcome for used in ("chat", "embed", "rank", "chat")]
        assert outcomes == ["ok", "rejected", "rejected", "ok"]
