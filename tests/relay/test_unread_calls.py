"""Work that is not read: control learns when such a call is with the engine, that its answer flows, and of its end."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from sidecar.events import Admitted, Delivered, FirstToken, RequestBlocked, UnreadRequest
from sidecar.relay import open_requests
from sidecar.relay.engine_io import MAX_REPEATED_BYTES
from sidecar.relay.unread_call import UnreadCall
from sidecar.report.metrics import Metrics

from ..waiting import PATIENCE
from .test_relief import soon
from .work import TOKEN, sse


def marks(r: Any) -> list[tuple[bool, int]]:
    return [(event.on, event.status) for event in r.emitted.of(UnreadRequest)]


class HeldEngine:
    """An engine that answers when the test lets it."""

    def __init__(self, status: int = 200) -> None:
        self.status = status
        self.called, self.answer, self.left = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        self.called.set()
        try:
            await soon(self.answer)
        except asyncio.CancelledError:
            self.left.set()
            raise
        return web.json_response({"data": [{"b64_json": "AAAA"}]}, status=self.status)


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH"])
async def test_work_of_an_unknown_route_is_seen_open_and_over(rig: Any, serve: Any, method: str) -> None:
    """Video generation is reported as soon as the engine has it, and with the engine's status when it ended."""
    engine = HeldEngine()
    r = await rig(await serve(engine))
    asked = asyncio.create_task(r.client.request(method, r.url + "/v1/videos", json={"prompt": "a cat"}))
    await soon(engine.called)
    assert marks(r) == [(True, 0)]
    engine.answer.set()
    async with await asked as got:
        assert got.status == 200
        await got.read()
    begun, over = await r.emitted.wait(UnreadRequest, 2)
    assert (over.id, over.on, over.status) == (begun.id, False, 200)
    assert over.at >= begun.at
    assert not r.emitted.of(Admitted)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(("GET", "/v1/models"), ("DELETE", "/v1/files/1"), ("OPTIONS", "/v1/videos"), ("POST", "/sleep")),
        *(("POST", "/update_weights"), ("POST", "/wake_up"), ("POST", "/v1/embeddings"), ("POST", "/v1/preprocess")),
    ],
)
async def test_what_is_no_unknown_work_is_not_reported_as_such(rig: Any, serve: Any, method: str, path: str) -> None:
    """Reading calls, calls that pause the engine, admitted work and the sidecar's own are none."""

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        return web.json_response({})

    r = await rig(await serve(engine))
    async with r.client.request(method, r.url + path, json={"input": "x"} if method == "POST" else None) as got:
        await got.read()
    async with r.client.post(r.url + "/last") as got:
        await got.read()
    assert len(await r.emitted.wait(UnreadRequest, 2)) == 2  # of the last call alone


