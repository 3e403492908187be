"""The GPU process from a worker's side: its results, and that its failures cost only time.

CUDA's driver and NVML are scripted libraries (tests/cuda_stub, tests/nvml_stub): all but the GPU is the real thing.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sidecar.images.protocol import PIXELS, RAW, TENSORS, ImageDone, ImageJob, ImageLimits
from sidecar.images.service import ImageService
from sidecar.images.worker import gpu_channel, pipeline
from sidecar.images.worker.fork_server import GpuProcess, worker_plan
from sidecar.images.worker.gpu_channel import GpuChannel, GpuRequest
from sidecar.images.worker.gpu_exit import GpuExit
from sidecar.kernels import families
from sidecar.kernels.grid import ProcessorSpec
from sidecar.runtime import own_gpu_use
from sidecar.runtime.own_gpu_use import FILE_NAME, UNUSED, OwnGpuUse
from sidecar.settings import Settings, to_json
from tests.cuda_stub.build import build as build_cuda
from tests.nvml_stub.build import build as build_nvml

from . import jpegs, published
from .conftest import Server
from .test_workers import gone

LIMITS = ImageLimits(1 << 20, 1 << 20)
LONG = 100.0  # seconds: on a busy machine, a server starts slowly


def png(height: int, width: int, seed: int = 0) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def small() -> ProcessorSpec:
    """A processor whose results are small."""
    found = families.from_config(published.settings("Qwen2VLImageProcessor", max_pixels=6272, min_pixels=3136))
    assert found is not None
    return found


def zeros(to: memoryview) -> bool:
    """Rows of RGB."""
    to[:] = bytes(len(to))
    return True


def job(want: str, chosen: ProcessorSpec | None = None, gpu: bool = True) -> ImageJob:
    return ImageJob(want, (chosen or small()).to_json(), False, LIMITS, 60.0, gpu)


def stages(answer: pipeline.Answer) -> list[str]:
    assert isinstance(answer[0], ImageDone), answer[0]
    return [name for name, _ in answer[0].stages]


class Drivers:
    """The scripted libraries of CUDA and NVML, and their scripts."""

    def __init__(self, gcc: Path, folder: Path) -> None:
        self._folder, self._number = folder, 0
        self._library = build_cuda(gcc, folder / "lib")
        build_nvml(gcc, self._library)

    def env(self, cuda: str = "", nvml: str = "") -> dict[str, str]:
        """The environment in which they are loaded, with scripts of their own."""
        self._number += 1
        env = {"LD_LIBRARY_PATH": str(self._library), "CUDA_MPS_PIPE_DIRECTORY": str(self._folder)}
        for name, text in {"CUDA_STUB_SCRIPT": cuda, "NVML_STUB_SCRIPT": nvml, "CUDA_STUB_LOG": ""}.items():
            path = self._folder / f"{name}-{self._number}"
            path.write_text(text)
            env[name] = str(path)
        return env

    def calls(self) -> list[str]:
        """The calls of the last environment's CUDA library."""
        return (self._folder / f"CUDA_STUB_LOG-{self._number}").read_text().splitlines()


def gpu_process(server: Server) -> int:
    """The process that owns the GPU: the one child that keeps its environment. Workers that start have theirs yet."""
    deadline = time.monotonic() + LONG
    while True:
        processes = server.workers()
        found = [pid for pid in processes if Path(f"/proc/{pid}/environ").read_bytes().strip(b"\0")]
        if len(processes) == server.settings.image_workers + 1 and len(found) == 1:
            return found[0]
        assert time.monotonic() < deadline, found
        time.sleep(0.01)  # a process that starts gives no event


def door(server: Server) -> str:
    """Where a server's GPU process listens."""
    return server.path + gpu_channel.GPU_SOCKET_SUFFIX


def connected(path: str, patience_s: float = LONG) -> socket.socket:
    """A connection to the GPU's process, which may still be starting."""
    deadline = time.monotonic() + patience_s
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.settimeout(LONG)
        try:
            connection.connect(path)
        except OSError:
            connection.close()
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.02)  # a path that appears gives no event
        else:
            return connection


