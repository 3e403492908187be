"""One image through a real image server: the engine must see what it would have seen without the sidecar."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sidecar.errors import BadImage
from sidecar.images.protocol import RAW, ImageDone, ImageJob, ImageLimits
from sidecar.images.service import ImageService
from sidecar.images.worker import pipeline
from sidecar.kernels import families
from sidecar.kernels.grid import ProcessorSpec
from sidecar.tools import synthetic_photos

from .conftest import QWEN2_VL
from .test_families import Family
from .test_tiles import ROWS


@pytest.fixture(scope="module")
def processor() -> Any:
    """Hugging Face's torchvision-backend processor."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    found = Qwen2VLImageProcessor(max_pixels=QWEN2_VL["max_pixels"])
    assert found.backend == "torchvision"
    return found


def encoded(format: str, width: int, height: int, seed: int = 0) -> bytes:
    if format == "JPEG":
        return synthetic_photos.photo(width, height, seed)
    out = io.BytesIO()
    Image.fromarray(synthetic_photos.pixels(width, height, seed)).save(out, format)
    return out.getvalue()


SIZES = [
    ("JPEG", 1920, 1080),
    ("JPEG", 333, 517),
    ("PNG", 640, 480),
    ("WEBP", 370, 410),
    ("JPEG", 4000, 300),
    ("BMP", 56, 2800),
]
SMALL = [
    ("WEBP", 37, 41),
    ("PNG", 1, 1),
    ("BMP", 28, 1700),
    ("JPEG", 300, 200),
]  # which would not lose half of their pixels


@pytest.mark.parametrize(("format", "width", "height"), SIZES)
async def test_the_engine_sees_the_same_pixels(
    images: ImageService, processor: Any, format: str, width: int, height: int
) -> None:
    """The engine's processor gives the same bits for the prepared image as for the original."""
    data = encoded(format, width, height)
    got = await images.inline(base64.b64encode(data), "messages[0].content[1]")
    assert got.base64 is not None and got.outcome == "ok" and got.format == format.lower()
    assert got.media_type == "image/x-portable-pixmap"
    with (
        Image.open(io.BytesIO(base64.b64decode(got.base64, validate=True))) as ours,
        Image.open(io.BytesIO(data)) as theirs,
    ):
        assert (ours.width, ours.height, ours.mode) == (got.width, got.height, "RGB")
        a = processor(images=[ours], return_tensors="pt")
        b = processor(images=[theirs.convert("RGB")], return_tensors="pt")
    assert torch.equal(a["pixel_values"], b["pixel_values"])
    assert torch.equal(a["image_grid_thw"], b["image_grid_thw"])
    assert got.tokens == int(b["image_grid_thw"].prod()) // 4
    assert [stage for stage, _ in got.stages] == ["unpack", "decode", "resize", "encode"]
    assert got.bytes_in == len(data) and got.bytes_out == len(got.base64) and got.seconds > 0


@pytest.mark.parametrize(("format", "width", "height"), SMALL)
async def test_an_image_that_would_not_shrink_is_prepared_for_shared_memory_alone(
    images: ImageService, spec: ProcessorSpec, processor: Any, format: str, width: int, height: int
) -> None:
    """Inline it passes; as pixels in shared memory it gives what the original gives."""
    data = encoded(format, width, height)
    assert (await images.inline(base64.b64encode(data), "x")).outcome == "passed"
    done, payload = pipeline.prepare_image(
        ImageJob(RAW, spec.to_json(), False, ImageLimits(1 << 20, 1 << 20), 60.0), data
    )
    assert isinstance(done, ImageDone)
    ours = Image.frombytes("RGB", (done.width, done.height), bytes(payload))
    with Image.open(io.BytesIO(data)) as theirs:
        a = processor(images=[ours], return_tensors="pt")
        b = processor(images=[theirs.convert("RGB")], return_tensors="pt")
    assert torch.equal(a["pixel_values"], b["pixel_values"])


def png(picture: Image.Image, **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG", **options)
    return base64.b64encode(out.getvalue())


TRANSPARENT = {
    "alpha": png(Image.new("RGBA", (560, 560), (255, 0, 0, 254))),
    "a colour key": png(Image.new("RGB", (560, 560), (255, 0, 0)), transparency=(255, 0, 0)),
    "a grey key": png(Image.new("L", (560, 560), 9), transparency=9),
    "a palette": png(Image.new("RGB", (560, 560), (9, 8, 7)).quantize(4), transparency=0),
}


@pytest.mark.parametrize("name", TRANSPARENT)
async def test_transparent_parts_are_the_engines_matter(images: ImageService, name: str) -> None:
    """What is put behind them depends on the engine's version, libraries and settings: nothing takes their place."""
    with pytest.raises(BadImage) as refused:
        await images.inline(TRANSPARENT[name], "x")
    assert refused.value.reason == "image_transparent"
    [made] = await images.tensors([(TRANSPARENT[name], True)])
    assert made.prepared.outcome == "ok"


async def test_alpha_that_hides_nothing_is_left_out(images: ImageService) -> None:
    """An opaque image with an alpha channel, or with a key that no pixel has, is prepared like any other."""
    for data in (
        png(Image.new("RGBA", (560, 560), (255, 0, 0, 255))),
        png(Image.new("RGB", (560, 560), (255, 0, 0)), transparency=(0, 0, 1)),
    ):
        got = await images.inline(data, "x")
        assert got.base64 is not None
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(got.base64))))
        assert (pixels == (255, 0, 0)).all()


