"""The shipped machine code, and its way through CUDA's driver to the last call, against a scripted driver library.

The library runs the kernels in C of its own (tests/cuda_stub), so that a wrong launch gives wrong bits.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sidecar.images.tensor_layout import ELEMENT_BYTES
from sidecar.images.worker import tensors
from sidecar.kernels import cubins, families, jpeg
from sidecar.kernels.cuda_driver import CudaDevice, CudaError, CudaMissingError, Driver
from sidecar.kernels.cuda_resize import CudaResize, HostImage, NoKernelError, Places, plan
from sidecar.kernels.grid import PatchSpec, ProcessorSpec
from sidecar.kernels.ragged import GPU_TILES, RaggedBatch, RaggedImage, lay_out
from tests.cuda_stub.build import build

from . import jpegs, published

BUDGET = 24 << 20
EM_CUDA = 190


@pytest.fixture(scope="module")
def library(requires: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build(requires("gcc"), tmp_path_factory.mktemp("cuda")) / "libcuda.so.1")


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A function: what the library does from now on."""
    path = tmp_path / "script"
    monkeypatch.setenv("CUDA_STUB_SCRIPT", str(path))
    monkeypatch.setenv("CUDA_STUB_LOG", str(tmp_path / "log"))
    return lambda text: path.write_text(text) and None


@pytest.fixture
def device(library: str, script: Callable[[str], None]) -> CudaResize:
    driver = Driver(library)
    return CudaResize(driver, driver.devices()[0], BUDGET)


def spec(name: str = "Qwen2VLImageProcessor", **changes: Any) -> ProcessorSpec:
    found = families.from_config(published.settings(name))
    assert found is not None
    return dataclasses.replace(found, **changes)


def picture(height: int, width: int) -> np.ndarray[Any, Any]:
    """Noise with flat parts, so that sums overshoot at both ends."""
    image = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image[: height // 3, : width // 2] = 255
    return image


def batch_of(images: Sequence[Any], specs: Sequence[ProcessorSpec]) -> RaggedBatch:
    wanted = []
    for number, (image, chosen) in enumerate(zip(images, specs, strict=True)):
        geometry = chosen.geometry(*image.shape[:2])
        patches = chosen if isinstance(chosen, PatchSpec) else None
        wanted.append(RaggedImage(*image.shape[:2], geometry, chosen.resample, patches, planes=True, table=number))
    return lay_out(wanted, GPU_TILES)


def made(device: CudaResize, images: Sequence[Any], specs: Sequence[ProcessorSpec]) -> list[Any] | None:
    """What the device makes of a batch: the bytes of each image; None if it has no memory for it."""
    batch, size = batch_of(images, specs), ELEMENT_BYTES[specs[0].dtype]
    expected = [tensors.prepare(i, s.geometry(*i.shape[:2]), s) for i, s in zip(images, specs, strict=True)]
    memory = [np.zeros(max(i.nbytes, e.nbytes) + 7, np.uint8) for i, e in zip(images, expected, strict=True)]
    for m, image in zip(memory, images, strict=True):
        m[: image.nbytes] = image.reshape(-1)
    values = None
    if size > 1:
        values = np.stack([tensors.round_to(tensors.table(s), s.dtype) for s in specs])
    hosts = [HostImage(m, i.nbytes, e.nbytes) for m, i, e in zip(memory, images, expected, strict=True)]
    if device.run(plan(batch, size, values, hosts), size, hosts) is None:
        return None
    return [m[: e.nbytes] for m, e in zip(memory, expected, strict=True)]


def wanted(images: Sequence[Any], specs: Sequence[ProcessorSpec]) -> list[Any]:
    made = [tensors.prepare(i, s.geometry(*i.shape[:2]), s) for i, s in zip(images, specs, strict=True)]
    return [np.ascontiguousarray(m).reshape(-1).view(np.uint8) for m in made]


@pytest.mark.parametrize("half", ["", "BF16", "F16"])
def test_a_batch_gets_the_cpus_bits(device: CudaResize, half: str) -> None:
    """Patches of two processors and a crop as planes, in one batch, in the type that the engine takes."""
    images = [picture(140, 300), picture(75, 90), picture(200, 64)]
    specs = [
        spec(max_pixels=200 * 200, half=half),
        spec(patch_size=16, merge_size=1, temporal_patch_size=1, half=half),
        spec("CLIPImageProcessor", shortest=60, crop_height=50, crop_width=56, half=half),
    ]
    for _ in range(2):  # memory is reused
        got = made(device, images, specs)
        assert got is not None
        assert all(np.array_equal(g, w) for g, w in zip(got, wanted(images, specs), strict=True))


def test_bytes_need_no_table(device: CudaResize) -> None:
    """A processor without floats."""
    images, specs = [picture(140, 300)], [spec(do_rescale=False, do_normalize=False)]
    got = made(device, images, specs)
    assert got is not None and np.array_equal(got[0], wanted(images, specs)[0])


def test_a_launch_is_what_the_kernel_was_compiled_for(device: CudaResize, tmp_path: Path) -> None:
    """One program a tile, the threads and shared memory of the compiler's manifest."""
    images, specs = [picture(140, 300)], [spec()]
    made(device, images, specs)
    batch, manifest = batch_of(images, specs), cubins.Archive().manifest["kernels"]
    lines = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("launch")]
    programs = {"across": batch.across.size, "down_4": batch.down.size}
    facts = {name: manifest[name]["90"] for name in programs}
    assert lines == [
        f"launch {name} {programs[name]} x {f['threads']}, {f['shared_bytes']} bytes" for name, f in facts.items()
    ]


