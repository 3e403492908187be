"""`POST /v1/preprocess` over HTTP: Hugging Face's processor is the truth for every byte of the tensors."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import torch
from aiohttp import web
from PIL import Image
from safetensors.torch import load
from yarl import URL

from sidecar.client import preprocess as client
from sidecar.errors import RequestError
from sidecar.events import Event, ImagePrepared
from sidecar.images.service import ImageService
from sidecar.images.shm_cache import ImageCache
from sidecar.images.tensor_budget import TensorBudget
from sidecar.kernels import families
from sidecar.relay import client_io, url_policy
from sidecar.relay.client_io import CLIENT_STALL_S
from sidecar.relay.http.client import Request
from sidecar.relay.http.server import Server as HttpServer
from sidecar.relay.media.fetch import Fetcher
from sidecar.relay.media.inline import MAX_IMAGES
from sidecar.relay.media.preprocess_api import SAFETENSORS, negotiate, preprocess
from sidecar.relay.outcomes import ClientStalled
from sidecar.tools import synthetic_photos

from .conftest import QWEN2_VL, Server
from .test_tiles import PHI, ROWS, theirs

PHOTOS = [synthetic_photos.photo(640, 480, 1), synthetic_photos.photo(333, 517, 2), synthetic_photos.photo(640, 480, 3)]


class Service:
    """A real HTTP server around preprocess(); `facts` is what it emitted."""

    def __init__(self, images: ImageService, chosen: Any) -> None:
        self.images = images
        self.chosen = chosen
        self.facts: list[Event] = []
        self.fetch: Any = None
        self.client_stall = CLIENT_STALL_S
        self.stalled = asyncio.Event()
        self.url = ""
        self.session: aiohttp.ClientSession

    async def handle(self, request: Request) -> None:
        try:
            await preprocess(request, self.images, self.chosen, self.facts.append, self.fetch, self.client_stall)
        except RequestError as e:
            client_io.refuse(request, e, "")
        except ClientStalled:
            self.stalled.set()
            client_io.hang_up(request, at_once=True)

    async def post(self, **request: Any) -> tuple[int, bytes, str]:
        """Status, body and content type of one request."""
        async with self.session.post(self.url, **request) as response:
            return response.status, await response.read(), response.content_type


@pytest.fixture
async def service(server: Server, images: ImageService) -> AsyncIterator[Service]:
    found = Service(images, replace(server.settings, max_body_bytes=900_000, image_max_bytes=500_000))
    listening = HttpServer(found.handle, lambda connection, error: connection.close())
    accepting = await asyncio.get_running_loop().create_server(listening, "127.0.0.1", 0)
    found.url = f"http://127.0.0.1:{accepting.sockets[0].getsockname()[1]}/v1/preprocess"
    async with aiohttp.ClientSession() as found.session:
        yield found
    accepting.close()
    await listening.close()


def truth(files: list[bytes], **options: Any) -> Any:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    processor = Qwen2VLImageProcessor(**{"max_pixels": QWEN2_VL["max_pixels"], **options})
    return processor(images=[Image.open(io.BytesIO(data)) for data in files], return_tensors="pt")


def same(body: bytes, files: list[bytes], **options: Any) -> bool:
    got, wanted = load(body), truth(files, **options)
    return set(got) == {"pixel_values", "image_grid_thw"} and all(
        got[name].dtype == wanted[name].dtype and torch.equal(got[name], wanted[name]) for name in got
    )


def url(data: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


def form(files: list[bytes], name: str = "image") -> aiohttp.FormData:
    data = aiohttp.FormData()
    for i, file in enumerate(files):
        data.add_field(name, file, filename=f"{i}.jpg", content_type="image/jpeg")
    return data


async def test_json_in_tensors_out(service: Service) -> None:
    """Images of several sizes come back as the processor's tensors, in order, equal to the last bit."""
    status, body, kind = await service.post(json={"images": [url(p) for p in PHOTOS]})
    assert (status, kind) == (200, SAFETENSORS)
    assert same(body, PHOTOS)


