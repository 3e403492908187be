"""What the tests of engine work share: bodies, events, and the one admission of a request."""

from __future__ import annotations

import json
from typing import Any

from aiohttp import web

from sidecar.events import Admitted, Settled

CHAT = {"model": "scripted", "messages": [{"role": "user", "content": "Say something."}], "max_tokens": 8}
FAST = {"listen": ("127.0.0.1", 0), "prefill_tokens_per_second": 1e7, "decode_step_ms": 1.0}


def sse(*events: Any) -> list[bytes]:
    return [b"data: " + (e if isinstance(e, bytes) else json.dumps(e).encode()) + b"\n\n" for e in events]


TOKEN = {"choices": [{"index": 0, "delta": {"content": "x"}}]}
USAGE = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2}}


def once(emitted: Any) -> tuple[Admitted, Settled]:
    """The only admission and the only settlement, of one id, in this order."""
    [admitted], [settled] = emitted.of(Admitted), emitted.of(Settled)
    assert admitted.id == settled.id
    assert emitted.all.index(admitted) < emitted.all.index(settled)
    return admitted, settled


async def echo(request: web.BaseRequest) -> web.StreamResponse:
    return web.Response(body=await request.read())
