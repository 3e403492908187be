"""Calls that stop the engine's work on purpose: told to control when they are sent, and taken back where they failed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp import web

from sidecar.engine.scripted import EngineSettings, ScriptedEngine
from sidecar.facts import Directed, Fact, Settled
from sidecar.relay.directed import PATHS, Windows, in_part, row_of

from .test_relief import soon
from .work import FAST

WHAT = {"engine_sleeping", "engine_paused", "engine_profiling", "weight_update"}


def told(r: Any) -> list[tuple[str, bool]]:
    return [(fact.what, fact.on) for fact in r.facts.of(Directed)]


async def answered(r: Any, method: str, path: str, **more: Any) -> int:
    async with r.client.request(method, r.url + path, **more) as got:
        await got.read()
        return int(got.status)


async def test_sleep_and_wake_up_of_an_engine(rig: Any) -> None:
    """POST /sleep and /wake_up pass as they are and are told; they are no work, so nothing is admitted."""
    async with ScriptedEngine(EngineSettings(**FAST)) as engine:
        r = await rig(engine.url)
        assert await answered(r, "POST", "/sleep?level=1") == 200
        assert told(r) == [("engine_sleeping", True)]
        assert await answered(r, "POST", "/wake_up") == 200
    assert told(r) == [("engine_sleeping", True), ("engine_sleeping", False)]
    assert not r.facts.of(Settled)


async def test_the_stop_is_told_before_the_answer(rig: Any, serve: Any) -> None:
    """An engine that takes minutes to stop is exempt from the moment the call is sent; a call like this ends it with its answer."""
    called, answer = asyncio.Event(), asyncio.Event()

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        called.set()
        await soon(answer)
        return web.Response()

    r = await rig(await serve(engine))
    asked = asyncio.create_task(answered(r, "POST", "/update_weights_from_disk", json={"model_path": "m"}))
    await soon(called)
    assert told(r) == [("weight_update", True)]
    answer.set()
    await asked
    assert told(r) == [("weight_update", True), ("weight_update", False)]


@pytest.mark.parametrize(("status", "left"), [(404, 2), (500, 2), (200, 1)])
async def test_a_stop_that_was_refused_is_taken_back(rig: Any, serve: Any, status: int, left: int) -> None:
    """An engine without the path, or that fails at it, has not stopped."""

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(status=status)

    r = await rig(await serve(engine))
    assert await answered(r, "POST", "/pause") == status
    assert told(r) == [("engine_paused", True), ("engine_paused", False)][:left]


async def test_a_stop_that_reached_nobody_is_taken_back(rig: Any, unused_tcp_port: int) -> None:
    """Without a connection there is no stop."""
    r = await rig(f"http://127.0.0.1:{unused_tcp_port}")
    assert await answered(r, "POST", "/sleep") == 502
    assert told(r) == [("engine_sleeping", True), ("engine_sleeping", False)]


async def test_a_failed_resumption_resumes_nothing(rig: Any, serve: Any) -> None:
    """Only a 2xx lets the engine's work go on."""

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(status=500 if request.path == "/resume" else 200)

    r = await rig(await serve(engine))
    await answered(r, "POST", "/pause")
    await answered(r, "POST", "/resume")
    assert told(r) == [("engine_paused", True)]


async def test_waking_in_part_is_not_awake(rig: Any, serve: Any) -> None:
    """Weights first, KV cache last, by vLLM's query or SGLang's body, which arrives as it was sent: only the last one resumes."""
    bodies: list[bytes] = []

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        bodies.append(await request.read())
        return web.Response()

    r = await rig(await serve(engine))
    await answered(r, "POST", "/wake_up?tags=weights")
    await answered(r, "POST", "/resume_memory_occupation", data=b'{"tags": ["weights"]}')
    assert told(r) == []
    await answered(r, "POST", "/resume_memory_occupation", data=b'{"tags": ["kv_cache"]}')
    assert told(r) == [("engine_sleeping", False)]
    assert bodies == [b"", b'{"tags": ["weights"]}', b'{"tags": ["kv_cache"]}']


@pytest.mark.parametrize(
    ("query", "body", "partly"),
    [
        ("", b"", False),
        ("tags=kv_cache", b"", False),
        ("tags=weights&tags=kv_cache", b"", False),
        ("tags=weights", b"", True),
        ("", b'{"tags": null}', False),
        ("", b"{not json", False),
        ("", b"[]", False),
    ],
)
def test_in_part(query: str, body: bytes, partly: bool) -> None:
    """Parts that are named without the KV cache leave the engine asleep; what cannot be read names none."""
    assert in_part(query, body) is partly


def test_a_call_within_a_wider_stop_does_not_end_it() -> None:
    """Weights that are updated piece by piece between start and finish stay one exemption; a second sleep that fails ends none."""
    told: list[Fact] = []
    windows = Windows(told.append, lambda: 1.0)

    def call(path: str, status: int) -> None:
        with windows.call(row_of("POST", path)) as it:
            it.answered(status)

    for path, status in (("/start_weight_update", 200), ("/update_weights", 200), ("/update_weights", 200)):
        call(path, status)
    assert {fact.on for fact in told if isinstance(fact, Directed)} == {True}
    call("/finish_weight_update", 200)
    assert told[-1] == Directed(1.0, "weight_update", False)
    call("/sleep", 200)
    call("/sleep", 500)
    assert told[-1] == Directed(1.0, "engine_sleeping", True)


def test_writing_the_profile_is_exempt_to_its_end() -> None:
    """/stop_profile stops the world itself: told again when it is sent, and over with its answer, whatever that is."""
    told: list[Fact] = []
    windows = Windows(told.append, lambda: 1.0)
    for path in ("/start_profile", "/stop_profile"):
        with windows.call(row_of("POST", path)) as it:
            it.answered(200)
    assert [fact.on for fact in told if isinstance(fact, Directed)] == [True, True, False]


def test_the_table_is_sound() -> None:
    """Every row has a known code; only GET, POST and PUT direct; other paths do not."""
    assert {row.what for row in PATHS.values()} == WHAT
    assert row_of("DELETE", "/sleep") is None
    assert row_of("POST", "/v1/sleep") is None
