"""What happens around a job: workers that die, deadlines, full queues, cancelled requests, servers that come and go."""

from __future__ import annotations

import asyncio
import base64
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

import pytest
from PIL import Image

from sidecar import settings
from sidecar.errors import BadImage, ImagesBusy
from sidecar.images.service import ImageService
from sidecar.images.worker.fork_server import worker_plan
from sidecar.images.worker_queue import WorkerQueue
from sidecar.kernels.grid import ProcessorSpec
from sidecar.settings import Settings
from sidecar.tools import synthetic_photos
from tests.waiting import PATIENCE

from .conftest import Server, children

PHOTO = base64.b64encode(synthetic_photos.photo(640, 480))


@pytest.fixture(scope="module")
def heavy() -> bytes:
    """A small file that takes a worker at least 0.1 s: 19 million pixels of one colour."""
    out = io.BytesIO()
    Image.new("RGB", (4400, 4400), (1, 2, 3)).save(out, "PNG")
    return base64.b64encode(out.getvalue())


@pytest.fixture(scope="module")
def lone(start_server: Callable[..., Server]) -> Server:
    """A server with one worker, and two places at its door."""
    return start_server(image_workers=1, image_max_pixels=20_000_000)


@pytest.fixture
async def one(lone: Server, spec: ProcessorSpec) -> ImageService:
    """A client of the lone worker, with a queue of one, once that worker is there."""
    queue = WorkerQueue(lone.path, lone.settings, deadline=30.0, max_waiting=1)
    images = ImageService(lone.path, lone.settings, spec, queue=queue)
    await images.inline(PHOTO, "x")
    return images


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process does not run inside this block."""
    os.kill(pid, signal.SIGSTOP)
    try:
        while state(pid) != "T":  # until then it may accept one more connection, which waits for the block's end
            time.sleep(0.001)
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def state(pid: int) -> str:
    """Its state in the kernel's letter: T if it is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def ticks(pid: int) -> int:
    """Processor time used so far, in clock ticks."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return int(user) + int(system)


async def at_work(pid: int) -> None:
    """Wait until the worker has used two more ticks than now."""
    await asyncio.to_thread(_at_work, pid, ticks(pid) + 2)


def _at_work(pid: int, until: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while ticks(pid) < until and time.monotonic() < deadline:
        time.sleep(0.001)  # the kernel's accounts give no event


def both(server: Server) -> list[int]:
    """A server's two workers: the first may serve before the second is forked."""
    deadline = time.monotonic() + PATIENCE
    while len(workers := server.workers()) < 2:
        assert time.monotonic() < deadline, "there is one worker only"
        time.sleep(0.01)  # a child gives no event to others
    return workers


async def killed_at_work(server: Server, images: ImageService, data: bytes) -> tuple[int, BadImage]:
    """Kill a worker during an image and return the outcome; retry if the image was done before the kill."""
    while True:
        await images.inline(PHOTO, "x")
        (worker,) = server.workers()
        job = asyncio.create_task(images.inline(data, "messages[0].content[1]"))
        await at_work(worker)
        os.kill(worker, signal.SIGKILL)
        try:
            await job
        except BadImage as e:
            return worker, e


async def gone(pid: int) -> None:
    """Wait until the process has ended."""
    with contextlib.suppress(ProcessLookupError):
        fd = os.pidfd_open(pid)
        try:
            ready, _, _ = await asyncio.to_thread(select.select, [fd], [], [], PATIENCE)
            assert ready, "the process is still there"
        finally:
            os.close(fd)


async def test_a_killed_worker_costs_one_image(lone: Server, one: ImageService, heavy: bytes) -> None:
    """SIGKILL in the middle of a job fails that image with 400 image_failed; the next one meets a new worker."""
    worker, refused = await killed_at_work(lone, one, heavy)
    assert refused.reason == "image_failed" and refused.status == 400
    assert (await one.inline(PHOTO, "x")).outcome == "ok"
    assert lone.workers() != [worker] and len(lone.workers()) == 1


