"""`POST /v1/preprocess`: images in, the model's processor output out; or videos (video_api).

In: JSON `{"images": ["data:image/jpeg;base64,...", ...]}`, also with links if --image-urls allows them; multipart with
one part named `image` per image; or one raw body of type `image/*`. Out: safetensors with the processor's own names,
images in their order; or JSON with the layout only. With `x-sidecar-handoff: shm`: the layout and the name of a
safetensors file in shared memory, which its reader removes. `?values=uint8` skips rescaling and normalizing, for
engines that do both on their device.

Rules: what is read is bounded before it is kept. Base64 text is never parsed here. Tensors are written to the client
as they came from the workers, one after the other, and never joined. The bytes that wait for their clients are
bounded, too.
"""

from __future__ import annotations

import asyncio
import json
import math
import struct
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, Final
from urllib.parse import parse_qs

from aiohttp import BodyPartReader, MultipartReader, StreamReader
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_exceptions import HttpProcessingError

from sidecar.errors import BadImage, RequestError
from sidecar.events import Event, ImagePrepared
from sidecar.images import tensor_layout
from sidecar.images.protocol import LAYOUT, TENSORS, Data, VideoDone
from sidecar.images.service import ImageService, PreparedTensors, SentVideo
from sidecar.kernels.families.videos import VideoSpec
from sidecar.kernels.grid import ProcessorSpec
from sidecar.relay import body_thread, client_io, headers, request_body
from sidecar.relay.http.client import Request
from sidecar.relay.media import video_api
from sidecar.relay.media.inline import Fetch, all_of, check_count, failure
from sidecar.settings import Settings

SAFETENSORS: Final = "application/x-safetensors"
JSON: Final = "application/json"
HANDOFF_HEADER: Final = "x-sidecar-handoff"
DTYPES: Final = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # `values` -> safetensors dtype
BASE64_MARK: Final = b";base64,"
MAX_DATA_URL_HEAD_BYTES: Final = 256  # a data URL before its base64 text

Source = tuple[Data, bool]  # an image, and whether it is base64 text
Emit = Callable[[Event], None]


class BadRequest(RequestError, code="bad_request"):
    """The request is not in one of the three forms."""


class NotAcceptable(RequestError, code="not_acceptable", status=406):
    """The client accepts no form that is available."""


class NotImplementedHere(RequestError, code="handoff_not_implemented", status=501):
    """A hand-off that is unknown, or not available here."""


async def preprocess(
    request: Request,
    images: ImageService,
    settings: Settings,
    emit: Emit,
    fetch: Fetch | None = None,
    client_stall: float = client_io.CLIENT_STALL_S,
    video_spec: VideoSpec | None = None,
) -> None:
    """Serve one request; emit one ImagePrepared per image. `fetch` gets images behind links. Raises RequestError."""
    handoff = request.fields.get(HANDOFF_HEADER.encode())
    if handoff not in ("", "shm"):
        raise NotImplementedHere(f"{HANDOFF_HEADER}: {handoff[:16]!r} is not available; send shm, or omit the header")
    want = TENSORS if handoff else negotiate(request.fields.get(b"accept"))
    tenant = headers.tenant(request.fields, settings.tenant_header.lower().encode("latin-1"))
    sources = await _read_sources(request, settings, fetch)
    with images.tensor_budget.for_request() as reserve:
        if sources and isinstance(sources[0], SentVideo):
            if video_spec is None:
                raise BadRequest("videos are not available for this model: its video processor is not known")
            made = with_values(video_spec, _query(request, "values"))
            assert isinstance(made, VideoSpec)
            choice = video_api.frames_of(*(_query(request, name) for name in ("num_frames", "fps", "sampling")))
            videos = [source for source in sources if isinstance(source, SentVideo)]
            work = images.videos(videos, made, choice, want=want, tenant=tenant, reserve=reserve)
            layout, pieces = await _videos(work, videos, made, emit)
        else:
            if not images.spec.tensors:
                raise BadRequest("tensors are not available for this model: its processor resizes in floating point")
            spec = with_values(images.spec, _query(request, "values"))
            files = [source for source in sources if not isinstance(source, SentVideo)]
            if not files:
                raise BadRequest(
                    "no image in the request; send one as a data URL, a part named image, or a body of type image/*"
                )
            prepared = images.tensors(files, want=want, tenant=tenant, spec=spec, reserve=reserve)
            done = await _report(prepared, files, emit)
            layout, pieces = _layout(done, spec), partial(_pieces, done, spec)
        if want == LAYOUT:
            client_io.send_json(request, layout)
            return
        head, size = _safetensors_head(layout)
        if not handoff:
            fields = [(b"content-type", SAFETENSORS.encode()), (b"content-length", b"%d" % size)]
            request.reply.begin(200, b"OK", fields)
            request.reply.write(head)
            await client_io.send_long(request, pieces(), client_stall)
            return
        file = await images.share(head, *chain.from_iterable(pieces()))
        if file is None:
            raise NotImplementedHere(
                f"{HANDOFF_HEADER}: no shared memory available (see --image-cache-bytes); omit the header"
            )
        segment = {"name": f"{file.folder}/{file.name}", "format": "safetensors", "bytes": size}
        client_io.send_json(request, layout | {"segments": [segment]})


