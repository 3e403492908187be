"""Each form of the compiled kernel gives the bits of torchvision's uint8 resize and of the processor's operations."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.images.worker import tensors
from sidecar.kernels import families, fused, reference
from sidecar.kernels.grid import BICUBIC, BILINEAR, LANCZOS, Geometry, PatchSpec

from . import by_torch, published

LEVELS = pytest.mark.parametrize("level", [fused.FASTEST, fused.PLAIN], ids=["fastest", "plain"])
SIDE = st.one_of(st.integers(1, 40), st.integers(1, 700))


@pytest.fixture(autouse=True)
def built(requires: Any) -> None:
    """Fails where everything is required, skips elsewhere."""
    if fused.missing():
        requires("c++")
        pytest.fail(fused.missing())


def picture(h: int, w: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Noise with flat black and white parts, so that sums overshoot at both ends."""
    image = np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)
    image[: h // 3, : w // 2] = 255
    image[h // 2 :, w // 3 :] //= 255
    return image


def spec(**changes: Any) -> PatchSpec:
    found = families.from_config(published.settings("Qwen2VLImageProcessor"))
    assert isinstance(found, PatchSpec)
    return dataclasses.replace(found, **changes)


def torchvision(image: np.ndarray[Any, Any], height: int, width: int, resample: int) -> np.ndarray[Any, Any]:
    return by_torch.rows(by_torch.resize(by_torch.planes(image), Geometry(height, width), spec(resample=resample)))


@LEVELS
@settings(max_examples=120)
@given(
    h=SIDE,
    w=SIDE,
    height=SIDE,
    width=SIDE,
    resample=st.sampled_from([BILINEAR, BICUBIC, LANCZOS]),
    seed=st.integers(0, 9),
)
def test_resize_equals_torchvision(
    level: int, h: int, w: int, height: int, width: int, resample: int, seed: int
) -> None:
    """Any size to any size, both kernels: not one byte differs."""
    image = picture(h, w, seed)
    before = image.copy()
    ours = fused.resize(image, height, width, resample, level)
    assert np.array_equal(ours, torchvision(image, height, width, resample))
    assert np.array_equal(image, before), "an input is never changed"


@LEVELS
@pytest.mark.parametrize(
    ("h", "w", "height", "width"),
    [
        (1080, 1920, 728, 1316),
        (1, 1, 56, 56),
        (3000, 64, 28, 28),
        (28, 5000, 28, 252),
        (64, 1, 64, 2000),
        (2, 3000, 28, 10),
    ],
)
def test_resize_equals_torchvision_at_extremes(level: int, h: int, w: int, height: int, width: int) -> None:
    """One pixel, one column, scales over 100, and a size of the real world."""
    image = picture(h, w)
    for resample in (BILINEAR, BICUBIC, LANCZOS):
        assert np.array_equal(
            fused.resize(image, height, width, resample, level), torchvision(image, height, width, resample)
        )


@LEVELS
def test_resize_equals_the_reference(level: int) -> None:
    """The slow integers are the specification."""
    image = picture(67, 91)
    for resample in (BILINEAR, BICUBIC, LANCZOS):
        assert np.array_equal(fused.resize(image, 28, 56, resample, level), reference.resize(image, 28, 56, resample))


@LEVELS
@settings(max_examples=60)
@given(
    h=st.integers(8, 400),
    w=st.integers(8, 400),
    patch=st.sampled_from([4, 8, 14, 16, 20]),
    merge=st.sampled_from([1, 2, 3]),
    temporal=st.sampled_from([1, 2]),
    normalize=st.booleans(),
    rescale=st.booleans(),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
)
def test_patches_equal_the_processors_operations(
    level: int,
    h: int,
    w: int,
    patch: int,
    merge: int,
    temporal: int,
    normalize: bool,
    rescale: bool,
    rows: int,
    columns: int,
) -> None:
    """For any layout, float32 has equal bits, bfloat16 and float16 equal torch's rounding, uint8 equals the pixels."""
    which = spec(
        patch_size=patch, merge_size=merge, temporal_patch_size=temporal, do_normalize=normalize, do_rescale=rescale
    )
    step = patch * merge
    geometry = Geometry(rows * step, columns * step, 1, rows * merge, columns * merge, rows * columns)
    image = picture(h, w)
    resized = by_torch.resize(by_torch.planes(image), geometry, which)
    wanted = by_torch.patches(resized, geometry, which)
    floats = fused.patches(image, geometry, which, "float32", level)
    assert torch.equal(torch.from_numpy(floats), wanted.to(torch.float32))
    halves = torch.from_numpy(fused.patches(image, geometry, which, "bfloat16", level)).view(torch.bfloat16)
    assert torch.equal(halves, wanted.to(torch.bfloat16))
    small = torch.from_numpy(fused.patches(image, geometry, which, "float16", level))
    assert torch.equal(small, wanted.to(torch.float16))
    bytes_ = fused.patches(image, geometry, which, "uint8", level)
    plain = by_torch.patches(resized, geometry, dataclasses.replace(which, do_normalize=False, do_rescale=False))
    assert torch.equal(torch.from_numpy(bytes_), plain)


@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_patches_too_large_for_the_caches_are_the_same(kind: fused.Kind) -> None:
    """Results of over 8 MB go past the caches, byte for byte the same."""
    which = spec()
    side = 43 * which.patch_size * which.merge_size
    geometry = Geometry(side, side, 1, 86, 86, 43 * 43)
    image = picture(1250, 1300)
    wanted = fused.patches(image, geometry, which, kind, fused.PLAIN)
    assert wanted.nbytes > 8 << 20
    assert np.array_equal(fused.patches(image, geometry, which, kind), wanted)


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry(728, 1316, 1, 52, 94, 1222),
        Geometry(60, 80),
        Geometry(30, 40, crop=(2, 3, 20, 30)),
        Geometry(1, 1),
        Geometry(2, 90),
    ],
)
def test_a_file_holds_the_resized_pixels(geometry: Geometry) -> None:
    """A PPM's pixels equal torchvision's: resized in place, unchanged, cropped, or smaller than a register."""
    image = picture(60, 80)
    wanted = by_torch.crop(by_torch.resize(by_torch.planes(image), geometry, spec()), geometry)
    made = tensors.resized_ppm(image, geometry, spec())
    height, width = geometry.size
    assert bytes(made) == b"P6\n%d %d\n255\n" % (width, height) + by_torch.rows(wanted).tobytes()


def test_what_does_not_fit_is_refused() -> None:
    """Wrong shapes, types and sizes are errors with a text, never accesses out of bounds."""
    good = picture(60, 60)
    for bad in (good[:, ::2], good[..., :2], good.astype(np.int16), good[0]):
        with pytest.raises(ValueError, match="contiguous uint8"):
            fused.resize(bad, 28, 28, BICUBIC)
    for size in ((0, 28), (28, -1), (1 << 21, 28)):
        with pytest.raises(ValueError):
            fused.resize(good, *size, BICUBIC)
    with pytest.raises(ValueError, match="resample"):
        fused.resize(good, 28, 28, 7)
    with pytest.raises(ValueError, match="whole number"):
        fused.patches(good, Geometry(30, 28, 1, 2, 2, 1), spec(), "float32")


def test_the_instruction_set_is_named() -> None:
    """A figure can say what it was measured with."""
    assert fused.level() in ("avx512", "avx2", "plain")
    assert fused.missing() == ""
    assert fused.refused() == "", "a form that gives other bits on this CPU"
