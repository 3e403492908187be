"""Videos through `POST /v1/preprocess` and a confined worker: every value is the processor's of what vLLM decodes."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from json import dumps
from typing import Any

import aiohttp
import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load

from sidecar.errors import BadImage, RequestError
from sidecar.events import Event, ImagePrepared
from sidecar.images.protocol import TENSORS, ImageLimits, ImageRefused, VideoDone, VideoJob
from sidecar.images.service import FrameChoice, ImageService, SentVideo
from sidecar.images.worker import video_decode, video_pipeline
from sidecar.kernels.families.videos import VideoSpec
from sidecar.kernels.grid import ProcessorSpec
from sidecar.relay import client_io
from sidecar.relay.http.client import Request
from sidecar.relay.http.server import Server as HttpServer
from sidecar.relay.media.preprocess_api import preprocess
from sidecar.tools.synthetic_photos import photo
from tests.waiting import PATIENCE

from . import clips
from .conftest import Server
from .test_video_families import ours, theirs

FAMILIES = pytest.mark.parametrize("name", ["qwen2.5-vl, small", "qwen3-vl, small"])


def vllm_frames(data: bytes, indices: list[int]) -> np.ndarray[Any, Any]:
    """The frames as vLLM 0.32 reads them: OpenCV with its own number of threads, all frames in order."""
    capture = cv2.VideoCapture(io.BytesIO(data), cv2.CAP_FFMPEG, [])
    made = []
    for at in range(max(indices) + 1):
        assert capture.grab()
        if at in indices:
            good, frame = capture.retrieve()
            assert good
            made.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
    return np.stack(made)


class Service:
    """A real HTTP server around preprocess() for one video processor."""

    def __init__(self, images: ImageService, chosen: Any) -> None:
        self.images, self.chosen = images, chosen
        self.facts: list[Event] = []
        self.spec: VideoSpec | None = None
        self.url = ""
        self.session: aiohttp.ClientSession

    async def handle(self, request: Request) -> None:
        try:
            await preprocess(request, self.images, self.chosen, self.facts.append, video_spec=self.spec)
        except RequestError as e:
            client_io.refuse(request, e, "")

    async def post(self, query: str = "", json: Any = None, **request: Any) -> tuple[int, bytes]:
        if json is not None:
            request["data"] = io.BytesIO(dumps(json).encode())
            request["headers"] = {"content-type": "application/json"} | request.get("headers", {})
        async with self.session.post(self.url + query, **request) as response:
            return response.status, await response.read()

    async def refused(self, query: str = "", **request: Any) -> str:
        status, body = await self.post(query, **request)
        assert status == 400, body[:200]
        return str(json.loads(body)["error"]["code"])


@pytest.fixture
async def service(server: Server, spec: ProcessorSpec) -> AsyncIterator[Service]:
    chosen = replace(server.settings, max_body_bytes=8 << 20, image_max_bytes=2 << 20)
    found = Service(ImageService(server.path, chosen, spec), chosen)
    listening = HttpServer(found.handle, lambda connection, error: connection.close())
    accepting = await asyncio.get_running_loop().create_server(listening, "127.0.0.1", 0)
    found.url = f"http://127.0.0.1:{accepting.sockets[0].getsockname()[1]}/v1/preprocess"
    async with aiohttp.ClientSession() as found.session:
        yield found
    accepting.close()
    await listening.close()


def url(data: bytes, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def made_of(body: bytes) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """The tensors of an answer and its metadata."""
    length = int.from_bytes(body[:8], "little")
    return load(body), json.loads(json.loads(body[8 : 8 + length])["__metadata__"]["videos"])


@FAMILIES
@pytest.mark.parametrize("kind", ["mp4, B-frames", "webm, VP9", "mkv", "avi", "mp4 in fragments"])
async def test_a_video_gives_the_processors_tensors(service: Service, name: str, kind: str) -> None:
    """Sampled as vLLM does, decoded as it does, laid out as the processor does: every value, and the times."""
    service.spec = ours(name)
    data = clips.clip(kind, 47, 322, 182, 24)
    status, body = await service.post(json={"videos": [url(data)]})
    assert status == 200, body[:300]
    tensors, (video,) = made_of(body)
    indices = video["frames_indices"]
    expected = theirs(name)(videos=[vllm_frames(data, indices)], do_sample_frames=False, return_tensors="pt")
    assert set(tensors) == {"pixel_values_videos", "video_grid_thw"}
    assert torch.equal(tensors["video_grid_thw"], expected["video_grid_thw"])
    assert torch.equal(tensors["pixel_values_videos"], expected["pixel_values_videos"])
    assert len(indices) == 4  # two a second, and at least so many
    if name.startswith("qwen3"):
        assert video["timestamps"] == service.spec.timestamps(indices, video["fps"])
    else:
        assert video["second_per_grid_ts"] == pytest.approx(2 / (4 / 47 * 24))


@FAMILIES
async def test_frames_by_count_and_rate(service: Service, name: str) -> None:
    """`num_frames` and `fps` choose frames as vLLM does, `sampling=processor` as the processor alone does."""
    service.spec = ours(name)
    data = clips.clip("mp4", 60)
    for query, indices in {
        "?num_frames=8": {
            "qwen2": [0, 7, 15, 22, 30, 37, 45, 52],
            "qwen3": [0, 8, 17, 25, 34, 42, 51, 59],
        },
        "?fps=3": {"qwen2": [0, 10, 20, 30, 40, 50], "qwen3": [0, 12, 24, 35, 47, 59]},
    }.items():
        status, body = await service.post(query, json={"videos": [url(data)]})
        assert status == 200, body[:300]
        tensors, (video,) = made_of(body)
        assert video["frames_indices"] == indices[name[:5]]
        expected = theirs(name)(
            videos=[vllm_frames(data, video["frames_indices"])], do_sample_frames=False, return_tensors="pt"
        )
        assert torch.equal(tensors["pixel_values_videos"], expected["pixel_values_videos"])


@FAMILIES
async def test_a_list_of_jpegs_gives_the_processors_tensors(service: Service, name: str) -> None:
    """`data:video/jpeg`, an odd number of frames: decoded as images are, one frame a second."""
    service.spec = ours(name)
    photos = [photo(300, 200, n) for n in range(5)]
    listed = "data:video/jpeg;base64," + ",".join(base64.b64encode(data).decode() for data in photos)
    status, body = await service.post(json={"videos": [listed]})
    assert status == 200, body[:300]
    tensors, (video,) = made_of(body)
    frames = np.stack([np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in photos])
    expected = theirs(name)(videos=[frames], do_sample_frames=False, return_tensors="pt")
    assert torch.equal(tensors["pixel_values_videos"], expected["pixel_values_videos"])
    assert (video["format"], video["fps"], video["frames_indices"]) == ("jpegs", 1.0, [0, 1, 2, 3, 4])


async def test_several_videos_and_other_values(service: Service) -> None:
    """Videos of one request keep their order; uint8 skips the processor's last steps; a raw body is a video."""
    service.spec = ours("qwen3-vl, small")
    files = [clips.clip("mp4", 30), clips.clip("mkv", 60, 200, 300)]
    status, body = await service.post("?values=uint8", json={"videos": [url(data) for data in files]})
    assert status == 200, body[:300]
    tensors, found = made_of(body)
    frames = [vllm_frames(data, video["frames_indices"]) for data, video in zip(files, found, strict=True)]
    expected = theirs("qwen3-vl, small")(
        videos=frames, do_sample_frames=False, do_rescale=False, do_normalize=False, return_tensors="pt"
    )
    assert torch.equal(tensors["video_grid_thw"], expected["video_grid_thw"])
    assert torch.equal(tensors["pixel_values_videos"], expected["pixel_values_videos"].to(torch.uint8))
    status, raw = await service.post("?values=uint8", data=files[0], headers={"content-type": "video/mp4"})
    assert status == 200
    count = int(tensors["video_grid_thw"][0].prod())
    assert torch.equal(load(raw)["pixel_values_videos"], tensors["pixel_values_videos"][:count])
    assert [(e.format, e.outcome) for e in service.facts if isinstance(e, ImagePrepared)] == [
        ("mp4", "ok"),
        ("matroska", "ok"),
        ("mp4", "ok"),
    ]


