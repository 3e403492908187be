"""Engine work: what the client gets, what control is told, and that every admission settles once."""

from __future__ import annotations

import asyncio
import gzip
import json
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from sidecar.engine.scripted import EngineSettings, ScriptedEngine
from sidecar.errors import BadImage, ImagesBusy
from sidecar.facts import Admitted, Delivered, FirstToken, Imaged, Page, PageWanted, Published, Settled, Usage

CHAT = {"model": "scripted", "messages": [{"role": "user", "content": "Say something."}], "max_tokens": 8}
FAST = {"listen": ("127.0.0.1", 0), "prefill_tokens_per_second": 1e7, "decode_step_ms": 1.0}


def sse(*events: Any) -> list[bytes]:
    return [b"data: " + (e if isinstance(e, bytes) else json.dumps(e).encode()) + b"\n\n" for e in events]


TOKEN = {"choices": [{"index": 0, "delta": {"content": "x"}}]}
USAGE = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2}}


def once(facts: Any) -> tuple[Admitted, Settled]:
    """The only admission and the only settlement, of one id, in this order."""
    [admitted], [settled] = facts.of(Admitted), facts.of(Settled)
    assert admitted.id == settled.id
    assert facts.all.index(admitted) < facts.all.index(settled)
    return admitted, settled


async def test_a_stream_through_a_real_engine(rig: Any) -> None:
    """The client sees the stream without our usage event; control sees admission, first token, and the engine's usage."""
    async with ScriptedEngine(EngineSettings(**FAST)) as engine:
        r = await rig(engine.url)
        async with r.client.post(
            r.url + "/v1/chat/completions", json={**CHAT, "stream": True}, headers={"x-tenant-id": "t1"}
        ) as got:
            body = await got.read()
            assert got.status == 200
            assert float(got.headers["x-sidecar-mu"]) > 0
            assert float(got.headers["x-sidecar-overhead-ms"]) >= 0
        settled = await r.facts.settled()
    assert body.endswith(b"data: [DONE]\n\n")
    assert b'"usage":{' not in body
    admitted, _ = once(r.facts)
    assert (admitted.tenant, admitted.model, admitted.route, admitted.stream) == ("t1", "scripted", "chat", True)
    assert (admitted.max_output, admitted.expected.output) == (8, 8)
    assert (settled.outcome, settled.status, settled.delivered_tokens) == ("ok", 200, 8)
    assert settled.usage is not None
    assert settled.usage.completion_tokens == 8
    assert settled.sent_at <= settled.first_at <= settled.at
    assert len(r.facts.of(FirstToken)) == 1


async def test_who_asks_for_usage_gets_it(rig: Any) -> None:
    """A client's own include_usage is honoured: the usage event stays in its stream."""
    async with ScriptedEngine(EngineSettings(**FAST)) as engine:
        r = await rig(engine.url)
        asked = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
        async with r.client.post(r.url + "/v1/chat/completions", json=asked) as got:
            assert b'"choices":[]' in (await got.read()).replace(b" ", b"")
        assert (await r.facts.settled()).usage is not None


async def test_a_plain_answer(rig: Any) -> None:
    """Without streaming the body is the engine's, and its usage settles the request."""
    async with ScriptedEngine(EngineSettings(**FAST)) as engine:
        r = await rig(engine.url)
        async with r.client.post(
            r.url + "/v1/completions", json={"model": "scripted", "prompt": "a b", "max_tokens": 4}
        ) as got:
            usage = (await got.json())["usage"]
        settled = await r.facts.settled()
    assert settled.usage == Usage(usage["prompt_tokens"], 4)
    assert (settled.outcome, settled.delivered_tokens) == ("ok", 4)


async def test_the_first_event_is_not_held_back(rig: Any, serve: Any) -> None:
    """The client has the first event before the engine sends the second, while the usage event is being hidden."""
    has_first = asyncio.Event()

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        first, second, usage, done = sse(TOKEN, TOKEN, USAGE, b"[DONE]")
        await response.write(first)
        async with asyncio.timeout(10):
            await has_first.wait()
        await response.write(second + usage + done)
        return response

    r = await rig(await serve(engine))
    async with r.client.post(r.url + "/v1/chat/completions", json={**CHAT, "stream": True}) as got:
        assert await got.content.readany() == sse(TOKEN)[0]
        assert len(await r.facts.wait(FirstToken)) == 1
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
        async with asyncio.timeout(10):
            await reported.wait()
        return response

    r = await rig(await serve(engine))
    async with r.client.post(r.url + "/v1/completions", json={"stream": True, "prompt": ""}) as got:
        await r.facts.wait(Delivered)
        reported.set()
        await got.read()
    settled = await r.facts.settled()
    assert len(r.facts.of(Delivered)) <= 5
    assert settled.delivered_tokens == 50
    assert sum(d.tokens for d in r.facts.of(Delivered)) <= 50


