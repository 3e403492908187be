"""The client's own part: answers that lie are refused. A real relay: tests/e2e."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from sidecar.client import Client, PreprocessError
from sidecar.client.preprocess import parse
from tests.waiting import PATIENCE

HEAVY = (
    "PIL",
    "click",
    "opentelemetry",
    "prometheus_client",
    "psutil",
    "pynvml",
    "sidecar.relay",
    "sidecar.settings",
    "torch",
    "uvloop",
)
NAME = "sidecar-images-abc/out-" + "0" * 32
GOOD: dict[str, Any] = {
    "__metadata__": {"processor": "p", "images": "[]"},
    "grid": {"dtype": "I64", "shape": [1, 3], "data_offsets": [0, 24]},
    "pixels": {"dtype": "U8", "shape": [2, 2], "data_offsets": [24, 28]},
}


def file(head: Any, body: bytes = bytes(28)) -> bytes:
    text = json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + body


class Liar:
    """A server that answers as `answer` says."""

    def __init__(self) -> None:
        self.answer: tuple[int, bytes, dict[str, str]] = (200, b"", {})
        self.chunked = False
        self.url = ""

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        status, body, headers = self.answer
        response = web.Response(status=status, body=body, headers=headers)
        if self.chunked:
            response.enable_chunked_encoding()
        return response


@pytest.fixture
async def liar() -> AsyncIterator[Liar]:
    found = Liar()
    runner = web.ServerRunner(web.Server(found.handle))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    found.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield found
    await runner.cleanup()


def test_the_client_needs_aiohttp_and_numpy_only() -> None:
    """`from sidecar.client import Client` loads no other part of the sidecar and none of its dependencies."""
    code = f"import sys; from sidecar.client import Client; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_a_file_is_read_without_copying() -> None:
    """Tensors lie in the very memory that was given, in their types and shapes."""
    data = bytearray(file(GOOD))
    made = parse(memoryview(data))
    data[-1] = 7
    assert made.tensors["pixels"].tolist() == [[0, 0], [0, 7]]
    assert (made.tensors["grid"].dtype, made.tensors["grid"].shape) == (np.int64, (1, 3))
    assert (made.processor, made.images) == ("p", ())


LIES: dict[str, bytes] = {
    "empty": b"",
    "cut head": file(GOOD)[:40],
    "long head": struct.pack("<Q", 1 << 62) + b"{}",
    "no json": struct.pack("<Q", 2) + b"{]",
    "no object": file([1]),
    "no metadata": file({k: v for k, v in GOOD.items() if k != "__metadata__"}),
    "cut body": file(GOOD, bytes(27)),
    "another dtype": file(GOOD | {"grid": GOOD["grid"] | {"dtype": "O"}}),
    "another size": file(GOOD | {"grid": GOOD["grid"] | {"shape": [1, 4]}}),
    "negative": file(GOOD | {"grid": GOOD["grid"] | {"shape": [-1, -3]}}),
    "before the file": file(GOOD | {"pixels": GOOD["pixels"] | {"data_offsets": [-28, -24]}}),
    "more members": file(GOOD | {"grid": GOOD["grid"] | {"more": 1}}),
    "images of another kind": file(GOOD | {"__metadata__": {"processor": "p", "images": '[{"a": 1}]'}}),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_damaged_file_is_one_clear_error(lie: str) -> None:
    """Whatever is wrong with a file, it is a PreprocessError and nothing else."""
    with pytest.raises(PreprocessError) as caught:
        parse(memoryview(LIES[lie]))
    assert caught.value.code == "unreadable"


async def test_the_sidecars_refusal_is_told(liar: Liar) -> None:
    """Message, code, status and Retry-After of the sidecar's error reach the caller."""
    error = {"error": {"message": "all image workers are busy", "type": "server_error", "code": "images_busy"}}
    liar.answer = (503, json.dumps(error).encode(), {"retry-after": "2"})
    async with Client(liar.url) as client:
        with pytest.raises(PreprocessError, match="all image workers") as caught:
            await client.preprocess([b"x"])
    assert (caught.value.code, caught.value.status, caught.value.retry_after) == ("images_busy", 503, 2.0)


