"""Work that goes wrong: whose error it is, what the client gets, how it settles."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from sidecar.events import LoadReport

from .work import CHAT, TOKEN, once, sse


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
    _, settled = once(r.emitted)
    assert (settled.outcome, settled.status, settled.error) == (outcome, status, f"status_{status}")


async def test_invalid_json_is_the_engines_to_refuse(rig: Any, serve: Any) -> None:
    """The engine gets the very bytes, and its answer goes back."""

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(status=400, body=await request.read())

    r = await rig(await serve(engine))
    async with r.client.post(r.url + "/v1/chat/completions", data=b'{"model": oops') as got:
        assert (got.status, await got.read()) == (400, b'{"model": oops')
    assert once(r.emitted)[1].outcome == "rejected"


async def test_a_body_without_changes_arrives_byte_for_byte(rig: Any, serve: Any) -> None:
    """Odd spacing, number forms, duplicate keys and images survive where nothing has to change."""
    part = b'{"type":"image_url","image_url":{"url":"data:image/png;base64,AA"}}'
    body = b'{ "model":"m" ,"temperature":1e0,"a":1,"a":2,"messages":[{"role":"user","content":[%b]}]}\n' % part

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
    assert once(r.emitted)[1].outcome == "rejected"
    assert not seen


async def test_a_refused_connection(rig: Any, unused_tcp_port: int) -> None:
    """Without an engine the client gets a 502 with the reason and Retry-After, without an address."""
    r = await rig(f"http://127.0.0.1:{unused_tcp_port}")
    async with r.client.post(r.url + "/v1/chat/completions", json=CHAT) as got:
        text = await got.text()
        assert (got.status, got.headers["retry-after"]) == (502, "2")
        assert json.loads(text)["error"]["code"] == "engine_unreachable"
        assert "127.0.0.1" not in text
    _, settled = once(r.emitted)
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
    r.relay.on_command(LoadReport("JSON {}", "TEXT a=1", verdict))
    async with r.client.post(r.url + "/v1/chat/completions", json=CHAT) as got:
        assert got.status == status
    assert once(r.emitted)[1].outcome == outcome


@pytest.mark.parametrize(
    "head", [b"content-type: text/event-stream\r\ntransfer-encoding: chunked\r\n", b"content-length: 999999\r\n"]
)
async def test_an_engine_that_dies_in_the_middle(rig: Any, serve_raw: Any, head: bytes) -> None:
    """The client cannot mistake the part for the whole, and the request settles as engine_error with its deliveries."""
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
    _, settled = once(r.emitted)
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
    assert once(r.emitted)[1].outcome == "engine_error"
