"""The JPEG kernels give the bits of the slow integers, hence of libjpeg-turbo: held in Triton's interpreter."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from sidecar.kernels import jpeg, jpeg_reference, ragged_jpeg

from . import jpegs
from .test_jpeg_exact import SAMPLINGS, encoded, pillow


@pytest.fixture(scope="module")
def gpu(requires: Any) -> Iterator[Any]:
    """The kernels' module, imported so that the interpreter runs them."""
    requires("python:triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import triton
        import triton.language as tl

        # what was imported before, without the interpreter, has compiled forms of the language's own functions
        standard = importlib.reload(importlib.import_module("triton.language.standard"))
        patch.setattr(tl, "max", standard.max)
        from sidecar.kernels import gpu_jpeg

        assert not isinstance(gpu_jpeg.colour, triton.JITFunction), "imported before, without TRITON_INTERPRET=1"
        yield gpu_jpeg


def opened(data: bytes) -> tuple[jpeg.JpegFile, Any]:
    """A file and its coefficients."""
    file = jpeg.open_jpeg(data)
    assert file is not None
    coefficients = np.empty(file.layout.coefficients, np.int16)
    assert file.decode(coefficients)
    return file, coefficients


def inversed(gpu: Any, files: list[bytes]) -> tuple[Any, Any]:
    """The samples of a batch, and what each program reports."""
    found = [opened(data) for data in files]
    layouts = [file.layout for file, _ in found]
    batch = ragged_jpeg.lay_out(layouts, [file.tables for file, _ in found], [0] * len(files))
    coefficients = np.zeros(batch.coefficient_bytes, np.uint8)
    for (_, numbers), at in zip(found, batch.coefficients, strict=True):
        coefficients[at : at + numbers.nbytes] = numbers.view(np.uint8)
    samples = torch.full((batch.sample_bytes,), 99, dtype=torch.uint8)
    flags = torch.full((batch.inverse_owners.size,), 7, dtype=torch.int32)
    integers = map(torch.from_numpy, (batch.tables, batch.inverse, batch.inverse_owners))
    words = torch.from_numpy(coefficients).view(torch.int32)
    gpu.inverse[(flags.numel(),)](words, *integers, samples.view(torch.int32), flags, ragged_jpeg.BLOCKS)
    return samples.numpy(), flags.numpy()


def slow_samples(data: bytes) -> Any:
    """The samples of a file by the slow integers, as the kernel lays them out."""
    file, numbers = opened(data)
    made, first = [], 0
    for plane, table in zip(file.layout.planes, file.tables, strict=True):
        last = first + 64 * plane.blocks
        samples = jpeg_reference.inverse(numbers[first:last].reshape(plane.high, plane.wide, 8, 8), table)
        assert samples is not None
        made.append(samples.astype(np.uint8).reshape(-1))
        first = last
    return np.concatenate(made)


@pytest.mark.slow  # each program of the first launch takes the interpreter seconds
def test_samples_are_those_of_the_slow_integers(gpu: Any) -> None:
    """A ragged batch of a grey file and one of hard contrast whose components take more than one program."""
    noise = np.random.default_rng(1).integers(0, 2, (61, 283, 3), dtype=np.uint8) * 255
    files = [jpegs.jpeg(17, 9, [(1, 1)]), encoded(noise, quality=60, subsampling=2)]
    samples, flags = inversed(gpu, files)
    assert not flags.any() and np.array_equal(samples, np.concatenate([slow_samples(data) for data in files]))


def test_numbers_beyond_the_limits_are_reported(gpu: Any) -> None:
    """Of two images, the one that the reference refuses is flagged, and the other has its samples."""
    sound = jpegs.jpeg(16, 16, [(1, 1)])
    table = sound.index(b"\xff\xdb")
    large = sound[:table] + jpegs.segment(0xDB, b"\x10" + b"\xff\xff" * 64) + sound[table + 69 :]
    file, numbers = opened(large)
    assert jpeg_reference.pixels(file.layout, file.tables, numbers) is None
    samples, flags = inversed(gpu, [sound, large])
    assert flags.tolist() == [0, 1]
    assert np.array_equal(samples[: 16 * 16], slow_samples(sound))


@pytest.mark.parametrize(
    "names", [("4:2:0", "4:2:2", "4:4:0"), pytest.param(tuple(SAMPLINGS), marks=pytest.mark.slow)], ids=["usual", "all"]
)
def test_pixels_of_a_batch_are_libjpegs(gpu: Any, names: tuple[str, ...]) -> None:
    """Samplings in one ragged batch, one size narrower than what is interpolated: not one byte differs."""
    files = [jpegs.jpeg(w, h, SAMPLINGS[name], seed=w * h) for name in names for w, h in [(3, 2), (17, 13)]]
    found = [opened(data)[0] for data in files]
    shapes = [(file.layout.height, file.layout.width, 3) for file in found]
    starts = np.cumsum([0, *(-(-np.prod(shape) // 16) * 16 for shape in shapes)])
    batch = ragged_jpeg.lay_out([file.layout for file in found], [file.tables for file in found], starts[:-1].tolist())
    samples = torch.from_numpy(np.concatenate([slow_samples(data) for data in files]))
    rgb = torch.full((int(starts[-1]),), 55, dtype=torch.uint8)
    integers = map(torch.from_numpy, (batch.colour, batch.colour_owners))
    gpu.colour[(batch.colour_owners.size,)](samples, *integers, rgb, *ragged_jpeg.COLOUR_TILE)
    for data, at, shape in zip(files, starts, shapes, strict=False):
        assert np.array_equal(rgb[at : at + np.prod(shape)].numpy().reshape(shape), pillow(data))
