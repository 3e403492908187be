"""The contact with each engine over real HTTP: its kind, with and without keys and metrics, and after a restart."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from sidecar.engines import sglang
from sidecar.readings import Absent, Value
from sidecar.settings import Settings
from sidecar.signals import engine_monitor, metrics_scrape
from sidecar.signals.engine_monitor import EngineMonitor

from ..engines.engine_faces import FACES, OnDemand, Shown, models, page, said, shown
from ..waiting import PATIENCE


@pytest.fixture
async def meet() -> AsyncIterator[Callable[..., Any]]:
    """A function: engine and settings -> a Contact that runs."""
    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
        tasks = []

        async def start(engine: Shown, **chosen: Any) -> EngineMonitor:
            contact = EngineMonitor(session, Settings(engine=engine.url, **chosen))
            opened = asyncio.Event()
            opened.set()
            tasks.append(group.create_task(contact.run(opened)))
            await until(lambda: contact.canary is not None)
            return contact

        yield start
        for task in tasks:
            task.cancel()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No rests between attempts."""
    monkeypatch.setattr(engine_monitor, "PROBE_RETRY_INTERVAL_S", 0.01)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not holds():  # noqa: ASYNC110 - a state of another task without an event
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("says", [True, False])
async def test_no_model_is_loaded_to_recognise_a_server(meet: Callable[..., Any], says: bool) -> None:
    """What a server is, is found by reading alone."""
    server = OnDemand("a", "b", says=says)
    async with server.shown() as engine:
        contact = await meet(engine)
        await until(lambda: contact.identity.models == ("a", "b"))
        assert contact.kind_name == ("llamacpp" if says else "openai")
    assert server.loads == [] and not engine.bodies


@pytest.mark.parametrize("metrics", [True, False], ids=["metrics", "no-metrics"])
@pytest.mark.parametrize("key", ["none", "ours", "missing"])
@pytest.mark.parametrize("name", FACES)
async def test_each_engine_is_recognised(meet: Callable[..., Any], name: str, key: str, metrics: bool) -> None:
    """Each engine is recognised under any model name, with metrics on or off, with its key and if possible without."""
    hidden = name in ("sglang", "tei") and key == "missing" and not metrics  # nothing but health checks is open then
    async with shown(name, metrics=metrics, key=key != "none") as engine:
        contact = await meet(engine, **({"engine_key": "secret"} if key == "ours" else {}))
        assert contact.kind_name == ("openai" if hidden else name)


async def test_a_foreign_engine_is_asked_for_nothing_that_it_lacks(meet: Callable[..., Any]) -> None:
    """NVIDIA Dynamo counts each request without a route as a failure: it gets none, after a restart neither."""
    async with Shown({"/v1/models": models("nvidia"), "/metrics": (200, "dynamo_requests 1\n")}) as engine:
        contact = await meet(engine)
        await until(lambda: contact.identity.models != ())
        contact.engine_restarted()
        await until(lambda: engine.asked["/metrics"] == 2)
        assert contact.kind_name == "openai" and set(engine.asked) == {"/v1/models", "/metrics"}


async def test_what_is_missing_is_asked_for_once(meet: Callable[..., Any]) -> None:
    """A server that nothing identifies gets each mark once, although it is looked at again."""
    async with Shown({"/v1/models": (200, '{"data": []}')}) as engine:
        assert (await meet(engine)).kind_name == "openai"
        assert engine.asked["/v1/models"] >= engine_monitor.MAX_INCONCLUSIVE_ATTEMPTS
        assert {count for path, count in engine.asked.items() if path != "/v1/models"} == {1}


@pytest.mark.parametrize(
    ("name", "slots", "disturbs"),
    [("llamacpp", 4, False), ("llamacpp", 1, True), ("ollama", 0, True), ("vllm", 0, False), ("tei", 0, False)],
)
async def test_a_canary_that_costs_users_a_cache_is_known(
    meet: Callable[..., Any], name: str, slots: int, disturbs: bool
) -> None:
    """One slot with a prompt cache, and a model whose time to live each request renews, are left alone when idle."""
    async with shown(name) as engine:
        if slots:
            engine.answers["/props"] = said(default_generation_settings={"n_ctx": 2048}, total_slots=slots)
        contact = await meet(engine)
        await until(lambda: contact.identity.models != ())
        assert (contact.canary_disturbs, contact.identity.slots) == (disturbs, slots)


async def never(request: web.Request) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError


