"""Calls that pause the engine on purpose: they take effect with the engine's 2xx, and exempt while they run."""

from __future__ import annotations

import asyncio
from contextlib import closing
from typing import Any

import pytest
from aiohttp import web

from sidecar.events import (
    CanariesOver,
    Directing,
    EnginePauseChanged,
    Event,
    LoadReport,
    Settled,
    UnreadRequest,
)
from sidecar.relay import canary_gate
from sidecar.relay.engine_io import MAX_REPEATED_BYTES
from sidecar.relay.engine_pauses import MAX_TAGS_BYTES, PAUSE_ROUTES, PauseCall, is_partial, route_of
from sidecar.tools.scripted_engine.server import EngineSettings, ScriptedEngine

from ..waiting import PATIENCE
from .test_relief import soon
from .work import FAST

WHAT = {"engine_sleeping", "engine_paused", "engine_profiling", "weight_update"}


def orders(r: Any) -> list[tuple[str, bool]]:
    return [(event.what, event.on) for event in r.emitted.of(EnginePauseChanged)]


def calls(r: Any) -> list[tuple[str, bool, bool]]:
    return [(event.what, event.on, event.taken) for event in r.emitted.of(Directing)]


def with_the_engine(r: Any) -> set[int]:
    """The calls that began and are not over."""
    emitted = r.emitted.of(Directing)
    return {event.id for event in emitted if event.on} - {event.id for event in emitted if not event.on}


async def answered(r: Any, method: str, path: str, **more: Any) -> int:
    async with r.client.request(method, r.url + path, **more) as got:
        await got.read()
        return int(got.status)


async def test_sleep_and_wake_up_of_an_engine(rig: Any) -> None:
    """POST /sleep and /wake_up pass unchanged and are reported; they are no work, so nothing is admitted."""
    async with ScriptedEngine(EngineSettings(**FAST)) as engine:
        r = await rig(engine.url)
        assert await answered(r, "POST", "/sleep?level=1") == 200
        assert orders(r) == [("engine_sleeping", True)]
        assert await answered(r, "POST", "/wake_up") == 200
    assert orders(r) == [("engine_sleeping", True), ("engine_sleeping", False)]
    assert not r.emitted.of(Settled)


async def test_a_call_is_reported_from_its_last_byte_to_its_answer(rig: Any, serve: Any) -> None:
    """An engine may stand still for minutes while it answers; where the call is no lasting stop, no order remains."""
    called, answer = asyncio.Event(), asyncio.Event()

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        called.set()
        await soon(answer)
        return web.Response()

    r = await rig(await serve(engine))
    asked = asyncio.create_task(answered(r, "POST", "/update_weights_from_disk", json={"model_path": "m"}))
    await soon(called)
    assert calls(r) == [("weight_update", True, False)]
    answer.set()
    await asked
    assert calls(r) == [("weight_update", True, False), ("weight_update", False, True)]
    assert orders(r) == []


@pytest.mark.parametrize("status", [404, 405, 307, 500])
@pytest.mark.parametrize("path", ["/sleep", "/pause", "/start_profile", "/update_weights", "/stop_profile", "/wake_up"])
async def test_what_the_engine_refused_is_no_order(rig: Any, serve: Any, path: str, status: int) -> None:
    """An engine without the path, or that fails at it, has neither stopped nor resumed."""

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(status=status)

    r = await rig(await serve(engine))
    assert await answered(r, "POST", path, allow_redirects=False) == status
    assert orders(r) == []
    assert not any(taken for _, _, taken in calls(r))
    assert with_the_engine(r) == set()


async def test_an_order_that_reached_nobody_is_none(rig: Any, unused_tcp_port: int) -> None:
    """Without a connection there is no stop."""
    r = await rig(f"http://127.0.0.1:{unused_tcp_port}")
    assert await answered(r, "POST", "/sleep") == 502
    assert orders(r) == []
    assert with_the_engine(r) == set()