async def test_an_encoded_stream_passes_and_shows_progress(rig: Any, serve: Any) -> None:
    """Events that are compressed cannot be told apart: they pass untouched, and each chunk counts as one."""
    packed = gzip.compress(b"".join(sse(TOKEN, USAGE)), mtime=0)

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream", "content-encoding": "gzip"})
        await response.prepare(request)
        await response.write(packed)
        return response

    r = await rig(await serve(engine))
    async with r.client.post(r.url + "/v1/completions", json={"stream": True, "prompt": ""}) as got:
        assert await got.read() == packed
    settled = await r.facts.settled()
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
    async with asyncio.timeout(30):
        await blocked.wait()
    assert written < 64 << 20
    got.close()
    assert (await r.facts.settled()).outcome == "client_cancelled"


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
    settled = await r.facts.settled()
    assert (settled.first_at, settled.delivered_tokens) == (None, 0)
    assert not r.facts.of(FirstToken)
    assert not r.facts.of(Delivered)


@pytest.mark.parametrize(
    ("status", "outcome"),
    [(400, "rejected"), (404, "rejected"), (429, "rejected"), (500, "engine_error"), (503, "engine_error")],
)
async def test_the_engines_errors_are_the_clients(rig: Any, serve: Any, status: int, outcome: str) -> None:
    """Status and body of the engine's error arrive unchanged, and settle as whose fault they are."""

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        return web.json_response({"error": {"message": "no"}}, status=status, headers={"retry-after": "3"})

    r = await rig(await serve(engine))
    async with r.client.post(r.url + "/v1/chat/completions", json=CHAT) as got:
        assert (got.status, await got.json(), got.headers["retry-after"]) == (status, {"error": {"message": "no"}}, "3")
    _, settled = once(r.facts)
    assert (settled.outcome, settled.status, settled.error) == (outcome, status, f"status_{status}")


async def test_invalid_json_is_the_engines_to_refuse(rig: Any, serve: Any) -> None:
    """The engine gets the very bytes, and its answer goes back."""

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(status=400, body=await request.read())

    r = await rig(await serve(engine))
    async with r.client.post(r.url + "/v1/chat/completions", data=b'{"model": oops') as got:
        assert (got.status, await got.read()) == (400, b'{"model": oops')
    assert once(r.facts)[1].outcome == "rejected"


async def test_a_body_without_changes_arrives_byte_for_byte(rig: Any, serve: Any) -> None:
    """Odd spacing, number forms, duplicate keys and images survive where nothing has to change."""
    body = b'{ "model":"m" ,"temperature":1e0,"a":1,"a":2,"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"data:image/png;base64,AA"}}]}]}\n'

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(body=await request.read())

    r = await rig(await serve(engine))
    async with r.client.post(r.url + "/v1/chat/completions", data=body) as got:
        assert await got.read() == body


@pytest.mark.parametrize("announced", [True, False])
async def test_too_large_a_body_is_refused(rig: Any, serve: Any, announced: bool) -> None:
    """A body over the bound is a 413 in OpenAI's form, announced or not, and reaches no engine."""
    seen: list[str] = []

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        seen.append(request.path)
        return web.Response()

    async def upload() -> Any:
        for _ in range(20):
            yield b"a" * 100

    r = await rig(await serve(engine), max_body_bytes=1000)
    async with r.client.post(r.url + "/v1/completions", data=b"a" * 1001 if announced else upload()) as got:
        assert got.status == 413
        assert (await got.json())["error"]["code"] == "body_too_large"
    assert once(r.facts)[1].outcome == "rejected"
    assert not seen


async def test_a_refused_connection(rig: Any, unused_tcp_port: int) -> None:
    """Without an engine the client gets a 502 that says what to think of it, with Retry-After and without an address."""
    r = await rig(f"http://127.0.0.1:{unused_tcp_port}")
    async with r.client.post(r.url + "/v1/chat/completions", json=CHAT) as got:
        text = await got.text()
        assert (got.status, got.headers["retry-after"]) == (502, "2")
        assert json.loads(text)["error"]["code"] == "engine_unreachable"
        assert "127.0.0.1" not in text
    _, settled = once(r.facts)
    assert (settled.outcome, settled.status, settled.sent_at, settled.error) == (
        "engine_error",
        0,
        None,
        "engine_unreachable",
    )


