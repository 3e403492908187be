"""`--images-decode fast`: what may be shrunk while it is decoded, how far off that is, and that all else stays exact."""

from __future__ import annotations

import random
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sidecar.images.protocol import RAW, TENSORS, Done, Job, Limits, Refused
from sidecar.images.service import Images
from sidecar.images.shm_cache import ImageCache
from sidecar.images.worker import pipeline as work
from sidecar.images.worker.fast_jpeg import MARGIN, fraction, target
from sidecar.kernels import families
from sidecar.kernels.grid import ProcessorSpec
from sidecar.tools import synthetic_photos as photos

from . import corpus, jpegs
from .conftest import Server
from .corpus import saved
from .test_tiles import ROWS

LIMITS = Limits(20 << 20, 20_000_000)
SIDES = st.integers(1, 70_000)


def spec(name: str = "Qwen2VLImageProcessor", **config: Any) -> ProcessorSpec:
    """A processor whose results are small."""
    found = families.from_config({"image_processor_type": name, **config} if config else {
        "image_processor_type": name, "min_pixels": 56 * 56, "max_pixels": 448 * 448})  # fmt: skip
    assert found is not None
    return found


TINY = spec("SiglipImageProcessor", size={"height": 8, "width": 8})


def both(data: bytes, chosen: ProcessorSpec, want: str = RAW) -> tuple[work.Answer, work.Answer]:
    """What becomes of a file exactly, and fast."""
    exact, fast = (
        work.run(Job(want, replace(chosen, fast=fast).to_json(), False, LIMITS, 60.0), data) for fast in (False, True)
    )
    return exact, fast


def unlike(done: Done) -> Done:
    """A record without what may differ between the ways."""
    return replace(done, stages=(), content_hash="", exact=True)


def psnr(a: work.Answer, b: work.Answer) -> float:
    """Decibels between two images' bytes."""
    one, two = (np.frombuffer(answer[1], np.uint8).astype(float) for answer in (a, b))
    return float(10 * np.log10(255**2 / max(((one - two) ** 2).mean(), 1e-9)))


PICTURE = Image.fromarray(photos.pixels(1600, 1200, 7))
SHRUNK = {
    "4:2:0": saved(PICTURE, "JPEG", quality=90),
    "4:4:4": saved(PICTURE, "JPEG", quality=90, subsampling=0),
    "progressive": saved(PICTURE, "JPEG", progressive=True),
    "grey": saved(PICTURE.convert("L"), "JPEG"),
    "rgb": saved(PICTURE, "JPEG", keep_rgb=True),
    **{f"turned {how}": photos.photo(1600, 1200, 7, exif_orientation=how) for how in range(1, 9)},
}


@given(st.tuples(SIDES, SIDES), st.tuples(SIDES, SIDES))
def test_no_side_falls_below_its_margin(own: tuple[int, int], to: tuple[int, int]) -> None:
    """Both sides divide evenly and stay longer than they need to be; the next larger fraction would break that; turning changes nothing."""

    def allowed(by: int) -> bool:
        return all(a % by == 0 and a / by >= MARGIN * b for a, b in zip(own, to, strict=True))

    by = fraction(own, to)
    assert by in (1, 2, 4, 8) and by == fraction(own[::-1], to[::-1])
    assert by == 1 or allowed(by)
    assert not any(allowed(larger) for larger in (2, 4, 8) if larger > by)


@pytest.mark.parametrize(
    ("own", "to", "by"),
    [((3000, 4000), (840, 1148), 2), ((3000, 4000), (364, 504), 4), ((3000, 4000), (224, 224), 8), ((1080, 1920), (336, 588), 2),
     ((1080, 1920), (728, 1316), 1), ((3001, 4000), (364, 504), 1), ((100, 100), (300, 300), 1)],
)  # fmt: skip
def test_known_sizes(own: tuple[int, int], to: tuple[int, int], by: int) -> None:
    """Photographs of known sizes and processors."""
    assert fraction(own, to) == by


@pytest.mark.parametrize("name", ROWS)
def test_every_view_has_its_margin(name: str) -> None:
    """Of a processor with several views, the largest decides; grids, sizes and tokens follow from the whole image."""
    chosen = ROWS[name].spec()
    geometry = chosen.geometry(1200, 1600)
    most = target(geometry)
    assert all(view.size[0] <= most[0] and view.size[1] <= most[1] for view in geometry.views)
    exact, fast = both(SHRUNK["4:2:0"], chosen, TENSORS)
    assert isinstance(exact[0], Done) and isinstance(fast[0], Done)
    assert fast[0].exact == (fraction((1200, 1600), most) == 1)
    assert unlike(exact[0]) == unlike(fast[0]) and len(exact[1]) == len(fast[1])