async def test_links_are_fetched_by_the_operators_rules(service: Service) -> None:
    """Links and data URLs keep their order; a link to an unlisted host or a broken link is refused by its place."""

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(body=PHOTOS[int(request.path[1:])]) if request.path != "/gone" else web.Response(status=404)

    runner = web.ServerRunner(web.Server(handle))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host = f"127.0.0.1:{runner.addresses[0][1]}"
    fetcher = Fetcher(url_policy.parse_domains(host), 500_000, is_permitted=lambda address: address == "127.0.0.1")
    service.fetch = fetcher.fetch
    listed = [f"http://{host}/0", url(PHOTOS[1]), f"http://{host}/2"]
    status, body, _ = await service.post(json={"images": listed})
    assert status == 200 and same(body, PHOTOS)
    for link, code in (("http://example.org/a.jpg", "image_url"), (f"http://{host}/gone", "image_url_failed")):
        status, body, _ = await service.post(json={"images": [listed[0], link]})
        error = json.loads(body)["error"]
        assert (status, error["code"]) == (400, code) and error["message"].startswith("images[1]")
    await fetcher.close()
    await runner.cleanup()


async def test_tensors_through_shared_memory(service: Service, server: Server, spec: Any, tmp_path: Path) -> None:
    """The named file holds the very bytes that the body would have had."""
    service.images = ImageService(server.path, service.chosen, spec, ImageCache(str(tmp_path), 1 << 28, b"key"))
    headers = {"x-sidecar-handoff": "shm"}
    status, body, kind = await service.post(json={"images": [url(p) for p in PHOTOS]}, headers=headers)
    assert (status, kind) == (200, "application/json")
    answer = json.loads(body)
    (segment,) = answer["segments"]
    file = tmp_path.parent / segment["name"]
    assert same(file.read_bytes(), PHOTOS) and file.stat().st_size == segment["bytes"]
    assert set(answer["tensors"]) == {"pixel_values", "image_grid_thw"}


async def test_every_form_of_request_gives_the_same_bytes(service: Service) -> None:
    """JSON, JSON with escaped slashes, multipart and a raw body give the same tensors."""
    escaped = json.dumps({"images": [url(PHOTOS[0])]}).replace("/", "\\/")
    answers = [
        await service.post(json={"images": [url(PHOTOS[0])]}),
        await service.post(data=escaped, headers={"content-type": "application/json"}),
        await service.post(data=form(PHOTOS[:1])),
        await service.post(data=PHOTOS[0], headers={"content-type": "image/jpeg"}),
    ]
    assert [status for status, _, _ in answers] == [200] * 4
    assert len({body for _, body, _ in answers}) == 1


async def test_multipart_keeps_the_order(service: Service) -> None:
    """Parts come back in the order in which they were sent."""
    _, body, _ = await service.post(data=form(PHOTOS[::-1]))
    assert same(body, PHOTOS[::-1])


async def test_a_client_that_does_not_read_its_tensors_is_hung_up_on(service: Service, server: Server) -> None:
    """A client that reads less than a megabyte in `client_stall` seconds is closed; one that reads gets all tensors."""
    service.client_stall = 0.3
    large = families.from_config(QWEN2_VL | {"max_pixels": 1_003_520})
    assert large is not None
    service.images = ImageService(server.path, server.settings, large)
    request = {"images": [url(synthetic_photos.photo(640, 480, 1))] * 4}
    async with service.session.post(service.url, json=request) as got:
        async with asyncio.timeout(20):
            await service.stalled.wait()
        with pytest.raises(aiohttp.ClientPayloadError):
            await got.read()
    service.client_stall = 60.0
    async with service.session.post(service.url, json=request) as got:
        assert len(await got.read()) == got.content_length


async def test_layout_alone(service: Service) -> None:
    """Accept: application/json gives shapes, dtypes and tokens that are those of the tensors, and no tensor."""
    _, body, _ = await service.post(data=form(PHOTOS))
    status, text, kind = await service.post(data=form(PHOTOS), headers={"accept": "application/json"})
    assert (status, kind) == (200, "application/json")
    layout, tensors = json.loads(text), load(body)
    assert set(layout) == {"processor", "tensors", "images"}
    assert {k: v["shape"] for k, v in layout["tensors"].items()} == {k: list(v.shape) for k, v in tensors.items()}
    assert {k: v["dtype"] for k, v in layout["tensors"].items()} == {"pixel_values": "F32", "image_grid_thw": "I64"}
    assert [i["grid_thw"] for i in layout["images"]] == tensors["image_grid_thw"].tolist()
    assert [i["tokens"] for i in layout["images"]] == [int(g.prod()) // 4 for g in tensors["image_grid_thw"]]


@pytest.mark.parametrize(
    "options",
    [
        {"do_normalize": False},
        {"do_rescale": False},
        {"do_rescale": False, "do_normalize": False},
        {"resample": 2},
        {"patch_size": 16, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]},
        {"merge_size": 1, "temporal_patch_size": 1},
    ],
    ids=str,
)
async def test_every_setting_of_the_processor(service: Service, server: Server, options: dict[str, Any]) -> None:
    """Rescaling, normalising, resampling, patch sizes: the tensors follow the model's configuration, dtype included."""
    spec = families.from_config({**QWEN2_VL, **options})
    assert spec is not None
    service.images = ImageService(server.path, server.settings, spec)
    _, body, _ = await service.post(data=form(PHOTOS[:2]))
    assert same(body, PHOTOS[:2], **options)


