"""Engine work: what the client gets, what control receives, and that every admission settles once."""

from __future__ import annotations

import asyncio
import gzip
import json
from typing import Any

import pytest
from aiohttp import web

from sidecar.events import Admitted, Delivered, FirstToken, Usage
from sidecar.runtime import codec
from sidecar.tools.scripted_engine.server import EngineSettings, ScriptedEngine

from ..waiting import PATIENCE
from .work import CHAT, FAST, TOKEN, USAGE, echo, once, sse


async def test_a_stream_through_a_real_engine(rig: Any) -> None:
    """The client gets the stream without the added usage event; control gets admission, first token and usage."""
    async with ScriptedEngine(EngineSettings(**FAST)) as engine:
        r = await rig(engine.url)
        async with r.client.post(
            r.url + "/v1/chat/completions", json={**CHAT, "stream": True}, headers={"x-tenant-id": "t1"}
        ) as got:
            body = await got.read()
            assert got.status == 200
            assert float(got.headers["x-sidecar-mu"]) > 0
            assert float(got.headers["x-sidecar-overhead-ms"]) >= 0
        settled = await r.emitted.settled()
    assert body.endswith(b"data: [DONE]\n\n")
    assert b'"usage":{' not in body
    admitted, _ = once(r.emitted)
    assert (admitted.tenant, admitted.model, admitted.route, admitted.stream) == ("t1", "scripted", "chat", True)
    assert (admitted.max_output, admitted.expected.output) == (8, 8)
    assert (settled.outcome, settled.status, settled.delivered_tokens) == ("ok", 200, 8)
    assert settled.usage is not None
    assert settled.usage.completion_tokens == 8
    assert settled.sent_at <= settled.first_at <= settled.at
    assert len(r.emitted.of(FirstToken)) == 1


async def test_who_asks_for_usage_gets_it(rig: Any) -> None:
    """A client's own include_usage is honoured: the usage event stays in its stream."""
    async with ScriptedEngine(EngineSettings(**FAST)) as engine:
        r = await rig(engine.url)
        asked = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
        async with r.client.post(r.url + "/v1/chat/completions", json=asked) as got:
            assert b'"choices":[]' in (await got.read()).replace(b" ", b"")
        assert (await r.emitted.settled()).usage is not None


async def test_what_is_asked_for_is_added_to_the_bytes_that_came(rig: Any, serve: Any) -> None:
    """Repeated keys, forms of numbers and blanks reach the engine; options of the client keep theirs."""
    came: list[bytes] = []

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        came.append(await request.read())
        return web.Response(body=b"{}", content_type="application/json")

    r = await rig(await serve(engine))
    around = b'{"stream":true, "temperature":1e400,"seed":1,"seed":2.50,"stream_options":%b, "prompt":""}'
    for options, sent in ((b"null", b'{"include_usage":true}'), (b'{"include_usage":true}', b'{"include_usage":true}')):
        async with r.client.post(r.url + "/v1/completions", data=around % options) as got:
            await got.read()
        assert came.pop() == around % sent


async def test_a_plain_answer(rig: Any) -> None:
    """Without streaming the body is the engine's, and its usage settles the request."""
    async with ScriptedEngine(EngineSettings(**FAST)) as engine:
        r = await rig(engine.url)
        async with r.client.post(
            r.url + "/v1/completions", json={"model": "scripted", "prompt": "a b", "max_tokens": 4}
        ) as got:
            usage = (await got.json())["usage"]
        settled = await r.emitted.settled()
    assert settled.usage == Usage(usage["prompt_tokens"], 4)
    assert (settled.outcome, settled.delivered_tokens) == ("ok", 4)


async def test_a_prompt_costs_what_it_is_long_whatever_it_says(rig: Any) -> None:
    """Ten kilobytes that begin as a data URL does are held like any other ten kilobytes."""
    async with ScriptedEngine(EngineSettings(**FAST)) as engine:
        r = await rig(engine.url)
        for start in ("a long story", "data: a long story", "data:image/png;base64,"):
            ask = {"model": "scripted", "prompt": start.ljust(10_000, "A"), "max_tokens": 1}
            async with r.client.post(r.url + "/v1/completions", json=ask) as got:
                assert got.status == 200
        held = [admitted.expected.uncached for admitted in r.emitted.of(Admitted)]
    assert held == [held[0]] * 3 and held[0] > 2000


