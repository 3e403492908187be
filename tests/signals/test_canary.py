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

from sidecar.engines.canary_request import MAX_FAILURES
from sidecar.engines.canary_rows import silence
from sidecar.engines.registry import KINDS
from sidecar.runtime.open_files import EXHAUSTED_TEXT
from sidecar.signals.canary import CanarySignal
from sidecar.signals.engine_address import EngineAddress
from sidecar.signals.engine_monitor import open_session
from sidecar.tools.scripted_engine.server import EngineSettings, ScriptedEngine

from ..engines.engine_faces import TOKEN, OnDemand, Shown, models
from ..engines.engine_faces import shown as shown_face
from ..few_files import no_files_left
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


async def test_a_canary_for_which_no_file_is_left_proves_nothing(canary: Callable[..., CanarySignal]) -> None:
    """It is the sidecar's own limit; the engine refused nothing."""
    async with engine(**{COMPLETIONS: (200, TOKEN)}) as shown:
        signal = canary(shown)
        with no_files_left():
            result = await signal.send(PATIENCE)
        assert (result.outcome, result.detail) == ("moot", EXHAUSTED_TEXT)
        assert (await signal.send(PATIENCE)).outcome == "ok"


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
        ((200, ""), "failed"),
        ((200, "data: [DONE]\n\n"), "failed"),
        ((200, 'data: {"error": {"message": "EngineCore died", "code": 500}}\n\n'), "failed"),
        ((200, "<html>"), "failed"),
    ],
)
async def test_an_answer_without_a_token_never_passes(
    canary: Callable[..., CanarySignal], answer: tuple[int, str], outcome: str
) -> None:
    """Rejections, empty streams, pages and errors inside a stream have outcomes of their own, and none is a pass."""
    async with engine(**{COMPLETIONS: answer}) as shown:
        result = await canary(shown).send(PATIENCE)
        assert result.outcome == outcome and result.detail and not result.digest and not result.known


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        ((200, "data: [DONE]\n\n"), "failed"),
        ((200, 'data: {"error": {"message": "EngineCore died", "code": 500}}\n\n'), "failed"),
        ((500, ""), "failed"),
        ((429, ""), "busy"),
        ((503, ""), "busy"),
        ((404, ""), "rejected"),
        ((400, ""), "rejected"),
    ],
)
async def test_what_passed_before_is_known(
    canary: Callable[..., CanarySignal], answer: tuple[int, str], outcome: str
) -> None:
    """The same answers prove something once this form has passed, and the result says that it has."""
    async with engine(**{COMPLETIONS: (200, TOKEN)}) as shown:
        signal = canary(shown)
        passed = await signal.send(PATIENCE)
        assert (passed.outcome, passed.known) == ("ok", True)
        shown.answers[COMPLETIONS] = answer
        for _ in range(3):
            result = await signal.send(PATIENCE)
            assert (result.outcome, result.known) == (outcome, True)
        shown.answers[COMPLETIONS] = (200, TOKEN)
        assert (await signal.send(PATIENCE)).outcome == "ok"


@pytest.mark.parametrize("status", [401, 403])
async def test_a_key_that_was_changed_proves_nothing_of_the_engine(
    canary: Callable[..., CanarySignal], status: int
) -> None:
    """A gateway has another key now: the canary names the remedy, and the engine is not at fault."""
    async with engine(**{COMPLETIONS: (200, TOKEN)}) as shown:
        signal = canary(shown)
        assert (await signal.send(PATIENCE)).outcome == "ok"
        shown.answers[COMPLETIONS] = (status, "")
        for _ in range(3):
            result = await signal.send(PATIENCE)
            assert (result.outcome, result.known) == ("rejected", False) and "--engine-key" in result.detail


async def test_a_form_that_never_passed_proves_nothing(canary: Callable[..., CanarySignal]) -> None:
    """A sound server that answers 500 to completions is asked to transcribe instead, and never again for a token."""
    answers = {COMPLETIONS: (500, ""), "/v1/audio/transcriptions": (200, '{"text": ""}')}
    async with engine(**answers) as shown:
        signal = canary(shown)
        first = await signal.send(PATIENCE)
        assert (first.outcome, first.detail) == ("ok", "/v1/audio/transcriptions")
        before = shown.asked.copy()
        assert (await signal.send(PATIENCE)).outcome == "ok"
        assert shown.asked - before == {"/v1/audio/transcriptions": 1}
        sent = shown.bodies["/v1/audio/transcriptions"][0]
        assert (sent["model"], sent["file"]) == ("served-name", silence())