@pytest.fixture(scope="module")
def drivers(requires: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Drivers:
    """The scripted libraries."""
    return Drivers(requires("gcc"), tmp_path_factory.mktemp("drivers"))


@pytest.fixture(scope="module")
def gpu(start_server: Callable[..., Server], drivers: Drivers) -> Iterator[Server]:
    """A server with a GPU process."""
    server = start_server(drivers.env(), images_device="cuda", image_workers=1)
    connected(door(server)).close()
    yield server
    server.stop()


@pytest.fixture
def enter() -> Iterator[Callable[..., GpuChannel]]:
    """A function: arguments of a Door -> one that is closed with the test."""
    with contextlib.ExitStack() as stack:

        def made(*args: Any) -> GpuChannel:
            one = GpuChannel(*args)
            stack.callback(one.close)
            one.open()
            if args[1:] and args[1] == LONG:  # until it is greeted
                assert select.select(one.descriptors[1:], (), (), LONG)[0]
            return one

        yield made


@pytest.mark.parametrize("want", [PIXELS, RAW, TENSORS])
def test_the_gpu_gives_what_the_cpu_gives(gpu: Server, want: str, enter: Callable[..., GpuChannel]) -> None:
    """Inline pixels and tensors are the same bytes, and the stages say where they were made."""
    data = png(140, 180)
    there, here = (
        pipeline.prepare_image(job(want), data, enter(door(gpu), LONG)),
        pipeline.prepare_image(job(want), data),
    )
    assert "resize_gpu" in stages(there) and "resize_gpu" not in stages(here)
    assert bytes(there[1]) == bytes(here[1]) and len(here[1]) > 0


def photo(height: int, width: int, **options: Any) -> bytes:
    """A JPEG of noise over a gradient."""
    pixels = np.random.default_rng(1).integers(0, 60, (height, width, 3), dtype=np.uint8)
    pixels += np.linspace(0, 195, width, dtype=np.uint8)[None, :, None]
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", **options)
    return out.getvalue()


@pytest.mark.parametrize("want", [PIXELS, RAW, TENSORS])
@pytest.mark.parametrize(
    "options", [{"subsampling": 2}, {"subsampling": 1, "restart_marker_rows": 1}, {"subsampling": 0}], ids=str
)
def test_the_gpu_decodes_jpegs_as_the_cpu_does(
    gpu: Server, want: str, options: dict[str, Any], enter: Callable[..., GpuChannel]
) -> None:
    """A worker sends coefficients: the result is the same bytes."""
    data = photo(163, 211, quality=85, **options)
    there = pipeline.prepare_image(job(want), data, enter(door(gpu), LONG))
    here = pipeline.prepare_image(job(want), data)
    assert "resize_gpu" in stages(there) and "decode" not in stages(there)
    assert bytes(there[1]) == bytes(here[1]) and len(here[1]) > 0
    assert isinstance(there[0], ImageDone) and isinstance(here[0], ImageDone)
    assert there[0].original == here[0].original == (163, 211)


def with_large_table(data: bytes) -> bytes:
    """Quantisation by the largest 16-bit numbers, on which the forms of libjpeg-turbo do not agree."""
    at = data.index(b"\xff\xdb")
    length = int.from_bytes(data[at + 2 : at + 4], "big")
    return data[:at] + jpegs.segment(0xDB, b"\x10" + b"\xff\xff" * 64) + data[at + 2 + length :]


TURNED = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"


@pytest.mark.parametrize(
    "data",
    [
        photo(163, 211, progressive=True),
        photo(163, 211, exif=TURNED),
        with_large_table(photo(163, 211, quality=85, subsampling=0)),
        photo(163, 211)[:-900],
    ],
    ids=["progressive", "turned", "numbers too large", "cut off"],
)
def test_what_the_gpu_does_not_decode_is_the_cpus(gpu: Server, data: bytes, enter: Callable[..., GpuChannel]) -> None:
    """The outcome, pixels or a refusal, is that of a worker without a GPU."""
    there = pipeline.prepare_image(job(TENSORS), data, enter(door(gpu), LONG))
    here = pipeline.prepare_image(job(TENSORS), data)
    assert type(there[0]) is type(here[0]) and bytes(there[1]) == bytes(here[1])
    assert there[0].format == here[0].format


def test_planes_and_crops_come_back_whole(gpu: Server, enter: Callable[..., GpuChannel]) -> None:
    """CLIP's processor, whose crop is cut on the GPU."""
    data = png(40, 52)
    config = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}, "crop_size": 28}
    clip = families.from_config(config)
    assert clip is not None
    there = pipeline.prepare_image(job(TENSORS, clip), data, enter(door(gpu), LONG))
    assert "resize_gpu" in stages(there)
    assert bytes(there[1]) == bytes(pipeline.prepare_image(job(TENSORS, clip), data)[1])


