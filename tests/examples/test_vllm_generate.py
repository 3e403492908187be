"""examples/vllm_generate.py: what goes to vLLM is right, and the example runs.

With a real vLLM: tests/vllm/test_generate.py.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import struct
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from sidecar.client import ImageLayout, Preprocessed

from .loading import load

example = load("vllm_generate")
expanded, features, packed = example.expanded, example.features, example.packed


def patches(*grids: tuple[int, int, int]) -> Preprocessed:
    """What a processor of 2 x 2 merged patches makes of images with these grids."""
    images = tuple(
        ImageLayout("jpeg", 14 * h, 14 * w, (t, h, w), t * h * w // 4, f"{i}") for i, (t, h, w) in enumerate(grids)
    )
    rows = sum(t * h * w for t, h, w in grids)
    tensors = {"pixel_values": np.arange(rows * 3, dtype=np.uint8).reshape(rows, 3), "image_grid_thw": np.array(grids)}
    return Preprocessed(tensors, images, "p")


def test_a_prompt_is_expanded_and_its_images_are_placed() -> None:
    """Each image token becomes as many as the model sees; another tenant's salt gives other names."""
    made = patches((1, 2, 4), (1, 2, 2))
    ids = expanded([1, 9, 2, 9, 3], 9, made)
    assert ids == [1, 9, 9, 2, 9, 3]
    found = features(ids, 9, made, b"acme")
    assert found["mm_placeholders"]["image"] == [{"offset": 1, "length": 2}, {"offset": 4, "length": 1}]
    assert len(base64.b64decode(found["kwargs_data"]["image"][1])) > 12
    assert not set(found["mm_hashes"]["image"]) & set(features(ids, 9, made, b"other")["mm_hashes"]["image"])


def test_a_prompt_that_does_not_fit_its_images_is_refused() -> None:
    """Too few or too many image tokens, expanded or not, and planes instead of patches, are errors."""
    made = patches((1, 2, 4))
    for wrong in ([1, 2], [9, 9]):
        with pytest.raises(ValueError, match="one image token"):
            expanded(wrong, 9, made)
    with pytest.raises(ValueError, match="expanded"):
        features([1, 9, 2], 9, made, b"")
    with pytest.raises(ValueError, match="patches"):
        features([9], 9, Preprocessed({"pixel_values": np.zeros(3)}, (), "p"), b"")


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (127, "7f"), (128, "cc80"), (256, "cd0100"), (65536, "ce00010000"), (1 << 32, "cf0000000100000000"),
        (None, "c0"), (True, "c3"), (False, "c2"), ("dim", "a364696d"), ({"a": [1, None]}, "81a16192" "01c0"),
        (np.zeros((1, 2), np.uint8), "93a575696e7438920102c702030000"),
    ],
)  # fmt: skip
def test_items_are_packed_as_msgpack_says(value: Any, wanted: str) -> None:
    """Each kind of value that an item has, in the shortest form of the specification."""
    assert packed(value).hex() == wanted


@pytest.mark.parametrize("value", [-1, 1.5, "x" * 32, np.zeros(1, np.float64), b"x"])
def test_anything_else_is_refused(value: Any) -> None:
    """What an item never has is a TypeError, not a wrong item."""
    with pytest.raises(TypeError):
        packed(value)


class Relay:
    """A relay in front of a vLLM, at `url`; `generate` holds what reached the token interface."""

    def __init__(self, made: Preprocessed) -> None:
        self.made = made
        self.generate: list[dict[str, Any]] = []
        self.values = ""
        self.url = ""

    def tensors(self) -> bytes:
        """`made` as a safetensors file."""
        images = [{**asdict(image), "grid_thw": list(image.grid_thw)} for image in self.made.images]
        header: dict[str, Any] = {"__metadata__": {"processor": self.made.processor, "images": json.dumps(images)}}
        data = b""
        for name, array in self.made.tensors.items():
            dtype = {"uint8": "U8", "int64": "I64"}[array.dtype.name]
            ends = [len(data), len(data) + array.nbytes]
            header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": ends}
            data += array.tobytes()
        head = json.dumps(header).encode()
        return struct.pack("<Q", len(head)) + head + data

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        match request.path:
            case "/v1/preprocess":
                await request.read()
                self.values = request.query.get("values", "")
                return web.Response(body=self.tensors())
            case "/v1/models":
                return web.json_response({"data": [{"id": "m"}]})
            case "/tokenize":
                pieces = re.findall(r"<\|image_pad\|>|.", (await request.json())["prompt"], re.DOTALL)
                return web.json_response({"tokens": [9 if len(piece) > 1 else ord(piece) for piece in pieces]})
            case "/inference/v1/generate":
                self.generate.append(await request.json())
                return web.json_response({"choices": [{"token_ids": [1, 2]}]})
            case "/detokenize":
                return web.json_response({"prompt": f"two cats {(await request.json())['tokens']}"})
        return web.Response(status=404)


@pytest.fixture
async def relay() -> AsyncIterator[Relay]:
    found = Relay(patches((1, 2, 4), (1, 2, 2)))
    runner = web.ServerRunner(web.Server(found.handle))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    found.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield found
    await runner.cleanup()


async def test_the_example_asks_and_prints_the_answer(
    relay: Relay, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From images and a question, vLLM gets the expanded prompt and its features; the text is printed."""
    for name in ("a.jpg", "b.png"):
        (tmp_path / name).write_bytes(b"x")
    images = [str(tmp_path / name) for name in ("a.jpg", "b.png")]
    status = await asyncio.to_thread(example.main, ["What is it?", *images, "--url", relay.url, "--max-tokens", "5"])
    assert (status, capsys.readouterr().out) == (0, "two cats [1, 2]\n")
    (body,) = relay.generate
    assert relay.values == "uint8" and body["sampling_params"]["max_tokens"] == 5
    assert (body["model"], body["token_ids"].count(9)) == ("m", 3)
    assert [place["length"] for place in body["features"]["mm_placeholders"]["image"]] == [2, 1]


async def test_without_a_sidecar_the_example_says_so_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No relay, and no such file: exit status 1, and one line that says what is wrong."""
    (tmp_path / "a.jpg").write_bytes(b"x")
    for file, why in (("a.jpg", "no response from the sidecar"), ("b.jpg", "No such file")):
        arguments = ["What is it?", str(tmp_path / file), "--url", "http://127.0.0.1:1"]
        assert await asyncio.to_thread(example.main, arguments) == 1
        error = capsys.readouterr().err
        assert why in error and error.count("\n") == 1
