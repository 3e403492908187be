"""The stages of gpu_all.py: each is a function that adds measurements to a file of JSON lines.

Rules: only what the service uses is measured, the shipped machine code through CUDA's driver; torch is there for the
engine's stand-in alone. Bits come first: a stage that times asserts none. A row is the median, or the least where it
says so; times include what is named. Nothing is written beside the code.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import io
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that a checkout is enough

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from sidecar.health.gpu_signs import MIN_LEVEL_SAMPLES, GpuSigns  # noqa: E402
from sidecar.images.tensor_layout import ELEMENT_BYTES  # noqa: E402
from sidecar.images.worker import gpu_access, tensors  # noqa: E402
from sidecar.kernels import families, jpeg, jpeg_reference  # noqa: E402
from sidecar.kernels.cuda_driver import LIBRARY, Context, CudaError, CudaMissingError  # noqa: E402
from sidecar.kernels.cuda_resize import CudaResize, HostImage, plan  # noqa: E402
from sidecar.kernels.grid import PatchSpec, ProcessorSpec  # noqa: E402
from sidecar.kernels.ragged import GPU_TILES, RaggedImage, lay_out  # noqa: E402
from sidecar.readings import Value  # noqa: E402
from sidecar.runtime import own_gpu_use  # noqa: E402
from sidecar.runtime.own_gpu_use import OwnGpuUse  # noqa: E402
from sidecar.signals.gpu.activity import ActivityMeter  # noqa: E402
from sidecar.signals.gpu.poller import GpuSignal  # noqa: E402
from sidecar.signals.gpu.sample import FAULT_FIELDS, LOST_CODES  # noqa: E402
from sidecar.tools import synthetic_photos  # noqa: E402

BUDGET = 1 << 30
POISON = 0xA5
SIZES = {"720p": (720, 1280), "1080p": (1080, 1920), "12 MP": (3000, 4000)}
SMALL = (240, 320)
QWEN2_VL = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "min_pixels": 3136,
    "max_pixels": 1_003_520,
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
CLIP = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 224}, "crop_size": 224}

Note = Callable[[str, Any], None]


def processor(config: dict[str, Any], half: str = "") -> ProcessorSpec:
    found = families.from_config(config)
    assert found is not None
    return replace(found, half=half)


def picture(height: int, width: int, seed: int = 0) -> Any:
    """Noise with flat parts, so that sums overshoot."""
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image[: height // 3, : width // 2] = 255
    image[height // 2 :, width // 3 :] //= 255
    return image


def photo(height: int, width: int, subsampling: int = 2) -> bytes:
    out = io.BytesIO()
    pixels = synthetic_photos.pixels(width, height, 1)
    Image.fromarray(pixels).save(out, "JPEG", quality=90, subsampling=subsampling)
    return out.getvalue()


def opened_device() -> CudaResize:
    driver, device = gpu_access.open_driver("cuda")
    return CudaResize(driver, device, BUDGET)


class Batch:
    """Images of one kind of value in memory of their own, ready to be resized again and again."""

    def __init__(self, sources: list[Any], specs: list[ProcessorSpec]) -> None:
        self.value_bytes = ELEMENT_BYTES[specs[0].dtype]
        self.sources, self.specs = sources, specs
        self.images, wanted = [], []
        distinct = list(dict.fromkeys(specs))
        for source, spec in zip(sources, specs, strict=True):
            is_jpeg = isinstance(source, jpeg.JpegFile)
            height, width = (source.layout.height, source.layout.width) if is_jpeg else source.shape[:2]
            geometry = spec.geometry(height, width)
            patches = spec if isinstance(spec, PatchSpec) else None
            image = RaggedImage(height, width, geometry, spec.resample, patches, True, distinct.index(spec))
            size = 2 * source.layout.coefficients if is_jpeg else source.nbytes
            result = image.values * self.value_bytes
            memory = np.full(max(size, result) + 16, POISON, np.uint8)
            parts = (source.layout, source.tables) if is_jpeg else (None, None)
            self.images.append(HostImage(memory, size, result, *parts))
            wanted.append(image)
        self.fill()
        values = [tensors.round_to(tensors.table(spec), spec.dtype) for spec in distinct]
        tables = np.stack(values) if self.value_bytes > 1 else None
        self.plan = plan(lay_out(wanted, GPU_TILES), self.value_bytes, tables, self.images)

    def fill(self) -> None:
        """Write the sources, which results have replaced."""
        for source, image in zip(self.sources, self.images, strict=True):
            if isinstance(source, jpeg.JpegFile):
                assert source.decode(image.memory[: image.source_bytes].view(np.int16))
            else:
                image.memory[: image.source_bytes] = source.reshape(-1)

    def run(self, device: CudaResize) -> None:
        assert device.run(self.plan, self.value_bytes, self.images) == [True] * len(self.images)

    def check(self, device: CudaResize) -> None:
        """Hold every byte against the CPU's kernel. Raises AssertionError."""
        self.fill()
        self.run(device)
        for source, spec, image in zip(self.sources, self.specs, self.images, strict=True):
            pixels = pixels_of(source)
            made = tensors.prepare(pixels, spec.geometry(*pixels.shape[:2]), spec)
            octets = np.ascontiguousarray(made).reshape(-1).view(np.uint8)
            assert np.array_equal(image.memory[: image.result_bytes], octets), (
                f"not exact: {pixels.shape}, {spec.dtype}"
            )
            assert (image.memory[max(image.source_bytes, image.result_bytes) :] == POISON).all(), "written past its end"


