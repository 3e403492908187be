"""`x-sidecar-handoff: cuda-ipc` from the client to the GPU's process and back, in real processes.

Triton's interpreter and a file in memory stand in for the GPU and for its memory's handle, so all but the CUDA calls is the real thing.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web

from sidecar.client.gpu_tensors import opened
from sidecar.client.preprocess import Client, PreprocessError
from sidecar.errors import RequestError
from sidecar.images.protocol import TENSORS
from sidecar.images.service import Images
from sidecar.images.worker import gpu_channel as door
from sidecar.images.worker import pipeline as work
from sidecar.relay.media.preprocess_api import preprocess, valued
from sidecar.settings import Settings
from tests.waiting import PATIENCE

from .conftest import Server
from .test_gpu_process import connected, job, peer, png, small

# The interpreter is slow: a worker that waits for it longer than for a GPU
WORKER = """
import socket, sys
from functools import partial
from sidecar.images.worker import pipeline as work, worker
from sidecar.images.worker.gpu_channel import Door
from sidecar.images.protocol import Limits
worker.serve(socket.socket(fileno=int(sys.argv[1])), partial(work.run, door=Door(sys.argv[2], 100.0)), Limits(1 << 20, 1 << 20))
"""
FILES = [png(70, 90), png(40, 52, 1)]


class Gpu:
    """A GPU process, and a patient worker at `path`."""

    def __init__(self, path: str, gpu_path: str) -> None:
        self.path = path
        with connected(gpu_path) as connection:
            self.pid = peer(connection)

    def lent(self) -> int:
        """Pieces of memory that are lent now."""
        found = set()
        for fd in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if "sidecar-loan" in str(fd.readlink()):
                    found.add(fd.stat().st_ino)
        return len(found)

    async def all_back(self) -> None:
        """Wait until nothing is lent."""
        deadline = time.monotonic() + 60
        while self.lent():
            assert time.monotonic() < deadline, "memory was not given back"
            await asyncio.sleep(0.01)  # another process's files give no event


@pytest.fixture(scope="module")
def gpu(start_server: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory, requires: Any) -> Iterator[Gpu]:
    """With room for two pieces, as the driver counts them, and for what makes them."""
    requires("python:triton")
    server = start_server({"TRITON_INTERPRET": "1"}, images_device="cuda", image_workers=1, gpu_memory_budget=6 << 20)
    path = tmp_path_factory.mktemp("gpu") / "images.sock"
    Path(f"{path}{door.NAME}").symlink_to(server.path + door.NAME)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        fd = listening.fileno()
        worker = subprocess.Popen([sys.executable, "-c", WORKER, str(fd), server.path + door.NAME], pass_fds=[fd])
    yield Gpu(str(path), server.path + door.NAME)
    worker.kill()
    worker.wait(PATIENCE)


class Service:
    """A relay's /v1/preprocess at `url`."""

    def __init__(self, path: str) -> None:
        self.images = Images(path, Settings(image_workers=2), small())
        self.images.gpu = True
        self.url = ""

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            return await preprocess(request, self.images, Settings(), lambda _: None)
        except RequestError as e:
            return web.json_response(e.body(), status=e.status)


@pytest.fixture
async def serve() -> AsyncIterator[Callable[[str], Any]]:
    """A function: path of an image server -> a Service."""
    async with AsyncExitStack() as stack:

        async def start(path: str) -> Service:
            service = Service(path)
            runner = web.ServerRunner(web.Server(service.handle, handler_cancellation=True))
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            service.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            return service

        yield start


def truth(data: bytes, values: str) -> bytes:
    """The CPU's result."""
    return bytes(work.run(job(TENSORS, valued(small(), values)), data)[1])