def test_one_door_serves_many_images(gpu: Server, enter: Callable[..., GpuChannel]) -> None:
    """An arena is used again and again, by images of different sizes."""
    one = enter(door(gpu), LONG)
    for seed, size in enumerate([(160, 180), (130, 140), (190, 161)]):
        data = png(*size, seed)
        assert (
            bytes(pipeline.prepare_image(job(PIXELS), data, one)[1])
            == bytes(pipeline.prepare_image(job(PIXELS), data)[1])
            != b""
        )


def test_a_job_that_may_not_use_the_gpu_does_not(tmp_path: Path, enter: Callable[..., GpuChannel]) -> None:
    """While the engine starts, jobs forbid the GPU, and it is not asked."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(str(tmp_path / "door"))
        listening.listen()
        listening.setblocking(False)
        answer = pipeline.prepare_image(job(PIXELS, gpu=False), png(120, 120), enter(str(tmp_path / "door")))
        assert "resize" in stages(answer)
        with listening.accept()[0] as accepted:
            accepted.setblocking(False)
            assert accepted.recv(100) == b"arena"
            with pytest.raises(BlockingIOError):
                accepted.recv(100)


def test_a_gpu_process_that_has_not_accepted_is_not_asked(tmp_path: Path, enter: Callable[..., GpuChannel]) -> None:
    """While it starts, the connection waits in its backlog; the first request follows its greeting."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(str(tmp_path / "door"))
        listening.listen()
        one = enter(str(tmp_path / "door"), 0.01)
        request = GpuRequest(2, 2, "", True)
        assert one.process(zeros, 12, request, 12) is None
        with listening.accept()[0] as accepted:
            accepted.setblocking(False)
            assert accepted.recv(100) == b"arena"
            with pytest.raises(BlockingIOError):
                accepted.recv(100)
            accepted.send(gpu_channel.READY)
            assert one.process(zeros, 12, request, 12) is None
            assert accepted.recv(1000) == request.to_json()


def test_without_a_gpu_process_the_cpu_does_it_and_asks_again_later(
    tmp_path: Path, enter: Callable[..., GpuChannel]
) -> None:
    """A refused connection costs nothing; it is tried again after a pause that doubles."""
    now = [0.0]
    one = enter(str(tmp_path / "missing"), 0.1, lambda: now[0])
    assert "resize" in stages(pipeline.prepare_image(job(PIXELS), png(120, 120), one))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(str(tmp_path / "missing"))
        listening.listen()
        listening.setblocking(False)
        assert one.process(zeros, 12, GpuRequest(2, 2, "", True), 12) is None
        with pytest.raises(BlockingIOError):
            listening.accept()
        now[0] = 1.0
        assert one.process(zeros, 12, GpuRequest(2, 2, "", True), 12) is None
        listening.accept()[0].close()


def test_a_full_budget_leaves_the_image_to_the_cpu(
    start_server: Callable[..., Server], drivers: Drivers, enter: Callable[..., GpuChannel]
) -> None:
    """What does not fit into --gpu-memory-budget is refused, and the process goes on."""
    server = start_server(drivers.env(), images_device="cuda", image_workers=1, gpu_memory_budget=120_000)
    connected(door(server)).close()
    one = enter(door(server), LONG)
    large = png(240, 240)
    answer = pipeline.prepare_image(job(PIXELS), large, one)
    assert "resize" in stages(answer) and bytes(answer[1]) == bytes(pipeline.prepare_image(job(PIXELS), large)[1])
    assert "resize_gpu" in stages(pipeline.prepare_image(job(PIXELS), png(80, 80), one))


