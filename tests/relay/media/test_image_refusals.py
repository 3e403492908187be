"""Engines that do not take prepared images: they get the client's own, and from then on no others."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest
from aiohttp import web

from sidecar.events import ImagePrepared, LoadReport
from sidecar.load.found import MAX_PARTS
from sidecar.relay.media import image_refusals
from sidecar.relay.media.inline import MAX_IMAGES

from ..pictures import Prepared, Workers, pictures
from ..work import TOKEN, once, sse

PNM = {"error": {"message": "The image format Pnm is not supported", "type": "InternalServerError", "code": 500}}
OTHER = {"error": {"message": "This model's maximum context length is 4096 tokens.", "type": "BadRequestError"}}
OK = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}
MADE = b"image/bmp"  # what the workers of these tests prepare


class Picky:
    """An engine that answers `refusal` to bodies with prepared images, `answer` to others; it records `bodies`."""

    def __init__(self, status: int = 500, refusal: Any = PNM, answer: tuple[int, Any] = (200, OK)) -> None:
        self.status = status
        self.refusal = refusal
        self.answer = answer
        self.takes_all = False
        self.bodies: list[bytes] = []

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        self.bodies.append(await request.read())
        if not self.takes_all and (MADE in self.bodies[-1] or b"sidecar-shm" in self.bodies[-1]):
            return web.json_response(self.refusal, status=self.status)
        if json.loads(self.bodies[-1]).get("stream"):
            return web.Response(body=b"".join(sse(TOKEN, b"[DONE]")), headers={"content-type": "text/event-stream"})
        return web.json_response(self.answer[1], status=self.answer[0])

    @property
    def prepared(self) -> list[bool]:
        """Of each body, whether its image was prepared."""
        return [MADE in body for body in self.bodies]


async def ask(r: Any, body: bytes) -> tuple[int, Any]:
    async with r.client.post(r.url + "/v1/chat/completions", data=body) as got:
        return got.status, await got.json()


BODY = json.dumps(pictures("AAAA")).encode()


async def test_a_refused_image_goes_on_as_it_came_and_so_do_all_others(
    rig: Any, serve: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The client sees only the good answer; the engine gets its bytes once; one settlement; one log line."""
    caplog.set_level(logging.INFO)
    engine = Picky()
    r = await rig(await serve(engine), images=Workers())
    assert await ask(r, BODY) == (200, OK)
    assert engine.prepared == [True, False] and engine.bodies[1] == BODY
    _, settled = once(r.emitted)
    assert (settled.outcome, settled.status, settled.usage.prompt_tokens) == ("ok", 200, 3)
    assert await asyncio.gather(*(ask(r, BODY) for _ in range(3))) == [(200, OK)] * 3
    assert engine.bodies[2:] == [BODY] * 3
    assert [event.outcome for event in r.emitted.of(ImagePrepared)] == ["ok", "passed", "passed", "passed"]
    assert {event.reason for event in r.emitted.of(ImagePrepared)} == {"", "refused"}
    logged = [record.getMessage() for record in caplog.records if "prepared image" in record.getMessage()]
    assert len(logged) == 1 and "500" in logged[0] and "Pnm" not in logged[0]


async def test_requests_under_way_are_all_served(rig: Any, serve: Any, caplog: pytest.LogCaptureFixture) -> None:
    """What was prepared before the first refusal came back gets its original, too, and the log speaks once."""
    engine = Picky()
    r = await rig(await serve(engine), images=Workers())
    assert await asyncio.gather(*(ask(r, BODY) for _ in range(5))) == [(200, OK)] * 5
    assert engine.bodies.count(BODY) == 5
    assert sum("prepared image" in record.getMessage() for record in caplog.records) == 1


class Slow(Workers):
    """Workers that prepare an image only when `go` is set, but for their first."""

    def __init__(self) -> None:
        super().__init__()
        self.go = asyncio.Event()
        self.waiting = asyncio.Event()

    async def hand_over(self, *args: Any, **kwargs: Any) -> Prepared:
        made = await super().hand_over(*args, **kwargs)
        if len(self.handed_over) > 1:
            self.waiting.set()
            await self.go.wait()
        return made