@pytest.mark.parametrize(
    ("verdict", "status", "outcome"), [("progressing", 502, "engine_error"), ("stalled", 503, "stalled")]
)
async def test_an_engine_that_hangs_up_without_an_answer(
    rig: Any, serve_raw: Any, verdict: Any, status: int, outcome: str
) -> None:
    """What was sent and never answered is an engine error, or `stalled` when that was the verdict as it broke."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.close()

    r = await rig(await serve_raw(talk))
    r.relay.obey(Published("JSON {}", "TEXT a=1", verdict))
    async with r.client.post(r.url + "/v1/chat/completions", json=CHAT) as got:
        assert got.status == status
    assert once(r.facts)[1].outcome == outcome


@pytest.mark.parametrize(
    "head", [b"content-type: text/event-stream\r\ntransfer-encoding: chunked\r\n", b"content-length: 999999\r\n"]
)
async def test_an_engine_that_dies_in_the_middle(rig: Any, serve_raw: Any, head: bytes) -> None:
    """The client cannot take the part it got for the whole, and the request settles as engine_error with its deliveries."""
    event = sse(TOKEN)[0]

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(
            b"HTTP/1.1 200 OK\r\n"
            + head
            + b"\r\n"
            + (b"%x\r\n%s\r\n" % (len(event), event) if b"chunked" in head else event)
        )
        await writer.drain()
        writer.close()

    r = await rig(await serve_raw(talk))
    async with r.client.post(r.url + "/v1/completions", json={"stream": True, "prompt": "x"}) as got:
        assert got.status == 200
        with pytest.raises(aiohttp.ClientPayloadError):
            await got.read()
    _, settled = once(r.facts)
    assert (settled.outcome, settled.status, settled.error, settled.delivered_bytes) == (
        "engine_error",
        200,
        "engine_broke",
        len(event),
    )


async def test_a_short_answer_that_breaks_is_an_error_one_can_read(rig: Any, serve_raw: Any) -> None:
    """A short body that ends early was not yet passed on, so the client gets a 502 instead of a broken body."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\npart")
        writer.close()

    r = await rig(await serve_raw(talk))
    async with r.client.post(r.url + "/v1/completions", json={"prompt": "x"}) as got:
        assert got.status == 502
    assert once(r.facts)[1].outcome == "engine_error"


# --- headers of ours ---


async def test_request_ids(rig: Any, serve: Any) -> None:
    """A sound id of the client is kept, an unsound one replaced, a missing one made; the engine gets the same."""

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(text=request.headers["x-request-id"])

    r = await rig(await serve(engine))
    for given, kept in (("abc-1", True), ("a" * 129, False), ("a b", False), (None, False)):
        for path in ("/v1/completions", "/other"):
            async with r.client.post(r.url + path, data=b"{}", headers={"x-request-id": given} if given else {}) as got:
                assert await got.text() == got.headers["x-request-id"]
                assert (got.headers["x-request-id"] == given) is kept


async def test_load_reports(rig: Any, serve: Any) -> None:
    """The load report comes in the form that is asked for, replaces the engine's own, and is the engine's before we have one."""

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(headers={"endpoint-load-metrics": "engine's"})

    r = await rig(await serve(engine))

    async def ask(form: str) -> str:
        headers = {"endpoint-load-metrics-format": form} if form else {}
        async with r.client.post(r.url + "/v1/completions", data=b"{}", headers=headers) as got:
            return str(got.headers["endpoint-load-metrics"])

    assert await ask("JSON") == "engine's"
    r.relay.obey(Published('JSON {"a": 1}', "TEXT a=1", "idle"))
    assert [await ask(form) for form in ("json", "TEXT", "", "BIN")] == [
        'JSON {"a": 1}',
        "TEXT a=1",
        "engine's",
        "engine's",
    ]


async def test_tracing_makes_our_span_the_parent(rig: Any, serve: Any) -> None:
    """With tracing on the engine's parent is the span that control is told of, in the client's trace, state untouched."""

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        return web.json_response([request.headers.get("traceparent"), request.headers.get("tracestate")])

    r = await rig(await serve(engine), otlp_endpoint="http://127.0.0.1:1")
    given = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate": "a=b"}
    async with r.client.post(r.url + "/v1/completions", data=b"{}", headers=given) as got:
        parent, state = await got.json()
    trace = once(r.facts)[0].trace
    assert trace is not None
    assert parent == f"00-0af7651916cd43dd8448eb211c80319c-{trace.span_id}-01"
    assert (trace.parent_id, trace.sampled, state) == ("b7ad6b7169203331", True, "a=b")


# --- metrics ---