def test_a_late_gpu_is_not_waited_for_and_never_mixes_images(gpu: Server, enter: Callable[..., GpuChannel]) -> None:
    """While the process stands still the CPU does the work; until the late answer is there, the arena is left alone."""
    data = [png(120 + i, 130, i) for i in range(3)]
    here = [bytes(pipeline.prepare_image(job(PIXELS), d)[1]) for d in data]
    process = gpu_process(gpu)
    one = enter(door(gpu), 0.05)
    os.kill(process, signal.SIGSTOP)
    try:
        for d, wanted in zip(data, here, strict=True):
            answer = pipeline.prepare_image(job(PIXELS), d, one)
            assert "resize" in stages(answer) and bytes(answer[1]) == wanted
    finally:
        os.kill(process, signal.SIGCONT)
    one._timeout_s = LONG
    deadline = time.monotonic() + LONG
    while True:
        answer = pipeline.prepare_image(job(PIXELS), data[2], one)
        assert bytes(answer[1]) == here[2]
        if "resize_gpu" in stages(answer):
            break
        assert time.monotonic() < deadline


def nonsense() -> dict[str, Callable[[socket.socket], Any]]:
    """What a worker that was taken over might send."""
    spec = small().to_json()

    def arena(connection: socket.socket, fd: int) -> None:
        try:
            socket.send_fds(connection, [b"arena"], [fd])
        finally:
            os.close(fd)

    def unsealed(connection: socket.socket) -> None:
        fd = os.memfd_create("loose")
        os.ftruncate(fd, gpu_channel.ARENA_BYTES)
        arena(connection, fd)

    def ask(text: bytes) -> Callable[[socket.socket], None]:
        def send(connection: socket.socket) -> None:
            arena(connection, gpu_channel.make_arena())
            connection.send(text)

        return send

    return {
        "no arena": lambda c: c.send(b"hello"),
        "an arena that can shrink": unsealed,
        "no JSON": ask(b"\xff"),
        "another shape": ask(b'{"height": 1}'),
        "no size": ask(GpuRequest(0, -3, spec, True).to_json()),
        "more pixels than the arena": ask(GpuRequest(60_000, 60_000, spec, True).to_json()),
        "a sampling that cannot be": ask(
            GpuRequest(9, 9, spec, True, ((1, 1), (2, 2), (1, 1)), ((1,) * 64,) * 3).to_json()
        ),
        "tables of another size": ask(GpuRequest(9, 9, spec, True, ((1, 1),), ((1,) * 63,)).to_json()),
        "tables of other numbers": ask(GpuRequest(9, 9, spec, True, ((1, 1),), ((-1,) * 64,)).to_json()),
        "more coefficients than the arena": ask(
            GpuRequest(6000, 6000, spec, True, ((1, 1),) * 3, ((1,) * 64,) * 3).to_json()
        ),
        "no processor": ask(GpuRequest(9, 9, '{"family": "Nobody"}', True).to_json()),
        "a processor without numbers": ask(GpuRequest(9, 9, '{"family": "Smart"}', True).to_json()),
    }


@pytest.mark.parametrize("what", nonsense())
def test_a_worker_that_lies_is_hung_up_on(gpu: Server, what: str) -> None:
    """Nothing a worker sends ends the GPU's process."""
    with connected(door(gpu)) as connection:
        process = gpu_process(gpu)
        nonsense()[what](connection)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(100) in (b"", gpu_channel.READY) and connection.recv(100) == b""
    with connected(door(gpu)) as connection:
        assert gpu_process(gpu) == process


