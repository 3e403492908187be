"""--retry-stalled: what was answered nothing waits for the engine's recovery and is sent once more; each settles once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp import web

from sidecar.events import FirstToken, RequestBlocked
from sidecar.relay.engine_io import BodyPayload
from sidecar.relay.open_requests import OpenRequests
from sidecar.relay.retry import Retries

from ..waiting import PATIENCE
from .pictures import Workers, pictures
from .test_relief import STALLED, WELL, Wedged, soon
from .work import CHAT, TOKEN, once, sse


class Recovering:
    """An engine that wedges on its first `wedges` requests and answers the rest. `bodies`: what it got."""

    def __init__(self, wedged: Wedged, wedges: int = 1) -> None:
        self.wedged = wedged
        self.wedges = wedges
        self.bodies: list[bytes] = []

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        self.bodies.append(await request.read())
        if len(self.bodies) <= self.wedges:
            return await self.wedged(request)
        return web.Response(body=b"".join(sse(TOKEN, b"[DONE]")), headers={"content-type": "text/event-stream"})


async def stall(r: Any, engine: Recovering) -> None:
    """Give the engine up once it has the request, and wait until the relay waits for its recovery."""
    await soon(engine.wedged.silent)
    engine.wedged.silent.clear()
    r.relay.on_command(STALLED)
    await soon(engine.wedged.left)


@pytest.mark.parametrize("early_head", [False, True], ids=["no answer", "an answer's head"])
async def test_it_is_sent_once_more_after_recovery(rig: Any, serve: Any, early_head: bool) -> None:
    """The client sees one good answer and nothing of the stall; the engine got the same bytes twice; one settlement, ok."""
    engine = Recovering(Wedged(early_head=early_head))
    r = await rig(await serve(engine), retry_stalled=30)
    asked = asyncio.create_task(r.client.post(r.url + "/v1/chat/completions", json={**CHAT, "stream": True}))
    await stall(r, engine)
    [on] = await r.facts.wait(RequestBlocked)
    r.relay.on_command(type(STALLED)("{}", "", "starting"))
    assert len(engine.bodies) == 1
    r.relay.on_command(WELL)
    got = await asked
    assert (got.status, await got.read()) == (200, b"".join(sse(TOKEN, b"[DONE]")))
    assert engine.bodies[0] == engine.bodies[1]
    _, settled = once(r.facts)
    assert settled.outcome == "ok"
    assert [fact.on for fact in r.facts.of(RequestBlocked)] == [True, False]
    assert settled.sent_at > on.at


@pytest.mark.parametrize("there", [True, False], ids=["there again", "gone"])
async def test_images_in_shared_memory_are_there_again(rig: Any, serve: Any, there: bool) -> None:
    """The engine that stalled has read and removed them: they are handed over anew, and where they cannot be, nothing is sent."""
    engine, workers = Recovering(Wedged(early_head=False)), Workers()
    workers.lies_again = there
    r = await rig(await serve(engine), images=workers, retry_stalled=30)
    asked = asyncio.create_task(r.client.post(r.url + "/v1/chat/completions", json=pictures("AAAA")))
    await stall(r, engine)
    await r.facts.wait(RequestBlocked)
    r.relay.on_command(WELL)
    assert (await asked).status == (200 if there else 503)
    assert len(engine.bodies) == (2 if there else 1)


async def test_it_is_sent_only_once_more(rig: Any, serve: Any) -> None:
    """A second stall ends it with the error."""
    engine = Recovering(Wedged(early_head=False), wedges=2)
    r = await rig(await serve(engine), retry_stalled=30)
    asked = asyncio.create_task(r.client.post(r.url + "/v1/chat/completions", json=CHAT))
    await stall(r, engine)
    r.relay.on_command(WELL)
    await soon(engine.wedged.silent)
    r.relay.on_command(STALLED)
    assert (await asked).status == 503
    assert once(r.facts)[1].outcome == "stalled"
    assert len(engine.bodies) == 2


async def test_the_wait_has_an_end(rig: Any, serve: Any) -> None:
    """Without recovery in time the client gets the error that it would have got at once."""
    engine = Recovering(Wedged(early_head=False))
    r = await rig(await serve(engine), retry_stalled=0.1)
    asked = asyncio.create_task(r.client.post(r.url + "/v1/chat/completions", json=CHAT))
    await stall(r, engine)
    got = await asked
    assert (got.status, (await got.json())["error"]["code"]) == (503, "engine_stalled")
    assert once(r.facts)[1].outcome == "stalled"


async def test_what_was_answered_is_not_sent_again(rig: Any, serve: Any) -> None:
    """A stream of which the client has an event ends by the error event at once."""
    engine = Recovering(Wedged(*sse(TOKEN)))
    r = await rig(await serve(engine), retry_stalled=30)
    got = await r.client.post(r.url + "/v1/chat/completions", json={**CHAT, "stream": True})
    await r.facts.wait(FirstToken)
    r.relay.on_command(STALLED)
    assert b'"engine_stalled"' in await got.read()
    assert once(r.facts)[1].outcome == "stalled"
    assert len(engine.bodies) == 1


async def test_what_leaves_something_behind_is_not_sent_again(rig: Any, serve: Any) -> None:
    """/v1/responses may be stored by the engine: it ends at once."""
    engine = Recovering(Wedged(early_head=False))
    r = await rig(await serve(engine), retry_stalled=30)
    asked = asyncio.create_task(r.client.post(r.url + "/v1/responses", json={"model": "m", "input": "x"}))
    await stall(r, engine)
    assert (await asked).status == 503
    assert not r.facts.of(RequestBlocked)


async def test_a_client_that_leaves_while_it_waits(rig: Any, serve: Any) -> None:
    """Its hang-up ends the wait: settled once, as cancelled, and nothing is sent when the engine is well again."""
    engine = Recovering(Wedged(early_head=False))
    r = await rig(await serve(engine), retry_stalled=30)
    asked = asyncio.create_task(r.client.post(r.url + "/v1/chat/completions", json=CHAT))
    await stall(r, engine)
    await r.facts.wait(RequestBlocked)
    asked.cancel()
    assert (await r.facts.settled()).outcome == "client_cancelled"
    r.relay.on_command(WELL)
    async with r.client.post(r.url + "/v1/chat/completions", json=CHAT) as got:
        assert got.status == 200
    assert len(engine.bodies) == 2


async def test_a_drain_does_not_wait_for_recovery(rig: Any, serve: Any) -> None:
    """When the pod goes, those who wait get the error at once, and the drain ends before its time."""
    engine = Recovering(Wedged(early_head=False))
    r = await rig(await serve(engine), retry_stalled=3000)
    asked = asyncio.create_task(r.client.post(r.url + "/v1/chat/completions", json=CHAT))
    await stall(r, engine)
    await r.facts.wait(RequestBlocked)
    async with asyncio.timeout(PATIENCE):
        await r.relay.drain(r.server, 600)
    assert (await asked).status == 503
    assert once(r.facts)[1].outcome == "stalled"


async def test_bodies_are_kept_within_a_bound(facts: Any) -> None:
    """Past the bound a body is dropped when it is sent; one whose answer begins, or whose request ends, makes room again."""
    desk = OpenRequests(facts)
    retries = Retries(desk, 30, limit=150)
    first, second, third = (BodyPayload([b"x" * 100], lambda: None) for _ in range(3))
    with desk.open("chat", "t", None) as one, desk.open("chat", "t", None) as other:
        with retries.keeping(one, first):
            with retries.keeping(other, second):
                assert (first.kept, second.kept) == (True, False)
            one.on_begun()
            with retries.keeping(other, third):
                assert (first.kept, third.kept) == (False, True)
        with retries.keeping(other, second):
            assert second.kept


async def test_nothing_is_kept_where_it_is_off(facts: Any) -> None:
    """Without --retry-stalled no body outlives its sending."""
    desk = OpenRequests(facts)
    data = BodyPayload([b"x"], lambda: None)
    with desk.open("chat", "t", None) as one, Retries(desk, 0).keeping(one, data):
        assert not data.kept
