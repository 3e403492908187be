"""Lent GPU memory, for `gpu_images.py --check ipc`: this process opens what the image server's GPU process lends.

The real GPU process, on a GPU or in Triton's interpreter. Every tensor is compared with the CPU's, to the last bit, and the
device must have its memory back afterwards.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image

from sidecar import settings
from sidecar.client.gpu_tensors import opened
from sidecar.client.preprocess import Lent, Loan
from sidecar.images.gpu_loan import NoGpu, borrowed
from sidecar.images.protocol import DEVICE, GPU_DOOR, TENSORS, Done, Job, Limits
from sidecar.images.worker import pipeline as work
from sidecar.images.worker.gpu_channel import Door
from sidecar.relay.media.preprocess_api import valued

ROOT: Final = Path(__file__).resolve().parent.parent
CHOSEN: Final = settings.Settings(images_device="cuda", image_workers=1)
PATIENCE: Final = 200.0  # seconds: the first one compiles, and the interpreter is slow
SLACK: Final = 64 << 20  # bytes that others on the device may have taken meanwhile


def check(pictures: list[Any], processor: Any) -> str:
    """All pictures, (height, width, 3) uint8, as floats and as bytes. Returns what was found; raises AssertionError."""
    with serving() as path:
        count = asyncio.run(_check(path + GPU_DOOR, [png(p) for p in pictures], processor))
    name = "Triton's interpreter" if os.environ.get("TRITON_INTERPRET") == "1" else torch.cuda.get_device_name(0)
    return f"lent memory: {count} tensors, read by another process, equal to the last bit and given back ({name})"


async def _check(path: str, files: list[bytes], processor: Any) -> int:
    door, free, count = Door(path, PATIENCE), None, 0
    for values in ("", "uint8"):
        spec = valued(processor, values)
        for data in files:
            wanted = bytes(_done(_job(TENSORS, spec), data)[1])
            async with _loan(path) as loan:
                job = replace(_job(DEVICE, spec), gpu=True, loan=loan.name)
                done, where = await asyncio.to_thread(_done, job, data, door)
                assert _read(where, spec.shapes([spec.geometry(*done.original)])["pixel_values"]) == wanted
            left = await asyncio.to_thread(_free)
            assert free is None or left >= free - SLACK, (
                f"memory was not given back: {left} bytes are free, {free} were"
            )
            free, count = left if free is None else free, count + 1  # the first one made contexts and kernels
    door.close()
    return count


def _job(want: str, spec: Any) -> Job:
    return Job(want, spec.to_json(), False, Limits(1 << 30, 1 << 28), PATIENCE)


def _done(job: Job, data: bytes, door: Door | None = None) -> tuple[Done, Any]:
    """What a worker does with a job: here in this process, which is another one than the GPU's."""
    answer, payload = work.run(job, data, door)
    assert isinstance(answer, Done), answer
    return answer, payload


def _read(where: bytes, tensor: tuple[str, list[int]]) -> bytes:
    said = json.loads(where)
    handle = base64.b64decode(said["handle"])
    piece = Lent(said["kind"], said["device"], handle, said["offset"], said["bytes"], tensor[0], tuple(tensor[1]))
    with opened(Loan("", (piece,), (), "", True)) as tensors:
        octets: bytes = tensors[0].cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return octets


def _free() -> int:
    """Free bytes of the device."""
    return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else 0


@contextlib.asynccontextmanager
async def _loan(path: str) -> AsyncIterator[Any]:
    """A loan, once the GPU's process listens."""
    async with contextlib.AsyncExitStack() as kept:
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    loan = await kept.enter_async_context(borrowed(path))
                    break
                except NoGpu:
                    await asyncio.sleep(0.2)
        yield loan


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """An image server with a GPU process, at the path of its socket."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{folder}/images.sock")
        listening.listen()
        fd = listening.fileno()
        command = [sys.executable, "-m", "sidecar", "image-server", "--listen-fd", str(fd)]
        server = subprocess.Popen(command, cwd=ROOT, pass_fds=[fd], stdin=subprocess.PIPE)
        assert server.stdin is not None
        try:
            server.stdin.write(settings.to_json(CHOSEN).encode() + b"\n")
            server.stdin.close()
            yield f"{folder}/images.sock"
        finally:
            server.terminate()
            server.wait(60)


def png(pixels: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(out, "PNG", compress_level=1)
    return out.getvalue()