async def test_the_merged_page_is_asked_for_once(rig: Any, serve: Any) -> None:
    """Many scrapes at once cost one question to control, all get its page, and the engine none."""

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        raise AssertionError("the engine was scraped")

    r = await rig(await serve(engine))

    async def scrape() -> str:
        async with r.client.get(r.url + "/metrics?x=1") as got:
            assert got.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
            return str(await got.text())

    scrapes = [asyncio.create_task(scrape()) for _ in range(5)]
    await r.facts.wait(PageWanted)
    r.relay.obey(Page(0.0, "a 1\n"))
    assert await asyncio.gather(*scrapes) == ["a 1\n"] * 5
    assert await scrape() == "a 1\n"
    assert len(r.facts.of(PageWanted)) == 1


async def test_without_control_the_engines_page_passes(rig: Any, serve: Any) -> None:
    """A control process that does not answer costs a bounded wait, not the engine's metrics."""

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(text="engine 1\n")

    r = await rig(await serve(engine))
    async with r.client.get(r.url + "/metrics") as got:
        assert await got.text() == "engine 1\n"


# --- images ---


class Prepared:
    """What image work returns, for a test."""

    media_type, tokens, content_hash, format, outcome, seconds = "image/bmp", 77, "h0", "png", "ok", 0.5
    stages, bytes_in, bytes_out = (("decode", 0.1),), 3, 9

    def __init__(self, base64: bytes | None) -> None:
        self.base64 = base64


class Workers:
    """Image workers of a test: answers what the base64 text says."""

    def __init__(self) -> None:
        self.running = 0
        self.started = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def inline(self, data: memoryview, where: str) -> Prepared:
        match bytes(data):
            case b"BAD/":
                raise BadImage(f"{where} is no image", "image_unknown_format")
            case b"BUSY":
                raise ImagesBusy("all image workers are busy")
            case b"HANG":
                self.started.set()
                try:
                    await asyncio.Event().wait()
                finally:
                    self.cancelled.set()
            case b"PASS":
                return Prepared(None)
        return Prepared(b"Qk0=")


def pictures(*base64: str, **more: Any) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{b}"}, **more} for b in base64]
    return {"model": "m", "messages": [{"role": "user", "content": parts}]}


async def echo(request: web.BaseRequest) -> web.StreamResponse:
    return web.Response(body=await request.read())


async def test_images_are_replaced(rig: Any, serve: Any) -> None:
    """A prepared image takes the original's place with a uuid; a passed one stays; each is reported; tokens count."""
    r = await rig(await serve(echo), images=Workers())
    async with r.client.post(r.url + "/v1/chat/completions", json=pictures("AAAA", "PASS")) as got:
        first, second = (await got.json(content_type=None))["messages"][0]["content"]
    assert len(first.pop("uuid")) == 32
    assert first == {"type": "image_url", "image_url": {"url": "data:image/bmp;base64,Qk0="}}
    assert second == pictures("PASS")["messages"][0]["content"][0]
    admitted, _ = once(r.facts)
    assert [i.outcome for i in r.facts.of(Imaged)] == ["ok", "ok"]
    assert {i.id for i in r.facts.of(Imaged)} == {admitted.id}
    assert (admitted.expected.images, admitted.expected.image_tokens) == (2, 154)


async def test_the_name_of_an_image_is_one_tenants_and_cannot_be_computed(rig: Any, serve: Any) -> None:
    """The same image keeps its name for a tenant; another tenant's differs; neither is the hash that a client could make."""
    r = await rig(await serve(echo), images=Workers())

    async def name(tenant: str) -> str:
        headers = {"x-tenant-id": tenant}
        async with r.client.post(r.url + "/v1/chat/completions", json=pictures("AAAA"), headers=headers) as got:
            return str((await got.json(content_type=None))["messages"][0]["content"][0]["uuid"])

    first, again, other = await name("acme"), await name("acme"), await name("umbrella")
    assert first == again != other
    assert "h0" not in (first, other)


async def test_a_uuid_of_the_client_is_kept_and_other_engines_get_none(rig: Any, serve: Any) -> None:
    """A name is set for vLLM only, and only where the part has no uuid."""
    for kind, given, uuid in (("vllm", {"uuid": "mine"}, "mine"), ("sglang", {}, None)):
        r = await rig(await serve(echo), images=Workers(), kind=kind)
        async with r.client.post(r.url + "/v1/chat/completions", json=pictures("AAAA", **given)) as got:
            assert (await got.json(content_type=None))["messages"][0]["content"][0].get("uuid") == uuid