def test_memory_that_cannot_be_pinned_is_copied(device: CudaResize, script: Callable[[str], None]) -> None:
    """Some containers refuse to pin: results are the same, and it is not asked again."""
    script("cuMemHostRegister_v2 800\n")
    images, specs = [picture(60, 90)] * 2, [spec()] * 2
    got = made(device, images, specs)
    assert got is not None and np.array_equal(got[0], wanted(images, specs)[0])


def test_a_full_device_refuses(device: CudaResize, script: Callable[[str], None]) -> None:
    """What the device or the budget has no room for is refused, and the next batch is served."""
    small, large = [picture(60, 90)], [picture(3000, 2900)]
    assert made(device, large, [spec()]) is None
    script("memory 100000\n")
    assert made(device, small, [spec()]) is None
    script("\n")
    got = made(device, small, [spec()])
    assert got is not None and np.array_equal(got[0], wanted(small, [spec()])[0])


def test_a_failure_has_its_call_and_code(device: CudaResize, script: Callable[[str], None]) -> None:
    """A kernel's fault, which the driver reports when it is waited for."""
    script("cuStreamSynchronize 700\n")
    with pytest.raises(CudaError, match=r"cuStreamSynchronize.*700") as failed:
        made(device, [picture(60, 90)], [spec()])
    assert failed.value.code == 700


def test_a_machine_without_a_driver_says_so() -> None:
    with pytest.raises(CudaMissingError, match="libnothing"):
        Driver("libnothing.so.1")
    with pytest.raises(CudaMissingError, match="cu"):  # a library that lacks functions
        Driver("libm.so.6")


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [
        *[((7, 5), None), ((8, 0), 80), ((8, 6), 80), ((8, 9), 89), ((9, 0), 90), ((10, 0), 100)],
        *[((10, 3), 100), ((11, 0), None), ((12, 0), 120), ((12, 1), 120), ((13, 0), None)],
    ],
)
def test_code_fits_its_generation(capability: tuple[int, int], architecture: int | None) -> None:
    """Machine code runs within a major version, on equal and higher minor ones (CUDA's binary compatibility)."""
    assert cubins.architecture_for(*capability) == architecture


def test_a_device_without_code_is_refused(library: str, script: Callable[[str], None]) -> None:
    with pytest.raises(NoKernelError, match=r"Old has compute capability 7\.5"):
        CudaResize(Driver(library), CudaDevice(0, "Old", (7, 5), 0, ""), BUDGET)