async def test_a_lost_gpu_costs_nothing(start_server: Callable[..., Server], drivers: Drivers) -> None:
    """The process is killed: images go on through the server's workers, on the CPU."""
    server = start_server(drivers.env(), images_device="cuda", image_workers=1)
    images = ImageService(server.path, server.settings, small())
    data = png(50, 60)
    wanted = bytes(pipeline.prepare_image(job(TENSORS), data)[1])
    await images.tensors([(data, False)])  # a worker serves, so it has connected
    images.allow_gpu(True)
    with connected(door(server)) as connection:
        socket.send_fds(connection, [b"arena"], [arena := gpu_channel.make_arena()])
        os.close(arena)
        assert connection.recv(100) == gpu_channel.READY  # and was accepted before this connection
        process = gpu_process(server)
        (worker,) = set(server.workers()) - {process}
        os.kill(process, signal.SIGKILL)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""
    for _ in range(3):
        (prepared,) = await images.tensors([(data, False)])
        assert bytes(prepared.values) == wanted
        await gone(worker)  # it cannot connect again; its successor waits for the next GPU process
    await asyncio.to_thread(server.stop)


async def test_an_engine_that_needs_its_gpu_gets_it(
    start_server: Callable[..., Server], drivers: Drivers, enter: Callable[..., GpuChannel]
) -> None:
    """When a GPU may no longer be used, the process with a context ends; one without goes on."""
    server = start_server(drivers.env(), images_device="cuda", image_workers=1)
    connected(door(server)).close()
    process = gpu_process(server)
    images = ImageService(server.path, server.settings, small())
    images.allow_gpu(False)  # the engine is starting
    assert "resize_gpu" in stages(pipeline.prepare_image(job(PIXELS), png(120, 120), enter(door(server), LONG)))
    assert gpu_process(server) == process
    images.allow_gpu(True)
    images.allow_gpu(False)
    await gone(process)
    await asyncio.to_thread(server.stop)


async def test_no_context_without_free_memory(
    start_server: Callable[..., Server], drivers: Drivers, enter: Callable[..., GpuChannel]
) -> None:
    """Where NVML reports too little free memory, the process ends before it makes a context."""
    server = start_server(drivers.env(nvml="free 1500\n"), images_device="cuda", image_workers=1)
    connected(door(server)).close()
    process = gpu_process(server)
    answer = pipeline.prepare_image(job(PIXELS), png(120, 120), enter(door(server), LONG))
    assert "resize" in stages(answer)
    await gone(process)
    assert "cuInit" in drivers.calls() and "cuDevicePrimaryCtxRetain" not in drivers.calls()
    await asyncio.to_thread(server.stop)


async def test_auto_leaves_a_gpu_that_saves_no_cpu(
    start_server: Callable[..., Server], drivers: Drivers, enter: Callable[..., GpuChannel]
) -> None:
    """With `auto`, a GPU whose driver burns CPU time is measured once and given up; images go on."""
    server = start_server(drivers.env(cuda="slow 100\n"), images_device="auto", image_workers=1)
    connected(door(server)).close()
    process = gpu_process(server)
    answer = pipeline.prepare_image(job(PIXELS), png(120, 120), enter(door(server), LONG))
    assert "resize" in stages(answer)
    await gone(process)
    assert any(line.startswith("launch down_2 ") for line in drivers.calls())
    with pytest.raises(OSError, match=r"Connection refused|No such file"):  # nobody will listen again
        while True:
            connected(door(server), patience_s=0).close()
            await asyncio.sleep(0.01)  # a socket that closes gives no event
    await asyncio.to_thread(server.stop)