@pytest.mark.parametrize("path", ["/sleep", "/pause", "/start_profile", "/update_weights", "/stop_profile"])
async def test_a_client_that_leaves_before_the_answer_leaves_no_order(rig: Any, serve: Any, path: str) -> None:
    """The call ends; what the engine did is left to its own signals."""
    called, left = asyncio.Event(), asyncio.Event()

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        called.set()
        try:
            await asyncio.Event().wait()
        finally:
            left.set()
        raise AssertionError

    r = await rig(await serve(engine))
    asked = asyncio.create_task(answered(r, "POST", path))
    await soon(called)
    assert len(with_the_engine(r)) == 1
    asked.cancel()
    await soon(left)
    assert orders(r) == []
    assert with_the_engine(r) == set()
    assert not any(taken for _, _, taken in calls(r))


@pytest.mark.parametrize(
    "announced",
    [b"content-length: 10", b"content-length: %d" % (MAX_REPEATED_BYTES + 10), b"transfer-encoding: chunked"],
    ids=["short", "long", "chunked"],
)
@pytest.mark.parametrize("path", [b"/sleep", b"/start_profile", b"/update_weights_from_disk"])
async def test_a_body_that_never_comes_makes_no_order(rig: Any, serve: Any, announced: bytes, path: bytes) -> None:
    """A client that announces a body, sends none and hangs up: nothing was with the engine, nothing is left."""

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        return web.Response(status=404)

    r = await rig(await serve(engine))
    reader, writer = await asyncio.open_connection(r.host, r.port)
    writer.write(b"POST %s HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\n%s\r\n\r\n" % (path, announced))
    async with asyncio.timeout(PATIENCE):
        await reader.readuntil(b"\r\n\r\n")  # the relay reads
    writer.close()
    await writer.wait_closed()
    await r.relay.drain(PATIENCE)  # it is done with the client
    assert (orders(r), calls(r)) == ([], [])


@pytest.mark.parametrize("answers", [True, False], ids=["control answers", "control does not"])
@pytest.mark.parametrize("path", ["/release_memory_occupation", "/flush_cache", "/reset_prefix_cache"])
async def test_a_call_that_stops_the_engine_waits_for_the_canary_with_it(
    rig: Any, serve: Any, monkeypatch: pytest.MonkeyPatch, answers: bool, path: str
) -> None:
    """It is announced first; control says when no canary is out, and a hung canary delays no call for long."""
    called = asyncio.Event()

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        called.set()
        return web.Response()

    monkeypatch.setattr(canary_gate, "CANARY_WAIT_S", PATIENCE if answers else 0.05)
    r = await rig(await serve(engine))
    r.relay.on_command(LoadReport("{}", "", "idle"))
    asked = asyncio.create_task(answered(r, "POST", path))
    [announced] = await r.emitted.wait(Directing)
    if answers:
        assert announced.on and not called.is_set()
        r.relay.on_command(CanariesOver((announced.id, 99)))
    assert await asked == 200
    assert [event.on for event in r.emitted.of(Directing)] == [True, False]


async def test_a_call_that_needs_an_idle_engine_is_no_order(rig: Any, serve: Any) -> None:
    """A cache that was flushed pauses nothing; the call is counted as one that controls the engine."""

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response()

    r = await rig(await serve(engine))
    assert await answered(r, "POST", "/flush_cache") == 200
    assert orders(r) == []
    assert [event.path_class for event in r.emitted.of(UnreadRequest) if event.on] == ["control"]