async def test_a_model_name_that_is_no_text_is_reported_all_the_same(rig: Any) -> None:
    """Half of a surrogate pair in the name is replaced: the request settles, and so does the next one."""
    async with ScriptedEngine(EngineSettings(**FAST)) as engine:
        r = await rig(engine.url)
        for model in ("\ud800", "scripted"):
            body = json.dumps({"model": model, "prompt": "x", "max_tokens": 1})
            async with r.client.post(r.url + "/v1/completions", data=body) as got:
                assert got.status in (200, 404)
        admitted = r.emitted.of(Admitted)
    assert [event.model for event in admitted] == ["?", "scripted"]
    assert all(codec.encode(event) for event in admitted)


async def test_nothing_of_ours_leaves_as_a_name_or_comes_back_as_an_image(rig: Any) -> None:
    """A model named by a data URL is reported by that name; a placeholder of another request is any text here."""
    async with ScriptedEngine(EngineSettings(**FAST)) as engine:
        r = await rig(engine.url)
        name = "data:image/png;base64,AAAA"
        async with r.client.post(r.url + "/v1/completions", json={"model": name, "prompt": "x"}) as got:
            assert got.status == 404
        [first] = r.emitted.of(Admitted)
        stolen = first.model.replace("-0.", "-7.")
        image = {"type": "image_url", "image_url": {"url": stolen}}
        ask = {**CHAT, "messages": [{"role": "user", "content": [image]}]}
        async with r.client.post(r.url + "/v1/chat/completions", json=ask) as got:
            assert got.status != 500
    assert first.model == name


@pytest.mark.parametrize("chunked", [False, True])
async def test_an_answer_in_one_piece_has_no_first_token(rig: Any, serve: Any, chunked: bool) -> None:
    """Its first bytes come with its last, however they are sent: they measure no prefill and no time per token."""
    body = b'{"choices":[{"text":"a"}],"usage":{"prompt_tokens":2,"completion_tokens":50}}'

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        if not chunked:
            return web.Response(body=body, content_type="application/json")
        response = web.StreamResponse(headers={"content-type": "application/json; charset=utf-8"})
        await response.prepare(request)
        for at in range(0, len(body), 20):
            await response.write(body[at : at + 20])
        return response

    r = await rig(await serve(engine))
    async with r.client.post(r.url + "/v1/completions", json={"prompt": "", "stream": chunked}) as got:
        assert await got.read() == body
    settled = await r.emitted.settled()
    assert (settled.outcome, settled.usage, settled.first_at) == ("ok", Usage(2, 50), None)
    assert settled.delivered_bytes == len(body)
    assert not r.emitted.of(FirstToken)


async def test_lines_of_json_are_a_stream(rig: Any, serve: Any) -> None:
    """An answer whose parts mean something by themselves has begun with its first one."""

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "application/x-ndjson"})
        await response.prepare(request)
        await response.write(b'{"message":{"content":"a"}}\n')
        await response.write(b'{"done":true}\n')
        return response

    r = await rig(await serve(engine))
    async with r.client.post(r.url + "/v1/chat/completions", json=CHAT) as got:
        assert (await got.read()).count(b"\n") == 2
    assert (await r.emitted.settled()).first_at is not None


async def test_the_first_event_is_not_held_back(rig: Any, serve: Any) -> None:
    """The client has the first event before the engine sends the second, while the usage event is being hidden."""
    has_first = asyncio.Event()

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        first, second, usage, done = sse(TOKEN, TOKEN, USAGE, b"[DONE]")
        await response.write(first)
        async with asyncio.timeout(PATIENCE):
            await has_first.wait()
        await response.write(second + usage + done)
        return response

    r = await rig(await serve(engine))
    async with r.client.post(r.url + "/v1/chat/completions", json={**CHAT, "stream": True}) as got:
        assert await got.content.readany() == sse(TOKEN)[0]
        assert len(await r.emitted.wait(FirstToken)) == 1
        has_first.set()
        assert await got.read() == b"".join(sse(TOKEN, b"[DONE]"))


