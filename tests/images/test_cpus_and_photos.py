"""The CPU quota, and pictures made from a seed."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sidecar.runtime import cpu_quota
from sidecar.tools import synthetic_photos

ALLOWED = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"cpu.max": "100000 100000"}, 1),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "max 100000"}, ALLOWED),
        ({"cpu.max": "99900000 100000"}, ALLOWED),
        ({"cpu.max": "nonsense"}, ALLOWED),
        ({"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, ALLOWED),
        ({}, ALLOWED),
    ],
    ids=str,
)
def test_the_quota_is_the_cgroups(tmp_path: Path, files: dict[str, str], wanted: int) -> None:
    """Both cgroup versions are read; without a quota, or with one above it, the affinity mask counts."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert cpu_quota.quota(tmp_path) == wanted


@pytest.mark.parametrize("size", [(640, 480), (1280, 720), (1920, 1080)], ids=str)
def test_pictures_weigh_what_photographs_weigh(size: tuple[int, int]) -> None:
    """A picture of camera size takes 0.15 to 0.35 bytes per pixel, and its seed alone decides its pixels."""
    data = synthetic_photos.photo(*size, seed=4)
    assert 0.15 < len(data) / (size[0] * size[1]) < 0.35
    with Image.open(io.BytesIO(data)) as image:
        assert (image.size, image.mode) == (size, "RGB")
    assert np.array_equal(synthetic_photos.pixels(*size, 4), synthetic_photos.pixels(*size, 4))
    assert not np.array_equal(synthetic_photos.pixels(*size, 4), synthetic_photos.pixels(*size, 5))


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (3, 2)], ids=str)
def test_the_smallest_pictures(size: tuple[int, int]) -> None:
    """Any size from 1 x 1 on is made."""
    with Image.open(io.BytesIO(synthetic_photos.photo(*size))) as image:
        assert image.size == size
