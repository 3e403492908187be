"""Images are prepared inline if they lose half of their pixels and the body stays bounded; others pass at no cost."""

from __future__ import annotations

import base64
import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sidecar.images import header_geometry
from sidecar.images.protocol import PIXELS, RAW, ImageDone, ImageJob, ImageLimits
from sidecar.images.service import ImageService
from sidecar.images.worker import pipeline
from sidecar.kernels import families
from sidecar.kernels.grid import ProcessorSpec
from sidecar.relay.media.inline import originals, replacements
from sidecar.relay.request_body import ImagePart
from sidecar.settings import Settings
from sidecar.tools import synthetic_photos

from . import jpegs
from .corpus import saved
from .published import PUBLISHED

LIMITS = ImageLimits(20 << 20, 50_000_000)
EXIF = b"Exif\0\0" + bytes(60_000)
NOWHERE = "/nowhere"  # no image worker listens there


def published(name: str) -> ProcessorSpec:
    """The processor of a published model."""
    config, model, _ = PUBLISHED[name]
    found = families.from_config(config or model["image_processor"], model)
    assert found is not None
    return found


def flat(width: int, height: int) -> bytes:
    """A PNG of one colour, which is next to nothing."""
    return saved(Image.new("RGB", (width, height), (1, 2, 3)), "PNG")


# model, width, height -> whether a photograph of this size is prepared inline
ACTS = [
    ("Qwen2.5-VL", 1280, 720, False),
    ("Qwen2.5-VL", 1920, 1080, False),
    ("Qwen2.5-VL", 4000, 3000, False),
    ("Qwen2.5-VL", 8000, 6000, False),  # loses three quarters, and would still be twenty times the file
    ("Qwen3-VL", 4000, 3000, False),
    ("GLM-4.1V", 4000, 3000, False),
    ("SmolVLM2", 64, 48, False),  # enlarged to 2048 x 1536
    ("SmolVLM2", 1920, 1080, False),
    ("SmolVLM2", 4000, 3000, False),  # would be nine megabytes
    ("Idefics 3", 4000, 3000, False),
    ("Pixtral", 640, 480, False),
    ("Pixtral", 1920, 1080, True),
    ("Mistral Small 3.1", 4000, 3000, False),  # a quarter of the pixels, and seven megabytes
    ("LLaVA-1.5", 640, 480, True),
    ("LLaVA-1.5", 400, 400, False),
    ("SigLIP", 384, 384, False),
    ("SigLIP", 640, 480, True),
    ("Gemma 3", 1280, 720, False),
    ("Gemma 3", 1920, 1080, True),
]


@pytest.mark.parametrize(("name", "width", "height", "acts"), ACTS, ids=str)
async def test_published_limits_decide(name: str, width: int, height: int, acts: bool) -> None:
    """A photograph at a model's own limits: where it passes no worker is asked, and its tokens are known."""
    spec = published(name)
    geometry = spec.geometry(height, width)
    client = 4 << 20 if (width, height) == (8000, 6000) else 1 << 20
    assert header_geometry.is_worth_resizing(width * height, geometry, client) is acts
    if not acts and width <= 4000:
        got = await ImageService(NOWHERE, Settings(), spec).inline(base64.b64encode(flat(width, height)), "x")
        assert (got.outcome, got.base64, got.media_type, got.stages) == ("passed", None, "", ())
        assert (got.height, got.width, got.tokens, got.format) == (*geometry.size, geometry.tokens, "png")


@given(st.integers(1, 1 << 14), st.integers(1, 1 << 14), st.integers(1, 1 << 26))
def test_no_body_grows_beyond_its_bound(height: int, width: int, client: int) -> None:
    """Whatever is prepared loses half of its pixels, and is at most 1.5 times the client's text or 4 MiB."""
    for name in ("Qwen2.5-VL", "SmolVLM2", "SigLIP", "Pixtral"):
        try:
            geometry = published(name).geometry(height, width)
        except ValueError:
            continue
        made = len(base64.b64encode(bytes(15))) + 4 * geometry.size[0] * geometry.size[1]
        if header_geometry.is_worth_resizing(height * width, geometry, client):
            assert 2 * geometry.size[0] * geometry.size[1] <= height * width
            assert made <= max(4 << 20, 1.5 * client) + 8


async def test_eight_pages_of_one_colour_stay_small() -> None:
    """Files of nothing that are 12 million pixels pass, where they used to become 50 MB each."""
    images = ImageService(NOWHERE, Settings(), published("Qwen2.5-VL"))
    for _ in range(8):
        got = await images.inline(base64.b64encode(flat(4000, 3000)), "x")
        assert (got.outcome, got.bytes_out) == ("passed", 0)


