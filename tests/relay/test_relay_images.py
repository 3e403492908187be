"""Images of requests: replaced, named, refused."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from aiohttp import web

from sidecar.events import STATES, Admitted, ImagePrepared, LoadReport
from sidecar.images.service import ImageService
from sidecar.kernels import families
from sidecar.relay.http.client import Request
from sidecar.relay.media.inline import MAX_IMAGES
from sidecar.settings import Settings
from sidecar.tools import synthetic_photos

from .pictures import Workers, pictures
from .work import echo, once


async def test_images_are_replaced(rig: Any, serve: Any) -> None:
    """A prepared image takes the original's place with a uuid; a passed one stays; each is reported; tokens count."""
    r = await rig(await serve(echo), images=Workers())
    async with r.client.post(r.url + "/v1/chat/completions", json=pictures("AAAA", "PASS")) as got:
        first, second = (await got.json(content_type=None))["messages"][0]["content"]
    assert len(first.pop("uuid")) == 32
    assert first == {"type": "image_url", "image_url": {"url": "data:image/bmp;base64,Qk0="}}
    assert second == pictures("PASS")["messages"][0]["content"][0]
    admitted, _ = once(r.emitted)
    assert [i.outcome for i in r.emitted.of(ImagePrepared)] == ["ok", "ok"]
    assert {i.id for i in r.emitted.of(ImagePrepared)} == {admitted.id}
    assert (admitted.expected.images, admitted.expected.image_tokens) == (2, 154)


async def test_an_image_that_would_not_shrink_goes_on_as_it_came(rig: Any, serve: Any) -> None:
    """At a model's published limit the body stays as it came, no worker is asked, and the image counts its tokens."""
    received: list[bytes] = []

    async def keep(request: web.BaseRequest) -> web.StreamResponse:
        received.append(await request.read())
        return web.json_response({"choices": []})

    published = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": 3136,
        "max_pixels": 12_845_056,
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 2,
    }
    spec = families.from_config(published)
    assert spec is not None
    r = await rig(await serve(keep), images=ImageService("/nowhere", Settings(), spec))
    photo = base64.b64encode(synthetic_photos.photo(1280, 720)).decode()
    body = json.dumps(pictures(photo)).encode()
    async with r.client.post(r.url + "/v1/chat/completions", data=body) as got:
        assert got.status == 200
    assert received == [body]
    admitted, _ = once(r.emitted)
    [imaged] = r.emitted.of(ImagePrepared)
    assert (imaged.outcome, imaged.format, imaged.bytes_out, imaged.stages) == ("passed", "jpeg", 0, ())
    assert (admitted.expected.images, admitted.expected.image_tokens) == (1, spec.geometry(720, 1280).tokens)


async def test_the_name_of_an_image_is_one_tenants_and_cannot_be_computed(rig: Any, serve: Any) -> None:
    """An image keeps its name for a tenant; another tenant's differs; neither is a hash that a client can compute."""
    r = await rig(await serve(echo), images=Workers())

    async def name(tenant: str) -> str:
        headers = {"x-tenant-id": tenant}
        async with r.client.post(r.url + "/v1/chat/completions", json=pictures("AAAA"), headers=headers) as got:
            return str((await got.json(content_type=None))["messages"][0]["content"][0]["uuid"])

    first, again, other = await name("acme"), await name("acme"), await name("umbrella")
    assert first == again != other
    assert "h0" not in (first, other)