@pytest.mark.parametrize(
    "name",
    ["internvl", "llava-onevision", "llama-4", "gemma-4", "kimi-k2.5", "minicpm-v", "ovis-2", "lfm2-vl", "step-3.7"],
)
async def test_tiles_over_http(service: Service, server: Server, tmp_path: Path, name: str) -> None:
    """Tiles, padded rows, interleaved rows and bfloat16 are the same over HTTP and shm, and the layout names them."""
    row = ROWS[name]
    cache = ImageCache(str(tmp_path), 1 << 28, b"key")
    service.images = ImageService(server.path, service.chosen, row.spec(), cache)
    status, body, _ = await service.post(data=form(PHOTOS))
    assert status == 200
    pixels = [torch.from_numpy(np.array(Image.open(io.BytesIO(p)))).permute(2, 0, 1) for p in PHOTOS]
    got, wanted = load(body), theirs(row, *pixels)
    assert {k: (v.dtype, v.shape) for k, v in got.items()} == {k: (v.dtype, v.shape) for k, v in wanted.items()}
    assert all(torch.equal(got[k], wanted[k]) for k in wanted)
    _, answer, _ = await service.post(data=form(PHOTOS), headers={"x-sidecar-handoff": "shm"})
    layout = json.loads(answer)
    assert (tmp_path.parent / layout["segments"][0]["name"]).read_bytes() == body
    assert {k: v["shape"] for k, v in layout["tensors"].items()} == {k: list(v.shape) for k, v in wanted.items()}
    assert client.parse(memoryview(body)).images[0].tokens == layout["images"][0]["tokens"]


async def test_what_is_bfloat16_is_not_called_float32(service: Service, server: Server) -> None:
    """Llama 4's processor computes in bfloat16: nothing else is given out for it, bytes aside."""
    service.images = ImageService(server.path, server.settings, ROWS["llama-4"].spec())
    asked = [await service.post(data=form(PHOTOS[:1]), params={"values": v}) for v in ("float32", "uint8")]
    assert [status for status, _, _ in asked] == [400, 200]
    assert load(asked[1][1])["pixel_values"].dtype == torch.uint8


async def test_tensors_that_are_not_made_are_refused(service: Service, server: Server) -> None:
    """Tensors and layout alike: there is none."""
    service.images = ImageService(server.path, server.settings, PHI.spec())
    for accept in ("*/*", "application/json"):
        status, body, _ = await service.post(data=form(PHOTOS[:1]), headers={"accept": accept})
        assert status == 400 and b"floating point" in body


async def test_bytes_for_engines_that_normalise_themselves(service: Service) -> None:
    """?values=uint8 skips rescaling and normalising and has another hash; the default for this model is float32."""
    plain, floats, nothing = [
        await service.post(data=form(PHOTOS[:2]), params=p) for p in ({"values": "uint8"}, {"values": "float32"}, {})
    ]
    assert same(plain[1], PHOTOS[:2], do_rescale=False, do_normalize=False)
    assert floats[1] == nothing[1] and same(floats[1], PHOTOS[:2])
    hashes = [re.findall(rb"content_hash[^0-9a-f]+([0-9a-f]{32})", body[:2000]) for _, body, _ in (plain, floats)]
    assert len({*hashes[0], *hashes[1]}) == 4


