"""The slow truth of the resize."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sidecar.kernels.reference import resize, taps

SIZES = [
    (48, 64, 28, 56),
    (37, 41, 56, 84),
    (108, 192, 56, 112),
    (33, 51, 33, 28),
    (100, 30, 28, 30),
    (1, 1, 56, 56),
    (1, 90, 28, 196),
    (300, 7, 280, 28),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("resample", "mode"), [(2, "bilinear"), (3, "bicubic")])
@pytest.mark.parametrize("content", ["noise", "extremes"])
def test_the_reference_is_atens_resize(size: tuple[int, int, int, int], resample: int, mode: str, content: str) -> None:
    """The integers equal ATen's uint8 antialiased resize bit for bit, growing and shrinking, overshoot included."""
    h, w, height, width = size
    rng = np.random.default_rng(h * w)
    image = rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
    if content == "extremes":
        image = np.where(image > 127, 255, 0).astype(np.uint8)
    planes = torch.from_numpy(image).permute(2, 0, 1)[None].contiguous()
    wanted = torch.nn.functional.interpolate(planes, size=(height, width), mode=mode, antialias=True)
    got = resize(image, height, width, resample)
    assert np.array_equal(got, wanted[0].permute(1, 2, 0).numpy())


def test_weights_stay_below_two_to_the_fifteen() -> None:
    """Every weight fits in 16 bits with its sign, and a row of weights sums to one within its rounding."""
    for source, target in ((1080, 728), (10, 1000), (4000, 28), (1, 56)):
        rows, bits = taps(source, target, 3)
        for _, weights in rows:
            assert np.abs(weights).max() < 1 << 15
            assert abs(int(weights.sum()) - (1 << bits)) <= len(weights)


def test_the_input_is_not_changed() -> None:
    """resize leaves its input as it was."""
    image = np.arange(300, dtype=np.uint8).reshape(10, 10, 3)
    before = image.copy()
    resize(image, 28, 28)
    assert np.array_equal(image, before)
