"""Bytes that were made to hurt: each ends in its own clear refusal, and the server serves the next image."""

from __future__ import annotations

import base64
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sidecar.errors import BadImage
from sidecar.images.protocol import ImageLimits
from sidecar.images.service import ImageService
from sidecar.images.worker import tensors
from sidecar.images.worker.worker import memory_bound
from sidecar.kernels import families
from sidecar.kernels.grid import PatchSpec
from sidecar.tools import synthetic_photos

from . import corpus, jpegs
from .conftest import Server
from .corpus import png, saved
from .published import settings
from .test_decode import engine


def jpeg_that_says(width: int, height: int) -> bytes:
    data = bytearray(synthetic_photos.photo(64, 64))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack("!HH", height, width)
    return bytes(data)


PHOTO = synthetic_photos.photo(640, 480, 3)

REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "image_empty"),
    "text": (b"hello, I am no image", "image_unknown_format"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image_unknown_format"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "image_unknown_format"),
    "pdf": (b"%PDF-1.7\n", "image_unknown_format"),
    "jpeg magic alone": (b"\xff\xd8\xff", "image_broken"),
    "jpeg cut off": (PHOTO[: len(PHOTO) // 2], "image_broken"),
    "jpeg header only": (PHOTO[:200], "image_broken"),
    "jpeg that lies high": (jpeg_that_says(65_500, 65_500), "image_too_many_pixels"),
    "jpeg without height": (jpeg_that_says(64, 0), "image_broken"),
    "png bomb": (png(60_000, 60_000), "image_too_many_pixels"),
    "png bomb in width": (png(0x7FFFFFFF, 1), "image_too_many_pixels"),
    "png without rows": (png(4000, 4000), "image_broken"),
    "png of size 0": (png(0, 0), "image_broken"),
    "png 65500 x 1": (saved(Image.new("RGB", (65_500, 1)), "PNG"), "image_aspect"),
    "png too long": (png(70_000, 100), "image_too_long"),
    "gif bomb": (b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + b"\0" * 20, "image_too_many_pixels"),
    "bmp bomb": (
        b"BM" + b"\0" * 12 + struct.pack("<IiiHH", 40, 50_000, -50_000, 1, 24) + b"\0" * 24,
        "image_too_many_pixels",
    ),
    "webp bomb": (b"RIFF\0\0\0\0WEBPVP8X\n\0\0\0\0\0\0\0" + b"\xff" * 6 + b"\0" * 16, "image_too_many_pixels"),
    "webp cut off": (saved(Image.new("RGB", (640, 480)), "WEBP")[:60], "image_broken"),
    "tiff loop": (b"II*\0\x08\0\0\0\x00\0\x08\0\0\0", "image_broken"),
    "tiff bomb": (
        b"II*\0\x08\0\0\0\x02\0" + struct.pack("<HHIIHHII", 256, 4, 1, 99_999, 257, 4, 1, 99_999) + b"\0" * 4,
        "image_too_many_pixels",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_hostile_bytes_are_refused_with_a_reason(images: ImageService, name: str) -> None:
    """A broken, forged or oversized image gets its own reason code without its content, and the next one works."""
    data, reason = REFUSED[name]
    with pytest.raises(BadImage) as refused:
        await images.inline(base64.b64encode(data), "part")
    assert refused.value.reason == reason
    assert len(str(refused.value)) < 200 and "hello" not in str(refused.value)
    assert (await images.inline(base64.b64encode(PHOTO), "part")).outcome == "ok"


@pytest.mark.parametrize("text", [b"%%%%", b"abc", b"ab=c", base64.b64encode(PHOTO) + b"!", b"\xff\xfe\xfd\xfc"])
async def test_damaged_base64_is_refused(images: ImageService, text: bytes) -> None:
    """Text that is no base64 is refused as such."""
    with pytest.raises(BadImage) as refused:
        await images.inline(text, "part")
    assert refused.value.reason == "image_base64"


async def test_too_many_bytes_never_reach_a_worker(images: ImageService) -> None:
    """Text far over --image-max-bytes is refused before it is sent."""
    with pytest.raises(BadImage) as refused:
        await images.inline(bytes(31 << 20), "part")
    assert refused.value.reason == "image_too_large"


async def test_bytes_just_over_the_limit_are_refused_by_the_worker(images: ImageService) -> None:
    """The real size is held to --image-max-bytes, not the text's."""
    with pytest.raises(BadImage) as refused:
        await images.inline(base64.b64encode(PHOTO + bytes((20 << 20) - len(PHOTO) + 1)), "part")
    assert refused.value.reason == "image_too_large" and str(20 << 20) in str(refused.value)


ODD: dict[str, bytes] = {
    "1 x 1": saved(Image.new("RGB", (1, 1)), "PNG"),
    "200 x 1": saved(Image.new("RGB", (200, 1)), "PNG"),
    "cmyk": saved(Image.new("CMYK", (64, 64)), "JPEG"),
    "16 bit": saved(Image.new("I;16", (64, 64)), "PNG"),
    "animated": saved(Image.new("P", (64, 64)), "GIF", save_all=True, append_images=[Image.new("P", (64, 64), 3)]),
    "trailing bytes": PHOTO + b"\0" * 5000,
    "file after the file": PHOTO + PHOTO,
    # Pillow, and with it the engine, fills in what is missing or wrong here
    "jpeg that lies a little": jpeg_that_says(4000, 4000),
    "png with damaged rows": png(64, 64, b"\x09" * 64 * 193),
    "png with wrong crc": saved(Image.new("RGB", (64, 64)), "PNG")[:-30] + b"\0" * 30,
}


@pytest.mark.parametrize("name", ODD)
async def test_odd_but_sound_images_are_served(images: ImageService, name: str) -> None:
    """Unusual images that the engine would take are prepared: as tensors, where none of them passes for its size."""
    assert (await images.tensors([(base64.b64encode(ODD[name]), True)]))[0].prepared.outcome == "ok"


def wanted(data: bytes, spec: PatchSpec) -> bytes | None:
    """The patches of what the engine sees of a file; None where it sees nothing, or its model takes no such shape."""
    pixels = engine(data)
    if pixels is None:
        return None
    try:
        geometry = spec.geometry(*pixels.shape[:2])
    except ValueError:
        return None
    planes = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
    return tensors.patches(tensors.by_torchvision(planes, geometry, spec), geometry, spec).numpy().tobytes()


# what a refusal may say; image_failed, which a worker's death would give, is not among them
REASONS = ("image_broken", "image_unknown_format", "image_aspect", "image_too_many_pixels", "image_too_long")


def peak(pid: int) -> int:
    """Most bytes of memory that a process has had."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


async def test_the_corpus_ends_as_in_the_engine(server: Server) -> None:
    """Each of some 800 odd and broken files gives the engine's pixels or its refusal; workers survive within bounds."""
    spec = families.from_config(settings("Qwen2VLImageProcessor", do_rescale=False, do_normalize=False))
    assert isinstance(spec, PatchSpec)
    images = ImageService(server.path, server.settings, spec)
    wrong: list[str] = []
    for name, data in corpus.all_files().items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = wanted(data, spec)
        try:
            answer = await images.tensors([(base64.b64encode(data), True)])
            ours = bytes(answer[0].values)
        except BadImage as refused:
            assert refused.reason in REASONS, (name, refused.reason)
            ours = None
        if ours != theirs:
            wrong.append(name)
    assert not wrong
    most = max(map(peak, server.workers()))
    assert most < memory_bound(ImageLimits(server.settings.image_max_bytes, server.settings.image_max_pixels)) + (
        600 << 20
    ), most


@pytest.mark.parametrize(("side", "count"), [(4400, 406), (4400, 12), (1000, 241)])
async def test_a_file_of_endless_scans_is_not_decoded(images: ImageService, side: int, count: int) -> None:
    """A hundred kilobytes that would hold a decoder for seconds are refused at once, by scans and pixels."""
    data = jpegs.scans(side, side, count)
    with pytest.raises(BadImage) as refused:
        await images.tensors([(data, False)])
    assert refused.value.reason == "image_too_many_scans"
    assert (await images.inline(base64.b64encode(PHOTO), "part")).outcome == "ok"


@pytest.mark.parametrize(("side", "count"), [(4400, 9), (1000, 238)])
async def test_a_file_of_many_scans_is_decoded(images: ImageService, side: int, count: int) -> None:
    """As many scans as encoders write, at the most pixels, and more in a small image."""
    assert (await images.tensors([(jpegs.scans(side, side, count), False)]))[0].prepared.outcome == "ok"