@pytest.mark.parametrize(
    ("values", "name", "kind"), [("bfloat16", "BF16", torch.bfloat16), ("float16", "F16", torch.float16)]
)
async def test_values_in_half_precision(service: Service, values: str, name: str, kind: torch.dtype) -> None:
    """?values=bfloat16 and float16 are the floats as torch rounds them, named so in the file."""
    status, body, _ = await service.post(data=form(PHOTOS[:2]), params={"values": values})
    _, floats, _ = await service.post(data=form(PHOTOS[:2]))
    assert status == 200 and f'"dtype":"{name}"'.encode() in body[:2000]
    assert torch.equal(load(body)["pixel_values"], load(floats)["pixel_values"].to(kind))


async def test_one_fact_per_image(service: Service) -> None:
    """Every prepared image is reported once, with its format, bytes and stages."""
    await service.post(data=form(PHOTOS))
    facts = [fact for fact in service.facts if isinstance(fact, ImagePrepared)]
    assert [(f.format, f.outcome, f.bytes_in, f.id) for f in facts] == [("jpeg", "ok", len(p), "") for p in PHOTOS]
    assert all(f.bytes_out > 0 and dict(f.stages)["decode"] > 0 for f in facts)


BAD: dict[str, tuple[dict[str, Any], int, str]] = {
    "broken image": ({"data": b"\xff\xd8\xff", "headers": {"content-type": "image/jpeg"}}, 400, "image_broken"),
    "unknown format": ({"data": b"x" * 99, "headers": {"content-type": "image/x"}}, 400, "image_unknown_format"),
    "engine's format": ({"data": b"qoif" * 9, "headers": {"content-type": "image/qoi"}}, 400, "image_unsupported"),
    "link": ({"json": {"images": ["https://example.org/a.jpg"]}}, 400, "image_url"),
    "no list": ({"json": {"images": "x"}}, 400, "bad_request"),
    "no images": ({"json": {"images": []}}, 400, "bad_request"),
    "not an object": ({"json": [1]}, 400, "bad_request"),
    "not json": ({"data": b"{", "headers": {"content-type": "application/json"}}, 400, "bad_request"),
    "numbers": ({"json": {"images": [1, 2]}}, 400, "bad_request"),
    "too many": ({"json": {"images": [url(b"x")] * (MAX_IMAGES + 1)}}, 400, "image_count"),
    "other type": ({"data": b"x", "headers": {"content-type": "text/plain"}}, 400, "bad_request"),
    "other part": ({"data": form([b"x"], "file")}, 400, "bad_request"),
    "too many parts": ({"data": form([b"x"] * (MAX_IMAGES + 1))}, 400, "image_count"),
    "large part": ({"data": form([bytes(500_001)])}, 400, "image_too_large"),
    "no boundary": ({"data": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, "bad_request"),
    "cut multipart": (
        {"data": b"--b\r\nContent-Dis", "headers": {"content-type": "multipart/form-data; boundary=b"}},
        400,
        "bad_request",
    ),
    "large body": ({"data": bytes(900_001), "headers": {"content-type": "application/json"}}, 413, "body_too_large"),
    "large image": ({"data": bytes(500_001), "headers": {"content-type": "image/png"}}, 413, "body_too_large"),
    "no shm": (
        {"data": PHOTOS[0], "headers": {"content-type": "image/jpeg", "x-sidecar-handoff": "shm"}},
        501,
        "handoff_not_implemented",
    ),
    "values": (
        {"data": PHOTOS[0], "headers": {"content-type": "image/jpeg"}, "params": {"values": "int4"}},
        400,
        "bad_request",
    ),
    "accept": (
        {"data": PHOTOS[0], "headers": {"content-type": "image/jpeg", "accept": "text/html"}},
        406,
        "not_acceptable",
    ),
}


@pytest.mark.parametrize("name", BAD)
async def test_bad_requests_are_answered_in_openais_shape(service: Service, name: str) -> None:
    """Each fault has its status and code, and the next request is served."""
    request, status, code = BAD[name]
    got, body, _ = await service.post(**request)
    assert (got, json.loads(body)["error"]["code"]) == (status, code)
    assert (await service.post(data=form(PHOTOS[:1])))[0] == 200


@pytest.mark.parametrize("handoff", ["cuda-ipc", "pigeon", "shm, cuda-ipc"])
async def test_a_handoff_that_is_not_available_is_refused_with_the_one_that_is(service: Service, handoff: str) -> None:
    """501 with one line that names what was asked for and what there is instead."""
    status, body, _ = await service.post(data=form(PHOTOS[:1]), headers={"x-sidecar-handoff": handoff})
    error = json.loads(body)["error"]
    assert (status, error["code"]) == (501, "handoff_not_implemented")
    assert error["message"] == f"x-sidecar-handoff: {handoff!r} is not available; send shm, or omit the header"


@pytest.mark.parametrize(("handoff", "asked"), [("", 1), ("pigeon", 0)])
async def test_a_body_is_asked_for_once_and_only_where_it_is_wanted(service: Service, handoff: str, asked: int) -> None:
    """curl waits for 100 Continue above 1 MiB: a request that is refused by its head is never sent."""
    reader, writer = await asyncio.open_connection("127.0.0.1", URL(service.url).port)
    head = "POST /v1/preprocess HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: image/jpeg\r\n"
    head += f"content-length: {len(PHOTOS[0])}\r\n"
    head += f"accept: application/json\r\nx-sidecar-handoff: {handoff}\r\nexpect: 100-continue\r\n\r\n"
    writer.write(head.encode())
    said = await reader.readuntil(b"\r\n\r\n")
    if asked:
        writer.write(PHOTOS[0])
        said += await reader.read()
    assert said.count(b" 100 Continue") == asked and said.count(b" 200 OK") == asked
    writer.close()


async def test_a_multipart_body_without_a_length_is_bounded(service: Service) -> None:
    """Parts that are each within their bound are refused as soon as all together are not."""
    parts = form([bytes(450_000)] * 3)()

    async def chunked() -> AsyncIterator[bytes]:
        yield await parts.as_bytes()

    status, body, _ = await service.post(data=chunked(), headers=parts.headers)
    assert (status, json.loads(body)["error"]["code"]) == (413, "body_too_large")


async def test_tensors_that_wait_for_their_clients_are_bounded(service: Service) -> None:
    """A request over the limit must send less, one that meets others must retry; the budget is released."""
    size = len((await service.post(data=form(PHOTOS[:1])))[1])
    service.images.tensor_budget = TensorBudget(size)
    status, body, _ = await service.post(data=form(PHOTOS))
    assert (status, json.loads(body)["error"]["code"]) == (400, "tensors_too_large")
    with service.images.tensor_budget.for_request() as reserve:
        reserve(size // 2)
        status, body, _ = await service.post(data=form(PHOTOS[:1]))
        assert (status, json.loads(body)["error"]["code"]) == (503, "images_busy")
    assert (await service.post(data=form(PHOTOS[:1])))[0] == 200
    assert service.images.tensor_budget.held_bytes == 0


async def test_one_bad_image_fails_the_request_and_is_named(service: Service) -> None:
    """Among good images the bad one is named by its place."""
    status, body, _ = await service.post(json={"images": [url(PHOTOS[0]), url(b"nothing")]})
    assert status == 400
    assert "images[1]" in json.loads(body)["error"]["message"]
    assert [f.outcome for f in service.facts if isinstance(f, ImagePrepared)] == ["rejected"]


@pytest.mark.parametrize(
    ("accept", "want"),
    [
        ("", "tensors"),
        ("*/*", "tensors"),
        (SAFETENSORS, "tensors"),
        ("application/json", "layout"),
        ("text/html, application/json;q=0.9", "layout"),
        ("application/x-safetensors, application/json", "tensors"),
    ],
)
def test_the_first_form_that_we_have_is_taken(accept: str, want: str) -> None:
    """The Accept header chooses between tensors and their layout."""
    assert negotiate(accept) == want


@pytest.mark.filterwarnings("ignore::aiohttp.multipart.BadContentDispositionHeader")
async def test_a_multipart_body_cut_anywhere_is_a_bad_request(service: Service) -> None:
    """Wherever the body ends too soon, the answer is 400 and never 500."""
    small = synthetic_photos.photo(28, 28)
    body = (
        b'--b\r\nContent-Disposition: form-data; name="image"\r\nContent-Type: image/jpeg\r\n\r\n'
        + small
        + b"\r\n--b--\r\n"
    )
    headers = {"content-type": "multipart/form-data; boundary=b"}
    assert (await service.post(data=body, headers=headers))[0] == 200
    for cut in (*range(1, 90, 7), len(body) // 2, len(body) - 12):
        status, text, _ = await service.post(data=body[:cut], headers=headers)
        assert status == 400, cut
        assert json.loads(text)["error"]["type"] == "invalid_request_error"