@pytest.mark.parametrize("answer", [(400, ""), (500, "")])
async def test_refused_requests_at_the_start_are_bounded(
    canary: Callable[..., CanarySignal], answer: tuple[int, str]
) -> None:
    """An engine that refuses all forms gets each a few times at most, and then none until it restarts."""
    async with engine() as shown:
        shown.answers |= dict.fromkeys((row.path for row in KINDS["vllm"].canaries), answer)
        signal = canary(shown, priority=-9)
        results = [await signal.send(PATIENCE) for _ in range(60)]
        outcomes = [r.outcome for r in results if not r.known]
        assert len(outcomes) == len(results) and outcomes[-1] == "rejected"
        if answer[0] == 500:  # the engine may still be starting behind its front
            assert outcomes[:25] == ["failed"] * 25
        assert "no canary passes here" in results[-1].detail and COMPLETIONS in results[-1].detail
        posts = sum(map(len, shown.bodies.values()))
        assert posts <= MAX_FAILURES * 12
        await signal.send(PATIENCE)
        assert sum(map(len, shown.bodies.values())) == posts


@pytest.mark.parametrize("kind", [name for name in KINDS if KINDS[name].canaries])
async def test_each_form_of_each_kind_can_be_sent(canary: Callable[..., CanarySignal], kind: str) -> None:
    """Also while the engine is idle, when some are given members of their own: `send` never raises."""
    paths = {row.path for row in KINDS[kind].canaries}
    async with engine() as shown:
        shown.answers |= dict.fromkeys(paths, (500, ""))
        signal = canary(shown, kind, model="m")
        signal.is_idle = lambda: True
        for _ in range(8):
            assert (await signal.send(PATIENCE)).outcome in ("failed", "rejected")
        assert paths <= set(shown.asked)


@pytest.mark.parametrize(
    ("kind", "path", "answer"),
    [
        ("vllm", "/v1/rerank", {"results": [{"index": 0, "relevance_score": 0.1}]}),
        ("vllm", "/v1/score", {"data": [{"index": 0, "score": 0.1}]}),
        ("vllm", "/pooling", {"data": [{"index": 0, "data": [0.1]}]}),
        ("vllm", "/classify", {"data": [{"index": 0, "label": "a", "probs": [1.0]}]}),
        ("sglang", "/v1/rerank", [{"index": 0, "score": 0.1}]),
        ("llamacpp", "/v1/rerank", {"results": [{"index": 0, "relevance_score": 0.1}]}),
        ("openai", "/rerank", {"results": [{"index": 0, "relevance_score": 0.1}]}),
        ("openai", "/v1/audio/transcriptions", {"text": ""}),
    ],
)
async def test_every_family_of_models_takes_a_canary(
    canary: Callable[..., CanarySignal], kind: str, path: str, answer: Any
) -> None:
    """An engine that does nothing but rerank, score, pool, classify or transcribe is asked just that."""
    async with engine(**{path: (200, json.dumps(answer))}) as shown:
        signal = canary(shown, kind)
        assert [(r.outcome, r.detail) for r in [await signal.send(PATIENCE)]] == [("ok", path)]
        assert (await signal.send(PATIENCE)).known


async def test_what_users_use_is_asked_first(canary: Callable[..., CanarySignal]) -> None:
    """A known route of users spares the engine all other forms."""
    async with engine(**{"/v1/rerank": (200, '{"results": [{"relevance_score": 0.1}]}')}) as shown:
        result = await canary(shown).send(PATIENCE, "served-name", "rerank")
        assert (result.detail, list(shown.bodies)) == ("/v1/rerank", ["/v1/rerank"])


async def test_a_transfer_that_is_missing_is_named(canary: Callable[..., CanarySignal]) -> None:
    """SGLang whose prefill and decode are apart takes the canary that its own health check is; the cache stays out."""

    async def apart(request: web.Request) -> web.Response:
        if (await request.json()).get("bootstrap_room") is None:
            text = '{"message": "Disaggregated request received without bootstrap room id.", "code": 400}'
            return web.Response(status=400, text=text)
        return web.Response(text=TOKEN)

    async with engine() as shown:
        shown.handlers[COMPLETIONS] = apart
        signal = canary(shown, "sglang")
        assert [(await signal.send(PATIENCE)).outcome for _ in range(2)] == ["ok", "ok"]
        hosts = [body.get("bootstrap_host") for body in shown.bodies[COMPLETIONS]]
        assert hosts == [None, "2.2.2.2", "2.2.2.2"]


async def test_text_embeddings_inference_is_asked_as_it_is(canary: Callable[..., CanarySignal]) -> None:
    """It has no model list, and answers 424 to what its model cannot; once that has passed, 424 is a failure."""
    async with Shown({"/embed": (424, ""), "/rerank": (200, '[{"index": 0, "score": 0.9}]')}) as shown:
        signal = canary(shown, "tei")
        first = await signal.send(PATIENCE)
        assert (first.outcome, first.detail) == ("ok", "/rerank") and "/v1/models" not in shown.asked
        assert shown.bodies["/rerank"] == [{"query": "1", "texts": ["1"]}]
        shown.answers["/rerank"] = (424, "")
        assert [(r.outcome, r.known) for r in [await signal.send(PATIENCE)]] == [("failed", True)]