async def test_a_client_that_leaves_ends_its_call(rig: Any, serve: Any) -> None:
    """The call is over when its client has gone, and the engine learns of it, too."""
    engine = HeldEngine()
    r = await rig(await serve(engine))
    asked = asyncio.create_task(r.client.post(r.url + "/v1/videos", json={}))
    await soon(engine.called)
    asked.cancel()
    await soon(engine.left)
    await r.emitted.wait(UnreadRequest, 2)
    assert marks(r) == [(True, 0), (False, 0)]


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nab"], ids=["at once", "midway"])
async def test_an_engine_that_breaks_ends_the_call(rig: Any, serve_raw: Any, answer: bytes) -> None:
    """Whether it breaks before its answer or in it, there is one end."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    r = await rig(await serve_raw(talk))
    with contextlib.suppress(aiohttp.ClientError):
        async with r.client.post(r.url + "/v1/videos") as got:
            await got.read()
    await r.emitted.wait(UnreadRequest, 2)
    assert marks(r) == [(True, 0), (False, 200 if answer else 0)]


async def test_an_engine_that_is_not_there_ends_the_call(rig: Any, unused_tcp_port: int) -> None:
    """A refused connection leaves nothing open."""
    r = await rig(f"http://127.0.0.1:{unused_tcp_port}")
    async with r.client.post(r.url + "/v1/videos") as got:
        assert got.status == 502
    assert marks(r) == [(True, 0), (False, 0)]


async def test_an_upload_counts_while_it_is_sent(rig: Any, serve: Any) -> None:
    """A body that comes in pieces is with the engine from its first one; a client that stops and leaves ends it."""
    arrived, left = asyncio.Event(), asyncio.Event()

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        await request.content.readany()
        arrived.set()
        try:
            await request.read()
        finally:
            left.set()
        return web.Response()

    r = await rig(await serve(engine))
    reader, writer = await asyncio.open_connection(r.host, r.port)
    size = 2 * MAX_REPEATED_BYTES
    writer.write(b"POST /v1/videos HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\nab" % size)
    await soon(arrived)
    assert marks(r) == [(True, 0)]
    [blocked] = await r.emitted.wait(RequestBlocked)  # the engine waits for the client
    assert (blocked.on, blocked.id) == (True, r.emitted.of(UnreadRequest)[0].id)
    writer.write(b"c" * 1000)
    assert not (await r.emitted.wait(RequestBlocked, 2))[1].on
    writer.transport.abort()
    await soon(left)
    await r.emitted.wait(UnreadRequest, 2)
    assert marks(r) == [(True, 0), (False, 0)]
    assert reader is not None


async def test_a_client_that_does_not_read_is_to_blame_for_the_silence(rig: Any, serve: Any) -> None:
    """A write that waits for the client is reported as blocked until the client reads."""

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b"x" * 65536)

    r = await rig(await serve(engine))
    got = await r.client.post(r.url + "/v1/videos")
    [on] = await r.emitted.wait(RequestBlocked)
    while len(r.emitted.of(RequestBlocked)) < 2:
        await got.content.readany()
    off = r.emitted.of(RequestBlocked)[1]
    assert (on.on, off.on, off.id) == (True, False, on.id)
    got.close()
    await r.emitted.wait(UnreadRequest, 2)
    assert r.emitted.all[-1] == r.emitted.of(UnreadRequest)[1]


async def lines_until(
    request: web.BaseRequest, content_type: str, piece: bytes, enough: asyncio.Event, status: int = 200
) -> web.StreamResponse:
    """An answer in pieces until `enough` is set."""
    response = web.StreamResponse(status=status, headers={"content-type": content_type})
    await response.prepare(request)
    while not enough.is_set():
        await response.write(piece)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(enough.wait(), 0.01)
    return response


@pytest.mark.parametrize(
    ("path", "content_type", "piece"),
    [
        ("/api/chat", "application/x-ndjson", b'{"message":{"content":"x"},"done":false}\n'),
        ("/api/chat", "application/json", b'{"message":{"content":"x"}}\n'),
        ("/api/generate", "application/x-ndjson", b'{"response":"x"}\n'),
        ("/v1/videos", "text/event-stream", b"data: {}\n\n"),
        ("/v1/chat/completions", "application/x-ndjson", b'{"choices":[{"delta":{"content":"x"}}]}\n'),
        ("/v1/chat/completions", "application/json", b'{"choices":[{"delta":{"content":"x"}}]}\n'),
        ("/v1/audio/speech", "audio/pcm", b"\x00\x01" * 100),
    ],
)
async def test_bytes_of_an_answer_that_is_no_event_stream_are_progress(
    rig: Any, serve: Any, path: str, content_type: str, piece: bytes
) -> None:
    """What flows is delivered in sums, and so is all of an unread call; of work, each line of JSON is a token."""
    enough = asyncio.Event()

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        return await lines_until(request, content_type, piece, enough)

    r = await rig(await serve(engine))
    async with r.client.post(r.url + path, json={"stream": True, "messages": []}) as got:
        delivered = (await r.emitted.wait(Delivered, 2))[:2]
        enough.set()
        whole = len(await got.read())
    [id] = {event.id for event in delivered}
    assert id in {event.id for event in (*r.emitted.of(UnreadRequest), *r.emitted.of(Admitted))}
    size = len(piece) if content_type == "application/x-ndjson" else 0
    assert all(event.bytes > 0 and event.tokens * size == (event.bytes if size else 0) for event in delivered)
    assert delivered[1].at - delivered[0].at >= open_requests.EVENT_FLUSH_INTERVAL_S / 2
    assert sum(event.bytes for event in r.emitted.of(Delivered)) <= whole


@pytest.mark.parametrize(
    ("path", "content_type", "status"),
    [
        ("/v1/chat/completions", "text/event-stream", 200),  # pings
        ("/v1/chat/completions", "text/plain", 503),
        ("/api/chat", "text/plain", 404),
    ],
)
async def test_pings_and_errors_are_no_progress(
    rig: Any, serve: Any, path: str, content_type: str, status: int
) -> None:
    """A server keeps a stream open and refuses requests while its engine hangs, however long it takes over it."""
    enough = asyncio.Event()

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/v1/completions":  # its deliveries show that reports were due
            return await lines_until(request, "text/event-stream", sse(TOKEN)[0], enough)
        return await lines_until(request, content_type, b": ping\n\n", enough, status)

    r = await rig(await serve(engine))
    async with (
        r.client.post(r.url + path, json={"stream": True, "messages": []}) as silent,
        r.client.post(r.url + "/v1/completions", json={"stream": True, "prompt": ""}) as lively,
    ):
        await r.emitted.wait(Delivered, 3)
        enough.set()
        await asyncio.gather(silent.read(), lively.read())
    lively_id = r.emitted.of(FirstToken)[-1].id
    assert {event.id for event in r.emitted.of(Delivered)} == {lively_id}


def test_an_answer_that_takes_no_time_is_no_progress() -> None:
    """A tokenizer answers in one piece while the engine hangs; pieces over a longer time are made meanwhile."""
    call = UnreadCall("a", status=200)
    assert not call.receive(bytes(100), 10.0)
    assert not call.receive(bytes(100), 10.1)
    assert call.receive(bytes(5), 10.3)
    assert call.report_delivered(10.4) == Delivered("a", 10.4, 0, 205)
    call.status = 500
    assert not call.receive(bytes(5), 20.0)


@pytest.mark.parametrize(
    "piece",
    [b":\n\n", b": keep-alive\n\n", b": ping - 2026-12-01\r\n\r\n", b"\n", b"event: ping\ndata: {}\n\n", b":\n\n:\n\n"],
)
def test_what_keeps_a_silent_stream_alive_is_no_progress(piece: bytes) -> None:
    """llama.cpp, vLLM and Starlette's servers send it from their API, whatever became of the engine."""
    call = UnreadCall("a", status=200, answered_at=0.0)
    assert not call.receive(piece, 10.0)
    assert call.receive(piece + b'data: {"type":"response.output_text.delta"}\n\n', 20.0)