async def test_no_image_is_no_request(liar: Liar) -> None:
    """It is said here, before anything is sent."""
    async with Client(liar.url) as client:
        with pytest.raises(PreprocessError, match="no image was given"):
            await client.preprocess([])


async def test_whoever_else_answers_is_told_by_the_status(liar: Liar) -> None:
    """An engine or a proxy at this URL: its status, whether it announces a length or not, and what to look at."""
    for chunked in (False, True):
        liar.answer, liar.chunked = (404, b"<html>not here</html>", {}), chunked
        async with Client(liar.url) as client:
            with pytest.raises(PreprocessError, match="--listen") as caught:
                await client.preprocess([b"x"])
        assert (caught.value.status, caught.value.code) == (404, "unknown")


async def test_an_answer_over_the_bound_is_not_read(liar: Liar) -> None:
    """A response of more than `max_bytes` is refused before it is read; another server's error keeps its status."""
    liar.answer = (200, bytes(1001), {})
    async with Client(liar.url, max_bytes=1000) as client:
        with pytest.raises(PreprocessError, match="more than 1000 bytes"):
            await client.preprocess([b"x"])
        liar.answer = (502, b"<html>", {})
        with pytest.raises(PreprocessError, match="status 502"):
            await client.preprocess([b"x"])


async def test_no_sidecar_is_one_clear_error(liar: Liar) -> None:
    """Where nothing listens, the error says that no answer came."""
    async with Client("http://127.0.0.1:1") as client:
        with pytest.raises(PreprocessError, match="no response") as caught:
            await client.preprocess([b"x"])
    assert (caught.value.code, caught.value.status) == ("unreachable", 0)


@pytest.mark.parametrize(
    ("segments", "code"),
    [
        ([{"name": "../../etc/passwd", "bytes": 9}], "unreadable"),
        ([{"name": NAME, "bytes": 1 << 40}], "unreadable"),
        ([{"name": NAME, "bytes": 9}], "shm_missing"),
        ([{"bytes": 9}], "unreadable"),
        ([], "unreadable"),
        ("x", "unreadable"),
    ],
)
async def test_a_segment_that_lies_is_refused(liar: Liar, tmp_path: Path, segments: Any, code: str) -> None:
    """No name leaves the folder, none that is missing is waited for, no size is believed."""
    liar.answer = (200, json.dumps({"segments": segments}).encode(), {})
    async with Client(liar.url, shm_dir=str(tmp_path)) as client:
        with pytest.raises(PreprocessError) as caught:
            await client.preprocess([b"x"], shm=True)
    assert caught.value.code == code


async def test_links_are_not_followed_and_sizes_are_checked(liar: Liar, tmp_path: Path) -> None:
    """A link in the folder is not opened; a file of another size is an error, and is removed all the same."""
    (tmp_path / "target").write_bytes(file(GOOD))
    path = tmp_path / NAME
    path.parent.mkdir()
    path.symlink_to(tmp_path / "target")
    size = len(file(GOOD))
    async with Client(liar.url, shm_dir=str(tmp_path)) as client:
        for wanted, code in ((size, "shm_missing"), (size + 1, "unreadable")):
            liar.answer = (200, json.dumps({"segments": [{"name": NAME, "bytes": wanted}]}).encode(), {})
            with pytest.raises(PreprocessError) as caught:
                await client.preprocess([b"x"], shm=True)
            assert caught.value.code == code
            path.unlink(missing_ok=True)
            path.write_bytes(file(GOOD))
        liar.answer = (200, json.dumps({"segments": [{"name": NAME, "bytes": size}]}).encode(), {})
        made = await client.preprocess([b"x"], shm=True)
        made.tensors["pixels"][0, 0] = 1  # private mapping
    assert not path.exists()