def pixels_of(source: Any) -> Any:
    """A source's pixels, by the slow integers if it is a JPEG."""
    if not isinstance(source, jpeg.JpegFile):
        return source
    coefficients = np.empty(source.layout.coefficients, np.int16)
    assert source.decode(coefficients)
    return np.ascontiguousarray(jpeg_reference.pixels(source.layout, source.tables, coefficients))


def opened_jpeg(data: bytes) -> jpeg.JpegFile:
    file = jpeg.open_jpeg(data)
    assert file is not None
    return file


def seconds_of(run: Callable[[], Any], until: float, rounds: int = 20) -> tuple[float, float]:
    """Median seconds by the clock and of CPU, of `rounds` runs or until a time; the first run warms up."""
    run()
    taken, used = [], []
    for _ in range(rounds):
        cpu, start = time.process_time(), time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
        used.append(time.process_time() - cpu)
        if time.monotonic() > until:
            break
    return statistics.median(taken), statistics.median(used)


def mig_mode() -> str:
    """Whether the first GPU is sliced. It is left as it is."""
    import pynvml

    try:
        pynvml.nvmlInit()
        current, _ = pynvml.nvmlDeviceGetMigMode(pynvml.nvmlDeviceGetHandleByIndex(0))
    except pynvml.NVMLError as e:
        return f"absent: {e}"
    return "on: the slice is measured" if current else "off"