async def test_delivered_is_summed_and_paced(rig: Any, serve: Any) -> None:
    """Deliveries are reported in sums while the stream runs, and the sums never exceed what settles."""
    reported = asyncio.Event()

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for event in sse(*[TOKEN] * 50):
            await response.write(event)
        async with asyncio.timeout(PATIENCE):
            await reported.wait()
        return response

    r = await rig(await serve(engine))
    async with r.client.post(r.url + "/v1/completions", json={"stream": True, "prompt": ""}) as got:
        await r.emitted.wait(Delivered)
        reported.set()
        await got.read()
    settled = await r.emitted.settled()
    assert len(r.emitted.of(Delivered)) <= 5
    assert settled.delivered_tokens == 50
    assert sum(d.tokens for d in r.emitted.of(Delivered)) <= 50


async def test_an_encoded_stream_passes_and_shows_progress(rig: Any, serve: Any) -> None:
    """Events in a coding that is not known cannot be separated: they pass, and each chunk counts as one."""
    packed = b"\x0b\x02\x80" + b"".join(sse(TOKEN, USAGE))

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream", "content-encoding": "br"})
        await response.prepare(request)
        await response.write(packed)
        return response

    r = await rig(await serve(engine))
    async with r.client.post(r.url + "/v1/completions", json={"stream": True, "prompt": ""}) as got:
        assert await got.read() == packed
    settled = await r.emitted.settled()
    assert (settled.outcome, settled.usage, settled.delivered_bytes) == ("ok", None, len(packed))
    assert settled.delivered_tokens >= 1


async def test_a_slow_client_holds_the_engine_back(rig: Any, serve: Any) -> None:
    """A client that does not read stops the engine's writing: neither side's bytes pile up in the relay."""
    written = 0
    blocked = asyncio.Event()

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        nonlocal written
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        event = b"data: " + b"x" * 65536 + b"\n\n"
        while written < 512 << 20:
            try:
                async with asyncio.timeout(0.5):
                    await response.write(event)
            except TimeoutError:
                blocked.set()
                await asyncio.Event().wait()
            written += len(event)
        return response

    r = await rig(await serve(engine))
    got = await r.client.post(r.url + "/v1/completions", json={"stream": True, "prompt": ""})
    async with asyncio.timeout(PATIENCE):
        await blocked.wait()
    assert written < 64 << 20
    got.close()
    assert (await r.emitted.settled()).outcome == "client_cancelled"


async def test_pings_are_no_progress(rig: Any, serve: Any) -> None:
    """Comments from a wedged engine are passed on and reported neither as first token nor as delivery."""

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b": ping\n\n: ping\n\n")
        return response

    r = await rig(await serve(engine))
    async with r.client.post(r.url + "/v1/completions", json={"stream": True, "prompt": ""}) as got:
        assert await got.read() == b": ping\n\n: ping\n\n"
    settled = await r.emitted.settled()
    assert (settled.first_at, settled.delivered_tokens) == (None, 0)
    assert not r.emitted.of(FirstToken)
    assert not r.emitted.of(Delivered)


async def test_an_admission_tells_what_the_body_says_of_its_turn(rig: Any, serve: Any) -> None:
    """Priority, what may be overtaken and what may be withheld; one in a coding that is not read may be all of it."""
    r = await rig(await serve(echo))
    tools = [{"type": "function", "function": {"name": "f"}}]
    for body in ({"priority": -7}, {"response_format": {"type": "json_object"}}, {"tools": tools}):
        async with r.client.post(r.url + "/v1/chat/completions", json={**CHAT, **body}) as got:
            await got.read()
    for packed, coding in ((gzip.compress(b'{"priority":3}', mtime=0), "gzip"), (b"\x0b\x01\x80{}\x03", "br")):
        encoded = {"content-encoding": coding}
        async with r.client.post(r.url + "/v1/chat/completions", data=packed, headers=encoded) as got:
            await got.read()
    reported = [(event.priority, event.reorders, event.withholds) for event in r.emitted.of(Admitted)]
    assert reported == [(-7, False, False), (0, True, False), (0, False, True), (3, False, False), (0, True, True)]