async def test_ollama_loads_no_model_and_keeps_it_as_it_was(canary: Callable[..., CanarySignal]) -> None:
    """It is asked for a model that is loaded, with the context that it was loaded with; without one, for nothing."""
    async with shown_face("ollama") as shown:
        signal = canary(shown, "ollama")
        result = await signal.send(PATIENCE, "tiny")
        assert (result.outcome, result.model, bool(result.digest)) == ("ok", "tiny:latest", True)
        asked = shown.bodies["/api/generate"][0]
        assert (asked["model"], asked["options"]["num_ctx"]) == ("tiny:latest", 8192)
        shown.answers["/api/ps"] = (200, '{"models": []}')
        result = await signal.send(PATIENCE, "tiny")
        assert (result.outcome, result.known) == ("moot", False) and "loads none" in result.detail
        assert len(shown.bodies["/api/generate"]) == 1


async def test_infinity_is_asked_below_its_own_root(canary: Callable[..., CanarySignal]) -> None:
    """A server without /v1 lists its models at /models; what is not there is not asked for again."""
    answers = {"/models": models("infinity"), "/embeddings": (200, EMBEDDED)}
    async with Shown(answers) as shown:
        signal = canary(shown, "openai")
        assert [(await signal.send(PATIENCE)).detail for _ in range(3)] == ["/embeddings"] * 3
        assert (shown.asked["/v1/models"], shown.asked["/models"]) == (1, 3)


async def test_a_list_that_empties_is_a_refusal_of_what_served(canary: Callable[..., CanarySignal]) -> None:
    """A front end that lost its worker lists no model: that says something only after a canary has passed."""
    answers = {"/v1/models": (200, '{"data": []}'), CHAT: (200, TOKEN)}
    async with engine(**answers) as shown:
        signal = canary(shown, "openai")
        assert [(r.outcome, r.known) for r in [await signal.send(PATIENCE)]] == [("rejected", False)]
        shown.answers["/v1/models"] = models("nvidia")
        assert (await signal.send(PATIENCE)).outcome == "ok"
        for lost in ((200, '{"data": []}'), (404, "")):
            shown.answers["/v1/models"] = lost
            assert [(r.outcome, r.known) for r in [await signal.send(PATIENCE)]] == [("rejected", True)]
        shown.answers["/v1/models"] = (500, "")
        assert [(r.outcome, r.known) for r in [await signal.send(PATIENCE)]] == [("rejected", False)]


async def test_a_canary_is_bound_to_one_slot_while_nothing_runs(canary: Callable[..., CanarySignal]) -> None:
    """llama.cpp would give it the slot of a user; at work it waits for no slot of its own."""
    async with engine(**{COMPLETIONS: (200, TOKEN)}) as shown:
        idle = True
        signal = canary(shown, "llamacpp", is_idle=lambda: idle)
        await signal.send(PATIENCE)
        idle = False
        await signal.send(PATIENCE)
        assert [body.get("id_slot") for body in shown.bodies[COMPLETIONS]] == [0, None]


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
        signal = canary(shown)
        result = await signal.send(0.2)
        assert (result.outcome, result.known) == ("starved", False)
        shown.handlers.clear()
        shown.answers[COMPLETIONS] = (200, TOKEN)
        assert (await signal.send(PATIENCE)).outcome == "ok"
        shown.handlers[COMPLETIONS] = begins
        result = await signal.send(0.2)
        assert (result.outcome, result.known) == ("starved", True)


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
    async with engine(**{COMPLETIONS: (200, TOKEN)}) as shown:
        signal = canary(shown)
        assert (await signal.send(PATIENCE)).outcome == "ok"
        monkeypatch.setattr("sidecar.signals.canary.MAX_ANSWER_BYTES", 1000)
        shown.answers[COMPLETIONS] = (200, TOKEN * 100)
        assert (await signal.send(PATIENCE)).outcome == "failed"


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
    assert {(r.outcome, r.known, r.detail.startswith(why)) for r in results} == {("rejected", False, True)}
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
        server.loaded = "a"
        result = await signal.send(PATIENCE)
        assert (result.outcome, result.known) == ("moot", False), "it has passed; without the model nothing is sent"
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


async def test_a_list_of_models_may_take_as_long_as_the_canary() -> None:
    """The session's own limit does not end it: "no token within 900 s" after 300 s would be untrue."""
    listed = asyncio.Event()
    async with engine(**{COMPLETIONS: (200, TOKEN)}) as shown:
        short = aiohttp.ClientTimeout(total=0.1)
        async with aiohttp.ClientSession(timeout=short) as session:

            async def slow(_: web.Request) -> web.Response:
                await asyncio.sleep(0.5)
                listed.set()
                return web.Response(text=models("vllm")[1])

            shown.handlers["/v1/models"] = slow
            result = await CanarySignal(session, shown.url, KINDS["vllm"], {}).send(PATIENCE)
    assert result.outcome == "ok" and listed.is_set()
