"""Compressed bodies are unpacked within a bound of memory, and counted beyond it."""

from __future__ import annotations

import gzip
import tracemalloc
import zlib
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from sidecar.events import Settled
from sidecar.relay import compression

from .work import CHAT, TOKEN, sse

LIMIT = 100 << 20


@pytest.mark.parametrize(
    ("coding", "pack"), [("gzip", gzip.compress), (" X-GZIP", gzip.compress), ("deflate", zlib.compress)]
)
def test_text_and_its_length(coding: str, pack: Any) -> None:
    """What was packed, in each coding that is read."""
    text = b'{"prompt": "' + b"hello " * 1000 + b'"}'
    assert compression.unpack(pack(text), coding, LIMIT) == (text, len(text))


def test_what_grows_a_thousandfold_is_counted_and_not_held() -> None:
    """60 MB in 60 kB: its length is known, its text is not kept."""
    bomb = gzip.compress(bytes(60 << 20))
    tracemalloc.start()
    assert compression.unpack(bomb, "gzip", LIMIT) == (b"", 60 << 20)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 3 * compression.held_bytes(bomb, LIMIT)
    assert compression.unpack(bomb, "gzip", 1 << 20)[1] == 1 << 20


def test_what_cannot_be_unpacked_counts_by_its_bytes() -> None:
    """Broken, cut, or in another coding."""
    packed = gzip.compress(b"x" * 100)
    assert compression.unpack(b"no gzip at all", "gzip", LIMIT) == (b"", 14)
    assert compression.unpack(packed, "zstd", LIMIT) == (b"", len(packed) * compression.UNREAD_FACTOR)


async def test_a_broken_compressed_stream_is_the_engines_error(rig: Any, serve: Any) -> None:
    """A gzip stream that was asked for as plain text and breaks in the middle: cut off, and booked as such."""
    packed = gzip.compress(b"".join(sse(TOKEN) * 50), mtime=0)
    broken = packed[:20] + bytes(40) + packed[60:]

    async def engine(request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        return web.Response(body=broken, headers={"content-type": "text/event-stream", "content-encoding": "gzip"})

    r = await rig(await serve(engine))
    async with r.client.post(r.url + "/v1/chat/completions", json={**CHAT, "stream": True}) as got:
        with pytest.raises(aiohttp.ClientPayloadError):
            await got.read()
    [end] = r.emitted.of(Settled)
    assert end.outcome == "engine_error"