async def test_a_tenant_of_any_bytes_is_served(rig: Any, serve: Any) -> None:
    """Names in UTF-8 and in Latin-1, as old clients send them, are the same tenant; others in Latin-1 are others."""
    r = await rig(await serve(echo), images=Workers())
    body = json.dumps(pictures("AAAA")).encode()
    uuids = []
    for name in ("Zoë".encode(), "Zoë".encode("latin-1"), "Zoé".encode("latin-1")):
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx-tenant-id: %b\r\n" % name
        answer = await r.raw(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        uuids.append(json.loads(answer.partition(b"\r\n\r\n")[2])["messages"][0]["content"][0]["uuid"])
    assert uuids[0] == uuids[1] != uuids[2]
    assert [event.tenant for event in r.emitted.of(Admitted)] == ["Zoë", "Zoë", "Zoé"]


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
        (["AAAA"] * (MAX_IMAGES + 1), 400, "image_count", None),
    ],
)
async def test_images_that_cannot_be_taken(
    rig: Any, serve: Any, base64: list[str], status: int, code: str, imaged: str | None
) -> None:
    """A bad image or too many images end the request in OpenAI's form before the engine sees it."""
    r = await rig(await serve(echo), images=Workers())
    async with r.client.post(r.url + "/v1/chat/completions", json=pictures(*base64)) as got:
        assert (got.status, (await got.json())["error"]["code"]) == (status, code)
    admitted, settled = once(r.emitted)
    assert (settled.outcome, settled.error, settled.sent_at, admitted.mu) == ("rejected", code, None, 0.0)
    assert admitted.model == "m"
    if imaged:
        assert imaged in {i.outcome for i in r.emitted.of(ImagePrepared)}


@pytest.mark.parametrize("trouble", ["BUSY", "DIES"])
async def test_images_pass_as_they_came_while_no_worker_can_take_them(rig: Any, serve: Any, trouble: str) -> None:
    """Workers that are full, away, or killed with an image cost no request: the engine can decode it itself."""
    r = await rig(await serve(echo), images=Workers())
    async with r.client.post(r.url + "/v1/chat/completions", json=pictures(trouble)) as got:
        content = (await got.json(content_type=None))["messages"][0]["content"]
    assert content[0]["image_url"]["url"] == f"data:image/png;base64,{trouble}"
    assert once(r.emitted)[1].outcome == "ok"
    assert [i.outcome for i in r.emitted.of(ImagePrepared)] == ["passed"]


async def test_shared_memory_is_for_a_vllm_that_reads_it(rig: Any, serve: Any) -> None:
    """Images go through shared memory while there is a reader, else inline, decided per request; only to vLLM."""
    workers, reader = Workers(), [True, False, True]
    r = await rig(await serve(echo), images=workers, shm=lambda: reader.pop(0))
    for _ in range(3):
        async with r.client.post(r.url + "/v1/chat/completions", json=pictures("AAAA")) as got:
            assert got.status == 200
    assert workers.handed_over == [True, False, True]
    r = await rig(await serve(echo), images=workers, kind="sglang", shm=lambda: True)
    async with r.client.post(r.url + "/v1/chat/completions", json=pictures("AAAA")) as got:
        assert got.status == 200 and workers.handed_over[3:] == [False]


async def test_preprocess_says_how_to_switch_it_on(rig: Any, serve: Any) -> None:
    """/v1/preprocess is served if images are on; else it is a 404 in OpenAI's form that names the flag."""
    r = await rig(await serve(echo))
    async with r.client.post(r.url + "/v1/preprocess", data=b"x") as got:
        assert got.status == 404
        assert "--images" in (await got.json())["error"]["message"]

    async def served(request: Request) -> None:
        request.reply.begin(200, b"OK", [], body=await request.body.read())

    r = await rig(await serve(echo), preprocess=served)
    async with r.client.post(r.url + "/v1/preprocess", data=b"x") as got:
        assert await got.read() == b"x"


async def test_no_gpu_beside_an_engine_that_starts(rig: Any, serve: Any) -> None:
    """Images may use a GPU only under verdicts of an engine whose start is over and not about to come again."""
    workers = Workers()
    r = await rig(await serve(echo), images=workers)
    assert not workers.gpu
    allowed = []
    for verdict in STATES:
        r.relay.on_command(LoadReport("{}", "", verdict))
        allowed += [verdict] * workers.gpu
    assert allowed == ["idle", "progressing", "quiet", "suspect"]