async def _videos(
    work: Awaitable[list[tuple[VideoDone, Data]]], videos: Sequence[SentVideo], spec: VideoSpec, emit: Emit
) -> tuple[dict[str, Any], Callable[[], Iterator[list[Data]]]]:
    """The layout of a request's videos and the bytes of their tensors, with one event per video."""
    started = time.monotonic()
    try:
        done = await work
    except RequestError as e:
        emit(failure("", e, started, sum(len(video.data) for video in videos)))
        raise
    now = time.monotonic()
    for video, values in done:
        sizes = video.bytes_in, len(values)
        emit(ImagePrepared("", now, video.format, "ok", now - started, video.stages, *sizes))
    geometries = [spec.video(len(video.indices), *video.original) for video, _ in done]

    def pieces() -> Iterator[list[Data]]:
        yield from tensor_layout.integers(spec.integers(geometries).values())
        yield from tensor_layout.pieces([values for _, values in done], geometries, spec)

    return video_api.layout([video for video, _ in done], spec), pieces


def _query(request: Request, name: str) -> str:
    """A parameter of the query; "" if it is not there."""
    query = parse_qs(request.target.partition(b"?")[2].decode("latin-1"))
    return query.get(name, [""])[0]


def with_values(spec: ProcessorSpec, values: str) -> ProcessorSpec:
    """The processor whose `pixel_values` have the requested type; "": the model's own. Raises BadRequest."""
    if values == "uint8":
        return replace(spec, do_rescale=False, do_normalize=False)
    wanted = DTYPES.get(values, spec.dtype if values == "" else "")
    rounded = replace(spec, half=wanted) if wanted in ("BF16", "F16") and spec.dtype == "F32" else spec
    if rounded.dtype != wanted:
        raise BadRequest(
            "values: send uint8; or float32, bfloat16 or float16 if the model's processor makes float32; or omit it"
        )
    return rounded


def negotiate(accept: str) -> str:
    """TENSORS or LAYOUT, by the Accept header. Raises NotAcceptable."""
    types = [part.partition(";")[0].strip().lower() for part in accept.split(",")]
    for kind in types:
        if kind in ("", "*/*", "application/*", "application/octet-stream", SAFETENSORS):
            return TENSORS
        if kind == JSON:
            return LAYOUT
    raise NotAcceptable(f"accept: send {SAFETENSORS} for tensors, or {JSON} for their layout only")


def _layout(done: list[PreparedTensors], spec: ProcessorSpec) -> dict[str, Any]:
    """The JSON form: names, shapes, dtypes, and each image in its final size."""
    shapes = spec.shapes([spec.geometry(*t.prepared.original) for t in done])
    return {
        "processor": spec.fingerprint,
        "tensors": {name: {"dtype": dtype, "shape": shape} for name, (dtype, shape) in shapes.items()},
        "images": [
            {
                "format": image.format,
                "height": image.height,
                "width": image.width,
                "grid_thw": list(image.grid),
                "tokens": image.tokens,
                "content_hash": image.content_hash,
            }
            for image in (t.prepared for t in done)
        ],
    }


