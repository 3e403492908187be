"""What clients get when the engine stalls, or one of its requests does: an error at once, in the form they raise on."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from sidecar.errors import EngineStalled
from sidecar.events import AbortRequests, Admitted, FirstToken, LoadReport, Settled
from sidecar.relay.open_requests import LOAD_REPORT_STALE_S, OpenRequests

from ..waiting import PATIENCE
from .work import CHAT, TOKEN, once, sse

STALLED = LoadReport("{}", "", "stalled")
WELL = LoadReport("{}", "", "progressing")


class Wedged:
    """An engine that sends what it is given and then nothing, for each request until its connection closes."""

    def __init__(self, *pieces: bytes, headers: dict[str, str] | None = None, early_head: bool = True) -> None:
        self.pieces = pieces
        self.headers = headers or {"content-type": "text/event-stream"}
        self.early_head = early_head
        self.calls = 0
        self.silent = asyncio.Event()  # it has sent all that it sends
        self.left = asyncio.Event()  # its connection was closed

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        self.calls += 1
        await request.read()
        response = web.StreamResponse(headers=self.headers)
        try:
            if self.early_head:
                await response.prepare(request)
            for piece in self.pieces:
                await response.write(piece)
            self.silent.set()
            await asyncio.Event().wait()
        finally:
            self.left.set()
        return response


async def soon(event: asyncio.Event) -> None:
    async with asyncio.timeout(PATIENCE):
        await event.wait()


async def test_who_got_nothing_yet_gets_a_503(rig: Any, serve: Any) -> None:
    """A request without an answer when the engine stalls ends with engine_stalled and Retry-After.

    Its connection to the engine closes, and it settles once, as stalled.
    """
    engine = Wedged(early_head=False)
    r = await rig(await serve(engine))
    asked = asyncio.create_task(r.client.post(r.url + "/v1/chat/completions", json=CHAT))
    await soon(engine.silent)
    r.relay.on_command(STALLED)
    got = await asked
    assert (got.status, got.headers["retry-after"]) == (503, "10")
    assert (await got.json())["error"]["code"] == "engine_stalled"
    await soon(engine.left)
    _, settled = once(r.emitted)
    assert (settled.outcome, settled.error, settled.status) == ("stalled", "engine_stalled", 0)


@pytest.mark.parametrize(
    ("path", "pieces"),
    [
        ("/v1/chat/completions", ()),
        ("/v1/chat/completions", (*sse(TOKEN, TOKEN),)),
        ("/v1/completions", (*sse(TOKEN), b'data: {"cho')),
    ],
    ids=["head only", "events", "half an event held back"],
)
async def test_a_stream_ends_by_an_error_event(rig: Any, serve: Any, path: str, pieces: tuple[bytes, ...]) -> None:
    """A stream under way ends properly: its events, an `error` that OpenAI's clients raise on, the end of the body."""
    engine = Wedged(*pieces)
    r = await rig(await serve(engine))
    got = await r.client.post(r.url + path, json={**CHAT, "stream": True})
    assert got.status == 200
    await soon(engine.silent)
    if pieces:
        await r.emitted.wait(FirstToken)
    r.relay.on_command(STALLED)
    *events, last = (await got.read()).strip().split(b"\n\n")
    assert len(events) == sum(b"\n\n" in piece for piece in pieces)
    error = json.loads(last.removeprefix(b"data: "))["error"]
    assert (error["code"], error["type"]) == ("engine_stalled", "server_error")
    await soon(engine.left)
    assert once(r.emitted)[1].outcome == "stalled"


async def test_anthropics_clients_get_a_named_error(rig: Any, serve: Any) -> None:
    """On /v1/messages the last event is named `error` and typed so, as Anthropic's clients expect."""
    engine = Wedged(b'event: content_block_delta\ndata: {"type":"content_block_delta"}\n\n')
    r = await rig(await serve(engine))
    got = await r.client.post(r.url + "/v1/messages", json={**CHAT, "stream": True})
    await r.emitted.wait(FirstToken)
    r.relay.on_command(STALLED)
    last = (await got.read()).strip().split(b"\n\n")[-1]
    name, data = last.split(b"\n")
    assert name == b"event: error"
    assert json.loads(data.removeprefix(b"data: "))["type"] == "error"


@pytest.mark.parametrize(
    ("headers", "piece", "body"),
    [
        ({"content-type": "application/json"}, b'{"choices":[', {}),
        ({"content-type": "text/event-stream"}, b'data: {"choices":[', {"stream_options": {"include_usage": True}}),
    ],
    ids=["json", "in the middle of an event"],
)
async def test_what_cannot_end_well_is_broken_off(
    rig: Any, serve: Any, headers: dict[str, str], piece: bytes, body: dict[str, Any]
) -> None:
    """A body that is no stream, or a stream within an event, breaks: the client cannot take the part for the whole."""
    engine = Wedged(piece, headers=headers)
    r = await rig(await serve(engine))
    got = await r.client.post(r.url + "/v1/chat/completions", json={**CHAT, "stream": True, **body})
    assert await got.content.readany() == piece
    r.relay.on_command(STALLED)
    with pytest.raises(aiohttp.ClientPayloadError):
        await got.read()
    assert once(r.emitted)[1].outcome == "stalled"


