"""Bytes that were made to hurt: each ends in its own clear refusal, and the server serves the next image."""

from __future__ import annotations

import asyncio
import base64
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sidecar.errors import BadImage
from sidecar.images.protocol import ImageLimits
from sidecar.images.service import ImageService
from sidecar.images.worker.worker import memory_bound
from sidecar.images.worker_queue import WorkerQueue
from sidecar.kernels import families
from sidecar.kernels.grid import PatchSpec, ProcessorSpec
from sidecar.tools import synthetic_photos
from tests.waiting import PATIENCE

from . import by_torch, corpus, jpegs
from .conftest import Server
from .corpus import png, saved
from .published import settings
from .test_decode import engine
from .test_workers import both, ticks


def jpeg_that_says(width: int, height: int) -> bytes:
    data = bytearray(synthetic_photos.photo(64, 64))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack("!HH", height, width)
    return bytes(data)


PHOTO = synthetic_photos.photo(640, 480, 3)


def tiff(*entries: tuple[int, int, int, int]) -> bytes:
    """A TIFF of these tags: number, kind, count, value or offset."""
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *e) for e in entries)


def comments(blocks: int) -> bytes:
    """A GIF of 9 x 9 pixels with a comment of so many blocks."""
    whole = saved(Image.new("P", (9, 9)), "GIF")
    at = whole.index(b",")
    return whole[:at] + b"!\xfe" + b"\1x" * blocks + b"\0" + whole[at:]


def runs(width: int, height: int, extra: bytes = b"") -> bytes:
    """A BMP of run lengths, of one colour; `extra`: commands that do nothing."""
    body = extra + (b"\xff\1" * -(-width // 255) + b"\0\0") * height
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(body), 0, 0, 2, 0)
    return b"BM" + struct.pack("<IHHI", 62 + len(body), 0, 0, 62) + head + b"\0\0\0\0\xff\xff\xff\0" + body


SIDES = (256, 4, 1, 100), (257, 4, 1, 100)

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


# Few bytes, much work: none of these is begun.
COSTLY: dict[str, tuple[bytes, str]] = {
    "jpeg of 406 scans": (jpegs.scans(4400, 4400, 406), "image_too_many_scans"),
    "jpeg of 80 scans": (jpegs.scans(2000, 2000, 80), "image_too_many_scans"),
    "jpeg of fill bytes": (PHOTO[:2] + b"\xff" * (2 << 20) + PHOTO[2:], "image_too_many_parts"),
    "jpeg of empty comments": (PHOTO[:2] + b"\xff\xfe\0\2" * (1 << 18) + PHOTO[2:], "image_too_many_parts"),
    "jpeg of junk": (PHOTO[:2] + b"\xff\xe0\0\2" + bytes(2 << 20) + PHOTO[2:], "image_too_many_parts"),
    "png of chunks": (png(9, 9, extra=corpus.chunk(b"tEXt", b"a\0b") * 40_000), "image_too_many_parts"),
    "png of profiles": (
        png(9, 9, extra=corpus.chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1 << 20))) * 5),
        "image_too_many_parts",
    ),
    "gif of comments": (comments(5000), "image_too_many_parts"),
    "gif of junk": (b"GIF89a\x09\0\x09\0\0\0\0" + b"\1" * (2 << 20), "image_too_many_parts"),
    "tiff of strips": (tiff(*SIDES, (273, 4, 100_000, 8)), "image_too_many_parts"),
    "tiff of tags over each other": (
        tiff(*SIDES, *((900 + n, 1, 4 << 20, 8) for n in range(100))) + bytes(4 << 20),
        "image_too_many_parts",
    ),
    "bmp of runs": (runs(4000, 4000), "image_too_many_parts"),
    "bmp of empty runs": (runs(9, 9, b"\0\2\0\0" * (1 << 19)), "image_too_many_parts"),
    "bmp that is also a webp": (runs(4000, 4000)[:8] + b"WEBP" + runs(4000, 4000)[12:], "image_too_many_parts"),
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


@pytest.mark.parametrize("name", COSTLY)
async def test_what_would_cost_far_more_than_its_size_is_refused(
    server: Server, images: ImageService, name: str
) -> None:
    """An image whose structure would hold a worker for seconds is refused with its reason, and no worker dies of it."""
    data, reason = COSTLY[name]
    await images.tensors([(PHOTO, False)])
    workers = await asyncio.to_thread(both, server)
    with pytest.raises(BadImage) as refused:
        await images.tensors([(data, False)])
    assert refused.value.reason == reason and refused.value.status == 400
    assert server.workers() == workers


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
    "jpeg of 200 scans": jpegs.scans(64, 64, 200),
    "gif of 4000 blocks": comments(4000),
    "bmp of some runs": runs(300, 200),
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
    return by_torch.values(by_torch.planes(np.array(pixels)), geometry, spec).numpy().tobytes()


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


def laborious() -> bytes:
    """A small CMYK JPEG behind 58 MB of Photoshop's blocks, which Pillow reads in Python: many seconds."""
    block = b"8BIM" + struct.pack("!HBxI", 0x3ED, 0, 14) + bytes(14)
    body = b"Photoshop 3.0\0" + block * ((65_533 - 14) // len(block))
    whole = saved(Image.new("CMYK", (64, 64)), "JPEG")
    return whole[:2] + jpegs.segment(0xED, body) * 900 + whole[2:]


@pytest.mark.parametrize(("deadline", "reason"), [(PATIENCE, "image_failed"), (0.2, "image_deadline")])
async def test_an_image_of_endless_work_ends(
    start_server: Callable[..., Server], spec: ProcessorSpec, deadline: float, reason: str
) -> None:
    """What no bound foresees ends by its CPU time, long before a deadline of minutes; or by a shorter deadline."""
    server = start_server(image_workers=1, image_max_bytes=64 << 20, image_max_pixels=1 << 20)
    queue = WorkerQueue(server.path, server.settings, deadline=deadline)
    images = ImageService(server.path, server.settings, spec, queue=queue)
    with pytest.raises(BadImage) as refused:
        await images.tensors([(laborious(), False)])
    assert refused.value.reason == reason
    calm = ImageService(server.path, server.settings, spec)
    assert (await calm.inline(base64.b64encode(PHOTO), "part")).outcome == "ok"


async def test_the_cpu_time_of_one_image_is_not_the_next_ones(
    start_server: Callable[..., Server], spec: ProcessorSpec
) -> None:
    """A worker that has used more time in all than one image may use goes on."""
    lone = start_server(image_workers=1)
    images = ImageService(lone.path, lone.settings, spec)
    data = saved(Image.effect_noise((4000, 4000), 90), "PNG")
    await images.tensors([(data, False)])
    (worker,) = lone.workers()
    used = ticks(worker)
    while ticks(worker) - used < 4 * os.sysconf("SC_CLK_TCK"):
        await images.tensors([(data, False)])
    assert lone.workers() == [worker]
