"""A JPEG's coefficients and the integers behind them: in every pixel what libjpeg-turbo gives, or nothing.

The truth is Pillow, which is libjpeg-turbo, as engines open images with it.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sidecar.kernels import jpeg, jpeg_reference

from . import jpegs

ROOT = Path(__file__).resolve().parents[2]
SAMPLINGS = {
    "grey": [(1, 1)],
    "grey 2x2": [(2, 2)],
    "4:4:4": [(1, 1)] * 3,
    "4:2:2": [(2, 1), (1, 1), (1, 1)],
    "4:2:0": [(2, 2), (1, 1), (1, 1)],
    "4:4:0": [(1, 2), (1, 1), (1, 1)],
    "4:1:1": [(4, 1), (1, 1), (1, 1)],
    "4:1:0": [(4, 2), (1, 1), (1, 1)],
    "1:4": [(1, 4), (1, 1), (1, 1)],
    "unequal chroma": [(2, 2), (2, 1), (1, 2)],
    "one full chroma": [(2, 2), (2, 2), (1, 1)],
}
SIZES = [(1, 1), (2, 3), (3, 2), (5, 5), (7, 9), (8, 8), (16, 16), (17, 33), (40, 23), (64, 65)]


def pillow(data: bytes) -> Any:
    """What libjpeg-turbo makes of a file; None if it refuses."""
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        return np.asarray(image.convert("RGB"))
    except Exception:  # noqa: BLE001  a damaged file can raise anything
        return None


def ours(data: bytes) -> Any:
    """Our pixels; None if the file is handed back."""
    file = jpeg.open_jpeg(data)
    if file is None:
        return None
    coefficients = np.full(file.layout.coefficients, 77, np.int16)
    return jpeg_reference.pixels(file.layout, file.tables, coefficients) if file.decode(coefficients) else None


def encoded(pixels: Any, **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", **options)
    return out.getvalue()


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_every_sampling_and_size_is_exact(sampling: str, width: int, height: int) -> None:
    """Random coefficients, so that every part of the arithmetic is used."""
    data = jpegs.jpeg(width, height, SAMPLINGS[sampling], seed=width * height)
    made = ours(data)
    assert made is not None and np.array_equal(made, pillow(data))


@pytest.mark.parametrize("quality", [1, 30, 75, 100])
@pytest.mark.parametrize(
    "options", [{}, {"restart_marker_blocks": 3}, {"restart_marker_rows": 1}, {"optimize": True}], ids=str
)
def test_what_encoders_write_is_exact(quality: int, options: dict[str, Any]) -> None:
    """Noise, and the hardest contrast there is, at all qualities: with restarts and with tables of its own."""
    noise = np.random.default_rng(quality).integers(0, 256, (93, 141, 3), dtype=np.uint8)
    for pixels in (noise, (noise > 127).astype(np.uint8) * 255, noise[..., 0]):
        for subsampling in (0, 1, 2):
            data = encoded(pixels, quality=quality, subsampling=subsampling, **options)
            made = ours(data)
            assert made is not None and np.array_equal(made, pillow(data))


def test_photographs_are_exact(requires: Any) -> None:
    """The public photographs beside the repository."""
    folder = requires("../shared/images")
    files = sorted(folder.glob("*.jpg"))
    assert files
    for path in files:
        made = ours(path.read_bytes())
        assert made is not None and np.array_equal(made, pillow(path.read_bytes())), path.name


def others() -> dict[str, bytes]:
    """Files that are sound or nearly so, and not for this decoder."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    plain = encoded(pixels, quality=80)
    scan = plain.index(b"\xff\xda")
    return {
        "nothing": b"",
        "a marker": b"\xff\xd8\xff",
        "progressive": encoded(pixels, progressive=True),
        "four components": jpegs.jpeg(30, 20, [(1, 1)] * 4),
        "RGB by Adobe": jpegs.jpeg(30, 20, [(1, 1)] * 3, extra=jpegs.adobe(0)),
        "RGB by its ids": jpegs.jpeg(30, 20, [(1, 1)] * 3, ids=jpegs.RGB),
        "an unknown transform": jpegs.jpeg(30, 20, [(1, 1)] * 3, extra=jpegs.adobe(7)),
        "twelve bits": jpegs.jpeg(30, 20, [(1, 1)] * 3, bits=12),
        "luma that is not full": jpegs.jpeg(30, 20, [(1, 1), (2, 2), (1, 1)]),
        "a fraction": jpegs.jpeg(30, 20, [(3, 1), (2, 1), (1, 1)]),
        "too many blocks": jpegs.jpeg(30, 20, [(4, 4), (1, 1), (1, 1)]),
        "no end": plain[:-2],
        "cut off": plain[: scan + 200],
        "bytes before the end": plain[:-2] + b"abc" + plain[-2:],
        "a second image's scan": plain[:-2] + plain[scan:],
        "an unknown version of JFIF": plain.replace(b"JFIF\0\x01", b"JFIF\0\x02"),
    }


@pytest.mark.parametrize("what", others())
def test_everything_else_is_handed_back(what: str) -> None:
    """Another decoder then says what it is."""
    assert ours(others()[what]) is None


def test_coefficients_that_need_more_than_16_bits_are_handed_back() -> None:
    """libjpeg-turbo's forms do not agree on them: a quantisation table of the largest numbers."""
    data = jpegs.jpeg(16, 16, [(1, 1)])
    table = data.index(b"\xff\xdb")
    wide = jpegs.segment(0xDB, b"\x10" + b"\xff\xff" * 64)
    large = data[:table] + wide + data[table + 69 :]
    file = jpeg.open_jpeg(large)
    assert file is not None and int(file.tables.min()) == 65_535
    assert ours(large) is None


SEEDS = [
    encoded(np.random.default_rng(9).integers(0, 256, (37, 51, 3), dtype=np.uint8), quality=q, subsampling=s, **o)
    for q, s, o in ((30, 2, {}), (90, 0, {"restart_marker_blocks": 2}), (60, 1, {"optimize": True}))
]


@settings(max_examples=400)
@given(
    seed=st.sampled_from(SEEDS),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.floats(0, 1),
)
def test_a_damaged_file_is_exact_or_handed_back(seed: bytes, changes: list[tuple[float, int]], cut: float) -> None:
    """What is decoded from changed bytes is what libjpeg-turbo decodes from them."""
    data = bytearray(seed)
    for at, value in changes:
        data[int(at * len(data))] = value
    if cut < 0.1:
        del data[int(10 * cut * len(data)) :]
    made = ours(bytes(data))
    if made is not None:
        wanted = pillow(bytes(data))
        assert wanted is not None and np.array_equal(made, wanted)


@pytest.mark.parametrize("sampling", [(), ((1, 1),) * 2, ((5, 1),), ((2, 2),), ((1, 1), (2, 1), (1, 1)), ((0, 1),)])
def test_a_layout_that_cannot_be_is_refused(sampling: tuple[tuple[int, int], ...]) -> None:
    """Layouts also come from other processes."""
    with pytest.raises(ValueError, match=r"JPEG|chroma|grey"):
        jpeg.JpegLayout(10, 10, sampling)


def test_memory_of_another_size_is_refused() -> None:
    """The decoder writes exactly the layout's coefficients."""
    file = jpeg.open_jpeg(SEEDS[0])
    assert file is not None
    with pytest.raises(ValueError, match="are wanted"):
        file.decode(np.empty(file.layout.coefficients - 1, np.int16))
    with pytest.raises(ValueError, match="aligned"):
        file.decode(np.empty(2 * file.layout.coefficients + 1, np.uint8)[1:])  # type: ignore[arg-type]
