"""--max-concurrent: above the limit minus the canary's slot, work waits in the relay, first come, first served."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web

from sidecar.events import Admitted, RequestBlocked, Settled
from sidecar.relay.concurrency import share_of

from ..waiting import PATIENCE
from .test_relief import STALLED
from .work import CHAT


class Gate:
    """An engine that counts what it has at once and lets one request end for each `release`."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.now = 0
        self.most = 0
        self._go = asyncio.Semaphore(0)
        self._came = asyncio.Condition()

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        body = json.loads(await request.read())
        self.now += 1
        self.most = max(self.most, self.now)
        async with self._came:
            self.order.append(body["user"])
            self._came.notify_all()
        try:
            await self._go.acquire()
        finally:
            self.now -= 1
        return web.json_response({"usage": {"prompt_tokens": 1, "completion_tokens": 1}})

    async def has(self, count: int) -> None:
        async with asyncio.timeout(PATIENCE), self._came:
            await self._came.wait_for(lambda: len(self.order) >= count)

    def release(self, count: int = 1) -> None:
        for _ in range(count):
            self._go.release()


async def ask(r: Any, name: str) -> Any:
    """One request, whose admission has been reported when this returns."""
    before = len(r.emitted.of(Admitted))
    task = asyncio.create_task(r.client.post(r.url + "/v1/chat/completions", json={**CHAT, "user": name}))
    await r.emitted.wait(Admitted, before + 1)
    return task


async def test_one_place_stays_free_and_the_rest_wait_in_turn(rig: Any, serve: Any) -> None:
    """With a limit of 3 the engine has at most 2 requests; the others follow in order of arrival, and all settle."""
    engine = Gate()
    r = await rig(await serve(engine), max_concurrent=3)
    asked = [await ask(r, name) for name in "abcde"]
    await engine.has(2)
    for count in (3, 4, 5):
        engine.release()
        await engine.has(count)
    engine.release(2)
    assert [(await task).status for task in asked] == [200] * 5
    assert (engine.order, engine.most) == (list("abcde"), 2)
    assert [s.outcome for s in await r.emitted.wait(Settled, 5)] == ["ok"] * 5


async def test_a_queued_request_is_not_the_engines(rig: Any, serve: Any) -> None:
    """A queued request is admitted (it is load) and marked as blocked until it is sent; its wait is no overhead."""
    engine = Gate()
    r = await rig(await serve(engine), max_concurrent=2)
    first, second = await ask(r, "a"), await ask(r, "b")
    [on] = await r.emitted.wait(RequestBlocked)
    await engine.has(1)
    engine.release(2)
    await first
    got = await second
    on, off = await r.emitted.wait(RequestBlocked, 2)
    ids = [event.id for event in r.emitted.of(Admitted)]
    assert ((on.id, on.on), (off.id, off.on)) == ((ids[1], True), (ids[1], False))
    settled = {s.id: s for s in await r.emitted.wait(Settled, 2)}[ids[1]]
    assert settled.sent_at >= off.at
    assert settled.overhead < off.at - on.at + 0.5
    assert float(got.headers["x-sidecar-overhead-ms"]) >= 0


async def test_a_full_queue_refuses(rig: Any, serve: Any) -> None:
    """Past `max_queued` the client gets 429 with Retry-After, settled as rejected, and the queue is unaffected."""
    engine = Gate()
    r = await rig(await serve(engine), max_concurrent=2, max_queued=1)
    asked = [await ask(r, "a"), await ask(r, "b")]
    await r.emitted.wait(RequestBlocked)
    got = await (await ask(r, "c"))
    assert (got.status, got.headers["retry-after"]) == (429, "1")
    assert (await got.json())["error"]["code"] == "queue_full"
    assert (await r.emitted.wait(Settled))[0].outcome == "rejected"
    engine.release(2)
    assert [(await task).status for task in asked] == [200, 200]


async def test_who_leaves_the_queue_gives_its_turn_on(rig: Any, serve: Any) -> None:
    """A client that hangs up in the queue settles as cancelled without reaching the engine; the next one moves up."""
    engine = Gate()
    r = await rig(await serve(engine), max_concurrent=2)
    first, second, third = [await ask(r, name) for name in "abc"]
    await r.emitted.wait(RequestBlocked, 2)
    second.cancel()
    [settled] = await r.emitted.wait(Settled)
    assert (settled.outcome, settled.sent_at) == ("client_cancelled", None)
    engine.release(2)
    assert [(await first).status, (await third).status] == [200, 200]
    assert engine.order == ["a", "c"]


async def test_a_stall_empties_the_queue_too(rig: Any, serve: Any) -> None:
    """When the engine stalls, queued requests get the same error as those it had, and the slots are free again."""
    engine = Gate()
    r = await rig(await serve(engine), max_concurrent=2)
    asked = [await ask(r, name) for name in "ab"]
    await r.emitted.wait(RequestBlocked)
    await engine.has(1)
    r.relay.on_command(STALLED)
    assert [(await task).status for task in asked] == [503, 503]
    r.relay.on_command(type(STALLED)("{}", "", "idle"))
    engine.release(2)
    assert (await (await ask(r, "c"))).status == 200
    assert engine.order == ["a", "c"]


async def test_the_place_is_free_when_the_answer_ends(rig: Any, serve: Any) -> None:
    """A client that hangs up on its answer frees its place in the relay for the next."""
    engine = Gate()
    r = await rig(await serve(engine), max_concurrent=2)
    first = await ask(r, "a")
    await engine.has(1)
    second = await ask(r, "b")
    first.cancel()
    await engine.has(2)
    engine.release(2)
    assert (await second).status == 200


@pytest.mark.parametrize(
    ("limit", "workers", "shares"),
    [(0, 2, [0, 0]), (1, 1, [1]), (2, 1, [1]), (9, 2, [4, 4]), (10, 2, [5, 4]), (2, 3, [1, 1, 1])],
)
def test_the_share_of_a_relay(limit: int, workers: int, shares: list[int]) -> None:
    """Relay processes split the places less the canary's; each has at least one, and without a limit there is none."""
    assert [share_of(limit, workers, index) for index in range(workers)] == shares