async def test_auto_without_a_gpu_is_the_cpu(start_server: Callable[..., Server], drivers: Drivers) -> None:
    """Where no device is visible, `auto` serves on the CPU."""
    server = start_server(drivers.env(cuda="devices 0\n"), images_device="auto", image_workers=1)
    images = ImageService(server.path, server.settings, small())
    images.allow_gpu(True)
    assert (await images.tensors([(png(50, 60), False)]))[0].prepared.outcome == "ok"
    await asyncio.to_thread(server.stop)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("devices 0\n", "finds no device"),
        ("cuInit 803\n", "finds no device"),
        ("capability 75\n", "no shipped kernel"),
        ("mode 3\n", "compute mode"),
        ("MPS", "MPS server"),
        ("no driver", "no CUDA driver"),
    ],
)
def test_a_gpu_that_is_required_and_cannot_be_used_ends_the_start(
    drivers: Drivers, tmp_path: Path, script: str, said: str
) -> None:
    """--images-device cuda ends with exit status 1, and one line of what is wrong and what to do."""
    env = {**os.environ, **drivers.env(cuda="" if script in ("MPS", "no driver") else script)}
    if script == "MPS":
        (tmp_path / "control").touch()
        env["CUDA_MPS_PIPE_DIRECTORY"] = str(tmp_path)
    if script == "no driver":
        env["LD_LIBRARY_PATH"] = str(tmp_path)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "images.sock"))
        fd = listening.fileno()
        done = subprocess.run(
            [sys.executable, "-m", "sidecar", "image-server", "--listen-fd", str(fd)],
            input=to_json(Settings(images_device="cuda", image_workers=1)).encode() + b"\n",
            pass_fds=[fd],
            capture_output=True,
            timeout=LONG,
            env=env,
            check=False,
        )
    error = done.stderr.decode()
    assert done.returncode == 1 and "Traceback" not in error
    assert said in error.splitlines()[-1] and "--images-device cpu" in error.splitlines()[-1]


@pytest.mark.parametrize(
    ("device", "status", "pauses"),
    [
        ("auto", GpuExit.NO_DEVICE, None),
        ("auto", GpuExit.NOT_FASTER, None),
        ("auto", GpuExit.LOST, (60.0, 120.0, 240.0)),
        ("cuda", GpuExit.FULL, (60.0, 120.0, 240.0)),
        ("cuda", GpuExit.RELEASED, (120.0, 120.0, 120.0)),
    ],
)
def test_when_a_gpu_is_tried_again(tmp_path: Path, device: str, status: int, pauses: tuple[float, ...] | None) -> None:
    """What passes is tried again after pauses that double; what cannot change is not looked for again."""
    owner = GpuProcess(worker_plan(Settings(images_device=device), 1), str(tmp_path / "gpu"))
    now = 0.0
    for pause in pauses or (0.0,):
        assert owner.is_due(now)
        owner.started(os.posix_spawn("/bin/sh", ["sh", "-c", f"exit {status}"], {}), now)
        os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)
        assert not owner.is_due(1e9)
        owner.reap(now)
        assert not owner.is_due(now + pause - 1)
        now += pause
    assert owner.is_due(1e9) is (pauses is not None)
    owner.listening.close()


def test_a_gpu_that_worked_for_long_is_tried_again_soon(tmp_path: Path) -> None:
    """A process that lived for long was no failure in a row."""
    owner = GpuProcess(worker_plan(Settings(images_device="cuda"), 1), str(tmp_path / "gpu"))
    now = 0.0
    for life, pause in ((1.0, 60.0), (1.0, 120.0), (3600.0, 60.0)):
        owner.started(os.posix_spawn("/bin/sh", ["sh", "-c", "exit 1"], {}), now)
        os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)
        now += life
        owner.reap(now)
        assert not owner.is_due(now + pause - 1) and owner.is_due(now + pause)
        now += pause
    owner.listening.close()


@pytest.mark.parametrize(("status", "failed_at"), [(GpuExit.RELEASED, None), (GpuExit.LOST, 7.0), (-9, 7.0)])
def test_its_use_is_written_down_for_control(tmp_path: Path, status: int, failed_at: float | None) -> None:
    """Whether it runs, and when a fault ended it: XIDs around that are not the engine's."""
    owner, file = (
        GpuProcess(worker_plan(Settings(images_device="auto"), 1), str(tmp_path / "gpu")),
        tmp_path / FILE_NAME,
    )
    assert own_gpu_use.read(file) == UNUSED
    command = f"kill {status} $$" if status < 0 else f"exit {status}"
    owner.started(os.posix_spawn("/bin/sh", ["sh", "-c", command], {}), 3.0)
    assert own_gpu_use.read(file) == OwnGpuUse(running=True)
    os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)
    owner.reap(7.0)
    assert own_gpu_use.read(file) == OwnGpuUse(False, failed_at)
    owner.listening.close()