async def test_a_long_body_is_with_the_engine_when_the_last_of_it_was_sent(rig: Any, serve: Any) -> None:
    """Weights in the body stream through; until they are there, the engine goes on with its work."""
    began, whole, read, answer = (asyncio.Event() for _ in range(4))

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        await request.content.readany()
        began.set()
        await request.read()
        read.set()
        await soon(answer)
        return web.Response()

    async def weights() -> Any:
        yield b"w" * MAX_REPEATED_BYTES
        await soon(whole)
        yield b"w"

    r = await rig(await serve(engine, client_max_size=2 * MAX_REPEATED_BYTES))
    asked = asyncio.create_task(answered(r, "POST", "/update_weights_from_tensor", data=weights()))
    await soon(began)
    assert calls(r) == []
    whole.set()
    await soon(read)
    await r.emitted.wait(Directing)
    assert calls(r) == [("weight_update", True, False)]
    answer.set()
    assert await asked == 200
    assert calls(r) == [("weight_update", True, False), ("weight_update", False, True)]


async def test_a_failed_resumption_resumes_nothing(rig: Any, serve: Any) -> None:
    """Only a 2xx lets the engine's work go on."""

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(status=500 if request.path == "/resume" else 200)

    r = await rig(await serve(engine))
    await answered(r, "POST", "/pause")
    await answered(r, "POST", "/resume")
    assert orders(r) == [("engine_paused", True)]


async def test_waking_in_part_is_not_awake(rig: Any, serve: Any) -> None:
    """Weights first, KV cache last, by vLLM's query or SGLang's unchanged body: only the last one resumes."""
    bodies: list[bytes] = []

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        bodies.append(await request.read())
        return web.Response()

    r = await rig(await serve(engine))
    await answered(r, "POST", "/wake_up?tags=weights")
    await answered(r, "POST", "/resume_memory_occupation", data=b'{"tags": ["weights"]}')
    assert orders(r) == []
    await answered(r, "POST", "/resume_memory_occupation", data=b'{"tags": ["kv_cache"]}')
    assert orders(r) == [("engine_sleeping", False)]
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
        ("", b'{"tags": true}', False),
        ("", b'{"tags": 5}', False),
        ("", b'{"tags": "weights"}', True),
        ("", b'{"tags": "weights", "x": [' + b"[]," * MAX_TAGS_BYTES + b"[]]}", False),
    ],
)
def test_in_part(query: str, body: bytes, partly: bool) -> None:
    """Parts that are named without the KV cache leave the engine asleep; what cannot be read or is long names none."""
    assert is_partial(query, body) is partly


@pytest.mark.parametrize(
    ("path", "status", "orders"),
    [
        ("/start_weight_update", 200, [True]),
        ("/update_weights", 200, []),
        ("/finish_weight_update", 200, [False]),
        ("/finish_weight_update", 500, []),
        ("/start_profile", 202, [True]),
        ("/stop_profile", 200, [False]),
        ("/stop_profile", 404, []),
    ],
)
def test_what_an_answer_means(path: str, status: int, orders: list[bool]) -> None:
    """Only a 2xx takes an order or its opposite; a call that lasts as long as the stop is neither."""
    emitted: list[Event] = []
    route = route_of("POST", path)
    with closing(PauseCall(emitted.append, lambda: 1.0, 1, route)) as call:
        call.sent()
        call.answered(status)
    assert route is not None
    assert [event for event in emitted if isinstance(event, EnginePauseChanged)] == [
        EnginePauseChanged(1.0, route.what, on, route.shown) for on in orders
    ]


def test_an_answer_that_comes_before_the_body_was_sent_ends_the_call() -> None:
    """What is written of the body afterwards begins nothing."""
    emitted: list[Event] = []
    with closing(PauseCall(emitted.append, lambda: 1.0, 1, route_of("POST", "/update_weights"))) as call:
        call.answered(413)
        call.sent()
    assert emitted == []


def test_the_table_is_sound() -> None:
    """Every route has a known code; only GET, POST and PUT direct; other paths do not."""
    assert {route.what for route in PAUSE_ROUTES.values()} == WHAT
    assert route_of("DELETE", "/sleep") is None
    assert route_of("POST", "/v1/sleep") is None
