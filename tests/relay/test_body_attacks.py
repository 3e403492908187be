"""Bodies that cost more than they weigh: none is parsed, none holds the event loop, each reaches the engine."""

from __future__ import annotations

import asyncio
import threading
import tracemalloc
from functools import partial
from typing import Any

import pytest

from sidecar.events import Admitted
from sidecar.load.api_routes import CHAT
from sidecar.load.request_shape import describe
from sidecar.relay import body_thread, request_body
from sidecar.relay.body_thread import MAX_INLINE_BYTES

from ..waiting import PATIENCE
from .attack_shapes import SHAPES
from .work import echo

# Places of texts and images, options: what is kept of a body is bounded, whatever is in it.
MAX_KEPT_BYTES = 300 << 10


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_is_made_of_a_body(shape: str) -> None:
    """What costs time and holds the GIL is making objects of JSON: of a body of any shape, hardly any are made."""
    body = SHAPES[shape](1 << 20)
    tracemalloc.start()
    try:
        parsed = request_body.parse(body, links=True)
        shape_of = describe(parsed.scan, CHAT, len(body))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert parsed.scan is not None and shape_of.text_bytes <= 2 * len(body)
    assert peak < MAX_KEPT_BYTES


@pytest.mark.parametrize("shape", SHAPES)
async def test_it_goes_out_as_it_came(rig: Any, serve: Any, shape: str) -> None:
    """Every byte reaches the engine, and the request is admitted and settled like any other."""
    r = await rig(await serve(echo))
    body = SHAPES[shape](200 << 10)
    async with r.client.post(r.url + "/v1/completions", data=body) as got:
        assert await got.read() == body
    await r.emitted.settled()
    assert len(r.emitted.of(Admitted)) == 1


async def test_a_long_body_is_read_off_the_event_loop() -> None:
    """While a thread reads a long body, the loop goes on: it is what lets that thread end."""
    loop_went_on = threading.Event()

    def read(body: bytes) -> int:
        assert loop_went_on.wait(PATIENCE)
        return len(body)

    reading = asyncio.create_task(body_thread.run(read, b"a" * (MAX_INLINE_BYTES + 1)))
    await asyncio.sleep(0)
    loop_went_on.set()
    assert await reading == MAX_INLINE_BYTES + 1


async def test_a_short_body_is_read_at_once() -> None:
    """It costs less than a thread does."""
    read = partial(lambda thread, body: threading.current_thread() is thread, threading.current_thread())
    assert await body_thread.run(read, b"a" * MAX_INLINE_BYTES)


def test_a_scan_lets_other_threads_run(switching_never: None) -> None:
    """Threads that switch only where one waits or lets go: this one goes on before the scan of the other is over."""
    body = SHAPES["empty objects"](32 << 20)
    began, ended = threading.Event(), threading.Event()

    def read() -> None:
        began.set()
        request_body.parse(body)
        ended.set()

    thread = threading.Thread(target=read)
    thread.start()
    assert began.wait(PATIENCE)
    went_on = not ended.is_set()
    thread.join()
    assert went_on


IMAGE = b'{"type":"image_url","image_url":{"url":"data:image/png;base64,AAAA"}}'


@pytest.mark.parametrize(
    "text",
    [
        b"data:,0123456789abcdef-0.",
        b"data:image/png;base64,AAAA",
        b'\\"data:image/png;base64,AAAA\\"',
        b'\\"image_url\\":{\\"url\\":\\"data:image/png;base64,AAAA\\"}',
        b"\\u0000",
    ],
)
def test_an_image_is_found_by_its_position(text: bytes) -> None:
    """Whatever texts, names and keys say, one image is found, and it alone changes."""
    head = b'{"model":"%b","%b":"%b","messages":[{"content":[{"type":"text","text":"%b"},' % (text, text, text, text)
    parsed = request_body.parse(head + IMAGE + b"]}]}")
    assert [image.where for image in parsed.images] == ["messages[0].content[1]"]
    sent = b"".join(request_body.rebuild(parsed, {0: ("image/bmp", b"QQ")}))
    assert sent == head + IMAGE.replace(b"png;base64,AAAA", b"bmp;base64,QQ") + b"]}]}"