@pytest.mark.parametrize("is_base64", [True, False], ids=["text", "bytes"])
async def test_a_size_behind_metadata_is_found(is_base64: bool) -> None:
    """A camera's file passes by its header, whether it comes as text or, from behind a link, as bytes."""
    out = io.BytesIO()
    Image.fromarray(synthetic_photos.pixels(320, 240)).save(out, "JPEG", exif=EXIF)
    data = base64.b64encode(out.getvalue()) if is_base64 else out.getvalue()
    got = await ImageService(NOWHERE, Settings(), published("Qwen2.5-VL")).inline(data, "x", is_base64=is_base64)
    assert (got.outcome, got.format) == ("passed", "jpeg")
    assert abs(got.bytes_in - len(out.getvalue())) <= 2


def job(want: str, data: bytes, name: str = "Qwen2.5-VL") -> tuple[ImageDone, Any]:
    done, payload = pipeline.prepare_image(ImageJob(want, published(name).to_json(), False, LIMITS, 60.0), data)
    assert isinstance(done, ImageDone), done
    return done, payload


def test_a_worker_decides_where_the_head_does_not() -> None:
    """Metadata longer than what the relay looks at: the worker passes the image by its header, turned, undecoded."""
    comment = jpegs.segment(0xFE, bytes(65_000))
    photo = synthetic_photos.photo(560, 280, exif_orientation=6)
    long = photo[:2] + comment * 4 + photo[2:]
    assert header_geometry.read_size(long, is_base64=False) is None
    done, payload = job(PIXELS, long)
    assert (done.outcome, bytes(payload), [stage for stage, _ in done.stages]) == ("passed", b"", ["unpack"])
    assert (done.width, done.height) == (280, 560)


def test_a_worker_decides_after_decoding_where_no_header_tells() -> None:
    """A file whose header is not read to its end is decoded, and passes then."""
    photo = synthetic_photos.photo(560, 280)
    strange = photo[:2] + jpegs.segment(0xFE, b"") * 2000 + photo[2:]
    done, payload = job(PIXELS, strange)
    assert (done.outcome, bytes(payload)) == ("passed", b"")
    assert "decode" in dict(done.stages) and done.tokens == 20 * 10


def test_what_pays_is_prepared_and_shared_memory_takes_all() -> None:
    """The rule is about bodies: pixels in shared memory are prepared whatever their number."""
    done, payload = job(PIXELS, synthetic_photos.photo(1000, 800), "SigLIP")
    assert done.outcome == "ok" and len(payload) == header_geometry.base64_chars(
        b"P6\n384 384\n255\n" + bytes(3 * 384 * 384), False
    )
    done, payload = job(RAW, synthetic_photos.photo(560, 280))
    assert done.outcome == "ok" and len(payload) == 3 * 560 * 280


@pytest.mark.parametrize(
    ("data", "is_base64", "format", "tokens"),
    [
        (base64.b64encode(synthetic_photos.photo(560, 280)), True, "jpeg", 200),
        (synthetic_photos.photo(560, 280), False, "jpeg", 200),
        (base64.b64encode(b"no image"), True, "unknown", 0),
        (b"!!!!", True, "unknown", 0),
        (b"\0\0\0 ftypavif" + bytes(40), False, "heif", 0),
        (jpegs.jpeg(21, 0, [(1, 1)]), False, "jpeg", 0),
    ],
    ids=["text", "bytes", "no image", "no base64", "engine's own", "no height"],
)
def test_any_image_can_pass(data: bytes, is_base64: bool, format: str, tokens: int) -> None:
    """For an engine without prepared images: tokens by the header, if it has them, and no error."""
    got = ImageService(NOWHERE, Settings(), published("Qwen2.5-VL")).passed(data, "refused", is_base64)
    assert (got.outcome, got.format, got.tokens, got.base64, got.url) == ("passed", format, tokens, None, "")
    assert got.reason == "refused"


def test_fetched_bytes_that_are_no_image_go_to_the_engine() -> None:
    """They are no image's media type; the engine, which was sent a link, refuses what was there."""
    service = ImageService(NOWHERE, Settings(), published("Qwen2.5-VL"))
    part = ImagePart("x", "", memoryview(b"PGh0bWw+"), "https://img.example.com/a")
    passed = service.passed(b"<html>", "unknown_format", False)
    assert (passed.outcome, passed.reason, passed.format) == ("passed", "unknown_format", "unknown")
    for made in (replacements([part], [passed], None), originals([part], [passed])):
        assert made == {0: ("application/octet-stream", part.data)}


@pytest.mark.parametrize(("width", "height", "limit"), [(300, 200, "image_max_pixels"), (64, 48, "image_max_bytes")])
async def test_limits_hold_for_what_passes(width: int, height: int, limit: str) -> None:
    """An image over a limit is not passed by its header: the worker, who refuses it, is asked."""
    chosen = Settings(**{limit: 100})
    images = ImageService(NOWHERE, chosen, published("Qwen2.5-VL"))
    assert images._pass_early(base64.b64encode(synthetic_photos.photo(width, height)), True) is None
