"""What is read of an image's header is what Pillow sees once it has opened and rotated the file."""

from __future__ import annotations

import contextlib
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from sidecar.images import stored_image
from sidecar.images.stored_image import Unclear
from tests.render import cases

FILES = cases.odd_images()


def by_pillow(data: bytes) -> tuple[int, int, bool]:
    """Height, width, and whether vLLM converts nothing, after its own steps: open, rotate, load."""
    image: Image.Image = Image.open(io.BytesIO(data))
    with contextlib.suppress(Exception):  # as vLLM does
        image = ImageOps.exif_transpose(image)
    image.load()
    return image.height, image.width, image.mode == "RGB"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("name", FILES)
def test_size_and_mode_are_those_of_pillow(name: str) -> None:
    """Odd images: rotated by EXIF or XMP, before or after the pixels, with alpha, palettes, grey, CMYK, 16 bits."""
    found = stored_image.read(FILES[name])
    assert (found.height, found.width, found.is_rgb) == by_pillow(FILES[name])


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF", "PPM", "ICO"])
def test_other_formats_are_unclear(form: str) -> None:
    """Formats whose header is not enough are not guessed at."""
    with pytest.raises(Unclear, match="JPEG, PNG or WebP"):
        stored_image.read(cases.encoded(cases.picture(), form))


@pytest.mark.parametrize("name", ["turned-6", "png-xmp", "png-turned-late", "webp-turned", "webp-lossless"])
def test_a_cut_file_is_right_or_unclear(name: str) -> None:
    """A file cut off anywhere is unclear, or its header is still that of the whole file; nothing else is raised."""
    data = FILES[name]
    whole = stored_image.read(data)
    seen = set()
    for length in range(0, len(data), 1 + len(data) // 500):
        try:
            found = stored_image.read(data[:length])
        except Unclear:
            seen.add("unclear")
        else:
            assert (found.format, found.is_rgb) == (whole.format, whole.is_rgb)
    assert "unclear" in seen


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(FILES)), st.data())
def test_hostile_headers_raise_unclear(name: str, data: st.DataObject) -> None:
    """Whatever bytes a header has, it is read, or unclear."""
    file = bytearray(FILES[name])
    for _ in range(data.draw(st.integers(1, 8))):
        file[data.draw(st.integers(0, min(len(file), 400) - 1))] = data.draw(st.integers(0, 255))
    try:
        stored_image.read(bytes(file))
    except Unclear as e:
        assert str(e)


def test_lengths_in_a_file_are_not_trusted() -> None:
    """Metadata that says it is 4 GB long, and a thousand empty chunks, cost neither memory nor time."""
    png = FILES["png-turned"]
    at = png.index(b"eXIf") - 4
    for size in (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff"):
        with pytest.raises(Unclear):
            stored_image.read(png[:at] + size + png[at + 4 :])
    empty = b"\0\0\0\0teSt\0\0\0\0"
    with pytest.raises(Unclear, match="too many chunks"):
        stored_image.read(png[:33] + empty * (stored_image.MAX_CHUNKS + 1) + png[33:])