@pytest.mark.parametrize("name", SHRUNK)
def test_the_error_of_a_photograph_is_small(name: str) -> None:
    """Shrunk, every kind of plain JPEG is within 44 dB and a mean grey level of the exact one, in the same size and turned the same way."""
    exact, fast = both(SHRUNK[name], spec())
    assert isinstance(exact[0], Done) and isinstance(fast[0], Done)
    assert exact[0].exact and not fast[0].exact
    assert [stage for stage, _ in fast[0].stages] == ["unpack", "decode_fast", "resize", "encode"]
    assert unlike(exact[0]) == unlike(fast[0])
    assert psnr(exact, fast) > 44
    a, b = (np.frombuffer(answer[1], np.uint8).astype(int) for answer in (exact, fast))
    assert np.abs(a - b).mean() < 1


EXACT = {
    "png": saved(PICTURE, "PNG"),
    "webp": saved(PICTURE, "WEBP"),
    "cmyk": saved(PICTURE.convert("CMYK"), "JPEG"),
    "two pictures": saved(PICTURE, "MPO", save_all=True, append_images=[PICTURE]),
    "sides that do not divide": photos.photo(1599, 1200, 7),
    "hardly larger": photos.photo(640, 480, 7),
    "smaller": photos.photo(64, 48, 7),
}


@pytest.mark.parametrize("name", EXACT)
def test_what_is_not_shrunk_is_exact(name: str) -> None:
    """Other formats, unusual JPEGs and those that hardly shrink give the exact bytes, and say so."""
    exact, fast = both(EXACT[name], spec())
    assert isinstance(exact[0], Done) and isinstance(fast[0], Done)
    assert fast[0].exact and bytes(fast[1]) == bytes(exact[1])


def even() -> dict[str, bytes]:
    """The corpus has odd sizes, which are never shrunk: its kinds of JPEG in sizes that are, whole, cut off and changed."""
    made: dict[str, bytes] = {}
    for i, (h, v) in enumerate((h, v) for h in (1, 2, 3, 4) for v in (1, 2, 3, 4)):
        for marker in (0xC0, 0xC1, 0xC2):
            parts = [(h, v), *[((1, 1), (2, 1), (1, 2), (2, 2))[i % 4]] * (2 * (i % 2))]
            made[f"{h}x{v} {marker:x}"] = jpegs.jpeg(64, 48, parts, marker=marker, seed=i)
    for n in range(6):
        made[f"adobe {n}"] = jpegs.jpeg(64, 48, [(1, 1)] * 3, extra=jpegs.adobe(n % 3), seed=n)
    dice, whole = (
        random.Random(5),
        {"": photos.photo(64, 48, 3), "progressive ": saved(corpus.picture(64, 48), "JPEG", progressive=True)},
    )
    for kind, data in whole.items():
        made |= {f"{kind}cut at {at}": data[:at] for at in range(12, len(data), 41)}
        for n in range(60):
            changed = bytearray(data)
            for _ in range(1 + n % 4):
                changed[dice.randrange(12, len(data))] = dice.randrange(256)
            made[f"{kind}changed {n}"] = bytes(changed)
    return made


def test_hostile_jpegs_end_as_in_the_exact_way() -> None:
    """What the exact way refuses is refused, what it takes is taken, in the same size, and nothing crashes."""
    wrong: list[str] = []
    shrunk = 0
    for name, data in even().items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exact, fast = (answer[0] for answer in both(data, TINY))
        same = (
            exact.reason == fast.reason
            if isinstance(exact, Refused) and isinstance(fast, Refused)
            else isinstance(exact, Done) and isinstance(fast, Done) and exact.original == fast.original
        )
        if not same:
            wrong.append(f"{name}: {exact} {fast}")
        shrunk += isinstance(fast, Done) and not fast.exact
    assert not wrong
    assert shrunk > 50


async def test_the_cache_tells_the_ways_apart(server: Server, tmp_path: Path) -> None:
    """Of one image in one cache each way keeps its own; the second time it comes from there, and still says what it is."""
    cache, chosen = ImageCache(str(tmp_path), 64 << 20, b"secret"), spec()
    seen = []
    for turn in range(2):
        for fast in (False, True):
            images = Images(server.path, server.settings, replace(chosen, fast=fast), cache)
            (made,) = await images.tensors([(SHRUNK["4:2:0"], False)])
            assert (made.prepared.outcome, made.prepared.exact) == (("ok", "cached")[turn], not fast)
            seen.append((bytes(made.values), made.prepared.content_hash, images.spec.fingerprint))
            await images.close()
    exact, fast_one = seen[:2]
    assert seen[2:] == seen[:2] and all(a != b for a, b in zip(exact, fast_one, strict=True))
