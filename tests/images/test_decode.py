"""Bytes to pixels: always what the engine's own path (vLLM's ImageMediaIO, Pillow) would have given."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin

from sidecar.images.file_headers import DECODED_FORMATS, read
from sidecar.images.pass_reasons import of_refusal
from sidecar.images.protocol import RAW, TENSORS, ImageDone, ImageJob, ImageLimits, ImageRefused
from sidecar.images.worker import decode as decoding
from sidecar.images.worker import pipeline
from sidecar.images.worker.decode import ImageRejected, decode, orientation
from sidecar.kernels import families
from sidecar.tools import synthetic_photos

from . import by_torch, corpus, jpegs
from .conftest import QWEN2_VL

LIMITS = ImageLimits(max_bytes=20 << 20, max_pixels=20_000_000)


def engine(data: bytes) -> np.ndarray[Any, Any] | None:
    """What the engine sees: turn by EXIF, load, flatten on white; None where it refuses."""
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        with contextlib.suppress(Exception):
            image = ImageOps.exif_transpose(image)
        image.load()
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            rgba = image.convert("RGBA")
            flat = Image.new("RGB", rgba.size, (255, 255, 255))
            flat.paste(rgba, mask=rgba.split()[3])
            return np.asarray(flat)
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except Exception:  # noqa: BLE001  whatever it is, the engine refuses
        return None


def ours(data: bytes, limits: ImageLimits = LIMITS) -> np.ndarray[Any, Any] | None:
    """The sidecar's pixels; None if it refuses."""
    header = read(data)
    if header is None:
        return None
    try:
        return decode(data, header, limits)
    except ImageRejected:
        return None


def same(a: np.ndarray[Any, Any] | None, b: np.ndarray[Any, Any] | None) -> bool:
    return (a is None and b is None) or (a is not None and b is not None and np.array_equal(a, b))


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(synthetic_photos.pixels(331, 247, 5))


def alpha(image: Image.Image) -> Image.Image:
    ramp = Image.fromarray(np.linspace(0, 255, image.width, dtype=np.uint8)[None].repeat(image.height, 0))
    return Image.merge("RGBA", (*image.split(), ramp))


def sixteen(image: Image.Image) -> Image.Image:
    return Image.fromarray((np.asarray(image.convert("L")).astype(np.uint16) * 257 + 13).astype(np.uint16))


def interlaced(image: Image.Image, **chunks: bytes) -> bytes:
    """A PNG written by hand: every pass of Adam7 with filter 0."""
    px = np.asarray(image)
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    rows = b"".join(b"\0" + row.tobytes() for y, x, dy, dx in passes for row in px[y::dy, x::dx])
    ihdr = struct.pack("!IIBBBBB", image.width, image.height, 8, 2, 0, 0, 1)
    parts = [
        (b"IHDR", ihdr),
        *((k.encode(), v) for k, v in chunks.items()),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack("!I", len(body)) + kind + body + struct.pack("!I", zlib.crc32(kind + body)) for kind, body in parts
    )


def with_text(key: str, value: str) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text(key, value)
    return info