def versions(note: Note, until: float) -> None:
    """What machine this is."""
    driver, device = gpu_access.open_driver("cuda")
    note("device", f"{device.name}, compute capability {device.capability}, compute mode {device.compute_mode}")
    note("devices visible", len(driver.devices()))
    note("driver's CUDA", ".".join(map(str, driver.version())))
    note("MPS", gpu_access.has_mps(os.environ))
    note("MIG", mig_mode())
    note("free memory, MiB", gpu_access.free_memory(device) >> 20)
    note("CPUs", len(os.sched_getaffinity(0)))
    note("Python, numpy", f"{sys.version.split()[0]}, {np.__version__}")
    for name in ("torch", "torchvision", "triton"):
        try:
            note(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            note(name, "absent")


def bits(note: Note, until: float) -> None:
    """Poisoned buffers, ragged batches, crops, two processors, kinds of values, samplings: to the last byte."""
    device = opened_device()
    sizes = [(1, 1), (8, 1500), (33, 47), (140, 300), (720, 1280), (1500, 8), (56, 56), (241, 199)]
    for half in ("", "BF16", "F16"):
        qwen, clip = processor(QWEN2_VL, half), processor(CLIP, half)
        for count in (1, 8, 64):
            sources = [picture(*sizes[(i + count) % len(sizes)], i) for i in range(count)]
            Batch(sources, [clip if i % 3 == 2 else qwen for i in range(count)]).check(device)
            note(f"{qwen.dtype}, batch of {count}", "equal")
    plain = replace(processor(QWEN2_VL), do_rescale=False, do_normalize=False)
    Batch([picture(140, 300), picture(61, 283)], [plain, plain]).check(device)
    note("U8", "equal")
    spec = processor(QWEN2_VL, "BF16")
    for subsampling in (0, 1, 2):
        files = [photo(h, w, subsampling) for h, w in ((61, 83), (240, 333), (720, 1280))]
        for data in files:  # the slow integers against libjpeg-turbo
            assert np.array_equal(pixels_of(opened_jpeg(data)), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
        Batch([opened_jpeg(data) for data in files], [spec] * len(files)).check(device)
        note(f"JPEG, subsampling {subsampling}", "equal")


class Graphs:
    """Launches recorded once and replayed many times in one graph: the device's time without launches and copies.

    Raises CudaMissingError where the driver has no graphs.
    """

    REPEATS = 20

    def __init__(self, device: CudaResize) -> None:
        self._device, self._context = device, device._context
        library, size, pointer = ctypes.CDLL(LIBRARY), ctypes.c_uint64, ctypes.c_void_p
        prototypes: dict[str, list[Any]] = {
            "cuStreamBeginCapture_v2": [pointer, ctypes.c_uint],
            "cuStreamEndCapture": [pointer, ctypes.POINTER(pointer)],
            "cuGraphInstantiateWithFlags": [ctypes.POINTER(pointer), pointer, size],
            "cuGraphLaunch": [pointer, pointer],
        }
        try:
            self._functions = {name: getattr(library, name) for name in prototypes}
        except AttributeError as e:
            raise CudaMissingError(str(e)) from None
        for name, types in prototypes.items():
            self._functions[name].argtypes = types

    def _call(self, name: str, *arguments: Any) -> None:
        if code := self._functions[name](*arguments):
            raise CudaError(name, code, "graph")

    def launches(self, batch: Batch) -> dict[str, Callable[[], None]]:
        """Each launch of a batch that has run, by the kernel's name."""
        found: dict[str, Callable[[], None]] = {}
        launch = self._device._launch
        try:
            self._device._launch = lambda *given: found.update({given[0]: partial(launch, *given)})  # type: ignore[method-assign]
            self._device._resize(batch.plan, batch.value_bytes)
        finally:
            self._device._launch = launch  # type: ignore[method-assign]
        return found

    def seconds_of(self, launches: list[Callable[[], None]], until: float) -> float:
        """Seconds of these launches, one after the other."""
        graph, ready, stream = ctypes.c_void_p(), ctypes.c_void_p(), self._context.stream
        self._call("cuStreamBeginCapture_v2", stream, 2)
        for _ in range(self.REPEATS):
            for launch in launches:
                launch()
        self._call("cuStreamEndCapture", stream, ctypes.byref(graph))
        self._call("cuGraphInstantiateWithFlags", ctypes.byref(ready), graph, 0)

        def replay() -> None:
            self._call("cuGraphLaunch", ready, stream)
            self._context.wait()

        return seconds_of(replay, until)[0] / self.REPEATS


def replays(note: Note, device: CudaResize, batch: Batch, name: str, until: float) -> None:
    """The device's time of a batch, whole and by pass."""
    batch.run(device)
    try:
        graphs = Graphs(device)
        launches = graphs.launches(batch)
        for what, chosen in (("both passes", list(launches.values())), *((k, [v]) for k, v in launches.items())):
            note(f"{name}: graph replay, {what}, us", f"{graphs.seconds_of(chosen, until) * 1e6:.1f}")
    except (CudaMissingError, CudaError) as e:
        note(f"{name}: graph replay", f"left out: {e}")


def kernel(note: Note, until: float) -> None:
    """The shipped machine code: its own time by graph replay, and with copies both ways, against the CPU's kernel."""
    device, spec = opened_device(), processor(QWEN2_VL, "BF16")
    for name, size in SIZES.items():
        source = picture(*size)
        geometry = spec.geometry(*size)
        taken, _ = seconds_of(lambda s=source, g=geometry: tensors.prepare(s, g, spec), until)  # type: ignore[misc]
        note(f"{name}: CPU, ms", f"{taken * 1e3:.2f}")
        replays(note, device, Batch([source], [spec]), name, until)
        for count in (1, 8):
            batch = Batch([source] * count, [spec] * count)
            taken, used = seconds_of(lambda b=batch: b.run(device), until)  # type: ignore[misc]
            note(
                f"{name}, batch of {count}: ms an image, ms of CPU",
                f"{taken / count * 1e3:.2f}, {used / count * 1e3:.2f}",
            )


def jpeg_decode(note: Note, until: float) -> None:
    """From a file to patches: coefficients and the GPU, against libjpeg-turbo and the CPU's kernel."""
    import simplejpeg

    device, spec = opened_device(), processor(QWEN2_VL, "BF16")
    for name, size in SIZES.items():
        data = photo(*size)
        geometry = spec.geometry(*size)

        def by_cpu(data: bytes = data, geometry: Any = geometry) -> None:
            tensors.prepare(simplejpeg.decode_jpeg(data, "RGB"), geometry, spec)

        batch = Batch([opened_jpeg(data)], [spec])
        batch.check(device)

        def by_gpu(batch: Batch = batch) -> None:
            batch.fill()
            batch.run(device)

        taken, used = seconds_of(by_cpu, until)
        note(f"{name}: CPU, ms, ms of CPU", f"{taken * 1e3:.2f}, {used * 1e3:.2f}")
        taken, used = seconds_of(batch.fill, until)
        note(f"{name}: coefficients alone, ms", f"{taken * 1e3:.2f}")
        taken, used = seconds_of(by_gpu, until)
        note(f"{name}: GPU, ms, ms of CPU", f"{taken * 1e3:.2f}, {used * 1e3:.2f}")


def nvjpeg(note: Note, until: float) -> None:
    """NVIDIA's decoder by torchvision: time to pixels on the device, and how far they are from libjpeg-turbo's."""
    try:
        import torch
        from torchvision.io import decode_jpeg
    except Exception as e:  # noqa: BLE001  a package that does not fit its torch raises anything
        note("left out", f"{type(e).__name__}: {e}"[:200])
        return
    if not torch.cuda.is_available():
        note("left out", "torch sees no CUDA device")
        return
    for name, size in SIZES.items():
        for subsampling, kind in ((2, "4:2:0"), (0, "4:4:4")):
            note(f"{name}, {kind}", nvjpeg_row(torch, decode_jpeg, photo(*size, subsampling), until))


def nvjpeg_row(torch: Any, decode_jpeg: Any, data: bytes, until: float) -> str:
    octets = torch.frombuffer(bytearray(data), dtype=torch.uint8)

    def decode() -> Any:
        made = decode_jpeg(octets, mode="RGB", device="cuda")
        torch.cuda.synchronize()
        return made

    try:
        made = decode().cpu().numpy().transpose(1, 2, 0).astype(np.int16)
    except RuntimeError as e:  # this torchvision was built without it
        return f"left out: {e}"[:200]
    exact = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.int16)
    error = np.abs(made - exact)
    taken, used = seconds_of(decode, until)
    share = (error > 0).any(axis=2).mean()
    return (
        f"{taken * 1e3:.2f} ms, {used * 1e3:.2f} ms of CPU; largest error {error.max()}, {share:.1%} of pixels differ"
    )


def memory(note: Note, until: float) -> None:
    """What a context takes, and what stays after 1 and after 64 images."""
    _, device = gpu_access.open_driver("cuda")
    before = gpu_access.free_memory(device)
    resizer, spec = opened_device(), processor(QWEN2_VL, "BF16")
    note("context and kernels, MiB", (before - gpu_access.free_memory(device)) >> 20)
    size = next(iter(SIZES.values()))
    for batches, count in ((1, 1), (8, 8)):
        for _ in range(batches):
            Batch([picture(*size)] * count, [spec] * count).run(resizer)
        note(f"after {batches} batches of {count}, MiB", (before - gpu_access.free_memory(device)) >> 20)


def ceilings(note: Note, until: float) -> None:
    """Copies of 64 MiB, pageable and pinned."""
    driver, device = gpu_access.open_driver("cuda")
    context = Context(driver, device)
    size = 64 << 20
    host, target = np.full(size, 1, np.uint8), context.allocate(size)
    address = host.ctypes.data

    def up() -> None:
        context.to_device(target, address, size)
        context.wait()

    def back() -> None:
        context.to_host(address, target, size)
        context.wait()

    for kind in ("pageable", "pinned"):
        if kind == "pinned":
            context.pin(address, size)
        for name, copy in (("to the device", up), ("to the host", back)):
            taken, _ = seconds_of(copy, until, rounds=10)
            note(f"{name}, {kind}, GB/s", f"{size / taken / 1e9:.1f}")
    context.unpin(address)


def nvml(note: Note, until: float) -> None:
    """What one call of each kind costs, whether a spin is distinguished from work, and whose XIDs are counted."""
    call_costs(note, until)
    xids(note, until)
    activity(note, until)


def call_costs(note: Note, until: float) -> None:
    """Microseconds of each call of the GPU signal."""
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    calls: dict[str, Callable[[], Any]] = {
        "utilisation": lambda: pynvml.nvmlDeviceGetUtilizationRates(handle),
        "memory": lambda: pynvml.nvmlDeviceGetMemoryInfo(handle),
        "power": lambda: pynvml.nvmlDeviceGetPowerUsage(handle),
        "processes": lambda: pynvml.nvmlDeviceGetComputeRunningProcesses(handle),
        "two fields": lambda: pynvml.nvmlDeviceGetFieldValues(handle, [185, 83]),
        "four fields of faults": lambda: pynvml.nvmlDeviceGetFieldValues(handle, FAULT_FIELDS),
    }
    meter = ActivityMeter(pynvml, lambda call, *args: call(*args), LOST_CODES)
    uuid = pynvml.nvmlDeviceGetUUID(handle)
    calls["GPM"] = lambda: meter.read(uuid, handle, handle, None, time.monotonic(), True)
    for name, call in calls.items():
        try:
            taken, _ = seconds_of(call, until)
            note(f"{name}, us", f"{taken * 1e6:.0f}")
        except pynvml.NVMLError as e:
            note(name, f"absent: {e}")
    found = pynvml.nvmlDeviceGetFieldValues(handle, FAULT_FIELDS)
    note("fields of faults that are there", str([f.fieldId for f in found if f.nvmlReturn == 0]))
    note("GPM", str(meter.read(uuid, handle, handle, None, time.monotonic(), True)))
    meter.close()


LOADS = ("decode", "spin", "prefill", "idle")
LOAD_S = 7.0


def activity(note: Note, until: float) -> None:
    """Power, utilisation and GPM while an engine's stand-in decodes, prefills, does nothing, and spins.

    What decode draws is the level that is taught; a spin must then look like one, and decode and prefill must not.
    """
    signal_, signs = GpuSignal(period=0.25), GpuSigns()
    signal_.closely = True
    code = "import benchmarks.gpu_stages as s; s.stand_in()"
    command = [sys.executable, "-W", "ignore", "-c", code]
    signal_.start()
    try:
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for line in child.stdout:  # the load that begins, or why there is none
                name = line.strip()
                note(name, under_load(name, signal_, signs) if name in LOADS else "")
                if time.monotonic() > until:
                    child.kill()
    finally:
        asyncio.run(signal_.stop())


def under_load(name: str, signal_: GpuSignal, signs: GpuSigns) -> str:
    """What the GPU signal shows while a stand-in runs."""
    time.sleep(2.0)  # power is the mean of a second
    seen: list[Any] = []
    start = time.monotonic()
    while time.monotonic() < start + LOAD_S - 3:
        reading = signal_.read()
        if isinstance(reading, Value) and (not seen or reading.at > seen[-1].at):
            seen.append(reading)
            if name == "decode" and len(seen) > 8:  # a second of it teaches what a minute of service would
                for step in range(MIN_LEVEL_SAMPLES):
                    signs.teach(replace(reading, at=reading.at + 1e-6 * step))
        time.sleep(0.05)
    gpus = [reading.value[0] for reading in seen]
    if not gpus:
        return f"no reading: {signal_.read()}"
    # The series of a verdict takes 12 s; here the last reading is taken for as long.
    for later in (0.0, 5.9, 11.8, 12.1):
        look = signs.read(replace(seen[-1], at=start + later), start + later, start)

    def mean(of: Callable[[Any], Any]) -> str:
        values = [value for value in map(of, gpus) if value is not None]
        return f"{statistics.mean(values):.3g}" if values else "absent"

    def field(name: str) -> Callable[[Any], Any]:
        return lambda gpu: reading.value if isinstance(reading := getattr(gpu, name), Value) else None

    def gpm(name: str) -> Callable[[Any], Any]:
        return lambda gpu: getattr(gpu.activity.value, name) if isinstance(gpu.activity, Value) else None

    return (
        f"{mean(field('power'))} W (level {signs.level(gpus[-1].uuid)}), kernels {mean(field('utilization'))}, "
        f"tensor {mean(gpm('tensor'))}, dram {mean(gpm('dram'))}, nvlink {mean(gpm('nvlink'))}; "
        f"signs: power {look.power}, activity {look.activity}"
    )


def stand_in() -> None:
    """Be an engine's loads, one after the other; each is named on a line when it begins."""
    try:
        import torch
    except ImportError:
        print("no torch: no stand-in", flush=True)
        torch = None  # type: ignore[assignment]
    has_cuda = torch is not None and torch.cuda.is_available()
    if torch is not None and not has_cuda:
        print("torch sees no CUDA device: no stand-in", flush=True)
    for name in LOADS if has_cuda else ("idle",):
        rows, columns = {"decode": (32, 8192), "prefill": (4096, 8192)}.get(name, (32, 64))
        if has_cuda:
            x, weights = (torch.randn(n, columns, device="cuda", dtype=torch.bfloat16) for n in (rows, columns))
        print(name, flush=True)
        until = time.monotonic() + LOAD_S
        while time.monotonic() < until:
            if name == "idle":
                time.sleep(0.1)
                continue
            if name == "spin":  # one block that waits on the clock, as a collective waits for its peers
                torch.cuda._sleep(1_000_000_000)
            else:
                for _ in range(8):
                    x @ weights
            torch.cuda.synchronize()


XID_WAIT_S = 2.0


def xids(note: Note, until: float) -> None:
    """A kernel with null pointers in a process of its own: as the engine's, then as the sidecar's own GPU process."""
    with tempfile.TemporaryDirectory() as folder:
        use = own_gpu_use.next_to(f"{folder}/socket")
        signal_ = GpuSignal(period=0.1, own=lambda: own_gpu_use.read(use))
        signal_.start()
        try:
            for whose in ("another process", "the sidecar's own"):
                if time.monotonic() > until:
                    return
                own = whose != "another process"
                own_gpu_use.write(use, OwnGpuUse(running=own))
                before, code = counted(signal_), "import benchmarks.gpu_stages as s; s.null_write()"
                child = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, timeout=30, check=False)
                failed = time.monotonic()
                if own:
                    own_gpu_use.write(use, OwnGpuUse(running=False, failed_at=failed))
                wait = 2 * XID_WAIT_S if own else XID_WAIT_S
                while counted(signal_) == before and time.monotonic() < failed + wait:
                    time.sleep(0.02)
                new = [xid for xid in counted(signal_) if xid not in before]
                after = time.monotonic() - failed
                note(
                    f"XIDs after a null write of {whose}",
                    f"{new or 'none'}, {after:.2f} s after it ended with status {child.returncode}",
                )
        finally:
            asyncio.run(signal_.stop())


