"""What the scripted engine does not speak: tool calls, lists of one text, Anthropic's messages. The rest it answers."""

from __future__ import annotations

import json
from typing import Any

import aiohttp
from aiohttp import web

CALL = {"id": "call-1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
USAGE = {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}
BASE = {"id": "1", "created": 1, "model": "tools"}
WHOLE = {
    **BASE,
    "object": "chat.completion",
    "usage": USAGE,
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": None, "tool_calls": [CALL]},
            "finish_reason": "tool_calls",
        }
    ],
}


def _delta(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {
        **BASE,
        "object": "chat.completion.chunk",
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
    }


CHUNKS = [
    _delta(
        {"role": "assistant", "content": None, "tool_calls": [{"index": 0, **CALL, "function": {"name": "weather"}}]}
    ),
    _delta({"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]}),
    _delta({"tool_calls": [{"index": 0, "function": {"arguments": "}"}}]}),
    _delta({}, "tool_calls"),
]
MESSAGE = {
    "id": "msg-1",
    "type": "message",
    "role": "assistant",
    "model": "scripted",
    "content": [],
    "stop_reason": None,
    "stop_sequence": None,
    "usage": {"input_tokens": 9, "output_tokens": 0},
}
TEXT = ("text", "text_delta", "text", ["Fair", " and", " dry"])
TOOL = ("tool_use", "input_json_delta", "partial_json", ["{", "}"])


def create() -> web.Application:
    """The application. `app["engine"]` is the URL of the scripted engine."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", _answer)
    app.cleanup_ctx.append(_session)
    return app


SESSION = web.AppKey("session", aiohttp.ClientSession)
ENGINE = web.AppKey("engine", str)


async def _session(app: web.Application) -> Any:
    async with aiohttp.ClientSession() as session:
        app[SESSION] = session
        yield


async def _answer(request: web.Request) -> web.StreamResponse:
    body = await request.read()
    asked = json.loads(body) if body.startswith(b"{") else {}
    if request.path == "/v1/messages":
        return await _message(request, asked)
    if asked.get("model") == "tools":
        return await _tools(request, asked)
    if isinstance(asked.get("input"), list):  # clients send even one text as a list
        [text] = asked["input"]
        body = json.dumps({**asked, "input": text}).encode()
    async with request.app[SESSION].request(
        request.method, request.app[ENGINE] + request.path_qs, data=body, headers={"content-type": "application/json"}
    ) as answer:
        return web.Response(status=answer.status, body=await answer.read(), content_type=answer.content_type)


async def _tools(request: web.Request, asked: dict[str, Any]) -> web.StreamResponse:
    if not asked.get("stream"):
        return web.json_response(WHOLE)
    wanted = (asked.get("stream_options") or {}).get("include_usage")
    usage = [{**BASE, "object": "chat.completion.chunk", "choices": [], "usage": USAGE}] if wanted else []
    events = [*map(json.dumps, CHUNKS + usage), "[DONE]"]
    return await _stream(request, [f"data: {event}\n\n" for event in events])


async def _message(request: web.Request, asked: dict[str, Any]) -> web.StreamResponse:
    kind, delta, field, pieces = TOOL if asked["model"] == "tools" else TEXT
    if not asked.get("stream"):
        content = [{"type": "text", "text": "".join(pieces)}]
        return web.json_response({**MESSAGE, "content": content, "usage": {"input_tokens": 9, "output_tokens": 3}})
    block = (
        {"type": kind, "text": ""} if kind == "text" else {"type": kind, "id": "t-1", "name": "weather", "input": {}}
    )
    events = [
        {"type": "message_start", "message": MESSAGE},
        {"type": "content_block_start", "index": 0, "content_block": block},
        {"type": "ping"},
        *({"type": "content_block_delta", "index": 0, "delta": {"type": delta, field: piece}} for piece in pieces),
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 3}},
        {"type": "message_stop"},
    ]
    return await _stream(request, [f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events])


async def _stream(request: web.Request, events: list[str]) -> web.StreamResponse:
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    for event in events:
        await response.write(event.encode())
    await response.write_eof()
    return response