def _safetensors_head(layout: dict[str, Any]) -> tuple[bytes, int]:
    """A safetensors file up to its tensors (length and JSON header), and the bytes of all of it."""
    kind = "videos" if "videos" in layout else "images"
    listed = json.dumps(layout[kind], separators=(",", ":"))  # metadata values are strings
    header: dict[str, Any] = {"__metadata__": {"processor": layout["processor"], kind: listed}}
    at = 0
    for name, tensor in layout["tensors"].items():
        end = at + tensor_layout.ELEMENT_BYTES[tensor["dtype"]] * math.prod(tensor["shape"])
        header[name] = {**tensor, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format requires aligned data
    return struct.pack("<Q", len(text)) + text, 8 + len(text) + at


def _pieces(done: list[PreparedTensors], spec: ProcessorSpec) -> Iterator[list[Data]]:
    """The bytes of all tensors, in groups: integers first."""
    images = [spec.geometry(*t.prepared.original) for t in done]  # by the same rules as in the worker
    yield from tensor_layout.integers(spec.integers(images).values())
    yield from tensor_layout.pieces([t.values for t in done], images, spec)


async def _report(work: Awaitable[list[PreparedTensors]], sources: list[Source], emit: Emit) -> list[PreparedTensors]:
    """The result of `work`, with one event per image."""
    started = time.monotonic()
    try:
        done = await work
    except RequestError as e:
        emit(failure("", e, started, sum(len(data) for data, _ in sources)))
        raise
    for p in (t.prepared for t in done):
        emit(ImagePrepared("", time.monotonic(), p.format, p.outcome, p.seconds, p.stages, p.bytes_in, p.bytes_out))
    return done


async def _read_sources(request: Request, settings: Settings, fetch: Fetch | None) -> Sequence[Source | SentVideo]:
    """The request's images, at most MAX_IMAGES of them, or its videos."""
    kind = request.fields.media_type()
    if kind.startswith("video/"):
        return [SentVideo(await client_io.read(request, settings.image_max_bytes, flag="--image-max-bytes"))]
    if kind.startswith("image/"):
        return [(await client_io.read(request, settings.image_max_bytes, flag="--image-max-bytes"), False)]
    if kind == "multipart/form-data":
        return await _read_parts(request, settings)
    if kind == JSON:
        body = await client_io.read(request, settings.max_body_bytes)
        videos = await body_thread.run(video_api.listed_videos, body)
        if videos is not None:
            return await _fetch_links(videos, fetch, "videos")
        return await _fetch_links(await body_thread.run(_parse_images, body), fetch)
    raise BadRequest(f"content-type: send {JSON}, multipart/form-data, image/* or video/*")


async def _fetch_links(
    listed: Sequence[Source | SentVideo | str], fetch: Fetch | None, name: str = "images"
) -> list[Source | SentVideo]:
    """The images or videos; links are fetched concurrently. Raises BadImage or ImagesBusy, and cancels the others."""

    async def load(source: Source | SentVideo | str, where: str) -> Source | SentVideo:
        if not isinstance(source, str):
            return source
        if fetch is None:
            text = "links are not fetched here (--image-urls); send a base64 data URL"
            raise BadImage(f"{where}: {text}", "image_url")
        data = await fetch(source, where)
        return SentVideo(data) if name == "videos" else (data, False)

    return await all_of(load(source, f"{name}[{i}]") for i, source in enumerate(listed))


def _parse_images(body: bytes) -> list[Source | str]:
    """The images of the JSON form, and the links among them. Raises BadRequest or BadImage."""
    listed = request_body.listed_images(body)
    if listed is None:
        raise BadRequest('the body must be a JSON object such as {"images": ["data:image/jpeg;base64,..."]}')
    count, images = listed
    check_count(count)
    return [image if isinstance(image, str) else (_base64_of(image, i), True) for i, image in enumerate(images)]


def _base64_of(view: memoryview, index: int) -> memoryview:
    at = bytes(view[:MAX_DATA_URL_HEAD_BYTES]).find(BASE64_MARK)
    if at < 0 or bytes(view[:5]) != b"data:":
        raise BadImage(f"images[{index}]: neither a base64 data URL nor a link", "image_url")
    return view[at + len(BASE64_MARK) :]


async def _read_parts(request: Request, settings: Settings) -> list[Source]:
    """The parts named `image`. Raises BadRequest, BadImage or BodyTooLarge."""
    body = StreamReader(BaseProtocol(asyncio.get_running_loop()), limit=1 << 30)
    body.feed_data(await client_io.read(request, settings.max_body_bytes))
    body.feed_eof()
    found: list[Source] = []
    try:
        async for part in MultipartReader({"Content-Type": request.fields.get(b"content-type")}, body):
            if not isinstance(part, BodyPartReader) or part.name != "image":
                raise BadRequest("multipart: every part must be named image and hold one image")
            check_count(len(found) + 1)
            found.append((await _read_part(part, settings.image_max_bytes, len(found)), False))
    except (ValueError, AssertionError, HttpProcessingError):  # what aiohttp raises
        raise BadRequest("multipart: the body is cut off or has no boundary") from None
    return found


async def _read_part(part: BodyPartReader, max_bytes: int, index: int) -> bytearray:
    data = bytearray()
    while chunk := await part.read_chunk(1 << 16):
        data += chunk
        if len(data) > max_bytes:
            raise BadImage(f"images[{index}]: the image was refused: the limit is {max_bytes} bytes", "image_too_large")
    return data