async def test_each_of_many_cancelled_calls_ends_once(rig: Any, serve: Any) -> None:
    """A hundred clients that leave at once, before the answer, in it or in their upload: one end each."""
    called = 0
    everyone, left = asyncio.Event(), asyncio.Event()

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        nonlocal called
        response = web.StreamResponse()
        if request.path == "/answered":
            await response.prepare(request)
            await response.write(b"x")
        called += 1
        if called == 100:
            everyone.set()
        await soon(left)
        return response

    async def endless() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.Event().wait()

    async def ask(n: int) -> None:
        path, data = ("/held", "/answered", "/uploading")[n % 3], endless() if n % 3 == 2 else b"x"
        async with r.client.post(r.url + path, data=data) as got:
            await got.read()

    r = await rig(await serve(engine))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client:
        r.client, kept = client, r.client
        clients = [asyncio.create_task(ask(n)) for n in range(100)]
        await soon(everyone)
        for asking in clients:
            asking.cancel()
        await asyncio.wait(clients, timeout=PATIENCE)
        events = await r.emitted.wait(UnreadRequest, 200)
        r.client = kept
    left.set()
    async with r.client.post(r.url + "/held") as got:  # whatever came late has come now
        await got.read()
    assert set(Counter((event.id, event.on) for event in r.emitted.of(UnreadRequest)).values()) == {1}
    assert {event.id for event in events if event.on} == {event.id for event in events if not event.on}


async def test_what_a_drain_cuts_off_ends(rig: Any, serve: Any) -> None:
    """A call that outlasts the drain is over with it."""
    engine = HeldEngine()
    r = await rig(await serve(engine))
    asked = asyncio.create_task(r.client.post(r.url + "/v1/videos", json={}))
    await soon(engine.called)
    await r.relay.drain(0.0)
    assert marks(r) == [(True, 0), (False, 0)]
    await asyncio.wait((asked,), timeout=PATIENCE)
    assert isinstance(asked.exception(), aiohttp.ClientError)


async def test_the_calls_that_are_reported_are_bounded(rig: Any, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the bound a call is served and only counted, when it is over; the open ones end as before."""
    monkeypatch.setattr(open_requests, "MAX_UNREAD", 1)
    engine = HeldEngine()
    r = await rig(await serve(engine))
    first = asyncio.create_task(r.client.post(r.url + "/v1/videos", json={}))
    await soon(engine.called)
    engine.called.clear()
    second = asyncio.create_task(r.client.post(r.url + "/v1/videos", json={}))
    await soon(engine.called)
    engine.answer.set()
    for asked in (first, second):
        async with await asked as got:
            assert got.status == 200
    await r.emitted.wait(UnreadRequest, 3)
    begun, *over = r.emitted.of(UnreadRequest)
    assert begun.on and not any(event.on for event in over)
    assert sorted((event.id == begun.id, event.status, event.path_class) for event in over) == [
        (False, 200, "other"),
        (True, 200, ""),
    ]
    page = Metrics()
    for event in r.emitted.of(UnreadRequest):
        page.observe(event)
    samples = [sample for family in page.collect() for sample in family.samples]
    [counted] = [
        sample.value
        for sample in samples
        if sample.name == "sidecar_unmetered_requests_total" and sample.labels["path_class"] == "other"
    ]
    assert counted == 2