async def test_a_page_that_hangs_is_worth_a_canary_in_the_only_slot(
    meet: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoding loop renders llama.cpp's page: if it does not come, and nothing runs, it may have stopped."""
    async with shown("llamacpp") as engine:
        engine.answers["/props"] = said(default_generation_settings={"n_ctx": 2048}, total_slots=1)
        contact = await meet(engine)
        await until(lambda: contact.identity.models != ())
        assert contact.canary_disturbs
        monkeypatch.setattr(metrics_scrape, "MAX_PAGE_AGE_S", 0.05)
        engine.handlers["/metrics"] = never
        await until(lambda: contact.scrape.is_late)
        assert not contact.canary_disturbs


async def test_an_idle_llama_gets_its_canaries_in_one_slot(meet: Callable[..., Any]) -> None:
    """Where its metrics say that nothing runs, the canary keeps to a slot; while a request runs it is not bound."""
    async with shown("llamacpp") as engine:
        contact = await meet(engine)
        await until(lambda: isinstance(contact.read(), Value))
        await contact.canary.send(PATIENCE)
        status, text = engine.answers["/metrics"]
        busy = "llamacpp:requests_processing 1"
        assert busy in text
        engine.answers["/metrics"] = status, text.replace(busy, "llamacpp:requests_processing 0")
        await until(lambda: isinstance(contact.read(), Value) and contact.read().value.running == 0)
        await contact.canary.send(PATIENCE)
        assert [body.get("id_slot") for body in engine.bodies["/v1/completions"]] == [None, 0]


async def test_an_engine_that_wants_a_key_is_not_waited_for_for_ever(
    meet: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """If everything is rejected the kind is `openai`, and the log has the remedy."""
    async with Shown({}, guarded=("/",)) as engine:
        assert (await meet(engine)).kind_name == "openai"
    assert "--engine-key" in caplog.text


async def test_a_loading_engine_is_waited_for(meet: Callable[..., Any]) -> None:
    """An engine that responds 503 while it loads is not `openai`: requests are repeated until it is ready."""
    async with Shown({"/v1/models": (503, "")}) as engine:
        task = asyncio.create_task(meet(engine))
        await until(lambda: engine.asked["/v1/models"] > 2 * engine_monitor.MAX_INCONCLUSIVE_ATTEMPTS)
        engine.answers |= {"/v1/models": models("vllm")}
        assert (await task).kind_name == "vllm"


async def test_an_engine_is_recognised_anew_after_a_restart(meet: Callable[..., Any]) -> None:
    """Another engine on the same port is recognised: kind, page and canary are its own."""
    async with shown("vllm") as engine:
        contact = await meet(engine)
        await until(lambda: isinstance(contact.read(), Value))
        engine.answers = dict(shown("tgi").answers)
        contact.engine_restarted()
        await until(lambda: contact.kind_name == "tgi")
        await until(lambda: isinstance(contact.read(), Value) and contact.read().value.running == 6)
        assert (await contact.canary.send(PATIENCE)).outcome == "ok"
        assert engine.bodies["/v1/completions"][-1]["model"] == "tgi"


async def test_a_front_end_that_reads_no_pnm_is_known_until_it_is_another(meet: Callable[..., Any]) -> None:
    """What vLLM's Rust front end says of itself holds for its process; each process is counted."""
    async with shown("vllm") as engine:
        engine.answers["/version"] = said(version="0.33.0", rust_frontend_version="0.33.0")
        contact = await meet(engine)
        await until(lambda: not contact.identity.prepared)
        assert contact.kind_name == "vllm" and contact.processes == 0
        engine.answers["/version"] = said(version="0.33.0")
        contact.engine_restarted()
        await until(lambda: contact.identity.prepared)
        assert contact.processes == 1


async def test_the_settings_come_from_the_page_that_is_scraped(meet: Callable[..., Any]) -> None:
    """Never are two pages rendered at once: one may take the engine seconds."""
    open_pages, most = 0, 0
    async with shown("vllm") as engine:
        text = engine.answers["/metrics"][1]

        async def slow(_: web.Request) -> web.Response:
            nonlocal open_pages, most
            open_pages += 1
            most = max(most, open_pages)
            await asyncio.sleep(0.2)
            open_pages -= 1
            return web.Response(text=text)

        engine.handlers["/metrics"] = slow
        contact = await meet(engine)
        await until(lambda: contact.identity.flags != ())
        assert contact.identity.models and most == 1


async def test_a_chosen_kind_is_kept(meet: Callable[..., Any]) -> None:
    """--engine-kind is not overruled, by a restart neither."""
    async with shown("vllm") as engine:
        contact = await meet(engine, engine_kind="openai")
        contact.engine_restarted()
        await until(lambda: engine.asked["/v1/models"] > 1)
        assert contact.kind_name == "openai"
        assert isinstance(contact.read(), Absent)


async def test_an_engine_without_a_page_shows_a_blocked_api(
    meet: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kind without metrics gets a cheap request, so that a blocked API is noticed there, too."""
    monkeypatch.setattr(
        engine_monitor,
        "ScrapeSignal",
        lambda *a, **k: real(*a, **{**k, "timeout": 1.0, "contact_timeout": 0.2, "period": 0.02}),
    )
    free = asyncio.Event()
    async with Shown({"/v1/models": models("my-org")}) as engine:
        contact = await meet(engine, engine_kind="openai")
        await until(lambda: engine.asked["/v1/models"] > 0 and not contact.unanswered)

        async def blocked(_: web.Request) -> web.Response:
            await free.wait()
            return web.Response()

        engine.handlers["/v1/models"] = blocked
        await until(lambda: contact.unanswered)
        engine.handlers.clear()
        free.set()
        await until(lambda: not contact.unanswered)


async def test_a_restarted_engine_that_answers_nothing_is_seen_while_it_is_recognised(
    meet: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What takes connections and answers nothing cannot be recognised, and that is known; what answers ends it."""
    free = asyncio.Event()
    async with shown("vllm") as engine:
        contact = await meet(engine)
        await until(lambda: isinstance(contact.read(), Value))

        async def blocked(_: web.Request) -> web.Response:
            await free.wait()
            return web.Response(status=503)

        engine.handlers["/v1/models"] = blocked
        monkeypatch.setattr(engine_monitor, "REQUEST_TIMEOUT_S", 0.2)
        contact.engine_restarted()
        await until(lambda: contact.unanswered)
        free.set()
        await until(lambda: not contact.unanswered)
        engine.handlers.clear()


real = engine_monitor.ScrapeSignal


@pytest.mark.parametrize(
    ("name", "changes", "resting"),
    [
        ("vllm", {}, ""),
        ("vllm", {"/metrics": page("vllm-0.32-asleep.txt")}, "engine_sleeping"),
        ("vllm", {"/is_paused": said(is_paused=True), "/is_sleeping": said(is_sleeping=True)}, "engine_paused"),
        (
            "vllm",
            {"/metrics": page("vllm-0.32-asleep.txt"), "/is_paused": said(is_paused=True)},
            "engine_sleeping",
        ),
        ("llamacpp", {"/props": said(default_generation_settings={}, is_sleeping=True)}, "engine_sleeping"),
        ("sglang", {}, ""),
    ],
)
async def test_a_rest_has_its_reason(
    meet: Callable[..., Any], name: str, changes: dict[str, Any], resting: str
) -> None:
    """Sleep and pause are read from the engine and have reason codes of their own."""
    async with shown(name) as engine:
        engine.answers |= changes
        contact = await meet(engine)
        await until(lambda: contact.resting == resting and (resting != "" or isinstance(contact.read(), Value)))


async def test_a_sleeping_llama_is_not_woken(meet: Callable[..., Any]) -> None:
    """No canary and no scrape goes to a server that a request would wake; both go again once it is awake."""
    asleep = said(default_generation_settings={}, is_sleeping=True)
    async with shown("llamacpp") as engine:
        awake = engine.answers["/props"]
        engine.answers["/props"] = asleep
        contact = await meet(engine)
        result = await contact.canary.send(PATIENCE)
        assert (result.outcome, engine.asked["/v1/completions"]) == ("moot", 0)
        assert contact.wakes and contact.resting == "engine_sleeping"
        engine.answers["/props"] = awake
        assert (await contact.canary.send(PATIENCE)).outcome == "ok"


async def test_sglangs_own_flags_choose_the_priority(meet: Callable[..., Any]) -> None:
    """Where the server schedules by priority the canary has the first one."""
    async with shown("sglang") as engine:
        contact = await meet(engine)
        assert (await contact.canary.send(PATIENCE)).outcome == "ok"
        assert engine.bodies["/v1/completions"][0]["priority"] == sglang.FIRST_PRIORITY


async def test_contact_survives_an_engine_that_goes_away(meet: Callable[..., Any]) -> None:
    """A restart during recognition and a closing port do not end the monitor."""
    async with shown("vllm") as engine:
        contact = await meet(engine)
    contact.engine_restarted()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.2):
            await until(lambda: isinstance(contact.read(), Value))
    assert contact.kind_name == "vllm" and not contact.resting