@pytest.mark.slow  # the interpreter
@pytest.mark.parametrize(("values", "kind"), [("", torch.float32), ("uint8", torch.uint8)])
async def test_another_process_reads_the_very_bits(gpu: Gpu, serve: Any, values: Any, kind: Any) -> None:
    """What the GPU's process made lies in its own memory, is read from here as it is, and is given back at the end of the block."""
    service = await serve(gpu.path)
    async with Client(service.url) as client:
        async with client.lend(FILES, values=values) as loan:
            with opened(loan) as tensors:
                assert [t.dtype for t in tensors] == [kind, kind] and gpu.lent() == 2
                got = [t.numpy().tobytes() for t in tensors]
                assert [list(t.shape) for t in tensors] == [[i.grid_thw[1] * i.grid_thw[2], 1176] for i in loan.images]
        assert got == [truth(data, values) for data in FILES]
        await gpu.all_back()


CONSUMER = """
import asyncio, sys
from pathlib import Path
from sidecar.client.preprocess import Client
async def main():
    async with Client(sys.argv[1]) as client, client.lend([Path(sys.argv[2])]):
        print("lent", flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""


@pytest.mark.slow  # the interpreter
async def test_a_consumer_that_is_killed_gives_back(gpu: Gpu, serve: Any, tmp_path: Path) -> None:
    """SIGKILL closes its connection, and by that the loan ends."""
    service = await serve(gpu.path)
    (tmp_path / "a.png").write_bytes(FILES[0])
    command = [sys.executable, "-c", CONSUMER, service.url, str(tmp_path / "a.png")]
    consumer = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert consumer.stdout is not None and await consumer.stdout.readline() == b"lent\n"
    assert gpu.lent() == 1
    consumer.kill()
    await consumer.wait()
    await gpu.all_back()


@pytest.mark.slow  # the interpreter
async def test_a_loan_is_given_back_by_its_name(gpu: Gpu, serve: Any) -> None:
    """DELETE through another relay process ends it; a name that is over, or none, is 404."""
    first, second = await serve(gpu.path), await serve(gpu.path)
    async with Client(first.url) as client, Client(second.url) as other, client.lend(FILES[:1]) as loan:
        await other.give_back(loan.name)
        await gpu.all_back()
        for name in (loan.name, "0" * 31, "..%2f"):
            async with other._session.delete(f"{second.url}/v1/preprocess/{name}") as answer:
                assert (answer.status, (await answer.json())["error"]["code"]) == (404, "loan_not_found")


@pytest.mark.slow  # the interpreter
async def test_the_engines_end_takes_all_back_at_once(gpu: Gpu, serve: Any) -> None:
    """What the relay does when the verdict says so ends every loan; nothing is lent until the engine serves again."""
    service = await serve(gpu.path)
    async with Client(service.url) as client:
        async with client.lend(FILES):
            assert gpu.lent() == 2
            service.images.gpu = False
            service.images.end_loans()
            await gpu.all_back()
        with pytest.raises(PreprocessError, match="left alone") as caught:
            async with client.lend(FILES):
                pass
    assert (caught.value.status, caught.value.code) == (503, "images_busy")


@pytest.mark.slow  # the interpreter
async def test_a_full_budget_is_refused_and_leaves_nothing(gpu: Gpu, serve: Any) -> None:
    """Loans count against --gpu-memory-budget: with room for two pieces a third image is refused, and all go back."""
    service = await serve(gpu.path)
    async with Client(service.url) as client:
        with pytest.raises(PreprocessError, match="no room") as caught:
            async with client.lend([*FILES, png(30, 30, 2)]):
                pass
        assert (caught.value.status, caught.value.code) == (503, "images_busy")
        await gpu.all_back()
        async with client.lend(FILES):
            assert gpu.lent() == 2


async def test_without_a_gpu_it_is_not_implemented(server: Server, serve: Any) -> None:
    """501 that says what to do, for a loan and for its end."""
    service = await serve(server.path)
    async with Client(service.url) as client:
        for ask in (client.lend(FILES).__aenter__, lambda: client.give_back("0" * 32)):
            with pytest.raises(PreprocessError, match="no GPU is in use here") as caught:
                await ask()
            assert (caught.value.status, caught.value.code) == (501, "handoff_not_implemented")
