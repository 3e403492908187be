"""Clients that leave: their engine connection closes, and the request settles as cancelled."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web

from sidecar.events import Admitted, FirstToken, Usage
from sidecar.tools.scripted_engine.server import EngineSettings, ScriptedEngine

from ..waiting import PATIENCE
from .pictures import Workers, pictures
from .work import CHAT, FAST, TOKEN, echo, once, sse

# --- clients that leave ---


async def leave(r: Any, body: Any, when: asyncio.Event) -> None:
    """Send a request, and hang up once `when` is set."""
    reader, writer = await asyncio.open_connection(r.host, r.port)
    text = json.dumps(body).encode()
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(text), text))
    async with asyncio.timeout(PATIENCE):
        await when.wait()
    writer.transport.abort()
    assert reader is not None


async def gone_engine(serve: Any, first: bytes | None) -> tuple[str, asyncio.Event, asyncio.Event]:
    """(URL, `has it`, `saw the client leave`) of an engine that answers `first` and then never ends."""
    has, left = asyncio.Event(), asyncio.Event()

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        try:
            response = web.StreamResponse(headers={"content-type": "text/event-stream"})
            if first is not None:
                await response.prepare(request)
                await response.write(first)
            has.set()
            await asyncio.Event().wait()
        finally:
            left.set()
        return response

    return await serve(engine), has, left


@pytest.mark.parametrize("first", [None, sse(TOKEN)[0]], ids=["before the first byte", "in the stream"])
async def test_the_engine_is_told_when_the_client_leaves(rig: Any, serve: Any, first: bytes | None) -> None:
    """A client that hangs up, before or after the first token, ends the engine's request and settles as cancelled."""
    url, has, left = await gone_engine(serve, first)
    r = await rig(url)
    await leave(r, {**CHAT, "stream": True}, has)
    async with asyncio.timeout(PATIENCE):
        await left.wait()
    await r.emitted.settled()
    _, settled = once(r.emitted)
    assert (settled.outcome, settled.error) == ("client_cancelled", "client_gone")


async def test_what_was_delivered_before_a_client_left_is_booked(rig: Any, serve: Any) -> None:
    """Of an Anthropic stream that is left in the middle, the prompt of its opening and the output so far."""
    usage = b'{"input_tokens":40,"output_tokens":0,"cache_read_input_tokens":60}'
    first = b'event: message_start\ndata: {"message":{"usage":%b}}\n\n' % usage
    delta = b'event: content_block_delta\ndata: {"delta":{"text":"x"}}\n\n'
    url, _, left = await gone_engine(serve, first + 7 * delta)
    r = await rig(url)
    async with r.client.post(r.url + "/v1/messages", json={**CHAT, "stream": True}) as got:
        seen = b""
        while seen.count(delta) < 7:
            seen += await got.content.readany()
        got.close()
    async with asyncio.timeout(PATIENCE):
        await left.wait()
    settled = await r.emitted.settled()
    assert (settled.outcome, settled.usage, settled.delivered_tokens) == ("client_cancelled", Usage(100, 7, 60), 7)


async def test_a_real_engine_frees_the_sequence(rig: Any) -> None:
    """The scripted engine's core, frozen in decode, sees its sequence aborted when the client hangs up."""
    async with ScriptedEngine(EngineSettings(**{**FAST, "decode_step_ms": 5.0})) as engine:
        r = await rig(engine.url)
        got = await r.client.post(r.url + "/v1/chat/completions", json={**CHAT, "stream": True, "max_tokens": 100_000})
        await r.emitted.wait(FirstToken)
        got.close()
        assert (await r.emitted.settled()).outcome == "client_cancelled"
        async with asyncio.timeout(PATIENCE):
            while True:
                async with r.client.get(engine.url + "/metrics") as page:
                    lines = (await page.text()).splitlines()
                if any(line.startswith("vllm:num_requests_running") and line.endswith(" 0.0") for line in lines):
                    break


async def test_a_client_that_leaves_during_image_work(rig: Any, serve: Any) -> None:
    """Image work of a client that left is cancelled, the engine never hears of it, and it settles as cancelled."""
    workers = Workers()
    r = await rig(await serve(echo), images=workers)
    await leave(r, pictures("HANG", "AAAA"), workers.started)
    async with asyncio.timeout(PATIENCE):
        await workers.cancelled.wait()
    await r.emitted.settled()
    admitted, settled = once(r.emitted)
    assert (settled.outcome, settled.sent_at, admitted.mu) == ("client_cancelled", None, 0.0)


async def test_a_client_that_leaves_in_its_upload(rig: Any, serve: Any) -> None:
    """A body that never becomes whole settles as cancelled and costs nothing."""
    r = await rig(await serve(echo))
    reader, writer = await asyncio.open_connection(r.host, r.port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\nexpect: 100-continue\r\n\r\n{")
    async with asyncio.timeout(PATIENCE):
        await reader.readuntil(b"\r\n\r\n")  # the relay reads
    writer.transport.abort()
    assert (await r.emitted.settled()).outcome == "client_cancelled"
    once(r.emitted)


async def test_learning_moves_the_estimate(rig: Any) -> None:
    """After answers that all had one length the next hold expects about that length instead of the start value."""
    async with ScriptedEngine(EngineSettings(**FAST)) as engine:
        r = await rig(engine.url)

        async def ask() -> int:
            async with r.client.post(
                r.url + "/v1/completions", json={"model": "scripted", "prompt": "Say something."}
            ) as got:
                return int((await got.json())["usage"]["completion_tokens"])

        lengths = await asyncio.gather(*(ask() for _ in range(40)))
        await ask()
    first, *_, last = [a.expected.output for a in r.emitted.of(Admitted)]
    assert len(set(lengths)) == 1
    assert abs(last - lengths[0]) < abs(first - lengths[0]) / 2