def test_machine_code_is_that_of_the_sources() -> None:
    """Whoever changes a kernel compiles it: `make cubins`."""
    archive = cubins.Archive()
    assert archive.manifest["source"] == cubins.source_hash(), "kernels changed: run `make cubins`"
    assert archive.manifest["sha256"] == {
        cubins.entry(name, a): hashlib.sha256(archive.code(name, a)).hexdigest()
        for a in cubins.ARCHITECTURES
        for name in cubins.NAMES
    }


@pytest.mark.parametrize("architecture", cubins.ARCHITECTURES)
def test_machine_code_is_for_its_architecture(architecture: int) -> None:
    """Each part is an ELF file for CUDA whose flags name the architecture, without spilled registers."""
    for name, kernel in cubins.Archive().kernels(architecture).items():
        machine, flags = struct.unpack_from("<H", kernel.code, 18)[0], struct.unpack_from("<I", kernel.code, 48)[0]
        assert kernel.code[:4] == b"\x7fELF" and machine == EM_CUDA
        assert architecture in (flags & 0xFF, flags >> 8 & 0xFF)
        assert f".text.{name}\0".encode() in kernel.code
        assert kernel.parameters == {cubins.ACROSS: 7, cubins.COLOUR: 6}.get(name, 8)
        assert cubins.Archive().manifest["kernels"][name][str(architecture)]["spilled_bytes"] == 0


@pytest.mark.slow
@pytest.mark.timeout(3600)  # 30 kernels: two minutes of one core, and far longer where others have it
def test_compiling_again_gives_the_same_machine_code(requires: Callable[[str], Path]) -> None:
    """The shipped archive is what the pinned compiler makes of the sources, byte for byte."""
    requires("python:triton")
    command = [sys.executable, "-W", "ignore", "-m", "sidecar.kernels.compile_cubins", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3500, check=False)
    assert (done.returncode, done.stdout) == (0, "equal\n"), done.stdout + done.stderr


def test_the_parts_of_a_batch_do_not_overlap() -> None:
    """Each part begins behind the one before it, aligned as the kernels were compiled for."""
    places = Places()
    starts = [places.take(size) for size in (1, 0, 256, 257, 5)]
    assert starts == [0, 256, 512, 768, 1280] and places.total == 1536


def opened(data: bytes) -> tuple[jpeg.JpegFile, Any]:
    """A JPEG, and the memory that begins with its coefficients."""
    file = jpeg.open_jpeg(data)
    assert file is not None
    memory = np.zeros(1 << 20, np.uint8)
    assert file.decode(memory[: 2 * file.layout.coefficients].view(np.int16))
    return file, memory


def test_pixels_and_jpegs_in_one_batch(device: CudaResize) -> None:
    """Each gets libjpeg-turbo's and the CPU kernel's bits; one whose numbers are too large is reported alone."""
    chosen = spec(max_pixels=60 * 60, half="BF16")
    sound = jpegs.jpeg(91, 67, [(2, 2), (1, 1), (1, 1)])
    table = sound.index(b"\xff\xdb")
    large = sound[:table] + jpegs.segment(0xDB, b"\x10" + b"\xff\xff" * 64) + sound[table + 69 :]
    grey = jpegs.jpeg(61, 83, [(1, 1)])
    pixels = [picture(75, 90), *(np.asarray(Image.open(io.BytesIO(d)).convert("RGB")) for d in (sound, large, grey))]
    batch = lay_out(
        [RaggedImage(*p.shape[:2], chosen.geometry(*p.shape[:2]), chosen.resample, chosen) for p in pixels], GPU_TILES
    )
    results = wanted(pixels, [chosen] * 4)
    memory = np.zeros(1 << 20, np.uint8)
    memory[: pixels[0].nbytes] = pixels[0].reshape(-1)
    hosts = [HostImage(memory, pixels[0].nbytes, results[0].nbytes)]
    for data, result in zip((sound, large, grey), results[1:], strict=True):
        file, memory = opened(data)
        hosts.append(HostImage(memory, 2 * file.layout.coefficients, result.nbytes, file.layout, file.tables))
    values = tensors.round_to(tensors.table(chosen), "BF16")[None]
    assert device.run(plan(batch, 2, values, hosts), 2, hosts) == [True, True, False, True]
    for at in (0, 1, 3):
        assert np.array_equal(hosts[at].memory[: hosts[at].result_bytes], results[at])
