"""Images of requests: replaced, named, refused."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from sidecar import images
from sidecar.engines.image_loading import ROWS
from sidecar.errors import UsageError
from sidecar.events import STATES, Admitted, ImagePrepared, LoadReport
from sidecar.images.pass_reasons import PASS_REASONS
from sidecar.images.service import ImageService
from sidecar.images.vllm_plugin import Handoffs, TensorOffer
from sidecar.kernels import families
from sidecar.launch.preflight import read_image_key
from sidecar.relay.http.client import Request
from sidecar.relay.media.image_refusals import Refusals
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


async def test_replicas_with_one_key_file_give_an_image_one_name(rig: Any, serve: Any, tmp_path: Path) -> None:
    """Engines that share KV blocks, and routers by prefix, find it again; tenants stay apart, and so do other keys."""
    names: dict[str, list[str]] = {"acme": [], "umbrella": []}
    for text in ("a secret of the whole fleet", "a secret of the whole fleet\n", "a secret of another fleet"):
        file = tmp_path / str(len(names["acme"]))
        file.write_text(text)
        key = read_image_key(Settings(image_key_file=str(file)))
        r = await rig(await serve(echo), images=Workers(), image_key=key)
        for tenant, found in names.items():
            headers = {"x-tenant-id": tenant}
            async with r.client.post(r.url + "/v1/chat/completions", json=pictures("AAAA"), headers=headers) as got:
                found.append((await got.json(content_type=None))["messages"][0]["content"][0]["uuid"])
    for found in names.values():
        assert found[0] == found[1] != found[2]
    assert not set(names["acme"]) & set(names["umbrella"])
    assert read_image_key(Settings()) != read_image_key(Settings()), "without a file each sidecar has its own"


@pytest.mark.parametrize("content", [b"", b"short\n", b" " * 100])
def test_a_key_that_can_be_guessed_is_refused(content: bytes, tmp_path: Path) -> None:
    """The error says how to make one, and nothing of the file."""
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(UsageError, match=r"--image-key-file.*urandom") as error:
        read_image_key(Settings(image_key_file=str(tmp_path / "key")))
    assert "short" not in str(error.value)


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


PASSED = {"BAD/": "unknown_format", "BUSY": "workers_busy", "DIES": "failed", "SCAN": "too_many_scans"}


@pytest.mark.parametrize("trouble", PASSED)
async def test_what_cannot_be_prepared_passes_as_it_came(rig: Any, serve: Any, trouble: str) -> None:
    """Workers that are full, or killed, and an image that they refuse, cost no request; the others are prepared."""
    r = await rig(await serve(echo), images=Workers())
    async with r.client.post(r.url + "/v1/chat/completions", json=pictures(trouble, "AAAA")) as got:
        content = (await got.json(content_type=None))["messages"][0]["content"]
    assert content[0] == pictures(trouble)["messages"][0]["content"][0]
    assert content[1]["image_url"]["url"] == "data:image/bmp;base64,Qk0="
    assert once(r.emitted)[1].outcome == "ok"
    done = {(event.outcome, event.reason) for event in r.emitted.of(ImagePrepared)}
    assert done == {("passed", PASSED[trouble]), ("ok", "")}


async def test_images_beyond_a_number_pass(rig: Any, serve: Any) -> None:
    """Engines take any number of images: the first are prepared, the others pass, and all are counted."""
    workers, count = Workers(), 3 * MAX_IMAGES
    r = await rig(await serve(echo), images=workers)
    async with r.client.post(r.url + "/v1/chat/completions", json=pictures(*["AAAA"] * count)) as got:
        content = (await got.json(content_type=None))["messages"][0]["content"]
    urls = [part["image_url"]["url"] for part in content]
    assert urls == ["data:image/bmp;base64,Qk0="] * MAX_IMAGES + ["data:image/png;base64,AAAA"] * (count - MAX_IMAGES)
    assert len(workers.handed_over) == MAX_IMAGES
    reasons = [event.reason for event in r.emitted.of(ImagePrepared)]
    assert sorted(reasons) == [""] * MAX_IMAGES + ["count"] * (count - MAX_IMAGES)
    assert once(r.emitted)[0].expected.images == count


OWN_OPTIONS: dict[str, dict[str, Any]] = {
    "a part": {"max_pixels": 50176},
    "its URL": {"image_url": {"url": "data:image/png;base64,AAAA", "min_pixels": 3136}},
    "a long part": {"note": "x" * 10_000},
}


@pytest.mark.parametrize("place", OWN_OPTIONS)
async def test_a_part_that_sets_its_own_processing_passes(rig: Any, serve: Any, place: str) -> None:
    """Sizes in an image's part are the engine's to read; the part next to it is prepared."""
    r = await rig(await serve(echo), images=Workers())
    body = pictures("AAAA", "AAAA", detail="low")
    body["messages"][0]["content"][0] |= OWN_OPTIONS[place]
    sent = json.loads(json.dumps(body))["messages"][0]["content"][0]
    async with r.client.post(r.url + "/v1/chat/completions", json=body) as got:
        first, second = (await got.json(content_type=None))["messages"][0]["content"]
    assert first == sent and second["image_url"]["url"] == "data:image/bmp;base64,Qk0="
    assert {event.reason for event in r.emitted.of(ImagePrepared)} == {"own_options", ""}


async def test_a_request_that_sets_its_own_processing_is_counted(rig: Any, serve: Any) -> None:
    """With mm_processor_kwargs the body goes on as it came, and its images are counted as passed."""
    r = await rig(await serve(echo), images=Workers())
    body = json.dumps(pictures("AAAA") | {"mm_processor_kwargs": {"max_pixels": 50176}}).encode()
    async with r.client.post(r.url + "/v1/chat/completions", data=body) as got:
        assert await got.read() == body
    assert [event.reason for event in r.emitted.of(ImagePrepared)] == ["own_options"]


async def test_a_plug_in_that_takes_tensors_has_compared_sizes(rig: Any, serve: Any) -> None:
    """No canary image is needed then. One that only reads pixels proves nothing, nor does any where sizes differ."""
    offer, workers = TensorOffer("", "U8", 1, 1), Workers()
    taken = [Handoffs(True, offer)]
    r = await rig(await serve(echo), images=workers, shm=lambda: taken[0])
    for handoffs, reason, prepared in (
        (Handoffs(True, offer), "size_unchecked", 1),
        (Handoffs(True), "size_unchecked", 0),
        (Handoffs(True, offer), "size_differs", 0),
    ):
        taken[0] = handoffs
        workers.handed_over.clear()
        r.relay.on_command(LoadReport("{}", "", "idle", "vllm", images_pass=reason))
        async with r.client.post(r.url + "/v1/chat/completions", json=pictures("AAAA")) as got:
            assert (b"Qk0=" in await got.read()) == bool(prepared)
        assert len(workers.handed_over) == prepared


async def test_images_pass_to_an_engine_that_is_not_known(rig: Any, serve: Any) -> None:
    """Until control says what the engine is, and where it says that images are to pass, no worker is asked."""
    workers = Workers()
    r = await rig(await serve(echo), images=workers)
    for reason in ("engine_unknown", "size_differs"):
        r.relay.on_command(LoadReport("{}", "", "idle", "vllm", images_pass=reason))
        async with r.client.post(r.url + "/v1/chat/completions", json=pictures("AAAA")) as got:
            assert await got.json(content_type=None) == pictures("AAAA")
    assert workers.handed_over == []
    assert [event.reason for event in r.emitted.of(ImagePrepared)] == ["engine_unknown", "size_differs"]
    assert Refusals().passing == "engine_unknown"


def test_every_reason_is_said_in_words() -> None:
    """What a worker or the queue refuses an image with has a text, and so has each reason of an engine."""
    source = "".join(path.read_text() for path in Path(images.__file__).parent.rglob("*.py"))
    refused = set(re.findall(r'ImageRejected\(\s*"image_(\w+)"', source)) | set(re.findall(r'"image_(\w+)"', source))
    assert refused - {"url", "invalid", "unsupported", "processor_type"} <= set(PASS_REASONS)
    assert {row.reason for row in ROWS} - {""} <= set(PASS_REASONS)


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
    allowed = []
    for verdict in STATES:
        r.relay.on_command(LoadReport("{}", "", verdict))
        allowed += [verdict] * workers.gpu
    assert allowed == ["idle", "progressing", "quiet", "suspect"]