async def test_what_is_prepared_meanwhile_is_sent_as_it_came(rig: Any, serve: Any) -> None:
    """An image that was with the workers when the engine refused another one is not tried."""
    engine, workers = Picky(), Slow()
    r = await rig(await serve(engine), images=workers)
    first, second = (asyncio.create_task(ask(r, BODY)) for _ in range(2))
    await workers.waiting.wait()
    done, _ = await asyncio.wait((first, second), return_when=asyncio.FIRST_COMPLETED)
    assert len(done) == 1
    workers.go.set()
    assert await asyncio.gather(first, second) == [(200, OK)] * 2
    assert engine.prepared == [True, False, False]


async def test_a_stream_is_served_as_it_came(rig: Any, serve: Any) -> None:
    """Also where the sidecar asks for usage: that stays in the body, and the name of an image does not."""
    engine = Picky()
    r = await rig(await serve(engine), images=Workers())
    asked = pictures("AAAA") | {"stream": True, "stream_options": {"include_usage": False}}
    async with r.client.post(r.url + "/v1/chat/completions", json=asked) as got:
        assert (got.status, await got.read()) == (200, b"".join(sse(TOKEN, b"[DONE]")))
    sent = json.loads(engine.bodies[1])
    assert sent["stream_options"]["include_usage"] is True
    assert sent["messages"] == asked["messages"]
    assert once(r.emitted)[1].outcome == "ok"


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (500, "The image format Pnm is not supported"),
        (500, "The image format could not be determined"),
        (400, "cannot identify image file <_io.BytesIO object at 0x7f>"),
        (
            400,
            "You uploaded an unsupported image. Please make sure your image has one of the following formats: png",
        ),
        (400, "image.source.media_type: Input should be 'image/jpeg', 'image/png', 'image/gif' or 'image/webp'"),
        (400, "Unsupported MIME type: image/x-portable-pixmap"),
        (400, "Failed to load image or audio file"),
        (422, "failed to decode image"),
        (415, "no"),
        (413, "length limit exceeded"),
    ],
    ids=str,
)
async def test_engines_speak_of_formats_in_many_ways(rig: Any, serve: Any, status: int, text: str) -> None:
    """Pillow, Rust, stb, hosted APIs; and statuses that suffice, among them a body limit that plain pixels exceed."""
    engine = Picky(status, {"error": text})
    r = await rig(await serve(engine), images=Workers())
    assert await ask(r, BODY) == (200, OK)
    assert engine.prepared == [True, False]


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, OTHER),
        (400, {"error": "At most 1 image(s) may be provided in one prompt."}),
        (429, {"error": "Too many requests"}),
        (503, {"error": "The waiting queue is full."}),
        (500, {"error": "EngineCore encountered an issue."}),
        (401, {"error": "Unauthorized"}),
    ],
    ids=str,
)
async def test_other_errors_are_the_clients(rig: Any, serve: Any, status: int, error: Any) -> None:
    """An error unrelated to formats is passed on, nothing is sent again, and images are still prepared."""
    engine = Picky(status, error)
    r = await rig(await serve(engine), images=Workers())
    for _ in range(2):
        assert await ask(r, BODY) == (status, error)
    assert engine.prepared == [True, True]


async def test_an_image_that_is_refused_as_it_came_says_nothing(rig: Any, serve: Any) -> None:
    """The client gets the answer to its own bytes; the next image is prepared again."""
    engine = Picky(400, {"error": "cannot identify image file"}, (400, {"error": "cannot identify your image file"}))
    r = await rig(await serve(engine), images=Workers())
    for _ in range(2):
        assert await ask(r, BODY) == (400, {"error": "cannot identify your image file"})
    assert engine.prepared == [True, False] * 2
    assert {settled.outcome for settled in await r.emitted.wait(type(await r.emitted.settled()), 2)} == {"rejected"}


async def test_an_engine_that_took_as_much_is_trusted(rig: Any, serve: Any) -> None:
    """Originals are kept only for trials: a body no larger than an accepted one gets no second attempt."""
    engine = Picky(413)
    engine.takes_all = True
    r = await rig(await serve(engine), images=Workers())
    assert await ask(r, BODY) == (200, OK)
    engine.takes_all = False
    assert await ask(r, BODY) == (413, PNM)
    larger = json.dumps(pictures("AAAA", "AAAA")).encode()
    assert await ask(r, larger) == (200, OK)
    assert engine.prepared == [True, True, True, False] and engine.bodies[3] == larger


