"""Clients that do not read: reported, so that the engine is not blamed for them, and at last hung up on."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from sidecar.events import RequestBlocked

from ..waiting import PATIENCE
from .metered_apis import DONE
from .work import once

BIG = b"data: " + b"x" * 65536 + b"\n\n"


async def flood(request: web.BaseRequest) -> web.StreamResponse:
    """An engine whose stream never ends by itself."""
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    while True:
        await response.write(BIG)


async def test_a_client_that_does_not_read_is_reported_until_it_does(rig: Any, serve: Any) -> None:
    """A write that waits for its client over a second is reported as blocked, and then its end."""
    r = await rig(await serve(flood))
    got = await r.client.post(r.url + "/v1/completions", json={"stream": True, "prompt": ""})
    [on] = await r.emitted.wait(RequestBlocked)
    assert on.on
    while len(r.emitted.of(RequestBlocked)) < 2:
        await got.content.readany()
    off = r.emitted.of(RequestBlocked)[1]
    got.close()
    await r.emitted.settled()
    admitted, settled = once(r.emitted)
    assert (off.on, on.id, off.id) == (False, admitted.id, admitted.id)
    assert off.at >= on.at
    assert settled.outcome == "client_cancelled"


async def test_a_client_that_never_reads_is_hung_up_on(rig: Any, serve: Any) -> None:
    """After `client_stall` seconds without a read the request ends as cancelled, and its engine connection closes."""
    left = asyncio.Event()

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        try:
            return await flood(request)
        finally:
            left.set()

    r = await rig(await serve(engine), client_stall=1.2)
    got = await r.client.post(r.url + "/v1/completions", json={"stream": True, "prompt": ""})
    async with asyncio.timeout(PATIENCE):
        await left.wait()
    await r.emitted.settled()
    _, settled = once(r.emitted)
    assert (settled.outcome, settled.error) == ("client_cancelled", "client_stalled")
    assert [event.on for event in r.emitted.of(RequestBlocked)] == [True]
    got.close()


async def test_a_client_that_reads_is_never_reported(rig: Any, serve: Any) -> None:
    """A silent engine is not its client's fault: a stream that waits for the engine reports no block."""
    go_on = asyncio.Event()

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(BIG)
        async with asyncio.timeout(PATIENCE):
            await go_on.wait()
        await response.write(DONE)
        return response

    r = await rig(await serve(engine), client_stall=0.1)
    got = await r.client.post(r.url + "/v1/completions", json={"stream": True, "prompt": ""})
    reading = asyncio.create_task(got.read())
    await asyncio.wait((reading,), timeout=2.0)  # several looks of the relay
    go_on.set()
    assert await reading == BIG + DONE
    assert not r.emitted.of(RequestBlocked)
    assert once(r.emitted)[1].outcome == "ok"