async def test_the_layout_alone(service: Service) -> None:
    """JSON says names, shapes, frames and times, without a frame being decoded."""
    service.spec = ours("qwen3-vl, small")
    data = clips.clip("mp4", 30)
    status, body = await service.post(json={"videos": [url(data)]}, headers={"accept": "application/json"})
    assert status == 200
    answer = json.loads(body)
    (video,) = answer["videos"]
    rows = int(np.prod(video["grid_thw"]))
    assert answer["tensors"]["pixel_values_videos"] == {"dtype": "F32", "shape": [rows, 1536]}
    assert (video["total_num_frames"], len(video["timestamps"])) == (30, video["grid_thw"][0])


async def test_what_is_refused_says_why(service: Service) -> None:
    """No video processor, no video, damage, too much: a 400 with a code, and the workers live on."""
    good = clips.clip("mp4", 30)
    assert await service.refused(json={"videos": [url(good)]}) == "bad_request"
    service.spec = ours("qwen3-vl, small")
    for videos, code in {
        "no list": ("x", "bad_request"),
        "empty": ([], "bad_request"),
        "numbers": ([1], "bad_request"),
        "too many": ([url(good)] * 5, "image_count"),
        "link": (["http://example.org/a.mp4"], "image_url"),
        "no data URL": (["abc"], "image_url"),
        "base64": (["data:video/mp4;base64,????"], "image_base64"),
        "nothing": (["data:video/mp4;base64,"], "image_empty"),
        "a text": ([url(b"hello, this is no video")], "video_unknown_format"),
        "cut off": ([url(good[: len(good) // 2])], "video_broken"),
        "only a head": ([url(good[:64])], "video_broken"),
        "bytes": ([url(good + bytes(2 << 20))], "image_too_large"),
        "no JPEGs": (["data:video/jpeg;base64,AAAA,AAAA"], "video_broken"),
        "sizes differ": (
            ["data:video/jpeg;base64," + ",".join(base64.b64encode(photo(n, 64, 1)).decode() for n in (64, 96))],
            "video_broken",
        ),
        "one frame": (["data:video/jpeg;base64," + base64.b64encode(photo(64, 64, 1)).decode()], "video_frames"),
    }.values():
        assert await service.refused(json={"videos": videos}) == code, code
    both = "?num_frames=2&fps=1&sampling=processor"
    for query in ("?num_frames=999", "?num_frames=x", "?fps=-1", "?sampling=mine", both):
        assert await service.refused(query, json={"videos": [url(good)]}) == "bad_request"
    status, _ = await service.post(json={"videos": [url(good)]})
    assert status == 200


def test_a_long_video_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """All frames up to the last that is taken count; one that is within the limit is decoded."""
    data, sizes = clips.clip("mp4", 60), list[int]()
    monkeypatch.setattr(video_decode, "MAX_DECODED_PIXELS", 59 * 320 * 240)
    limits = ImageLimits(1 << 20, 1 << 20)
    job = VideoJob(TENSORS, ours("qwen3-vl, small").to_json(), False, limits, 9.0)
    refused, made = video_pipeline.run_job(job, data, sizes.append)
    assert isinstance(refused, ImageRefused)
    assert (refused.reason, bytes(made), sizes) == ("video_too_long", b"", [])
    monkeypatch.setattr(video_decode, "MAX_DECODED_PIXELS", 60 * 320 * 240)
    done, made = video_pipeline.run_job(job, data, sizes.append)
    assert isinstance(done, VideoDone)
    assert sizes[0] > 60 * 320 * 240  # those to make, too
    assert len(made) == 4 * 1536 * int(np.prod(done.grid))


@pytest.mark.parametrize("kind", clips.KINDS)
async def test_damaged_videos_end_no_worker(server: Server, spec: ProcessorSpec, kind: str) -> None:
    """Bytes changed anywhere: an answer or a refusal, never a worker that dies or hangs."""
    images = ImageService(server.path, server.settings, spec)
    async with asyncio.timeout(PATIENCE):
        while len(before := set(server.workers())) < server.settings.image_workers:  # noqa: ASYNC110  they start
            await asyncio.sleep(0.05)
    good = clips.clip(kind, 20)
    dice = np.random.default_rng(11)
    for _ in range(12):
        data = bytearray(good)
        for at in dice.integers(0, len(data), 30):
            data[at] = dice.integers(0, 256)
        with images.tensor_budget.for_request() as reserve:
            try:
                await images.videos([SentVideo(bytes(data))], ours("qwen3-vl, small"), FrameChoice(), reserve=reserve)
            except BadImage as e:
                assert e.reason not in ("image_failed", "image_deadline"), e
    assert set(server.workers()) == before