@pytest.mark.parametrize("how", [1, 6])
async def test_turned_photographs(images: ImageService, how: int) -> None:
    """A photograph with EXIF orientation 6 arrives upright: its sides are swapped."""
    got = await images.inline(base64.b64encode(synthetic_photos.photo(560, 280, exif_orientation=how)), "x")
    assert (got.width, got.height) == ((308, 140) if how == 1 else (140, 308))


async def test_the_hash_names_the_content_and_the_processor(server: Any, spec: ProcessorSpec) -> None:
    """Equal bytes and processor give an equal hash; another image or another processor gives another one."""
    other = families.from_config(QWEN2_VL | {"max_pixels": 168 * 168})
    assert other is not None
    first, second = (
        base64.b64encode(synthetic_photos.photo(640, 640, 1)),
        base64.b64encode(synthetic_photos.photo(640, 640, 2)),
    )
    ours = ImageService(server.path, server.settings, spec)
    hashes = [(await ours.inline(data, "x")).content_hash for data in (first, first, second)]
    hashes.append((await ImageService(server.path, server.settings, other).inline(first, "x")).content_hash)
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3


@pytest.mark.parametrize(
    ("data", "format"),
    [
        (b"\0\0\0 ftypavif" + b"\0" * 40, "heif"),
        (b"qoif" + b"\0" * 40, "qoi"),
        (b"P6 2 2 255 " + b"\0" * 12, "pnm"),
    ],
)
async def test_formats_of_the_engine_alone_pass(images: ImageService, data: bytes, format: str) -> None:
    """An image that is not decoded goes to the engine unchanged."""
    got = await images.inline(base64.b64encode(data), "x")
    assert (got.outcome, got.base64, got.format, got.tokens) == ("passed", None, format, 0)


async def test_a_shape_that_cannot_be_handed_over_exactly_passes(images: ImageService) -> None:
    """A strip that the processor would refuse once resized goes to the engine as it came, with its tokens known."""
    out = io.BytesIO()
    Image.new("L", (100, 19_000), 7).save(out, "PNG")
    got = await images.inline(base64.b64encode(out.getvalue()), "x")
    assert (got.outcome, got.base64) == ("passed", None)
    assert got.tokens > 0


@pytest.mark.parametrize("row", [row for row in ROWS.values() if not row.spec().inline], ids=lambda row: row.name)
async def test_families_that_tile_pass(server: Any, row: Family) -> None:
    """If tiles depend on the original's size, an image passes without being decoded, with known tokens."""
    spec = row.spec()
    images = ImageService(server.path, server.settings, spec)
    for how, size in ((1, (280, 560)), (6, (560, 280))):
        got = await images.inline(base64.b64encode(synthetic_photos.photo(560, 280, exif_orientation=how)), "x")
        assert (got.outcome, got.base64, got.tokens) == ("passed", None, spec.geometry(*size).tokens)
        assert [stage for stage, _ in got.stages] == ["unpack"]
    strange = await images.inline(base64.b64encode(b"\xff\xd8\xff"), "x")
    assert (strange.outcome, strange.tokens) == ("passed", 0), "its header has no size"


async def test_every_view_of_the_text_is_taken(images: ImageService) -> None:
    """bytes, bytearray and a memoryview into a body give the same image."""
    data = base64.b64encode(synthetic_photos.photo(840, 840))
    body = b'{"url": "' + data + b'"}'
    views = (data, bytearray(data), memoryview(body)[9 : 9 + len(data)])
    (made,) = {bytes((await images.inline(view, "x")).base64 or b"") for view in views}
    assert made


async def test_a_refused_image_is_named_with_its_limit(images: ImageService) -> None:
    """The error says which part, which limit and what to do, as OpenAI's shape with the reason as code."""
    out = io.BytesIO()
    Image.new("L", (5000, 5000)).save(out, "PNG")
    with pytest.raises(BadImage) as refused:
        await images.inline(base64.b64encode(out.getvalue()), "messages[3].content[0]")
    error = refused.value.body()["error"]
    assert error["code"] == "image_too_many_pixels" and error["type"] == "invalid_request_error"
    assert "messages[3].content[0]" in error["message"] and "20000000" in error["message"]
