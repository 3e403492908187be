"""The Triton kernel gives the bits of the CPU's exact resize: held in Triton's interpreter, where no GPU is needed."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sidecar.images.worker import tensors
from sidecar.kernels import families, ragged, reference
from sidecar.kernels.grid import BICUBIC, BILINEAR, LANCZOS, Geometry, PatchSpec, ProcessorSpec
from sidecar.kernels.ragged import RaggedImage

from . import by_torch, published

RESAMPLES = (BILINEAR, BICUBIC, LANCZOS)
RESAMPLE = st.sampled_from(RESAMPLES)
SLOW = settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
TYPES = pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16, torch.float16], ids=str)


@pytest.fixture(scope="module")
def gpu(requires: Any) -> Iterator[Any]:
    """The kernel's module, imported so that the interpreter runs it."""
    requires("python:triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        from sidecar.kernels import gpu

        assert gpu.is_interpreted(), "something imported the kernel before, without TRITON_INTERPRET=1"
        yield gpu


def picture(h: int, w: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Noise with flat black and white parts, so that sums overshoot at both ends."""
    image = np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)
    image[: h // 3, : w // 2] = 255
    image[h // 2 :, w // 3 :] //= 255
    return image


def spec(name: str = "Qwen2VLImageProcessor", **changes: Any) -> Any:
    found = families.from_config(published.settings(name))
    assert found is not None
    return dataclasses.replace(found, **changes)


def made(
    gpu: Any,
    images: Sequence[np.ndarray[Any, Any]],
    wanted: Sequence[RaggedImage],
    dtype: Any = torch.uint8,
    table: Any = None,
) -> list[Any]:
    """What the kernel makes of a batch: one flat tensor an image."""
    batch = gpu.lay_out(wanted)
    sources = torch.full((batch.source_bytes,), 77, dtype=torch.uint8)
    for at, image in zip(batch.sources, images, strict=True):
        sources[at : at + image.size] = torch.from_numpy(image.reshape(-1))
    before = sources.clone()
    out = torch.zeros(batch.values, dtype=dtype)
    gpu.launch(gpu.load(batch, "cpu"), sources, torch.full((batch.scratch_bytes,), 99, dtype=torch.uint8), table, out)
    assert torch.equal(sources, before), "an input is never changed"
    return [out[at : at + w.values] for at, w in zip(batch.outs, wanted, strict=True)]


def expected(image: np.ndarray[Any, Any], geometry: Geometry, chosen: ProcessorSpec, dtype: Any) -> Any:
    """The CPU's result, rounded to `dtype`; uint8 where no floats are wanted."""
    if dtype == torch.uint8:
        chosen = dataclasses.replace(chosen, do_normalize=False, do_rescale=False)
    return by_torch.values(by_torch.planes(image), geometry, chosen).to(dtype).reshape(-1)


def tables(*specs: ProcessorSpec, dtype: Any) -> Any:
    """The specs' tables, as the sidecar makes them; None for bytes."""
    return None if dtype == torch.uint8 else torch.stack([torch.from_numpy(tensors.table(s)) for s in specs]).to(dtype)


@settings(max_examples=150)
@given(source=st.integers(1, 900), target=st.integers(1, 700), resample=RESAMPLE)
def test_weights_are_the_references(source: int, target: int, resample: int) -> None:
    """Vectorised weights equal the slow ones, with zeros around, and no window reaches far behind the end."""
    slow, bits = reference.taps(source, target, resample)
    fast = ragged.axis(source, target, resample, 4)
    taps = fast.weights.shape[0]
    assert fast.bits == bits and taps % 4 == 0
    assert fast.first.min() >= 0 and fast.first.max() + taps <= source + 3
    for i, (first, weights) in enumerate(slow):
        before = first - fast.first[i]
        assert before >= 0
        wanted = np.pad(weights, (before, taps - before - len(weights)))
        assert np.array_equal(fast.weights[:, i], wanted)


@SLOW
@given(sizes=st.lists(st.tuples(*[st.integers(1, 150)] * 4, RESAMPLE), min_size=1, max_size=3), seed=st.integers(0, 9))
def test_a_ragged_batch_equals_the_reference(gpu: Any, sizes: list[tuple[int, int, int, int, int]], seed: int) -> None:
    """Images of any sizes to any sizes by any filters in one batch: not one byte differs."""
    images = [picture(h, w, seed + i) for i, (h, w, *_) in enumerate(sizes)]
    wanted = [RaggedImage(h, w, Geometry(height, width), resample) for h, w, height, width, resample in sizes]
    for out, image, (_, _, height, width, resample) in zip(made(gpu, images, wanted), images, sizes, strict=True):
        assert np.array_equal(out.numpy().reshape(height, width, 3), reference.resize(image, height, width, resample))


@pytest.mark.slow
@pytest.mark.parametrize("resample", RESAMPLES)
def test_extremes_equal_the_cpu(gpu: Any, resample: int) -> None:
    """One pixel, one column, scales over 100, sizes that do not change, and tiles that are crossed, in one batch."""
    sizes = [
        (1, 1, 56, 56),
        (900, 4, 7, 28),
        (4, 1500, 28, 12),
        (64, 1, 64, 700),
        (2, 700, 28, 10),
        (40, 50, 40, 50),
        (90, 700, 70, 600),
    ]
    images = [picture(h, w) for h, w, _, _ in sizes]
    wanted = [RaggedImage(h, w, Geometry(height, width), resample) for h, w, height, width in sizes]
    chosen = spec(resample=resample)
    for out, image, w in zip(made(gpu, images, wanted), images, wanted, strict=True):
        resized = by_torch.resize(by_torch.planes(image), w.geometry, chosen)
        assert torch.equal(out, by_torch.crop(resized, w.geometry).permute(1, 2, 0).reshape(-1))


@TYPES
def test_patches_equal_the_cpus(gpu: Any, dtype: Any) -> None:
    """Patches of several processors in one batch, each in its layout and by its table, rounded once from float32."""
    specs = [
        spec(patch_size=p, merge_size=m, temporal_patch_size=t, do_normalize=n, resample=r)
        for p, m, t, n, r in ((14, 2, 2, True, BICUBIC), (16, 1, 1, False, BILINEAR), (4, 3, 2, True, LANCZOS))
    ]
    images = [picture(70 + 31 * i, 120 - 17 * i, i) for i in range(3)]
    goals = [(56, 84), (48, 32), (36, 24)]
    geometries = [
        Geometry(h, w, 1, h // s.patch_size, w // s.patch_size, 1) for s, (h, w) in zip(specs, goals, strict=True)
    ]
    wanted = [
        RaggedImage(*image.shape[:2], geometry, s.resample, s, table=i)
        for i, (image, geometry, s) in enumerate(zip(images, geometries, specs, strict=True))
    ]
    outs = made(gpu, images, wanted, dtype, tables(*specs, dtype=dtype))
    for out, image, geometry, s in zip(outs, images, geometries, specs, strict=True):
        assert torch.equal(out, expected(image, geometry, s, dtype))


@TYPES
def test_planes_and_crops_equal_the_cpus(gpu: Any, dtype: Any) -> None:
    """CLIP's crop of the middle, of tall and of wide images, as planes."""
    clip = spec("CLIPImageProcessor", shortest=60, crop_height=50, crop_width=56)
    images = [picture(90, 130), picture(200, 64), picture(61, 60)]
    wanted = [
        RaggedImage(*image.shape[:2], clip.geometry(*image.shape[:2]), clip.resample, planes=True) for image in images
    ]
    for out, image, w in zip(made(gpu, images, wanted, dtype, tables(clip, dtype=dtype)), images, wanted, strict=True):
        assert torch.equal(out, expected(image, w.geometry, clip, dtype))


def test_the_tiles_of_a_real_gpu_give_the_same_bits(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's larger tiles only save time."""
    monkeypatch.setattr(gpu, "INTERPRETER_TILES", gpu.GPU_TILES)
    image = picture(20, 170)
    (out,) = made(gpu, [image], [RaggedImage(20, 170, Geometry(17, 140), BICUBIC)])
    assert np.array_equal(out.numpy().reshape(17, 140, 3), reference.resize(image, 17, 140, BICUBIC))


def test_what_cannot_be_is_refused(gpu: Any) -> None:
    """A crop outside the image, patches that do not fit, and buffers that are too small raise ValueError."""
    with pytest.raises(ValueError, match="crop"):
        gpu.lay_out([RaggedImage(9, 9, Geometry(9, 9, crop=(0, 1, 9, 9)), BICUBIC)])
    with pytest.raises(ValueError, match="whole number"):
        gpu.lay_out([RaggedImage(9, 9, Geometry(30, 28), BICUBIC, spec())])
    batch = gpu.lay_out([RaggedImage(9, 9, Geometry(9, 9), BICUBIC)])
    short = torch.zeros(10, dtype=torch.uint8)
    with pytest.raises(ValueError, match="too small"):
        gpu.launch(gpu.load(batch, "cpu"), short, short, None, short)


def test_a_batch_knows_its_memory(gpu: Any) -> None:
    """A 1080p image moves the bytes that the docstring states: 6.2 MB in, 4.3 MB between, 11.5 MB out as bfloat16."""
    chosen = spec(max_pixels=1_003_520)
    assert isinstance(chosen, PatchSpec)
    batch = gpu.lay_out([RaggedImage(1080, 1920, chosen.geometry(1080, 1920), chosen.resample, chosen)])
    assert batch.source_bytes == pytest.approx(6.2e6, rel=0.01) and batch.scratch_bytes == pytest.approx(
        4.3e6, rel=0.01
    )
    assert batch.moved(2) == pytest.approx(26.3e6, rel=0.02)


COMPILE = """
import warnings; warnings.simplefilter("ignore")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sidecar.kernels import gpu

def ptx(kernel, pointers, tile, **fixed):
    names = list(kernel.arg_names)
    signature = {n: pointers.get(n, "constexpr") for n in names}
    sides = "TILE_ROWS" if "TILE_ROWS" in names else "TILE_HEIGHT", "TILE_WIDTH"
    consts = dict(zip(sides, tile)) | fixed
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in pointers}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in consts.items()}, aligned)
    return triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": gpu.NUM_WARPS}).asm["ptx"]

integers = {"tables": "*i32", "descriptors": "*i64", "owners": "*i32", "scratch": "*u8"}
across = ptx(gpu.across, integers | {"words": "*i32"}, gpu.GPU_TILES.across)
assert "bar.sync" not in across, "weights go through shared memory"
for out in ("u8", "fp32", "bf16", "fp16"):
    down = ptx(gpu.down, integers | {"values": "*" + out, "out": "*" + out}, gpu.GPU_TILES.down, LOOK_UP=out != "u8")
    assert "ld.global.v4.b32" in down, "the vertical pass does not load whole vectors"
"""


def test_it_compiles_for_a_real_gpu(requires: Any, tmp_path: Any) -> None:
    """Triton's compiler takes the kernel for compute capability 9.0, without a GPU, and loads as the docstring says."""
    requires("python:triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