async def test_new_work_is_refused_while_stalled_and_other_paths_pass(rig: Any, serve: Any) -> None:
    """While stalled, work gets the error at once without reaching the engine; /health does; recovery ends this."""
    seen: list[str] = []

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        seen.append(request.path)
        return web.Response()

    r = await rig(await serve(engine))
    r.relay.on_command(STALLED)
    async with r.client.post(r.url + "/v1/chat/completions", json=CHAT) as got:
        assert (got.status, (await got.json())["error"]["code"]) == (503, "engine_stalled")
    async with r.client.get(r.url + "/health") as got:
        assert got.status == 200
    assert once(r.emitted)[1].outcome == "stalled"
    r.relay.on_command(WELL)
    async with r.client.post(r.url + "/v1/chat/completions", json=CHAT) as got:
        assert got.status == 200
    assert seen == ["/health", "/v1/chat/completions"]


async def test_an_old_verdict_refuses_nobody(emitted: Any) -> None:
    """A stalled verdict that is not repeated holds for seconds: a relay whose control process died goes on."""
    desk = OpenRequests(emitted)
    desk.on_verdict("stalled", 10.0)
    with pytest.raises(EngineStalled):
        desk.check(10.0 + LOAD_REPORT_STALE_S - 0.1)
    desk.check(10.0 + LOAD_REPORT_STALE_S)


@pytest.mark.parametrize("verdict", ["suspect", "unknown", "quiet", "exempt", "starting"])
async def test_no_other_verdict_ends_anything(rig: Any, serve: Any, verdict: Any) -> None:
    """Suspicion, or not knowing, ends no request and refuses none."""
    go_on = asyncio.Event()

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        await soon(go_on)
        return web.Response()

    r = await rig(await serve(engine))
    asked = asyncio.create_task(r.client.post(r.url + "/v1/chat/completions", json=CHAT))
    await r.emitted.wait(Admitted)
    r.relay.on_command(LoadReport("{}", "", verdict))
    another = asyncio.create_task(r.client.post(r.url + "/v1/chat/completions", json=CHAT))
    await r.emitted.wait(Admitted, 2)
    go_on.set()
    assert [(await asked).status, (await another).status] == [200, 200]


async def test_a_dead_engine_ends_what_it_had_but_is_tried_anew(rig: Any, serve: Any) -> None:
    """`dead` ends open requests; a new one is tried: the engine may be back before the verdict changes."""
    engine = Wedged(early_head=False)
    r = await rig(await serve(engine))
    asked = asyncio.create_task(r.client.post(r.url + "/v1/chat/completions", json=CHAT))
    await soon(engine.silent)
    r.relay.on_command(LoadReport("{}", "", "dead"))
    assert (await asked).status == 503
    engine.silent.clear()
    asked = asyncio.create_task(r.client.post(r.url + "/v1/chat/completions", json=CHAT))
    await soon(engine.silent)
    r.relay.on_command(LoadReport("{}", "", "dead"))
    r.relay.on_command(WELL)
    assert not asked.done()
    asked.cancel()
    await r.emitted.wait(Settled, 2)
    assert [s.outcome for s in r.emitted.of(Settled)] == ["stalled", "client_cancelled"]


@pytest.mark.parametrize(
    ("code", "status", "outcome"), [("stream_stuck", 503, "stalled"), ("prompt_exceeds_kv_cache", 400, "rejected")]
)
async def test_single_requests_are_ended(rig: Any, serve: Any, code: str, status: int, outcome: str) -> None:
    """AbortRequests ends the requests that it names, with its code, and no other; unknown ids do nothing."""
    engine = Wedged(early_head=False)
    r = await rig(await serve(engine))
    asked = [asyncio.create_task(r.client.post(r.url + "/v1/chat/completions", json=CHAT)) for _ in range(2)]
    victim = (await r.emitted.wait(Admitted, 2))[0].id
    await soon(engine.silent)
    for _ in range(2):
        r.relay.on_command(AbortRequests((victim, "elsewhere"), code))
    [settled] = await r.emitted.wait(Settled)
    assert (settled.id, settled.outcome, settled.error) == (victim, outcome, code)
    done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED, timeout=PATIENCE)
    [got] = [task.result() for task in done]
    assert (got.status, (await got.json())["error"]["code"]) == (status, code)
    r.relay.on_command(AbortRequests((victim,), code))
    for task in asked:
        task.cancel()
    assert len(await r.emitted.wait(Settled, 2)) == 2


async def test_an_ended_stream_names_the_code(rig: Any, serve: Any) -> None:
    """A stuck stream ends by an event of its own code, and its engine connection closes, which frees its slot."""
    engine = Wedged(*sse(TOKEN))
    r = await rig(await serve(engine))
    got = await r.client.post(r.url + "/v1/completions", json={"stream": True, "prompt": "x"})
    await r.emitted.wait(FirstToken)
    r.relay.on_command(AbortRequests((r.emitted.of(Admitted)[0].id,), "stream_stuck"))
    assert b'"stream_stuck"' in await got.read()
    await soon(engine.left)
    assert once(r.emitted)[1].outcome == "stalled"


async def test_a_client_that_leaves_as_the_order_comes_settles_once(rig: Any, serve: Any) -> None:
    """A hang-up and an end in the same moment: one settlement, and the relay serves on."""
    wedged = Wedged(*sse(TOKEN))

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        return await wedged(request) if request.method == "POST" else web.Response()

    r = await rig(await serve(engine))
    got = await r.client.post(r.url + "/v1/completions", json={"stream": True, "prompt": "x"})
    await r.emitted.wait(FirstToken)
    got.close()
    r.relay.on_command(STALLED)
    await soon(wedged.left)
    await r.emitted.settled()
    assert once(r.emitted)[1].outcome in ("stalled", "client_cancelled")
    async with r.client.get(r.url + "/nothing") as again:
        assert again.status == 200