def turned(how: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = how
    return exif


XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'

# name -> how the file is made; `fast` says that the fast decoder must have been used
FILES: dict[str, tuple[Callable[[Image.Image], bytes], bool]] = {
    "jpeg 4:2:0": (lambda i: saved(i, "JPEG", quality=90), True),
    "jpeg 4:4:4": (lambda i: saved(i, "JPEG", quality=90, subsampling=0), True),
    "jpeg 4:2:2 progressive": (lambda i: saved(i, "JPEG", subsampling=1, progressive=True), True),
    "jpeg 4:4:0": (lambda i: jpegs.jpeg(i.width, i.height, [(1, 2), (1, 1), (1, 1)]), True),
    "jpeg 4:1:1": (lambda i: jpegs.jpeg(i.width, i.height, [(4, 1), (1, 1), (1, 1)]), True),
    "jpeg low quality": (lambda i: saved(i, "JPEG", quality=5), True),
    "jpeg restarts": (lambda i: saved(i, "JPEG", restart_marker_rows=1), True),
    "jpeg grey": (lambda i: saved(i.convert("L"), "JPEG"), True),
    "jpeg rgb": (lambda i: saved(i, "JPEG", keep_rgb=True), True),
    "jpeg cmyk": (lambda i: saved(i.convert("CMYK"), "JPEG"), False),
    "jpeg two pictures": (lambda i: saved(i, "MPO", save_all=True, append_images=[i.rotate(90)]), False),
    "jpeg xmp turned": (lambda i: saved(i, "JPEG", xmp=XMP.encode()), True),
    "jpeg broken exif": (lambda i: saved(i, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03"), True),
    "png rgb": (lambda i: saved(i, "PNG"), False),
    "png grey": (lambda i: saved(i.convert("L"), "PNG"), False),
    "png rgba": (lambda i: saved(alpha(i), "PNG"), False),
    "png grey alpha": (lambda i: saved(alpha(i).convert("LA"), "PNG"), False),
    "png palette": (lambda i: saved(i.quantize(64), "PNG"), False),
    "png palette tRNS": (lambda i: saved(i.quantize(64), "PNG", transparency=3), False),
    "png rgb tRNS": (lambda i: saved(i, "PNG", transparency=i.getpixel((0, 0))), False),
    "png grey tRNS": (lambda i: saved(i.convert("L"), "PNG", transparency=128), False),
    "png 1 bit": (lambda i: saved(i.convert("1"), "PNG"), False),
    "png 16 bit": (lambda i: saved(sixteen(i), "PNG"), False),
    "png interlaced": (lambda i: interlaced(i), False),
    "png gamma": (lambda i: interlaced(i, gAMA=struct.pack("!I", 20_000)), False),
    "png exif turned": (lambda i: saved(i, "PNG", exif=turned(8)), False),
    "png xmp turned": (lambda i: saved(i, "PNG", pnginfo=with_text("XML:com.adobe.xmp", XMP)), False),
    "png text": (lambda i: saved(i, "PNG", pnginfo=with_text("Comment", "hello")), False),
    "png animated": (lambda i: saved(i, "PNG", save_all=True, append_images=[i.rotate(90)]), False),
    "webp lossy": (lambda i: saved(i, "WEBP", quality=80), False),
    "webp lossless": (lambda i: saved(i, "WEBP", lossless=True), False),
    "webp alpha": (lambda i: saved(alpha(i), "WEBP"), False),
    "webp turned": (lambda i: saved(i, "WEBP", exif=turned(3)), False),
    "webp animated": (lambda i: saved(i, "WEBP", save_all=True, append_images=[i.rotate(90)]), False),
    "gif": (lambda i: saved(i, "GIF"), False),
    "gif animated": (lambda i: saved(i, "GIF", save_all=True, append_images=[i.rotate(90)]), False),
    "gif transparent": (lambda i: saved(i.quantize(32), "GIF", transparency=0), False),
    "bmp": (lambda i: saved(i, "BMP"), False),
    "bmp palette": (lambda i: saved(i.quantize(16), "BMP"), False),
    "tiff": (lambda i: saved(i, "TIFF"), False),
    "tiff lzw": (lambda i: saved(i, "TIFF", compression="tiff_lzw"), False),
    "tiff cmyk": (lambda i: saved(i.convert("CMYK"), "TIFF"), False),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("name", FILES)
def test_pixels_are_the_engines(
    name: str, picture: Image.Image, monkeypatch: pytest.MonkeyPatch, requires: Callable[[str], Path]
) -> None:
    """Every format and mode gives Pillow's pixels bit for bit, by the fast decoder exactly where it is meant."""
    make, fast = FILES[name]
    data = make(picture)
    header = read(data)
    assert header is not None and header.plain == fast
    assert header.format == name.split()[0]
    with Image.open(io.BytesIO(data)) as opened:
        assert (header.width, header.height) == opened.size
    used: list[bool] = []
    if fast:
        requires("python:simplejpeg")
    original = decoding._fast

    def watched(*args: Any) -> Any:
        result = original(*args)
        used.append(result is not None)
        return result

    monkeypatch.setattr(decoding, "_fast", watched)
    wanted = engine(data)
    assert wanted is not None
    assert same(ours(data), wanted)
    assert used == ([True] if fast else [])


@pytest.mark.filterwarnings("ignore")  # Pillow warns of damaged metadata
def test_both_decoders_of_jpeg_give_torchvisions_pixels(requires: Callable[[str], Path]) -> None:
    """Each sampling and frame, odd sizes, grey, restarts: simplejpeg, Pillow and torchvision agree in every byte.

    Each has a libjpeg-turbo of its own, so this also holds that their versions and options give the same bits.
    """
    requires("python:simplejpeg")
    compared = set()
    for name, data in corpus.all_files().items():
        header = read(data)
        if not name.startswith("jpeg") or header is None or not header.plain or header.height * header.width > 1 << 20:
            continue
        theirs, fast = by_torch.decode(data, "jpeg"), decoding._fast(data, header)
        if fast is None:
            continue
        assert theirs is not None and np.array_equal(by_torch.rows(theirs), fast), name
        assert np.array_equal(decoding._pillow(data, LIMITS), decoding.turn(fast, orientation(data))), name
        compared.add(name)
    assert {"jpeg progressive", "jpeg restarts", "jpeg turned 6", "jpeg bytes behind"} <= compared
    # the other samplings, which no encoder writes, are Pillow's: simplejpeg does not know them
    assert len(compared) > 50 and sum("sampling" in name for name in compared) >= 10


def test_without_simplejpeg_pillow_decodes(picture: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is not installed, JPEGs come out the same, turned ones, too."""
    files = [saved(picture, "JPEG", exif=turned(how)) for how in (1, 6)]
    fast = [ours(data) for data in files]
    monkeypatch.setattr(decoding, "simplejpeg", None)
    monkeypatch.setattr(decoding, "_fast", None)
    assert all(same(ours(data), one) and one is not None for data, one in zip(files, fast, strict=True))


@pytest.mark.parametrize("how", range(10))
@pytest.mark.parametrize("size", [(64, 48), (1, 3), (17, 17)], ids=str)
def test_jpeg_orientation_is_the_engines(how: int, size: tuple[int, int]) -> None:
    """All eight orientations, and numbers that are none, turn the pixels as Pillow does."""
    data = synthetic_photos.photo(*size, exif_orientation=how)
    assert same(ours(data), engine(data))
    assert orientation(data) == how or how in (0, 9)


def test_photographs_of_the_orientation_set(requires: Callable[[str], Path]) -> None:
    """Real camera files in all eight orientations come out as Pillow turns them."""
    files = sorted(requires("../shared/images").glob("*.jpg"))
    assert files
    for file in files:
        data = file.read_bytes()
        assert same(ours(data), engine(data)), file.name


SMALL = Image.fromarray(synthetic_photos.pixels(67, 53, 9))
WHOLE = [
    saved(SMALL, "JPEG"),
    saved(SMALL, "JPEG", progressive=True, exif=turned(6)),
    saved(SMALL, "PNG"),
    saved(SMALL, "WEBP"),
    saved(SMALL, "WEBP", lossless=True),
    saved(SMALL, "GIF"),
    saved(SMALL, "BMP"),
    saved(SMALL, "TIFF", compression="tiff_lzw"),
]


@settings(max_examples=400)
@given(data=st.data())
def test_damaged_files_end_as_in_the_engine(data: st.DataObject) -> None:
    """Cut off anywhere or with bytes changed, a file gives Pillow's pixels or is refused where Pillow refuses."""
    file = bytearray(data.draw(st.sampled_from(WHOLE)))
    for _ in range(data.draw(st.integers(0, 3))):
        file[data.draw(st.integers(12, len(file) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(file[: data.draw(st.integers(12, len(file)))] if data.draw(st.booleans()) else file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = engine(cut)
        if theirs is not None and theirs.shape[0] * theirs.shape[1] > LIMITS.max_pixels:
            return
        assert same(ours(cut), theirs)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_size_is_refused_before_anything_is_decoded(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A header over a limit is refused without a decoder being called."""
    data = saved(Image.new("RGB", (90, 70)), format)

    def forbidden(*_: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(decoding, "_fast", forbidden)
    monkeypatch.setattr(decoding, "_pillow", forbidden)
    header = read(data)
    assert header is not None and (header.height, header.width) == (70, 90)
    for limits, reason in (
        (ImageLimits(1 << 20, 6299), "image_too_many_pixels"),
        (ImageLimits(1 << 20, 6300, max_side=89), "image_too_long"),
    ):
        with pytest.raises(ImageRejected) as refused:
            decode(data, header, limits)
        assert refused.value.reason == reason


def test_a_header_that_lies_low_is_caught_by_pillow() -> None:
    """A TIFF whose first directory entry cannot be read is checked against the limit after Pillow opens it."""
    data = saved(Image.new("RGB", (90, 70)), "TIFF")
    with pytest.raises(ImageRejected) as refused:
        decoding._pillow(data, ImageLimits(1 << 20, 6299))
    assert refused.value.reason == "image_too_many_pixels"


@given(
    st.binary(max_size=300),
    st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF0000WEBPVP8X", b"II*\0", b"BM", b"GIF89a"]),
)
def test_headers_never_raise(tail: bytes, head: bytes) -> None:
    """Any bytes give a header or None."""
    header = read(head + tail)
    assert header is None or (header.height >= 0 and header.width >= 0)


@pytest.mark.parametrize(("comments", "size"), [(100, (70, 90)), (10_000, (0, 0))])
def test_the_way_through_a_jpeg_is_bounded(comments: int, size: tuple[int, int]) -> None:
    """A hundred comments and any number of fill bytes before the size are skipped; with ten thousand it is unknown."""
    data = saved(Image.new("RGB", (90, 70)), "JPEG")
    header = read(data[:2] + b"\xff\xfe\0\2" * comments + b"\xff" * 50_000 + data[2:])
    assert header is not None
    assert ((header.height, header.width), header.plain) == (size, size != (0, 0))


@pytest.mark.parametrize("data", [b"", b"hello", b"<svg/>", b"%PDF-1.4", b"RIFF0000WAVE"])
def test_what_is_no_image_is_none(data: bytes) -> None:
    """Bytes that are no known image have no header."""
    assert read(data) is None


def test_an_older_pillow_decodes_no_bmp_and_no_tiff() -> None:
    """Before 13.0 it shows memory beyond a damaged TIFF's tiles, and other pixels of a BMP with run lengths."""
    assert {name.lower() for name in decoding.formats("13.0.0")} == DECODED_FORMATS
    for older in ("12.1.1.post0", "9.5.0"):
        assert set(decoding.formats("13.0.0")) - set(decoding.formats(older)) == {"BMP", "TIFF"}


@pytest.mark.parametrize("want", [RAW, TENSORS])
def test_what_this_pillow_does_not_decode_passes(monkeypatch: pytest.MonkeyPatch, want: str) -> None:
    """In a request for the reason `format`; /v1/preprocess says that it is not supported."""
    monkeypatch.setattr(pipeline, "FORMATS", decoding.formats("12.1.1"))
    spec = families.from_config(QWEN2_VL)
    assert spec is not None
    for format in ("BMP", "TIFF"):
        data = corpus.saved(corpus.picture(), format)
        done, payload = pipeline.prepare_image(ImageJob(want, spec.to_json(), False, LIMITS, 60.0), data)
        if want == RAW:
            assert isinstance(done, ImageDone) and (done.outcome, done.reason) == ("passed", "format")
        else:
            assert isinstance(done, ImageRefused) and (done.reason, of_refusal(done.reason)) == (
                "image_unsupported",
                "format",
            )
        assert not payload