@pytest.mark.parametrize(
    ("base64", "status", "code", "imaged"),
    [
        (["AAAA", "BAD/"], 400, "image_unknown_format", "rejected"),
        (["BAD/", "BAD/", "HANG"], 400, "image_unknown_format", "rejected"),
        (["BUSY"], 503, "images_busy", "failed"),
        (["AAAA"] * 5, 400, "image_count", None),
    ],
)
async def test_images_that_cannot_be_taken(
    rig: Any, serve: Any, base64: list[str], status: int, code: str, imaged: str | None
) -> None:
    """A bad image, busy workers or too many images end the request in OpenAI's form before the engine sees it."""
    r = await rig(await serve(echo), images=Workers(), image_max_count=4)
    async with r.client.post(r.url + "/v1/chat/completions", json=pictures(*base64)) as got:
        assert (got.status, (await got.json())["error"]["code"]) == (status, code)
    admitted, settled = once(r.facts)
    assert (settled.outcome, settled.error, settled.sent_at, admitted.mu) == ("rejected", code, None, 0.0)
    assert admitted.model == "m"
    if imaged:
        assert imaged in {i.outcome for i in r.facts.of(Imaged)}


async def test_preprocess_says_how_to_switch_it_on(rig: Any, serve: Any) -> None:
    """Where images are off, /v1/preprocess is a 404 in OpenAI's form that names the flag; where they are on, it is served."""
    r = await rig(await serve(echo))
    async with r.client.post(r.url + "/v1/preprocess", data=b"x") as got:
        assert got.status == 404
        assert "--images" in (await got.json())["error"]["message"]

    async def served(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(body=await request.read())

    r = await rig(await serve(echo), preprocess=served)
    async with r.client.post(r.url + "/v1/preprocess", data=b"x") as got:
        assert await got.read() == b"x"


# --- clients that leave ---


async def leave(r: Any, body: Any, when: asyncio.Event) -> None:
    """Send a request, and hang up once `when` is set."""
    reader, writer = await asyncio.open_connection(r.host, r.port)
    text = json.dumps(body).encode()
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(text), text))
    async with asyncio.timeout(10):
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
    """A client that hangs up, before or after the first token, ends the engine's request within 2 s and settles as cancelled."""
    url, has, left = await gone_engine(serve, first)
    r = await rig(url)
    await leave(r, {**CHAT, "stream": True}, has)
    async with asyncio.timeout(2):
        await left.wait()
    await r.facts.settled()
    _, settled = once(r.facts)
    assert (settled.outcome, settled.error) == ("client_cancelled", "client_gone")


async def test_a_real_engine_frees_the_sequence(rig: Any) -> None:
    """The scripted engine's core, frozen in decode, sees its sequence aborted when the client hangs up."""
    async with ScriptedEngine(EngineSettings(**{**FAST, "decode_step_ms": 5.0})) as engine:
        r = await rig(engine.url)
        got = await r.client.post(r.url + "/v1/chat/completions", json={**CHAT, "stream": True, "max_tokens": 100_000})
        await r.facts.wait(FirstToken)
        got.close()
        assert (await r.facts.settled()).outcome == "client_cancelled"
        async with asyncio.timeout(2):
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
    async with asyncio.timeout(2):
        await workers.cancelled.wait()
    await r.facts.settled()
    admitted, settled = once(r.facts)
    assert (settled.outcome, settled.sent_at, admitted.mu) == ("client_cancelled", None, 0.0)


async def test_a_client_that_leaves_in_its_upload(rig: Any, serve: Any) -> None:
    """A body that never becomes whole settles as cancelled and costs nothing."""
    r = await rig(await serve(echo))
    reader, writer = await asyncio.open_connection(r.host, r.port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\nexpect: 100-continue\r\n\r\n{")
    async with asyncio.timeout(10):
        await reader.readuntil(b"\r\n\r\n")  # the relay reads
    writer.transport.abort()
    assert (await r.facts.settled()).outcome == "client_cancelled"
    once(r.facts)


async def test_learning_moves_the_estimate(rig: Any) -> None:
    """After answers of known length the next hold expects about that length instead of the start value."""
    async with ScriptedEngine(EngineSettings(**FAST)) as engine:
        r = await rig(engine.url)
        for _ in range(40):
            async with r.client.post(
                r.url + "/v1/completions", json={"model": "scripted", "prompt": "a", "max_tokens": 2}
            ) as got:
                await got.read()
        async with r.client.post(r.url + "/v1/completions", json={"model": "scripted", "prompt": "a"}) as got:
            await got.read()
    outputs = [a.expected.output for a in r.facts.of(Admitted)]
    assert outputs[0] == 2
    assert outputs[-1] < 64