async def test_another_process_is_tried_again(rig: Any, serve: Any) -> None:
    """Once the engine is another process, it gets prepared images; a report of the same process changes nothing."""
    engine = Picky()
    r = await rig(await serve(engine), images=Workers())
    r.relay.on_command(LoadReport("{}", "", "idle", "vllm", process=1))
    await ask(r, BODY)
    r.relay.on_command(LoadReport("{}", "", "idle", "vllm", process=1))
    await ask(r, BODY)
    assert engine.prepared == [True, False, False]
    engine.takes_all = True
    r.relay.on_command(LoadReport("{}", "", "idle", "vllm", process=2))
    await ask(r, BODY)
    assert engine.prepared == [True, False, False, True]


async def test_an_engine_that_says_what_it_is_gets_none(rig: Any, serve: Any) -> None:
    """With vLLM's Rust front end images pass from the first on, however many; no form is tried."""
    engine, workers = Picky(), Workers()
    r = await rig(await serve(engine), images=workers, shm=lambda: True)
    r.relay.on_command(LoadReport("{}", "", "idle", "vllm", images_pass="rust_front_end"))
    body = json.dumps(pictures(*["AAAA"] * (MAX_IMAGES + 1))).encode()
    assert await ask(r, body) == (200, OK)
    assert engine.bodies == [body] and workers.handed_over == []
    admitted, _ = once(r.emitted)
    assert admitted.expected.images == MAX_IMAGES + 1
    assert {(e.outcome, e.reason) for e in r.emitted.of(ImagePrepared)} == {("passed", "rust_front_end")}
    r.relay.on_command(LoadReport("{}", "", "idle", "vllm"))
    await ask(r, BODY)
    assert workers.handed_over == [True]


class Shared(Workers):
    """Workers that hand every image over in shared memory."""

    async def hand_over(self, *args: Any, **kwargs: Any) -> Prepared:
        made = await super().hand_over(*args, **kwargs)
        made.base64, made.url = None, "sidecar-shm://folder/out-1?h=1&w=1&o=0"
        return made


async def test_what_shared_memory_is_refused_with_is_a_refusal(rig: Any, serve: Any) -> None:
    """An engine that does not know our URLs gets the original."""
    engine = Picky(400, {"error": "The URL must be either a HTTP, data or file URL; its scheme is unknown."})
    r = await rig(await serve(engine), images=Shared(), shm=lambda: True)
    assert await ask(r, BODY) == (200, OK)
    assert engine.bodies[1] == BODY


@pytest.mark.parametrize("refuses", [True, False], ids=["refused", "passing"])
async def test_images_behind_links_stay_fetched(rig: Any, serve: Any, refuses: bool) -> None:
    """The engine never gets a link that we were to fetch: it gets what was there, as it was."""

    async def fetch(link: str, where: str) -> bytes:
        return b"AAAA-the-file"

    engine = Picky()
    r = await rig(await serve(engine), images=Workers(), fetch=fetch)
    if not refuses:
        r.relay.on_command(LoadReport("{}", "", "idle", "vllm", images_pass="rust_front_end"))
    body = pictures("AAAA")
    body["messages"][0]["content"][0]["image_url"]["url"] = "https://img.example.com/a.png"
    assert await ask(r, json.dumps(body).encode()) == (200, OK)
    part = json.loads(engine.bodies[-1])["messages"][0]["content"][0]
    assert part == {"type": "image_url", "image_url": {"url": "data:image/png;base64,QUFBQS10aGUtZmlsZQ=="}}
    assert len(engine.bodies) == 1 + refuses


def test_texts_that_are_no_refusal() -> None:
    """Errors of models without images, and of words that merely contain a format's letters."""
    for text in (b"the equipment is not available", b"Unknown model: gpt", b"messages must alternate roles", b"jpgm"):
        assert not image_refusals._FORMAT_REFUSAL.search(text), text


async def test_links_are_counted_though_images_pass(rig: Any, serve: Any) -> None:
    """A short body could name any number of large files: where a link's place is not kept, none is fetched."""
    fetched: list[str] = []

    async def fetch(link: str, where: str) -> bytes:
        fetched.append(link)
        return b"AAAA"

    engine = Picky()
    r = await rig(await serve(engine), images=Workers(), fetch=fetch)
    r.relay.on_command(LoadReport("{}", "", "idle", "vllm", images_pass="rust_front_end"))
    body = pictures(*["AAAA"] * (MAX_PARTS + 1))
    for part in body["messages"][0]["content"]:
        if "image_url" in part:
            part["image_url"]["url"] = "https://img.example.com/a.png"
    status, _ = await ask(r, json.dumps(body).encode())
    assert (status, fetched, engine.bodies) == (400, [], [])