def capabilities(pid: int) -> dict[str, int]:
    """A process's sets of capabilities, and whether it can gain any."""
    lines = (line.split(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {key: int(value, 16) for key, value in lines if key.startswith("Cap") or key == "NoNewPrivs"}


async def test_a_worker_has_no_capabilities(lone: Server, one: ImageService) -> None:
    """Image workers have no capabilities and can gain none, even if the sidecar has some, such as SYS_PTRACE."""
    (worker,) = lone.workers()
    found, ours = capabilities(worker), capabilities(lone.pid)
    if ours["CapEff"] & 1 << 8:  # SETPCAP: only then may the bounding set be emptied
        assert found.pop("CapBnd") == 0
    found.pop("CapBnd", None)
    assert found == {"CapInh": 0, "CapPrm": 0, "CapEff": 0, "CapAmb": 0, "NoNewPrivs": 1}
    await one.inline(PHOTO, "x")


def test_with_sys_ptrace_alone_nothing_of_it_is_left() -> None:
    """As in the pod: root with this one capability. Neither the process keeps it nor a program that it starts."""
    if not capabilities(os.getpid())["CapEff"] & 1 << 19:
        pytest.skip("needs SYS_PTRACE")
    keep = "import ctypes; f = __import__('sidecar.images.worker.sandbox', fromlist=['x']); "
    keep += "libc = ctypes.CDLL(None); only = 1 << 19; words = (f._Words * 2)((only, only, only), (0, 0, 0)); "
    keep += "libc.capset(ctypes.byref(f._Header(f.CAPSET_VERSION_3, 0)), words); "
    show = "print(open('/proc/self/status').read().partition('CapEff:')[2].split()[0], flush=True); "
    end = "__import__('os').execv('/bin/grep', ['grep', 'CapEff', '/proc/self/status'])"
    code = keep + show + "f.drop_capabilities(); " + show + end
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    before, after, started = done.stdout.split("\n")[:3]
    assert (int(before, 16), int(after, 16), int(started.split()[1], 16)) == (1 << 19, 0, 0)


async def test_the_deadline_ends_a_job(lone: Server, one: ImageService, spec: ProcessorSpec, heavy: bytes) -> None:
    """A job past its deadline is ended inside C code with image_deadline; the next one is served."""
    (worker,) = lone.workers()
    hasty = ImageService(lone.path, lone.settings, spec, queue=WorkerQueue(lone.path, lone.settings, deadline=0.02))
    with pytest.raises(BadImage) as refused:
        await hasty.inline(heavy, "x")
    assert refused.value.reason == "image_deadline"
    await gone(worker)
    assert (await one.inline(PHOTO, "x")).outcome == "ok"


async def test_a_full_queue_is_busy(lone: Server, one: ImageService) -> None:
    """With all slots and the queue full, the next image gets 503 at once, and the waiting ones are served later."""
    (worker,) = lone.workers()
    with stopped(worker):
        jobs = [asyncio.create_task(one.inline(PHOTO, "x")) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(ImagesBusy) as busy:
            await one.inline(PHOTO, "x")
        assert busy.value.status == 503 and busy.value.retry_after
    assert [job.outcome for job in await asyncio.gather(*jobs)] == ["ok"] * 3


async def test_cancelled_jobs_leave_nothing_behind(lone: Server, one: ImageService) -> None:
    """Cancelled jobs free their slots, in the backlog and in the queue: many more than there are slots."""
    (worker,) = lone.workers()
    with stopped(worker):
        for _ in range(5):
            jobs = [asyncio.create_task(one.inline(PHOTO, "x")) for _ in range(3)]
            await asyncio.sleep(0)
            for job in jobs:
                job.cancel()
            assert all(
                isinstance(end, asyncio.CancelledError) for end in await asyncio.gather(*jobs, return_exceptions=True)
            )
    assert (await one.inline(PHOTO, "x")).outcome == "ok"
    assert lone.workers() == [worker]


async def test_a_job_cancelled_at_work_harms_nobody(lone: Server, one: ImageService, heavy: bytes) -> None:
    """Cancelling while the worker decodes leaves the worker alive for the next image."""
    (worker,) = lone.workers()
    job = asyncio.create_task(one.inline(heavy, "x"))
    await at_work(worker)
    job.cancel()
    with pytest.raises(asyncio.CancelledError):
        await job
    assert (await one.inline(PHOTO, "x")).outcome == "ok"
    assert lone.workers() == [worker]


async def test_one_slow_image_does_not_hold_up_the_others(server: Server, images: ImageService, heavy: bytes) -> None:
    """With two workers, small images are served while a heavy one is at work."""
    job = asyncio.create_task(images.inline(heavy, "x"))
    while not job.done():
        assert (await images.inline(PHOTO, "x")).outcome == "ok"
    assert (await job).outcome == "ok"


async def test_many_images_at_once_come_back_as_themselves(images: ImageService, spec: ProcessorSpec) -> None:
    """Forty concurrent images of different sizes each get their own answer."""
    sizes = [(400 + 100 * (i % 5), 300 + 100 * (i // 5)) for i in range(40)]
    jobs = [images.inline(base64.b64encode(synthetic_photos.photo(*size)), "x") for size in sizes]
    wanted = [spec.geometry(height, width).size for width, height in sizes]
    assert [(p.height, p.width) for p in await asyncio.gather(*jobs)] == wanted
    assert len(set(wanted)) > 10


async def test_a_client_that_says_nonsense_or_nothing_is_hung_up_on(lone: Server, one: ImageService) -> None:
    """Bytes that are no frame, a frame over the bound, and a client that leaves: the worker goes on."""
    (worker,) = lone.workers()
    loop = asyncio.get_running_loop()
    for nonsense in (
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff" * 12,
        b"\0\0\0\x02" + b"\0" * 8 + b"[]",
        b"\0\0\0\x02" + b"\xff" * 8 + b"[]",
    ):
        with socket.socket(socket.AF_UNIX) as client:
            client.setblocking(False)
            await loop.sock_connect(client, lone.path)
            await loop.sock_recv(client, 4096)  # Ready
            await loop.sock_sendall(client, nonsense)
            client.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                assert await loop.sock_recv(client, 4096) == b""
    assert (await one.inline(PHOTO, "x")).outcome == "ok"
    assert lone.workers() == [worker]


async def test_a_restarted_server_is_waited_for(start_server: Callable[..., Server], spec: ProcessorSpec) -> None:
    """The server is killed: its workers die with it, and an image that comes at once waits for the next server."""
    server = start_server()
    images = ImageService(server.path, server.settings, spec)
    await images.inline(PHOTO, "x")
    workers = await asyncio.to_thread(both, server)
    server.restart()
    for worker in workers:
        await gone(worker)
    assert (await images.inline(PHOTO, "x")).outcome == "ok"
    assert not set(server.workers()) & set(workers)


def test_a_worker_whose_server_died_before_it_could_bind_itself_ends() -> None:
    """A server that is killed right after the fork had no time to bind the child's life to its own."""
    code = "from sidecar.images.worker import worker; worker.bind_to({}); print('lives')"
    for server, ends in ((os.getpid(), (0, "lives\n")), (os.getppid(), (1, ""))):
        done = subprocess.run([sys.executable, "-c", code.format(server)], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == ends


async def test_no_server_is_busy(tmp_path: Path, spec: ProcessorSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a server the wait is bounded and ends in 503."""
    monkeypatch.setattr("sidecar.images.worker_queue.QUEUE_TIMEOUT_S", 0.1)
    nowhere, chosen = str(tmp_path / "nothing"), Settings()
    images = ImageService(nowhere, chosen, spec, queue=WorkerQueue(nowhere, chosen, deadline=0.1))
    with pytest.raises(ImagesBusy):
        await images.inline(PHOTO, "x")


async def test_an_image_of_a_request_hardly_waits_for_a_worker(
    tmp_path: Path, spec: ProcessorSpec, heavy: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a server the first image waits a moment, the next not at all; both are taken once a worker answers."""
    monkeypatch.setattr("sidecar.images.worker_queue.INLINE_WAIT_S", 0.05)
    chosen = Settings(image_workers=1, images_device="cpu", image_max_pixels=20_000_000)
    images = ImageService(str(tmp_path / "images.sock"), chosen, spec)
    with pytest.raises(ImagesBusy) as busy:
        await images.inline(heavy, "x")
    assert busy.value.why == "workers_away"
    search = images._workers._search
    assert search is not None and not search.done()
    monkeypatch.setattr("sidecar.images.worker_queue.INLINE_WAIT_S", PATIENCE)
    with pytest.raises(ImagesBusy) as busy:
        await images.inline(heavy, "x")
    assert busy.value.why == "workers_away" and not search.done(), "it did not wait"
    server = Server(tmp_path, chosen)
    try:
        async with asyncio.timeout(PATIENCE):
            await search
        assert (await images.inline(heavy, "x")).outcome == "ok"
    finally:
        server.stop()
        await images.close()


async def test_a_closed_client_takes_no_more(images: ImageService) -> None:
    """After close() an image is refused as busy."""
    await images.close()
    with pytest.raises(ImagesBusy):
        await images.inline(PHOTO, "x")


async def test_sigterm_ends_server_and_workers(start_server: Callable[..., Server], spec: ProcessorSpec) -> None:
    """SIGTERM ends the server with exit status 0, and every worker with it."""
    server = start_server()
    await ImageService(server.path, server.settings, spec).inline(PHOTO, "x")
    workers = server.workers()
    assert await asyncio.to_thread(server.stop) == 0
    for worker in workers:
        await gone(worker)


async def test_the_server_ends_with_its_parent(tmp_path: Path, spec: ProcessorSpec) -> None:
    """When the server's parent is killed, server and workers end by themselves."""
    path = str(tmp_path / "images.sock")
    chosen = Settings(image_workers=1, images_device="cpu")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen(8)
        fd = listening.fileno()
        # a shell that starts the server as its child and prints its process id
        command = f'exec 9<&0; "$0" -m sidecar image-server --listen-fd {fd} <&9 & echo $!; wait'
        shell = start_shell(command, fd)
        assert shell.stdin is not None and shell.stdout is not None
        with shell.stdin, shell.stdout:
            shell.stdin.write(settings.to_json(chosen).encode() + b"\n")
            shell.stdin.flush()
            server = int(await asyncio.to_thread(shell.stdout.readline))
            await ImageService(path, chosen, spec).inline(PHOTO, "x")
            (worker,) = children(server)
            shell.kill()
            shell.wait()
            await gone(server)
            await gone(worker)


def start_shell(command: str, fd: int) -> subprocess.Popen[bytes]:
    line = ["/bin/sh", "-c", command, sys.executable]
    return subprocess.Popen(line, pass_fds=[fd], stdin=subprocess.PIPE, stdout=subprocess.PIPE)


@pytest.mark.parametrize(
    ("chosen", "available", "workers"),
    [
        (Settings(), 4, 4),
        (Settings(image_workers=2), 8, 2),
        (Settings(image_workers=8), 2, 8),
        (Settings(images_device="cuda"), 8, 8),
    ],
)
def test_there_is_a_worker_for_each_cpu(chosen: Settings, available: int, workers: int) -> None:
    """As many workers as CPUs, each with one thread, unless another number was asked for; a GPU changes nothing."""
    assert worker_plan(chosen, available).workers == workers