def counted(signal_: GpuSignal) -> list[tuple[int, int, int]]:
    """(GPU, XID, count) of all that was counted."""
    reading = signal_.read()
    gpus = reading.value if isinstance(reading, Value) else ()
    return [(gpu.index, xid, count) for gpu in gpus for xid, count in gpu.xid_errors]


def null_write() -> None:
    """Launch a kernel whose pointers are all null. Exits with status 3 if that was no error."""
    device, spec = opened_device(), processor(QWEN2_VL, "BF16")
    batch = Batch([picture(*SMALL)], [spec])
    batch.run(device)
    device._memory = 0
    try:
        device._resize(batch.plan, batch.value_bytes)
        device._context.wait()
    except CudaError:
        sys.exit(1)
    sys.exit(3)


def sanitizer(note: Note, until: float) -> None:
    """The bits of tiny sizes under compute-sanitizer, where the CUDA toolkit is there."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).exists():
        note("left out", "no compute-sanitizer: it is part of the CUDA toolkit")
        return
    code = "import benchmarks.gpu_stages as s; s.tiny()"
    for tool in ("memcheck", "racecheck", "initcheck"):
        left = until - time.monotonic()
        if left < 3:
            note(tool, "not begun: no time left")
            continue
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-W", "ignore", "-c", code]
        try:
            done = subprocess.run(command, cwd=ROOT, timeout=left, capture_output=True, text=True, check=False)
        except subprocess.TimeoutExpired:
            note(tool, f"cut off after {left:.0f} s")
            continue
        said = next((line for line in reversed(done.stdout.splitlines()) if "SUMMARY" in line), "no summary")
        note(tool, f"status {done.returncode}: {said.strip('= ')}")


def tiny() -> None:
    """A ragged batch of small images and a JPEG, held to the last byte."""
    device, spec = opened_device(), processor(QWEN2_VL, "BF16")
    files = [picture(1, 1), picture(33, 47), picture(8, 150), opened_jpeg(photo(61, 83))]
    Batch(files, [spec] * len(files)).check(device)


def cpu_of(server: int) -> float:
    """Seconds of CPU that a process and its children have used."""
    import psutil

    family = psutil.Process(server)
    return sum(sum(p.cpu_times()[:2]) for p in [family, *family.children(recursive=True)])


async def ask(path: str, chosen: Any, server: int, data: bytes, seconds: float) -> tuple[float, list[float]]:
    """Send images to a server, one from each worker's client. Returns its seconds of CPU, and each image's seconds."""
    from sidecar.images.service import ImageService

    images = ImageService(path, chosen, processor(QWEN2_VL, "BF16"))
    images.allow_gpu(True)
    waited = time.monotonic() + 40
    while True:  # until it serves, on the device that is measured
        try:
            (made,) = await images.tensors([(data, False)])
            if chosen.images_device == "cpu" or any(stage == "resize_gpu" for stage, _ in made.prepared.stages):
                break
        except Exception:  # noqa: BLE001  its workers are loading
            await asyncio.sleep(0.2)
        assert time.monotonic() < waited, f"no image was made on {chosen.images_device}"
    taken: list[float] = []
    before, until = cpu_of(server), time.monotonic() + seconds

    async def client() -> None:
        while time.monotonic() < until:
            began = time.perf_counter()
            await images.tensors([(data, False)])
            taken.append(time.perf_counter() - began)

    await asyncio.gather(*(client() for _ in range(chosen.image_workers)))
    used = cpu_of(server) - before
    await images.close()
    return used, taken


def serve(device: str, workers: int, data: bytes, seconds: float) -> tuple[float, list[float]]:
    """`ask` of a server of its own."""
    from sidecar import settings as options
    from sidecar.settings import Settings

    chosen = Settings(image_workers=workers, images_device=device)
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listening:
        path = f"{folder}/images.sock"
        listening.bind(path)
        listening.listen(256)
        fd = listening.fileno()
        # Not by the command line, whose libraries such a machine need not have.
        code = "import sys; from sidecar.images.worker import fork_server as f; sys.exit(f.main({fd}, input()))"
        command = [sys.executable, "-W", "ignore", "-c", code.format(fd=fd)]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        server = subprocess.Popen(command, pass_fds=[fd], stdin=subprocess.PIPE, env=env)
        try:
            assert server.stdin is not None
            server.stdin.write(options.to_json(chosen).encode() + b"\n")
            server.stdin.close()
            return asyncio.run(ask(path, chosen, server.pid, data, seconds))
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(20)


SERVICE_S = 4.0


def service(note: Note, until: float) -> None:
    """A real image server with JPEGs of 1080p: CPU against GPU, by workers."""
    data, cpus = photo(*SIZES.get("1080p", SMALL)), len(os.sched_getaffinity(0))
    for workers in (15, 8, 4, 1):
        if workers > max(1, cpus - 1):
            note(f"{workers} workers", f"left out: {cpus} CPUs")
            continue
        for device in ("cpu", "cuda"):
            if time.monotonic() > until:
                return
            used, taken = serve(device, workers, data, SERVICE_S)
            late = sorted(taken)[int(0.99 * len(taken))]
            rate, cpu_ms = len(taken) / SERVICE_S, used / len(taken) * 1e3
            note(
                f"{workers} workers, {device}", f"{rate:.0f} images/s, {cpu_ms:.1f} ms of CPU, p99 {late * 1e3:.1f} ms"
            )


def interference(note: Note, until: float) -> None:
    """An engine's stand-in (graphs of products, as decode and as prefill) beside images: p50 and p99 of a step."""
    import torch

    if not torch.cuda.is_available():
        note("left out", "torch sees no CUDA device")
        return
    code = "import benchmarks.gpu_stages as s, sys; s.load(float(sys.argv[1]), float(sys.argv[2]))"
    shapes = {"decode": (32, 8192), "prefill": (4096, 8192)}
    for name, (rows, columns) in shapes.items():
        x, weights = (torch.randn(n, columns, device="cuda", dtype=torch.bfloat16) for n in (rows, columns))
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            x @ weights
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for _ in range(8):
                x @ weights
        for rate in (0, 50, 200, 1000):
            beside = None
            if rate:
                command = [sys.executable, "-c", code, str(rate), "7"]
                beside = subprocess.Popen(command, cwd=ROOT)
                time.sleep(3.0)  # it makes its context
            steps: list[float] = []
            end = time.monotonic() + 4.0
            while time.monotonic() < end:
                began = time.perf_counter()
                graph.replay()
                torch.cuda.synchronize()
                steps.append(time.perf_counter() - began)
            if beside is not None:
                beside.wait(20)
            steps.sort()
            middle, late = steps[len(steps) // 2], steps[int(0.99 * len(steps))]
            note(f"{name} beside {rate} images/s: p50, p99, ms", f"{middle * 1e3:.3f}, {late * 1e3:.3f}")
            if time.monotonic() > until:
                return


def load(rate: float, seconds: float) -> None:
    """So many 1080p images a second through the GPU, for so long."""
    device, spec = opened_device(), processor(QWEN2_VL, "BF16")
    batch = Batch([picture(1080, 1920)], [spec])
    start = time.monotonic()
    for number in range(int(rate * seconds)):
        time.sleep(max(0.0, start + number / rate - time.monotonic()))
        batch.run(device)
        if time.monotonic() - start > seconds:
            break


STAGES: dict[str, Callable[[Note, float], None]] = {
    "versions": versions,
    "bits": bits,
    "kernel": kernel,
    "jpeg": jpeg_decode,
    "nvjpeg": nvjpeg,
    "service": service,
    "memory": memory,
    "ceilings": ceilings,
    "nvml": nvml,
    "interference": interference,
    "sanitizer": sanitizer,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60.0, help="after which no further row is begun")
    parser.add_argument("--small", action="store_true", help="small images only, to try the stage without a GPU")
    chosen = parser.parse_args()
    if chosen.small:
        SIZES.clear()
        SIZES["small"] = SMALL
    with chosen.out.open("a") as out:

        def note(what: str, value: Any) -> None:
            out.write(json.dumps({"stage": chosen.stage, "what": what, "value": value}) + "\n")
            out.flush()

        STAGES[chosen.stage](note, time.monotonic() + chosen.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
